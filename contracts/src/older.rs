//! Versions of events that have a successor, and how each is made into it and back. Nobody writes new code against these.

use consign::{Event, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Money, OrderCreated, OrderLine, StockReserved, examples};

/// A line of [`OrderCreatedV1`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "OrderLine")]
pub struct OrderLineV1 {
    /// Which product.
    #[schemars(length(min = 1, max = 64))]
    pub product_id: String,
    /// How many.
    #[schemars(range(min = 1, max = 10_000))]
    pub quantity: u32,
    /// Price of one, in minor units of the order's currency.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub unit_price: i64,
}

/// An order was accepted. Version 2 has money as one thing, and says where the order is sent to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "orders.created", version = 1)]
#[schemars(example = OrderCreatedV1::from(&examples::order_created()))]
pub struct OrderCreatedV1 {
    /// The order.
    pub order_id: Uuid,
    /// Whose it is.
    #[schemars(length(min = 1, max = 64))]
    pub customer_id: String,
    /// What was ordered.
    #[schemars(length(min = 1, max = 100))]
    pub items: Vec<OrderLineV1>,
    /// The sum of all lines, in minor units.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub total: i64,
    /// ISO 4217.
    #[schemars(length(min = 3, max = 3))]
    pub currency: String,
    /// Unpaid by then, the order is cancelled.
    pub deadline: Timestamp,
    /// What to charge: a token of the payment gateway's, never a card number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub payment_method: Option<String>,
}

impl From<OrderCreatedV1> for OrderCreated {
    fn from(old: OrderCreatedV1) -> Self {
        let money = |amount| Money { amount, currency: old.currency.clone() };
        Self {
            order_id: old.order_id,
            customer_id: old.customer_id,
            items: old
                .items
                .into_iter()
                .map(|l| OrderLine {
                    product_id: l.product_id,
                    quantity: l.quantity,
                    unit_price: money(l.unit_price),
                })
                .collect(),
            total: money(old.total),
            deadline: old.deadline,
            payment_method: old.payment_method,
            shipping_address: None,
            gift_note: None,
        }
    }
}

/// What version 1 has no place for is left out: the address and the note.
impl From<&OrderCreated> for OrderCreatedV1 {
    fn from(new: &OrderCreated) -> Self {
        let line = |l: &OrderLine| OrderLineV1 {
            product_id: l.product_id.clone(),
            quantity: l.quantity,
            unit_price: l.unit_price.amount,
        };
        Self {
            order_id: new.order_id,
            customer_id: new.customer_id.clone(),
            items: new.items.iter().map(line).collect(),
            total: new.total.amount,
            currency: new.total.currency.clone(),
            deadline: new.deadline,
            payment_method: new.payment_method.clone(),
        }
    }
}

/// All lines of an order are reserved. Version 2 has money as one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "inventory.reserved", version = 1)]
#[schemars(example = StockReservedV1::from(&examples::stock_reserved()))]
pub struct StockReservedV1 {
    /// The order.
    pub order_id: Uuid,
    /// What is to be paid, in minor units.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub amount: i64,
    /// ISO 4217.
    #[schemars(length(min = 3, max = 3))]
    pub currency: String,
    /// Not to be charged after this.
    pub expires_at: Timestamp,
    /// What to charge: a token of the payment gateway's, as the order named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub payment_method: Option<String>,
}

impl From<StockReservedV1> for StockReserved {
    fn from(old: StockReservedV1) -> Self {
        Self {
            order_id: old.order_id,
            total: Money { amount: old.amount, currency: old.currency },
            expires_at: old.expires_at,
            payment_method: old.payment_method,
        }
    }
}

impl From<&StockReserved> for StockReservedV1 {
    fn from(new: &StockReserved) -> Self {
        Self {
            order_id: new.order_id,
            amount: new.total.amount,
            currency: new.total.currency.clone(),
            expires_at: new.expires_at,
            payment_method: new.payment_method.clone(),
        }
    }
}
