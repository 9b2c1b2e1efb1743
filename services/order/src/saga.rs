//! The saga's steps: events, cancellations and deadlines all go through [`advance`], which decides, writes and announces for a whole batch.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use consign::event::{Cause, Envelope};
use consign::{Batch, Consumer, ConsumerOptions, DbError, Emission, EventId, Failure, Timestamp, Tx};
use contracts::{
    GatewayUnavailable, OrderCancelled, OrderConfirmed, OrderDeadlineExtended, OrderRefunded, PaymentFailed,
    PaymentRefundRejected, PaymentRefunded, PaymentSucceeded, ProductChanged, StockRejected, StockReserved,
    StockReservedV1, streams,
};
use uuid::Uuid;

use crate::deadline::{self, Deadline};
use crate::domain::{Decision, Input, Order, Status, decide};
use crate::refunds::{Progress, Refund};
use crate::store::{self, Entry};

/// What inventory says about orders.
pub fn inventory(options: ConsumerOptions) -> Consumer<()> {
    Consumer::new("order-inventory", streams::INVENTORY)
        .options(options)
        .on(reserved)
        .upcast(|old: StockReservedV1| StockReserved::from(old))
        .on(rejected)
}

/// What payment says about orders.
pub fn payments(options: ConsumerOptions) -> Consumer<()> {
    Consumer::new("order-payments", streams::PAYMENTS)
        .options(options)
        .on(paid)
        .on(payment_failed)
        .on(refunded)
        .on(refund_rejected)
        .on(gateway_unavailable)
}

/// What inventory says about products.
pub fn products(options: ConsumerOptions) -> Consumer<()> {
    Consumer::new("order-products", streams::PRODUCTS).options(options).on(product_changed)
}

/// Something that happened to one order.
#[derive(Debug)]
pub struct Step {
    pub order_id: Uuid,
    pub input: Input,
    /// For the timeline.
    pub event: String,
    pub detail: Option<String>,
    pub event_id: Option<EventId>,
    pub cause: Cause,
}

/// What became of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advanced {
    /// Decided so.
    Decided(Decision),
    /// There is no such order, at least not yet.
    Unknown,
}

/// Applies steps in order: one load, one update, one insert, however many. Unknown orders are reported, not changed.
pub async fn advance(tx: &mut Tx, steps: &[Step]) -> Result<(Vec<Advanced>, HashMap<Uuid, Order>), Failure> {
    let ids: Vec<Uuid> = steps.iter().map(|s| s.order_id).collect();
    let mut orders = store::load(tx, &ids).await?;
    let before: HashMap<Uuid, u64> = orders.values().map(|o| (o.id, o.version)).collect();
    let refund = |input: Input| match input {
        Input::RefundDone(id) | Input::RefundRejected(id) => Some(id),
        _ => None,
    };
    let mut refunds: Vec<Uuid> = steps.iter().filter_map(|s| refund(s.input)).collect();
    refunds.sort_unstable();
    let mut refunds = store::load_refunds(tx, &refunds).await?;
    let mut refunds_changed = BTreeSet::new();
    let now = tx.now();
    let mut entries = Vec::new();
    let mut results = Vec::with_capacity(steps.len());
    for step in steps {
        let Some(order) = orders.get_mut(&step.order_id) else {
            results.push(Advanced::Unknown);
            continue;
        };
        // A refund that has ended, or that is not ours, changes nothing.
        let pending = |id| refunds.get(&id).is_some_and(|r: &Refund| r.progress == Progress::Pending);
        let decision = match refund(step.input) {
            Some(id) if !pending(id) => Decision::Ignore,
            _ => decide(order.status, step.input),
        };
        results.push(Advanced::Decided(decision));
        if matches!(decision, Decision::Ignore | Decision::TooLate) {
            continue;
        }
        order.version += 1;
        order.updated_at = now;
        entries.push(Entry {
            order_id: order.id,
            version: order.version,
            event: step.event.clone(),
            detail: step.detail.clone(),
            event_id: step.event_id,
        });
        match decision {
            Decision::Reserve => order.status = Status::Reserved,
            Decision::Confirm(payment_id) => {
                order.status = Status::Confirmed;
                order.payment_id = Some(payment_id);
                let event = OrderConfirmed { order_id: order.id, payment_id };
                announce(tx, order, event, "orders.confirmed", None, step, &mut entries)?;
            }
            Decision::Cancel(reason) => {
                order.status = Status::Cancelled;
                order.reason = Some(reason.as_str().to_owned());
                let event = OrderCancelled { order_id: order.id, reason };
                let detail = Some(reason.as_str().to_owned());
                announce(tx, order, event, "orders.cancelled", detail, step, &mut entries)?;
            }
            Decision::Extend(until) => {
                order.deadline = until;
                let event = OrderDeadlineExtended { order_id: order.id, deadline: until };
                let detail = Some(format!("the payment gateway is out of reach; until {until}"));
                announce(tx, order, event, "orders.deadline_extended", detail, step, &mut entries)?;
                deadline::schedule(tx, order, step.cause.clone())?;
            }
            Decision::FinishRefund(id) | Decision::RejectRefund(id) => {
                let Some(refund) = refunds.get_mut(&id) else { continue };
                refunds_changed.insert(id);
                order.refunding -= refund.amount;
                if let Decision::RejectRefund(_) = decision {
                    refund.progress = Progress::Rejected;
                    refund.rejection.clone_from(&step.detail);
                    continue;
                }
                refund.progress = Progress::Done;
                order.refunded += refund.amount;
                let (lines, restock) = (refund.lines.clone(), refund.restock);
                let detail =
                    format!("{} {}", refund.amount, if restock { "back in stock" } else { "written off" });
                let event = OrderRefunded { refund_id: id, order_id: order.id, lines, restock };
                announce(tx, order, event, "orders.refunded", Some(detail), step, &mut entries)?;
            }
            Decision::Note | Decision::Ignore | Decision::TooLate => {}
        }
    }
    let refunds: Vec<&Refund> = refunds_changed.iter().filter_map(|id| refunds.get(id)).collect();
    store::update_refunds(tx, &refunds).await?;
    let changed: Vec<(u64, &Order)> = orders
        .values()
        .filter_map(|o| before.get(&o.id).filter(|v| **v != o.version).map(|v| (*v, o)))
        .collect();
    let expected = changed.len() as u64;
    if store::update(tx, &changed).await? != expected {
        return Err(DbError::Conflict("an order").into());
    }
    store::append(tx, &entries).await?;
    Ok((results, orders))
}

