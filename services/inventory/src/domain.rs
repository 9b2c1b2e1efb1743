//! What stock can do, without a clock or a database.

use std::collections::BTreeMap;

use contracts::{OrderLine, ReturnedLine, Shortage};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// One product's stock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stock {
    on_hand: i64,
    reserved: i64,
    sold: i64,
}

impl Stock {
    /// As it is stored.
    pub fn stored(on_hand: i64, reserved: i64, sold: i64) -> Self {
        Self { on_hand, reserved, sold }
    }

    /// What can still be reserved.
    pub fn available(&self) -> i64 {
        self.on_hand - self.reserved
    }

    /// What was ever received, less what was written off.
    pub fn received(&self) -> i64 {
        self.on_hand + self.sold
    }

    /// What lies on the shelf.
    pub fn on_hand(&self) -> i64 {
        self.on_hand
    }

    /// What is promised to orders.
    pub fn reserved(&self) -> i64 {
        self.reserved
    }

    /// What was sold.
    pub fn sold(&self) -> i64 {
        self.sold
    }
}

/// Stock by product, as one transaction sees it.
pub type Shelf = BTreeMap<String, Stock>;

/// How much of each product, each product once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lines(BTreeMap<String, i64>);

impl Lines {
    /// The quantities of an order, lines of the same product added up.
    pub fn of(items: &[OrderLine]) -> Self {
        let mut lines = BTreeMap::new();
        for item in items {
            *lines.entry(item.product_id.clone()).or_insert(0) += i64::from(item.quantity);
        }
        Self(lines)
    }

    /// What comes back, pieces of the same product added up.
    pub fn returned(lines: &[ReturnedLine]) -> Self {
        let mut returned = BTreeMap::new();
        for line in lines {
            *returned.entry(line.product_id.clone()).or_insert(0) += i64::from(line.quantity);
        }
        Self(returned)
    }

    /// Both together.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        for (id, quantity) in &other.0 {
            *self.0.entry(id.clone()).or_insert(0) += quantity;
        }
        self
    }

    /// Whether none of these is more than in `other`.
    pub fn fits_in(&self, other: &Self) -> bool {
        self.0.iter().all(|(id, quantity)| other.0.get(id).is_some_and(|of| quantity <= of))
    }

    /// The products.
    pub fn products(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Each product and how much of it.
    pub fn iter(&self) -> impl Iterator<Item = (&str, i64)> {
        self.0.iter().map(|(id, quantity)| (id.as_str(), *quantity))
    }
}

/// Where an order's reservation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reservation {
    /// Stock is promised to the order.
    Reserved,
    /// Stock did not suffice.
    Rejected,
    /// The promise was taken back.
    Released,
    /// The stock is sold.
    Committed,
    /// Cancelled before it was heard of: it must not be reserved any more.
    Cancelled,
}

impl Reservation {
    /// The word in rows.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Rejected => "rejected",
            Self::Released => "released",
            Self::Committed => "committed",
            Self::Cancelled => "cancelled",
        }
    }

    /// From the word in a row.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Reserved, Self::Rejected, Self::Released, Self::Committed, Self::Cancelled]
            .into_iter()
            .find(|r| r.as_str() == word)
    }
}

/// What happened to an order's reservation.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Now in this state.
    Now(Reservation),
    /// Not reserved, for these shortages.
    Short(Vec<Shortage>),
    /// Nothing: it was so already, or must stay as it is.
    Unchanged,
}

/// An event that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Misfit {
    /// Confirmed, but there is no reservation yet: its order may still arrive.
    #[error("confirmed, but not reserved yet")]
    NotReservedYet,
    /// Given back, but not sold yet: its confirmation may still arrive.
    #[error("given back, but not sold yet")]
    NotSoldYet,
    /// More comes back than was sold.
    #[error("more is given back than the order bought")]
    MoreThanSold,
    /// What cannot be: somebody's bookkeeping is wrong.
    #[error("{event} although its reservation is {}", .state.as_str())]
    Impossible {
        /// What arrived.
        event: &'static str,
        /// In which state.
        state: Reservation,
    },
}

