//! Payment: charges orders through a gateway, exactly once or not at all, and gives back what was charged in vain.
//!
//! Consumes `inventory.reserved`, `orders.cancelled`; publishes `payments.succeeded`, `payments.failed`, `payments.refunded`.

mod calls;
pub mod domain;
pub mod gateway;
mod http;
mod steps;
mod store;

use std::sync::Arc;

use consign::broker::{Broker, STREAM_AGE, StreamConfig};
use consign::config::{OutboxConfig, ServiceConfig};
use consign::db::Storage;
use consign::http::HttpConfig;
use consign::tasks::TaskOptions;
use consign::{Clock, ConsumerOptions, Db, DbError, Migration, Service, Topology};
use contracts::streams;
use serde::{Deserialize, Serialize};

use calls::{Calls, Refunds};
use gateway::{Knobs, SimulatedGateway};

/// The service's name, in configuration, logs, metrics and event sources.
pub const NAME: &str = "payment";

const MIGRATIONS: &[Migration] = &[Migration {
    version: 1,
    name: "payments",
    sqlite: include_str!("../migrations/1.sqlite.sql"),
    postgres: include_str!("../migrations/1.postgres.sql"),
}];

/// The section `[payment]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where it listens.
    pub http: HttpConfig,
    /// The outbox's limits.
    pub outbox: OutboxConfig,
    /// How consumers behave.
    pub consumer: ConsumerOptions,
    /// How calls to the gateway are worked off.
    pub tasks: TaskOptions,
    /// How the simulated gateway behaves at start.
    pub gateway: Knobs,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http: HttpConfig { listen: ([127, 0, 0, 1], 8082).into(), ..HttpConfig::default() },
            outbox: OutboxConfig::default(),
            consumer: ConsumerOptions::default(),
            tasks: TaskOptions::default(),
            gateway: Knobs::default(),
        }
    }
}

impl Config {
    /// What every service has to be told.
    pub fn service(&self) -> ServiceConfig {
        ServiceConfig {
            http: self.http.clone(),
            outbox: self.outbox,
            consumer: self.consumer,
            tasks: self.tasks,
        }
    }

    /// Everything wrong with it.
    pub fn check(&self) -> Vec<String> {
        let mut faults = self.service().check(NAME, STREAM_AGE);
        faults.extend(self.gateway.faults().into_iter().map(|f| format!("payment.gateway.{f}")));
        faults
    }
}

/// Opens the service's database.
pub async fn open(storage: impl Into<Storage>, clock: Clock) -> Result<Db, DbError> {
    Db::open(storage, NAME, MIGRATIONS, clock).await
}

/// The streams it owns and the consumers it runs.
pub fn topology(config: &Config) -> Topology {
    let options = config.consumer;
    Topology::new(NAME)
        .stream(StreamConfig::new(streams::PAYMENTS, &["payments.>"]))
        .consumer(steps::inventory(options).with_state(()))
        .consumer(steps::orders(options).with_state(()))
}

/// The whole service, ready to start.
pub fn service(config: &Config, db: Db, broker: Arc<dyn Broker>, gateway: SimulatedGateway) -> Service {
    let calls = Calls { clock: db.clock().clone(), gateway: Arc::new(gateway.clone()) };
    let state = http::AppState { db: db.clone(), gateway };
    Service::new(config.service(), db, broker, "Charges orders, exactly once or not at all.")
        .topology(topology(config))
        .tasks(calls.clone(), config.tasks)
        .tasks(Refunds(calls), config.tasks)
        .http(move || http::router(state))
}
