//! Consign: event-driven services whose events take effect exactly once.
//!
//! A handler's database changes, the record that it handled the event (inbox), the events it emits (outbox) and the work it leaves for
//! later (tasks) commit in one transaction of the service's own database. An event is published until the broker acknowledges it,
//! and acknowledged only after that commit. So each event takes effect once per consumer, whatever the broker duplicates, reorders,
//! delays or loses. `docs/DELIVERY.md` states the promise failure by failure.
//!
//! A whole service: it consumes an event, writes a row, emits an event.
//!
//! ```
//! use consign::broker::{Broker, StreamConfig};
//! use consign::{Clock, Consumer, Db, Emission, Event, Failure, Migration, Received, Service, Tx};
//! # use consign::broker::embedded::EmbeddedBroker;
//! use schemars::JsonSchema;
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Clone, Serialize, Deserialize, JsonSchema, Event)]
//! #[event(type = "orders.confirmed", version = 1)]
//! struct OrderConfirmed { order_id: String }
//!
//! #[derive(Clone, Serialize, Deserialize, JsonSchema, Event)]
//! #[event(type = "parcels.packed", version = 1)]
//! struct ParcelPacked { order_id: String }
//!
//! async fn pack(Received(order): Received<OrderConfirmed>, mut tx: Tx) -> Result<(), Failure> {
//!     tx.query("INSERT INTO parcels (order_id) VALUES ($1)").bind(order.order_id.as_str()).execute().await?;
//!     let packed = ParcelPacked { order_id: order.order_id.clone() };
//!     tx.emit(Emission::new(packed, order.order_id, 1))?;
//!     Ok(())
//! }
//!
//! const MIGRATIONS: &[Migration] =
//!     &[Migration::new(1, "parcels", "CREATE TABLE parcels (order_id TEXT PRIMARY KEY)")];
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! # let dir = tempfile::tempdir()?;
//! # let (path, clock) = (dir.path().join("parcels.db"), Clock::system());
//! # let broker = std::sync::Arc::new(EmbeddedBroker::memory(clock.clone()));
//! # broker.ensure_stream(&StreamConfig::new("ORDERS", &["orders.>"])).await?;
//! let db = Db::open(&path, "parcel", MIGRATIONS, clock).await?;
//! let running = Service::new(Default::default(), db, broker, "Packs parcels")
//!     .stream(StreamConfig::new("PARCELS", &["parcels.>"]))
//!     .consumer(Consumer::new("parcel-orders", "ORDERS").on(pack).with_state(()))
//!     .start()
//!     .await?;
//! println!("http://{}/health", running.address());
//! # running.shutdown(std::time::Duration::from_secs(5)).await;
//! # Ok(())
//! # }
//! ```
#![warn(missing_docs)]

// The derive macro names this crate by its name, in here too.
extern crate self as consign;

pub mod advisories;
pub mod breaker;
pub mod broker;
pub mod config;
pub mod consumer;
pub mod db;
pub mod dead_letter;
pub mod event;
pub mod handler;
pub mod http;
mod inbox;
pub mod layer;
pub mod outbox;
pub mod process;
pub mod reconcile;
pub mod retry;
pub mod schema;
pub mod service;
pub mod tasks;
pub mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
mod time;
pub mod versions;

pub use consumer::{Consumer, ConsumerOptions};
pub use db::{Db, DbError, Migration, Tx};
pub use event::{CorrelationId, Event, EventId, Lane};
pub use handler::{Batch, Failure, Meta, Received};
pub use outbox::Emission;
pub use service::{Service, Topology};
pub use time::{Clock, Timestamp};
