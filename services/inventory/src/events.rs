//! What inventory does about orders. Each handler takes a whole batch: its statements do not grow with it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use axum::extract::State;
use consign::handler::Item;
use consign::versions::Published;
use consign::{Batch, Consumer, ConsumerOptions, DbError, Emission, Failure, Timestamp, Tx};
use contracts::{
    OrderCancelled, OrderConfirmed, OrderCreated, OrderCreatedV1, OrderDeadlineExtended, OrderRefunded,
    StockRejected, StockReserved, StockReservedV1, streams,
};
use uuid::Uuid;

use crate::domain::{self, Lines, Misfit, Outcome, Reservation, Shelf};
use crate::store::{self, ReservationRow};

/// Inventory's one consumer.
pub fn orders(options: ConsumerOptions) -> Consumer<Published> {
    Consumer::new("inventory-orders", streams::ORDERS)
        .options(options)
        .on(created)
        .upcast(|old: OrderCreatedV1| OrderCreated::from(old))
        .on(cancelled)
        .on(confirmed)
        .on(deadline_extended)
        .on(refunded)
}

/// What a batch starts from, and where it gets to.
struct Ledger {
    before: Shelf,
    shelf: Shelf,
    reservations: HashMap<Uuid, (Reservation, Lines)>,
    new: BTreeMap<Uuid, ReservationRow>,
    changed: BTreeMap<Uuid, Reservation>,
}

impl Ledger {
    /// Loads the reservations of the orders and the stock of their products, and of `more`.
    async fn load(tx: &mut Tx, orders: &[Uuid], more: &[Lines]) -> Result<Self, DbError> {
        let reservations = store::reservations(tx, orders).await?;
        let known = reservations.values().map(|(_, lines)| lines);
        let products: BTreeSet<&str> = known.chain(more).flat_map(Lines::products).collect();
        let shelf = store::shelf(tx, &products.into_iter().collect::<Vec<_>>()).await?;
        Ok(Self {
            before: shelf.clone(),
            shelf,
            reservations,
            new: BTreeMap::new(),
            changed: BTreeMap::new(),
        })
    }

    fn current(&self, order: Uuid) -> (Option<Reservation>, Lines) {
        let found = self.reservations.get(&order);
        (found.map(|(r, _)| *r), found.map(|(_, l)| l.clone()).unwrap_or_default())
    }

    fn set<E>(
        &mut self,
        order: Uuid,
        item: &Item<E>,
        to: Reservation,
        lines: Lines,
        expires_at: Option<Timestamp>,
    ) {
        if let Some(new) = self.new.get_mut(&order) {
            new.status = to;
        } else if self.reservations.contains_key(&order) {
            self.changed.insert(order, to);
        } else {
            let correlation_id = item.envelope.cause.correlation_id.to_string();
            let row = ReservationRow {
                order_id: order,
                status: to,
                lines: lines.clone(),
                correlation_id,
                expires_at,
            };
            self.new.insert(order, row);
        }
        self.reservations.insert(order, (to, lines));
    }

    async fn save(self, tx: &mut Tx) -> Result<(), DbError> {
        store::insert_reservations(tx, &self.new.into_values().collect::<Vec<_>>()).await?;
        store::update_reservations(tx, &self.changed.into_iter().collect::<Vec<_>>()).await?;
        store::save_shelf(tx, &self.before, &self.shelf).await
    }
}

async fn created(
    Batch(orders): Batch<OrderCreated>,
    State(reserved): State<Published>,
    mut tx: Tx,
) -> Result<(), Failure> {
    let versions = reserved.now();
    let ids: Vec<Uuid> = orders.iter().map(|o| o.order_id).collect();
    let lines: Vec<Lines> = orders.iter().map(|o| Lines::of(&o.items)).collect();
    let mut ledger = Ledger::load(&mut tx, &ids, &lines).await?;
    for (order, lines) in orders.iter().zip(lines) {
        let id = order.order_id;
        let (current, _) = ledger.current(id);
        let cause = order.envelope.as_cause();
        let lane = order.envelope.lane;
        match domain::created(&mut ledger.shelf, current, &lines) {
            Outcome::Unchanged => {}
            Outcome::Now(to) => {
                ledger.set(id, order, to, lines, Some(order.deadline));
                let event = StockReserved {
                    order_id: order.order_id,
                    total: order.total.clone(),
                    expires_at: order.deadline,
                    payment_method: order.payment_method.clone(),
                };
                let emission = Emission::new(event, id.to_string(), 1)
                    .also(|new| StockReservedV1::from(new))
                    .versions(&versions)
                    .lane(lane)
                    .caused_by(cause);
                tx.emit(emission).map_err(|e| Failure::from(e).of(&order.envelope))?;
            }
            Outcome::Short(shortages) => {
                ledger.set(id, order, Reservation::Rejected, lines, None);
                let event = StockRejected { order_id: order.order_id, shortages };
                tx.emit(Emission::new(event, id.to_string(), 1).lane(lane).caused_by(cause))
                    .map_err(|e| Failure::from(e).of(&order.envelope))?;
            }
        }
    }
    Ok(ledger.save(&mut tx).await?)
}

