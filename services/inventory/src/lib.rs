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
use consign::config::ServiceConfig;
use consign::db::Storage;
use consign::http::HttpConfig;
use consign::{Clock, Db, DbError, Migration, Service, Topology};
use contracts::streams;
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
#[serde(transparent)]
pub struct Config(pub ServiceConfig);

impl Default for Config {
    fn default() -> Self {
        let http = HttpConfig { listen: ([127, 0, 0, 1], 8081).into(), ..HttpConfig::default() };
        Self(ServiceConfig { http, ..ServiceConfig::default() })
    }
}

impl Config {
    /// Everything wrong with it.
    pub fn check(&self) -> Vec<String> {
        self.0.check(NAME, STREAM_AGE)
    }
}

/// Opens the service's database.
pub async fn open(storage: impl Into<Storage>, clock: Clock) -> Result<Db, DbError> {
    Db::open(storage, NAME, MIGRATIONS, clock).await
}

/// The streams it owns and the consumer it runs.
pub fn topology(config: &Config) -> Topology {
    Topology::new(NAME)
        .stream(StreamConfig::new(streams::INVENTORY, &["inventory.>"]))
        .stream(StreamConfig::new(streams::PRODUCTS, &["products.>"]).last_per_subject())
        .consumer(events::orders(config.0.consumer).with_state(()))
}

/// The whole service, ready to start.
pub fn service(config: &Config, db: Db, broker: Arc<dyn Broker>) -> Service {
    Service::new(
        config.0.clone(),
        db.clone(),
        broker,
        "Products, their stock, and what of it is promised to orders.",
    )
    .topology(topology(config))
    .http(move || http::router(db))
}
