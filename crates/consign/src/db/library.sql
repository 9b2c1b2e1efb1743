-- The library's own tables, in every service's database. Times are milliseconds since the Unix epoch.

-- Every event this service emitted, until it is older than the history. Rows are never changed.
CREATE TABLE outbox (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id   TEXT NOT NULL,
    msg_id     TEXT NOT NULL,
    subject    TEXT NOT NULL,
    headers    TEXT NOT NULL,
    payload    BLOB NOT NULL,
    created_at INTEGER NOT NULL
);
-- Those the broker has not acknowledged yet: small, whatever the history.
CREATE TABLE outbox_pending (
    seq        INTEGER PRIMARY KEY,
    attempts   INTEGER NOT NULL DEFAULT 0,
    not_before INTEGER NOT NULL DEFAULT 0,
    last_error TEXT
);
-- Those it has, and where they lie in the stream.
CREATE TABLE outbox_published (
    seq          INTEGER PRIMARY KEY,
    stream       TEXT NOT NULL,
    stream_seq   INTEGER NOT NULL,
    published_at INTEGER NOT NULL
);

-- Which events each consumer has dealt with.
CREATE TABLE inbox (
    consumer   TEXT NOT NULL,
    event_id   TEXT NOT NULL,
    handled_at INTEGER NOT NULL,
    PRIMARY KEY (consumer, event_id)
) WITHOUT ROWID;
-- Pruning looks for the oldest; without this it would read the whole inbox to find that there is nothing to do.
CREATE INDEX inbox_age ON inbox (handled_at);

-- Failures of events that may still succeed.
CREATE TABLE failures (
    consumer   TEXT NOT NULL,
    event_id   TEXT NOT NULL,
    attempts   INTEGER NOT NULL,
    last_error TEXT NOT NULL,
    updated_at INTEGER NOT NULL,
    PRIMARY KEY (consumer, event_id)
) WITHOUT ROWID;

CREATE TABLE tasks (
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    kind           TEXT NOT NULL,
    key            TEXT NOT NULL,
    payload        TEXT NOT NULL,
    due_at         INTEGER NOT NULL,
    lease_until    INTEGER NOT NULL DEFAULT 0,
    attempts       INTEGER NOT NULL DEFAULT 0,
    last_error     TEXT,
    correlation_id TEXT NOT NULL,
    causation_id   TEXT,
    traceparent    TEXT,
    created_at     INTEGER NOT NULL,
    UNIQUE (kind, key)
);
CREATE INDEX tasks_due ON tasks (kind, due_at);

CREATE TABLE dead_letters (
    id           TEXT PRIMARY KEY,
    consumer     TEXT NOT NULL,
    dedupe_key   TEXT NOT NULL,
    event_id     TEXT,
    event_name   TEXT,
    stream       TEXT NOT NULL,
    stream_seq   INTEGER NOT NULL,
    subject      TEXT NOT NULL,
    headers      TEXT NOT NULL,
    payload      BLOB NOT NULL,
    reason       TEXT NOT NULL,
    error        TEXT NOT NULL,
    attempts     INTEGER NOT NULL,
    redrives     INTEGER NOT NULL DEFAULT 0,
    status       TEXT NOT NULL,
    published_at INTEGER NOT NULL,
    dead_at      INTEGER NOT NULL,
    updated_at   INTEGER NOT NULL,
    UNIQUE (consumer, dedupe_key)
);
CREATE INDEX dead_letters_status ON dead_letters (status, id);
CREATE TABLE dead_letter_audit (
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    dead_letter_id TEXT NOT NULL,
    action         TEXT NOT NULL,
    detail         TEXT NOT NULL,
    at             INTEGER NOT NULL
);
CREATE INDEX dead_letter_audit_of ON dead_letter_audit (dead_letter_id);

-- Answers already given, by idempotency key.
CREATE TABLE idempotency (
    operation   TEXT NOT NULL,
    key         TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    answer      TEXT NOT NULL,
    created_at  INTEGER NOT NULL,
    PRIMARY KEY (operation, key)
) WITHOUT ROWID;
CREATE INDEX idempotency_age ON idempotency (created_at);
