-- The simulated gateway's ledger: what a real one would hold on its side. The first answer to a key is the answer for good.
CREATE TABLE charges (
    key      TEXT PRIMARY KEY,
    declined TEXT,
    amount   BIGINT NOT NULL,
    currency TEXT NOT NULL,
    at       TIMESTAMPTZ NOT NULL
);
CREATE TABLE refunds (
    key        TEXT PRIMARY KEY,
    charge_key TEXT NOT NULL,
    amount     BIGINT NOT NULL,
    at         TIMESTAMPTZ NOT NULL
);
