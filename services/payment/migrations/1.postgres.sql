-- One payment per order. 'forbidden' is a tombstone: the cancellation came before the reservation.
CREATE TABLE payments (
    order_id       UUID PRIMARY KEY,
    payment_id     UUID NOT NULL UNIQUE,
    status         TEXT NOT NULL CHECK (status IN ('pending', 'succeeded', 'failed', 'refunding', 'refunded', 'forbidden')),
    cancelled      BOOLEAN NOT NULL DEFAULT FALSE,
    amount         BIGINT NOT NULL CHECK (amount >= 0),
    currency       TEXT NOT NULL,
    reason         TEXT,
    lane           TEXT NOT NULL,
    correlation_id TEXT NOT NULL,
    version        BIGINT NOT NULL,
    expires_at     TIMESTAMPTZ NOT NULL,
    created_at     TIMESTAMPTZ NOT NULL,
    updated_at     TIMESTAMPTZ NOT NULL
);