/// An order arrived: reserve all lines or none.
pub fn created(shelf: &mut Shelf, current: Option<Reservation>, lines: &Lines) -> Outcome {
    if current.is_some() {
        return Outcome::Unchanged;
    }
    let available = |id: &String| shelf.get(id).map_or(0, Stock::available);
    let shortages: Vec<Shortage> = lines
        .0
        .iter()
        .filter(|(id, quantity)| available(id) < **quantity)
        .map(|(id, &quantity)| Shortage {
            product_id: id.clone(),
            requested: u32::try_from(quantity).unwrap_or(u32::MAX),
            available: available(id),
        })
        .collect();
    if !shortages.is_empty() {
        return Outcome::Short(shortages);
    }
    change(shelf, lines, |s, q| s.reserved += q);
    Outcome::Now(Reservation::Reserved)
}

/// An order was cancelled: release what it holds, and remember it if it is not known yet.
pub fn cancelled(shelf: &mut Shelf, current: Option<Reservation>, lines: &Lines) -> Result<Outcome, Misfit> {
    match current {
        None => Ok(Outcome::Now(Reservation::Cancelled)),
        Some(Reservation::Reserved) => {
            change(shelf, lines, |s, q| s.reserved -= q);
            Ok(Outcome::Now(Reservation::Released))
        }
        Some(Reservation::Rejected | Reservation::Released | Reservation::Cancelled) => {
            Ok(Outcome::Unchanged)
        }
        Some(state @ Reservation::Committed) => Err(Misfit::Impossible { event: "cancelled", state }),
    }
}

/// An order was confirmed: what it holds is sold.
pub fn confirmed(shelf: &mut Shelf, current: Option<Reservation>, lines: &Lines) -> Result<Outcome, Misfit> {
    match current {
        None => Err(Misfit::NotReservedYet),
        Some(Reservation::Reserved) => {
            change(shelf, lines, |s, q| {
                s.reserved -= q;
                s.on_hand -= q;
                s.sold += q;
            });
            Ok(Outcome::Now(Reservation::Committed))
        }
        Some(Reservation::Committed) => Ok(Outcome::Unchanged),
        Some(state) => Err(Misfit::Impossible { event: "confirmed", state }),
    }
}

/// Pieces of a sold order come back, after those in `before`: to the shelf, or to be written off.
pub fn returned(
    shelf: &mut Shelf,
    current: Option<Reservation>,
    sold: &Lines,
    before: &Lines,
    back: &Lines,
    restock: bool,
) -> Result<(), Misfit> {
    match current {
        None | Some(Reservation::Reserved) => return Err(Misfit::NotSoldYet),
        Some(Reservation::Committed) => {}
        Some(state) => return Err(Misfit::Impossible { event: "refunded", state }),
    }
    if !before.clone().plus(back).fits_in(sold) {
        return Err(Misfit::MoreThanSold);
    }
    change(shelf, back, |s, q| {
        s.sold -= q;
        if restock {
            s.on_hand += q;
        }
    });
    Ok(())
}

fn change(shelf: &mut Shelf, lines: &Lines, f: impl Fn(&mut Stock, i64)) {
    for (id, &quantity) in &lines.0 {
        if let Some(stock) = shelf.get_mut(id) {
            f(stock, quantity);
        }
    }
}

