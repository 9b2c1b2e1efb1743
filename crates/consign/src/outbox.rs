//! Events recorded in the caller's transaction, and the relay that publishes them after it.
//!
//! The relay selects what is pending, never "id greater than": a row that commits late is not skipped. It is woken by each
//! commit, and sweeps now and then for what a crash left behind.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::OptionFuture;
use serde_json::Value;
use thiserror::Error;
use tokio::task::JoinError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::broker::{Broker, Message, PubAck, PublishError};
use crate::db::{Db, DbError, Row, Tx, TxState};
use crate::event::{Cause, Envelope, Event, EventId, Lane};
use crate::retry::Backoff;
use crate::schema::bounds::{self, OutOfBounds};
use crate::schema::{self, CompiledSchema, SchemaViolation};
use crate::{Timestamp, telemetry};

/// Rows published per round; the next round's rows gather meanwhile, so rounds grow with the load.
const BATCH: usize = 1024;
/// While express rows wait, every so many rounds are the standard ones'.
const STANDARD_TURN: u32 = 4;
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
    older: Vec<Older>,
    versions: Option<Vec<u32>>,
}

/// The same event as an older version has it.
#[derive(Debug)]
struct Older {
    event_type: &'static str,
    version: u32,
    schema: Arc<CompiledSchema>,
    value: Result<Value, serde_json::Error>,
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
            older: Vec::new(),
            versions: None,
        }
    }

    /// Publishes it as an older version too, for consumers that have not moved yet: one logical event with one id, in one transaction. A
    /// consumer that accepts both takes effect once, with the highest version it accepts.
    ///
    /// ```
    /// use consign::{Emission, Event};
    /// # use schemars::JsonSchema;
    /// # use serde::{Deserialize, Serialize};
    ///
    /// #[derive(Clone, Serialize, Deserialize, JsonSchema, Event)]
    /// #[event(type = "parcels.packed", version = 1)]
    /// struct PackedV1 { grams: u32 }
    ///
    /// #[derive(Clone, Serialize, Deserialize, JsonSchema, Event)]
    /// #[event(type = "parcels.packed", version = 2)]
    /// struct Packed { grams: u32, fragile: bool }
    ///
    /// let packed = Packed { grams: 700, fragile: true };
    /// Emission::new(packed, "parcel-1", 1).also(|p| PackedV1 { grams: p.grams });
    /// ```
    #[must_use]
    pub fn also<Old: Event>(mut self, downcast: impl FnOnce(&E) -> Old) -> Self {
        const { assert!(Old::VERSION < E::VERSION, "a downcast leads to an older version") };
        let value = serde_json::to_value(downcast(&self.event));
        self.older.push(Older {
            event_type: Old::TYPE,
            version: Old::VERSION,
            schema: schema::of::<Old>(),
            value,
        });
        self
    }

    /// Publishes only these of its versions: `[1]` before a change, `[1, 2]` while it is under way, `[2]` after it. Without this, all that
    /// there are. [`Published`](crate::versions::Published) says which those are, from configuration and from who still reads what.
    #[must_use]
    pub fn versions(self, versions: impl AsRef<[u32]>) -> Self {
        Self { versions: Some(versions.as_ref().to_vec()), ..self }
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
    /// It is larger than an event may be, or cannot be kept.
    #[error("the event cannot be published: {0}")]
    OutOfBounds(#[from] OutOfBounds),
    /// None of the versions to be published is one it has.
    #[error("{event} is to be published in versions {wanted:?}, and has none of them")]
    NoVersion {
        /// Its type.
        event: &'static str,
        /// What was asked for.
        wanted: Vec<u32>,
    },
    /// An older version is of another type.
    #[error("{other} is no version of {event}")]
    OtherType {
        /// Its type.
        event: &'static str,
        /// The other.
        other: &'static str,
    },
}

/// A row of the outbox to be.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub event_id: EventId,
    pub lane: Lane,
    pub message: Message,
    pub created_at: Timestamp,
}

