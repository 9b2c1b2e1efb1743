-- The payment gateway's token for what the customer pays with.
ALTER TABLE orders ADD COLUMN payment_method TEXT;
ALTER TABLE orders ADD COLUMN refunding BIGINT NOT NULL DEFAULT 0 CHECK (refunding >= 0);
ALTER TABLE orders ADD COLUMN refunded BIGINT NOT NULL DEFAULT 0 CHECK (refunded >= 0);
ALTER TABLE orders ADD CONSTRAINT not_more_than_paid CHECK (refunding + refunded <= total);

CREATE TABLE refunds (
    id         UUID PRIMARY KEY,
    order_id   UUID NOT NULL,
    amount     BIGINT NOT NULL CHECK (amount > 0),
    lines      JSONB NOT NULL,
    restock    BOOLEAN NOT NULL,
    reason     TEXT,
    status     TEXT NOT NULL CHECK (status IN ('pending', 'done', 'rejected')),
    rejection  TEXT,
    created_at TIMESTAMPTZ NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL
);
CREATE INDEX refunds_of ON refunds (order_id, id);

-- Gateways that payment says are out of reach, and until when that holds unless it is said again.
CREATE TABLE outages (
    gateway TEXT PRIMARY KEY,
    until   TIMESTAMPTZ NOT NULL
);
