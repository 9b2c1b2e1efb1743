//! The worker: fetch a batch → decode → claim in the inbox → handlers → commit → acknowledge.
//!
//! Failures are counted, not deliveries: a killed process or a database outage costs an event nothing. If one event of a batch
//! fails, it is set aside and the rest runs again without it; it then runs alone, and its fate is decided in [`Worker::failed`].

use std::any::Any;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::util::BoxCloneSyncService;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use uuid::Uuid;

use crate::breaker::Breaker;
use crate::broker::{Broker, BrokerError, ConsumerConfig, Delivery, Settlement, StoredMessage};
use crate::db::{Db, DbError, Slot};
use crate::dead_letter::{self, Burial, Reason};
use crate::event::{Cause, Envelope, Event, EventId, Lane};
use crate::handler::{BoxError, Call, Failure, Fate, Handler, Incoming};
use crate::inbox;
use crate::layer::{CatchPanic, Measure, Timeout};
use crate::retry::{Backoff, RetryPolicy};
use crate::schema::{self, CompiledSchema};
use crate::telemetry;

/// How long one fetch waits for a message.
const FETCH_WAIT: Duration = Duration::from_secs(5);
/// While express events are at work, standard ones wait for them, but no longer than this a batch: neither lane starves.
const GIVE_WAY: Duration = Duration::from_millis(25);
/// After express events were seen, standard batches stay small for so long, so that the next ones need not wait for a large one to end.
const EXPRESS_RECENTLY: Duration = Duration::from_secs(2);
/// By how much they are smaller then.
const SMALLER: usize = 8;

/// A handler with the layers around it.
pub(crate) type HandlerService = BoxCloneSyncService<Call, (), Failure>;
type AnyEvent = Arc<dyn Any + Send + Sync>;
type Decode = Arc<dyn Fn(Value) -> Result<AnyEvent, serde_json::Error> + Send + Sync>;
type Convert = Arc<dyn Fn(AnyEvent) -> Option<AnyEvent> + Send + Sync>;

/// How a consumer fetches, waits and gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsumerOptions {
    /// Events per transaction at most.
    pub batch: usize,
    /// Unacknowledged for so long, the broker delivers again. Kept alive with progress acks while a handler is at work.
    #[serde(with = "humantime_serde")]
    pub ack_wait: Duration,
    /// A call of a handler is given up after this.
    #[serde(with = "humantime_serde")]
    pub handler_timeout: Duration,
    /// Retries and their limit.
    pub retry: RetryPolicy,
    /// How long the inbox remembers; events older than this are parked as dead letters, never run blindly.
    #[serde(with = "humantime_serde")]
    pub inbox_retention: Duration,
}

impl Default for ConsumerOptions {
    fn default() -> Self {
        Self {
            batch: 256,
            ack_wait: Duration::from_secs(30),
            handler_timeout: Duration::from_secs(10),
            retry: RetryPolicy::default(),
            inbox_retention: Duration::from_secs(21 * 24 * 3600),
        }
    }
}

#[derive(Clone)]
struct Route {
    /// The event that its handler takes; an older version leads there through upcasters.
    target: Arc<str>,
    schema: Arc<CompiledSchema>,
    decode: Decode,
    batch: bool,
    service: HandlerService,
}

type MakeRoute<S> = Box<dyn FnOnce(S, ConsumerOptions) -> Route + Send>;

/// A durable consumer of one stream, with a handler per event it accepts.
///
/// Its name is its identity in the inbox: change it, and it handles everything anew.
pub struct Consumer<S> {
    name: String,
    stream: String,
    options: ConsumerOptions,
    routes: BTreeMap<String, MakeRoute<S>>,
    layers: Vec<Box<dyn Fn(HandlerService) -> HandlerService + Send>>,
    upcasters: Vec<Upcaster>,
    breaker: Option<Breaker>,
}

/// Makes the next version of an older one.
struct Upcaster {
    from: String,
    to: String,
    schema: Arc<CompiledSchema>,
    decode: Decode,
    convert: Convert,
}

