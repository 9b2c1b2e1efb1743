-- The checks are the last line of defence: no bug above them can oversell or lose stock.
CREATE TABLE products (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL,
    price      INTEGER NOT NULL CHECK (price >= 0),
    currency   TEXT NOT NULL,
    version    INTEGER NOT NULL,
    received   INTEGER NOT NULL DEFAULT 0,
    on_hand    INTEGER NOT NULL DEFAULT 0 CHECK (on_hand >= reserved),
    reserved   INTEGER NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    sold       INTEGER NOT NULL DEFAULT 0 CHECK (sold >= 0),
    updated_at INTEGER NOT NULL,
    CHECK (on_hand + sold = received)
) WITHOUT ROWID;

CREATE TABLE stock_movements (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    product_id TEXT NOT NULL,
    delta      INTEGER NOT NULL,
    reason     TEXT NOT NULL,
    correlation_id TEXT NOT NULL,
    at         INTEGER NOT NULL
);
CREATE INDEX stock_movements_of ON stock_movements (product_id, id);

-- One per order. 'cancelled' is a tombstone: the cancellation came before the order.
CREATE TABLE reservations (
    order_id   TEXT PRIMARY KEY,
    status     TEXT NOT NULL CHECK (status IN ('reserved', 'rejected', 'released', 'committed', 'cancelled')),
    lines      TEXT NOT NULL,
    correlation_id TEXT NOT NULL,
    expires_at INTEGER,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL
) WITHOUT ROWID;
