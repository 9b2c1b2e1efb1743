//! A service: its database, streams, consumers, tasks and HTTP, started in order and stopped in order.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aide::axum::ApiRouter;
use aide::openapi::{Components, Info, OpenApi, ReferenceOr, SecurityScheme};
use aide::scalar::Scalar;
use axum::extract::DefaultBodyLimit;
use axum::routing::get;
use axum::serve::ListenerExt;
use axum::{Json, Router};
use serde_json::{Value, json};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::util::BoxCloneSyncService;

use crate::breaker::{Breaker, State};
use crate::broker::{Broker, BrokerError, ConsumerConfig, StreamConfig};
use crate::config::ServiceConfig;
use crate::consumer::{HandlerService, ReadyConsumer};
use crate::db::{Db, DbError};
use crate::handler::{Call, Failure};
use crate::http::{Edge, guard, method_not_allowed, not_found, ops_router};
use crate::reconcile::{self, Scope};
use crate::retry::Backoff;
use crate::tasks::{TaskHandler, TaskOptions};
use crate::versions::{self, Published};
use crate::{Lane, advisories, dead_letter, outbox, tasks, telemetry};

/// How often gauges are measured and old rows looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(30);
/// Replicas that ended without a word are forgotten after this.
const READERS_KEPT: Duration = Duration::from_secs(24 * 3600);
/// Rows pruned per transaction.
const PRUNE_STEP: u64 = 1000;

type MakeRouter = Box<dyn FnOnce() -> ApiRouter + Send>;
type Worker = Box<dyn FnOnce(CancellationToken) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// A service could not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// A stream cannot be had.
    #[error("stream `{stream}`")]
    Stream {
        /// Which.
        stream: String,
        #[source]
        /// Why.
        source: BrokerError,
    },
    /// The database cannot be read.
    #[error("database")]
    Db(#[from] DbError),
    /// The address cannot be listened on.
    #[error(
        "{service} cannot listen on {address}; is something else running there? Set {service}.http.listen"
    )]
    Listen {
        /// The service.
        service: String,
        /// Where.
        address: SocketAddr,
        #[source]
        /// Why.
        source: std::io::Error,
    },
}

/// Old rows of a table, to be removed in small steps.
#[derive(Clone, Copy, Debug)]
pub struct Prune {
    /// Deletes up to 1000 rows older than `$1`, on SQLite.
    pub sqlite: &'static str,
    /// The same on PostgreSQL.
    pub postgres: &'static str,
    /// How long rows are kept.
    pub keep: Duration,
}

impl Prune {
    /// With a text for both databases.
    pub const fn new(sql: &'static str, keep: Duration) -> Self {
        Self { sqlite: sql, postgres: sql, keep }
    }
}

/// What a service asks of its broker: the streams it owns, and the consumers it runs.
pub struct Topology {
    service: String,
    streams: Vec<StreamConfig>,
    consumers: Vec<ReadyConsumer>,
}

impl Topology {
    /// Of a service of this name: its dead letters, and the advisories of all services.
    pub fn new(service: &str) -> Self {
        let dead_letters = StreamConfig {
            max_age: None,
            ..StreamConfig::new(
                &format!("DEAD_LETTERS_{}", service.to_uppercase()),
                &[&format!("dead_letters.{service}.>")],
            )
        };
        let streams = vec![dead_letters, advisories::stream()];
        Self { service: service.to_owned(), streams, consumers: Vec::new() }
    }

    /// Owns a stream.
    #[must_use]
    pub fn stream(mut self, config: StreamConfig) -> Self {
        self.streams.push(config);
        self
    }

    /// Runs a consumer.
    #[must_use]
    pub fn consumer(mut self, consumer: ReadyConsumer) -> Self {
        self.consumers.push(consumer);
        self
    }

    /// All of it as the broker is to be told.
    pub fn scope(&self) -> Scope {
        let lanes = |c: &ReadyConsumer| {
            [Lane::Express, Lane::Standard].map(|lane| (c.stream().to_owned(), c.broker_config(lane)))
        };
        let mut consumers: Vec<(String, ConsumerConfig)> = self.consumers.iter().flat_map(lanes).collect();
        if !consumers.is_empty() {
            let given_up = advisories::consumer(&self.service, &self.durables());
            consumers.push((advisories::STREAM.to_owned(), given_up));
        }
        Scope { streams: self.streams.clone(), consumers }
    }

