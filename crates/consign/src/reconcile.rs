//! Recovering from a broker that lost what it had acknowledged: the outbox's history is compared with the streams, what is missing is
//! published again, and consumers that stand ahead of their stream are rewound. Twice the same changes nothing, for messages keep their ids
//! and inboxes know what was handled.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::broker::{
    Broker, BrokerError, ConsumerConfig, Message, PubAck, PublishError, StreamConfig, StreamInfo,
};
use crate::db::{Db, DbError, Row};
use crate::{Timestamp, outbox, telemetry};

/// How often it is looked whether a stream went backwards.
const LOOK: Duration = Duration::from_secs(5);
/// Rows compared at a time.
const BATCH: usize = 500;
/// Messages asked for at a time.
const ASK: usize = 32;

/// What was found and done about one stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StreamReport {
    /// Which.
    pub stream: String,
    /// Events in the outbox's history that were published to it.
    pub compared: u64,
    /// Those that are where they should be.
    pub present: u64,
    /// Those that the stream has dropped since, because of their age or because a newer one took their place.
    pub aged_out: u64,
    /// Those that were missing, and were published again.
    pub republished: u64,
}

/// What was found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// By stream.
    pub streams: Vec<StreamReport>,
    /// Durables that stood ahead of their stream, and begin anew.
    pub rewound: Vec<String>,
}

