//! Dead letters: rows in the consumer's own database, committed before the message is given up, with everything needed to
//! understand and to run them again. The dead-letter stream is their projection, through the outbox.

use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row};
use uuid::Uuid;

use crate::Timestamp;
use crate::broker::{Message, StoredMessage};
use crate::db::{Db, DbError, Tx};
use crate::event::Envelope;
use crate::outbox::{Recorded, to_json};

/// Redrives of one dead letter before it must be forced.
pub const REDRIVE_LIMIT: u32 = 5;

/// Why an event became a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Its handler said that no retry would help.
    Permanent,
    /// It failed as often as the limit allows.
    RetriesExhausted,
    /// It is no event we can read.
    Undecodable,
    /// Its data breaks its schema.
    BreaksSchema,
    /// A type or version this consumer does not accept.
    Unaccepted,
    /// Delivered again and again without any outcome.
    Exhausted,
    /// Older than the inbox remembers.
    BeyondHorizon,
}

impl Reason {
    /// The word in rows, metrics and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Permanent => "permanent",
            Self::RetriesExhausted => "retries_exhausted",
            Self::Undecodable => "undecodable",
            Self::BreaksSchema => "breaks_schema",
            Self::Unaccepted => "unaccepted",
            Self::Exhausted => "exhausted",
            Self::BeyondHorizon => "beyond_horizon",
        }
    }
}

/// Where a dead letter stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Waits for somebody to decide.
    Open,
    /// Will be run again shortly.
    Queued,
    /// Ran again and took effect.
    Redriven,
    /// Given up by an operator.
    Discarded,
}

impl Status {
    /// The word in rows.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Queued => "queued",
            Self::Redriven => "redriven",
            Self::Discarded => "discarded",
        }
    }
}

/// A dead letter as operators see it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct DeadLetter {
    /// Its id.
    pub id: String,
    /// The consumer that failed on it.
    pub consumer: String,
    /// The event's id, if it could be read.
    pub event_id: Option<String>,
    /// Type and version, if they could be read.
    pub event: Option<String>,
    /// Where it came from.
    pub stream: String,
    /// Where it lies there.
    pub stream_seq: u64,
    /// Its subject.
    pub subject: String,
    /// Why it is here.
    pub reason: String,
    /// The error with its causes.
    pub error: String,
    /// Failures counted before.
    pub attempts: u32,
    /// How often it was run again in vain.
    pub redrives: u32,
    /// `open`, `queued`, `redriven` or `discarded`.
    pub status: String,
    /// Since when it is dead.
    pub dead_at: Timestamp,
    /// The message's headers; in lists left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headers: Option<Vec<Header>>,
    /// The payload: JSON where it is, text or hexadecimal where not; in lists left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<Value>,
    /// What was done about it; in lists left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<Vec<AuditEntry>>,
}

/// A header of a message.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Header {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// Something that was done about a dead letter.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct AuditEntry {
    /// `dead`, `queued`, `redriven`, `failed_again`, `discarded`.
    pub action: String,
    /// More about it.
    pub detail: String,
    /// When.
    pub at: Timestamp,
}

/// Which dead letters are meant; empty means all.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Filter {
    /// These ids.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ids: Option<Vec<String>>,
    /// Of this consumer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consumer: Option<String>,
    /// Of this type and version, for example `orders.created.v1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    /// For this reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
}

pub(crate) struct Burial<'a> {
    pub consumer: &'a str,
    pub envelope: Option<&'a Envelope>,
    pub stream: &'a str,
    pub stored: &'a StoredMessage,
    pub reason: Reason,
    pub error: &'a str,
    pub attempts: u32,
}

fn payload_as_value(payload: &[u8]) -> Value {
    serde_json::from_slice(payload).unwrap_or_else(|_| match std::str::from_utf8(payload) {
        Ok(text) => Value::String(text.to_owned()),
        Err(_) => Value::String(payload.iter().fold("hex:".to_owned(), |mut s, b| {
            use std::fmt::Write;
            let _ = write!(s, "{b:02x}");
            s
        })),
    })
}

