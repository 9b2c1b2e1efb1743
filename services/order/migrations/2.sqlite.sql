-- The payment gateway's token for what the customer pays with.
ALTER TABLE orders ADD COLUMN payment_method TEXT;
ALTER TABLE orders ADD COLUMN refunding INTEGER NOT NULL DEFAULT 0 CHECK (refunding >= 0);
ALTER TABLE orders ADD COLUMN refunded INTEGER NOT NULL DEFAULT 0 CHECK (refunded >= 0 AND refunding + refunded <= total);

CREATE TABLE refunds (
    id         TEXT PRIMARY KEY,
    order_id   TEXT NOT NULL,
    amount     INTEGER NOT NULL CHECK (amount > 0),
    lines      TEXT NOT NULL,
    restock    INTEGER NOT NULL,
    reason     TEXT,
    status     TEXT NOT NULL CHECK (status IN ('pending', 'done', 'rejected')),
    rejection  TEXT,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX refunds_of ON refunds (order_id, id);

-- Gateways that payment says are out of reach, and until when that holds unless it is said again.
CREATE TABLE outages (
    gateway TEXT PRIMARY KEY,
    until   INTEGER NOT NULL
) WITHOUT ROWID;
