//! The saga's steps: events, cancellations and deadlines all go through [`advance`], which decides, writes and announces for a whole batch.

use std::collections::{BTreeMap, HashMap};

use consign::event::{Cause, Envelope};
use consign::{Batch, Consumer, ConsumerOptions, DbError, Emission, EventId, Failure, Tx};
use contracts::{
    OrderCancelled, OrderConfirmed, PaymentFailed, PaymentRefunded, PaymentSucceeded, ProductChanged,
    StockRejected, StockReserved, streams,
};
use uuid::Uuid;

use crate::deadline::Deadline;
use crate::domain::{Decision, Input, Order, Status, decide};
use crate::store::{self, Entry};

/// What inventory says about orders.
pub fn inventory(options: ConsumerOptions) -> Consumer<()> {
    Consumer::new("order-inventory", streams::INVENTORY).options(options).on(reserved).on(rejected)
}

/// What payment says about orders.
pub fn payments(options: ConsumerOptions) -> Consumer<()> {
    Consumer::new("order-payments", streams::PAYMENTS)
        .options(options)
        .on(paid)
        .on(payment_failed)
        .on(refunded)
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
    let now = tx.now();
    let mut entries = Vec::new();
    let mut results = Vec::with_capacity(steps.len());
    for step in steps {
        let Some(order) = orders.get_mut(&step.order_id) else {
            results.push(Advanced::Unknown);
            continue;
        };
        let decision = decide(order.status, step.input);
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
            Decision::Note | Decision::Ignore | Decision::TooLate => {}
        }
    }
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
    tx.cancel_task::<Deadline>(order.id.to_string());
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
    follow(&mut tx, &events, |e| (e.order_id, Input::Refunded, Some(format!("{} {}", e.amount, e.currency))))
        .await
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
