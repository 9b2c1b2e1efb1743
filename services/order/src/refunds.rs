//! Refunds of confirmed orders: what is asked for is checked and recorded here, decided on by payment, and carried out by inventory when the
//! money is given back.

use std::collections::BTreeMap;

use consign::Timestamp;
use contracts::ReturnedLine;
use thiserror::Error;
use uuid::Uuid;

use crate::domain::{Order, Status};

/// A refund as it is stored.
#[derive(Clone, Debug)]
pub struct Refund {
    pub id: Uuid,
    pub order_id: Uuid,
    pub amount: i64,
    pub lines: Vec<ReturnedLine>,
    /// Back to the shelf; otherwise written off.
    pub restock: bool,
    pub reason: Option<String>,
    pub progress: Progress,
    /// Why payment would not.
    pub rejection: Option<String>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

/// How far a refund has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Payment is to decide, or the gateway to pay.
    Pending,
    /// The money is given back.
    Done,
    /// It will not be.
    Rejected,
}

impl Progress {
    /// The word in rows and answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Done => "done",
            Self::Rejected => "rejected",
        }
    }

    /// From that word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Pending, Self::Done, Self::Rejected].into_iter().find(|p| p.as_str() == word)
    }
}

/// Why nothing can be refunded as asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RefundFault {
    /// Only what was paid can be given back.
    #[error("the order is {}; only a confirmed order can be refunded, and a cancelled one is by itself", .0.as_str())]
    NotConfirmed(Status),
    /// Everything was, or is being.
    #[error("nothing is left to refund")]
    NothingLeft,
    /// Not of this order, or not so many.
    #[error("{left} of {product_id:?} can be refunded, not {asked}")]
    TooMany {
        /// The line of the request.
        line: usize,
        /// The product.
        product_id: String,
        /// How many were asked for.
        asked: u32,
        /// How many could be.
        left: u32,
    },
    /// They cost nothing.
    #[error("nothing was paid for these")]
    Free,
}

