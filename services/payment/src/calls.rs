//! The calls to the gateway, as tasks: outside any transaction, resumed after a crash. What became of a call that brought no answer is
//! asked, not guessed.

use std::time::Duration;

use async_trait::async_trait;
use consign::breaker::Breaker;
use consign::event::Cause;
use consign::tasks::{Leased, Task, TaskHandler};
use consign::{DbError, Failure, Tx};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::Status;
use crate::gateway::{self, Answer, Charge, Gateway, GatewayError, Refunded};
use crate::steps::{self, Step, What};
use crate::store::{self, Payment};

/// Charges an order's payment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChargeTask {
    /// The order.
    pub order_id: Uuid,
    /// The gateway may know of it: a task before this one has called it.
    #[serde(default)]
    pub tried: bool,
}

impl Task for ChargeTask {
    const KIND: &'static str = "payment-charge";
}

/// Gives money back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RefundTask {
    /// The order.
    pub order_id: Uuid,
    /// Which refund; in tasks from before there were several, none: the one of the cancelled order.
    #[serde(default)]
    pub refund_id: Option<Uuid>,
}

impl Task for RefundTask {
    const KIND: &'static str = "payment-refund";
}

/// Does both kinds of call.
#[derive(Clone)]
pub struct Calls {
    pub gateway: Gateway,
}

/// The gateway is at it: asked again after so long, unless it calls back before.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// It may not be charged any more, and only the order service can say what becomes of it; when it does, the wait ends.
const AWAIT_DECISION: Duration = Duration::from_secs(60);

/// The payments of these orders, in their order: one statement for all tasks leased at once.
async fn payments(tx: &mut Tx, orders: Vec<Uuid>) -> Result<Vec<Option<Payment>>, DbError> {
    let found = store::load(tx, &orders).await?;
    // An order may be among them twice: several refunds of one.
    Ok(orders.iter().map(|id| found.get(id).cloned()).collect())
}

fn known<'a>(payment: Option<&'a Payment>, order: &Uuid) -> Result<&'a Payment, Failure> {
    payment.ok_or_else(|| Failure::dead_letter(format!("there is no payment of order {order}")))
}

fn request(p: &Payment, attempt: u32) -> Charge {
    Charge {
        payment_id: p.payment_id,
        order_id: p.order_id,
        amount: p.state.amount,
        currency: p.currency.clone(),
        method: p.method.clone(),
        reference: p.reference.clone(),
        not_after: p.expires_at,
        // A few attempts are made at once within each.
        attempt: attempt.saturating_mul(10),
    }
}

/// What a run of a charge came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Known for good: the money is ours, or it is not for this reason.
    Ended(Result<(), String>),
    /// Nothing is charged yet; this reference is to be kept first.
    Prepared(String),
    /// To be taken up again after so long, or when something happens.
    Later(Duration),
}

impl From<Answer> for Outcome {
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Prepared(reference) => Self::Prepared(reference),
            Answer::Processing => Self::Later(ASK_AGAIN),
            Answer::Charged => Self::Ended(Ok(())),
            Answer::Declined(why) => Self::Ended(Err(format!("declined: {why}"))),
        }
    }
}

impl Calls {
    async fn charge(&self, task: &Leased<ChargeTask>, p: &Payment) -> Result<Outcome, Failure> {
        // Something may have reached the gateway although no answer came back.
        let tried = task.attempts > 1 || task.payload.tried || p.reference.is_some();
        if p.state.status != Status::Pending {
            return Ok(Outcome::Later(Duration::ZERO));
        }
        if p.state.cancelled {
            let ended =
                if tried { self.gateway.cancel(request(p, task.attempts)).await? } else { forbidden() };
            return Ok(match ended {
                Answer::Declined(_) => Outcome::Ended(Err("cancelled".into())),
                answer => answer.into(),
            });
        }
        match self.gateway.charge(request(p, task.attempts)).await {
            Ok(answer) => Ok(answer.into()),
            // Too late to charge; but what was charged in time is ours.
            Err(GatewayError::TooLate) if tried => {
                let known = self.gateway.lookup(request(p, task.attempts)).await?;
                Ok(known.map_or(Outcome::Later(AWAIT_DECISION), Outcome::from))
            }
            Err(GatewayError::TooLate) => Ok(Outcome::Later(AWAIT_DECISION)),
            Err(e) => Err(e.into()),
        }
    }
}

/// What a gateway that was never called would say.
fn forbidden() -> Answer {
    Answer::Declined("cancelled".into())
}