    /// The consumers that it runs.
    pub fn consumers(&self) -> &[ReadyConsumer] {
        &self.consumers
    }

    /// Stream and durable of both lanes of each consumer.
    fn durables(&self) -> Vec<(String, String)> {
        let lanes = |c: &ReadyConsumer| {
            [Lane::Express, Lane::Standard].map(|l| (c.stream().to_owned(), c.durable(l)))
        };
        self.consumers.iter().flat_map(lanes).collect()
    }
}

/// Everything a service is, before it runs.
pub struct Service {
    config: ServiceConfig,
    db: Db,
    broker: Arc<dyn Broker>,
    topology: Topology,
    workers: Vec<Worker>,
    prunes: Vec<Prune>,
    routers: Vec<MakeRouter>,
    breakers: Vec<Breaker>,
    published: Vec<Published>,
    description: &'static str,
}

impl Service {
    /// A service on its database and a broker; its name is the database's.
    pub fn new(config: ServiceConfig, db: Db, broker: Arc<dyn Broker>, description: &'static str) -> Self {
        let topology = Topology::new(db.service());
        let prunes = vec![
            Prune {
                // Each step must find the next rows, not those the step before has dealt with: hence the join, and what has no event any more.
                sqlite: "DELETE FROM outbox WHERE seq IN (SELECT seq FROM
                        (SELECT o.seq, p.published_at FROM outbox o CROSS JOIN outbox_published p ON p.seq = o.seq ORDER BY o.seq LIMIT 1000)
                        WHERE published_at < $1)",
                postgres: "DELETE FROM outbox WHERE seq IN (SELECT seq FROM
                        (SELECT o.seq, p.published_at FROM outbox o JOIN outbox_published p ON p.seq = o.seq
                         ORDER BY o.seq LIMIT 1000 FOR UPDATE OF o SKIP LOCKED) AS oldest
                        WHERE published_at < $1)",
                keep: config.outbox.history,
            },
            Prune::new(
                "DELETE FROM outbox_published WHERE seq IN (SELECT seq FROM outbox_published
                        WHERE seq < COALESCE((SELECT MIN(seq) FROM outbox), 9223372036854775807) AND published_at < $1
                        ORDER BY seq LIMIT 1000 {skip})",
                config.outbox.history,
            ),
            Prune::new(
                "DELETE FROM inbox WHERE (consumer, event_id) IN
                        (SELECT consumer, event_id FROM inbox WHERE handled_at < $1 ORDER BY handled_at LIMIT 1000 {skip})",
                config.consumer.inbox_retention,
            ),
            Prune::new(
                "DELETE FROM idempotency WHERE (operation, key) IN
                        (SELECT operation, key FROM idempotency WHERE created_at < $1 ORDER BY created_at LIMIT 1000 {skip})",
                config.http.idempotency_retention,
            ),
            Prune::new("DELETE FROM readers WHERE seen_at < $1", READERS_KEPT),
        ];
        Self {
            config,
            db,
            broker,
            topology,
            workers: Vec::new(),
            prunes,
            routers: Vec::new(),
            breakers: Vec::new(),
            published: Vec::new(),
            description,
        }
    }

    /// Owns a stream: made at start if it is not there.
    #[must_use]
    pub fn stream(self, config: StreamConfig) -> Self {
        Self { topology: self.topology.stream(config), ..self }
    }

    /// Runs a consumer.
    #[must_use]
    pub fn consumer(self, consumer: ReadyConsumer) -> Self {
        Self { topology: self.topology.consumer(consumer), ..self }
    }

    /// Wraps the handlers of all consumers so far in a tower layer, outside of their own.
    #[must_use]
    pub fn layer<L>(mut self, layer: L) -> Self
    where
        L: tower::Layer<HandlerService>,
        L::Service: tower::Service<Call, Response = (), Error = Failure> + Clone + Send + Sync + 'static,
        <L::Service as tower::Service<Call>>::Future: Send + 'static,
    {
        for consumer in &mut self.topology.consumers {
            consumer.wrap(&|inner| BoxCloneSyncService::new(layer.layer(inner)));
        }
        self
    }

    /// Owns streams and runs consumers that were put together elsewhere.
    #[must_use]
    pub fn topology(self, topology: Topology) -> Self {
        Self { topology, ..self }
    }

    /// Works off tasks of one kind.
    #[must_use]
    pub fn tasks<H: TaskHandler>(mut self, handler: H, options: TaskOptions) -> Self {
        let db = self.db.clone();
        let handler = Arc::new(handler);
        self.breakers.extend(handler.breaker().cloned());
        self.workers.push(Box::new(move |stop| Box::pin(tasks::work(db, handler, options, stop))));
        self
    }

    /// Runs `job` now and then every `period`, until the service stops. Each replica does: what must happen once is a task, or a guarded
    /// update.
    #[must_use]
    pub fn every<F>(mut self, period: Duration, job: impl Fn(Db) -> F + Send + 'static) -> Self
    where
        F: Future<Output = Result<(), DbError>> + Send + 'static,
    {
        let db = self.db.clone();
        self.workers.push(Box::new(move |stop| {
            Box::pin(repeat(db, period, Box::new(move |db| Box::pin(job(db))), stop))
        }));
        self
    }

    /// Runs `work` from the start until it ends or the service stops, when it is dropped.
    #[must_use]
    pub fn worker<F>(mut self, work: impl FnOnce(Db) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let db = self.db.clone();
        self.workers.push(Box::new(move |stop| {
            Box::pin(async move { stop.run_until_cancelled_owned(work(db)).await.unwrap_or_default() })
        }));
        self
    }

    /// Shows a circuit breaker in `/health`, metrics and `consign breaker`. Those of tasks and consumers are shown by themselves.
    #[must_use]
    pub fn breaker(mut self, breaker: &Breaker) -> Self {
        self.breakers.push(breaker.clone());
        self
    }

    /// Publishes an event in several versions: looks every few seconds which of them are needed.
    #[must_use]
    pub fn publishes(mut self, event: &Published) -> Self {
        self.published.push(event.clone());
        self
    }

    /// Answers HTTP. The router is made at start, in one go with its description: aide gathers schemas per thread.
    #[must_use]
    pub fn http(mut self, router: impl FnOnce() -> ApiRouter + Send + 'static) -> Self {
        self.routers.push(Box::new(router));
        self
    }

    /// Prunes a table of the service's own.
    #[must_use]
    pub fn prune(mut self, prune: Prune) -> Self {
        self.prunes.push(prune);
        self
    }

    /// Makes the streams it owns; done by [`Service::start`] too. Where several services start together, all streams first saves their
    /// consumers from waiting for one another.
    pub async fn provision(&self) -> Result<(), StartError> {
        for config in &self.topology.streams {
            ensure_stream(self.broker.as_ref(), config).await?;
        }
        Ok(())
    }

    /// Starts it: streams, then the relay, tasks and consumers, then HTTP. When this returns, requests are answered.
    pub async fn start(self) -> Result<Running, StartError> {
        let name = self.db.service().to_owned();
        self.provision().await?;
        let address = self.config.http.listen;
        let listener = TcpListener::bind(address).await.map_err(|source| StartError::Listen {
            service: name.clone(),
            address,
            source,
        })?;
        let address = listener.local_addr().unwrap_or(address);
        let stops = Stops::default();
        let scope = self.topology.scope();
        let known = reconcile::known(&self.db, &scope).await?;
        for stream in &scope.streams {
            if let Ok(info) = self.broker.stream_info(&stream.name).await {
                self.db.set_incarnation(&stream.name, &info.incarnation);
            }
        }
        // Before the first event is emitted: until then, all versions are published.
        versions::look(&self.db, self.broker.as_ref(), &self.published).await;
        let consumed = self.topology.consumers.iter().flat_map(versions::Consumed::of).collect();
        let mut breakers: Vec<Breaker> = self
            .topology
            .consumers
            .iter()
            .filter_map(|c| c.breaker().cloned())
            .chain(self.breakers)
            .collect();
        breakers.sort_by(|a, b| a.name().cmp(b.name()));
        breakers.dedup_by(|a, b| a.name() == b.name());
        let vitals = Arc::new(Vitals {
            scope: scope.clone(),
            breakers,
            published: self.published.clone(),
            consumed,
            db: self.db.clone(),
            broker: Arc::clone(&self.broker),
            consumers: self.topology.durables(),
            outbox_cap: self.config.outbox.max_pending,
            stopping: AtomicBool::new(false),
        });
        let (work, relay, http) = (TaskTracker::new(), TaskTracker::new(), TaskTracker::new());
        relay.spawn(outbox::relay(self.db.clone(), Arc::clone(&self.broker), stops.relay.clone()));
        for worker in self.workers {
            work.spawn(worker(stops.work.clone()));
        }
        work.spawn(reconcile::keep(
            self.db.clone(),
            Arc::clone(&self.broker),
            scope,
            known,
            stops.work.clone(),
        ));
        work.spawn(versions::keep(
            self.db.clone(),
            Arc::clone(&self.broker),
            self.published,
            stops.work.clone(),
        ));
        let given_up = self.topology.durables();
        work.spawn(advisories::listen(
            self.db.clone(),
            Arc::clone(&self.broker),
            given_up,
            stops.work.clone(),
        ));
        for consumer in self.topology.consumers {
            work.spawn(consumer.run(self.db.clone(), Arc::clone(&self.broker), stops.work.clone()));
        }
        work.spawn(housekeeping(Arc::clone(&vitals), self.prunes, stops.work.clone()));
        let router = finish(self.routers, Arc::clone(&vitals), &self.config, &name, self.description);
        let stop = stops.http.clone();
        http.spawn(async move {
            // Without this, small answers wait 40 ms for the client's delayed acknowledgement.
            let listener = listener.tap_io(|stream| {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY");
                }
            });
            let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
            if let Err(error) = served.await {
                tracing::error!(%error, "the HTTP server ended");
            }
        });
        tracing::info!(service = name, %address, "started");
        for tracker in [&work, &relay, &http] {
            tracker.close();
        }
        Ok(Running { name, address, stops, vitals, work, relay, http, db: self.db })
    }
}

