-- What the customer pays with, and the gateway's own id of the payment: tokens both.
ALTER TABLE payments ADD COLUMN method TEXT;
ALTER TABLE payments ADD COLUMN reference TEXT;
-- What is being given back and what was, never more than was paid: the last line of defence. (SQLite cannot add a rule over columns that
-- are there; these name them all the same.)
ALTER TABLE payments ADD COLUMN refunding INTEGER NOT NULL DEFAULT 0 CHECK (refunding >= 0);
ALTER TABLE payments ADD COLUMN refunded INTEGER NOT NULL DEFAULT 0 CHECK (refunded >= 0 AND refunding + refunded <= amount);
-- When somebody was told that it does not come to an end.
ALTER TABLE payments ADD COLUMN escalated_at INTEGER;
UPDATE payments SET refunding = amount WHERE status = 'refunding';
UPDATE payments SET refunded = amount WHERE status = 'refunded';
CREATE INDEX payments_pending ON payments (created_at) WHERE status = 'pending';
CREATE UNIQUE INDEX payments_by_reference ON payments (reference) WHERE reference IS NOT NULL;

-- One for each time money is given back; because the order was cancelled, with the payment's id.
CREATE TABLE refunds (
    refund_id      TEXT PRIMARY KEY,
    order_id       TEXT NOT NULL,
    amount         INTEGER NOT NULL,
    status         TEXT NOT NULL CHECK (status IN ('pending', 'done', 'rejected')),
    reason         TEXT,
    escalated_at   INTEGER,
    created_at     INTEGER NOT NULL,
    updated_at     INTEGER NOT NULL
) WITHOUT ROWID;
INSERT INTO refunds SELECT payment_id, order_id, amount, CASE status WHEN 'refunded' THEN 'done' ELSE 'pending' END, NULL, NULL,
    updated_at, updated_at FROM payments WHERE status IN ('refunding', 'refunded');
CREATE INDEX refunds_of ON refunds (order_id);
CREATE INDEX refunds_pending ON refunds (created_at) WHERE status = 'pending';

-- What the gateway has called back about, so that a repetition is known as one.
CREATE TABLE callbacks (
    id          TEXT PRIMARY KEY,
    kind        TEXT NOT NULL,
    reference   TEXT,
    received_at INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX callbacks_age ON callbacks (received_at);