impl<S: Clone + Send + Sync + 'static> Consumer<S> {
    /// A consumer called `name` of `stream`.
    pub fn new(name: &str, stream: &str) -> Self {
        Self {
            name: name.to_owned(),
            stream: stream.to_owned(),
            options: ConsumerOptions::default(),
            routes: BTreeMap::new(),
            layers: Vec::new(),
            upcasters: Vec::new(),
            breaker: None,
        }
    }

    /// Replaces the defaults.
    #[must_use]
    pub fn options(self, options: ConsumerOptions) -> Self {
        Self { options, ..self }
    }

    /// Mounts a handler for the event that its first argument names.
    #[must_use]
    pub fn on<H, Args>(mut self, handler: H) -> Self
    where
        H: Handler<Args, S>,
        Args: 'static,
    {
        let make = move |state: S, options: ConsumerOptions| {
            let call = service_fn(move |call: Call| handler.clone().call(call, state.clone()));
            let service = ServiceBuilder::new()
                .layer(Measure)
                .layer(Timeout(options.handler_timeout))
                .layer(CatchPanic)
                .service(call);
            Route {
                target: H::Event::name().into(),
                schema: schema::of::<H::Event>(),
                decode: decode_as::<H::Event>(),
                batch: H::BATCH,
                service: BoxCloneSyncService::new(service),
            }
        };
        self.routes.insert(H::Event::name(), Box::new(make));
        self
    }

    /// Accepts an older version of an event too, made into a newer one before its handler sees it. Upcasters follow one another: with one from 1 to
    /// 2 and one from 2 to 3, a handler of version 3 gets all three.
    ///
    /// Of an event that was published in several versions, the highest that is accepted takes effect; the others are acknowledged.
    #[must_use]
    pub fn upcast<Old: Event, New: Event>(mut self, upcast: fn(Old) -> New) -> Self {
        const { assert!(Old::VERSION < New::VERSION, "an upcaster leads to a newer version") };
        let convert = move |event: AnyEvent| {
            let old = event.downcast_ref::<Old>()?.clone();
            Some(Arc::new(upcast(old)) as AnyEvent)
        };
        self.upcasters.push(Upcaster {
            from: Old::name(),
            to: New::name(),
            schema: schema::of::<Old>(),
            decode: decode_as::<Old>(),
            convert: Arc::new(convert),
        });
        self
    }

    /// Wraps all handlers in a tower layer, outside of the library's own.
    #[must_use]
    pub fn layer<L>(mut self, layer: L) -> Self
    where
        L: Layer<HandlerService> + Send + 'static,
        L::Service: Service<Call, Response = (), Error = Failure> + Clone + Send + Sync + 'static,
        <L::Service as Service<Call>>::Future: Send + 'static,
    {
        self.layers.push(Box::new(move |inner| BoxCloneSyncService::new(layer.layer(inner))));
        self
    }

    /// Pauses while this breaker, around what its handlers call, is open: nothing is fetched, what is held is kept alive, and no failure is
    /// counted. Half-open, batches are as large as the probes are many.
    #[must_use]
    pub fn behind(self, breaker: &Breaker) -> Self {
        Self { breaker: Some(breaker.clone()), ..self }
    }

    /// Ready to run: handlers get `state` through `State`.
    pub fn with_state(self, state: S) -> ReadyConsumer {
        let options = self.options;
        let mut routes: HashMap<String, Route> = self
            .routes
            .into_iter()
            .map(|(name, make)| {
                let mut route = make(state.clone(), options);
                for layer in &self.layers {
                    route.service = layer(route.service);
                }
                (name, route)
            })
            .collect();
        let handled: Vec<(String, Route)> = routes.iter().map(|(n, r)| (n.clone(), r.clone())).collect();
        for (name, route) in handled {
            reach(&mut routes, &self.upcasters, &name, &route, &(Arc::new(Some) as Convert));
        }
        let breaker = self.breaker;
        ReadyConsumer { name: self.name.as_str().into(), stream: self.stream, options, routes, breaker }
    }
}

fn decode_as<E: Event>() -> Decode {
    Arc::new(|value| Ok(Arc::new(serde_json::from_value::<E>(value)?) as AnyEvent))
}