async fn ensure_stream(broker: &dyn Broker, config: &StreamConfig) -> Result<(), StartError> {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    loop {
        match broker.ensure_stream(config).await {
            Ok(()) => return Ok(()),
            Err(BrokerError::Unavailable(error)) => {
                let delay = backoff.next();
                tracing::warn!(stream = config.name, error, retry_in = ?delay, "the stream cannot be made yet");
                tokio::time::sleep(delay).await;
            }
            Err(source) => return Err(StartError::Stream { stream: config.name.clone(), source }),
        }
    }
}

/// The whole router: the service's own routes, the operators', the API's description and page.
fn finish(
    routers: Vec<MakeRouter>,
    vitals: Arc<Vitals>,
    config: &ServiceConfig,
    name: &str,
    description: &'static str,
) -> Router {
    aide::generate::reset_context();
    aide::generate::infer_responses(true);
    aide::generate::extract_schemas(true);
    #[expect(clippy::default_trait_access, reason = "the map's type is a dependency of aide's, not of ours")]
    let bearer = SecurityScheme::Http {
        scheme: "bearer".into(),
        bearer_format: None,
        description: Some("The admin token".into()),
        extensions: Default::default(),
    };
    let mut api = OpenApi {
        info: Info {
            title: format!("Consign: {name}"),
            version: env!("CARGO_PKG_VERSION").into(),
            description: Some(description.into()),
            ..Info::default()
        },
        components: Some(Components {
            security_schemes: [("admin".to_owned(), ReferenceOr::Item(bearer))].into_iter().collect(),
            ..Components::default()
        }),
        ..OpenApi::default()
    };
    let router = routers.into_iter().fold(ApiRouter::new(), |all, make| all.merge(make()));
    let router = router
        .merge(ops_router(vitals))
        .route("/docs", Scalar::new("/openapi.json").with_title(&format!("Consign: {name}")).axum_route())
        .finish_api(&mut api);
    let api = Arc::new(api);
    router
        .route("/openapi.json", get(move || async move { Json(api) }))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(config.http.body_limit))
        .layer(axum::middleware::from_fn_with_state(Edge::new(name, &config.http), guard))
}