/// It could not be done, or not to the end; done again, it goes on.
#[derive(Debug, Error)]
pub enum ReconcileError {
    /// The broker could not be asked.
    #[error("broker")]
    Broker(#[from] BrokerError),
    /// The database could not be read or written.
    #[error("database")]
    Db(#[from] DbError),
    /// A missing event could not be published again.
    #[error("{count} missing events could not be published")]
    Publish {
        /// How many.
        count: usize,
        #[source]
        /// Why the first of them could not.
        first: PublishError,
    },
}

/// What a service compares: the streams it owns, and the consumers it runs, each with its stream.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Its streams.
    pub streams: Vec<StreamConfig>,
    /// Its consumers, each with its stream.
    pub consumers: Vec<(String, ConsumerConfig)>,
}

/// An event that was published, and where to.
struct Published {
    seq: i64,
    message: Message,
    stream_seq: u64,
    incarnation: String,
    published_at: Timestamp,
}

/// Compares everything, and mends it.
pub async fn reconcile(db: &Db, broker: &dyn Broker, scope: &Scope) -> Result<Report, ReconcileError> {
    let mut report = Report::default();
    for stream in &scope.streams {
        report.streams.push(reconcile_stream(db, broker, stream).await?);
    }
    for (stream, consumer) in &scope.consumers {
        if rewind_if_ahead(broker, stream, consumer).await? {
            report.rewound.push(consumer.durable.clone());
        }
    }
    Ok(report)
}

async fn reconcile_stream(
    db: &Db,
    broker: &dyn Broker,
    stream: &StreamConfig,
) -> Result<StreamReport, ReconcileError> {
    broker.ensure_stream(stream).await?;
    let info = broker.stream_info(&stream.name).await?;
    let mut report = StreamReport { stream: stream.name.clone(), ..StreamReport::default() };
    let mut after = 0;
    loop {
        let batch = published_after(db, stream, after).await?;
        let Some(last) = batch.last() else { return Ok(report) };
        after = last.seq;
        report.compared += batch.len() as u64;
        let (mut found, mut missing) = (Vec::new(), Vec::new());
        for chunk in batch.chunks(ASK) {
            let asked = chunk.iter().map(|p| place(broker, stream, &info, db.clock().now(), p));
            for (p, place) in chunk.iter().zip(futures_util::future::try_join_all(asked).await?) {
                match place {
                    Place::Found if p.incarnation == info.incarnation => report.present += 1,
                    Place::Found => {
                        report.present += 1;
                        found.push((p.seq, p.stream_seq));
                    }
                    Place::AgedOut => report.aged_out += 1,
                    Place::Missing => missing.push((p.seq, p.message.clone())),
                }
            }
        }
        // Restored from a copy: the same messages at the same places.
        record(db, &info.incarnation, &found).await?;
        if !missing.is_empty() {
            let (seqs, messages): (Vec<i64>, Vec<Message>) = missing.into_iter().unzip();
            let answers = broker.publish(messages).await;
            let mut again = Vec::with_capacity(seqs.len());
            let mut refused = Vec::new();
            for (seq, answer) in seqs.into_iter().zip(answers) {
                match answer {
                    Ok(PubAck { sequence, .. }) => again.push((seq, sequence)),
                    Err(e) => refused.push(e),
                }
            }
            record(db, &info.incarnation, &again).await?;
            report.republished += again.len() as u64;
            metrics::counter!("consign_events_republished_total", "stream" => stream.name.clone())
                .increment(again.len() as u64);
            let count = refused.len();
            if let Some(first) = refused.into_iter().next() {
                return Err(ReconcileError::Publish { count, first });
            }
        }
    }
}

/// What was published to a stream, in order; of a stream that keeps the last of each subject only those.
async fn published_after(db: &Db, stream: &StreamConfig, after: i64) -> Result<Vec<Published>, DbError> {
    let text = if stream.max_messages_per_subject == Some(1) {
        "SELECT p.seq, o.msg_id, o.subject, o.headers, o.payload, p.stream_seq, p.incarnation, p.published_at
         FROM outbox_published p JOIN outbox o ON o.seq = p.seq
         WHERE p.stream = $1 AND p.seq > $2
           AND p.seq IN (SELECT MAX(seq) FROM outbox GROUP BY subject)
         ORDER BY p.seq LIMIT $3"
    } else {
        "SELECT p.seq, o.msg_id, o.subject, o.headers, o.payload, p.stream_seq, p.incarnation, p.published_at
         FROM outbox_published p JOIN outbox o ON o.seq = p.seq
         WHERE p.stream = $1 AND p.seq > $2 ORDER BY p.seq LIMIT $3"
    };
    let rows = db.query(text).bind(stream.name.as_str()).bind(after).bind(BATCH).fetch_all().await?;
    let read = |row: &Row| {
        Ok(Published {
            seq: row.get("seq")?,
            message: outbox::message(row)?,
            stream_seq: row.get("stream_seq")?,
            incarnation: row.get("incarnation")?,
            published_at: row.get("published_at")?,
        })
    };
    rows.iter().map(read).collect()
}

enum Place {
    Found,
    AgedOut,
    Missing,
}

async fn place(
    broker: &dyn Broker,
    stream: &StreamConfig,
    info: &StreamInfo,
    now: Timestamp,
    p: &Published,
) -> Result<Place, BrokerError> {
    // What the stream would have dropped by itself is not lost.
    if stream.max_age.is_some_and(|age| p.published_at < now - age) {
        return Ok(Place::AgedOut);
    }
    let same = p.incarnation == info.incarnation;
    if same && p.stream_seq < info.first_sequence {
        return Ok(Place::AgedOut);
    }
    if p.stream_seq < info.first_sequence || p.stream_seq > info.last_sequence {
        return Ok(Place::Missing);
    }
    let stored = broker.get(&stream.name, p.stream_seq).await?;
    let there = stored.is_some_and(|s| s.message.msg_id == p.message.msg_id);
    Ok(if there { Place::Found } else { Place::Missing })
}

/// Where messages lie now.
async fn record(db: &Db, incarnation: &str, places: &[(i64, u64)]) -> Result<(), DbError> {
    if places.is_empty() {
        return Ok(());
    }
    let mut tx = db.begin().await?;
    let now = tx.now();
    tx.query(
        "UPDATE outbox_published SET incarnation = $1, stream_seq = r.place, published_at = $2 FROM {$3: id, place} WHERE seq = r.id",
    )
    .bind(incarnation)
    .bind(now)
    .rows(places.iter().copied())
    .execute()
    .await?;
    tx.commit().await
}

/// A durable that has passed more than its stream holds would pass over what comes next. `true` if it was one.
pub async fn rewind_if_ahead(
    broker: &dyn Broker,
    stream: &str,
    consumer: &ConsumerConfig,
) -> Result<bool, BrokerError> {
    let position = match broker.consumer_info(stream, &consumer.durable).await {
        Ok(info) => info.delivered,
        // Its worker makes it, from the beginning.
        Err(BrokerError::NoConsumer { .. } | BrokerError::NoStream(_)) => return Ok(false),
        Err(e) => return Err(e),
    };
    // Asked second: a stream only grows meanwhile.
    let info = broker.stream_info(stream).await?;
    if position <= info.last_sequence {
        return Ok(false);
    }
    tracing::warn!(
        stream,
        consumer = consumer.durable,
        position,
        last_sequence = info.last_sequence,
        "the consumer stands ahead of its stream, which has lost messages; it begins anew, and its inbox passes over what it has handled"
    );
    broker.rewind_consumer(stream, consumer, info.first_sequence).await?;
    metrics::counter!("consign_consumers_rewound_total", "consumer" => consumer.durable.clone()).increment(1);
    Ok(true)
}

/// Incarnation and last sequence of streams, as they were last known.
pub(crate) type Known = HashMap<String, (String, u64)>;

/// What the outbox says of the streams; to be asked before anything more is published.
pub(crate) async fn known(db: &Db, scope: &Scope) -> Result<Known, DbError> {
    let mut known = Known::new();
    for stream in &scope.streams {
        if let Some(last) = last_published(db, &stream.name).await? {
            known.insert(stream.name.clone(), last);
        }
    }
    Ok(known)
}

/// Looks, until told to stop, whether a stream is gone, made anew, or has gone backwards, and reconciles it then.
pub(crate) async fn keep(
    db: Db,
    broker: Arc<dyn Broker>,
    scope: Scope,
    mut known: Known,
    stop: CancellationToken,
) {
    loop {
        if broker.status().connected
            && let Err(error) = look(&db, broker.as_ref(), &scope, &mut known).await
        {
            tracing::warn!(
                service = db.service(), error = telemetry::chain(&error), retry_in = ?LOOK,
                "streams cannot be compared with the outbox"
            );
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn look(db: &Db, broker: &dyn Broker, scope: &Scope, known: &mut Known) -> Result<(), ReconcileError> {
    for stream in &scope.streams {
        let info = match broker.stream_info(&stream.name).await {
            Ok(info) => info,
            Err(BrokerError::NoStream(_)) => {
                broker.ensure_stream(stream).await?;
                broker.stream_info(&stream.name).await?
            }
            Err(e) => return Err(e.into()),
        };
        // Events published before incarnations were recorded say nothing about theirs.
        let behind = known.get(&stream.name).is_some_and(|(incarnation, sequence)| {
            !incarnation.is_empty() && (*incarnation != info.incarnation || *sequence > info.last_sequence)
        });
        db.set_incarnation(&stream.name, &info.incarnation);
        if behind {
            tracing::error!(
                service = db.service(),
                stream = stream.name,
                "the stream was made anew or has gone backwards: what it lost is published again from the outbox's history"
            );
            let report = reconcile_stream(db, broker, stream).await?;
            tracing::warn!(service = db.service(), ?report, "the stream is whole again");
        }
        known.insert(stream.name.clone(), (info.incarnation, info.last_sequence));
    }
    for (stream, consumer) in &scope.consumers {
        rewind_if_ahead(broker, stream, consumer).await?;
    }
    Ok(())
}

/// Where the last event published to a stream lies.
async fn last_published(db: &Db, stream: &str) -> Result<Option<(String, u64)>, DbError> {
    let row = db
        .query("SELECT incarnation, stream_seq FROM outbox_published WHERE stream = $1 ORDER BY seq DESC LIMIT 1")
        .bind(stream)
        .fetch_optional()
        .await?;
    row.map(|r| Ok((r.get("incarnation")?, r.get("stream_seq")?))).transpose()
}
