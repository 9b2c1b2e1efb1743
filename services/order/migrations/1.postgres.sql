CREATE TABLE orders (
    id             UUID PRIMARY KEY,
    customer_id    TEXT NOT NULL,
    status         TEXT NOT NULL CHECK (status IN ('pending', 'reserved', 'confirmed', 'cancelled')),
    reason         TEXT,
    lane           TEXT NOT NULL,
    currency       TEXT NOT NULL,
    total          BIGINT NOT NULL CHECK (total >= 0),
    items          JSONB NOT NULL,
    payment_id     UUID,
    correlation_id TEXT NOT NULL,
    -- Rises with each entry of the timeline; every update is guarded by it.
    version        BIGINT NOT NULL,
    created_at     TIMESTAMPTZ NOT NULL,
    updated_at     TIMESTAMPTZ NOT NULL,
    deadline       TIMESTAMPTZ NOT NULL
);
CREATE INDEX orders_of_customer ON orders (customer_id, id);
CREATE INDEX orders_by_status ON orders (status, id);

-- What happened to each order, and why: the answer at 3 AM.
CREATE TABLE timeline (
    order_id UUID NOT NULL,
    version  BIGINT NOT NULL,
    event    TEXT NOT NULL,
    detail   TEXT,
    event_id UUID,
    at       TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (order_id, version)
);

-- Our own copy of inventory's products: the newest version wins, whatever the order of arrival.
CREATE TABLE products (
    id       TEXT PRIMARY KEY,
    name     TEXT NOT NULL,
    price    BIGINT NOT NULL,
    currency TEXT NOT NULL,
    version  BIGINT NOT NULL
);
