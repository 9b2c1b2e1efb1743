-- The checks are the last line of defence: no bug above them can oversell or lose stock.
CREATE TABLE products (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL,
    price      BIGINT NOT NULL CHECK (price >= 0),
    currency   TEXT NOT NULL,
    version    BIGINT NOT NULL,
    received   BIGINT NOT NULL DEFAULT 0,
    on_hand    BIGINT NOT NULL DEFAULT 0 CHECK (on_hand >= reserved),
    reserved   BIGINT NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    sold       BIGINT NOT NULL DEFAULT 0 CHECK (sold >= 0),
    updated_at TIMESTAMPTZ NOT NULL,
    CHECK (on_hand + sold = received)
);

CREATE TABLE stock_movements (
    id         BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    product_id TEXT NOT NULL,
    delta      BIGINT NOT NULL,
    reason     TEXT NOT NULL,
    correlation_id TEXT NOT NULL,
    at         TIMESTAMPTZ NOT NULL
);
CREATE INDEX stock_movements_of ON stock_movements (product_id, id);

-- One per order. 'cancelled' is a tombstone: the cancellation came before the order.
CREATE TABLE reservations (
    order_id   UUID PRIMARY KEY,
    status     TEXT NOT NULL CHECK (status IN ('reserved', 'rejected', 'released', 'committed', 'cancelled')),
    lines      JSONB NOT NULL,
    correlation_id TEXT NOT NULL,
    expires_at TIMESTAMPTZ,
    created_at TIMESTAMPTZ NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL
);
