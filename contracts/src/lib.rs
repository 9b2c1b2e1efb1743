//! The events that cross service borders, and nothing else. Their JSON Schemas lie in `schemas/`, generated from these types.
//!
//! Unknown fields are ignored by who reads an event, and kept as they are in the stream and in dead letters.
#![warn(missing_docs)]

mod examples;
mod older;

pub use older::{OrderCreatedV1, OrderLineV1, StockReservedV1};

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
    /// Made by order; what shops and other systems outside publish to it.
    pub const STOREFRONT: &str = "STOREFRONT";
}

/// A sum of money.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Money {
    /// In minor units of the currency: cents of EUR, yen of JPY.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub amount: i64,
    /// ISO 4217.
    #[schemars(length(min = 3, max = 3))]
    pub currency: String,
}

/// Where an order is sent to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Address {
    /// Who receives it.
    #[schemars(length(min = 1, max = 100))]
    pub name: String,
    /// Street and number, and whatever else is written above the city.
    #[schemars(length(min = 1, max = 200))]
    pub street: String,
    /// Where the country has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 20))]
    pub postal_code: Option<String>,
    /// The city or town.
    #[schemars(length(min = 1, max = 100))]
    pub city: String,
    /// ISO 3166-1 alpha-2, for example DE.
    #[schemars(length(min = 2, max = 2))]
    pub country: String,
}

/// One product of an order that is asked for; the price is not the caller's to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WantedLine {
    /// Which product.
    #[schemars(length(min = 1, max = 64))]
    pub product_id: String,
    /// How many.
    #[schemars(range(min = 1, max = 10_000))]
    pub quantity: u32,
}

/// Somebody outside asks for an order, with an id of their own making: `orders.created` or `orders.refused` answers, about that id. Asking
/// again for the same is answered once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "storefront.order_requested", version = 1)]
#[schemars(example = examples::order_requested())]
pub struct OrderRequested {
    /// The order to be.
    pub order_id: Uuid,
    /// Whose it is: 1 to 64 of `A-Z a-z 0-9 _ -`.
    #[schemars(length(min = 1, max = 64))]
    pub customer_id: String,
    /// What is wanted.
    #[schemars(length(min = 1, max = 100))]
    pub items: Vec<WantedLine>,
    /// What to charge: a token of the payment gateway's, never a card number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub payment_method: Option<String>,
    /// Where it is sent to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shipping_address: Option<Address>,
    /// A few words that come along with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 500))]
    pub gift_note: Option<String>,
}

/// Something that was wrong with an order that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OrderFault {
    /// Where: a JSON pointer (RFC 6901) into what was asked for.
    #[schemars(length(max = 200))]
    pub pointer: String,
    /// What, and what would be right.
    #[schemars(length(min = 1, max = 500))]
    pub detail: String,
}

/// An order that was asked for will not be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "orders.refused", version = 1)]
#[schemars(example = examples::order_refused())]
pub struct OrderRefused {
    /// The order that was asked for.
    pub order_id: Uuid,
    /// Why not.
    #[schemars(length(min = 1, max = OrderRefused::MAX_FAULTS))]
    pub faults: Vec<OrderFault>,
}

impl OrderRefused {
    /// So many faults are named at most.
    pub const MAX_FAULTS: usize = 100;
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
    /// Price of one.
    pub unit_price: Money,
}

/// An order was accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "orders.created", version = 2)]
#[schemars(example = examples::order_created())]
pub struct OrderCreated {
    /// The order.
    pub order_id: Uuid,
    /// Whose it is.
    #[schemars(length(min = 1, max = 64))]
    pub customer_id: String,
    /// What was ordered.
    #[schemars(length(min = 1, max = 100))]
    pub items: Vec<OrderLine>,
    /// The sum of all lines, which are all in its currency.
    pub total: Money,
    /// Unpaid by then, the order is cancelled.
    pub deadline: Timestamp,
    /// What to charge: a token of the payment gateway's, never a card number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub payment_method: Option<String>,
    /// Where it is sent to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shipping_address: Option<Address>,
    /// A few words that come along with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 500))]
    pub gift_note: Option<String>,
}

