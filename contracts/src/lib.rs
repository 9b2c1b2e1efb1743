//! The events that cross service borders, and nothing else. Their JSON Schemas lie in `schemas/`, generated from these types.
#![warn(missing_docs)]

use consign::{Event, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Amounts are minor units (cents) and never above this, so that sums of many stay exact everywhere, JavaScript included.
pub const MAX_AMOUNT: i64 = 1_000_000_000_000;
/// Pieces of one product in one order.
pub const MAX_QUANTITY: u32 = 10_000;
/// Lines of one order.
pub const MAX_LINES: usize = 100;

/// The streams of the system, each with the service that owns it.
pub mod streams {
    /// Owned by order.
    pub const ORDERS: &str = "ORDERS";
    /// Owned by inventory.
    pub const INVENTORY: &str = "INVENTORY";
    /// Owned by inventory; the last state of each product.
    pub const PRODUCTS: &str = "PRODUCTS";
    /// Owned by payment.
    pub const PAYMENTS: &str = "PAYMENTS";
}

/// One product of an order, at the price fixed at acceptance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OrderLine {
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

/// An order was accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "orders.created", version = 1)]
pub struct OrderCreated {
    /// The order.
    pub order_id: Uuid,
    /// Whose it is.
    #[schemars(length(min = 1, max = 64))]
    pub customer_id: String,
    /// What was ordered.
    #[schemars(length(min = 1, max = 100))]
    pub items: Vec<OrderLine>,
    /// The sum of all lines, in minor units.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub total: i64,
    /// ISO 4217.
    #[schemars(length(min = 3, max = 3))]
    pub currency: String,
    /// Unpaid by then, the order is cancelled.
    pub deadline: Timestamp,
}

/// Stock is reserved and the order is paid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "orders.confirmed", version = 1)]
pub struct OrderConfirmed {
    /// The order.
    pub order_id: Uuid,
    /// The payment that paid it.
    pub payment_id: Uuid,
}

/// Why an order was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CancelReason {
    /// The customer asked for it.
    Requested,
    /// Stock did not suffice.
    OutOfStock,
    /// The payment failed.
    PaymentFailed,
    /// Unpaid past its deadline.
    Expired,
}

impl CancelReason {
    /// The word in rows and answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::OutOfStock => "out_of_stock",
            Self::PaymentFailed => "payment_failed",
            Self::Expired => "expired",
        }
    }
}

/// The order will not be fulfilled: stock is released, money given back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "orders.cancelled", version = 1)]
pub struct OrderCancelled {
    /// The order.
    pub order_id: Uuid,
    /// Why.
    pub reason: CancelReason,
}

/// All lines of an order are reserved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "inventory.reserved", version = 1)]
pub struct StockReserved {
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
}

/// A product of which there is not enough.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Shortage {
    /// Which.
    #[schemars(length(min = 1, max = 64))]
    pub product_id: String,
    /// Wanted.
    pub requested: u32,
    /// There.
    #[schemars(range(min = 0))]
    pub available: i64,
}

/// Not all lines could be reserved, so none is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "inventory.rejected", version = 1)]
pub struct StockRejected {
    /// The order.
    pub order_id: Uuid,
    /// Where it falls short.
    pub shortages: Vec<Shortage>,
}

/// A product is as it is now. On a stream that keeps the last of each product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "products.changed", version = 1)]
pub struct ProductChanged {
    /// Which.
    #[schemars(length(min = 1, max = 64))]
    pub product_id: String,
    /// What people call it.
    #[schemars(length(min = 1, max = 200))]
    pub name: String,
    /// In minor units.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub price: i64,
    /// ISO 4217.
    #[schemars(length(min = 3, max = 3))]
    pub currency: String,
    /// Rises with each change: the highest is the truth.
    pub version: u64,
}

/// The order's amount was charged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "payments.succeeded", version = 1)]
pub struct PaymentSucceeded {
    /// The payment.
    pub payment_id: Uuid,
    /// The order it pays.
    pub order_id: Uuid,
    /// In minor units.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub amount: i64,
    /// ISO 4217.
    #[schemars(length(min = 3, max = 3))]
    pub currency: String,
}

/// Nothing was charged and nothing will be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "payments.failed", version = 1)]
pub struct PaymentFailed {
    /// The payment.
    pub payment_id: Uuid,
    /// The order it was for.
    pub order_id: Uuid,
    /// `declined: …`, `expired` or `cancelled`.
    #[schemars(length(min = 1, max = 200))]
    pub reason: String,
}

/// What was charged for a cancelled order was given back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "payments.refunded", version = 1)]
pub struct PaymentRefunded {
    /// The payment.
    pub payment_id: Uuid,
    /// The order it was for.
    pub order_id: Uuid,
    /// In minor units.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub amount: i64,
    /// ISO 4217.
    #[schemars(length(min = 3, max = 3))]
    pub currency: String,
}

/// The schema of each event, by name: what lies in `schemas/`.
pub fn schemas() -> Vec<(String, serde_json::Value)> {
    fn one<E: Event>() -> (String, serde_json::Value) {
        (E::name(), consign::schema::of::<E>().document().clone())
    }
    vec![
        one::<OrderCreated>(),
        one::<OrderConfirmed>(),
        one::<OrderCancelled>(),
        one::<StockReserved>(),
        one::<StockRejected>(),
        one::<ProductChanged>(),
        one::<PaymentSucceeded>(),
        one::<PaymentFailed>(),
        one::<PaymentRefunded>(),
    ]
}

/// Whether it is a product id: 1 to 64 of `A-Z a-z 0-9 _ -`, which can stand in a subject.
pub fn is_product_id(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// Whether it has the form of an ISO 4217 code.
pub fn is_currency(code: &str) -> bool {
    code.len() == 3 && code.bytes().all(|b| b.is_ascii_uppercase())
}