/// One row for each version that is published.
pub(crate) fn record<E: Event>(
    emission: Emission<E>,
    cause: &Cause,
    service: &str,
    now: Timestamp,
) -> Result<Vec<Recorded>, EmitError> {
    let id = Uuid::now_v7();
    let mut all = Vec::with_capacity(1 + emission.older.len());
    all.push((E::VERSION, schema::of::<E>(), serde_json::to_value(&emission.event)?));
    for older in emission.older {
        if older.event_type != E::TYPE {
            return Err(EmitError::OtherType { event: E::TYPE, other: older.event_type });
        }
        all.push((older.version, older.schema, older.value?));
    }
    // The highest first: who reads several finds the one that takes effect before the others.
    all.sort_unstable_by_key(|(version, ..)| std::cmp::Reverse(*version));
    if let Some(wanted) = emission.versions {
        all.retain(|(version, ..)| wanted.contains(version));
        if all.is_empty() {
            return Err(EmitError::NoVersion { event: E::TYPE, wanted });
        }
    }
    let siblings: Vec<u32> =
        if all.len() > 1 { all.iter().map(|(version, ..)| *version).collect() } else { Vec::new() };
    let cause = emission.cause.unwrap_or_else(|| cause.clone());
    let record = |(version, schema, value): (u32, Arc<CompiledSchema>, Value)| {
        schema.validate(&value)?;
        let envelope = Envelope {
            id,
            event_type: E::TYPE.into(),
            version,
            source: format!("/services/{service}").into(),
            aggregate_id: emission.aggregate_id.clone(),
            aggregate_version: emission.aggregate_version,
            time: now,
            cause: cause.clone(),
            lane: emission.lane,
            siblings: siblings.clone(),
        };
        let payload = Bytes::from(serde_json::to_vec(&value)?);
        bounds::check(&payload)?;
        let message = envelope.into_message(emission.key.as_deref(), payload);
        Ok(Recorded { event_id: id, lane: emission.lane, message, created_at: now })
    };
    all.into_iter().map(record).collect()
}

/// Headers as the table keeps them: JSON, which no database ever looks into.
#[expect(clippy::expect_used, reason = "text is always valid JSON")]
fn headers_text(headers: &[(String, String)]) -> String {
    serde_json::to_string(headers).expect("text")
}

