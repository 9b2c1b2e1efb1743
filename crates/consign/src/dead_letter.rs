//! Dead letters: rows in the consumer's own database, committed before the message is given up, with everything needed to
//! understand and to run them again. The dead-letter stream is their projection, through the outbox.

use std::time::Duration;

use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::broker::{Message, StoredMessage};
use crate::db::{Db, DbError, Json, Query, Row, Tx};
use crate::event::Envelope;
use crate::outbox::Recorded;
use crate::{Lane, Timestamp};

/// Redrives of one dead letter before it must be forced.
pub const REDRIVE_LIMIT: u32 = 5;

/// A message with more bytes is not copied to the stream of dead letters, only its row has it: escaped, it could be more than a server takes.
const PROJECTED: usize = 64 * 1024;

/// Characters of an error that are kept: it may tell of values that a hostile event has.
const ERROR: usize = 4_000;

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
    /// Delivered as often as the broker may, without any outcome: processes died, or acknowledgements were lost. Run again automatically,
    /// a few times.
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
    /// Dead since then or later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_from: Option<Timestamp>,
    /// Dead before then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_before: Option<Timestamp>,
}

/// What [`Filter::bind`] gives values to.
macro_rules! matching {
    () => {
        "($1 IS NULL OR consumer = $1) AND ($2 IS NULL OR event_name = $2) AND ($3 IS NULL OR reason = $3)
         AND ($4 IS NULL OR dead_at >= $4) AND ($5 IS NULL OR dead_at < $5) AND ($6 OR id IN (SELECT i FROM {$10: i}))"
    };
}

impl Filter {
    /// Whether it names anything at all.
    pub fn is_empty(&self) -> bool {
        let Self { ids, consumer, event, reason, dead_from, dead_before } = self;
        ids.is_none()
            && consumer.is_none()
            && event.is_none()
            && reason.is_none()
            && dead_from.is_none()
            && dead_before.is_none()
    }

    /// The parameters 1 to 6; 7 to 9 are the statement's own, and then come [`Filter::ids`].
    fn bind<'q>(&self, query: Query<'q>) -> Query<'q> {
        query
            .bind(self.consumer.as_deref())
            .bind(self.event.as_deref())
            .bind(self.reason.map(Reason::as_str))
            .bind(self.dead_from)
            .bind(self.dead_before)
            .bind(self.ids.is_none())
    }

    /// Those that can be ids; others name nothing.
    fn ids(&self) -> Vec<(Uuid,)> {
        self.ids.iter().flatten().filter_map(|id| id.parse().ok().map(|id| (id,))).collect()
    }
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

