//! Events recorded in the caller's transaction, and the relay that publishes them after it.
//!
//! The relay selects what is pending, never "id greater than": a row that commits late is not skipped. It is woken by each
//! commit, and sweeps now and then for what a crash left behind.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};
use thiserror::Error;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::broker::{Broker, Message, PubAck, PublishError};
use crate::db::{Db, DbError};
use crate::event::{Cause, Envelope, Event, EventId, Lane};
use crate::retry::Backoff;
use crate::schema::{self, SchemaViolation};
use crate::{Timestamp, telemetry};

/// Rows published per round; the next round's rows gather meanwhile, so rounds grow with the load.
const BATCH: i64 = 1024;
/// How often the relay looks without having been woken.
const SWEEP: Duration = Duration::from_secs(5);
/// A publish that takes longer is repeated with the same id.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(10);

/// An event with what only its publisher knows about it.
#[derive(Debug)]
pub struct Emission<E> {
    event: E,
    aggregate_id: String,
    aggregate_version: u64,
    lane: Lane,
    key: Option<String>,
    cause: Option<Cause>,
}

impl<E: Event> Emission<E> {
    /// `event` about an aggregate, which has `version` after it.
    pub fn new(event: E, aggregate_id: impl Into<String>, version: u64) -> Self {
        Self {
            event,
            aggregate_id: aggregate_id.into(),
            aggregate_version: version,
            lane: Lane::Standard,
            key: None,
            cause: None,
        }
    }

    /// On which lane it travels.
    #[must_use]
    pub fn lane(self, lane: Lane) -> Self {
        Self { lane, ..self }
    }

    /// The subject's last token, for streams that keep the last message per subject.
    #[must_use]
    pub fn key(self, key: impl Into<String>) -> Self {
        Self { key: Some(key.into()), ..self }
    }

    /// What it follows from, where that is not the transaction's cause: in batch handlers, the event it answers.
    #[must_use]
    pub fn caused_by(self, cause: Cause) -> Self {
        Self { cause: Some(cause), ..self }
    }
}

/// The event was not recorded.
#[derive(Debug, Error)]
pub enum EmitError {
    /// It breaks its own schema.
    #[error("the event breaks its schema")]
    Invalid(#[from] SchemaViolation),
    /// It cannot be written as JSON.
    #[error("the event cannot be written as JSON")]
    Json(#[from] serde_json::Error),
}

/// A row of the outbox to be.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub event_id: EventId,
    pub message: Message,
    pub created_at: Timestamp,
}

pub(crate) fn record<E: Event>(
    emission: Emission<E>,
    cause: &Cause,
    service: &str,
    now: Timestamp,
) -> Result<Recorded, EmitError> {
    let value = serde_json::to_value(&emission.event)?;
    schema::of::<E>().validate(&value)?;
    let id = Uuid::now_v7();
    let envelope = Envelope {
        id,
        event_type: E::TYPE.into(),
        version: E::VERSION,
        source: format!("/services/{service}").into(),
        aggregate_id: emission.aggregate_id,
        aggregate_version: emission.aggregate_version,
        time: now,
        cause: emission.cause.unwrap_or_else(|| cause.clone()),
        lane: emission.lane,
    };
    let payload = Bytes::from(serde_json::to_vec(&value)?);
    let message = envelope.into_message(emission.key.as_deref(), payload);
    Ok(Recorded { event_id: id, message, created_at: now })
}

/// Two statements, however many events. The sequence of the first.
pub(crate) async fn write(
    conn: &mut SqliteConnection,
    db: &Db,
    recorded: &[Recorded],
) -> Result<i64, sqlx::Error> {
    #[derive(Serialize)]
    struct Row<'a>(String, &'a str, &'a str, String, &'a str, i64);
    if recorded.is_empty() {
        return Ok(0);
    }
    let rows: Vec<Row<'_>> = recorded
        .iter()
        .map(|r| {
            Ok(Row(
                r.event_id.to_string(),
                r.message.msg_id.as_deref().unwrap_or_default(),
                &r.message.subject,
                to_json(&r.message.headers)?,
                std::str::from_utf8(&r.message.payload).map_err(|e| sqlx::Error::Encode(Box::new(e)))?,
                r.created_at.as_millis(),
            ))
        })
        .collect::<Result<_, sqlx::Error>>()?;
    db.count_statement();
    let inserted = sqlx::query(
        "INSERT INTO outbox (event_id, msg_id, subject, headers, payload, created_at)
         SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, CAST(value ->> 4 AS BLOB), value ->> 5
         FROM json_each(?)",
    )
    .bind(to_json(&rows)?)
    .execute(&mut *conn)
    .await?;
    let last = inserted.last_insert_rowid();
    let count = i64::try_from(recorded.len()).unwrap_or(i64::MAX);
    db.count_statement();
    // There is one writer, so the new rows are the last ones.
    sqlx::query("INSERT INTO outbox_pending (seq) SELECT seq FROM outbox WHERE seq > ?")
        .bind(last - count)
        .execute(conn)
        .await?;
    Ok(last - count + 1)
}

