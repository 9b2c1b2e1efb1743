//! A gateway for development and tests, which fails as told. Its ledger is the outside world: `consign verify` holds ours against it.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use consign::db::{GroupCommit, Storage, Work};
use consign::{Clock, Db, DbError, Migration, Tx};
use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use uuid::Uuid;

use super::{Answer, Charge, GatewayError, PaymentGateway, Refund, Refunded};

/// How the simulated gateway behaves; can be set at run time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Knobs {
    /// Half of all calls take no longer, in milliseconds.
    #[schemars(range(min = 0, max = 60_000))]
    pub latency_ms: u64,
    /// 99 of 100 calls take no longer, in milliseconds; in between log-normal. Not above `latency_ms`: all take the same.
    #[schemars(range(min = 0, max = 600_000))]
    pub latency_p99_ms: u64,
    /// Share of charges declined, 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub decline_rate: f64,
    /// Share of calls that fail without effect, 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub error_rate: f64,
    /// Share of calls that hang, without effect, until the caller gives up, 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub timeout_rate: f64,
    /// Share of calls that take effect, but whose answer is lost, 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub lost_answer_rate: f64,
    /// Share of charges that the gateway calls back about, as Stripe's webhooks do, 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub callback_rate: f64,
    /// Share of those callbacks that come twice, 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub duplicate_callback_rate: f64,
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            latency_ms: 4,
            latency_p99_ms: 20,
            decline_rate: 0.0,
            error_rate: 0.0,
            timeout_rate: 0.0,
            lost_answer_rate: 0.0,
            callback_rate: 0.0,
            duplicate_callback_rate: 0.0,
        }
    }
}

impl Knobs {
    /// Answers at once and always.
    pub const CALM: Self = Self {
        latency_ms: 0,
        latency_p99_ms: 0,
        decline_rate: 0.0,
        error_rate: 0.0,
        timeout_rate: 0.0,
        lost_answer_rate: 0.0,
        callback_rate: 0.0,
        duplicate_callback_rate: 0.0,
    };

    /// What is wrong with them.
    pub fn faults(&self) -> Vec<String> {
        let rates = [
            ("decline_rate", self.decline_rate),
            ("error_rate", self.error_rate),
            ("timeout_rate", self.timeout_rate),
            ("lost_answer_rate", self.lost_answer_rate),
            ("callback_rate", self.callback_rate),
            ("duplicate_callback_rate", self.duplicate_callback_rate),
        ];
        let mut faults: Vec<String> = rates
            .iter()
            .filter(|(_, rate)| !(0.0..=1.0).contains(rate))
            .map(|(name, _)| format!("{name}: 0 to 1"))
            .collect();
        if self.latency_ms > 60_000 {
            faults.push("latency_ms: at most 60000".to_owned());
        }
        if self.latency_p99_ms > 600_000 {
            faults.push("latency_p99_ms: at most 600000".to_owned());
        }
        if self.error_rate + self.timeout_rate + self.lost_answer_rate > 1.0 {
            faults.push("error_rate: with timeout_rate and lost_answer_rate at most 1 together".to_owned());
        }
        faults
    }

    /// How long a call takes, for a sample of the standard normal distribution.
    fn latency(&self, z: f64) -> Duration {
        // The 99th percentile of the standard normal distribution.
        const Z99: f64 = 2.326_347_9;
        let median = Duration::from_millis(self.latency_ms);
        if self.latency_p99_ms <= self.latency_ms || self.latency_ms == 0 {
            return median;
        }
        #[expect(clippy::cast_precision_loss, reason = "at most ten minutes of milliseconds")]
        let sigma = (self.latency_p99_ms as f64 / self.latency_ms as f64).ln() / Z99;
        median.mul_f64((sigma * z.clamp(-4.0, 4.0)).exp())
    }
}

/// What becomes of a call on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Arrives,
    Fails,
    Hangs,
    AnswerLost,
}

const LEDGER: &[Migration] = &[Migration {
    version: 1,
    name: "ledger",
    sqlite: include_str!("ledger.1.sqlite.sql"),
    postgres: include_str!("ledger.1.postgres.sql"),
}];

/// Callbacks that wait to be dealt with; more are lost, as webhooks may be.
const CALLBACKS: usize = 1024;

/// The gateway calls back: something became of this charge. Like a webhook it may come twice, late, or never.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Callback {
    /// The same for repetitions.
    pub id: String,
    /// The payment's id.
    pub payment_id: String,
}