fn announce<E: consign::Event>(
    tx: &mut Tx,
    order: &mut Order,
    event: E,
    name: &str,
    detail: Option<String>,
    step: &Step,
    entries: &mut Vec<Entry>,
) -> Result<(), Failure> {
    order.version += 1;
    let emission = Emission::new(event, order.id.to_string(), order.version)
        .lane(order.lane)
        .caused_by(step.cause.clone());
    let event_id = tx.emit(emission)?;
    entries.push(Entry {
        order_id: order.id,
        version: order.version,
        event: name.to_owned(),
        detail,
        event_id: Some(event_id),
    });
    if order.status.is_final() {
        tx.cancel_task::<Deadline>(order.id.to_string());
    }
    Ok(())
}

/// Steps from events; one about an unknown order is retried, for its order may still be under way, and in the end dead-lettered.
async fn follow<E>(
    tx: &mut Tx,
    items: &[consign::handler::Item<E>],
    step: impl Fn(&E) -> (Uuid, Input, Option<String>),
) -> Result<(), Failure> {
    let steps: Vec<Step> = items
        .iter()
        .map(|item| {
            let (order_id, input, detail) = step(&item.event);
            let envelope: &Envelope = &item.envelope;
            Step {
                order_id,
                input,
                event: envelope.event_type.clone().into_owned(),
                detail,
                event_id: Some(envelope.id),
                cause: envelope.as_cause(),
            }
        })
        .collect();
    let (results, _) = advance(tx, &steps).await?;
    match results.iter().position(|r| *r == Advanced::Unknown) {
        Some(i) => {
            Err(Failure::retry(format!("there is no order {}", steps[i].order_id)).of(&items[i].envelope))
        }
        None => Ok(()),
    }
}

async fn reserved(Batch(events): Batch<StockReserved>, mut tx: Tx) -> Result<(), Failure> {
    follow(&mut tx, &events, |e| (e.order_id, Input::Reserved, None)).await
}

async fn rejected(Batch(events): Batch<StockRejected>, mut tx: Tx) -> Result<(), Failure> {
    follow(&mut tx, &events, |e| {
        let short: Vec<String> = e
            .shortages
            .iter()
            .map(|s| format!("{}: {} of {}", s.product_id, s.available, s.requested))
            .collect();
        (e.order_id, Input::Rejected, Some(short.join(", ")))
    })
    .await
}

async fn paid(Batch(events): Batch<PaymentSucceeded>, mut tx: Tx) -> Result<(), Failure> {
    follow(&mut tx, &events, |e| {
        (e.order_id, Input::Paid(e.payment_id), Some(format!("{} {}", e.amount, e.currency)))
    })
    .await
}

async fn payment_failed(Batch(events): Batch<PaymentFailed>, mut tx: Tx) -> Result<(), Failure> {
    follow(&mut tx, &events, |e| (e.order_id, Input::PaymentFailed, Some(e.reason.clone()))).await
}

async fn refunded(Batch(events): Batch<PaymentRefunded>, mut tx: Tx) -> Result<(), Failure> {
    follow(&mut tx, &events, |e| {
        let input = e.refund_id.map_or(Input::Refunded, Input::RefundDone);
        (e.order_id, input, Some(format!("{} {}", e.amount, e.currency)))
    })
    .await
}

async fn refund_rejected(Batch(events): Batch<PaymentRefundRejected>, mut tx: Tx) -> Result<(), Failure> {
    follow(&mut tx, &events, |e| (e.order_id, Input::RefundRejected(e.refund_id), Some(e.reason.clone())))
        .await
}

async fn gateway_unavailable(Batch(events): Batch<GatewayUnavailable>, mut tx: Tx) -> Result<(), Failure> {
    let mut latest: BTreeMap<&str, Timestamp> = BTreeMap::new();
    for event in &events {
        let until = latest.entry(&event.gateway).or_insert(event.until);
        *until = event.until.max(*until);
    }
    Ok(store::save_outages(&mut tx, &latest.into_iter().collect::<Vec<_>>()).await?)
}

async fn product_changed(Batch(events): Batch<ProductChanged>, mut tx: Tx) -> Result<(), Failure> {
    let mut newest: BTreeMap<&str, &ProductChanged> = BTreeMap::new();
    for event in &events {
        let known = newest.entry(&event.product_id).or_insert(&event.event);
        if known.version < event.version {
            *known = &event.event;
        }
    }
    Ok(store::save_products(&mut tx, &newest.into_values().collect::<Vec<_>>()).await?)
}
