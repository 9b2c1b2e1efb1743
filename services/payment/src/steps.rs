//! A payment's steps: events and outcomes of calls all go through [`advance`], which decides, writes and announces for a whole batch.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use consign::event::{Cause, Envelope};
use consign::handler::Item;
use consign::{Batch, Consumer, ConsumerOptions, DbError, Emission, Failure, Lane, Timestamp, Tx};
use contracts::{
    OrderCancelled, OrderDeadlineExtended, OrderRefundRequested, PaymentFailed, PaymentRefundRejected,
    PaymentRefunded, PaymentSucceeded, StockReserved, StockReservedV1, streams,
};
use uuid::Uuid;

use crate::calls::{ChargeTask, RefundTask};
use crate::domain::{Decision, Input, apply, decide};
use crate::store::{self, Payment, Refund};

/// What inventory says about orders.
pub fn inventory(options: ConsumerOptions) -> Consumer<()> {
    Consumer::new("payment-inventory", streams::INVENTORY)
        .options(options)
        .on(reserved)
        .upcast(|old: StockReservedV1| StockReserved::from(old))
}

/// What order says about orders.
pub fn orders(options: ConsumerOptions) -> Consumer<()> {
    Consumer::new("payment-orders", streams::ORDERS)
        .options(options)
        .on(cancelled)
        .on(deadline_extended)
        .on(refund_requested)
}

/// Something that happened to one payment.
#[derive(Clone, Debug)]
pub struct Step {
    pub order_id: Uuid,
    pub what: What,
    pub lane: Lane,
    pub cause: Cause,
    /// The event it came with, to be named if it is at fault.
    pub event: Option<Arc<Envelope>>,
}

/// What happened, with all that is to be known of it.
#[derive(Clone, Debug)]
pub enum What {
    Reserved(Terms),
    OrderCancelled,
    DeadlineExtended(Timestamp),
    Prepared(String),
    Charged,
    NotCharged(String),
    RefundRequested { refund_id: Uuid, amount: i64, reason: Option<String> },
    RefundDone(Uuid),
}

/// What is to be paid, with what, and until when.
#[derive(Clone, Debug)]
pub struct Terms {
    pub amount: i64,
    pub currency: String,
    pub method: Option<String>,
    pub expires_at: Timestamp,
}

/// What a batch starts from, and where it gets to.
struct Book {
    payments: HashMap<Uuid, Payment>,
    refunds: HashMap<Uuid, Refund>,
    made: BTreeSet<Uuid>,
    changed: BTreeSet<Uuid>,
    changed_refunds: BTreeSet<Uuid>,
}

/// Applies steps in order: the same few statements, however many.
pub async fn advance(tx: &mut Tx, steps: &[Step]) -> Result<(), Failure> {
    let ids: Vec<Uuid> = steps.iter().map(|s| s.order_id).collect();
    let mut book = Book {
        payments: store::load(tx, &ids).await?,
        refunds: HashMap::new(),
        made: BTreeSet::new(),
        changed: BTreeSet::new(),
        changed_refunds: BTreeSet::new(),
    };
    let mut refunds: Vec<Uuid> = steps
        .iter()
        .filter_map(|s| match s.what {
            What::RefundRequested { refund_id, .. } | What::RefundDone(refund_id) => Some(refund_id),
            _ => None,
        })
        .collect();
    refunds.sort_unstable();
    book.refunds = store::load_refunds(tx, &refunds).await?;
    for step in steps {
        apply_step(tx, &mut book, step)?;
    }
    let new: Vec<&Payment> = book.made.iter().filter_map(|id| book.payments.get(id)).collect();
    store::insert(tx, &new).await?;
    let changed: Vec<&Payment> =
        book.changed.difference(&book.made).filter_map(|id| book.payments.get(id)).collect();
    store::update(tx, &changed).await?;
    let refunds: Vec<&Refund> = book.changed_refunds.iter().filter_map(|id| book.refunds.get(id)).collect();
    Ok(store::save_refunds(tx, &refunds).await?)
}

