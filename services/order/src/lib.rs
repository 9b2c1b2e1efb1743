//! Order: takes orders, and carries each to its end.
//!
//! Consumes `storefront.order_requested`, `inventory.reserved`, `inventory.rejected`, `payments.*`, `products.changed`; publishes
//! `orders.created`, `orders.refused`, `orders.confirmed`, `orders.cancelled`, `orders.deadline_extended`, `orders.refund_requested`, `orders.refunded`. It alone decides an order's fate, its deadline included.

mod accept;
mod deadline;
pub mod domain;
mod http;
pub mod refunds;
mod requests;
mod saga;
mod store;

use std::sync::Arc;
use std::time::Duration;

use consign::broker::{Broker, STREAM_AGE, StreamConfig};
use consign::config::{OutboxConfig, ServiceConfig};
use consign::db::Storage;
use consign::http::HttpConfig;
use consign::tasks::TaskOptions;
use consign::versions::{self, Published};
use consign::{Clock, ConsumerOptions, Db, DbError, Event, Migration, Service, Topology};
use contracts::{OrderCreated, OrderCreatedV1, StockReserved, StockReservedV1, streams};
use serde::{Deserialize, Serialize};

use deadline::Expire;
pub use deadline::OnOutage;

/// The service's name, in configuration, logs, metrics and event sources.
pub const NAME: &str = "order";

const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        name: "orders, timeline, products",
        sqlite: include_str!("../migrations/1.sqlite.sql"),
        postgres: include_str!("../migrations/1.postgres.sql"),
    },
    Migration {
        version: 2,
        name: "payment methods, refunds, outages",
        sqlite: include_str!("../migrations/2.sqlite.sql"),
        postgres: include_str!("../migrations/2.postgres.sql"),
    },
    Migration {
        version: 3,
        name: "addresses, gift notes",
        sqlite: include_str!("../migrations/3.sqlite.sql"),
        postgres: include_str!("../migrations/3.postgres.sql"),
    },
];

/// The section `[order]`.
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
    /// Unpaid for so long, an order is cancelled.
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
    /// `expire` or `extend`: what becomes of orders whose deadline passes while the payment gateway is out of reach.
    pub on_payment_outage: OnOutage,
    /// Extended or not, no order stays unpaid for longer.
    #[serde(with = "humantime_serde")]
    pub extend_limit: Duration,
    /// Which versions of its events are published.
    pub publish: Publish,
    /// Which versions of others' events are asked for.
    pub accept: Accept,
}

/// The section `[order.publish]`: while an event changes, both versions.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Publish {
    /// Of `orders.created`.
    pub orders_created: Vec<u32>,
}

/// The section `[order.accept]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Accept {
    /// Of `inventory.reserved`.
    pub inventory_reserved: Vec<u32>,
}

const CREATED: [u32; 2] = [OrderCreatedV1::VERSION, OrderCreated::VERSION];
const RESERVED: [u32; 2] = [StockReservedV1::VERSION, StockReserved::VERSION];

impl Default for Publish {
    fn default() -> Self {
        Self { orders_created: vec![OrderCreated::VERSION] }
    }
}

impl Default for Accept {
    fn default() -> Self {
        Self { inventory_reserved: RESERVED.to_vec() }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http: HttpConfig { listen: ([127, 0, 0, 1], 8080).into(), ..HttpConfig::default() },
            outbox: OutboxConfig::default(),
            consumer: ConsumerOptions::default(),
            tasks: TaskOptions::default(),
            deadline: Duration::from_secs(15 * 60),
            on_payment_outage: OnOutage::Expire,
            extend_limit: Duration::from_secs(24 * 3600),
            publish: Publish::default(),
            accept: Accept::default(),
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
        faults.extend(versions::check(
            "order.publish.orders_created",
            &self.publish.orders_created,
            &CREATED,
        ));
        faults.extend(versions::check(
            "order.accept.inventory_reserved",
            &self.accept.inventory_reserved,
            &RESERVED,
        ));
        if self.deadline < Duration::from_secs(1) {
            faults.push(format!("order.deadline = {:?} must be at least 1s", self.deadline));
        }
        if self.extend_limit < self.deadline {
            faults.push(format!(
                "order.extend_limit = {:?} must not be below order.deadline = {:?}",
                self.extend_limit, self.deadline
            ));
        }
        faults
    }
}

/// Opens the service's database.
pub async fn open(storage: impl Into<Storage>, clock: Clock) -> Result<Db, DbError> {
    Db::open(storage, NAME, MIGRATIONS, clock).await
}

/// The streams it owns and the consumers it runs.
pub fn topology(config: &Config) -> Topology {
    topology_on(config, terms(config))
}

fn terms(config: &Config) -> accept::Terms {
    let configured = &config.publish.orders_created;
    let created = Published::new::<OrderCreated>(streams::ORDERS, &[OrderCreatedV1::VERSION], configured);
    accept::Terms { deadline: config.deadline, created }
}

fn topology_on(config: &Config, terms: accept::Terms) -> Topology {
    let options = config.consumer;
    let reserved = &config.accept.inventory_reserved;
    Topology::new(NAME)
        .stream(StreamConfig::new(streams::ORDERS, &["orders.>"]))
        .stream(StreamConfig::new(streams::STOREFRONT, &["storefront.>"]))
        .consumer(requests::consumer(options).with_state(terms))
        .consumer(saga::inventory(options).accept::<StockReserved>(reserved).with_state(()))
        .consumer(saga::payments(options).with_state(()))
        .consumer(saga::products(options).with_state(()))
}

/// The whole service, ready to start.
pub fn service(config: &Config, db: Db, broker: Arc<dyn Broker>) -> Service {
    let expire = Expire {
        on_outage: config.on_payment_outage,
        deadline: config.deadline,
        extend_limit: config.extend_limit,
    };
    let terms = terms(config);
    let created = terms.created.clone();
    let state = http::AppState {
        db: db.clone(),
        acceptor: accept::acceptor(db.clone(), terms.clone()),
        limit: http::Pending(config.outbox.max_pending),
    };
    Service::new(config.service(), db, broker, "Takes orders, and carries each to its end.")
        .topology(topology_on(config, terms))
        .publishes(&created)
        .tasks(expire, config.tasks)
        .http(move || http::router(state))
}
