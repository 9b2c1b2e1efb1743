//! An order's rules, without a clock or a database: what it costs, and what each event makes of it.

use std::collections::HashMap;

use consign::Timestamp;
use contracts::{Address, CancelReason, MAX_AMOUNT, Money, OrderCreated, OrderLine};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

/// Where an order stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Accepted; stock not yet reserved.
    Pending,
    /// Stock reserved; not yet paid.
    Reserved,
    /// Reserved and paid. Final.
    Confirmed,
    /// Will not be fulfilled. Final.
    Cancelled,
}

impl Status {
    /// The word in rows and answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Reserved => "reserved",
            Self::Confirmed => "confirmed",
            Self::Cancelled => "cancelled",
        }
    }

    /// From that word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Pending, Self::Reserved, Self::Confirmed, Self::Cancelled]
            .into_iter()
            .find(|s| s.as_str() == word)
    }

    /// Whether nothing can change it any more.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Confirmed | Self::Cancelled)
    }
}

/// What can happen to an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Inventory reserved all lines.
    Reserved,
    /// Inventory could not.
    Rejected,
    /// Payment charged the total.
    Paid(Uuid),
    /// Payment did not and will not.
    PaymentFailed,
    /// What was paid after the cancellation was given back.
    Refunded,
    /// The customer wants out.
    CancelRequested,
    /// The deadline passed.
    Expired,
    /// The deadline passed, but the payment gateway is out of reach: there is time until then.
    GivenTime(Timestamp),
    /// Payment made a refund that was under way.
    RefundDone(Uuid),
    /// Payment will not make it.
    RefundRejected(Uuid),
}

/// What becomes of the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It moves on; nobody else need know.
    Reserve,
    /// It is confirmed; `orders.confirmed` follows.
    Confirm(Uuid),
    /// It is cancelled; `orders.cancelled` follows.
    Cancel(CancelReason),
    /// It may be unpaid until then; `orders.deadline_extended` follows.
    Extend(Timestamp),
    /// A refund is made; `orders.refunded` follows.
    FinishRefund(Uuid),
    /// A refund will not be made.
    RejectRefund(Uuid),
    /// It stays as it is, but the timeline says what came.
    Note,
    /// Nothing: known already.
    Ignore,
    /// A confirmed order cannot be cancelled.
    TooLate,
}

/// What an order in `status` makes of `input`, in whatever order things arrive.
pub fn decide(status: Status, input: Input) -> Decision {
    use Status::{Cancelled, Confirmed, Pending, Reserved};
    match (status, input) {
        (Pending, Input::Reserved) => Decision::Reserve,
        // The payment proves the reservation, even if that event is still under way.
        (Pending | Reserved, Input::Paid(payment)) => Decision::Confirm(payment),
        (Pending | Reserved, Input::PaymentFailed) => Decision::Cancel(CancelReason::PaymentFailed),
        (Pending, Input::Rejected) => Decision::Cancel(CancelReason::OutOfStock),
        (Pending | Reserved, Input::CancelRequested) => Decision::Cancel(CancelReason::Requested),
        // Without stock there is nothing to give time for.
        (Pending | Reserved, Input::Expired) | (Pending, Input::GivenTime(_)) => {
            Decision::Cancel(CancelReason::Expired)
        }
        (Reserved, Input::GivenTime(until)) => Decision::Extend(until),
        (Confirmed, Input::RefundDone(refund)) => Decision::FinishRefund(refund),
        (Confirmed, Input::RefundRejected(refund)) => Decision::RejectRefund(refund),
        (Confirmed, Input::CancelRequested) => Decision::TooLate,
        // Payment hears of the cancellation too and refunds; the order only remembers.
        (Cancelled, Input::Paid(_) | Input::Refunded) => Decision::Note,
        _ => Decision::Ignore,
    }
}

/// A product as the order service knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Price {
    /// In minor units.
    pub amount: i64,
    /// ISO 4217.
    pub currency: String,
}

/// What a customer wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which product.
    pub product_id: String,
    /// How many.
    pub quantity: u32,
}

