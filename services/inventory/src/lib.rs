//! Inventory: products, their stock, and what of it is promised to orders.
//!
//! Consumes `orders.created`, `orders.cancelled`, `orders.confirmed`; publishes `inventory.reserved`, `inventory.rejected`,
//! `products.changed`.

pub mod domain;
mod events;
mod http;
mod store;

use std::path::Path;
use std::sync::Arc;

use consign::broker::{Broker, StreamConfig};
use consign::config::ServiceConfig;
use consign::{Clock, Db, DbError, Migration, Service};
use contracts::streams;

/// The service's name, in configuration, logs, metrics and event sources.
pub const NAME: &str = "inventory";

const MIGRATIONS: &[Migration] =
    &[Migration { version: 1, name: "products, reservations", sql: include_str!("../migrations/1.sql") }];

/// Opens the service's database.
pub async fn open(path: &Path, clock: Clock) -> Result<Db, DbError> {
    Db::open(path, NAME, MIGRATIONS, clock).await
}

/// The whole service, ready to start.
pub fn service(config: ServiceConfig, db: Db, broker: Arc<dyn Broker>) -> Service {
    let consumer = events::orders(config.consumer).with_state(());
    Service::new(config, db.clone(), broker, "Products, their stock, and what of it is promised to orders.")
        .stream(StreamConfig::new(streams::INVENTORY, &["inventory.>"]))
        .stream(StreamConfig::new(streams::PRODUCTS, &["products.>"]).last_per_subject())
        .consumer(consumer)
        .http(http::router(db))
}