#[derive(Debug, Default)]
struct Stops {
    http: CancellationToken,
    work: CancellationToken,
    relay: CancellationToken,
}

/// A service that runs.
#[derive(Debug)]
pub struct Running {
    name: String,
    address: SocketAddr,
    stops: Stops,
    vitals: Arc<Vitals>,
    work: TaskTracker,
    relay: TaskTracker,
    http: TaskTracker,
    db: Db,
}

impl Running {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens, with the port it really got.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its database.
    pub fn db(&self) -> &Db {
        &self.db
    }

    /// Stops in order, within `limit`: requests are answered, then handlers and tasks finish and commit and acknowledge, then the
    /// outbox is published, then the database is closed. What does not finish in time is taken up at the next start.
    pub async fn shutdown(self, limit: Duration) {
        self.vitals.stopping.store(true, Ordering::Relaxed);
        let drain = async {
            self.stops.http.cancel();
            // Idle connections that clients keep open must not use up the time of the rest.
            let _ = tokio::time::timeout(limit / 4, self.http.wait()).await;
            self.stops.work.cancel();
            self.work.wait().await;
            self.stops.relay.cancel();
            self.relay.wait().await;
        };
        if tokio::time::timeout(limit, drain).await.is_err() {
            tracing::warn!(
                service = self.name,
                ?limit,
                "stopped before everything was drained; it goes on at the next start"
            );
        }
        self.stops.relay.cancel();
        self.stops.work.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(2), self.db.close()).await;
        tracing::info!(service = self.name, "stopped");
    }
}

