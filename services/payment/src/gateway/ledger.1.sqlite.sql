-- The simulated gateway's ledger: what a real one would hold on its side. The first answer to a key is the answer for good.
CREATE TABLE charges (
    key      TEXT PRIMARY KEY,
    declined TEXT,
    amount   INTEGER NOT NULL,
    currency TEXT NOT NULL,
    at       INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE refunds (
    key        TEXT PRIMARY KEY,
    charge_key TEXT NOT NULL,
    amount     INTEGER NOT NULL,
    at         INTEGER NOT NULL
) WITHOUT ROWID;
