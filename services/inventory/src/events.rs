//! What inventory does about orders: one handler for all that happens to them, so that a batch loads, locks and writes what it changes once.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use axum::extract::State;
use consign::event::Envelope;
use consign::handler::{EventSet, Item, Kind};
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
        .on(happened)
        .upcast(|old: OrderCreatedV1| OrderCreated::from(old))
}

/// What happens to an order.
#[derive(Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "the large one is as frequent as any, and lives as long as a batch"
)]
enum OrderEvent {
    Created(OrderCreated),
    Cancelled(OrderCancelled),
    Confirmed(OrderConfirmed),
    DeadlineExtended(OrderDeadlineExtended),
    Refunded(OrderRefunded),
}

impl EventSet for OrderEvent {
    fn kinds() -> Vec<Kind<Self>> {
        vec![
            Kind::of(Self::Created),
            Kind::of(Self::Cancelled),
            Kind::of(Self::Confirmed),
            Kind::of(Self::DeadlineExtended),
            Kind::of(Self::Refunded),
        ]
    }
}

impl OrderEvent {
    fn order_id(&self) -> Uuid {
        match self {
            Self::Created(e) => e.order_id,
            Self::Cancelled(e) => e.order_id,
            Self::Confirmed(e) => e.order_id,
            Self::DeadlineExtended(e) => e.order_id,
            Self::Refunded(e) => e.order_id,
        }
    }
}

async fn happened(
    Batch(events): Batch<OrderEvent>,
    State(reserved): State<Published>,
    mut tx: Tx,
) -> Result<(), Failure> {
    let versions = reserved.now();
    let mut ledger = Ledger::load(&mut tx, &events).await?;
    for Item { event, envelope } in &events {
        let done = match event {
            OrderEvent::Created(order) => ledger.create(&mut tx, order, envelope, &versions),
            OrderEvent::Cancelled(order) => ledger.settle(order.order_id, envelope, domain::cancelled),
            OrderEvent::Confirmed(order) => ledger.settle(order.order_id, envelope, domain::confirmed),
            OrderEvent::DeadlineExtended(order) => {
                ledger.extend(order);
                Ok(())
            }
            OrderEvent::Refunded(order) => ledger.take_back(order, envelope),
        };
        done.map_err(|failure| failure.of(envelope))?;
    }
    Ok(ledger.save(&mut tx).await?)
}

/// What a batch starts from, and where it gets to.
struct Ledger {
    before: Shelf,
    shelf: Shelf,
    reservations: HashMap<Uuid, (Reservation, Lines)>,
    /// What has come back of each order, by refund.
    returned: HashMap<Uuid, HashMap<Uuid, Lines>>,
    new: BTreeMap<Uuid, ReservationRow>,
    changed: BTreeMap<Uuid, Reservation>,
    /// The latest of each, for a statement can change a row only once.
    extended: BTreeMap<Uuid, Timestamp>,
    returns: Vec<(Uuid, Uuid, Lines, bool)>,
    written_off: Vec<store::Movement>,
}

impl Ledger {
    /// Loads the reservations of the orders, then the stock of their products: replicas wait for each other in that order.
    async fn load(tx: &mut Tx, events: &[Item<OrderEvent>]) -> Result<Self, DbError> {
        let orders: Vec<Uuid> = events.iter().map(|e| e.order_id()).collect();
        let reservations = store::reservations(tx, &orders).await?;
        let new = events.iter().filter_map(|e| match &e.event {
            OrderEvent::Created(order) => Some(&order.items),
            _ => None,
        });
        let new = new.flatten().map(|line| line.product_id.as_str());
        let known = reservations.values().flat_map(|(_, lines)| lines.products());
        let products: BTreeSet<&str> = known.chain(new).collect();
        let shelf = store::shelf(tx, &products.into_iter().collect::<Vec<_>>()).await?;
        let refunded = events.iter().filter(|e| matches!(e.event, OrderEvent::Refunded(_)));
        let refunded: Vec<Uuid> = refunded.map(|e| e.order_id()).collect();
        let returned = store::returned(tx, &refunded).await?;
        Ok(Self {
            before: shelf.clone(),
            shelf,
            reservations,
            returned,
            new: BTreeMap::new(),
            changed: BTreeMap::new(),
            extended: BTreeMap::new(),
            returns: Vec::new(),
            written_off: Vec::new(),
        })
    }

    fn current(&self, order: Uuid) -> (Option<Reservation>, Lines) {
        let found = self.reservations.get(&order);
        (found.map(|(r, _)| *r), found.map(|(_, l)| l.clone()).unwrap_or_default())
    }