/// What a service knows of its own health.
#[derive(Debug)]
pub(crate) struct Vitals {
    pub(crate) db: Db,
    pub(crate) broker: Arc<dyn Broker>,
    pub(crate) scope: Scope,
    pub(crate) breakers: Vec<Breaker>,
    pub(crate) published: Vec<Published>,
    pub(crate) consumed: Vec<versions::Consumed>,
    consumers: Vec<(String, String)>,
    outbox_cap: u64,
    stopping: AtomicBool,
}

impl std::fmt::Debug for dyn Broker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Broker({})", self.status().kind)
    }
}

impl Vitals {
    /// Why no requests should come now, if so. A broker outage is absorbed by the outbox until that is full.
    pub(crate) async fn not_ready(&self) -> Option<String> {
        if self.stopping.load(Ordering::Relaxed) {
            return Some("stopping".into());
        }
        if self.db.outbox_depth() >= self.outbox_cap {
            return Some(format!(
                "the outbox holds {} events; its cap is {}",
                self.db.outbox_depth(),
                self.outbox_cap
            ));
        }
        match tokio::time::timeout(Duration::from_secs(2), self.db.ping()).await {
            Ok(Ok(())) => None,
            Ok(Err(e)) => Some(format!("the database does not answer: {}", telemetry::chain(&e))),
            Err(_) => Some("the database does not answer".into()),
        }
    }

