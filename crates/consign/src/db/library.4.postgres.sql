-- Which versions of events each replica of a consumer can read, while it runs.
CREATE TABLE readers (
    consumer TEXT NOT NULL,
    replica  UUID NOT NULL,
    reads    JSONB NOT NULL,
    seen_at  TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (consumer, replica)
);
-- How often each version took effect, and when last.
CREATE TABLE consumed (
    consumer TEXT NOT NULL,
    event    TEXT NOT NULL,
    handled  BIGINT NOT NULL,
    last_at  TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (consumer, event)
);
-- Versions that are not published any more.
CREATE TABLE retired (
    event      TEXT NOT NULL PRIMARY KEY,
    retired_at TIMESTAMPTZ NOT NULL
);
