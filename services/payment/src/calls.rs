//! The calls to the gateway, as tasks: outside any transaction, resumed after a crash with the same idempotency key.

use std::sync::Arc;

use async_trait::async_trait;
use consign::tasks::{Leased, Task, TaskHandler};
use consign::{Clock, DbError, Failure, Tx};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::{Input, Status};
use crate::gateway::{Charge, PaymentGateway};
use crate::steps::{self, Step};
use crate::store::{self, Payment};

/// Charges an order's payment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChargeTask {
    /// The order.
    pub order_id: Uuid,
}

impl Task for ChargeTask {
    const KIND: &'static str = "payment-charge";
}

/// Gives it back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RefundTask {
    /// The order.
    pub order_id: Uuid,
}

impl Task for RefundTask {
    const KIND: &'static str = "payment-refund";
}

/// Does both kinds of call.
#[derive(Clone)]
pub struct Calls {
    pub clock: Clock,
    pub gateway: Arc<dyn PaymentGateway>,
}

/// The payments of these orders, in their order: one statement for all tasks leased at once.
async fn payments(tx: &mut Tx, orders: Vec<Uuid>) -> Result<Vec<Option<Payment>>, DbError> {
    let mut found = store::load(tx, &orders).await?;
    Ok(orders.iter().map(|id| found.remove(id)).collect())
}

fn known<'a>(payment: Option<&'a Payment>, order: &Uuid) -> Result<&'a Payment, Failure> {
    payment.ok_or_else(|| Failure::dead_letter(format!("there is no payment of order {order}")))
}

/// What a charge came to.
#[derive(Clone, Debug)]
pub enum ChargeOutcome {
    /// The money is ours.
    Charged,
    /// It is not, for this reason.
    NotCharged(String),
}

impl From<Charge> for ChargeOutcome {
    fn from(c: Charge) -> Self {
        match c {
            Charge::Charged => Self::Charged,
            Charge::Declined(why) => Self::NotCharged(format!("declined: {why}")),
        }
    }
}

#[async_trait]
impl TaskHandler for Calls {
    type Task = ChargeTask;
    type Context = Option<Payment>;
    type Output = ChargeOutcome;

    async fn prepare(
        &self,
        tx: &mut Tx,
        tasks: &[Leased<ChargeTask>],
    ) -> Result<Vec<Option<Payment>>, DbError> {
        payments(tx, tasks.iter().map(|t| t.payload.order_id).collect()).await
    }

    async fn run(
        &self,
        task: &Leased<ChargeTask>,
        payment: &Option<Payment>,
    ) -> Result<ChargeOutcome, Failure> {
        let p = known(payment.as_ref(), &task.payload.order_id)?;
        let key = p.payment_id.to_string();
        // Tried before: it may have been charged although no answer came. Asking settles it.
        if task.attempts > 1
            && let Some(known) = self.gateway.lookup(&key).await?
        {
            return Ok(known.into());
        }
        if p.state.cancelled {
            return Ok(ChargeOutcome::NotCharged("cancelled".into()));
        }
        if self.clock.now() >= p.expires_at {
            return Ok(ChargeOutcome::NotCharged("expired".into()));
        }
        Ok(self.gateway.charge(&key, p.amount, &p.currency).await?.into())
    }

    async fn finish(&self, tx: &mut Tx, done: &[(Leased<ChargeTask>, ChargeOutcome)]) -> Result<(), DbError> {
        let steps: Vec<Step> = done
            .iter()
            .map(|(task, outcome)| {
                let (input, reason) = match outcome {
                    ChargeOutcome::Charged => (Input::Charged, None),
                    ChargeOutcome::NotCharged(why) => (Input::NotCharged, Some(why.clone())),
                };
                step(task.payload.order_id, input, reason, task.cause.clone())
            })
            .collect();
        advance(tx, &steps).await
    }
}

/// Refunds, worked off apart from charges.
pub struct Refunds(pub Calls);

#[async_trait]
impl TaskHandler for Refunds {
    type Task = RefundTask;
    type Context = Option<Payment>;
    type Output = ();

    async fn prepare(
        &self,
        tx: &mut Tx,
        tasks: &[Leased<RefundTask>],
    ) -> Result<Vec<Option<Payment>>, DbError> {
        payments(tx, tasks.iter().map(|t| t.payload.order_id).collect()).await
    }

    async fn run(&self, task: &Leased<RefundTask>, payment: &Option<Payment>) -> Result<(), Failure> {
        let p = known(payment.as_ref(), &task.payload.order_id)?;
        if p.state.status == Status::Refunding {
            let charge = p.payment_id.to_string();
            self.0.gateway.refund(&format!("refund-{charge}"), &charge, p.amount).await?;
        }
        Ok(())
    }

    async fn finish(&self, tx: &mut Tx, done: &[(Leased<RefundTask>, ())]) -> Result<(), DbError> {
        let steps: Vec<Step> = done
            .iter()
            .map(|(task, ())| step(task.payload.order_id, Input::Refunded, None, task.cause.clone()))
            .collect();
        advance(tx, &steps).await
    }
}

fn step(order_id: Uuid, input: Input, reason: Option<String>, cause: consign::event::Cause) -> Step {
    Step { order_id, input, reason, terms: None, lane: consign::Lane::Standard, cause }
}

async fn advance(tx: &mut Tx, steps: &[Step]) -> Result<(), DbError> {
    steps::advance(tx, steps).await.map_err(|e| DbError::Sql(sqlx::Error::Protocol(e.to_string())))
}