fn input(step: &Step, book: &Book) -> Option<Input> {
    Some(match &step.what {
        What::Reserved(terms) => Input::Reserved { amount: terms.amount },
        What::OrderCancelled => Input::OrderCancelled,
        What::DeadlineExtended(until) => {
            let later = book.payments.get(&step.order_id).is_some_and(|p| p.expires_at < *until);
            return later.then_some(Input::DeadlineExtended);
        }
        What::Prepared(_) => Input::Prepared,
        What::Charged => Input::Charged,
        What::NotCharged(_) => Input::NotCharged,
        // Heard of before: decided before.
        What::RefundRequested { refund_id, .. } if book.refunds.contains_key(refund_id) => return None,
        What::RefundRequested { amount, .. } => Input::RefundRequested { amount: *amount },
        What::RefundDone(refund_id) => {
            let refund = book.refunds.get(refund_id).filter(|r| r.status == "pending")?;
            Input::RefundDone { amount: refund.amount }
        }
    })
}

fn apply_step(tx: &mut Tx, book: &mut Book, step: &Step) -> Result<(), Failure> {
    let Some(input) = input(step, book) else { return Ok(()) };
    let state = book.payments.get(&step.order_id).map(|p| p.state);
    let decision = decide(state, input);
    if decision == Decision::NotYet {
        let failure = Failure::retry(format!("order {} is not paid yet", step.order_id));
        return Err(match &step.event {
            Some(envelope) => failure.of(envelope),
            None => failure,
        });
    }
    let Some(next) = apply(state, decision).filter(|_| decision != Decision::Ignore) else { return Ok(()) };
    let now = tx.now();
    if let Entry::Vacant(place) = book.payments.entry(step.order_id) {
        let terms = if let What::Reserved(terms) = &step.what { Some(terms) } else { None };
        place.insert(Payment {
            order_id: step.order_id,
            payment_id: Uuid::now_v7(),
            state: next,
            currency: terms.map_or_else(String::new, |t| t.currency.clone()),
            method: terms.and_then(|t| t.method.clone()),
            reference: None,
            reason: None,
            lane: step.lane,
            correlation_id: step.cause.correlation_id.to_string(),
            version: 0,
            expires_at: terms.map_or(now, |t| t.expires_at),
            created_at: now,
            updated_at: now,
        });
        book.made.insert(step.order_id);
    }
    let Some(payment) = book.payments.get_mut(&step.order_id) else { return Ok(()) };
    book.changed.insert(step.order_id);
    let rest = payment.state.refundable();
    payment.state = next;
    payment.version += 1;
    match &step.what {
        What::DeadlineExtended(until) => payment.expires_at = *until,
        What::Prepared(reference) => payment.reference = Some(reference.clone()),
        What::NotCharged(why) => payment.reason = Some(why.clone()),
        _ => {}
    }
    let refund = |refund_id, amount, status: &str, reason: Option<String>| Refund {
        refund_id,
        order_id: step.order_id,
        amount,
        status: status.to_owned(),
        reason,
        created_at: now,
        updated_at: now,
    };
    let changed = match (&step.what, decision) {
        // The one refund that a cancelled order has, and that nobody asked for by itself: its id is the payment's.
        (_, Decision::SucceedAndRefund | Decision::RefundRest) if rest > 0 => {
            Some(refund(payment.payment_id, rest, "pending", Some("the order was cancelled".into())))
        }
        (What::RefundRequested { refund_id, reason, .. }, Decision::Refund { amount }) => {
            Some(refund(*refund_id, amount, "pending", reason.clone()))
        }
        (What::RefundRequested { refund_id, amount, .. }, Decision::RejectRefund(why)) => {
            Some(refund(*refund_id, *amount, "rejected", Some(why.into())))
        }
        (What::RefundDone(refund_id), Decision::FinishRefund { amount }) => {
            Some(refund(*refund_id, amount, "done", None))
        }
        _ => None,
    };
    follow_up(tx, payment, decision, step, changed.as_ref())?;
    if let Some(refund) = changed {
        book.changed_refunds.insert(refund.refund_id);
        book.refunds.insert(refund.refund_id, refund);
    }
    Ok(())
}

