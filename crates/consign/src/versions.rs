//! Versions of an event side by side: which are published, who reads which, and when one may be given up.
//!
//! What configuration says is published, and besides it whatever somebody still needs: as long as a consumer of the stream asks for none of
//! the versions that are configured, the one that it asks for is published too. Nothing is lost to a step taken too early.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::broker::{Broker, BrokerError, ConsumerInfo, overlap, versioned};
use crate::consumer::{ReadyConsumer, readers};
use crate::db::{Db, DbError};
use crate::{Event, Timestamp, telemetry};

/// How often it is looked who needs what.
const LOOK: Duration = Duration::from_secs(10);

/// Everything wrong with a list of versions in a configuration.
pub fn check(setting: &str, versions: &[u32], known: &[u32]) -> Vec<String> {
    let unknown: Vec<&u32> = versions.iter().filter(|v| !known.contains(v)).collect();
    if versions.is_empty() || !unknown.is_empty() {
        return vec![format!("{setting} = {versions:?} must name one or more of the versions {known:?}")];
    }
    Vec::new()
}

/// Which versions of an event are published now. Handed to [`Emission::versions`](crate::Emission::versions), and to
/// [`Service::publishes`](crate::Service::publishes), which keeps it up to date.
#[derive(Clone, Debug)]
pub struct Published(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    event: &'static str,
    stream: String,
    /// All that there are, rising.
    known: Vec<u32>,
    configured: BTreeSet<u32>,
    now: RwLock<Arc<Now>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Now {
    versions: Vec<u32>,
    retired: BTreeSet<u32>,
    /// Who needs a version that is not configured.
    needed_by: BTreeMap<u32, BTreeSet<String>>,
}

impl Published {
    /// `E` and its `older` versions, on a stream; `configured` are those that are to be published.
    ///
    /// Until it is known who reads what, all of them are.
    pub fn new<E: Event>(stream: &str, older: &[u32], configured: &[u32]) -> Self {
        let mut known: Vec<u32> = older.iter().copied().chain([E::VERSION]).collect();
        known.sort_unstable();
        known.dedup();
        let now = Now { versions: known.clone(), ..Now::default() };
        Self(Arc::new(Inner {
            event: E::TYPE,
            stream: stream.to_owned(),
            known,
            configured: configured.iter().copied().collect(),
            now: RwLock::new(Arc::new(now)),
        }))
    }

    /// The versions to be published now, rising.
    pub fn now(&self) -> Vec<u32> {
        self.state().versions.clone()
    }

    /// Its type.
    pub fn event(&self) -> &'static str {
        self.0.event
    }

    fn state(&self) -> Arc<Now> {
        Arc::clone(&self.0.now.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// What follows from what is retired and who reads what.
    fn decide(&self, retired: BTreeSet<u32>, consumers: &[ConsumerInfo]) -> Now {
        let mut versions: BTreeSet<u32> = self.0.configured.difference(&retired).copied().collect();
        if versions.is_empty() {
            // Something has to be published.
            versions.extend(self.0.known.last());
        }
        let mut needed_by: BTreeMap<u32, BTreeSet<String>> = BTreeMap::new();
        for consumer in consumers {
            let read: Vec<u32> =
                self.0.known.iter().copied().filter(|v| reads(consumer, self.0.event, *v)).collect();
            if let Some(highest) = read.last()
                && !read.iter().any(|v| versions.contains(v))
            {
                needed_by.entry(*highest).or_default().insert(consumer.durable.clone());
            }
        }
        versions.extend(needed_by.keys());
        Now { versions: versions.into_iter().collect(), retired, needed_by }
    }

    fn set(&self, now: Now) {
        let (event, before) = (self.0.event, self.state());
        for version in &self.0.known {
            let labels = [("event", event.to_owned()), ("version", version.to_string())];
            let on = f64::from(u8::from(now.versions.contains(version)));
            metrics::gauge!("consign_event_version_published", &labels).set(on);
        }
        if *before == now {
            return;
        }
        for (version, by) in &now.needed_by {
            if before.needed_by.get(version) != Some(by) {
                tracing::warn!(event, version, consumers = ?by, "published although it is not configured: these consumers ask for no other version");
            }
        }
        tracing::info!(event, versions = ?now.versions, "versions published");
        *self.0.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(now);
    }
}

fn name(event: &str, version: u32) -> String {
    format!("{event}.v{version}")
}

/// Whether a consumer is given events of this version.
fn reads(consumer: &ConsumerInfo, event: &str, version: u32) -> bool {
    let all = format!("{}.>", name(event, version));
    consumer.filters.is_empty() || consumer.filters.iter().any(|f| overlap(f, &all))
}

/// Whether it asks for this very version, rather than for everything.
fn asks_for(consumer: &ConsumerInfo, event: &str, version: u32) -> bool {
    let this = |f: &String| versioned(f).is_some_and(|(e, v, _)| e == event && v == version);
    consumer.filters.iter().any(this)
}

async fn retired(db: &Db, event: &str) -> Result<BTreeSet<u32>, DbError> {
    let rows = db.query("SELECT event FROM retired").fetch_all().await?;
    let names: Vec<String> = rows.iter().map(|r| r.get("event")).collect::<Result<_, _>>()?;
    let of = |name: &String| versioned(name).and_then(|(e, v, _)| (e == event).then_some(v));
    Ok(names.iter().filter_map(of).collect())
}

#[derive(Debug, Error)]
enum LookError {
    #[error("database")]
    Db(#[from] DbError),
    #[error("broker")]
    Broker(#[from] BrokerError),
}

async fn look_at(db: &Db, broker: &dyn Broker, published: &Published) -> Result<(), LookError> {
    let retired = retired(db, published.0.event).await?;
    let consumers = broker.consumers(&published.0.stream).await?;
    published.set(published.decide(retired, &consumers));
    Ok(())
}

/// Looks who needs what. What cannot be looked at stays as it was.
pub(crate) async fn look(db: &Db, broker: &dyn Broker, all: &[Published]) {
    for published in all {
        if let Err(error) = look_at(db, broker, published).await {
            tracing::warn!(
                event = published.0.event, error = telemetry::chain(&error), versions = ?published.now(),
                "who reads which version cannot be known now; the versions published stay as they are"
            );
        }
    }
}

/// Looks again and again, until told to stop.
pub(crate) async fn keep(db: Db, broker: Arc<dyn Broker>, all: Vec<Published>, stop: CancellationToken) {
    while !all.is_empty() && stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
        look(&db, broker.as_ref(), &all).await;
    }
}

/// A version may not be retired, or not restored.
#[derive(Debug, Error)]
pub(crate) enum RetireError {
    #[error("{event} is not published here in several versions; there is: {known}")]
    Unknown { event: String, known: String },
    #[error("{event} has the versions {known:?}, and no version {version}")]
    NoVersion { event: String, version: u32, known: Vec<u32> },
    #[error(
        "{event} v{version} is the only version that is configured to be published; configure another one first"
    )]
    OnlyOne { event: String, version: u32 },
    #[error(
        "{event} v{version} is still read: {by}; move them to another version first, or delete the consumers that nobody runs any more"
    )]
    StillRead { event: String, version: u32, by: String },
    #[error("database")]
    Db(#[from] DbError),
    #[error("broker")]
    Broker(#[from] BrokerError),
}

fn find<'a>(all: &'a [Published], event: &str, version: u32) -> Result<&'a Published, RetireError> {
    let published = all.iter().find(|p| p.0.event == event).ok_or_else(|| RetireError::Unknown {
        event: event.to_owned(),
        known: if all.is_empty() {
            "none".to_owned()
        } else {
            all.iter().map(|p| p.0.event).collect::<Vec<_>>().join(", ")
        },
    })?;
    let known = &published.0.known;
    if !known.contains(&version) {
        return Err(RetireError::NoVersion { event: event.to_owned(), version, known: known.clone() });
    }
    Ok(published)
}