/// What is to be given back, and for how much. Without lines everything that is left. `earlier` are all refunds of the order.
pub fn plan(
    order: &Order,
    earlier: &[Refund],
    wanted: Option<&[ReturnedLine]>,
) -> Result<(Vec<ReturnedLine>, i64), RefundFault> {
    if order.status != Status::Confirmed {
        return Err(RefundFault::NotConfirmed(order.status));
    }
    // Of each product what was bought and is not given back, and its price, which is the same in all lines.
    let mut left: BTreeMap<&str, (u32, i64)> = BTreeMap::new();
    for line in &order.items {
        let entry = left.entry(&line.product_id).or_insert((0, line.unit_price));
        entry.0 = entry.0.saturating_add(line.quantity);
    }
    let counted = earlier.iter().filter(|r| r.progress != Progress::Rejected);
    for line in counted.flat_map(|r| &r.lines) {
        if let Some((quantity, _)) = left.get_mut(&*line.product_id) {
            *quantity = quantity.saturating_sub(line.quantity);
        }
    }
    let mut back: BTreeMap<&str, u32> = BTreeMap::new();
    match wanted {
        None => back.extend(left.iter().filter(|(_, (n, _))| *n > 0).map(|(id, (n, _))| (*id, *n))),
        Some(lines) => {
            for (i, line) in lines.iter().enumerate() {
                let asked = back.entry(&line.product_id).or_insert(0);
                *asked = asked.saturating_add(line.quantity);
                let left = left.get(&*line.product_id).map_or(0, |(quantity, _)| *quantity);
                if *asked > left {
                    let product_id = line.product_id.clone();
                    return Err(RefundFault::TooMany { line: i, product_id, asked: *asked, left });
                }
            }
        }
    }
    if back.is_empty() {
        return Err(RefundFault::NothingLeft);
    }
    let price = |id: &str| left.get(id).map_or(0, |(_, price)| *price);
    // Not above the total, which is bounded.
    let amount = back.iter().map(|(id, quantity)| price(id) * i64::from(*quantity)).sum();
    if amount == 0 {
        return Err(RefundFault::Free);
    }
    let line = |(id, quantity): (&str, u32)| ReturnedLine { product_id: id.to_owned(), quantity };
    Ok((back.into_iter().map(line).collect(), amount))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Line;
    use consign::Lane;
    use proptest::prelude::*;

    fn order(items: Vec<(usize, u32, i64)>) -> Order {
        let items: Vec<Line> = items
            .into_iter()
            .map(|(p, quantity, unit_price)| Line { product_id: format!("p{p}"), quantity, unit_price })
            .collect();
        let at = Timestamp::from_millis(0);
        Order {
            id: Uuid::nil(),
            customer_id: "ada".into(),
            status: Status::Confirmed,
            reason: None,
            lane: Lane::Standard,
            currency: "EUR".into(),
            total: items.iter().map(|i| i64::from(i.quantity) * i.unit_price).sum(),
            items,
            payment_id: None,
            payment_method: None,
            shipping_address: None,
            gift_note: None,
            refunding: 0,
            refunded: 0,
            correlation_id: "c".into(),
            version: 1,
            created_at: at,
            updated_at: at,
            deadline: at,
        }
    }

    fn made(lines: Vec<ReturnedLine>, amount: i64, progress: Progress) -> Refund {
        let at = Timestamp::from_millis(0);
        Refund {
            id: Uuid::now_v7(),
            order_id: Uuid::nil(),
            amount,
            lines,
            restock: true,
            reason: None,
            progress,
            rejection: None,
            created_at: at,
            updated_at: at,
        }
    }

    fn back(p: usize, quantity: u32) -> ReturnedLine {
        ReturnedLine { product_id: format!("p{p}"), quantity }
    }

    proptest! {
        /// However it is taken apart: never more than was paid, and all of it in the end.
        #[test]
        fn never_more_than_was_paid(
            quantities in prop::collection::vec(1..20u32, 1..4),
            asked in prop::collection::vec((0..4usize, 1..12u32), 0..20),
        ) {
            let price = |p: usize| i64::try_from(p).unwrap() * 7 + 1;
            let order = order(quantities.iter().enumerate().map(|(p, q)| (p, *q, price(p))).collect());
            let mut refunds: Vec<Refund> = Vec::new();
            for (p, quantity) in asked {
                if let Ok((lines, amount)) = plan(&order, &refunds, Some(&[back(p, quantity)])) {
                    prop_assert_eq!(amount, price(p) * i64::from(quantity));
                    refunds.push(made(lines, amount, Progress::Pending));
                }
                prop_assert!(refunds.iter().map(|r| r.amount).sum::<i64>() <= order.total);
            }
            if let Ok((lines, amount)) = plan(&order, &refunds, None) {
                refunds.push(made(lines, amount, Progress::Pending));
            }
            prop_assert_eq!(refunds.iter().map(|r| r.amount).sum::<i64>(), order.total);
            prop_assert_eq!(plan(&order, &refunds, None), Err(RefundFault::NothingLeft));
        }
    }

    #[test]
    fn what_was_rejected_can_be_asked_for_again_and_faults_are_named() {
        let order = order(vec![(0, 2, 50), (0, 1, 50), (1, 1, 0)]);
        let rejected = made(vec![back(0, 3)], 150, Progress::Rejected);
        let whole = plan(&order, &[rejected], None).unwrap();
        assert_eq!(whole, (vec![back(0, 3), back(1, 1)], 150), "lines of one product are added up");
        let two = plan(&order, &[], Some(&[back(0, 2), back(0, 2)]));
        assert_eq!(two, Err(RefundFault::TooMany { line: 1, product_id: "p0".into(), asked: 4, left: 3 }));
        assert_eq!(plan(&order, &[], Some(&[back(1, 1)])), Err(RefundFault::Free));
        assert!(matches!(plan(&order, &[], Some(&[back(9, 1)])), Err(RefundFault::TooMany { left: 0, .. })));
        let pending = Order { status: Status::Pending, ..order };
        assert_eq!(plan(&pending, &[], None), Err(RefundFault::NotConfirmed(Status::Pending)));
    }
}
