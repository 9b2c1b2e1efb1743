-- What came back of sold orders, once for each refund: to the shelf, or written off.
CREATE TABLE returns (
    refund_id UUID PRIMARY KEY,
    order_id  UUID NOT NULL,
    lines     JSONB NOT NULL,
    restocked BOOLEAN NOT NULL,
    at        TIMESTAMPTZ NOT NULL
);
CREATE INDEX returns_of ON returns (order_id);
