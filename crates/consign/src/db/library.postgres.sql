-- The library's own tables, in every service's database.

-- Every event this service emitted, until it is older than the history. Rows are never changed.
CREATE SEQUENCE outbox_numbers AS BIGINT;
CREATE TABLE outbox (
    seq        BIGINT PRIMARY KEY DEFAULT nextval('outbox_numbers'),
    event_id   UUID NOT NULL,
    msg_id     TEXT NOT NULL,
    subject    TEXT NOT NULL,
    headers    TEXT NOT NULL,
    payload    BYTEA NOT NULL,
    created_at TIMESTAMPTZ NOT NULL
);
ALTER SEQUENCE outbox_numbers OWNED BY outbox.seq;
-- Those the broker has not acknowledged yet: small, whatever the history. Rows come and go, so room is left for their updates, and
-- vacuum comes often.
CREATE TABLE outbox_pending (
    seq        BIGINT PRIMARY KEY,
    attempts   BIGINT NOT NULL DEFAULT 0,
    not_before TIMESTAMPTZ NOT NULL,
    last_error TEXT
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000);
-- Those it has, and where they lie in the stream.
CREATE TABLE outbox_published (
    seq          BIGINT PRIMARY KEY,
    stream       TEXT NOT NULL,
    stream_seq   BIGINT NOT NULL,
    published_at TIMESTAMPTZ NOT NULL
);

-- Which events each consumer has dealt with.
CREATE TABLE inbox (
    consumer   TEXT NOT NULL,
    event_id   UUID NOT NULL,
    handled_at TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (consumer, event_id)
);
CREATE INDEX inbox_age ON inbox USING brin (handled_at);

-- Failures of events that may still succeed.
CREATE TABLE failures (
    consumer   TEXT NOT NULL,
    event_id   UUID NOT NULL,
    attempts   BIGINT NOT NULL,
    last_error TEXT NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (consumer, event_id)
);

CREATE TABLE tasks (
    id             BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind           TEXT NOT NULL,
    key            TEXT NOT NULL,
    payload        JSONB NOT NULL,
    due_at         TIMESTAMPTZ NOT NULL,
    lease_until    TIMESTAMPTZ NOT NULL DEFAULT 'epoch',
    attempts       BIGINT NOT NULL DEFAULT 0,
    last_error     TEXT,
    correlation_id TEXT NOT NULL,
    causation_id   UUID,
    traceparent    TEXT,
    created_at     TIMESTAMPTZ NOT NULL,
    UNIQUE (kind, key)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000);
CREATE INDEX tasks_due ON tasks (kind, due_at);

CREATE TABLE dead_letters (
    id           UUID PRIMARY KEY,
    consumer     TEXT NOT NULL,
    dedupe_key   TEXT NOT NULL,
    event_id     UUID,
    event_name   TEXT,
    stream       TEXT NOT NULL,
    stream_seq   BIGINT NOT NULL,
    subject      TEXT NOT NULL,
    headers      JSONB NOT NULL,
    payload      BYTEA NOT NULL,
    reason       TEXT NOT NULL,
    error        TEXT NOT NULL,
    attempts     BIGINT NOT NULL,
    redrives     BIGINT NOT NULL DEFAULT 0,
    status       TEXT NOT NULL,
    published_at TIMESTAMPTZ NOT NULL,
    dead_at      TIMESTAMPTZ NOT NULL,
    updated_at   TIMESTAMPTZ NOT NULL,
    UNIQUE (consumer, dedupe_key)
);
CREATE INDEX dead_letters_status ON dead_letters (status, id);
CREATE TABLE dead_letter_audit (
    id             BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    dead_letter_id UUID NOT NULL,
    action         TEXT NOT NULL,
    detail         TEXT NOT NULL,
    at             TIMESTAMPTZ NOT NULL
);
CREATE INDEX dead_letter_audit_of ON dead_letter_audit (dead_letter_id);

-- Answers already given, by idempotency key.
CREATE TABLE idempotency (
    operation   TEXT NOT NULL,
    key         TEXT NOT NULL,
    fingerprint UUID NOT NULL,
    answer      TEXT NOT NULL,
    created_at  TIMESTAMPTZ NOT NULL,
    -- Keys differ, operations hardly do: an index on those first would tempt the planner to read all of an operation.
    PRIMARY KEY (key, operation)
);
CREATE INDEX idempotency_age ON idempotency (created_at);
