//! What the broker gave up: deliveries that were used up without an outcome. The broker says so once, in an advisory without body or reason; a
//! stream captures it, and the service whose consumer it was turns it into a dead letter, unless the inbox knows the event.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::broker::{Broker, BrokerError, ConsumerConfig, Delivery, Settlement, StreamConfig};
use crate::db::{Db, DbError};
use crate::dead_letter::{self, Burial, Reason};
use crate::event::{Cause, Envelope};
use crate::retry::Backoff;
use crate::telemetry;

/// The stream that captures advisories, of all services.
pub const STREAM: &str = "ADVISORIES";
const MAX_DELIVERIES: &str = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES";
const BATCH: usize = 64;
const FETCH_WAIT: Duration = Duration::from_secs(5);
/// An advisory that cannot be dealt with now is tried again after this.
const AGAIN: Duration = Duration::from_secs(5);

/// Both kinds of giving up: by the broker, and by a worker, which knows why and has recorded it.
pub(crate) fn stream() -> StreamConfig {
    let terminated = "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.>";
    StreamConfig::new(STREAM, &[&format!("{MAX_DELIVERIES}.>"), terminated])
}

/// The durable that brings a service what was given up of its own consumers, named by stream and durable.
pub(crate) fn consumer(service: &str, consumers: &[(String, String)]) -> ConsumerConfig {
    let mut filters: Vec<String> =
        consumers.iter().map(|(stream, durable)| format!("{MAX_DELIVERIES}.{stream}.{durable}")).collect();
    filters.sort();
    ConsumerConfig::new(&format!("advisories-{service}"), filters)
}

/// The part of `io.nats.jetstream.advisory.v1.max_deliver` that says what was given up.
#[derive(Deserialize)]
struct MaxDeliveries {
    stream: String,
    consumer: String,
    stream_seq: u64,
    deliveries: u32,
}

/// Listens until told to stop.
pub(crate) async fn listen(
    db: Db,
    broker: Arc<dyn Broker>,
    consumers: Vec<(String, String)>,
    stop: CancellationToken,
) {
    if consumers.is_empty() {
        return;
    }
    let config = consumer(db.service(), &consumers);
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
    let mut bound = false;
    while !stop.is_cancelled() {
        let fetched = async {
            if !bound {
                broker.ensure_consumer(STREAM, &config).await?;
            }
            broker.fetch(STREAM, &config.durable, BATCH, FETCH_WAIT).await
        };
        let fetched = tokio::select! {
            fetched = fetched => fetched,
            () = stop.cancelled() => return,
        };
        match fetched {
            Ok(deliveries) => {
                bound = true;
                backoff.reset();
                let mut settlements = Vec::with_capacity(deliveries.len());
                for delivery in &deliveries {
                    let settlement = match take_up(&db, broker.as_ref(), delivery).await {
                        Ok(()) => Settlement::Ack,
                        Err(error) => {
                            tracing::warn!(
                                service = db.service(), error = telemetry::chain(&error), retry_in = ?AGAIN,
                                "what the broker gave up cannot be taken up yet"
                            );
                            Settlement::Nak(AGAIN)
                        }
                    };
                    settlements.push((delivery.reply.clone(), settlement));
                }
                if !settlements.is_empty()
                    && let Err(error) = broker.settle(STREAM, &config.durable, settlements).await
                {
                    tracing::debug!(%error, "advisories come again");
                }
                if let Err(error) = dead_letter::queue_exhausted(&db).await {
                    tracing::warn!(
                        service = db.service(),
                        error = telemetry::chain(&error),
                        "nothing can be redriven"
                    );
                }
            }
            Err(error) => {
                bound = false;
                let delay = backoff.next();
                tracing::debug!(service = db.service(), %error, retry_in = ?delay, "advisories cannot be fetched");
                tokio::select! {
                    () = tokio::time::sleep(delay) => {}
                    () = stop.cancelled() => return,
                }
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum TakeUpError {
    #[error("broker")]
    Broker(#[from] BrokerError),
    #[error("database")]
    Db(#[from] DbError),
}

async fn take_up(db: &Db, broker: &dyn Broker, advisory: &Delivery) -> Result<(), TakeUpError> {
    let payload = &advisory.message.message.payload;
    let given_up: MaxDeliveries = match serde_json::from_slice(payload) {
        Ok(given_up) => given_up,
        Err(error) => {
            tracing::error!(%error, sequence = advisory.message.sequence, "an advisory cannot be read; it stays in its stream");
            return Ok(());
        }
    };
    let Some(stored) = broker.get(&given_up.stream, given_up.stream_seq).await? else {
        tracing::error!(
            stream = given_up.stream,
            sequence = given_up.stream_seq,
            consumer = given_up.consumer,
            "an event was given up and is no longer in its stream; `consign verify` names it"
        );
        return Ok(());
    };
    let envelope = Envelope::from_message(&stored.message).ok();
    // Its durables are named after the consumer, which the inbox knows.
    let name = given_up.consumer.strip_suffix("-express").unwrap_or(&given_up.consumer);
    let error =
        format!("delivered {} times without an outcome: do processes die of it?", given_up.deliveries);
    let mut tx = db.begin_for(envelope.as_ref().map_or_else(Cause::new, Envelope::as_cause)).await?;
    let burial = Burial {
        consumer: name,
        envelope: envelope.as_ref(),
        stream: &given_up.stream,
        stored: &stored,
        reason: Reason::Exhausted,
        error: &error,
        attempts: 0,
    };
    if dead_letter::bury(&mut tx, &burial).await? {
        tx.commit().await?;
        tracing::warn!(
            consumer = name,
            stream = given_up.stream,
            sequence = given_up.stream_seq,
            error,
            event_id = envelope.map(|e| e.id.to_string()),
            "the broker gave an event up; it is run again"
        );
    } else {
        // It was handled after all, or is a dead letter already.
        tx.rollback().await;
    }
    Ok(())
}