/// JSON for a statement's parameter: `json_each(?)` turns it into rows, so that one statement serves a whole batch.
pub fn to_json<T: Serialize>(value: &T) -> Result<String, sqlx::Error> {
    serde_json::to_string(value).map_err(|e| sqlx::Error::Encode(Box::new(e)))
}

/// Publishes the outbox of one database until told to stop; then once more, so that a drained service leaves nothing behind.
pub(crate) async fn relay(db: Db, broker: Arc<dyn Broker>, stop: CancellationToken) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    // A crash may have left rows behind, so the table is read first.
    let mut sweep = true;
    loop {
        let stopping = stop.is_cancelled();
        let fresh = db.take_fresh();
        sweep |= fresh.overflow;
        let round = async {
            if sweep || fresh.rows.is_empty() {
                publish(&db, broker.as_ref(), select_pending(&db).await?).await
            } else {
                publish(&db, broker.as_ref(), fresh.rows).await
            }
        };
        // What is taken from memory and then not published is found in the table.
        match round.await {
            Ok(n) => {
                backoff.reset();
                sweep = sweep && n > 0;
                if n > 0 {
                    continue;
                }
                if stopping {
                    return;
                }
                tokio::select! {
                    () = db.relay_wake().notified() => {}
                    () = tokio::time::sleep(SWEEP) => sweep = true,
                    () = stop.cancelled() => sweep = true,
                }
            }
            Err(error) => {
                sweep = true;
                let delay = backoff.next();
                tracing::warn!(
                    service = db.service(), error = telemetry::chain(&error), retry_in = ?delay,
                    "the outbox could not be published"
                );
                if stopping {
                    return;
                }
                tokio::select! {
                    () = tokio::time::sleep(delay) => {}
                    () = stop.cancelled() => {}
                }
            }
        }
    }
}