#[async_trait]
impl TaskHandler for Calls {
    type Task = ChargeTask;
    type Context = Option<Payment>;
    type Output = Outcome;

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
    ) -> Result<Self::Output, Failure> {
        self.charge(task, known(payment.as_ref(), &task.payload.order_id)?).await
    }

    async fn finish(&self, tx: &mut Tx, done: &[(Leased<ChargeTask>, Self::Output)]) -> Result<(), DbError> {
        let mut made = Vec::with_capacity(done.len());
        let mut later = Vec::new();
        for (task, outcome) in done {
            let what = match outcome {
                Outcome::Ended(Ok(())) => What::Charged,
                Outcome::Ended(Err(why)) => What::NotCharged(why.chars().take(200).collect()),
                Outcome::Prepared(reference) => What::Prepared(reference.clone()),
                Outcome::Later(wait) => {
                    later.push((task, *wait));
                    continue;
                }
            };
            made.push(step(task.payload.order_id, what, task.cause.clone()));
        }
        advance(tx, &made).await?;
        if later.is_empty() {
            return Ok(());
        }
        // As they are now: what was decided while the call was under way found nobody waiting.
        let found = payments(tx, later.iter().map(|(t, _)| t.payload.order_id).collect()).await?;
        let now = tx.now();
        for ((task, wait), payment) in later.iter().zip(found) {
            if let Some(p) = payment.filter(|p| p.state.status == Status::Pending) {
                let tried = task.payload.tried || task.attempts > 1 || *wait == ASK_AGAIN;
                let decided = *wait == AWAIT_DECISION && (p.state.cancelled || p.expires_at > now);
                let due = if decided { now } else { now + *wait };
                steps::charge(tx, &p, due, tried, task.cause.clone())?;
            }
        }
        Ok(())
    }

    fn breaker(&self) -> Option<&Breaker> {
        Some(self.gateway.breaker())
    }
}

/// Refunds, worked off apart from charges.
pub struct Refunds(pub Calls);

#[async_trait]
impl TaskHandler for Refunds {
    type Task = RefundTask;
    type Context = Option<(Payment, store::Refund)>;
    type Output = Refunded;

    async fn prepare(
        &self,
        tx: &mut Tx,
        tasks: &[Leased<RefundTask>],
    ) -> Result<Vec<Self::Context>, DbError> {
        let found = payments(tx, tasks.iter().map(|t| t.payload.order_id).collect()).await?;
        let id = |task: &Leased<RefundTask>, p: &Payment| task.payload.refund_id.unwrap_or(p.payment_id);
        let mut ids: Vec<Uuid> =
            tasks.iter().zip(&found).filter_map(|(t, p)| Some(id(t, p.as_ref()?))).collect();
        ids.sort_unstable();
        let refunds = store::load_refunds(tx, &ids).await?;
        let both = tasks.iter().zip(found).map(|(t, p)| {
            let p = p?;
            let refund = refunds.get(&id(t, &p))?.clone();
            Some((p, refund))
        });
        Ok(both.collect())
    }

    async fn run(&self, task: &Leased<RefundTask>, context: &Self::Context) -> Result<Refunded, Failure> {
        let order = task.payload.order_id;
        let (p, refund) = context
            .as_ref()
            .ok_or_else(|| Failure::dead_letter(format!("there is no such refund of order {order}")))?;
        if refund.status != "pending" {
            return Ok(Refunded::Done);
        }
        let request = gateway::Refund {
            refund_id: refund.refund_id,
            charge: request(p, task.attempts),
            amount: refund.amount,
        };
        Ok(self.0.gateway.refund(request).await?)
    }

    async fn finish(&self, tx: &mut Tx, done: &[(Leased<RefundTask>, Refunded)]) -> Result<(), DbError> {
        let orders: Vec<Uuid> = done.iter().map(|(t, _)| t.payload.order_id).collect();
        let found = payments(tx, orders).await?;
        let mut made = Vec::with_capacity(done.len());
        for ((task, refunded), payment) in done.iter().zip(found) {
            let Some(payment) = payment else { continue };
            match refunded {
                Refunded::Done => {
                    let refund_id = task.payload.refund_id.unwrap_or(payment.payment_id);
                    made.push(step(task.payload.order_id, What::RefundDone(refund_id), task.cause.clone()));
                }
                Refunded::Processing => {
                    let due = tx.now() + ASK_AGAIN;
                    tx.schedule_for(&*task.key, &task.payload, due, task.lane, task.cause.clone())?;
                }
            }
        }
        advance(tx, &made).await
    }

    fn breaker(&self) -> Option<&Breaker> {
        Some(self.0.gateway.breaker())
    }
}

fn step(order_id: Uuid, what: What, cause: Cause) -> Step {
    Step { order_id, what, lane: consign::Lane::Standard, cause, event: None }
}

async fn advance(tx: &mut Tx, steps: &[Step]) -> Result<(), DbError> {
    if steps.is_empty() {
        return Ok(());
    }
    steps::advance(tx, steps).await.map_err(|e| DbError::Sql(sqlx::Error::Protocol(e.to_string())))
}