/// Adds routes for all older versions from which upcasters lead to `name`, and from there by `rest` to the handler of `route`. A version that has a
/// handler of its own keeps it.
fn reach(
    routes: &mut HashMap<String, Route>,
    upcasters: &[Upcaster],
    name: &str,
    route: &Route,
    rest: &Convert,
) {
    for upcaster in upcasters.iter().filter(|u| u.to == name) {
        if routes.contains_key(&upcaster.from) {
            continue;
        }
        let (first, rest) = (Arc::clone(&upcaster.convert), Arc::clone(rest));
        let convert: Convert = Arc::new(move |event| rest(first(event)?));
        let (decode, whole) = (Arc::clone(&upcaster.decode), Arc::clone(&convert));
        let decode: Decode = Arc::new(move |value| {
            let old = decode(value)?;
            whole(old).ok_or_else(|| serde::de::Error::custom("an upcaster was given another event"))
        });
        let older = Route { schema: Arc::clone(&upcaster.schema), decode, ..route.clone() };
        routes.insert(upcaster.from.clone(), older);
        reach(routes, upcasters, &upcaster.from, route, &convert);
    }
}

/// A consumer with its state, to be handed to a [`crate::Service`].
pub struct ReadyConsumer {
    name: Arc<str>,
    stream: String,
    options: ConsumerOptions,
    routes: HashMap<String, Route>,
    breaker: Option<Breaker>,
}

impl ReadyConsumer {
    pub(crate) fn wrap(&mut self, layer: &dyn Fn(HandlerService) -> HandlerService) {
        for route in self.routes.values_mut() {
            route.service = layer(route.service.clone());
        }
    }

    pub(crate) fn breaker(&self) -> Option<&Breaker> {
        self.breaker.as_ref()
    }

    /// Its name, by which the inbox knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The stream it reads.
    pub fn stream(&self) -> &str {
        &self.stream
    }

    /// Its options.
    pub fn options(&self) -> &ConsumerOptions {
        &self.options
    }

    /// The durable that brings it the events of a lane.
    pub fn durable(&self, lane: Lane) -> String {
        match lane {
            Lane::Express => format!("{}-express", self.name),
            Lane::Standard => self.name.to_string(),
        }
    }

    /// What it asks of the broker for a lane.
    ///
    /// Failures are counted in the database, and decided on there. The broker's own limit is the backstop for what kills the process or
    /// loses its acknowledgements: what it gives up is taken up from its advisories.
    pub fn broker_config(&self, lane: Lane) -> ConsumerConfig {
        let lane_name = lane.as_str();
        let mut filters: Vec<String> = self
            .routes
            .keys()
            .flat_map(|name| [format!("{name}.{lane_name}"), format!("{name}.{lane_name}.>")])
            .collect();
        filters.sort();
        ConsumerConfig {
            ack_wait: self.options.ack_wait,
            max_deliver: Some(self.options.retry.limit),
            max_ack_pending: self.options.batch * 4,
            ..ConsumerConfig::new(&self.durable(lane), filters)
        }
    }

    /// Runs both lanes until told to stop.
    pub(crate) async fn run(self, db: Db, broker: Arc<dyn Broker>, stop: CancellationToken) {
        let (consumer, turns) = (Arc::new(self), Arc::new(Turns::default()));
        let lane = |lane| {
            let (consumer, turns) = (Arc::clone(&consumer), Arc::clone(&turns));
            Worker { consumer, lane, turns, db: db.clone(), broker: Arc::clone(&broker), stop: stop.clone() }
                .run()
        };
        tokio::join!(lane(Lane::Express), lane(Lane::Standard));
    }
}

/// Who goes first: express events, but the others get their turn.
#[derive(Debug, Default)]
struct Turns {
    express_at_work: AtomicBool,
    express_seen: Mutex<Option<Instant>>,
    express_done: Notify,
}

impl Turns {
    fn express_begins(&self) {
        *self.express_seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.express_at_work.store(true, Ordering::Relaxed);
    }

    fn express_ends(&self) {
        self.express_at_work.store(false, Ordering::Relaxed);
        self.express_done.notify_waiters();
    }

    fn express_recently(&self) -> bool {
        let seen = *self.express_seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.is_some_and(|at| at.elapsed() < EXPRESS_RECENTLY)
    }

    async fn give_way(&self) {
        let done = self.express_done.notified();
        if self.express_at_work.load(Ordering::Relaxed) {
            let _ = tokio::time::timeout(GIVE_WAY, done).await;
        }
    }
}

/// An event ready to be handled.
struct Entry<'a> {
    delivery: &'a Delivery,
    incoming: Incoming,
    route: &'a Route,
}

/// An event that no handler will see.
struct Reject {
    reason: Reason,
    error: String,
    envelope: Option<Box<Envelope>>,
}

struct Worker {
    consumer: Arc<ReadyConsumer>,
    lane: Lane,
    turns: Arc<Turns>,
    db: Db,
    broker: Arc<dyn Broker>,
    stop: CancellationToken,
}

