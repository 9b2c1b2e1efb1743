-- Lanes: what is express is published first.
ALTER TABLE outbox_pending ADD COLUMN lane BIGINT NOT NULL DEFAULT 1;
CREATE INDEX outbox_pending_lane ON outbox_pending (lane, seq);
-- Of tasks too.
ALTER TABLE tasks ADD COLUMN lane BIGINT NOT NULL DEFAULT 1;
DROP INDEX tasks_due;
CREATE INDEX tasks_due ON tasks (kind, lane, due_at);
-- A stream that is made anew counts from 1 again: a sequence says nothing without the incarnation of its stream.
ALTER TABLE outbox_published ADD COLUMN incarnation TEXT NOT NULL DEFAULT '';