/// Stock is reserved and the order is paid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "orders.confirmed", version = 1)]
#[schemars(example = examples::order_confirmed())]
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
#[schemars(example = examples::order_cancelled())]
pub struct OrderCancelled {
    /// The order.
    pub order_id: Uuid,
    /// Why.
    pub reason: CancelReason,
}

/// The order may be unpaid for longer than was said: the payment gateway is out of reach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "orders.deadline_extended", version = 1)]
#[schemars(example = examples::order_deadline_extended())]
pub struct OrderDeadlineExtended {
    /// The order.
    pub order_id: Uuid,
    /// Unpaid by then, it is cancelled.
    pub deadline: Timestamp,
}

/// Pieces of one product of an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReturnedLine {
    /// Which product.
    #[schemars(length(min = 1, max = 64))]
    pub product_id: String,
    /// How many.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub quantity: u32,
}

/// Money of a confirmed order is to be given back; payment decides whether it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "orders.refund_requested", version = 1)]
#[schemars(example = examples::order_refund_requested())]
pub struct OrderRefundRequested {
    /// This refund.
    pub refund_id: Uuid,
    /// The order.
    pub order_id: Uuid,
    /// In minor units.
    #[schemars(range(min = 1, max = 1_000_000_000_000_i64))]
    pub amount: i64,
    /// ISO 4217.
    #[schemars(length(min = 3, max = 3))]
    pub currency: String,
    /// Why, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200))]
    pub reason: Option<String>,
}

/// Money was given back for these pieces: they return to the shelf, or are written off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "orders.refunded", version = 1)]
#[schemars(example = examples::order_refunded())]
pub struct OrderRefunded {
    /// The refund.
    pub refund_id: Uuid,
    /// The order.
    pub order_id: Uuid,
    /// What comes back.
    #[schemars(length(min = 1, max = 100))]
    pub lines: Vec<ReturnedLine>,
    /// Back to the shelf; otherwise written off.
    pub restock: bool,
}

/// All lines of an order are reserved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "inventory.reserved", version = 2)]
#[schemars(example = examples::stock_reserved())]
pub struct StockReserved {
    /// The order.
    pub order_id: Uuid,
    /// What is to be paid.
    pub total: Money,
    /// Not to be charged after this.
    pub expires_at: Timestamp,
    /// What to charge: a token of the payment gateway's, as the order named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub payment_method: Option<String>,
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
#[schemars(example = examples::stock_rejected())]
pub struct StockRejected {
    /// The order.
    pub order_id: Uuid,
    /// Where it falls short.
    pub shortages: Vec<Shortage>,
}

/// A product is as it is now. On a stream that keeps the last of each product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "products.changed", version = 1)]
#[schemars(example = examples::product_changed())]
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
#[schemars(example = examples::payment_succeeded())]
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
#[schemars(example = examples::payment_failed())]
pub struct PaymentFailed {
    /// The payment.
    pub payment_id: Uuid,
    /// The order it was for.
    pub order_id: Uuid,
    /// `declined: …`, `expired` or `cancelled`.
    #[schemars(length(min = 1, max = 200))]
    pub reason: String,
}

/// What was charged was given back: all of it because the order was cancelled, or what a refund asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "payments.refunded", version = 1)]
#[schemars(example = examples::payment_refunded())]
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
    /// The refund that asked for it; none if the order was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refund_id: Option<Uuid>,
}

/// A refund will not be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "payments.refund_rejected", version = 1)]
#[schemars(example = examples::payment_refund_rejected())]
pub struct PaymentRefundRejected {
    /// The refund.
    pub refund_id: Uuid,
    /// The order.
    pub order_id: Uuid,
    /// Why not.
    #[schemars(length(min = 1, max = 200))]
    pub reason: String,
}

