//! One example of each event, for its schema: all of one order, `0199…01`, that Ada placed.

use consign::Timestamp;
use uuid::{Uuid, uuid};

use crate::{
    Address, CancelReason, GatewayUnavailable, Money, OrderCancelled, OrderConfirmed, OrderCreated,
    OrderDeadlineExtended, OrderFault, OrderLine, OrderRefundRequested, OrderRefunded, OrderRefused,
    OrderRequested, PaymentFailed, PaymentRefundRejected, PaymentRefunded, PaymentSucceeded, ProductChanged,
    ReturnedLine, Shortage, StockRejected, StockReserved, WantedLine,
};

const ORDER: Uuid = uuid!("01990000-0000-7000-8000-000000000001");
const PAYMENT: Uuid = uuid!("01990000-0000-7000-8000-000000000002");
const REFUND: Uuid = uuid!("01990000-0000-7000-8000-000000000003");

fn at(minutes: i64) -> Timestamp {
    // The first of January 2026.
    Timestamp::from_millis(1_767_225_600_000 + minutes * 60_000)
}

fn euros(amount: i64) -> Money {
    Money { amount, currency: "EUR".into() }
}

fn address() -> Address {
    Address {
        name: "Ada Lovelace".into(),
        street: "Lindenstr. 12".into(),
        postal_code: Some("10969".into()),
        city: "Berlin".into(),
        country: "DE".into(),
    }
}

pub(crate) fn order_requested() -> OrderRequested {
    OrderRequested {
        order_id: ORDER,
        customer_id: "ada".into(),
        items: vec![WantedLine { product_id: "lamp".into(), quantity: 2 }],
        payment_method: None,
        shipping_address: Some(address()),
        gift_note: Some("Happy birthday!".into()),
    }
}

pub(crate) fn order_refused() -> OrderRefused {
    let fault = OrderFault { pointer: "/items/0".into(), detail: "there is no product \"lamp\"".into() };
    OrderRefused { order_id: ORDER, faults: vec![fault] }
}

pub(crate) fn order_created() -> OrderCreated {
    OrderCreated {
        order_id: ORDER,
        customer_id: "ada".into(),
        items: vec![OrderLine { product_id: "lamp".into(), quantity: 2, unit_price: euros(2_500) }],
        total: euros(5_000),
        deadline: at(15),
        payment_method: None,
        shipping_address: Some(address()),
        gift_note: Some("Happy birthday!".into()),
    }
}

pub(crate) fn order_confirmed() -> OrderConfirmed {
    OrderConfirmed { order_id: ORDER, payment_id: PAYMENT }
}

pub(crate) fn order_cancelled() -> OrderCancelled {
    OrderCancelled { order_id: ORDER, reason: CancelReason::OutOfStock }
}

pub(crate) fn order_deadline_extended() -> OrderDeadlineExtended {
    OrderDeadlineExtended { order_id: ORDER, deadline: at(30) }
}

pub(crate) fn order_refund_requested() -> OrderRefundRequested {
    OrderRefundRequested {
        refund_id: REFUND,
        order_id: ORDER,
        amount: 2_500,
        currency: "EUR".into(),
        reason: Some("arrived broken".into()),
    }
}

pub(crate) fn order_refunded() -> OrderRefunded {
    let lines = vec![ReturnedLine { product_id: "lamp".into(), quantity: 1 }];
    OrderRefunded { refund_id: REFUND, order_id: ORDER, lines, restock: false }
}

pub(crate) fn stock_reserved() -> StockReserved {
    StockReserved { order_id: ORDER, total: euros(5_000), expires_at: at(15), payment_method: None }
}

pub(crate) fn stock_rejected() -> StockRejected {
    let shortages = vec![Shortage { product_id: "lamp".into(), requested: 2, available: 1 }];
    StockRejected { order_id: ORDER, shortages }
}

pub(crate) fn product_changed() -> ProductChanged {
    ProductChanged {
        product_id: "lamp".into(),
        name: "Desk lamp".into(),
        price: 2_500,
        currency: "EUR".into(),
        version: 3,
    }
}

pub(crate) fn payment_succeeded() -> PaymentSucceeded {
    PaymentSucceeded { payment_id: PAYMENT, order_id: ORDER, amount: 5_000, currency: "EUR".into() }
}

pub(crate) fn payment_failed() -> PaymentFailed {
    let reason = "declined: insufficient_funds".into();
    PaymentFailed { payment_id: PAYMENT, order_id: ORDER, reason }
}

pub(crate) fn payment_refunded() -> PaymentRefunded {
    PaymentRefunded {
        payment_id: PAYMENT,
        order_id: ORDER,
        amount: 2_500,
        currency: "EUR".into(),
        refund_id: Some(REFUND),
    }
}

pub(crate) fn payment_refund_rejected() -> PaymentRefundRejected {
    let reason = "the payment was made with a method that cannot be refunded".into();
    PaymentRefundRejected { refund_id: REFUND, order_id: ORDER, reason }
}

pub(crate) fn gateway_unavailable() -> GatewayUnavailable {
    GatewayUnavailable { gateway: "stripe".into(), until: at(1) }
}
