CREATE TABLE orders (
    id             TEXT PRIMARY KEY,
    customer_id    TEXT NOT NULL,
    status         TEXT NOT NULL CHECK (status IN ('pending', 'reserved', 'confirmed', 'cancelled')),
    reason         TEXT,
    lane           TEXT NOT NULL,
    currency       TEXT NOT NULL,
    total          INTEGER NOT NULL CHECK (total >= 0),
    items          TEXT NOT NULL,
    payment_id     TEXT,
    correlation_id TEXT NOT NULL,
    -- Rises with each entry of the timeline; every update is guarded by it.
    version        INTEGER NOT NULL,
    created_at     INTEGER NOT NULL,
    updated_at     INTEGER NOT NULL,
    deadline       INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX orders_of_customer ON orders (customer_id, id);
CREATE INDEX orders_by_status ON orders (status, id);

-- What happened to each order, and why: the answer at 3 AM.
CREATE TABLE timeline (
    order_id TEXT NOT NULL,
    version  INTEGER NOT NULL,
    event    TEXT NOT NULL,
    detail   TEXT,
    event_id TEXT,
    at       INTEGER NOT NULL,
    PRIMARY KEY (order_id, version)
) WITHOUT ROWID;

-- Our own copy of inventory's products: the newest version wins, whatever the order of arrival.
CREATE TABLE products (
    id       TEXT PRIMARY KEY,
    name     TEXT NOT NULL,
    price    INTEGER NOT NULL,
    currency TEXT NOT NULL,
    version  INTEGER NOT NULL
) WITHOUT ROWID;