/// Records a dead letter, its event's claim and its projection. `false` if the event was dealt with before.
pub(crate) async fn bury(tx: &mut Tx, b: &Burial<'_>) -> Result<bool, DbError> {
    let now = tx.now();
    let event_id = b.envelope.map(|e| e.id.to_string());
    let message = &b.stored.message;
    if let Some(event_id) = &event_id {
        tx.count_statement();
        let claimed = sqlx::query("INSERT INTO inbox VALUES (?, ?, ?) ON CONFLICT DO NOTHING")
            .bind(b.consumer)
            .bind(event_id)
            .bind(now.as_millis())
            .execute(tx.sqlite())
            .await?;
        if claimed.rows_affected() == 0 {
            return Ok(false);
        }
        tx.count_statement();
        sqlx::query("DELETE FROM failures WHERE consumer = ? AND event_id = ?")
            .bind(b.consumer)
            .bind(event_id)
            .execute(tx.sqlite())
            .await?;
    }
    let id = Uuid::now_v7();
    let dedupe_key = event_id.clone().unwrap_or_else(|| format!("{}:{}", b.stream, b.stored.sequence));
    tx.count_statement();
    let inserted = sqlx::query(
        "INSERT INTO dead_letters (id, consumer, dedupe_key, event_id, event_name, stream, stream_seq, subject, headers,
             payload, reason, error, attempts, status, published_at, dead_at, updated_at)
         VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,'open',?14,?15,?15) ON CONFLICT DO NOTHING",
    )
    .bind(id.to_string())
    .bind(b.consumer)
    .bind(dedupe_key)
    .bind(event_id)
    .bind(b.envelope.map(Envelope::name))
    .bind(b.stream)
    .bind(i64::try_from(b.stored.sequence).unwrap_or(i64::MAX))
    .bind(message.subject.as_str())
    .bind(to_json(&message.headers)?)
    .bind(&message.payload[..])
    .bind(b.reason.as_str())
    .bind(b.error)
    .bind(b.attempts)
    .bind(b.stored.stored_at.as_millis())
    .bind(now.as_millis())
    .execute(tx.sqlite())
    .await?;
    if inserted.rows_affected() == 0 {
        return Ok(false);
    }
    audit(tx, &id.to_string(), "dead", b.reason.as_str()).await?;
    let body = json!({
        "id": id, "consumer": b.consumer, "reason": b.reason, "error": b.error, "attempts": b.attempts,
        "origin": {"stream": b.stream, "sequence": b.stored.sequence, "subject": message.subject},
        "headers": message.headers, "payload": payload_as_value(&message.payload), "dead_at": now,
    });
    let service = tx.db().service().to_owned();
    tx.emit_raw(Recorded {
        event_id: id,
        message: Message {
            subject: format!("dead_letters.{service}.{}", b.consumer),
            msg_id: Some(id.to_string()),
            headers: vec![("content-type".into(), "application/json".into())],
            payload: Bytes::from(body.to_string()),
        },
        created_at: now,
    });
    Ok(true)
}

async fn audit(tx: &mut Tx, id: &str, action: &str, detail: &str) -> Result<(), DbError> {
    let now = tx.now().as_millis();
    sqlx::query("INSERT INTO dead_letter_audit (dead_letter_id, action, detail, at) VALUES (?,?,?,?)")
        .bind(id)
        .bind(action)
        .bind(detail)
        .bind(now)
        .execute(tx.sqlite())
        .await?;
    Ok(())
}

/// The `WHERE` of a filter, with its binds in order.
fn matching(filter: &Filter) -> Result<(&'static str, [Option<String>; 4]), DbError> {
    let sql = "(?1 IS NULL OR id IN (SELECT value FROM json_each(?1))) AND (?2 IS NULL OR consumer = ?2)
        AND (?3 IS NULL OR event_name = ?3) AND (?4 IS NULL OR reason = ?4)";
    let ids = filter.ids.as_ref().map(to_json).transpose()?;
    let reason = filter.reason.map(|r| r.as_str().to_owned());
    Ok((sql, [ids, filter.consumer.clone(), filter.event.clone(), reason]))
}