/// A row of the outbox as it is published.
pub(crate) fn message(row: &Row) -> Result<Message, DbError> {
    let headers: String = row.get("headers")?;
    Ok(Message {
        subject: row.get("subject")?,
        msg_id: Some(row.get("msg_id")?),
        headers: serde_json::from_str(&headers)
            .map_err(|e| DbError::Sql(sqlx::Error::Decode(Box::new(e))))?,
        payload: row.get("payload")?,
    })
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
            headers_text(&r.message.headers),
            r.message.payload.clone(),
            r.created_at,
            r.lane.number(),
        )
    });
    if shared {
        // Numbers are given out in the rows' order, though not without gaps: other transactions take some in between.
        let inserted = tx
            .query(
                "WITH given AS MATERIALIZED
                        (SELECT nextval('outbox_numbers') AS seq, r.*
                         FROM {$2: event_id, msg_id, subject, headers, payload bytes, created_at, lane}),
                      kept AS (INSERT INTO outbox (seq, event_id, msg_id, subject, headers, payload, created_at)
                               SELECT seq, event_id, msg_id, subject, headers, payload, created_at FROM given)
                 INSERT INTO outbox_pending (seq, lane, not_before) SELECT seq, lane, $1 FROM given RETURNING seq",
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
        .rows(seqs.iter().zip(recorded).map(|(seq, r)| (*seq, r.lane.number())))
        .execute()
        .await?;
    Ok(seqs)
}

/// Publishes the outbox of one database until told to stop; then once more, so that a drained service leaves nothing behind.
pub(crate) async fn relay(db: Db, broker: Arc<dyn Broker>, stop: CancellationToken) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    // A crash may have left rows behind, so the table is read first.
    let mut relay = Relay {
        db,
        broker,
        sweep: true,
        swept: Claimed::default(),
        answered: Answered::default(),
        sweeps: 0,
        counts: None,
    };
    loop {
        let stopping = stop.is_cancelled();
        match relay.round().await {
            Ok(n) => {
                backoff.reset();
                if n > 0 {
                    continue;
                }
                if stopping {
                    return;
                }
                tokio::select! {
                    () = relay.db.relay_wake().notified() => {}
                    () = tokio::time::sleep(SWEEP) => relay.sweep = true,
                    () = stop.cancelled() => relay.sweep = true,
                }
            }
            Err(error) => {
                relay.sweep = true;
                let delay = backoff.next();
                tracing::warn!(
                    service = relay.db.service(), error = telemetry::chain(&error), retry_in = ?delay,
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
    #[error("a part of the relay ended before its time")]
    Ended(#[from] JoinError),
    #[error("the broker acknowledged none of {count} events")]
    Refused {
        count: usize,
        #[source]
        first: PublishError,
    },
}

/// Rows to publish, and the transaction that keeps other replicas off those that were read from the table.
#[derive(Debug, Default)]
struct Claimed {
    rows: Vec<(i64, Message)>,
    held: Option<Tx>,
}

/// What the broker said of rows, still to be recorded.
#[derive(Debug, Default)]
struct Answered {
    acked: Vec<(i64, PubAck)>,
    refused: Vec<(i64, PublishError)>,
    held: Option<Tx>,
}

/// One round's rows are published while the answers to the round before are recorded and the rows of the next are read.
struct Relay {
    db: Db,
    broker: Arc<dyn Broker>,
    /// Read the table too: something may be there that is not in memory.
    sweep: bool,
    swept: Claimed,
    answered: Answered,
    /// Rounds that read the table.
    sweeps: u32,
    /// When the pending rows may be counted again.
    counts: Option<Instant>,
}

impl Relay {
    /// How many rows are under way, or were.
    async fn round(&mut self) -> Result<usize, RelayError> {
        let mut answered = mem::take(&mut self.answered);
        let under_way = answered.acked.len() + answered.refused.len();
        let status = self.broker.status();
        if !status.connected {
            // Nothing is taken out of memory that could not be published; what is in the table is let go.
            self.swept = Claimed::default();
            mark(&self.db, answered).await?;
            if self.db.outbox_depth() == 0 {
                return Ok(0);
            }
            let first = PublishError::Unknown(status.detail.unwrap_or_else(|| "disconnected".into()));
            return Err(RelayError::Refused { count: 0, first });
        }
        self.count().await?;
        let shared = self.db.is_shared();
        if self.sweep && !shared {
            // What is in memory is in the table too, and no row is held: it must not be read again while it is under way.
            mark(&self.db, mem::take(&mut answered)).await?;
            self.swept = claim_in_turn(self.db.clone(), self.turn()).await?;
            self.sweep = !self.swept.rows.is_empty();
        }
        let Claimed { mut rows, held } = mem::take(&mut self.swept);
        let (fresh, overflow) = self.db.take_fresh(BATCH);
        self.sweep |= overflow;
        if rows.is_empty() {
            rows = fresh;
        } else {
            let known: HashSet<i64> = rows.iter().map(|(seq, _)| *seq).collect();
            rows.extend(fresh.into_iter().filter(|(seq, _)| !known.contains(seq)));
        }
        // Each on a thread of its own: reading rows and writing headers take as long as the servers do.
        let claiming = (self.sweep && shared)
            .then(|| AbortOnDropHandle::new(tokio::spawn(claim_in_turn(self.db.clone(), self.turn()))));
        let db = self.db.clone();
        let marking = AbortOnDropHandle::new(tokio::spawn(async move { mark(&db, answered).await }));
        let count = rows.len();
        let published = publish(&self.db, self.broker.as_ref(), Claimed { rows, held }).await;
        let (claimed, marked) = (OptionFuture::from(claiming).await, marking.await);
        self.answered = published?;
        if let Some(claimed) = claimed {
            self.swept = claimed??;
            self.sweep = !self.swept.rows.is_empty();
        }
        marked??;
        Ok(under_way + count + self.swept.rows.len())
    }

    /// From which lane on the next round reads: express rows go first, but every so many rounds it is the others' turn.
    fn turn(&mut self) -> Lane {
        self.sweeps = self.sweeps.wrapping_add(1);
        if self.sweeps.is_multiple_of(STANDARD_TURN) { Lane::Standard } else { Lane::Express }
    }

    /// Other replicas change what is pending, so it is counted now and then; of a long backlog, rarely.
    async fn count(&mut self) -> Result<(), DbError> {
        let started = Instant::now();
        if self.sweep && self.counts.is_none_or(|at| at <= started) {
            self.db.count_outbox().await?;
            self.counts = Some(started + SWEEP.max(started.elapsed() * 50));
        }
        Ok(())
    }
}

async fn claim_in_turn(db: Db, turn: Lane) -> Result<Claimed, RelayError> {
    let claimed = claim(&db, turn).await?;
    if claimed.rows.is_empty() && turn == Lane::Standard {
        return claim(&db, Lane::Express).await;
    }
    Ok(claimed)
}

/// Rows the broker has not acknowledged and nobody is publishing, from this lane on; where there are other replicas, they are locked, and
/// skip each other's. It selects what is pending, never what has a greater number: a row that commits late is not passed over.
async fn claim(db: &Db, from: Lane) -> Result<Claimed, RelayError> {
    // By a range of lanes, in the index's order: of a table that grew since it was last analysed, the planner would believe that an equality
    // finds a handful, and read and sort all of it for each round.
    let text = "SELECT p.seq, o.msg_id, o.subject, o.headers, o.payload
         FROM (SELECT lane, seq FROM outbox_pending WHERE lane >= $1 AND not_before <= $2 ORDER BY lane, seq LIMIT $3 {skip}) AS p
         JOIN outbox o ON o.seq = p.seq ORDER BY p.lane, p.seq";
    let mut held = if db.is_shared() { Some(db.begin().await?) } else { None };
    let query = match &mut held {
        Some(tx) => tx.query(text),
        None => db.query(text),
    };
    let found = query.bind(from.number()).bind(db.clock().now()).bind(BATCH).fetch_all().await?;
    let row = |row: &Row| Ok::<_, DbError>((row.get("seq")?, message(row)?));
    let rows: Vec<_> = found.iter().map(row).collect::<Result<_, _>>()?;
    if rows.is_empty()
        && let Some(tx) = held.take()
    {
        tx.rollback().await;
    }
    Ok(Claimed { rows, held })
}

async fn publish(db: &Db, broker: &dyn Broker, claimed: Claimed) -> Result<Answered, RelayError> {
    let Claimed { rows, held } = claimed;
    if rows.is_empty() {
        return Ok(Answered::default());
    }
    let (seqs, messages): (Vec<i64>, Vec<Message>) = rows.into_iter().unzip();
    let count = messages.len();
    let answers = tokio::time::timeout(PUBLISH_TIMEOUT, broker.publish(messages)).await.map_err(|_| {
        let first = PublishError::Unknown(format!("no answer within {PUBLISH_TIMEOUT:?}"));
        RelayError::Refused { count, first }
    })?;
    let mut answered = Answered { held, ..Answered::default() };
    for (seq, answer) in seqs.into_iter().zip(answers) {
        match answer {
            Ok(ack) => answered.acked.push((seq, ack)),
            Err(e) => answered.refused.push((seq, e)),
        }
    }
    // Replicas that record the same rows wait for each other rather than in a circle.
    answered.acked.sort_unstable_by_key(|(seq, _)| *seq);
    metrics::counter!("consign_events_published_total", "service" => db.service().to_owned())
        .increment(answered.acked.len() as u64);
    Ok(answered)
}

/// Marks what was acknowledged; what was refused waits.
async fn mark(db: &Db, answered: Answered) -> Result<(), RelayError> {
    let Answered { acked, refused, held } = answered;
    if acked.is_empty() && refused.is_empty() {
        return Ok(());
    }
    let (now, count) = (db.clock().now(), refused.len());
    let mut tx = match held {
        Some(tx) => tx,
        None => db.begin().await?,
    };
    let mut gone = 0;
    if !acked.is_empty() {
        tx.query(
            "INSERT INTO outbox_published (seq, stream, incarnation, stream_seq, published_at)
             SELECT seq, stream, incarnation, stream_seq, $1 FROM {$2: seq, stream, incarnation, stream_seq}
             WHERE true ON CONFLICT DO NOTHING",
        )
        .bind(now)
        .rows(acked.iter().map(|(seq, ack)| (*seq, &*ack.stream, db.incarnation(&ack.stream), ack.sequence)))
        .execute()
        .await?;
        gone = tx
            .query("DELETE FROM outbox_pending WHERE seq IN (SELECT seq FROM {$1: seq})")
            .rows(acked.iter().map(|(seq, _)| (*seq,)))
            .execute()
            .await?;
    }
    if !refused.is_empty() {
        postpone(&mut tx, &refused, now).await?;
    }
    tx.commit().await?;
    db.outbox_shrank(gone);
    match refused.into_iter().next() {
        // Of one alone it cannot be told whether the row or the broker is at fault: it steps back for the others.
        Some((_, first)) if acked.is_empty() => Err(RelayError::Refused { count, first }),
        _ => Ok(()),
    }
}

/// Rows the broker refused wait a little, so that they do not hold up the rest.
async fn postpone(tx: &mut Tx, refused: &[(i64, PublishError)], now: Timestamp) -> Result<(), RelayError> {
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