/// A text as PostgreSQL keeps it, which has no U+0000: whatever somebody sends can be buried. The payload stays as it is, in bytes.
fn kept(text: &str) -> String {
    text.replace('\0', "\u{FFFD}")
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
    let error = kept(&b.error.chars().take(ERROR).collect::<String>());
    let event_id = b.envelope.map(|e| e.id);
    let message = &b.stored.message;
    if let Some(event_id) = event_id {
        let claimed = tx
            .query("INSERT INTO inbox (consumer, event_id, handled_at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING")
            .bind(b.consumer)
            .bind(event_id)
            .bind(now)
            .execute()
            .await?;
        if claimed == 0 {
            return Ok(false);
        }
        tx.query("DELETE FROM failures WHERE consumer = $1 AND event_id = $2")
            .bind(b.consumer)
            .bind(event_id)
            .execute()
            .await?;
    }
    let id = Uuid::now_v7();
    let dedupe_key =
        event_id.map_or_else(|| format!("{}:{}", b.stream, b.stored.sequence), |id| id.to_string());
    let inserted = tx
        .query(
            "INSERT INTO dead_letters (id, consumer, dedupe_key, event_id, event_name, stream, stream_seq, subject, headers,
                 payload, reason, error, attempts, status, published_at, dead_at, updated_at)
             VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,'open',$14,$15,$15) ON CONFLICT DO NOTHING",
        )
        .bind(id)
        .bind(b.consumer)
        .bind(dedupe_key)
        .bind(event_id)
        .bind(b.envelope.map(Envelope::name))
        .bind(b.stream)
        .bind(b.stored.sequence)
        .bind(kept(&message.subject))
        .bind(Json(message.headers.iter().map(|(name, value)| (kept(name), kept(value))).collect::<Vec<_>>()))
        .bind(message.payload.clone())
        .bind(b.reason.as_str())
        .bind(error.as_str())
        .bind(b.attempts)
        .bind(b.stored.stored_at)
        .bind(now)
        .execute()
        .await?;
    if inserted == 0 {
        return Ok(false);
    }
    audit(tx, id, "dead", b.reason.as_str()).await?;
    let mut body = json!({
        "id": id, "consumer": b.consumer, "reason": b.reason, "error": error, "attempts": b.attempts,
        "origin": {"stream": b.stream, "sequence": b.stored.sequence, "subject": message.subject}, "dead_at": now,
    });
    let headers: usize = message.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    if headers + message.payload.len() <= PROJECTED {
        body["headers"] = json!(message.headers);
        body["payload"] = payload_as_value(&message.payload);
    } else {
        body["left_out"] = json!({"headers_bytes": headers, "payload_bytes": message.payload.len()});
    }
    let service = tx.db().service().to_owned();
    tx.emit_raw(Recorded {
        event_id: id,
        lane: Lane::Standard,
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

async fn audit(tx: &mut Tx, id: Uuid, action: &str, detail: &str) -> Result<(), DbError> {
    let now = tx.now();
    tx.query("INSERT INTO dead_letter_audit (dead_letter_id, action, detail, at) VALUES ($1, $2, $3, $4)")
        .bind(id)
        .bind(action)
        .bind(detail)
        .bind(now)
        .execute()
        .await?;
    Ok(())
}

/// Dead letters, the newest first; `status` none means all. Pages by `before`, the last id seen.
pub async fn list(
    db: &Db,
    filter: &Filter,
    status: Option<Status>,
    before: Option<Uuid>,
    limit: u32,
) -> Result<Vec<DeadLetter>, DbError> {
    let query = db.query(concat!(
        "SELECT * FROM dead_letters WHERE ",
        matching!(),
        " AND ($7 IS NULL OR status = $7) AND id < $8 ORDER BY id DESC LIMIT $9"
    ));
    let rows = filter
        .bind(query)
        .bind(status.map(Status::as_str))
        .bind(before.unwrap_or(Uuid::max()))
        .bind(limit)
        .rows(filter.ids())
        .fetch_all()
        .await?;
    rows.iter().map(read).collect()
}

/// One dead letter with payload, headers and history.
pub async fn get(db: &Db, id: Uuid) -> Result<Option<DeadLetter>, DbError> {
    let row = db.query("SELECT * FROM dead_letters WHERE id = $1").bind(id).fetch_optional().await?;
    let Some(row) = row else { return Ok(None) };
    let mut letter = read(&row)?;
    let headers = row.get::<Json<Vec<(String, String)>>>("headers")?.0;
    letter.headers = Some(headers.into_iter().map(|(name, value)| Header { name, value }).collect());
    letter.payload = Some(payload_as_value(&row.get::<Bytes>("payload")?));
    let entries = db
        .query("SELECT action, detail, at FROM dead_letter_audit WHERE dead_letter_id = $1 ORDER BY id")
        .bind(id)
        .fetch_all()
        .await?;
    let entry =
        |r: &Row| Ok(AuditEntry { action: r.get("action")?, detail: r.get("detail")?, at: r.get("at")? });
    letter.audit = Some(entries.iter().map(entry).collect::<Result<_, DbError>>()?);
    Ok(Some(letter))
}

fn read(row: &Row) -> Result<DeadLetter, DbError> {
    Ok(DeadLetter {
        id: row.get::<Uuid>("id")?.to_string(),
        consumer: row.get("consumer")?,
        event_id: row.get::<Option<Uuid>>("event_id")?.map(|id| id.to_string()),
        event: row.get("event_name")?,
        stream: row.get("stream")?,
        stream_seq: row.get("stream_seq")?,
        subject: row.get("subject")?,
        reason: row.get("reason")?,
        error: row.get("error")?,
        attempts: row.get("attempts")?,
        redrives: row.get("redrives")?,
        status: row.get("status")?,
        dead_at: row.get("dead_at")?,
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
    let mut tx = db.begin().await?;
    let now = tx.now();
    let query = tx.query(concat!(
        "UPDATE dead_letters SET status = $7, updated_at = $8 WHERE ",
        matching!(),
        " AND status = 'open' AND redrives < $9 RETURNING id"
    ));
    let changed = filter
        .bind(query)
        .bind(to.as_str())
        .bind(now)
        .bind(redrive_limit)
        .rows(filter.ids())
        .fetch_all()
        .await?;
    let ids: Vec<Uuid> = changed.iter().map(|r| r.get("id")).collect::<Result<_, _>>()?;
    if dry_run {
        tx.rollback().await;
    } else {
        tx.query(
            "INSERT INTO dead_letter_audit (dead_letter_id, action, detail, at) SELECT i, $1, 'by an operator', $2 FROM {$3: i}",
        )
        .bind(action)
        .bind(now)
        .rows(ids.iter().map(|id| (*id,)))
        .execute()
        .await?;
        tx.commit().await?;
    }
    Ok(ids.iter().map(Uuid::to_string).collect())
}

/// Queued dead letters of a consumer, oldest first, a page of them.
pub(crate) async fn queued(db: &Db, consumer: &str) -> Result<Vec<(Uuid, StoredMessage)>, DbError> {
    let rows = db
        .query("SELECT * FROM dead_letters WHERE status = 'queued' AND consumer = $1 ORDER BY id LIMIT 100")
        .bind(consumer)
        .fetch_all()
        .await?;
    let stored = |row: &Row| {
        let message = Message {
            subject: row.get("subject")?,
            msg_id: None,
            headers: row.get::<Json<_>>("headers")?.0,
            payload: row.get("payload")?,
        };
        let (sequence, stored_at) = (row.get("stream_seq")?, row.get("published_at")?);
        Ok((row.get("id")?, StoredMessage { sequence, stored_at, message }))
    };
    rows.iter().map(stored).collect()
}

/// Takes a queued dead letter in order to run it; `false` if somebody else has. If the process dies of it, it is open and counted.
pub(crate) async fn begin_redrive(db: &Db, id: Uuid) -> Result<bool, DbError> {
    let mut tx = db.begin().await?;
    let now = tx.now();
    let taken = tx
        .query(
            "UPDATE dead_letters SET status = 'open', redrives = redrives + 1, updated_at = $1 WHERE id = $2 AND status = 'queued'",
        )
        .bind(now)
        .bind(id)
        .execute()
        .await?;
    tx.commit().await?;
    Ok(taken > 0)
}

/// Marks a dead letter redriven, in the transaction that runs it; `false` if somebody else has.
pub(crate) async fn take(tx: &mut Tx, id: Uuid) -> Result<bool, DbError> {
    let now = tx.now();
    let taken = tx
        .query(
            "UPDATE dead_letters SET status = 'redriven', redrives = redrives - 1, updated_at = $1
             WHERE id = $2 AND status IN ('open', 'queued')",
        )
        .bind(now)
        .bind(id)
        .execute()
        .await?;
    if taken == 0 {
        return Ok(false);
    }
    audit(tx, id, "redriven", "took effect").await?;
    Ok(true)
}

/// Records what went wrong this time.
pub(crate) async fn redrive_failed(db: &Db, id: Uuid, error: &str) -> Result<(), DbError> {
    let mut tx = db.begin().await?;
    let now = tx.now();
    tx.query("UPDATE dead_letters SET error = $1, updated_at = $2 WHERE id = $3 AND status = 'open'")
        .bind(error)
        .bind(now)
        .bind(id)
        .execute()
        .await?;
    audit(&mut tx, id, "failed_again", error).await?;
    tx.commit().await
}

/// Between automatic redrives of one dead letter, times how often it was run already.
const AUTOMATIC_REDRIVE: Duration = Duration::from_secs(30);

/// Queues what the broker gave up although nothing is known to be wrong with it, a few times and ever later. How many were queued.
///
/// What kills the process is run again no more than [`REDRIVE_LIMIT`] times by this, and then waits for somebody to decide.
pub(crate) async fn queue_exhausted(db: &Db) -> Result<u64, DbError> {
    let waiting = db
        .query("SELECT DISTINCT redrives FROM dead_letters WHERE status = 'open' AND reason = $1 AND redrives < $2")
        .bind(Reason::Exhausted.as_str())
        .bind(REDRIVE_LIMIT)
        .fetch_all()
        .await?;
    let mut queued = 0;
    for row in waiting {
        let redrives: u32 = row.get("redrives")?;
        let mut tx = db.begin().await?;
        let now = tx.now();
        let rows = tx
            .query(
                "UPDATE dead_letters SET status = 'queued', updated_at = $1
                 WHERE status = 'open' AND reason = $2 AND redrives = $3 AND updated_at <= $4 RETURNING id",
            )
            .bind(now)
            .bind(Reason::Exhausted.as_str())
            .bind(redrives)
            .bind(now - AUTOMATIC_REDRIVE * redrives)
            .fetch_all()
            .await?;
        if rows.is_empty() {
            tx.rollback().await;
            continue;
        }
        for row in &rows {
            audit(&mut tx, row.get("id")?, "queued", "automatically: nothing is known to be wrong with it")
                .await?;
        }
        tx.commit().await?;
        queued += rows.len() as u64;
    }
    if queued > 0 {
        db.redrive_wake().send_replace(());
    }
    Ok(queued)
}

/// How many wait for a decision.
pub(crate) async fn open_count(db: &Db) -> Result<u64, DbError> {
    db.query("SELECT COUNT(*) AS n FROM dead_letters WHERE status = 'open'").fetch_scalar().await
}
