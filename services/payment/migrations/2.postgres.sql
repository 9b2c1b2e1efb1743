-- What the customer pays with, and the gateway's own id of the payment: tokens both.
ALTER TABLE payments ADD COLUMN method TEXT;
ALTER TABLE payments ADD COLUMN reference TEXT;
-- What is being given back and what was, never more than was paid: the last line of defence.
ALTER TABLE payments ADD COLUMN refunding BIGINT NOT NULL DEFAULT 0 CHECK (refunding >= 0);
ALTER TABLE payments ADD COLUMN refunded BIGINT NOT NULL DEFAULT 0 CHECK (refunded >= 0);
-- When somebody was told that it does not come to an end.
ALTER TABLE payments ADD COLUMN escalated_at TIMESTAMPTZ;
UPDATE payments SET refunding = amount WHERE status = 'refunding';
UPDATE payments SET refunded = amount WHERE status = 'refunded';
ALTER TABLE payments ADD CONSTRAINT not_more_than_paid CHECK (refunding + refunded <= amount);
CREATE INDEX payments_pending ON payments (created_at) WHERE status = 'pending';
CREATE UNIQUE INDEX payments_by_reference ON payments (reference) WHERE reference IS NOT NULL;

-- One for each time money is given back; because the order was cancelled, with the payment's id.
CREATE TABLE refunds (
    refund_id      UUID PRIMARY KEY,
    order_id       UUID NOT NULL,
    amount         BIGINT NOT NULL,
    status         TEXT NOT NULL CHECK (status IN ('pending', 'done', 'rejected')),
    reason         TEXT,
    escalated_at   TIMESTAMPTZ,
    created_at     TIMESTAMPTZ NOT NULL,
    updated_at     TIMESTAMPTZ NOT NULL
);
INSERT INTO refunds SELECT payment_id, order_id, amount, CASE status WHEN 'refunded' THEN 'done' ELSE 'pending' END, NULL, NULL,
    updated_at, updated_at FROM payments WHERE status IN ('refunding', 'refunded');
CREATE INDEX refunds_of ON refunds (order_id);
CREATE INDEX refunds_pending ON refunds (created_at) WHERE status = 'pending';

-- What the gateway has called back about, so that a repetition is known as one.
CREATE TABLE callbacks (
    id          TEXT PRIMARY KEY,
    kind        TEXT NOT NULL,
    reference   TEXT,
    received_at TIMESTAMPTZ NOT NULL
);
CREATE INDEX callbacks_age ON callbacks (received_at);