/// Stops publishing a version, for good, in all replicas: at once in this one, within seconds in the others.
pub(crate) async fn retire(
    db: &Db,
    broker: &dyn Broker,
    all: &[Published],
    event: &str,
    version: u32,
) -> Result<Vec<u32>, RetireError> {
    let published = find(all, event, version)?;
    let mut gone = retired(db, event).await?;
    gone.insert(version);
    if published.0.configured.is_subset(&gone) {
        return Err(RetireError::OnlyOne { event: event.to_owned(), version });
    }
    let consumers = broker.consumers(&published.0.stream).await?;
    let by: Vec<String> = consumers
        .iter()
        .filter(|c| asks_for(c, event, version))
        .map(|c| match c.last_delivered_at {
            Some(at) => format!("{} (last given an event at {at})", c.durable),
            None => c.durable.clone(),
        })
        .collect();
    if !by.is_empty() {
        return Err(RetireError::StillRead { event: event.to_owned(), version, by: by.join(", ") });
    }
    let mut tx = db.begin().await?;
    let now = tx.now();
    tx.query("INSERT INTO retired (event, retired_at) VALUES ($1, $2) ON CONFLICT DO NOTHING")
        .bind(name(event, version))
        .bind(now)
        .execute()
        .await?;
    tx.commit().await?;
    published.set(published.decide(gone, &consumers));
    tracing::info!(event, version, "a version was retired");
    Ok(published.now())
}