/// Dead letters, the newest first; `status` none means all. Pages by `before`, the last id seen.
pub async fn list(
    db: &Db,
    filter: &Filter,
    status: Option<Status>,
    before: Option<&str>,
    limit: u32,
) -> Result<Vec<DeadLetter>, DbError> {
    let (sql, binds) = matching(filter)?;
    let sql = format!(
        "SELECT * FROM dead_letters WHERE {sql} AND (?5 IS NULL OR status = ?5) AND (?6 IS NULL OR id < ?6)
         ORDER BY id DESC LIMIT ?7"
    );
    let mut query = sqlx::query(AssertSqlSafe(sql));
    for bind in binds {
        query = query.bind(bind);
    }
    let rows =
        query.bind(status.map(Status::as_str)).bind(before).bind(limit).fetch_all(db.readers()).await?;
    Ok(rows.iter().map(read).collect::<Result<_, _>>()?)
}

/// One dead letter with payload, headers and history.
pub async fn get(db: &Db, id: &str) -> Result<Option<DeadLetter>, DbError> {
    let row =
        sqlx::query("SELECT * FROM dead_letters WHERE id = ?").bind(id).fetch_optional(db.readers()).await?;
    let Some(row) = row else { return Ok(None) };
    let mut letter = read(&row)?;
    letter.headers =
        Some(read_headers(&row)?.into_iter().map(|(name, value)| Header { name, value }).collect());
    letter.payload = Some(payload_as_value(row.try_get("payload")?));
    let entries =
        sqlx::query("SELECT action, detail, at FROM dead_letter_audit WHERE dead_letter_id = ? ORDER BY id")
            .bind(id)
            .fetch_all(db.readers())
            .await?;
    let entry = |r: &SqliteRow| {
        Ok::<_, sqlx::Error>(AuditEntry {
            action: r.try_get("action")?,
            detail: r.try_get("detail")?,
            at: Timestamp::from_millis(r.try_get("at")?),
        })
    };
    letter.audit = Some(entries.iter().map(entry).collect::<Result<_, _>>()?);
    Ok(Some(letter))
}

fn read_headers(row: &SqliteRow) -> Result<Vec<(String, String)>, sqlx::Error> {
    serde_json::from_str(row.try_get("headers")?).map_err(|e| sqlx::Error::Decode(Box::new(e)))
}

fn read(row: &SqliteRow) -> Result<DeadLetter, sqlx::Error> {
    Ok(DeadLetter {
        id: row.try_get("id")?,
        consumer: row.try_get("consumer")?,
        event_id: row.try_get("event_id")?,
        event: row.try_get("event_name")?,
        stream: row.try_get("stream")?,
        stream_seq: u64::try_from(row.try_get::<i64, _>("stream_seq")?).unwrap_or(0),
        subject: row.try_get("subject")?,
        reason: row.try_get("reason")?,
        error: row.try_get("error")?,
        attempts: row.try_get("attempts")?,
        redrives: row.try_get("redrives")?,
        status: row.try_get("status")?,
        dead_at: Timestamp::from_millis(row.try_get("dead_at")?),
        headers: None,
        payload: None,
        audit: None,
    })
}

/// Queues open dead letters to be run again by their consumer; the ids queued.
///
/// Those redriven [`REDRIVE_LIMIT`] times in vain stay unless `force`.
pub async fn redrive(db: &Db, filter: &Filter, force: bool, dry_run: bool) -> Result<Vec<String>, DbError> {
    let limit = if force { u32::MAX } else { REDRIVE_LIMIT };
    let ids = change(db, filter, Status::Queued, "queued", limit, dry_run).await?;
    if !dry_run {
        db.redrive_wake().send_replace(());
    }
    Ok(ids)
}

