//! Consign: event-driven services whose events take effect exactly once.
#![warn(missing_docs)]

// The derive macro names this crate by its name, in here too.
extern crate self as consign;

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
pub mod retry;
pub mod schema;
pub mod service;
pub mod tasks;
pub mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
mod time;

pub use consumer::{Consumer, ConsumerOptions};
pub use db::{Db, DbError, Migration, Tx};
pub use event::{CorrelationId, Event, EventId, Lane};
pub use handler::{Batch, Failure, Meta, Received};
pub use outbox::Emission;
pub use service::Service;
pub use outbox::to_json;
pub use time::{Clock, Timestamp};
