//! Events recorded in the caller's transaction, and the relay that publishes them after it.
//!
//! The relay selects what is pending, never "id greater than": a row that commits late is not skipped. It is woken by each
//! commit, and sweeps now and then for what a crash left behind.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::broker::{Broker, Message, PubAck, PublishError};
use crate::db::{Db, DbError, Json, Row, TxState};
use crate::event::{Cause, Envelope, Event, EventId, Lane};
use crate::retry::Backoff;
use crate::schema::{self, SchemaViolation};
use crate::{Timestamp, telemetry};

/// Rows published per round; the next round's rows gather meanwhile, so rounds grow with the load.
const BATCH: usize = 1024;
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
    pub lane: Lane,
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
    Ok(Recorded { event_id: id, lane: emission.lane, message, created_at: now })
}

/// Two statements at most, however many events. The sequences of the rows, in the events' order. Until `lease` nobody else publishes them.
pub(crate) async fn write(
    tx: &mut TxState,
    recorded: &[Recorded],
    lease: Option<Timestamp>,
) -> Result<Vec<i64>, DbError> {
    if recorded.is_empty() {
        return Ok(Vec::new());
    }
    let shared = tx.db().is_shared();
    let not_before = lease.unwrap_or(Timestamp::from_millis(0));
    let rows = recorded.iter().map(|r| {
        (
            r.event_id,
            r.message.msg_id.as_deref().unwrap_or_default(),
            r.message.subject.as_str(),
            Json(r.message.headers.clone()),
            r.message.payload.clone(),
            r.created_at,
            lane_number(r.lane),
        )
    });
    if shared {
        // Numbers are given out in the rows' order, though not without gaps: other transactions take some in between.
        let inserted = tx
            .query(
                "WITH given AS (SELECT * FROM {$2: event_id, msg_id, subject, headers, payload bytes, created_at, lane}),
                      new AS (INSERT INTO outbox (event_id, msg_id, subject, headers, payload, created_at)
                              SELECT event_id, msg_id, subject, headers, payload, created_at FROM given RETURNING seq, event_id)
                 INSERT INTO outbox_pending (seq, lane, not_before)
                 SELECT new.seq, given.lane, $1 FROM new JOIN given USING (event_id) RETURNING seq",
            )
            .bind(not_before)
            .rows(rows)
            .fetch_all()
            .await?;
        let mut seqs: Vec<i64> = inserted.iter().map(|r| r.get("seq")).collect::<Result<_, _>>()?;
        seqs.sort_unstable();
        return Ok(seqs);
    }
    let inserted = tx
        .query(
            "INSERT INTO outbox (event_id, msg_id, subject, headers, payload, created_at)
             SELECT event_id, msg_id, subject, headers, payload, created_at
             FROM {$1: event_id, msg_id, subject, headers, payload bytes, created_at, lane} RETURNING seq",
        )
        .rows(rows)
        .fetch_all()
        .await?;
    let mut seqs: Vec<i64> = inserted.iter().map(|r| r.get("seq")).collect::<Result<_, _>>()?;
    seqs.sort_unstable();
    tx.query("INSERT INTO outbox_pending (seq, lane, not_before) SELECT seq, lane, $1 FROM {$2: seq, lane}")
        .bind(not_before)
        .rows(seqs.iter().zip(recorded).map(|(seq, r)| (*seq, lane_number(r.lane))))
        .execute()
        .await?;
    Ok(seqs)
}

/// Lanes in the order in which they are published.
const fn lane_number(lane: Lane) -> i64 {
    match lane {
        Lane::Express => 0,
        Lane::Standard => 1,
    }
}