/// Gives open dead letters up for good; they stay on record. The ids discarded.
pub async fn discard(db: &Db, filter: &Filter, dry_run: bool) -> Result<Vec<String>, DbError> {
    change(db, filter, Status::Discarded, "discarded", u32::MAX, dry_run).await
}

async fn change(
    db: &Db,
    filter: &Filter,
    to: Status,
    action: &str,
    redrive_limit: u32,
    dry_run: bool,
) -> Result<Vec<String>, DbError> {
    let (sql, binds) = matching(filter)?;
    let sql = format!(
        "UPDATE dead_letters SET status = ?5, updated_at = ?6 WHERE {sql} AND status = 'open' AND redrives < ?7 RETURNING id"
    );
    let mut tx = db.begin().await?;
    let now = tx.now().as_millis();
    let mut query = sqlx::query_scalar(AssertSqlSafe(sql));
    for bind in binds {
        query = query.bind(bind);
    }
    let ids: Vec<String> =
        query.bind(to.as_str()).bind(now).bind(redrive_limit).fetch_all(tx.sqlite()).await?;
    if dry_run {
        tx.rollback().await;
        return Ok(ids);
    }
    for id in &ids {
        audit(&mut tx, id, action, "by an operator").await?;
    }
    tx.commit().await?;
    Ok(ids)
}

/// Queued dead letters of a consumer, oldest first, a page of them.
pub(crate) async fn queued(db: &Db, consumer: &str) -> Result<Vec<(String, StoredMessage)>, DbError> {
    let rows = sqlx::query(
        "SELECT * FROM dead_letters WHERE status = 'queued' AND consumer = ? ORDER BY id LIMIT 100",
    )
    .bind(consumer)
    .fetch_all(db.readers())
    .await?;
    let stored = |row: &SqliteRow| {
        let message = Message {
            subject: row.try_get("subject")?,
            msg_id: None,
            headers: read_headers(row)?,
            payload: Bytes::from(row.try_get::<Vec<u8>, _>("payload")?),
        };
        let sequence = u64::try_from(row.try_get::<i64, _>("stream_seq")?).unwrap_or(0);
        let stored_at = Timestamp::from_millis(row.try_get("published_at")?);
        Ok::<_, sqlx::Error>((row.try_get("id")?, StoredMessage { sequence, stored_at, message }))
    };
    Ok(rows.iter().map(stored).collect::<Result<_, _>>()?)
}

/// Marks a queued dead letter redriven, in the transaction that runs it; `false` if somebody else has.
pub(crate) async fn take(tx: &mut Tx, id: &str) -> Result<bool, DbError> {
    let now = tx.now().as_millis();
    let done = sqlx::query(
        "UPDATE dead_letters SET status = 'redriven', updated_at = ? WHERE id = ? AND status = 'queued'",
    )
    .bind(now)
    .bind(id)
    .execute(tx.sqlite())
    .await?;
    if done.rows_affected() == 0 {
        return Ok(false);
    }
    audit(tx, id, "redriven", "took effect").await?;
    Ok(true)
}

/// Opens a queued dead letter again, with what went wrong this time.
pub(crate) async fn redrive_failed(db: &Db, id: &str, error: &str) -> Result<(), DbError> {
    let mut tx = db.begin().await?;
    let now = tx.now().as_millis();
    sqlx::query(
        "UPDATE dead_letters SET status = 'open', redrives = redrives + 1, error = ?, updated_at = ?
         WHERE id = ? AND status = 'queued'",
    )
    .bind(error)
    .bind(now)
    .bind(id)
    .execute(tx.sqlite())
    .await?;
    audit(&mut tx, id, "failed_again", error).await?;
    tx.commit().await
}

/// How many wait for a decision.
pub(crate) async fn open_count(db: &Db) -> Result<u64, sqlx::Error> {
    let n: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM dead_letters WHERE status = 'open'")
        .fetch_one(db.readers())
        .await?;
    Ok(u64::try_from(n).unwrap_or(0))
}
