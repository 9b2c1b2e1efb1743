//! The embedded broker's file: SQLite, one connection, one commit per batch of commands.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteRow, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, Row, SqliteConnection};

use crate::Timestamp;
use crate::broker::{ConsumerConfig, Message, StoredMessage, StreamConfig};

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS streams (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, config TEXT NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, count INTEGER NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS messages (
    stream INTEGER NOT NULL, sequence INTEGER NOT NULL, subject TEXT NOT NULL, msg_id TEXT,
    headers TEXT NOT NULL, payload BLOB NOT NULL, stored_at INTEGER NOT NULL,
    PRIMARY KEY (stream, sequence)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS consumers (
    stream INTEGER NOT NULL, durable TEXT NOT NULL, config TEXT NOT NULL, floor INTEGER NOT NULL,
    PRIMARY KEY (stream, durable)) WITHOUT ROWID;";

/// Rows per insert statement: few enough for SQLite's limit on parameters, enough to make the statement's cost small.
const ROWS: usize = 64;

fn insert_sql(rows: usize) -> String {
    format!("INSERT INTO messages VALUES {}", vec!["(?,?,?,?,?,?,?)"; rows].join(","))
}
static INSERT_MANY: LazyLock<String> = LazyLock::new(|| insert_sql(ROWS));

#[derive(Debug)]
pub(super) struct FileStore {
    conn: SqliteConnection,
}

pub(super) struct StreamRecord {
    pub id: i64,
    pub config: StreamConfig,
    pub first: u64,
    pub last: u64,
    pub count: u64,
    pub bytes: u64,
}

/// What has been decided and not yet written.
#[derive(Default)]
pub(super) struct Journal {
    inserts: Vec<(i64, Arc<StoredMessage>)>,
    deletes: HashSet<(i64, u64)>,
    streams: HashMap<i64, StreamRecord>,
    consumers: HashMap<(i64, String), (ConsumerConfig, u64)>,
}

#[expect(clippy::cast_possible_wrap, reason = "sequences and sizes stay far below 2^63")]
fn int(n: u64) -> i64 {
    n as i64
}

#[expect(clippy::cast_sign_loss, reason = "written by `int`")]
fn uint(row: &SqliteRow, column: &str) -> Result<u64, sqlx::Error> {
    row.try_get::<i64, _>(column).map(|n| n as u64)
}

fn decode<T: serde::de::DeserializeOwned>(row: &SqliteRow, column: &str) -> Result<T, sqlx::Error> {
    let text: &str = row.try_get(column)?;
    serde_json::from_str(text).map_err(|e| sqlx::Error::Decode(Box::new(e)))
}

fn encode<T: serde::Serialize>(value: &T) -> Result<String, sqlx::Error> {
    serde_json::to_string(value).map_err(|e| sqlx::Error::Encode(Box::new(e)))
}

impl Journal {
    pub(super) fn insert(&mut self, stream: i64, message: Arc<StoredMessage>) {
        self.inserts.push((stream, message));
    }

    pub(super) fn delete(&mut self, stream: i64, sequence: u64) {
        self.deletes.insert((stream, sequence));
    }

    pub(super) fn deletes(&self, stream: i64, sequence: u64) -> bool {
        self.deletes.contains(&(stream, sequence))
    }

    pub(super) fn stream(&mut self, record: StreamRecord) {
        self.streams.insert(record.id, record);
    }

    pub(super) fn consumer(&mut self, stream: i64, config: &ConsumerConfig, floor: u64) {
        self.consumers.insert((stream, config.durable.clone()), (config.clone(), floor));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.inserts.is_empty()
            && self.deletes.is_empty()
            && self.streams.is_empty()
            && self.consumers.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.inserts.clear();
        self.deletes.clear();
        self.streams.clear();
        self.consumers.clear();
    }

    /// All or nothing, in one commit; the journal stays as it was if it fails.
    pub(super) async fn write(&mut self, file: &mut FileStore) -> Result<(), sqlx::Error> {
        if self.is_empty() {
            return Ok(());
        }
        let mut tx = file.conn.begin().await?;
        for chunk in self.inserts.chunks(ROWS) {
            if chunk.len() == ROWS {
                insert(&mut tx, INSERT_MANY.as_str(), chunk).await?;
            } else {
                for one in chunk.chunks(1) {
                    insert(&mut tx, "INSERT INTO messages VALUES (?,?,?,?,?,?,?)", one).await?;
                }
            }
        }
        for &(stream, sequence) in &self.deletes {
            sqlx::query("DELETE FROM messages WHERE stream = ? AND sequence = ?")
                .bind(stream)
                .bind(int(sequence))
                .execute(&mut *tx)
                .await?;
        }
        for r in self.streams.values() {
            sqlx::query("INSERT OR REPLACE INTO streams VALUES (?,?,?,?,?,?,?)")
                .bind(r.id)
                .bind(r.config.name.as_str())
                .bind(encode(&r.config)?)
                .bind(int(r.first))
                .bind(int(r.last))
                .bind(int(r.count))
                .bind(int(r.bytes))
                .execute(&mut *tx)
                .await?;
        }
        for ((stream, durable), (config, floor)) in &self.consumers {
            sqlx::query("INSERT OR REPLACE INTO consumers VALUES (?,?,?,?)")
                .bind(stream)
                .bind(durable.as_str())
                .bind(encode(config)?)
                .bind(int(*floor))
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await?;
        self.clear();
        Ok(())
    }
}

async fn insert(
    conn: &mut SqliteConnection,
    sql: &'static str,
    rows: &[(i64, Arc<StoredMessage>)],
) -> Result<(), sqlx::Error> {
    let mut query = sqlx::query(sql);
    for (stream, m) in rows {
        query = query
            .bind(*stream)
            .bind(int(m.sequence))
            .bind(m.message.subject.as_str())
            .bind(m.message.msg_id.as_deref())
            .bind(encode(&m.message.headers)?)
            .bind(&m.message.payload[..])
            .bind(m.stored_at.as_millis());
    }
    query.execute(conn).await?;
    Ok(())
}

impl FileStore {
    pub(super) async fn open(path: &Path) -> Result<Self, sqlx::Error> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // What is acknowledged survives a power failure too.
            .synchronous(SqliteSynchronous::Full)
            .disable_statement_logging();
        let mut conn = SqliteConnection::connect_with(&options).await?;
        sqlx::raw_sql(SCHEMA).execute(&mut conn).await?;
        Ok(Self { conn })
    }

    pub(super) async fn streams(&mut self) -> Result<Vec<StreamRecord>, sqlx::Error> {
        let rows = sqlx::query("SELECT * FROM streams").fetch_all(&mut self.conn).await?;
        rows.iter()
            .map(|r| {
                Ok(StreamRecord {
                    id: r.try_get("id")?,
                    config: decode(r, "config")?,
                    first: uint(r, "first")?,
                    last: uint(r, "last")?,
                    count: uint(r, "count")?,
                    bytes: uint(r, "bytes")?,
                })
            })
            .collect()
    }

    pub(super) async fn consumers(&mut self, stream: i64) -> Result<Vec<(ConsumerConfig, u64)>, sqlx::Error> {
        let rows = sqlx::query("SELECT config, floor FROM consumers WHERE stream = ?")
            .bind(stream)
            .fetch_all(&mut self.conn)
            .await?;
        rows.iter().map(|r| Ok((decode(r, "config")?, uint(r, "floor")?))).collect()
    }

    /// Message ids stored since `horizon`, oldest first.
    pub(super) async fn ids_since(
        &mut self,
        stream: i64,
        horizon: Timestamp,
    ) -> Result<Vec<(String, u64, Timestamp)>, sqlx::Error> {
        let mut found = Vec::new();
        let mut below = i64::MAX;
        loop {
            let rows = sqlx::query(
                "SELECT sequence, msg_id, stored_at FROM messages WHERE stream = ? AND sequence < ? \
                 ORDER BY sequence DESC LIMIT 1000",
            )
            .bind(stream)
            .bind(below)
            .fetch_all(&mut self.conn)
            .await?;
            let Some(last) = rows.last() else { break };
            below = last.try_get("sequence")?;
            let mut past = false;
            for r in &rows {
                let at = Timestamp::from_millis(r.try_get("stored_at")?);
                past |= at < horizon;
                if let (false, Some(id)) = (past, r.try_get::<Option<String>, _>("msg_id")?) {
                    found.push((id, uint(r, "sequence")?, at));
                }
            }
            if past {
                break;
            }
        }
        found.reverse();
        Ok(found)
    }

    pub(super) async fn subjects(&mut self, stream: i64) -> Result<Vec<(u64, String)>, sqlx::Error> {
        let rows = sqlx::query("SELECT sequence, subject FROM messages WHERE stream = ? ORDER BY sequence")
            .bind(stream)
            .fetch_all(&mut self.conn)
            .await?;
        rows.iter().map(|r| Ok((uint(r, "sequence")?, r.try_get("subject")?))).collect()
    }

    pub(super) async fn count_by_subject(
        &mut self,
        stream: i64,
        from: u64,
    ) -> Result<Vec<(String, u64)>, sqlx::Error> {
        let rows = sqlx::query(
            "SELECT subject, COUNT(*) AS n FROM messages WHERE stream = ? AND sequence >= ? GROUP BY subject",
        )
        .bind(stream)
        .bind(int(from))
        .fetch_all(&mut self.conn)
        .await?;
        rows.iter().map(|r| Ok((r.try_get("subject")?, uint(r, "n")?))).collect()
    }

    /// Where the last message of each subject lies.
    pub(super) async fn last_by_subject(&mut self, stream: i64) -> Result<Vec<(String, u64)>, sqlx::Error> {
        let rows =
            sqlx::query("SELECT subject, MAX(sequence) AS n FROM messages WHERE stream = ? GROUP BY subject")
                .bind(stream)
                .fetch_all(&mut self.conn)
                .await?;
        rows.iter().map(|r| Ok((r.try_get("subject")?, uint(r, "n")?))).collect()
    }

    /// Up to `limit` messages from `from` on.
    pub(super) async fn read(
        &mut self,
        stream: i64,
        from: u64,
        limit: usize,
    ) -> Result<BTreeMap<u64, Arc<StoredMessage>>, sqlx::Error> {
        let rows = sqlx::query(
            "SELECT sequence, subject, msg_id, headers, payload, stored_at FROM messages \
             WHERE stream = ? AND sequence >= ? ORDER BY sequence LIMIT ?",
        )
        .bind(stream)
        .bind(int(from))
        .bind(int(limit as u64))
        .fetch_all(&mut self.conn)
        .await?;
        rows.iter()
            .map(|r| {
                let sequence = uint(r, "sequence")?;
                let message = Message {
                    subject: r.try_get("subject")?,
                    msg_id: r.try_get("msg_id")?,
                    headers: decode(r, "headers")?,
                    payload: Bytes::from(r.try_get::<Vec<u8>, _>("payload")?),
                };
                let stored_at = Timestamp::from_millis(r.try_get("stored_at")?);
                Ok((sequence, Arc::new(StoredMessage { sequence, stored_at, message })))
            })
            .collect()
    }
}