impl Worker {
    async fn run(self) {
        let config = self.consumer.broker_config(self.lane);
        let (name, stream) = (config.durable.as_str(), self.consumer.stream.as_str());
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let mut bound = false;
        let mut redrive = self.db.redrive_wake().subscribe();
        redrive.mark_changed();
        while !self.stop.is_cancelled() {
            if !bound {
                if let Err(error) = self.broker.ensure_consumer(stream, &config).await {
                    let delay = backoff.next();
                    tracing::warn!(consumer = name, stream, %error, retry_in = ?delay, "the consumer cannot be made yet");
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = self.stop.cancelled() => {}
                    }
                    continue;
                }
                bound = true;
                backoff.reset();
            }
            let batch = self.batch();
            let fetch = async {
                match &self.consumer.breaker {
                    Some(breaker) if breaker.permits() == 0 => {
                        breaker.ready().await;
                        Ok(Vec::new())
                    }
                    _ => self.broker.fetch(stream, name, batch, FETCH_WAIT).await,
                }
            };
            let fetched = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                _ = redrive.changed(), if self.lane == Lane::Standard => {
                    self.redrive_queued().await;
                    continue;
                }
                fetched = fetch => fetched,
            };
            match fetched {
                Ok(deliveries) => {
                    backoff.reset();
                    if !deliveries.is_empty() {
                        self.keep_alive_while(&deliveries, self.in_turn(&deliveries)).await;
                    }
                }
                Err(error) => {
                    // It was there, so somebody has deleted it, or the broker has lost it.
                    bound = !matches!(error, BrokerError::NoConsumer { .. } | BrokerError::NoStream(_));
                    let delay = backoff.next();
                    tracing::warn!(consumer = name, stream, %error, retry_in = ?delay, "nothing can be fetched");
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = self.stop.cancelled() => {}
                    }
                }
            }
        }
    }

    /// How many events the next batch may have.
    fn batch(&self) -> usize {
        let batch = self.consumer.options.batch;
        let small = self.lane == Lane::Standard && self.turns.express_recently();
        let batch = if small { (batch / SMALLER).max(1) } else { batch };
        self.consumer.breaker.as_ref().map_or(batch, |b| batch.min(b.permits().max(1)))
    }

    async fn in_turn(&self, deliveries: &[Delivery]) {
        match self.lane {
            Lane::Express => {
                self.turns.express_begins();
                self.process(deliveries).await;
                self.turns.express_ends();
            }
            Lane::Standard => {
                self.turns.give_way().await;
                self.process(deliveries).await;
            }
        }
    }

    /// Extends the deliveries' AckWait while `work` goes on.
    async fn keep_alive_while(&self, deliveries: &[Delivery], work: impl Future<Output = ()>) {
        let period = self.consumer.options.ack_wait / 3;
        let alive = async {
            loop {
                tokio::time::sleep(period).await;
                self.settle(deliveries.iter().map(|d| (d.reply.clone(), Settlement::Progress)).collect())
                    .await;
            }
        };
        tokio::select! {
            () = work => {}
            () = alive => {}
        }
    }

    async fn settle(&self, settlements: Vec<(String, Settlement)>) {
        if settlements.is_empty() {
            return;
        }
        let (name, stream) = (self.consumer.durable(self.lane), self.consumer.stream.as_str());
        if let Err(error) = self.broker.settle(stream, &name, settlements).await {
            // Redelivered then, and acknowledged by the inbox.
            tracing::warn!(consumer = name, stream, %error, "deliveries could not be settled");
        }
    }

    async fn process(&self, deliveries: &[Delivery]) {
        let mut entries = Vec::with_capacity(deliveries.len());
        let mut superseded = Vec::new();
        for d in deliveries {
            match self.decode(&d.message) {
                Ok((incoming, _)) if self.is_superseded(&incoming.envelope) => {
                    superseded.push((d.reply.clone(), Settlement::Ack));
                }
                Ok((incoming, route)) => entries.push(Entry { delivery: d, incoming, route }),
                Err(reject) => self.reject(d, reject).await,
            }
        }
        self.count("superseded", superseded.len());
        self.settle(superseded).await;
        // Depth first: what a failure splits off is tried before what follows it.
        let mut stack = vec![entries];
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        while let Some(mut group) = stack.pop() {
            if group.is_empty() {
                continue;
            }
            match self.transact(&group).await {
                Ok(()) => {
                    backoff.reset();
                    self.settle(group.iter().map(|e| (e.delivery.reply.clone(), Settlement::Ack)).collect())
                        .await;
                }
                Err(failure) if matches!(failure.fate, Fate::Pause | Fate::Rejected) => {
                    let delay = backoff.next();
                    tracing::warn!(
                        consumer = &*self.consumer.name, error = telemetry::chain(&failure), retry_in = ?delay,
                        events = group.len(), "the consumer pauses; no failure is counted"
                    );
                    tokio::select! {
                        () = self.pause(delay) => {}
                        // What is held goes back to the broker when AckWait runs out.
                        () = self.stop.cancelled() => return,
                    }
                    stack.push(group);
                }
                Err(failure) if group.len() == 1 => {
                    let fate = self.failed(&group[0], failure).await;
                    self.settle(fate.into_iter().collect()).await;
                }
                Err(failure) => {
                    let at = failure
                        .culprit
                        .and_then(|id| group.iter().position(|e| e.incoming.envelope.id == id));
                    if let Some(at) = at {
                        let culprit = group.remove(at);
                        stack.push(vec![culprit]);
                        stack.push(group);
                    } else {
                        // Nobody says which one it was: halve until it is found.
                        let second = group.split_off(group.len() / 2);
                        stack.push(second);
                        stack.push(group);
                    }
                }
            }
        }
    }

    /// Whether the same event comes, or came, in a higher version that is accepted here. It is not claimed then: it takes effect as that one.
    fn is_superseded(&self, envelope: &Envelope) -> bool {
        let accepted =
            |version: u32| self.consumer.routes.contains_key(&format!("{}.v{version}", envelope.event_type));
        envelope.siblings.iter().any(|v| *v > envelope.version && accepted(*v))
    }

    async fn pause(&self, delay: Duration) {
        tokio::time::sleep(delay).await;
        if let Some(breaker) = &self.consumer.breaker {
            breaker.ready().await;
        }
    }

    fn decode(&self, stored: &StoredMessage) -> Result<(Incoming, &Route), Reject> {
        let undecodable = |error: String| Reject { reason: Reason::Undecodable, error, envelope: None };
        let envelope = Envelope::from_message(&stored.message).map_err(|e| undecodable(e.to_string()))?;
        let reject = |reason, error| Reject { reason, error, envelope: Some(Box::new(envelope.clone())) };
        let Some(route) = self.consumer.routes.get(&envelope.name()) else {
            return Err(reject(Reason::Unaccepted, format!("{} is not accepted here", envelope.name())));
        };
        let horizon = self.consumer.options.inbox_retention;
        if self.db.clock().now().since(envelope.time) > horizon {
            let error = format!("older than the inbox remembers ({horizon:?}): it may have been handled");
            return Err(reject(Reason::BeyondHorizon, error));
        }
        let value: Value = serde_json::from_slice(&stored.message.payload)
            .map_err(|e| reject(Reason::Undecodable, format!("the payload is not JSON: {e}")))?;
        route.schema.validate(&value).map_err(|e| reject(Reason::BreaksSchema, e.to_string()))?;
        let event = (route.decode)(value).map_err(|e| reject(Reason::BreaksSchema, e.to_string()))?;
        Ok((Incoming { envelope: Arc::new(envelope), event }, route))
    }

    /// One transaction: claim, handle, commit. Events claimed before are passed over.
    async fn transact(&self, group: &[Entry<'_>]) -> Result<(), Failure> {
        let mut tx = self.db.begin().await?;
        let ids = group.iter().map(|e| e.incoming.envelope.id).collect();
        let fresh: HashSet<EventId> =
            inbox::claim(&mut tx, &self.consumer.name, ids).await?.into_iter().collect();
        let fresh: Vec<&Entry<'_>> = {
            // The same event may stand in a batch twice.
            let mut once = fresh.clone();
            group.iter().filter(|e| once.remove(&e.incoming.envelope.id)).collect()
        };
        self.count("duplicate", group.len() - fresh.len());
        if fresh.is_empty() {
            tx.rollback().await;
            return Ok(());
        }
        if fresh.iter().any(|e| e.delivery.delivered > 1) {
            let ids: Vec<EventId> = fresh.iter().map(|e| e.incoming.envelope.id).collect();
            tx.query("DELETE FROM failures WHERE consumer = $1 AND event_id IN (SELECT id FROM {$2: id})")
                .bind(&*self.consumer.name)
                .rows(ids.into_iter().map(|id| (id,)))
                .execute()
                .await?;
        }
        let slot = Slot::new(tx);
        let mut by_route: BTreeMap<&str, Vec<&Entry<'_>>> = BTreeMap::new();
        for e in &fresh {
            by_route.entry(&e.route.target).or_default().push(e);
        }
        for entries in by_route.into_values() {
            let route = entries[0].route;
            if route.batch {
                let events = entries.iter().map(|e| e.incoming.clone()).collect();
                self.call(route, events, &slot).await?;
            } else {
                for e in entries {
                    self.call(route, Arc::new([e.incoming.clone()]), &slot).await?;
                }
            }
        }
        slot.take()?.commit().await?;
        self.count("handled", fresh.len());
        if tracing::enabled!(tracing::Level::DEBUG) {
            for Entry { incoming: Incoming { envelope, .. }, .. } in &fresh {
                tracing::debug!(
                    consumer = &*self.consumer.name, event = envelope.name(), event_id = %envelope.id,
                    correlation_id = %envelope.cause.correlation_id, "handled"
                );
            }
        }
        Ok(())
    }

    async fn call(&self, route: &Route, events: Arc<[Incoming]>, slot: &Slot) -> Result<(), Failure> {
        let alone = (events.len() == 1).then(|| events[0].envelope.id);
        if let Some(mut tx) = slot.lend() {
            tx.set_cause(events.first().map_or_else(Cause::new, |e| e.envelope.as_cause()));
        }
        let call = Call { events, slot: slot.clone(), consumer: Arc::clone(&self.consumer.name) };
        let result = route.service.clone().oneshot(call).await;
        result.map_err(|failure| Failure { culprit: failure.culprit.or(alone), ..failure })
    }

    /// The fate of an event that failed alone: counted, and then retried or buried. Nothing is settled before that is committed.
    async fn failed(&self, entry: &Entry<'_>, failure: Failure) -> Option<(String, Settlement)> {
        let (envelope, reply) = (&entry.incoming.envelope, entry.delivery.reply.clone());
        let name = &*self.consumer.name;
        let retry = &self.consumer.options.retry;
        let error = telemetry::chain(failure.error.as_ref());
        let recorded = async {
            let mut tx = self.db.begin_for(envelope.as_cause()).await?;
            let now = tx.now();
            let failures: u32 = tx
                .query(
                    "INSERT INTO failures (consumer, event_id, attempts, last_error, updated_at) VALUES ($1, $2, 1, $3, $4)
                     ON CONFLICT (consumer, event_id) DO UPDATE
                     SET attempts = failures.attempts + 1, last_error = excluded.last_error, updated_at = excluded.updated_at
                     RETURNING attempts",
                )
                .bind(name)
                .bind(envelope.id)
                .bind(error.as_str())
                .bind(now)
                .fetch_scalar()
                .await?;
            let reason = match failure.fate {
                Fate::DeadLetter => Some(Reason::Permanent),
                _ if failures >= retry.limit => Some(Reason::RetriesExhausted),
                _ => None,
            };
            if let Some(reason) = reason {
                self.bury(&mut tx, entry.delivery, Some(envelope), reason, &error, failures).await?;
            }
            tx.commit().await?;
            Ok::<_, DbError>((failures, reason))
        };
        match recorded.await {
            Ok((failures, None)) => {
                let delay = retry.delay(failures);
                self.count("retried", 1);
                tracing::warn!(
                    consumer = name, event = envelope.name(), event_id = %envelope.id, error, failures,
                    correlation_id = %envelope.cause.correlation_id, retry_in = ?delay, "an event failed"
                );
                Some((reply, Settlement::Nak(delay)))
            }
            Ok((_, Some(reason))) => Some((reply, Settlement::Term(reason.as_str().to_owned()))),
            Err(db) => {
                // Not recorded, so not counted: the delivery comes again when AckWait runs out.
                tracing::error!(consumer = name, event_id = %envelope.id, error, database = telemetry::chain(&db), "a failure could not be recorded");
                None
            }
        }
    }

    /// Buries what no handler may see, with its own transaction.
    async fn reject(&self, delivery: &Delivery, reject: Reject) {
        let Reject { reason, error, envelope } = reject;
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        loop {
            let buried = async {
                let cause = envelope.as_deref().map_or_else(Cause::new, Envelope::as_cause);
                let mut tx = self.db.begin_for(cause).await?;
                self.bury(&mut tx, delivery, envelope.as_deref(), reason, &error, 0).await?;
                tx.commit().await
            };
            match buried.await {
                Ok(()) => break,
                Err(db) => {
                    let delay = backoff.next();
                    tracing::warn!(consumer = &*self.consumer.name, error = telemetry::chain(&db), retry_in = ?delay, "a dead letter cannot be recorded");
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = self.stop.cancelled() => return,
                    }
                }
            }
        }
        self.settle(vec![(delivery.reply.clone(), Settlement::Term(reason.as_str().to_owned()))]).await;
    }

    async fn bury(
        &self,
        tx: &mut crate::Tx,
        delivery: &Delivery,
        envelope: Option<&Envelope>,
        reason: Reason,
        error: &str,
        attempts: u32,
    ) -> Result<(), DbError> {
        let burial = Burial {
            consumer: &self.consumer.name,
            envelope,
            stream: &delivery.stream,
            stored: &delivery.message,
            reason,
            error,
            attempts,
        };
        // Dealt with before, so this is a late copy: the inbox says so, and there is nothing to bury.
        if dead_letter::bury(tx, &burial).await? {
            self.count("dead_lettered", 1);
            tracing::error!(
                consumer = &*self.consumer.name,
                stream = &*delivery.stream,
                sequence = delivery.message.sequence,
                event = envelope.map(Envelope::name),
                event_id = envelope.map(|e| e.id.to_string()),
                correlation_id = envelope.map(|e| e.cause.correlation_id.to_string()),
                reason = reason.as_str(),
                error,
                "an event became a dead letter"
            );
        }
        Ok(())
    }

    /// Runs the dead letters that an operator queued, each in its own transaction, past the inbox: only this consumer sees them.
    async fn redrive_queued(&self) {
        let name = &*self.consumer.name;
        loop {
            let queued = match dead_letter::queued(&self.db, name).await {
                Ok(queued) if queued.is_empty() => return,
                Ok(queued) => queued,
                Err(error) => {
                    tracing::warn!(
                        consumer = name,
                        error = telemetry::chain(&error),
                        "dead letters cannot be read"
                    );
                    return;
                }
            };
            for (id, stored) in queued {
                if self.stop.is_cancelled() {
                    return;
                }
                let result = self.redrive(id, &stored).await;
                let recorded = match &result {
                    Ok(()) => Ok(()),
                    Err(e) => dead_letter::redrive_failed(&self.db, id, &telemetry::chain(e.as_ref())).await,
                };
                match (&result, recorded) {
                    (Ok(()), _) => {
                        self.count("redriven", 1);
                        tracing::info!(consumer = name, dead_letter = %id, "a dead letter was redriven");
                    }
                    (Err(e), Ok(())) => {
                        tracing::warn!(
                            consumer = name,
                            dead_letter = %id,
                            error = telemetry::chain(e.as_ref()),
                            "a redriven dead letter failed again"
                        );
                    }
                    (_, Err(db)) => {
                        tracing::warn!(
                            consumer = name,
                            dead_letter = %id,
                            error = telemetry::chain(&db),
                            "a redrive could not be recorded"
                        );
                        return;
                    }
                }
            }
        }
    }

    async fn redrive(&self, id: Uuid, stored: &StoredMessage) -> Result<(), BoxError> {
        // Counted before it runs: an event that kills the process must not do so for ever.
        if !dead_letter::begin_redrive(&self.db, id).await? {
            return Ok(());
        }
        let (incoming, route) = match self.decode(stored) {
            Ok(decoded) => decoded,
            Err(reject) => return Err(reject.error.into()),
        };
        let mut tx = self.db.begin_for(incoming.envelope.as_cause()).await?;
        if !dead_letter::take(&mut tx, id).await? {
            tx.rollback().await;
            return Ok(());
        }
        let slot = Slot::new(tx);
        self.call(route, Arc::new([incoming]), &slot).await?;
        slot.take()?.commit().await?;
        Ok(())
    }

    fn count(&self, outcome: &'static str, n: usize) {
        if n > 0 {
            metrics::counter!("consign_events_handled_total", "consumer" => self.consumer.name.to_string(), "outcome" => outcome)
                .increment(n as u64);
        }
    }
}