    fn set(
        &mut self,
        order: Uuid,
        envelope: &Envelope,
        to: Reservation,
        lines: Lines,
        expires_at: Option<Timestamp>,
    ) {
        if let Some(new) = self.new.get_mut(&order) {
            new.status = to;
        } else if self.reservations.contains_key(&order) {
            self.changed.insert(order, to);
        } else {
            let row = ReservationRow {
                order_id: order,
                status: to,
                lines: lines.clone(),
                correlation_id: envelope.cause.correlation_id.to_string(),
                expires_at,
            };
            self.new.insert(order, row);
        }
        self.reservations.insert(order, (to, lines));
    }

    fn create(
        &mut self,
        tx: &mut Tx,
        order: &OrderCreated,
        envelope: &Envelope,
        versions: &[u32],
    ) -> Result<(), Failure> {
        let id = order.order_id;
        let lines = Lines::of(&order.items);
        let (current, _) = self.current(id);
        match domain::created(&mut self.shelf, current, &lines) {
            Outcome::Unchanged => {}
            Outcome::Now(to) => {
                self.set(id, envelope, to, lines, Some(order.deadline));
                let event = StockReserved {
                    order_id: id,
                    total: order.total.clone(),
                    expires_at: order.deadline,
                    payment_method: order.payment_method.clone(),
                };
                let emission = Emission::new(event, id.to_string(), 1)
                    .also(|new| StockReservedV1::from(new))
                    .versions(versions);
                tx.emit(emission.lane(envelope.lane).caused_by(envelope.as_cause()))?;
            }
            Outcome::Short(shortages) => {
                self.set(id, envelope, Reservation::Rejected, lines, None);
                let emission = Emission::new(StockRejected { order_id: id, shortages }, id.to_string(), 1);
                tx.emit(emission.lane(envelope.lane).caused_by(envelope.as_cause()))?;
            }
        }
        Ok(())
    }

    fn settle(
        &mut self,
        id: Uuid,
        envelope: &Envelope,
        decide: fn(&mut Shelf, Option<Reservation>, &Lines) -> Result<Outcome, Misfit>,
    ) -> Result<(), Failure> {
        let (current, lines) = self.current(id);
        match decide(&mut self.shelf, current, &lines) {
            Ok(Outcome::Now(to)) => {
                self.set(id, envelope, to, lines, None);
                Ok(())
            }
            Ok(Outcome::Unchanged | Outcome::Short(_)) => Ok(()),
            Err(e) => Err(misfit(e)),
        }
    }

    fn extend(&mut self, order: &OrderDeadlineExtended) {
        let until = self.extended.entry(order.order_id).or_insert(order.deadline);
        *until = order.deadline.max(*until);
    }

    fn take_back(&mut self, order: &OrderRefunded, envelope: &Envelope) -> Result<(), Failure> {
        let id = order.order_id;
        let (current, sold) = self.current(id);
        let before = self.returned.entry(id).or_default();
        if before.contains_key(&order.refund_id) {
            return Ok(());
        }
        let all = before.values().fold(Lines::default(), Lines::plus);
        let back = Lines::returned(&order.lines);
        domain::returned(&mut self.shelf, current, &sold, &all, &back, order.restock).map_err(misfit)?;
        if !order.restock {
            self.written_off.extend(back.iter().map(|(product, quantity)| store::Movement {
                product_id: product.to_owned(),
                delta: -quantity,
                reason: format!("given back by order {id}, written off"),
                correlation_id: envelope.cause.correlation_id.to_string(),
            }));
        }
        before.insert(order.refund_id, back.clone());
        self.returns.push((order.refund_id, id, back, order.restock));
        Ok(())
    }

    async fn save(self, tx: &mut Tx) -> Result<(), DbError> {
        store::insert_reservations(tx, &self.new.into_values().collect::<Vec<_>>()).await?;
        store::update_reservations(tx, &self.changed.into_iter().collect::<Vec<_>>()).await?;
        store::extend(tx, &self.extended.into_iter().collect::<Vec<_>>()).await?;
        store::insert_returns(tx, &self.returns).await?;
        store::insert_movements(tx, &self.written_off).await?;
        store::save_shelf(tx, &self.before, &self.shelf).await
    }
}

/// What may still arrive is waited for; what cannot be is for a person to look at.
fn misfit(e: Misfit) -> Failure {
    match e {
        Misfit::NotReservedYet | Misfit::NotSoldYet => Failure::retry(e),
        Misfit::MoreThanSold | Misfit::Impossible { .. } => Failure::dead_letter(e),
    }
}