/// A gateway for development and tests; clones are the same one.
#[derive(Clone, Debug)]
pub struct SimulatedGateway {
    knobs: Arc<RwLock<Knobs>>,
    ledger: Db,
    writes: GroupCommit<Entry, Option<String>>,
    callbacks: broadcast::Sender<Callback>,
    calls: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Entry {
    Charge { key: String, declined: Option<String>, amount: i64, currency: String },
    Refund { key: String, charge_key: String, amount: i64 },
}

impl SimulatedGateway {
    /// With its ledger in a file or a schema of its own: it is the outside world.
    pub async fn open(storage: impl Into<Storage>, knobs: Knobs, clock: Clock) -> Result<Self, DbError> {
        let ledger = Db::open(storage, "gateway", LEDGER, clock).await?;
        let writes = GroupCommit::start(ledger.clone(), 512, Ledger);
        let callbacks = broadcast::Sender::new(CALLBACKS);
        Ok(Self { knobs: Arc::new(RwLock::new(knobs)), ledger, writes, callbacks, calls: Arc::default() })
    }

    /// Closes the ledger.
    pub async fn close(&self) {
        self.ledger.close().await;
    }

    /// How it behaves now.
    pub fn knobs(&self) -> Knobs {
        *self.knobs.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes how it behaves.
    pub fn set(&self, knobs: Knobs) {
        *self.knobs.write().unwrap_or_else(PoisonError::into_inner) = knobs;
    }

    /// What it calls back with from now on.
    pub fn callbacks(&self) -> broadcast::Receiver<Callback> {
        self.callbacks.subscribe()
    }

    /// How often it was called.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// The time a call takes on its way there, and what becomes of it.
    async fn travel(&self) -> Result<Fate, GatewayError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        metrics::counter!("payment_simulated_gateway_calls_total").increment(1);
        let knobs = self.knobs();
        let (wait, fate) = {
            let mut rng = rand::rng();
            // Box and Muller's way from two uniform samples to a normal one.
            let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
            let wait = knobs.latency((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos());
            let dice = rng.random::<f64>();
            let fate = match dice {
                d if d < knobs.error_rate => Fate::Fails,
                d if d < knobs.error_rate + knobs.timeout_rate => Fate::Hangs,
                d if d < knobs.error_rate + knobs.timeout_rate + knobs.lost_answer_rate => Fate::AnswerLost,
                _ => Fate::Arrives,
            };
            (wait, fate)
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        match fate {
            Fate::Fails => Err(GatewayError::unavailable("simulated: an internal error")),
            Fate::Hangs => std::future::pending().await,
            Fate::AnswerLost | Fate::Arrives => Ok(fate),
        }
    }

    /// Calls back about a charge, as the knobs say.
    fn call_back(&self, payment_id: Uuid) {
        let knobs = self.knobs();
        let (calls, twice) = {
            let mut rng = rand::rng();
            (rng.random::<f64>() < knobs.callback_rate, rng.random::<f64>() < knobs.duplicate_callback_rate)
        };
        if calls {
            let callback = Callback { id: format!("evt_{payment_id}"), payment_id: payment_id.to_string() };
            for _ in 0..=usize::from(twice) {
                // Nobody listens: lost.
                let _ = self.callbacks.send(callback.clone());
            }
        }
    }

    async fn write(&self, entry: Entry) -> Result<Option<String>, GatewayError> {
        self.writes.run(entry).await.map_err(GatewayError::unavailable)
    }
}

fn arrived<T>(fate: Fate, answer: T) -> Result<T, GatewayError> {
    match fate {
        Fate::AnswerLost => Err(GatewayError::unavailable("simulated: the answer was lost")),
        _ => Ok(answer),
    }
}

fn answer(declined: Option<String>) -> Answer {
    declined.map_or(Answer::Charged, Answer::Declined)
}

#[async_trait]
impl PaymentGateway for SimulatedGateway {
    async fn charge(&self, charge: &Charge) -> Result<Answer, GatewayError> {
        let fate = self.travel().await?;
        let declines = rand::rng().random::<f64>() < self.knobs().decline_rate;
        let declined = declines.then(|| "insufficient_funds".to_owned());
        let declined = self.write(Entry::charge(charge, declined)).await?;
        self.call_back(charge.payment_id);
        arrived(fate, answer(declined))
    }

    async fn lookup(&self, charge: &Charge) -> Result<Option<Answer>, GatewayError> {
        let fate = self.travel().await?;
        let key = charge.payment_id.to_string();
        let query = self.ledger.query("SELECT declined FROM charges WHERE key = $1").bind(key.as_str());
        let row = query.fetch_optional().await.map_err(GatewayError::unavailable)?;
        let known = row.map(|r| r.get("declined")).transpose().map_err(GatewayError::unavailable)?;
        arrived(fate, known.map(answer))
    }

    async fn cancel(&self, charge: &Charge) -> Result<Answer, GatewayError> {
        let fate = self.travel().await?;
        // Takes the key, so that a charge that is still on its way finds it declined.
        let declined = self.write(Entry::charge(charge, Some("cancelled".to_owned()))).await?;
        arrived(fate, answer(declined))
    }

    async fn refund(&self, refund: &Refund) -> Result<Refunded, GatewayError> {
        let fate = self.travel().await?;
        let entry = Entry::Refund {
            key: format!("refund-{}", refund.refund_id),
            charge_key: refund.charge.payment_id.to_string(),
            amount: refund.amount,
        };
        self.write(entry).await?;
        arrived(fate, Refunded::Done)
    }
}

impl Entry {
    fn charge(charge: &Charge, declined: Option<String>) -> Self {
        Self::Charge {
            key: charge.payment_id.to_string(),
            declined,
            amount: charge.amount,
            currency: charge.currency.clone(),
        }
    }
}

/// Writes the ledger in groups: three statements, however many calls.
struct Ledger;

impl<'a> Work<'a, Entry, Option<String>> for Ledger {
    type Future = Pin<Box<dyn Future<Output = Result<Vec<Option<String>>, DbError>> + Send + 'a>>;
    fn call(&self, tx: &'a mut Tx, group: &'a [Entry]) -> Self::Future {
        Box::pin(write(tx, group))
    }
}

/// The stored answer of each charge; none for those charged, and for refunds.
async fn write(tx: &mut Tx, group: &[Entry]) -> Result<Vec<Option<String>>, DbError> {
    let now = tx.now();
    let (mut charges, mut refunds) = (Vec::new(), Vec::new());
    for entry in group {
        match entry {
            Entry::Charge { key, declined, amount, currency } => {
                charges.push((key.as_str(), declined.as_deref(), *amount, currency.as_str()));
            }
            Entry::Refund { key, charge_key, amount } => {
                refunds.push((key.as_str(), charge_key.as_str(), *amount));
            }
        }
    }
    charges.sort_unstable();
    refunds.sort_unstable();
    tx.query(
        "INSERT INTO charges (key, declined, amount, currency, at) SELECT key, declined, amount, currency, $1
         FROM {$2: key, declined, amount, currency} WHERE true ON CONFLICT DO NOTHING",
    )
    .bind(now)
    .rows(charges.iter().copied())
    .execute()
    .await?;
    if !refunds.is_empty() {
        tx.query(
            "INSERT INTO refunds (key, charge_key, amount, at) SELECT key, charge_key, amount, $1
             FROM {$2: key, charge_key, amount} WHERE true ON CONFLICT DO NOTHING",
        )
        .bind(now)
        .rows(refunds)
        .execute()
        .await?;
    }
    let rows = tx
        .query(
            "SELECT key, declined FROM charges WHERE declined IS NOT NULL AND key IN (SELECT k FROM {$1: k})",
        )
        .rows(charges.iter().map(|c| (c.0,)))
        .fetch_all()
        .await?;
    let declined: HashMap<String, String> =
        rows.iter().map(|r| Ok((r.get("key")?, r.get("declined")?))).collect::<Result<_, DbError>>()?;
    Ok(group
        .iter()
        .map(|entry| match entry {
            Entry::Charge { key, .. } => declined.get(key).cloned(),
            Entry::Refund { .. } => None,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_has_the_median_and_the_percentile_asked_for() {
        let knobs = Knobs { latency_ms: 10, latency_p99_ms: 200, ..Knobs::CALM };
        assert_eq!(knobs.latency(0.0).as_millis(), 10);
        assert_eq!(knobs.latency(2.326_347_9).as_millis(), 200);
        assert_eq!(Knobs { latency_ms: 7, ..Knobs::CALM }.latency(3.0).as_millis(), 7);
        assert_eq!(Knobs::CALM.latency(3.0), Duration::ZERO);
    }

    #[test]
    fn knobs_that_cannot_be_are_named() {
        let knobs = Knobs { error_rate: 0.6, lost_answer_rate: 0.6, decline_rate: -1.0, ..Knobs::CALM };
        let faults = knobs.faults().join("\n");
        assert!(faults.contains("decline_rate") && faults.contains("error_rate"), "{faults}");
        assert!(Knobs::default().faults().is_empty());
    }
}