/// Stock was received (`delta` above zero) or written off. What is reserved cannot be written off.
pub fn moved(stock: Stock, delta: i64) -> Result<Stock, Stock> {
    match stock.on_hand.checked_add(delta) {
        Some(on_hand) if on_hand >= stock.reserved => Ok(Stock { on_hand, ..stock }),
        _ => Err(stock),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Created(usize),
        Cancelled(usize),
        Confirmed(usize),
        Moved(usize, i64),
        Returned(usize, usize, i64, bool),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..6usize).prop_map(Step::Created),
            (0..6usize).prop_map(Step::Cancelled),
            (0..6usize).prop_map(Step::Confirmed),
            (0..3usize, -20..40i64).prop_map(|(p, d)| Step::Moved(p, d)),
            (0..6usize, 0..3usize, 1..20i64, any::<bool>())
                .prop_map(|(o, p, q, r)| Step::Returned(o, p, q, r)),
        ];
        prop::collection::vec(step, 0..60)
    }

    fn product(i: usize) -> String {
        format!("p{i}")
    }

    fn cent() -> contracts::Money {
        contracts::Money { amount: 1, currency: "EUR".into() }
    }

    fn order_lines() -> impl Strategy<Value = Vec<Vec<OrderLine>>> {
        let line = (0..3usize, 1..15u32).prop_map(|(p, quantity)| OrderLine {
            product_id: product(p),
            quantity,
            unit_price: cent(),
        });
        prop::collection::vec(prop::collection::vec(line, 1..4), 6)
    }

    proptest! {
        /// Whatever arrives in whatever order, as often as it likes: nothing is oversold, nothing is lost.
        #[test]
        fn stock_is_conserved(orders in order_lines(), steps in steps()) {
            let mut shelf: Shelf = (0..3).map(|i| (product(i), Stock::default())).collect();
            let mut received = [0i64; 3];
            let mut states: Vec<Option<Reservation>> = vec![None; 6];
            let mut back: Vec<Lines> = vec![Lines::default(); 6];
            for step in steps {
                match step {
                    Step::Moved(p, delta) => {
                        if let Ok(stock) = moved(shelf[&product(p)], delta) {
                            shelf.insert(product(p), stock);
                            received[p] += delta;
                        }
                    }
                    Step::Returned(o, p, quantity, restock) => {
                        let lines = Lines(BTreeMap::from([(product(p), quantity)]));
                        if returned(&mut shelf, states[o], &Lines::of(&orders[o]), &back[o], &lines, restock).is_ok() {
                            back[o] = back[o].clone().plus(&lines);
                            received[p] -= if restock { 0 } else { quantity };
                        }
                    }
                    Step::Created(o) => match created(&mut shelf, states[o], &Lines::of(&orders[o])) {
                        Outcome::Now(r) => states[o] = Some(r),
                        Outcome::Short(s) => { prop_assert!(!s.is_empty()); states[o] = Some(Reservation::Rejected); }
                        Outcome::Unchanged => {}
                    },
                    Step::Cancelled(o) => if let Ok(Outcome::Now(r)) = cancelled(&mut shelf, states[o], &Lines::of(&orders[o])) { states[o] = Some(r) },
                    Step::Confirmed(o) => if let Ok(Outcome::Now(r)) = confirmed(&mut shelf, states[o], &Lines::of(&orders[o])) { states[o] = Some(r) },
                }
                for (p, received) in received.iter().enumerate() {
                    let s = shelf[&product(p)];
                    prop_assert!(s.available() >= 0 && s.reserved() >= 0 && s.on_hand() >= 0, "oversold: {s:?}");
                    prop_assert_eq!(s.received(), *received);
                    let held = |r| orders.iter().zip(&states).filter(|(_, s)| **s == Some(r))
                        .map(|(o, _)| Lines::of(o).0.get(&product(p)).copied().unwrap_or(0)).sum::<i64>();
                    prop_assert_eq!(s.reserved(), held(Reservation::Reserved));
                    let back = back.iter().map(|l| l.0.get(&product(p)).copied().unwrap_or(0)).sum::<i64>();
                    prop_assert_eq!(s.sold(), held(Reservation::Committed) - back);
                }
            }
        }
    }

    #[test]
    fn all_lines_or_none() {
        let mut shelf =
            Shelf::from([("a".into(), Stock::stored(5, 0, 0)), ("b".into(), Stock::stored(1, 0, 0))]);
        let line = |id: &str, quantity| OrderLine { product_id: id.into(), quantity, unit_price: cent() };
        let lines = Lines::of(&[line("a", 2), line("b", 2), line("c", 1)]);
        let Outcome::Short(shortages) = created(&mut shelf, None, &lines) else { panic!("must fall short") };
        assert_eq!(shortages.iter().map(|s| s.product_id.as_str()).collect::<Vec<_>>(), ["b", "c"]);
        assert_eq!(shelf["a"].available(), 5);
    }

    #[test]
    fn a_cancellation_before_its_order_forbids_it() {
        let mut shelf = Shelf::from([("a".into(), Stock::stored(5, 0, 0))]);
        let lines = Lines::of(&[OrderLine { product_id: "a".into(), quantity: 1, unit_price: cent() }]);
        let Ok(Outcome::Now(state)) = cancelled(&mut shelf, None, &Lines::default()) else { panic!() };
        assert_eq!(created(&mut shelf, Some(state), &lines), Outcome::Unchanged);
        assert_eq!(shelf["a"].available(), 5);
    }
}
