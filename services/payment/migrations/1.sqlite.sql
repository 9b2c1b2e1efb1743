-- One payment per order. 'forbidden' is a tombstone: the cancellation came before the reservation.
CREATE TABLE payments (
    order_id       TEXT PRIMARY KEY,
    payment_id     TEXT NOT NULL UNIQUE,
    status         TEXT NOT NULL CHECK (status IN ('pending', 'succeeded', 'failed', 'refunding', 'refunded', 'forbidden')),
    cancelled      INTEGER NOT NULL DEFAULT 0,
    amount         INTEGER NOT NULL CHECK (amount >= 0),
    currency       TEXT NOT NULL,
    reason         TEXT,
    lane           TEXT NOT NULL,
    correlation_id TEXT NOT NULL,
    version        INTEGER NOT NULL,
    expires_at     INTEGER NOT NULL,
    created_at     INTEGER NOT NULL,
    updated_at     INTEGER NOT NULL
) WITHOUT ROWID;