/// One product of an order, at the price fixed at acceptance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Line {
    /// Which product.
    pub product_id: String,
    /// How many.
    pub quantity: u32,
    /// Price of one, in minor units of the order's currency.
    pub unit_price: i64,
}

/// Lines with their prices, and the total.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Priced {
    /// The lines.
    pub items: Vec<Line>,
    /// Their sum, in minor units.
    pub total: i64,
    /// Of all lines.
    pub currency: String,
}

/// Why an order cannot be priced, with the index of the line at fault.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PriceFault {
    /// No such product.
    #[error("there is no product {product_id:?}")]
    UnknownProduct {
        /// The line.
        line: usize,
        /// The product.
        product_id: String,
    },
    /// Prices in several currencies cannot be added up.
    #[error("{product_id:?} is priced in {currency}, the lines before in {expected}")]
    MixedCurrencies {
        /// The line.
        line: usize,
        /// The product.
        product_id: String,
        /// Its currency.
        currency: String,
        /// The others'.
        expected: String,
    },
    /// More than an order may cost.
    #[error("the total is above {MAX_AMOUNT} minor units")]
    TooExpensive {
        /// The line that went over.
        line: usize,
    },
}

impl PriceFault {
    /// The line at fault.
    pub fn line(&self) -> usize {
        match self {
            Self::UnknownProduct { line, .. }
            | Self::MixedCurrencies { line, .. }
            | Self::TooExpensive { line } => *line,
        }
    }
}

/// Fixes prices and total; all faults if there are any.
pub fn price(wanted: &[Wanted], prices: &HashMap<String, Price>) -> Result<Priced, Vec<PriceFault>> {
    let mut faults = Vec::new();
    let mut priced = Priced { items: Vec::with_capacity(wanted.len()), total: 0, currency: String::new() };
    for (line, w) in wanted.iter().enumerate() {
        let Some(p) = prices.get(&w.product_id) else {
            faults.push(PriceFault::UnknownProduct { line, product_id: w.product_id.clone() });
            continue;
        };
        if priced.currency.is_empty() {
            priced.currency.clone_from(&p.currency);
        } else if priced.currency != p.currency {
            faults.push(PriceFault::MixedCurrencies {
                line,
                product_id: w.product_id.clone(),
                currency: p.currency.clone(),
                expected: priced.currency.clone(),
            });
            continue;
        }
        let sum = p.amount.checked_mul(i64::from(w.quantity)).and_then(|cost| priced.total.checked_add(cost));
        match sum.filter(|sum| *sum <= MAX_AMOUNT) {
            Some(sum) => priced.total = sum,
            None => faults.push(PriceFault::TooExpensive { line }),
        }
        priced.items.push(Line {
            product_id: w.product_id.clone(),
            quantity: w.quantity,
            unit_price: p.amount,
        });
    }
    if faults.is_empty() { Ok(priced) } else { Err(faults) }
}

/// An order as it is stored.
#[derive(Clone, Debug)]
pub struct Order {
    pub id: Uuid,
    pub customer_id: String,
    pub status: Status,
    pub reason: Option<String>,
    pub lane: consign::Lane,
    pub currency: String,
    pub total: i64,
    pub items: Vec<Line>,
    pub payment_id: Option<Uuid>,
    pub payment_method: Option<String>,
    pub shipping_address: Option<Address>,
    pub gift_note: Option<String>,
    pub refunding: i64,
    pub refunded: i64,
    pub correlation_id: String,
    pub version: u64,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub deadline: Timestamp,
}