/// Publishes the outbox of one database until told to stop; then once more, so that a drained service leaves nothing behind.
pub(crate) async fn relay(db: Db, broker: Arc<dyn Broker>, stop: CancellationToken) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    // A crash may have left rows behind, so the table is read first.
    let mut sweep = true;
    loop {
        let stopping = stop.is_cancelled();
        match round(&db, broker.as_ref(), &mut sweep).await {
            Ok(n) => {
                backoff.reset();
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

/// Publishes some of what was just committed, and when sweeping some of what the table holds; how many.
async fn round(db: &Db, broker: &dyn Broker, sweep: &mut bool) -> Result<usize, RelayError> {
    let status = broker.status();
    if !status.connected {
        // Nothing is taken out of memory that could not be published.
        let first = PublishError::Unknown(status.detail.unwrap_or_else(|| "disconnected".into()));
        return if db.outbox_depth() == 0 { Ok(0) } else { Err(RelayError::Refused { count: 0, first }) };
    }
    let (mut rows, overflow) = db.take_fresh(BATCH);
    *sweep |= overflow;
    if *sweep {
        db.count_outbox().await?;
        let room = BATCH.saturating_sub(rows.len());
        let swept = claim_pending(db, room.max(BATCH / 4)).await?;
        *sweep = !swept.is_empty();
        // On SQLite what is in memory is in the table too, and nobody has leased it.
        let known: HashSet<i64> = rows.iter().map(|(seq, _)| *seq).collect();
        rows.extend(swept.into_iter().filter(|(seq, _)| !known.contains(seq)));
    }
    publish(db, broker, rows).await
}

#[derive(Debug, Error)]
enum RelayError {
    #[error("database")]
    Db(#[from] DbError),
    #[error("the broker acknowledged none of {count} events")]
    Refused {
        count: usize,
        #[source]
        first: PublishError,
    },
}

/// Rows the broker has not acknowledged and nobody is publishing, the express ones first; where there are other replicas, they are then
/// leased to this one. It selects what is pending, never what has a greater number: a row that commits late is not passed over.
async fn claim_pending(db: &Db, max: usize) -> Result<Vec<(i64, Message)>, RelayError> {
    let mut rows = Vec::new();
    for (lane, share) in [(Lane::Express, max - max / 4), (Lane::Standard, max)] {
        let room = share.saturating_sub(rows.len());
        if room == 0 {
            continue;
        }
        let now = db.clock().now();
        let claimed = if db.is_shared() {
            let mut tx = db.begin().await?;
            let claimed = tx
                .query(
                    "WITH due AS (SELECT seq FROM outbox_pending WHERE lane = $1 AND not_before <= $2 ORDER BY seq LIMIT $3 {skip}),
                          leased AS (UPDATE outbox_pending p SET not_before = $4 FROM due WHERE p.seq = due.seq RETURNING p.seq)
                     SELECT o.seq, o.msg_id, o.subject, o.headers, o.payload FROM leased JOIN outbox o ON o.seq = leased.seq
                     ORDER BY o.seq",
                )
                .bind(lane_number(lane))
                .bind(now)
                .bind(room)
                .bind(now + PUBLISH_TIMEOUT)
                .fetch_all()
                .await?;
            if claimed.is_empty() {
                tx.rollback().await;
            } else {
                tx.commit().await?;
            }
            claimed
        } else {
            db.query(
                "SELECT p.seq, o.msg_id, o.subject, o.headers, o.payload FROM outbox_pending p JOIN outbox o ON o.seq = p.seq
                 WHERE p.lane = $1 AND p.not_before <= $2 ORDER BY p.seq LIMIT $3",
            )
            .bind(lane_number(lane))
            .bind(now)
            .bind(room)
            .fetch_all()
            .await?
        };
        rows.extend(claimed);
    }
    let message = |row: &Row| {
        Ok::<_, DbError>((
            row.get("seq")?,
            Message {
                subject: row.get("subject")?,
                msg_id: Some(row.get("msg_id")?),
                headers: row.get::<Json<_>>("headers")?.0,
                payload: row.get("payload")?,
            },
        ))
    };
    Ok(rows.iter().map(message).collect::<Result<_, _>>()?)
}

/// Publishes, then marks what was acknowledged. The count of rows published.
async fn publish(db: &Db, broker: &dyn Broker, rows: Vec<(i64, Message)>) -> Result<usize, RelayError> {
    if rows.is_empty() {
        return Ok(0);
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
    let mut tx = db.begin().await?;
    tx.query(
        "INSERT INTO outbox_published (seq, stream, incarnation, stream_seq, published_at)
         SELECT seq, stream, incarnation, stream_seq, $1 FROM {$2: seq, stream, incarnation, stream_seq}
         WHERE true ON CONFLICT DO NOTHING",
    )
    .bind(now)
    .rows(published.iter().map(|(seq, ack)| (*seq, &*ack.stream, db.incarnation(&ack.stream), ack.sequence)))
    .execute()
    .await?;
    let gone = tx
        .query("DELETE FROM outbox_pending WHERE seq IN (SELECT seq FROM {$1: seq})")
        .rows(published.iter().map(|(seq, _)| (*seq,)))
        .execute()
        .await?;
    tx.commit().await?;
    db.outbox_shrank(gone);
    Ok(())
}

/// Rows the broker refused wait a little, so that they do not hold up the rest.
async fn postpone(db: &Db, refused: &[(i64, PublishError)], now: Timestamp) -> Result<(), RelayError> {
    let mut tx = db.begin().await?;
    let seqs: Vec<i64> = refused.iter().map(|(seq, _)| *seq).collect();
    let known = tx
        .query("SELECT seq, attempts FROM outbox_pending WHERE seq IN (SELECT seq FROM {$1: seq}) ORDER BY seq {lock}")
        .rows(seqs.iter().map(|seq| (*seq,)))
        .fetch_all()
        .await?;
    let attempts: HashMap<i64, u32> =
        known.iter().map(|r| Ok((r.get("seq")?, r.get("attempts")?))).collect::<Result<_, DbError>>()?;
    let rows = refused.iter().filter_map(|(seq, error)| {
        let before = *attempts.get(seq)?;
        let wait = Duration::from_millis(100) * 2_u32.pow(before.min(10));
        Some((*seq, error.to_string(), now + wait.min(Duration::from_secs(30))))
    });
    tx.query(
        "UPDATE outbox_pending SET attempts = attempts + 1, last_error = r.error, not_before = r.until
         FROM {$1: id, error, until} WHERE seq = r.id",
    )
    .rows(rows)
    .execute()
    .await?;
    tx.commit().await?;
    Ok(())
}

/// When the oldest pending event was recorded.
pub(crate) async fn oldest_pending(db: &Db) -> Result<Option<Timestamp>, DbError> {
    let row = db
        .query(
            "SELECT o.created_at FROM outbox_pending p JOIN outbox o ON o.seq = p.seq ORDER BY p.seq LIMIT 1",
        )
        .fetch_optional()
        .await?;
    row.map(|r| r.get("created_at")).transpose()
}
