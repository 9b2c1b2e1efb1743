//! Payments on virtual time: outages, deadlines, refunds, callbacks, escalation. The production services, no server.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::Duration;

use bytes::Bytes;
use consign::broker::Broker;
use consign::dead_letter::{self, Filter, Status};
use consign::event::{Cause, Envelope};
use consign_tests::System;
use contracts::OrderRefundRequested;
use payment::gateway::Knobs;
use serde_json::{Value, json};
use uuid::Uuid;

const SECOND: Duration = Duration::from_secs(1);
const MINUTES: Duration = Duration::from_secs(600);

async fn confirmed(system: &System, product: &str, quantity: u32) -> String {
    let id = system.place(product, quantity).await;
    system.until(&id, "confirmed").await;
    system.settled().await;
    id
}

async fn refunded(system: &System, id: &str, amount: i64) {
    let given_back = async || {
        let order = system.order(id).await;
        order["refunded"] == amount && order["refunding"] == 0
    };
    system.bench.time.until_within(MINUTES, SECOND, "given back", given_back).await;
    system.settled().await;
}

async fn breaker(system: &System) -> Value {
    system.payment_get("/health").await["breakers"][0].clone()
}

async fn no_dead_letters(system: &System) {
    for db in system.dbs() {
        let dead = dead_letter::list(db, &Filter::default(), Some(Status::Open), None, 10).await.unwrap();
        assert!(dead.is_empty(), "{dead:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_burns_no_attempt_and_few_calls_and_then_everything_is_paid() {
    let system = System::start_with(|order| order.deadline = Duration::from_secs(3600)).await;
    system.gateway.set(Knobs { error_rate: 1.0, ..Knobs::CALM });
    let mut ids = Vec::new();
    for _ in 0..90 {
        ids.push(system.place("book", 1).await);
    }
    let open = async || breaker(&system).await["state"] == "open";
    system.bench.time.until_within(MINUTES, SECOND, "the breaker opens", open).await;
    let at_first = system.gateway.calls();
    assert!(at_first < 200, "until it opens, and what was under way: {at_first}");
    system.bench.time.advance(Duration::from_secs(60)).await;
    let probes = system.gateway.calls() - at_first;
    // Rounds 5, 10, 10, … s apart, a fifth less at least, of three probes.
    assert!((3..=24).contains(&probes), "the probes, and nothing else: {probes}");
    assert_eq!(system.payment_get("/health").await["status"], "degraded");
    let counted: u32 = system
        .payment
        .db()
        .query("SELECT COALESCE(SUM(failures), 0) AS n FROM tasks")
        .fetch_scalar()
        .await
        .unwrap();
    assert_eq!(counted, 0, "nothing is counted against a payment");
    no_dead_letters(&system).await;
    assert_eq!(system.order(&ids[0]).await["status"], "reserved");
    system.gateway.set(Knobs::CALM);
    for id in &ids {
        system.until_within(Duration::from_secs(60), id, "confirmed").await;
    }
    assert_eq!(breaker(&system).await["state"], "closed");
    system.settled().await;
    system.verify().await;
}

#[tokio::test(start_paused = true)]
async fn what_hangs_is_asked_about_and_charged_once() {
    let system = System::start().await;
    system.gateway.set(Knobs { timeout_rate: 0.3, lost_answer_rate: 0.2, ..Knobs::CALM });
    let mut ids = Vec::new();
    for _ in 0..15 {
        ids.push(system.place("book", 1).await);
    }
    for id in &ids {
        system.until_within(Duration::from_secs(800), id, "confirmed").await;
    }
    system.settled().await;
    system.verify().await;
}

#[tokio::test(start_paused = true)]
async fn callbacks_may_come_twice() {
    let system = System::start().await;
    system.gateway.set(Knobs { callback_rate: 1.0, duplicate_callback_rate: 1.0, ..Knobs::CALM });
    for _ in 0..5 {
        confirmed(&system, "book", 1).await;
    }
    let known = async || {
        let count = "SELECT COUNT(*) AS n FROM callbacks";
        system.payment.db().query(count).fetch_scalar::<u64>().await.unwrap() == 5
    };
    system.bench.time.until("five callbacks, each once", known).await;
    system.verify().await;
}

/// An order whose charge the gateway makes without saying so; then the gateway is away.
async fn charged_in_secret(system: &System) -> String {
    system.gateway.set(Knobs { lost_answer_rate: 1.0, ..Knobs::CALM });
    let id = system.place("lamp", 5).await;
    system.until(&id, "reserved").await;
    let before = system.gateway.calls();
    let charged = async || system.gateway.calls() > before;
    system.bench.time.until_within(MINUTES, SECOND, "the charge", charged).await;
    system.bench.time.advance(SECOND).await;
    id
}

#[tokio::test(start_paused = true)]
async fn what_was_charged_in_secret_is_given_back_when_the_order_expires() {
    let system = System::start_with(|order| order.deadline = Duration::from_secs(30)).await;
    let id = charged_in_secret(&system).await;
    system.gateway.set(Knobs { error_rate: 1.0, ..Knobs::CALM });
    system.until_within(Duration::from_secs(60), &id, "cancelled").await;
    assert_eq!(system.order(&id).await["reason"], "expired");
    system.gateway.set(Knobs::CALM);
    let returned = async || system.payment_of(&id).await["status"] == "refunded";
    system.bench.time.until_within(MINUTES, SECOND, "refunded", returned).await;
    system.settled().await;
    let timeline = system.timeline(&id).await;
    assert!(timeline.contains(&"payments.refunded".to_owned()), "{timeline:?}");
    assert_eq!(system.stock_of("lamp").await, (5, 0));
    system.verify().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_charged_after_the_reservation_expired() {
    let system = System::start_with(|order| order.deadline = Duration::from_secs(30)).await;
    system.gateway.set(Knobs { error_rate: 1.0, ..Knobs::CALM });
    let id = system.place("lamp", 5).await;
    system.until(&id, "reserved").await;
    system.bench.time.advance(Duration::from_secs(10)).await;
    // All falls due at once: the deadline, and the next try at a gateway that is back.
    system.bench.time.leap(Duration::from_secs(21)).await;
    system.gateway.set(Knobs::CALM);
    system.until_within(MINUTES, &id, "cancelled").await;
    let ended = async || system.payment_of(&id).await["status"] == "failed";
    system.bench.time.until_within(MINUTES, SECOND, "not charged", ended).await;
    assert_eq!(system.order(&id).await["reason"], "expired");
    system.settled().await;
    system.verify().await;
}

#[tokio::test(start_paused = true)]
async fn orders_get_more_time_while_the_gateway_is_out_of_reach_but_not_for_ever() {
    let system = System::start_with(|order| {
        order.deadline = Duration::from_secs(60);
        order.on_payment_outage = order::OnOutage::Extend;
        order.extend_limit = Duration::from_secs(300);
    })
    .await;
    system.gateway.set(Knobs { error_rate: 1.0, ..Knobs::CALM });
    let mut ids = Vec::new();
    for _ in 0..30 {
        ids.push(system.place("book", 1).await);
    }
    system.bench.time.advance(Duration::from_secs(200)).await;
    let order = system.order(&ids[0]).await;
    assert_eq!(order["status"], "reserved", "beyond its first deadline: {order}");
    assert!(system.timeline(&ids[0]).await.contains(&"orders.deadline_extended".to_owned()));
    system.gateway.set(Knobs::CALM);
    for id in &ids[..15] {
        system.until_within(Duration::from_secs(60), id, "confirmed").await;
    }
    system.gateway.set(Knobs { error_rate: 1.0, ..Knobs::CALM });
    let mut late = Vec::new();
    for _ in 0..30 {
        late.push(system.place("book", 1).await);
    }
    system.until_within(Duration::from_secs(330), &late[29], "cancelled").await;
    assert_eq!(
        system.order(&late[29]).await["reason"],
        "expired",
        "no order stays unpaid beyond extend_limit"
    );
    system.gateway.set(Knobs::CALM);
    let pending = async || {
        system.payment_get("/payments/stuck?after_seconds=0").await["stuck"].as_array().unwrap().is_empty()
    };
    system.bench.time.until_within(MINUTES, SECOND, "no payment under way", pending).await;
    system.settled().await;
    system.verify().await;
}

#[tokio::test(start_paused = true)]
async fn what_does_not_come_to_an_end_is_escalated_once_and_listed() {
    let system = System::start_with(|order| order.deadline = Duration::from_secs(7200)).await;
    system.gateway.set(Knobs { error_rate: 1.0, ..Knobs::CALM });
    let id = system.place("lamp", 1).await;
    system.until(&id, "reserved").await;
    system.bench.time.leap(Duration::from_secs(19 * 60)).await;
    assert_eq!(system.payment_get("/payments/stuck").await["stuck"], json!([]));
    system.bench.time.leap(Duration::from_secs(90)).await;
    let escalated = async || {
        let stuck = system.payment_get("/payments/stuck").await;
        let first = &stuck["stuck"][0];
        let says_why = first["last_error"].as_str().is_some_and(|e| e.contains("simulated"));
        first["order_id"] == id.as_str() && !first["escalated_at"].is_null() && says_why
    };
    system.bench.time.until_within(Duration::from_secs(90), SECOND, "escalated, and why", escalated).await;
    let at = system.payment_get("/payments/stuck").await["stuck"][0]["escalated_at"].clone();
    system.bench.time.advance(Duration::from_secs(65)).await;
    assert_eq!(system.payment_get("/payments/stuck").await["stuck"][0]["escalated_at"], at, "told once");
    system.gateway.set(Knobs::CALM);
    system.until_within(MINUTES, &id, "confirmed").await;
    assert_eq!(system.payment_get("/payments/stuck").await["stuck"], json!([]));
}

#[tokio::test(start_paused = true)]
async fn a_confirmed_order_is_given_back_by_lines_and_then_whole() {
    let system = System::start().await;
    let id = confirmed(&system, "book", 5).await;
    assert_eq!(system.stock_of("book").await, (95, 0));
    let two = json!({"lines": [{"product_id": "book", "quantity": 2}], "reason": "two too many"});
    let (status, first) = system.refund(&id, "a", &two).await;
    assert_eq!((status, &first["amount"], &first["status"]), (202, &json!(2000), &json!("pending")));
    assert_eq!(system.refund(&id, "a", &two).await, (202, first.clone()), "the first answer again");
    assert_eq!(system.refund(&id, "a", &json!({})).await.0, 422, "the key was used with another body");
    refunded(&system, &id, 2000).await;
    assert_eq!(system.stock_of("book").await, (97, 0), "back on the shelf");
    let four = json!({"lines": [{"product_id": "book", "quantity": 4}]});
    let (status, problem) = system.refund(&id, "b", &four).await;
    assert_eq!((status, &problem["errors"][0]["pointer"]), (422, &json!("/lines/0")));
    assert_eq!(system.refund(&id, "c", &json!({"restock": false})).await.0, 202);
    refunded(&system, &id, 5000).await;
    assert_eq!(system.stock_of("book").await, (97, 0), "written off");
    assert_eq!(system.refund(&id, "d", &json!({})).await.0, 409, "nothing is left");
    let statuses: Vec<Value> = system.refunds(&id).await.iter().map(|r| r["status"].clone()).collect();
    assert_eq!(statuses, ["done", "done"]);
    let payment = system.payment_of(&id).await;
    assert_eq!((&payment["status"], &payment["refunded"]), (&json!("succeeded"), &json!(5000)));
    assert_eq!(payment["refunds"].as_array().unwrap().len(), 2);
    let timeline = system.timeline(&id).await;
    for entry in ["orders.refund_requested", "payments.refunded", "orders.refunded"] {
        assert_eq!(timeline.iter().filter(|e| *e == entry).count(), 2, "{timeline:?}");
    }
    system.verify().await;
}

#[tokio::test(start_paused = true)]
async fn a_refund_survives_an_outage_and_only_what_was_confirmed_is_refunded() {
    let system = System::start().await;
    let id = confirmed(&system, "book", 1).await;
    system.gateway.set(Knobs { error_rate: 0.5, lost_answer_rate: 0.5, ..Knobs::CALM });
    assert_eq!(system.refund(&id, "a", &json!({})).await.0, 202);
    system.bench.time.advance(Duration::from_secs(30)).await;
    assert_eq!(system.order(&id).await["refunding"], 1000);
    let open = system.place("lamp", 1).await;
    assert_eq!(system.refund(&open, "b", &json!({})).await.0, 409);
    system.gateway.set(Knobs::CALM);
    refunded(&system, &id, 1000).await;
    system.until_within(MINUTES, &open, "confirmed").await;
    system.settled().await;
    system.verify().await;
}

#[tokio::test(start_paused = true)]
async fn payment_alone_decides_and_may_say_no() {
    let system = System::start().await;
    let id = confirmed(&system, "book", 1).await;
    // An order service that asks for more than was paid.
    let event = OrderRefundRequested {
        refund_id: Uuid::now_v7(),
        order_id: id.parse().unwrap(),
        amount: 1001,
        currency: "EUR".into(),
        reason: None,
    };
    let envelope = Envelope {
        id: Uuid::now_v7(),
        event_type: "orders.refund_requested".into(),
        version: 1,
        source: "/services/order".into(),
        aggregate_id: id.clone(),
        aggregate_version: 9,
        time: system.now(),
        cause: Cause::new(),
        lane: consign::Lane::Standard,
        siblings: Vec::new(),
    };
    let message = envelope.into_message(None, Bytes::from(serde_json::to_vec(&event).unwrap()));
    system.bench.broker.publish(vec![message]).await.remove(0).unwrap();
    let calls = system.gateway.calls();
    let rejected = async || {
        let status = "SELECT status FROM refunds WHERE refund_id = $1";
        let query = system.payment.db().query(status).bind(event.refund_id);
        query
            .fetch_optional()
            .await
            .unwrap()
            .is_some_and(|r| r.get::<String>("status").unwrap() == "rejected")
    };
    system.bench.time.until("rejected", rejected).await;
    system.settled().await;
    assert_eq!(system.gateway.calls(), calls);
    assert_eq!(system.payment_of(&id).await["refunded"], 0);
    no_dead_letters(&system).await;
}

#[tokio::test(start_paused = true)]
async fn a_card_number_never_comes_in() {
    let system = System::start().await;
    let url = format!("http://{}/orders", system.order.address());
    let place = async |method: &str| {
        let item = json!([{"product_id": "book", "quantity": 1}]);
        let body = json!({"customer_id": "ada", "items": item, "payment_method": method});
        reqwest::Client::new().post(&url).json(&body).send().await.unwrap().status().as_u16()
    };
    for card in ["4242424242424242", "4242-4242-4242-4242", "378282246310005", "pm 1", ""] {
        assert_eq!(place(card).await, 422, "{card:?}");
    }
    assert_eq!(place("pm_card_visa").await, 202);
}