/// The events and tasks a decision brings.
fn follow_up(
    tx: &mut Tx,
    p: &Payment,
    decision: Decision,
    step: &Step,
    refund: Option<&Refund>,
) -> Result<(), Failure> {
    let (payment_id, order_id, currency) = (p.payment_id, p.order_id, p.currency.clone());
    let now = tx.now();
    match decision {
        Decision::Intend { .. } => charge(tx, p, now, false, step.cause.clone())?,
        // On to the next step of the call: a task of its own, so that the reference is kept.
        Decision::Proceed => charge(tx, p, now, true, step.cause.clone())?,
        // It waits for its retry, or for the order service's word; either wait is over now. What is a dead letter waits for an operator: a task made
        // here would wait, with the payment locked, for whoever is just recording an outcome and waits for the payment.
        Decision::MarkCancelled | Decision::Extend => tx.expedite_task::<ChargeTask>(order_id.to_string()),
        Decision::Succeed | Decision::SucceedAndRefund => {
            emit(tx, p, step, PaymentSucceeded { payment_id, order_id, amount: p.state.amount, currency })?;
        }
        Decision::Fail => {
            let reason = p.reason.clone().unwrap_or_else(|| "failed".into());
            emit(tx, p, step, PaymentFailed { payment_id, order_id, reason })?;
        }
        Decision::RejectRefund(reason) => {
            if let Some(refund) = refund {
                let event =
                    PaymentRefundRejected { refund_id: refund.refund_id, order_id, reason: reason.into() };
                emit(tx, p, step, event)?;
            }
        }
        Decision::FinishRefund { amount } => {
            let refund_id = refund.map(|r| r.refund_id).filter(|id| *id != payment_id);
            emit(tx, p, step, PaymentRefunded { payment_id, order_id, amount, currency, refund_id })?;
        }
        Decision::Refund { .. }
        | Decision::RefundRest
        | Decision::Forbid
        | Decision::NotYet
        | Decision::Ignore => {}
    }
    if let Some(refund) = refund.filter(|r| r.status == "pending") {
        let task = RefundTask { order_id, refund_id: Some(refund.refund_id) };
        tx.schedule_for(refund.refund_id.to_string(), &task, now, p.lane, step.cause.clone())?;
    }
    Ok(())
}

fn emit<E: consign::Event>(tx: &mut Tx, p: &Payment, step: &Step, event: E) -> Result<(), Failure> {
    let emission = Emission::new(event, p.payment_id.to_string(), p.version);
    tx.emit(emission.lane(p.lane).caused_by(step.cause.clone()))?;
    Ok(())
}

/// Leaves the call that charges for when it is due.
pub fn charge(tx: &mut Tx, p: &Payment, due: Timestamp, tried: bool, cause: Cause) -> Result<(), DbError> {
    let task = ChargeTask { order_id: p.order_id, tried };
    tx.schedule_for(p.order_id.to_string(), &task, due, p.lane, cause)
}

fn step<E>(item: &Item<E>, order_id: Uuid, what: What) -> Step {
    let envelope = &item.envelope;
    Step {
        order_id,
        what,
        lane: envelope.lane,
        cause: envelope.as_cause(),
        event: Some(Arc::clone(envelope)),
    }
}

async fn reserved(Batch(events): Batch<StockReserved>, mut tx: Tx) -> Result<(), Failure> {
    let terms = |e: &StockReserved| Terms {
        amount: e.total.amount,
        currency: e.total.currency.clone(),
        method: e.payment_method.clone(),
        expires_at: e.expires_at,
    };
    let steps: Vec<Step> = events.iter().map(|e| step(e, e.order_id, What::Reserved(terms(e)))).collect();
    advance(&mut tx, &steps).await
}

async fn cancelled(Batch(events): Batch<OrderCancelled>, mut tx: Tx) -> Result<(), Failure> {
    let steps: Vec<Step> = events.iter().map(|e| step(e, e.order_id, What::OrderCancelled)).collect();
    advance(&mut tx, &steps).await
}

async fn deadline_extended(Batch(events): Batch<OrderDeadlineExtended>, mut tx: Tx) -> Result<(), Failure> {
    let steps: Vec<Step> =
        events.iter().map(|e| step(e, e.order_id, What::DeadlineExtended(e.deadline))).collect();
    advance(&mut tx, &steps).await
}

async fn refund_requested(Batch(events): Batch<OrderRefundRequested>, mut tx: Tx) -> Result<(), Failure> {
    let what = |e: &OrderRefundRequested| What::RefundRequested {
        refund_id: e.refund_id,
        amount: e.amount,
        reason: e.reason.clone(),
    };
    let steps: Vec<Step> = events.iter().map(|e| step(e, e.order_id, what(e))).collect();
    advance(&mut tx, &steps).await
}