#[derive(Debug, Error)]
enum RelayError {
    #[error("database")]
    Db(#[from] DbError),
    #[error("database")]
    Sql(#[from] sqlx::Error),
    #[error("the broker acknowledged none of {count} events")]
    Refused {
        count: usize,
        #[source]
        first: PublishError,
    },
}

/// Rows the broker has not acknowledged, oldest first.
async fn select_pending(db: &Db) -> Result<Vec<(i64, Message)>, RelayError> {
    let rows = sqlx::query(
        "SELECT p.seq, o.msg_id, o.subject, o.headers, o.payload FROM outbox_pending p JOIN outbox o ON o.seq = p.seq
         WHERE p.not_before <= ? ORDER BY p.seq LIMIT ?",
    )
    .bind(db.clock().now().as_millis())
    .bind(BATCH)
    .fetch_all(db.readers())
    .await?;
    let message = |row: &SqliteRow| {
        Ok::<_, sqlx::Error>((
            row.try_get("seq")?,
            Message {
                subject: row.try_get("subject")?,
                msg_id: Some(row.try_get("msg_id")?),
                headers: serde_json::from_str(row.try_get("headers")?)
                    .map_err(|e| sqlx::Error::Decode(Box::new(e)))?,
                payload: Bytes::from(row.try_get::<Vec<u8>, _>("payload")?),
            },
        ))
    };
    Ok(rows.iter().map(message).collect::<Result<_, _>>()?)
}

/// One round: publish, then mark what was acknowledged. The count of rows published.
async fn publish(db: &Db, broker: &dyn Broker, rows: Vec<(i64, Message)>) -> Result<usize, RelayError> {
    if rows.is_empty() {
        return Ok(0);
    }
    let status = broker.status();
    if !status.connected {
        let first = PublishError::Unknown(status.detail.unwrap_or_else(|| "disconnected".into()));
        return Err(RelayError::Refused { count: rows.len(), first });
    }
    let now = db.clock().now();
    let (seqs, messages): (Vec<i64>, Vec<Message>) = rows.into_iter().unzip();
    let count = messages.len();
    let answers = tokio::time::timeout(PUBLISH_TIMEOUT, broker.publish(messages)).await.map_err(|_| {
        let first = PublishError::Unknown(format!("no answer within {PUBLISH_TIMEOUT:?}"));
        RelayError::Refused { count, first }
    })?;
    let mut published = Vec::with_capacity(count);
    let mut refused = Vec::new();
    for (seq, answer) in seqs.into_iter().zip(answers) {
        match answer {
            Ok(ack) => published.push((seq, ack)),
            Err(e) => refused.push((seq, e)),
        }
    }
    if published.is_empty()
        && let Some((_, first)) = refused.first()
    {
        let first = first.clone();
        // Of one alone it cannot be told whether the row or the broker is at fault: it steps back for the others.
        postpone(db, &refused, now).await?;
        return Err(RelayError::Refused { count, first });
    }
    mark(db, &published, now).await?;
    if !refused.is_empty() {
        postpone(db, &refused, now).await?;
    }
    metrics::counter!("consign_events_published_total", "service" => db.service().to_owned())
        .increment(published.len() as u64);
    Ok(published.len())
}

async fn mark(db: &Db, published: &[(i64, PubAck)], now: Timestamp) -> Result<(), RelayError> {
    let rows: Vec<(i64, &str, u64)> =
        published.iter().map(|(seq, a)| (*seq, &*a.stream, a.sequence)).collect();
    let rows = to_json(&rows)?;
    let mut tx = db.begin().await?;
    tx.count_statement();
    sqlx::query(
        "INSERT OR IGNORE INTO outbox_published (seq, stream, stream_seq, published_at)
         SELECT value ->> 0, value ->> 1, value ->> 2, ? FROM json_each(?)",
    )
    .bind(now.as_millis())
    .bind(rows.as_str())
    .execute(tx.sqlite())
    .await?;
    tx.count_statement();
    let gone = sqlx::query("DELETE FROM outbox_pending WHERE seq IN (SELECT value ->> 0 FROM json_each(?))")
        .bind(rows.as_str())
        .execute(tx.sqlite())
        .await?
        .rows_affected();
    tx.commit().await?;
    db.outbox_shrank(usize::try_from(gone).unwrap_or(0));
    Ok(())
}

/// Rows the broker refused wait a little, so that they do not hold up the rest.
async fn postpone(db: &Db, refused: &[(i64, PublishError)], now: Timestamp) -> Result<(), RelayError> {
    let rows: Vec<(i64, String)> = refused.iter().map(|(seq, e)| (*seq, e.to_string())).collect();
    let mut tx = db.begin().await?;
    sqlx::query(
        "UPDATE outbox_pending SET attempts = attempts + 1, last_error = e.value ->> 1,
             not_before = ? + MIN(30000, 100 * (1 << MIN(attempts, 10)))
         FROM json_each(?) e WHERE seq = e.value ->> 0",
    )
    .bind(now.as_millis())
    .bind(to_json(&rows)?)
    .execute(tx.sqlite())
    .await?;
    tx.commit().await?;
    Ok(())
}

/// When the oldest pending event was recorded.
pub(crate) async fn oldest_pending(db: &Db) -> Result<Option<Timestamp>, sqlx::Error> {
    let at: Option<i64> = sqlx::query_scalar(
        "SELECT o.created_at FROM outbox_pending p JOIN outbox o ON o.seq = p.seq ORDER BY p.seq LIMIT 1",
    )
    .fetch_optional(db.readers())
    .await?;
    Ok(at.map(Timestamp::from_millis))
}
