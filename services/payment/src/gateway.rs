//! What a payment gateway must do, and a simulated one with a ledger.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use consign::db::{GroupCommit, Storage, Work};
use consign::{Clock, Db, DbError, Failure, Migration, Tx};
use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The gateway's answer to a charge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Charge {
    /// The money is ours.
    Charged,
    /// It is not, and asking again will not change that.
    Declined(String),
}

/// No answer, or none that says anything: whether it took effect is unknown until looked up.
#[derive(Debug, Error)]
pub enum GatewayError {
    /// It failed.
    #[error("the gateway failed: {0}")]
    Failed(String),
    /// Its ledger cannot be reached.
    #[error("the gateway's ledger")]
    Ledger(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<GatewayError> for Failure {
    fn from(e: GatewayError) -> Self {
        Self::pause(e)
    }
}

/// A payment gateway. Every call takes an idempotency key: repeated with the same key, it takes effect once and gives the same answer.
#[async_trait]
pub trait PaymentGateway: Send + Sync + 'static {
    /// Charges an amount in minor units.
    async fn charge(&self, key: &str, amount: i64, currency: &str) -> Result<Charge, GatewayError>;
    /// What became of the charge with this key; none if the gateway has never heard of it.
    async fn lookup(&self, key: &str) -> Result<Option<Charge>, GatewayError>;
    /// Gives back what was charged with `charge_key`.
    async fn refund(&self, key: &str, charge_key: &str, amount: i64) -> Result<(), GatewayError>;
}

/// How the simulated gateway behaves; can be set at run time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Knobs {
    /// Mean of the (exponential) latency, in milliseconds.
    #[schemars(range(min = 0, max = 60_000))]
    pub latency_ms: u64,
    /// Share of charges declined, 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub decline_rate: f64,
    /// Share of calls that fail without an answer, half of them after they took effect; 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub failure_rate: f64,
}

impl Default for Knobs {
    fn default() -> Self {
        Self { latency_ms: 5, decline_rate: 0.0, failure_rate: 0.0 }
    }
}

impl Knobs {
    /// What is wrong with them.
    pub fn faults(&self) -> Vec<String> {
        let rate = |r: f64| (0.0..=1.0).contains(&r);
        let mut faults = Vec::new();
        if self.latency_ms > 60_000 {
            faults.push("latency_ms: at most 60000".to_owned());
        }
        if !rate(self.decline_rate) {
            faults.push("decline_rate: 0 to 1".to_owned());
        }
        if !rate(self.failure_rate) {
            faults.push("failure_rate: 0 to 1".to_owned());
        }
        faults
    }
}

const LEDGER: &[Migration] = &[Migration {
    version: 1,
    name: "ledger",
    sqlite: include_str!("gateway.sqlite.sql"),
    postgres: include_str!("gateway.postgres.sql"),
}];

/// A gateway for development and tests.
#[derive(Clone, Debug)]
pub struct SimulatedGateway {
    knobs: Arc<RwLock<Knobs>>,
    ledger: Db,
    writes: GroupCommit<Entry, Option<String>>,
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
        Ok(Self { knobs: Arc::new(RwLock::new(knobs)), ledger, writes })
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

    /// The time a call takes, and whether it fails before or after it took effect.
    async fn travel(&self) -> Result<Option<GatewayError>, GatewayError> {
        let knobs = self.knobs();
        let (wait, fails, after) = {
            let mut rng = rand::rng();
            let mean = Duration::from_millis(knobs.latency_ms);
            let wait = mean.mul_f64(-(1.0 - rng.random::<f64>()).ln()).min(mean * 10);
            (wait, rng.random::<f64>() < knobs.failure_rate, rng.random::<bool>())
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        match (fails, after) {
            (false, _) => Ok(None),
            (true, true) => Ok(Some(GatewayError::Failed("simulated: the answer was lost".into()))),
            (true, false) => Err(GatewayError::Failed("simulated: the request was lost".into())),
        }
    }

    async fn write(&self, entry: Entry) -> Result<Option<String>, GatewayError> {
        self.writes.run(entry).await.map_err(|e| GatewayError::Ledger(Box::new(e)))
    }
}

#[async_trait]
impl PaymentGateway for SimulatedGateway {
    async fn charge(&self, key: &str, amount: i64, currency: &str) -> Result<Charge, GatewayError> {
        let lost = self.travel().await?;
        let declines = rand::rng().random::<f64>() < self.knobs().decline_rate;
        let declined = declines.then(|| "insufficient_funds".to_owned());
        let entry = Entry::Charge { key: key.to_owned(), declined, amount, currency: currency.to_owned() };
        let answer = self.write(entry).await?;
        match lost {
            Some(lost) => Err(lost),
            None => Ok(answer.map_or(Charge::Charged, Charge::Declined)),
        }
    }

    async fn lookup(&self, key: &str) -> Result<Option<Charge>, GatewayError> {
        if let Some(lost) = self.travel().await? {
            return Err(lost);
        }
        let ledger = |e: DbError| GatewayError::Ledger(Box::new(e));
        let query = self.ledger.query("SELECT declined FROM charges WHERE key = $1").bind(key);
        let Some(row) = query.fetch_optional().await.map_err(ledger)? else { return Ok(None) };
        let declined: Option<String> = row.get("declined").map_err(ledger)?;
        Ok(Some(declined.map_or(Charge::Charged, Charge::Declined)))
    }

    async fn refund(&self, key: &str, charge_key: &str, amount: i64) -> Result<(), GatewayError> {
        let lost = self.travel().await?;
        self.write(Entry::Refund { key: key.to_owned(), charge_key: charge_key.to_owned(), amount }).await?;
        lost.map_or(Ok(()), Err)
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
