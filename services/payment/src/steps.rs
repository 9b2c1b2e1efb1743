//! A payment's steps: events and outcomes of calls all go through [`advance`], which decides, writes and announces for a whole batch.

use consign::event::Cause;
use consign::handler::Item;
use consign::{Batch, Consumer, ConsumerOptions, Emission, Failure, Lane, Timestamp, Tx};
use contracts::{OrderCancelled, PaymentFailed, PaymentRefunded, PaymentSucceeded, StockReserved, streams};
use uuid::Uuid;

use crate::calls::{ChargeTask, RefundTask};
use crate::domain::{Decision, Input, apply, decide};
use crate::store::{self, Payment};

/// What inventory says about orders.
pub fn inventory(options: ConsumerOptions) -> Consumer<()> {
    Consumer::new("payment-inventory", streams::INVENTORY).options(options).on(reserved)
}

/// What order says about orders.
pub fn orders(options: ConsumerOptions) -> Consumer<()> {
    Consumer::new("payment-orders", streams::ORDERS).options(options).on(cancelled)
}

/// Something that happened to one payment.
pub struct Step {
    pub order_id: Uuid,
    pub input: Input,
    /// Why, when it failed.
    pub reason: Option<String>,
    /// What is to be paid, when it begins.
    pub terms: Option<Terms>,
    pub lane: Lane,
    pub cause: Cause,
}

/// What is to be paid, and until when.
pub struct Terms {
    pub amount: i64,
    pub currency: String,
    pub expires_at: Timestamp,
}

/// Applies steps in order: one load, one write, however many.
pub async fn advance(tx: &mut Tx, steps: &[Step]) -> Result<(), Failure> {
    let ids: Vec<Uuid> = steps.iter().map(|s| s.order_id).collect();
    let mut payments = store::load(tx, &ids).await?;
    let mut touched = std::collections::BTreeSet::new();
    let now = tx.now();
    for step in steps {
        let state = payments.get(&step.order_id).map(|p| p.state);
        let decision = decide(state, &step.input);
        let Some(next) = apply(state, decision).filter(|_| decision != Decision::Ignore) else { continue };
        touched.insert(step.order_id);
        let payment = payments.entry(step.order_id).or_insert_with(|| Payment {
            order_id: step.order_id,
            payment_id: Uuid::now_v7(),
            state: next,
            amount: step.terms.as_ref().map_or(0, |t| t.amount),
            currency: step.terms.as_ref().map_or_else(String::new, |t| t.currency.clone()),
            reason: None,
            lane: step.lane,
            correlation_id: step.cause.correlation_id.to_string(),
            version: 0,
            expires_at: step.terms.as_ref().map_or(now, |t| t.expires_at),
            created_at: now,
            updated_at: now,
        });
        payment.state = next;
        payment.version += 1;
        payment.updated_at = now;
        if step.reason.is_some() {
            payment.reason.clone_from(&step.reason);
        }
        follow_up(tx, payment, decision, step)?;
    }
    let changed: Vec<&Payment> = touched.iter().filter_map(|id| payments.get(id)).collect();
    Ok(store::save(tx, &changed).await?)
}

/// The events and tasks a decision brings.
fn follow_up(tx: &mut Tx, p: &Payment, decision: Decision, step: &Step) -> Result<(), Failure> {
    let (payment_id, order_id, key) = (p.payment_id, p.order_id, p.order_id.to_string());
    let cause = || step.cause.clone();
    match decision {
        Decision::Intend => {
            tx.schedule_for(key, &ChargeTask { order_id }, p.created_at, p.lane, cause())?;
        }
        Decision::Succeed | Decision::SucceedAndRefund => {
            let event =
                PaymentSucceeded { payment_id, order_id, amount: p.amount, currency: p.currency.clone() };
            tx.emit(Emission::new(event, payment_id.to_string(), p.version).lane(p.lane).caused_by(cause()))?;
            if decision == Decision::SucceedAndRefund {
                tx.schedule_for(key, &RefundTask { order_id }, p.updated_at, p.lane, cause())?;
            }
        }
        Decision::Fail => {
            let reason = step.reason.clone().unwrap_or_else(|| "failed".into());
            let event = PaymentFailed { payment_id, order_id, reason };
            tx.emit(Emission::new(event, payment_id.to_string(), p.version).lane(p.lane).caused_by(cause()))?;
        }
        Decision::Refund => {
            tx.schedule_for(key, &RefundTask { order_id }, p.updated_at, p.lane, cause())?;
        }
        Decision::FinishRefund => {
            let event =
                PaymentRefunded { payment_id, order_id, amount: p.amount, currency: p.currency.clone() };
            tx.emit(Emission::new(event, payment_id.to_string(), p.version).lane(p.lane).caused_by(cause()))?;
        }
        Decision::Forbid | Decision::MarkCancelled | Decision::Ignore => {}
    }
    Ok(())
}

fn step<E>(item: &Item<E>, order_id: Uuid, input: Input, terms: Option<Terms>) -> Step {
    Step { order_id, input, reason: None, terms, lane: item.envelope.lane, cause: item.envelope.as_cause() }
}

async fn reserved(Batch(events): Batch<StockReserved>, mut tx: Tx) -> Result<(), Failure> {
    let steps: Vec<Step> = events
        .iter()
        .map(|e| {
            let terms = Terms { amount: e.amount, currency: e.currency.clone(), expires_at: e.expires_at };
            step(e, e.order_id, Input::Reserved, Some(terms))
        })
        .collect();
    advance(&mut tx, &steps).await
}

async fn cancelled(Batch(events): Batch<OrderCancelled>, mut tx: Tx) -> Result<(), Failure> {
    let steps: Vec<Step> = events.iter().map(|e| step(e, e.order_id, Input::OrderCancelled, None)).collect();
    advance(&mut tx, &steps).await
}
