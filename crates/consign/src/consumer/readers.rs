//! Which versions of events the replicas of a consumer can read, and which took effect when: so that a filter becomes wider only when all can
//! read what comes, and a version is given up by evidence.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::db::{Db, DbError, Json};
use crate::event::Envelope;
use crate::retry::Backoff;
use crate::{Timestamp, telemetry};

/// How often a replica says that it is there.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// One that has not been heard of for so long is gone.
const GONE: Duration = Duration::from_secs(30);
/// Time to say goodbye.
const LEAVE: Duration = Duration::from_secs(2);

/// One replica of a consumer, as the others know it.
pub(super) struct Readers {
    db: Db,
    consumer: String,
    replica: Uuid,
    reads: Vec<String>,
    /// Handled since the last heartbeat.
    handled: Mutex<BTreeMap<String, u64>>,
}

impl Readers {
    pub(super) fn new(db: Db, consumer: &str, reads: Vec<String>) -> Self {
        Self { db, consumer: consumer.to_owned(), replica: Uuid::now_v7(), reads, handled: Mutex::default() }
    }

    /// Says that it is there, as often as it takes. `false` if told to stop before.
    pub(super) async fn register_until(&self, stop: &CancellationToken) -> bool {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        while let Err(error) = self.heartbeat().await {
            let delay = backoff.next();
            tracing::warn!(consumer = self.consumer, error = telemetry::chain(&error), retry_in = ?delay, "a replica cannot be registered yet");
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = stop.cancelled() => return false,
            }
        }
        true
    }

    /// Goes on saying that it is there, until told to stop; never in the middle of it, for what was handled is counted once.
    pub(super) async fn keep(&self, stop: &CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(HEARTBEAT)).await.is_some() {
            if let Err(error) = self.heartbeat().await {
                tracing::warn!(
                    consumer = self.consumer,
                    error = telemetry::chain(&error),
                    "a replica could not be registered"
                );
            }
        }
    }

    /// Says goodbye, so that the others need not wait until it is known to be gone.
    pub(super) async fn leave(&self) {
        let leave = async {
            self.heartbeat().await?;
            let mut tx = self.db.begin().await?;
            tx.query("DELETE FROM readers WHERE consumer = $1 AND replica = $2")
                .bind(self.consumer.as_str())
                .bind(self.replica)
                .execute()
                .await?;
            tx.commit().await
        };
        match tokio::time::timeout(LEAVE, leave).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(
                consumer = self.consumer,
                error = telemetry::chain(&error),
                "a replica leaves unheard"
            ),
            Err(_) => tracing::warn!(consumer = self.consumer, "a replica leaves unheard"),
        }
    }

    async fn heartbeat(&self) -> Result<(), DbError> {
        let handled = self.handled.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.write(&handled).await?;
        let mut left = self.handled.lock().unwrap_or_else(PoisonError::into_inner);
        for (event, written) in handled {
            if let Some(n) = left.get_mut(&event) {
                *n -= written;
            }
        }
        left.retain(|_, n| *n > 0);
        Ok(())
    }

    async fn write(&self, handled: &BTreeMap<String, u64>) -> Result<(), DbError> {
        let mut tx = self.db.begin().await?;
        let now = tx.now();
        tx.query(
            "INSERT INTO readers (consumer, replica, reads, seen_at) VALUES ($1, $2, $3, $4)
             ON CONFLICT (consumer, replica) DO UPDATE SET seen_at = excluded.seen_at",
        )
        .bind(self.consumer.as_str())
        .bind(self.replica)
        .bind(Json(self.reads.clone()))
        .bind(now)
        .execute()
        .await?;
        if !handled.is_empty() {
            tx.query(
                "INSERT INTO consumed (consumer, event, handled, last_at) SELECT $1, event, n, $2 FROM {$3: event, n} WHERE true
                 ON CONFLICT (consumer, event) DO UPDATE
                 SET handled = consumed.handled + excluded.handled, last_at = excluded.last_at",
            )
            .bind(self.consumer.as_str())
            .bind(now)
            .rows(handled.iter().map(|(event, n)| (event.as_str(), *n)))
            .execute()
            .await?;
        }
        tx.commit().await
    }

    /// What the other replicas that are running can read.
    pub(super) async fn others(&self) -> Result<Vec<BTreeSet<String>>, DbError> {
        let since = self.db.clock().now() - GONE;
        let rows = self
            .db
            .query("SELECT reads FROM readers WHERE consumer = $1 AND replica <> $2 AND seen_at >= $3")
            .bind(self.consumer.as_str())
            .bind(self.replica)
            .bind(since)
            .fetch_all()
            .await?;
        rows.iter().map(|r| Ok(r.get::<Json<_>>("reads")?.0)).collect()
    }

    /// Takes note of events that took effect.
    pub(super) fn handled<'a>(&self, events: impl Iterator<Item = &'a Envelope>) {
        let mut batch: BTreeMap<String, u64> = BTreeMap::new();
        for event in events {
            *batch.entry(event.name()).or_default() += 1;
        }
        #[expect(clippy::cast_precision_loss, reason = "gauges are floating point")]
        let now = self.db.clock().now().as_millis() as f64 / 1000.0;
        for (event, n) in &batch {
            let labels = [("consumer", self.consumer.clone()), ("event", event.clone())];
            metrics::counter!("consign_event_version_handled_total", &labels).increment(*n);
            metrics::gauge!("consign_event_version_last_handled_seconds", &labels).set(now);
        }
        self.tally(batch);
    }

    fn tally(&self, more: BTreeMap<String, u64>) {
        let mut handled = self.handled.lock().unwrap_or_else(PoisonError::into_inner);
        for (event, n) in more {
            *handled.entry(event).or_default() += n;
        }
    }
}

/// How often each version took effect in each consumer of this service, and when last.
pub(crate) async fn handled(db: &Db) -> Result<BTreeMap<(String, String), (u64, Timestamp)>, DbError> {
    let rows = db.query("SELECT consumer, event, handled, last_at FROM consumed").fetch_all().await?;
    rows.iter()
        .map(|r| Ok(((r.get("consumer")?, r.get("event")?), (r.get("handled")?, r.get("last_at")?))))
        .collect()
}

/// How many replicas of each consumer are running.
pub(crate) async fn running(db: &Db) -> Result<BTreeMap<String, u64>, DbError> {
    let since = db.clock().now() - GONE;
    let rows = db
        .query("SELECT consumer, COUNT(*) AS n FROM readers WHERE seen_at >= $1 GROUP BY consumer")
        .bind(since)
        .fetch_all()
        .await?;
    rows.iter().map(|r| Ok((r.get("consumer")?, r.get("n")?))).collect()
}