/// The payment gateway is out of reach, as far as one replica of payment can tell. Repeated while it lasts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "payments.gateway_unavailable", version = 1)]
#[schemars(example = examples::gateway_unavailable())]
pub struct GatewayUnavailable {
    /// Which.
    #[schemars(length(min = 1, max = 64))]
    pub gateway: String,
    /// Holds until then, unless it is said again.
    pub until: Timestamp,
}

/// A version of an event, as tools need it.
#[derive(Clone, Debug)]
pub struct Contract {
    /// Its type, for example `orders.created`.
    pub event: &'static str,
    /// Its version.
    pub version: u32,
    /// The stream it is published on.
    pub stream: &'static str,
    /// The service that publishes it; `storefront` is whoever is outside.
    pub publisher: &'static str,
    /// Its JSON Schema.
    pub schema: serde_json::Value,
}

impl Contract {
    /// Type and version as one word, for example `orders.created.v1`.
    pub fn name(&self) -> String {
        format!("{}.v{}", self.event, self.version)
    }
}

/// Every version of every event.
pub fn all() -> Vec<Contract> {
    fn one<E: Event>(stream: &'static str) -> Contract {
        let schema = consign::schema::of::<E>().document().clone();
        let publisher = match stream {
            streams::ORDERS => "order",
            streams::PAYMENTS => "payment",
            streams::STOREFRONT => "storefront",
            _ => "inventory",
        };
        Contract { event: E::TYPE, version: E::VERSION, stream, publisher, schema }
    }
    vec![
        one::<OrderRequested>(streams::STOREFRONT),
        one::<OrderCreatedV1>(streams::ORDERS),
        one::<OrderCreated>(streams::ORDERS),
        one::<OrderRefused>(streams::ORDERS),
        one::<OrderConfirmed>(streams::ORDERS),
        one::<OrderCancelled>(streams::ORDERS),
        one::<OrderDeadlineExtended>(streams::ORDERS),
        one::<OrderRefundRequested>(streams::ORDERS),
        one::<OrderRefunded>(streams::ORDERS),
        one::<StockReservedV1>(streams::INVENTORY),
        one::<StockReserved>(streams::INVENTORY),
        one::<StockRejected>(streams::INVENTORY),
        one::<ProductChanged>(streams::PRODUCTS),
        one::<PaymentSucceeded>(streams::PAYMENTS),
        one::<PaymentFailed>(streams::PAYMENTS),
        one::<PaymentRefunded>(streams::PAYMENTS),
        one::<PaymentRefundRejected>(streams::PAYMENTS),
        one::<GatewayUnavailable>(streams::PAYMENTS),
    ]
}

/// The schema of each event, by name: what lies in `schemas/`.
pub fn schemas() -> Vec<(String, serde_json::Value)> {
    all().into_iter().map(|c| (c.name(), c.schema)).collect()
}

/// Whether it is a product id: 1 to 64 of `A-Z a-z 0-9 _ -`, which can stand in a subject.
pub fn is_product_id(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// Whether it can be a payment gateway's token for a means of payment: 1 to 255 of `A-Z a-z 0-9 _ -`, and no card number.
pub fn is_payment_method(token: &str) -> bool {
    let written = token.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    // A number of 12 to 19 digits, however it is grouped, is a card's (ISO/IEC 7812): it must not come here at all.
    let digits = token.bytes().filter(u8::is_ascii_digit).count();
    let only_digits = token.bytes().all(|b| b.is_ascii_digit() || b == b'-');
    (1..=255).contains(&token.len()) && written && !(only_digits && (12..=19).contains(&digits))
}

/// Whether it has the form of an ISO 4217 code.
pub fn is_currency(code: &str) -> bool {
    code.len() == 3 && code.bytes().all(|b| b.is_ascii_uppercase())
}
