-- What came back of sold orders, once for each refund: to the shelf, or written off.
CREATE TABLE returns (
    refund_id TEXT PRIMARY KEY,
    order_id  TEXT NOT NULL,
    lines     TEXT NOT NULL,
    restocked INTEGER NOT NULL,
    at        INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX returns_of ON returns (order_id);
