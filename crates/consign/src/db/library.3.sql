-- Failures of tasks that say something about the task; `attempts` counts leases, and fences.
ALTER TABLE tasks ADD COLUMN failures BIGINT NOT NULL DEFAULT 0;