async fn cancelled(Batch(orders): Batch<OrderCancelled>, mut tx: Tx) -> Result<(), Failure> {
    let ids: Vec<Uuid> = orders.iter().map(|o| o.order_id).collect();
    let mut ledger = Ledger::load(&mut tx, &ids, &[]).await?;
    for order in &orders {
        let id = order.order_id;
        let (current, lines) = ledger.current(id);
        let outcome = domain::cancelled(&mut ledger.shelf, current, &lines);
        settle(&mut ledger, order, id, lines, outcome)?;
    }
    Ok(ledger.save(&mut tx).await?)
}

async fn confirmed(Batch(orders): Batch<OrderConfirmed>, mut tx: Tx) -> Result<(), Failure> {
    let ids: Vec<Uuid> = orders.iter().map(|o| o.order_id).collect();
    let mut ledger = Ledger::load(&mut tx, &ids, &[]).await?;
    for order in &orders {
        let id = order.order_id;
        let (current, lines) = ledger.current(id);
        let outcome = domain::confirmed(&mut ledger.shelf, current, &lines);
        settle(&mut ledger, order, id, lines, outcome)?;
    }
    Ok(ledger.save(&mut tx).await?)
}

async fn deadline_extended(Batch(orders): Batch<OrderDeadlineExtended>, mut tx: Tx) -> Result<(), Failure> {
    // The latest of each, for a statement can change a row only once.
    let mut latest: BTreeMap<Uuid, Timestamp> = BTreeMap::new();
    for order in &orders {
        let until = latest.entry(order.order_id).or_insert(order.deadline);
        *until = order.deadline.max(*until);
    }
    Ok(store::extend(&mut tx, &latest.into_iter().collect::<Vec<_>>()).await?)
}

async fn refunded(Batch(orders): Batch<OrderRefunded>, mut tx: Tx) -> Result<(), Failure> {
    let ids: Vec<Uuid> = orders.iter().map(|o| o.order_id).collect();
    let mut ledger = Ledger::load(&mut tx, &ids, &[]).await?;
    let mut returned = store::returned(&mut tx, &ids).await?;
    let mut new = Vec::new();
    let mut written_off = Vec::new();
    for order in &orders {
        let before = returned.entry(order.order_id).or_default();
        if before.contains_key(&order.refund_id) {
            continue;
        }
        let all = before.values().fold(Lines::default(), Lines::plus);
        let back = Lines::returned(&order.lines);
        let (current, sold) = ledger.current(order.order_id);
        domain::returned(&mut ledger.shelf, current, &sold, &all, &back, order.restock).map_err(|e| {
            let failure = match e {
                Misfit::NotSoldYet => Failure::retry(e),
                _ => Failure::dead_letter(e),
            };
            failure.of(&order.envelope)
        })?;
        if !order.restock {
            written_off.extend(back.iter().map(|(id, quantity)| (id.to_owned(), quantity, order)));
        }
        before.insert(order.refund_id, back.clone());
        new.push((order.refund_id, order.order_id, back, order.restock));
    }
    let movements: Vec<store::Movement> = written_off
        .into_iter()
        .map(|(product_id, quantity, order)| store::Movement {
            product_id,
            delta: -quantity,
            reason: format!("given back by order {}, written off", order.order_id),
            correlation_id: order.envelope.cause.correlation_id.to_string(),
        })
        .collect();
    store::insert_returns(&mut tx, &new).await?;
    store::insert_movements(&mut tx, &movements).await?;
    Ok(ledger.save(&mut tx).await?)
}

fn settle<E>(
    ledger: &mut Ledger,
    item: &Item<E>,
    id: Uuid,
    lines: Lines,
    outcome: Result<Outcome, Misfit>,
) -> Result<(), Failure> {
    match outcome {
        Ok(Outcome::Now(to)) => {
            ledger.set(id, item, to, lines, None);
            Ok(())
        }
        Ok(Outcome::Unchanged | Outcome::Short(_)) => Ok(()),
        Err(e @ Misfit::NotReservedYet) => Err(Failure::retry(e).of(&item.envelope)),
        Err(e) => Err(Failure::dead_letter(e).of(&item.envelope)),
    }
}
