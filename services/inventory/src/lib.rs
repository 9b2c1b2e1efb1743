//! Inventory: products, their stock, and what of it is promised to orders.
//!
//! Consumes `orders.created`, `orders.cancelled`, `orders.confirmed`, `orders.deadline_extended`, `orders.refunded`; publishes `inventory.reserved`, `inventory.rejected`,
//! `products.changed`.

pub mod domain;
mod events;
mod http;
mod store;

use std::sync::Arc;

use consign::broker::{Broker, STREAM_AGE, StreamConfig};
use consign::config::{OutboxConfig, ServiceConfig};
use consign::db::Storage;
use consign::http::HttpConfig;
use consign::tasks::TaskOptions;
use consign::versions::{self, Published};
use consign::{Clock, ConsumerOptions, Db, DbError, Event, Migration, Service, Topology};
use contracts::{OrderCreated, OrderCreatedV1, StockReserved, StockReservedV1, streams};
use serde::{Deserialize, Serialize};

/// The service's name, in configuration, logs, metrics and event sources.
pub const NAME: &str = "inventory";

const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        name: "products, reservations",
        sqlite: include_str!("../migrations/1.sqlite.sql"),
        postgres: include_str!("../migrations/1.postgres.sql"),
    },
    Migration {
        version: 2,
        name: "returns",
        sqlite: include_str!("../migrations/2.sqlite.sql"),
        postgres: include_str!("../migrations/2.postgres.sql"),
    },
];

/// The section `[inventory]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where it listens.
    pub http: HttpConfig,
    /// The outbox's limits.
    pub outbox: OutboxConfig,
    /// How consumers behave.
    pub consumer: ConsumerOptions,
    /// How tasks are worked off.
    pub tasks: TaskOptions,
    /// Which versions of its events are published.
    pub publish: Publish,
    /// Which versions of others' events are asked for.
    pub accept: Accept,
}

/// The section `[inventory.publish]`: while an event changes, both versions.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Publish {
    /// Of `inventory.reserved`.
    pub inventory_reserved: Vec<u32>,
}

/// The section `[inventory.accept]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Accept {
    /// Of `orders.created`.
    pub orders_created: Vec<u32>,
}

const CREATED: [u32; 2] = [OrderCreatedV1::VERSION, OrderCreated::VERSION];
const RESERVED: [u32; 2] = [StockReservedV1::VERSION, StockReserved::VERSION];

impl Default for Publish {
    fn default() -> Self {
        Self { inventory_reserved: vec![StockReserved::VERSION] }
    }
}

impl Default for Accept {
    fn default() -> Self {
        Self { orders_created: CREATED.to_vec() }
    }
}

impl Default for Config {
    fn default() -> Self {
        let ServiceConfig { http, outbox, consumer, tasks } = ServiceConfig::default();
        let http = HttpConfig { listen: ([127, 0, 0, 1], 8081).into(), ..http };
        Self { http, outbox, consumer, tasks, publish: Publish::default(), accept: Accept::default() }
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
        let (published, accepted) = (&self.publish.inventory_reserved, &self.accept.orders_created);
        faults.extend(versions::check("inventory.publish.inventory_reserved", published, &RESERVED));
        faults.extend(versions::check("inventory.accept.orders_created", accepted, &CREATED));
        faults
    }
}

/// Opens the service's database.
pub async fn open(storage: impl Into<Storage>, clock: Clock) -> Result<Db, DbError> {
    Db::open(storage, NAME, MIGRATIONS, clock).await
}

/// The streams it owns and the consumer it runs.
pub fn topology(config: &Config) -> Topology {
    topology_on(config, reserved(config))
}

fn reserved(config: &Config) -> Published {
    let configured = &config.publish.inventory_reserved;
    Published::new::<StockReserved>(streams::INVENTORY, &[StockReservedV1::VERSION], configured)
}

fn topology_on(config: &Config, reserved: Published) -> Topology {
    let orders = events::orders(config.consumer).accept::<OrderCreated>(&config.accept.orders_created);
    Topology::new(NAME)
        .stream(StreamConfig::new(streams::INVENTORY, &["inventory.>"]))
        .stream(StreamConfig::new(streams::PRODUCTS, &["products.>"]).last_per_subject())
        .consumer(orders.with_state(reserved))
}

/// The whole service, ready to start.
pub fn service(config: &Config, db: Db, broker: Arc<dyn Broker>) -> Service {
    let reserved = reserved(config);
    Service::new(
        config.service(),
        db.clone(),
        broker,
        "Products, their stock, and what of it is promised to orders.",
    )
    .topology(topology_on(config, reserved.clone()))
    .publishes(&reserved)
    .http(move || http::router(db))
}
