//! Consumers: which events of a stream a service reacts to, in which versions, and with what.

mod binding;
mod decode;
pub(crate) mod readers;
mod worker;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tower::util::BoxCloneSyncService;
use tower::{Layer, Service, ServiceBuilder, service_fn};

use crate::breaker::Breaker;
use crate::broker::{Broker, ConsumerConfig};
use crate::db::Db;
use crate::event::{Event, Lane};
use crate::handler::{AnyEvent, Call, Convert, Decode, EventSet, Failure, Handler};
use crate::layer::{CatchPanic, Measure, Timeout};
use crate::retry::RetryPolicy;
use crate::schema::{self, CompiledSchema};
pub use decode::Reject;
use readers::Readers;
use worker::{Turns, Worker};

/// A handler with the layers around it.
pub(crate) type HandlerService = BoxCloneSyncService<Call, (), Failure>;

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
    /// From the target to what the handler takes.
    wrap: Convert,
    /// Counts the consumer's handlers.
    handler: usize,
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
    handlers: usize,
    layers: Vec<Box<dyn Fn(HandlerService) -> HandlerService + Send>>,
    upcasters: Vec<Upcaster>,
    accepts: BTreeMap<&'static str, Vec<u32>>,
    from_outside: bool,
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
            handlers: 0,
            layers: Vec::new(),
            upcasters: Vec::new(),
            accepts: BTreeMap::new(),
            from_outside: false,
            breaker: None,
        }
    }

    /// Replaces the defaults.
    #[must_use]
    pub fn options(self, options: ConsumerOptions) -> Self {
        Self { options, ..self }
    }

    /// Mounts a handler for the event that its first argument names, or for all of an [`EventSet`].
    ///
    /// What a batch has for one handler takes effect in one transaction. Where replicas share a database, each handler has one of its own: in a
    /// common one, rows that the first has locked would stay locked while the next locks others, and replicas would wait for each other in a circle.
    #[must_use]
    pub fn on<H, Args>(mut self, handler: H) -> Self
    where
        H: Handler<Args, S>,
        Args: 'static,
    {
        let number = self.handlers;
        self.handlers += 1;
        for kind in H::Takes::kinds() {
            let (name, handler) = (kind.name.clone(), handler.clone());
            let make = move |state: S, options: ConsumerOptions| {
                let call = service_fn(move |call: Call| handler.clone().call(call, state.clone()));
                let service = ServiceBuilder::new()
                    .layer(Measure)
                    .layer(Timeout(options.handler_timeout))
                    .layer(CatchPanic)
                    .service(call);
                Route {
                    target: kind.name.into(),
                    schema: kind.schema,
                    decode: kind.decode,
                    wrap: kind.wrap,
                    handler: number,
                    batch: H::BATCH,
                    service: BoxCloneSyncService::new(service),
                }
            };
            self.routes.insert(name, Box::new(make));
        }
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

    /// Asks the broker only for these versions of an event, as configuration says. Without this, for all that can be read.
    ///
    /// The broker's filter follows: it becomes wider when all replicas of this consumer that are running can read what is new, and
    /// narrower when nothing would be passed over. What comes although it is not asked for any more, is handled as long as it can be read.
    #[must_use]
    pub fn accept<E: Event>(mut self, versions: &[u32]) -> Self {
        self.accepts.insert(E::TYPE, versions.to_vec());
        self
    }

    /// Is given all versions of its events: those that it cannot read become dead letters, instead of lying in the stream unseen. For events of
    /// others, who do not look at what is asked for.
    #[must_use]
    pub fn from_outside(self) -> Self {
        Self { from_outside: true, ..self }
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
            reach(&mut routes, &self.upcasters, &name, &route, &route.wrap);
        }
        let asked = |name: &&String| match name.rsplit_once(".v") {
            Some((event_type, version)) => self
                .accepts
                .get(event_type)
                .is_none_or(|versions| version.parse().is_ok_and(|version| versions.contains(&version))),
            None => true,
        };
        ReadyConsumer {
            name: self.name.as_str().into(),
            asked: routes.keys().filter(asked).cloned().collect(),
            from_outside: self.from_outside,
            stream: self.stream,
            options,
            routes,
            breaker: self.breaker,
        }
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
    /// What it can read.
    routes: HashMap<String, Route>,
    /// What it asks the broker for.
    asked: BTreeSet<String>,
    from_outside: bool,
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
        let filters: BTreeSet<String> = self.filters_of(self.asked.iter(), lane);
        let filters = filters.into_iter().collect();
        ConsumerConfig {
            ack_wait: self.options.ack_wait,
            max_deliver: Some(self.options.retry.limit),
            max_ack_pending: self.options.batch * 4,
            ..ConsumerConfig::new(&self.durable(lane), filters)
        }
    }

    /// What brings these versions.
    fn filters_of<'a>(&self, names: impl Iterator<Item = &'a String>, lane: Lane) -> BTreeSet<String> {
        let any = |name: &String| match name.rsplit_once(".v") {
            Some((event_type, _)) if self.from_outside => format!("{event_type}.*"),
            _ => name.clone(),
        };
        names.flat_map(|name| subjects(&any(name), lane)).collect()
    }

    /// The versions it can read, each with the one that its handler takes.
    pub fn reads(&self) -> BTreeMap<String, String> {
        self.routes.iter().map(|(name, route)| (name.clone(), route.target.to_string())).collect()
    }

    /// Whether it asks for a version, such as `orders.created.v1`.
    pub(crate) fn asks_for(&self, name: &str) -> bool {
        self.asked.contains(name)
    }

    /// Runs both lanes until told to stop.
    pub(crate) async fn run(self, db: Db, broker: Arc<dyn Broker>, stop: CancellationToken) {
        let readers = Arc::new(Readers::new(db.clone(), &self.name, self.reads().into_keys().collect()));
        // First of all: the other replicas have to know what this one can read.
        if !readers.register_until(&stop).await {
            return;
        }
        let (consumer, turns) = (Arc::new(self), Arc::new(Turns::default()));
        let lane = |lane| {
            let (db, broker, stop) = (db.clone(), Arc::clone(&broker), stop.clone());
            let (consumer, turns, readers) =
                (Arc::clone(&consumer), Arc::clone(&turns), Arc::clone(&readers));
            Worker::new(consumer, lane, turns, readers, db, broker, stop).run()
        };
        tokio::join!(lane(Lane::Express), lane(Lane::Standard), readers.keep(&stop));
        readers.leave().await;
    }
}

/// The subjects of an event's version on a lane.
fn subjects(name: &str, lane: Lane) -> [String; 2] {
    let lane = lane.as_str();
    [format!("{name}.{lane}"), format!("{name}.{lane}.>")]
}