/// Publishes a version that was retired again, if it is configured.
pub(crate) async fn restore(
    db: &Db,
    broker: &dyn Broker,
    all: &[Published],
    event: &str,
    version: u32,
) -> Result<Vec<u32>, RetireError> {
    let published = find(all, event, version)?;
    let mut tx = db.begin().await?;
    tx.query("DELETE FROM retired WHERE event = $1").bind(name(event, version)).execute().await?;
    tx.commit().await?;
    let gone = retired(db, event).await?;
    let consumers = broker.consumers(&published.0.stream).await?;
    published.set(published.decide(gone, &consumers));
    tracing::info!(event, version, "a version was restored");
    Ok(published.now())
}

/// A version that a consumer can read.
#[derive(Debug)]
pub(crate) struct Consumed {
    consumer: String,
    stream: String,
    version: String,
    handled_as: String,
    asked_for: bool,
}

impl Consumed {
    pub(crate) fn of(consumer: &ReadyConsumer) -> Vec<Self> {
        let one = |(version, handled_as): (String, String)| Self {
            consumer: consumer.name().to_owned(),
            stream: consumer.stream().to_owned(),
            asked_for: consumer.asks_for(&version),
            version,
            handled_as,
        };
        consumer.reads().into_iter().map(one).collect()
    }
}

/// Who reads and who publishes which version of an event, as far as one service knows.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    /// Events that this service publishes in several versions.
    pub published: Vec<PublishedEvent>,
    /// What its consumers can read.
    pub consumed: Vec<ConsumedVersion>,
    /// All consumers of the streams that it owns, whoever they belong to.
    pub consumers: Vec<StreamConsumer>,
}

/// An event that is published in several versions.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct PublishedEvent {
    /// Its type.
    pub event: String,
    /// The versions that there are.
    pub known: Vec<u32>,
    /// Those that are to be published.
    pub configured: Vec<u32>,
    /// Those that were retired.
    pub retired: Vec<u32>,
    /// Those that are published now.
    pub published: Vec<u32>,
    /// Published although they are not configured, and the consumers that need them.
    pub needed_by: BTreeMap<u32, BTreeSet<String>>,
}

/// A version that a consumer can read.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ConsumedVersion {
    /// The consumer.
    pub consumer: String,
    /// The stream it reads.
    pub stream: String,
    /// Type and version, for example `orders.created.v1`.
    pub event: String,
    /// What its handler takes: another one, if it is made into that.
    pub handled_as: String,
    /// Whether the consumer asks the broker for it.
    pub asked_for: bool,
    /// How often it took effect, up to some seconds ago.
    pub handled: u64,
    /// When it last did.
    pub last_handled_at: Option<Timestamp>,
    /// How many replicas of the consumer are running.
    pub replicas: u64,
}

/// A consumer of a stream, as the broker knows it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct StreamConsumer {
    /// The stream.
    pub stream: String,
    /// The durable's name.
    pub durable: String,
    /// Which subjects it is given; empty means all.
    pub filters: Vec<String>,
    /// Events that it has not been given yet.
    pub pending: u64,
    /// Given and not settled.
    pub unsettled: u64,
    /// When it was last given one, as far as the broker remembers.
    pub last_delivered_at: Option<Timestamp>,
}

#[derive(Debug, Error)]
#[error(transparent)]
pub(crate) struct UsageError(#[from] LookError);

/// All that this service knows of who reads what.
pub(crate) async fn usage(
    db: &Db,
    broker: &dyn Broker,
    published: &[Published],
    consumed: &[Consumed],
    streams: &[String],
) -> Result<Usage, UsageError> {
    let (handled, running) = (
        readers::handled(db).await.map_err(LookError::from)?,
        readers::running(db).await.map_err(LookError::from)?,
    );
    let consumed = consumed.iter().map(|c| {
        let did = handled.get(&(c.consumer.clone(), c.version.clone()));
        ConsumedVersion {
            consumer: c.consumer.clone(),
            stream: c.stream.clone(),
            event: c.version.clone(),
            handled_as: c.handled_as.clone(),
            asked_for: c.asked_for,
            handled: did.map_or(0, |(n, _)| *n),
            last_handled_at: did.map(|(_, at)| *at),
            replicas: running.get(&c.consumer).copied().unwrap_or(0),
        }
    });
    let mut consumers = Vec::new();
    for stream in streams {
        let found = broker.consumers(stream).await.map_err(LookError::from)?;
        consumers.extend(found.into_iter().map(|c| StreamConsumer {
            stream: stream.clone(),
            durable: c.durable,
            filters: c.filters,
            pending: c.pending,
            unsettled: c.ack_pending,
            last_delivered_at: c.last_delivered_at,
        }));
    }
    let published = published.iter().map(|p| {
        let now = p.state();
        PublishedEvent {
            event: p.0.event.to_owned(),
            known: p.0.known.clone(),
            configured: p.0.configured.iter().copied().collect(),
            retired: now.retired.iter().copied().collect(),
            published: now.versions.clone(),
            needed_by: now.needed_by.clone(),
        }
    });
    Ok(Usage { published: published.collect(), consumed: consumed.collect(), consumers })
}