impl Order {
    /// What others are told when it is accepted.
    pub fn created(&self) -> OrderCreated {
        let money = |amount| Money { amount, currency: self.currency.clone() };
        let line = |l: &Line| OrderLine {
            product_id: l.product_id.clone(),
            quantity: l.quantity,
            unit_price: money(l.unit_price),
        };
        OrderCreated {
            order_id: self.id,
            customer_id: self.customer_id.clone(),
            items: self.items.iter().map(line).collect(),
            total: money(self.total),
            deadline: self.deadline,
            payment_method: self.payment_method.clone(),
            shipping_address: self.shipping_address.clone(),
            gift_note: self.gift_note.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn inputs() -> impl Strategy<Value = Vec<Input>> {
        let input = prop_oneof![
            Just(Input::Reserved),
            Just(Input::Rejected),
            Just(Input::Paid(Uuid::nil())),
            Just(Input::PaymentFailed),
            Just(Input::Refunded),
            Just(Input::CancelRequested),
            Just(Input::Expired),
            Just(Input::GivenTime(Timestamp::from_millis(1))),
            Just(Input::RefundDone(Uuid::nil())),
            Just(Input::RefundRejected(Uuid::nil())),
        ];
        prop::collection::vec(input, 0..12)
    }

    fn apply(status: Status, decision: Decision) -> Status {
        match decision {
            Decision::Reserve => Status::Reserved,
            Decision::Confirm(_) => Status::Confirmed,
            Decision::Cancel(_) => Status::Cancelled,
            Decision::Extend(_)
            | Decision::FinishRefund(_)
            | Decision::RejectRefund(_)
            | Decision::Note
            | Decision::Ignore
            | Decision::TooLate => status,
        }
    }

    proptest! {
        /// Every interleaving ends in a legal state: final states stay, and exactly one final decision is announced.
        #[test]
        fn every_interleaving_is_legal(inputs in inputs()) {
            let mut status = Status::Pending;
            let mut announced = 0;
            for input in &inputs {
                let decision = decide(status, *input);
                let next = apply(status, decision);
                if matches!(decision, Decision::Confirm(_) | Decision::Cancel(_)) {
                    announced += 1;
                }
                if status.is_final() {
                    prop_assert_eq!(next, status);
                }
                // Repeating an input changes nothing more.
                prop_assert_eq!(apply(next, decide(next, *input)), next);
                status = next;
            }
            prop_assert_eq!(announced, u32::from(status.is_final()));
            let paid = inputs.iter().any(|i| matches!(i, Input::Paid(_)));
            prop_assert!(status != Status::Confirmed || paid, "confirmed without payment");
        }

        #[test]
        fn totals_are_exact(lines in prop::collection::vec((0..1_000_000i64, 1..10_000u32), 1..20)) {
            let prices = lines.iter().enumerate()
                .map(|(i, (p, _))| (i.to_string(), Price { amount: *p, currency: "EUR".into() })).collect();
            let wanted: Vec<Wanted> = lines.iter().enumerate()
                .map(|(i, (_, q))| Wanted { product_id: i.to_string(), quantity: *q }).collect();
            let exact: i128 = lines.iter().map(|(p, q)| i128::from(*p) * i128::from(*q)).sum();
            match price(&wanted, &prices) {
                Ok(priced) => prop_assert_eq!(i128::from(priced.total), exact),
                Err(_) => prop_assert!(exact > i128::from(MAX_AMOUNT)),
            }
        }
    }

    #[test]
    fn faults_name_their_lines() {
        let prices = HashMap::from([
            ("a".to_owned(), Price { amount: MAX_AMOUNT, currency: "EUR".into() }),
            ("b".to_owned(), Price { amount: 1, currency: "USD".into() }),
        ]);
        let want = |id: &str, quantity| Wanted { product_id: id.into(), quantity };
        let faults = price(&[want("a", 2), want("b", 1), want("c", 1)], &prices).unwrap_err();
        assert_eq!(faults.iter().map(PriceFault::line).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(matches!(faults[0], PriceFault::TooExpensive { .. }));
        assert!(matches!(faults[1], PriceFault::MixedCurrencies { .. }));
        assert!(matches!(faults[2], PriceFault::UnknownProduct { .. }));
    }

    #[test]
    fn a_success_after_a_cancellation_is_noted_and_not_confirmed() {
        assert_eq!(decide(Status::Cancelled, Input::Paid(Uuid::nil())), Decision::Note);
    }
}
