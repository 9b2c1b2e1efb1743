//! Payment: charges orders through a gateway, exactly once or not at all, and gives back what was charged in vain or is asked for.
//!
//! Consumes `inventory.reserved`, `orders.cancelled`, `orders.deadline_extended`, `orders.refund_requested`; publishes `payments.succeeded`,
//! `payments.failed`, `payments.refunded`, `payments.refund_rejected`, `payments.gateway_unavailable`.

mod callbacks;
mod calls;
pub mod domain;
mod escalation;
pub mod gateway;
mod http;
mod outage;
mod steps;
mod store;

use std::sync::Arc;
use std::time::Duration;

use consign::broker::{Broker, STREAM_AGE, StreamConfig};
use consign::config::{OutboxConfig, ServiceConfig};
use consign::db::Storage;
use consign::handler::BoxError;
use consign::http::HttpConfig;
use consign::service::Prune;
use consign::tasks::TaskOptions;
use consign::{Clock, ConsumerOptions, Db, DbError, Event, Migration, Service, Topology, versions};
use contracts::{StockReserved, StockReservedV1, streams};
use serde::{Deserialize, Serialize};

use calls::{Calls, Refunds};
use gateway::stripe::StripeGateway;
use gateway::{Gateway, GatewayConfig, Kind, PaymentGateway, SimulatedGateway};

/// The service's name, in configuration, logs, metrics and event sources.
pub const NAME: &str = "payment";

const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        name: "payments",
        sqlite: include_str!("../migrations/1.sqlite.sql"),
        postgres: include_str!("../migrations/1.postgres.sql"),
    },
    Migration {
        version: 2,
        name: "references, refunds, callbacks",
        sqlite: include_str!("../migrations/2.sqlite.sql"),
        postgres: include_str!("../migrations/2.postgres.sql"),
    },
];

/// Escalations are looked for so often.
const ESCALATE: Duration = Duration::from_secs(30);
/// A gateway that calls back tries for a few days at most (Stripe: three).
const CALLBACKS_KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

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
    /// A charge or a refund that takes longer is escalated.
    #[serde(with = "humantime_serde")]
    pub stuck_after: Duration,
    /// Which gateway, and how calls to it are guarded.
    pub gateway: GatewayConfig,
    /// Which versions of others' events are asked for.
    pub accept: Accept,
}

/// The section `[payment.accept]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Accept {
    /// Of `inventory.reserved`.
    pub inventory_reserved: Vec<u32>,
}

const RESERVED: [u32; 2] = [StockReservedV1::VERSION, StockReserved::VERSION];

impl Default for Accept {
    fn default() -> Self {
        Self { inventory_reserved: RESERVED.to_vec() }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http: HttpConfig { listen: ([127, 0, 0, 1], 8082).into(), ..HttpConfig::default() },
            outbox: OutboxConfig::default(),
            consumer: ConsumerOptions::default(),
            tasks: TaskOptions {
                timeout: Duration::from_secs(25),
                lease: Duration::from_secs(45),
                ..TaskOptions::default()
            },
            stuck_after: Duration::from_secs(20 * 60),
            gateway: GatewayConfig::default(),
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
        faults.extend(self.gateway.faults().into_iter().map(|f| format!("payment.gateway.{f}")));
        let longest = self.gateway.longest() * 2;
        if self.tasks.timeout < longest {
            faults.push(format!(
                "payment.tasks.timeout = {:?} must be at least {longest:?}: two calls of payment.gateway.timeout, with their retries",
                self.tasks.timeout
            ));
        }
        faults.extend(versions::check(
            "payment.accept.inventory_reserved",
            &self.accept.inventory_reserved,
            &RESERVED,
        ));
        if self.stuck_after < Duration::from_secs(1) {
            faults.push("payment.stuck_after must be at least 1s".to_owned());
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
    let options = config.consumer;
    Topology::new(NAME)
        .stream(StreamConfig::new(streams::PAYMENTS, &["payments.>"]))
        .consumer(
            steps::inventory(options)
                .accept::<StockReserved>(&config.accept.inventory_reserved)
                .with_state(()),
        )
        .consumer(steps::orders(options).with_state(()))
}

/// What charges: the gateway that the configuration names.
#[derive(Clone)]
pub enum Outside {
    /// For development and tests.
    Simulated(SimulatedGateway),
    /// Stripe, or in tests anything else.
    Real(Arc<dyn PaymentGateway>),
}

impl Outside {
    /// As configured; the simulated one with its ledger in `ledger`, for it is the outside world.
    pub async fn open(
        config: &GatewayConfig,
        ledger: impl Into<Storage>,
        clock: Clock,
    ) -> Result<Self, BoxError> {
        Ok(match config.kind {
            Kind::Simulated => {
                Self::Simulated(SimulatedGateway::open(ledger, config.simulated, clock).await?)
            }
            Kind::Stripe => Self::Real(Arc::new(StripeGateway::new(&config.stripe)?)),
        })
    }

    /// Closes what it holds open.
    pub async fn close(&self) {
        if let Self::Simulated(gateway) = self {
            gateway.close().await;
        }
    }
}

/// The whole service, ready to start.
pub fn service(config: &Config, db: Db, broker: Arc<dyn Broker>, outside: Outside) -> Service {
    let name = match config.gateway.kind {
        Kind::Simulated => "gateway",
        Kind::Stripe => "stripe",
    };
    let (real, simulated): (Arc<dyn PaymentGateway>, _) = match outside {
        Outside::Simulated(gateway) => (Arc::new(gateway.clone()), Some(gateway)),
        Outside::Real(gateway) => (gateway, None),
    };
    let gateway = Gateway::new(name, real, &config.gateway, db.clock().clone());
    let breaker = gateway.breaker().clone();
    let calls = Calls { gateway };
    let stuck_after = config.stuck_after;
    let announcer = outage::Announcer::default();
    let state = http::AppState {
        db: db.clone(),
        simulated: http::Simulated(simulated.clone()),
        webhooks: http::Webhooks::new(&config.gateway),
        stuck_after: http::StuckAfter(stuck_after),
    };
    let mut service =
        Service::new(config.service(), db.clone(), broker, "Charges orders, exactly once or not at all.")
            .topology(topology(config))
            .tasks(calls.clone(), config.tasks)
            .tasks(Refunds(calls), config.tasks)
            .every(ESCALATE, move |db| escalation::escalate(db, stuck_after))
            .every(outage::LOOK, move |db| announcer.clone().announce(db, breaker.clone()))
            .prune(Prune::new(
                "DELETE FROM callbacks WHERE id IN
                    (SELECT id FROM callbacks WHERE received_at < $1 ORDER BY received_at LIMIT 1000 {skip})",
                CALLBACKS_KEPT,
            ))
            .http(move || http::router(state));
    if let Some(simulated) = simulated {
        let callbacks = simulated.callbacks();
        service = service.worker(move |db| callbacks::listen(db, callbacks));
    }
    service
}