    /// The report of `/health`: `ok`, `degraded` (works, but look at it) or `failing`.
    pub(crate) async fn report(&self) -> Value {
        let not_ready = self.not_ready().await;
        let broker = self.broker.status();
        let oldest = outbox::oldest_pending(&self.db).await.ok().flatten();
        let mut consumers = Vec::new();
        for (stream, name) in &self.consumers {
            let info =
                tokio::time::timeout(Duration::from_secs(2), self.broker.consumer_info(stream, name)).await;
            consumers.push(match info {
                Ok(Ok(info)) => json!({"name": name, "stream": stream, "info": info}),
                Ok(Err(e)) => json!({"name": name, "stream": stream, "error": e.to_string()}),
                Err(_) => json!({"name": name, "stream": stream, "error": "no answer"}),
            });
        }
        let dead = dead_letter::open_count(&self.db).await.ok();
        let calls_go_through = self.breakers.iter().all(|b| b.state() == State::Closed);
        let status = match (&not_ready, broker.connected && calls_go_through, dead) {
            (Some(_), ..) => "failing",
            (None, true, Some(0)) => "ok",
            _ => "degraded",
        };
        json!({
            "status": status, "service": self.db.service(), "version": env!("CARGO_PKG_VERSION"),
            "not_ready": not_ready, "broker": broker, "consumers": consumers, "dead_letters_open": dead,
            "tasks_due": tasks::due(&self.db).await.ok(),
            "breakers": self.breakers.iter().map(Breaker::status).collect::<Vec<_>>(),
            "outbox": {
                "pending": self.db.outbox_depth(), "cap": self.outbox_cap,
                "oldest_seconds": oldest.map(|t| self.db.clock().now().since(t).as_secs_f64()),
            },
        })
    }

    /// Sets the gauges.
    #[expect(clippy::cast_precision_loss, reason = "gauges are floating point")]
    pub(crate) async fn measure(&self) {
        let service = self.db.service().to_owned();
        let gauge =
            |name: &'static str, value: f64| metrics::gauge!(name, "service" => service.clone()).set(value);
        gauge("consign_outbox_pending", self.db.outbox_depth() as f64);
        gauge("consign_broker_connected", if self.broker.status().connected { 1.0 } else { 0.0 });
        if let Ok(oldest) = outbox::oldest_pending(&self.db).await {
            let age = oldest.map_or(0.0, |t| self.db.clock().now().since(t).as_secs_f64());
            gauge("consign_outbox_oldest_seconds", age);
        }
        if let Ok(due) = tasks::due(&self.db).await {
            gauge("consign_tasks_due", due as f64);
        }
        if let Ok(open) = dead_letter::open_count(&self.db).await {
            gauge("consign_dead_letters_open", open as f64);
        }
        for (stream, name) in &self.consumers {
            let info =
                tokio::time::timeout(Duration::from_secs(2), self.broker.consumer_info(stream, name)).await;
            if let Ok(Ok(info)) = info {
                let set = |metric: &'static str, value: u64| {
                    metrics::gauge!(metric, "consumer" => name.clone()).set(value as f64);
                };
                set("consign_consumer_lag", info.pending);
                set("consign_consumer_ack_pending", info.ack_pending);
                set("consign_consumer_unsettled_span", info.delivered.saturating_sub(info.ack_floor));
            }
        }
    }
}

type Job = Box<dyn Fn(Db) -> Pin<Box<dyn Future<Output = Result<(), DbError>> + Send>> + Send>;

/// A job of the service's own, until told to stop. What goes wrong is logged, and tried again next time.
async fn repeat(db: Db, period: Duration, job: Job, stop: CancellationToken) {
    loop {
        if let Err(error) = job(db.clone()).await {
            tracing::warn!(service = db.service(), error = telemetry::chain(&error), retry_in = ?period, "a periodic job failed");
        }
        tokio::select! {
            () = tokio::time::sleep(period) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Gauges and pruning, until told to stop.
async fn housekeeping(vitals: Arc<Vitals>, prunes: Vec<Prune>, stop: CancellationToken) {
    loop {
        vitals.measure().await;
        for prune in &prunes {
            if let Err(error) = prune_table(&vitals.db, *prune, &stop).await {
                tracing::warn!(
                    service = vitals.db.service(),
                    error = telemetry::chain(&error),
                    "old rows could not be pruned"
                );
            }
        }
        tokio::select! {
            () = tokio::time::sleep(HOUSEKEEPING) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn prune_table(db: &Db, prune: Prune, stop: &CancellationToken) -> Result<(), DbError> {
    while !stop.is_cancelled() {
        let before = db.clock().now() - prune.keep;
        let mut tx = db.begin().await?;
        let gone = tx.query_each(prune.sqlite, prune.postgres).bind(before).execute().await?;
        if gone == 0 {
            tx.rollback().await;
            return Ok(());
        }
        tx.commit().await?;
        if gone < PRUNE_STEP {
            return Ok(());
        }
    }
    Ok(())
}
