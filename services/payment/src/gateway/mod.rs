//! Payment gateways: what one must do, how calls to it are guarded, and those there are.

mod guarded;
pub mod simulated;
pub mod stripe;

pub use guarded::{Gateway, GatewayConfig};
pub use simulated::{Knobs, SimulatedGateway};

use async_trait::async_trait;
use consign::breaker::Rejected;
use consign::handler::BoxError;
use consign::{Failure, Timestamp};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

/// Which gateway charges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One for development and tests, with a ledger of its own.
    #[default]
    Simulated,
    /// Stripe's `PaymentIntents`.
    Stripe,
}

/// What is to be charged.
#[derive(Clone, Debug)]
pub struct Charge {
    /// The payment's id: the idempotency key.
    pub payment_id: Uuid,
    /// For the gateway's records.
    pub order_id: Uuid,
    /// In minor units.
    pub amount: i64,
    /// ISO 4217.
    pub currency: String,
    /// The gateway's token for what the customer pays with.
    pub method: Option<String>,
    /// The gateway's own id of the payment, once it is known and stored.
    pub reference: Option<String>,
    /// Not charged after this.
    pub not_after: Timestamp,
    /// Which try this is.
    pub attempt: u32,
}

/// What is to be given back.
#[derive(Clone, Debug)]
pub struct Refund {
    /// The refund's id: the idempotency key.
    pub refund_id: Uuid,
    /// Of this charge.
    pub charge: Charge,
    /// In minor units.
    pub amount: i64,
}

/// The gateway's answer about a charge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing is charged yet; store this reference, then call again.
    Prepared(String),
    /// It is at it; ask again later.
    Processing,
    /// The money is ours.
    Charged,
    /// It is not and never will be.
    Declined(String),
}

/// The gateway's answer about a refund.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refunded {
    /// The money is on its way back.
    Done,
    /// It is at it; ask again later.
    Processing,
}

/// A call did not bring an answer.
#[derive(Debug, Error)]
pub enum GatewayError {
    /// It failed, or no answer came: whether it took effect is unknown until it is asked.
    #[error("the gateway gave no answer")]
    Unavailable(#[source] BoxError),
    /// It refused the request as such: another try would be refused too.
    #[error("the gateway refuses the request: {0}")]
    Refused(String),
    /// It may not be charged any more, so no call was made, and none before it in this call.
    #[error("too late to charge")]
    TooLate,
    /// The circuit breaker is open, so no call was made.
    #[error(transparent)]
    Rejected(#[from] Rejected),
}

impl GatewayError {
    /// No answer, for this reason.
    pub fn unavailable(reason: impl Into<BoxError>) -> Self {
        Self::Unavailable(reason.into())
    }

    /// Whether the gateway is to blame. A refusal is an answer.
    pub fn is_outage(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

impl From<GatewayError> for Failure {
    fn from(e: GatewayError) -> Self {
        match e {
            GatewayError::Rejected(rejected) => rejected.into(),
            GatewayError::Refused(_) => Self::dead_letter(e),
            GatewayError::Unavailable(_) | GatewayError::TooLate => Self::pause(e),
        }
    }
}

/// A payment gateway.
///
/// Every method may be repeated, after a crash or a lost answer, a day later too: it takes effect once. Where the gateway's idempotency
/// keys do not promise that by themselves, the implementation asks what became of it first.
#[async_trait]
pub trait PaymentGateway: Send + Sync + 'static {
    /// Charges.
    async fn charge(&self, charge: &Charge) -> Result<Answer, GatewayError>;

    /// What became of a charge, without going on with it; none if nothing was charged or declined yet.
    async fn lookup(&self, charge: &Charge) -> Result<Option<Answer>, GatewayError>;

    /// Makes sure that it is never charged any more: [`Answer::Declined`]; or [`Answer::Charged`] if it was.
    async fn cancel(&self, charge: &Charge) -> Result<Answer, GatewayError>;

    /// Gives money back.
    async fn refund(&self, refund: &Refund) -> Result<Refunded, GatewayError>;
}
