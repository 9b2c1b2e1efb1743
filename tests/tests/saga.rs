//! The saga on virtual time: the production services, no server.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::Duration;

use bytes::Bytes;
use consign::broker::{Broker, Find, Message};
use consign::dead_letter::{self, Filter, Status};
use consign::event::{Cause, Envelope};
use consign_tests::System;
use contracts::{OrderCancelled, PaymentSucceeded};
use payment::gateway::Knobs;
use serde_json::{Value, json};
use uuid::Uuid;

async fn publish<E: consign::Event>(system: &System, event: &E, source: &str) {
    let envelope = Envelope {
        id: Uuid::now_v7(),
        event_type: E::TYPE.into(),
        version: E::VERSION,
        source: source.to_owned().into(),
        aggregate_id: "test".into(),
        aggregate_version: 1,
        time: system.now(),
        cause: Cause::new(),
        lane: consign::Lane::Standard,
        siblings: Vec::new(),
    };
    let payload = Bytes::from(serde_json::to_vec(event).unwrap());
    let message: Message = envelope.into_message(None, payload);
    system.bench.broker.publish(vec![message]).await.remove(0).unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_order_is_reserved_paid_and_confirmed() {
    let system = System::start().await;
    let id = system.place("book", 3).await;
    system.until(&id, "confirmed").await;
    system.settled().await;
    let order = system.order(&id).await;
    assert_eq!((order["total"].as_i64(), order["currency"].as_str()), (Some(3000), Some("EUR")));
    let payment = system.payment_of(&id).await;
    assert_eq!((payment["status"].as_str(), payment["amount"].as_i64()), (Some("succeeded"), Some(3000)));
    assert_eq!(order["payment_id"], payment["id"]);
    assert_eq!(payment["correlation_id"], order["correlation_id"], "one correlation id through everything");
    assert_eq!(system.stock_of("book").await, (97, 0));
    let timeline = system.timeline(&id).await;
    assert_eq!(timeline.first().map(String::as_str), Some("orders.created"));
    assert_eq!(timeline.last().map(String::as_str), Some("orders.confirmed"));
}

#[tokio::test(start_paused = true)]
async fn what_is_out_of_stock_is_cancelled_whole() {
    let system = System::start().await;
    let id = system.place("lamp", 6).await;
    system.until(&id, "cancelled").await;
    system.settled().await;
    assert_eq!(system.order(&id).await["reason"], "out_of_stock");
    assert_eq!(system.stock_of("lamp").await, (5, 0));
    // Cancelled before it was reserved, it leaves a tombstone and no charge.
    assert!(matches!(system.payment_of(&id).await["status"].as_str(), None | Some("forbidden")));
}

#[tokio::test(start_paused = true)]
async fn a_declined_payment_releases_the_stock() {
    let system = System::start().await;
    system.gateway.set(Knobs { decline_rate: 1.0, ..Knobs::CALM });
    let id = system.place("lamp", 5).await;
    system.until(&id, "cancelled").await;
    system.settled().await;
    assert_eq!(system.order(&id).await["reason"], "payment_failed");
    assert_eq!(system.stock_of("lamp").await, (5, 0));
    assert_eq!(system.payment_of(&id).await["status"], "failed");
    system.gateway.set(Knobs::CALM);
    let next = system.place("lamp", 5).await;
    system.until(&next, "confirmed").await;
}

#[tokio::test(start_paused = true)]
async fn an_order_unpaid_past_its_deadline_expires() {
    let system = System::start().await;
    system.gateway.set(Knobs { error_rate: 0.5, lost_answer_rate: 0.5, ..Knobs::CALM });
    let id = system.place("lamp", 5).await;
    system.until(&id, "reserved").await;
    system.bench.time.advance(Duration::from_secs(14 * 60)).await;
    assert_eq!(system.order(&id).await["status"], "reserved", "not before its deadline");
    system.until_within(Duration::from_secs(3 * 60), &id, "cancelled").await;
    assert_eq!(system.order(&id).await["reason"], "expired");
    system.settled().await;
    assert_eq!(system.stock_of("lamp").await, (5, 0));
    // The gateway comes back: whatever it did before, nothing is kept.
    system.gateway.set(Knobs::CALM);
    let ended =
        async || matches!(system.payment_of(&id).await["status"].as_str(), Some("failed" | "refunded"));
    let minutes = Duration::from_secs(600);
    system
        .bench
        .time
        .until_within(minutes, Duration::from_secs(1), "payment failed or refunded", ended)
        .await;
    for db in system.dbs() {
        let dead = dead_letter::list(db, &Filter::default(), Some(Status::Open), None, 10).await.unwrap();
        assert!(dead.is_empty(), "an outage of the gateway makes no dead letters: {dead:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_looked_up_and_not_charged_twice() {
    let system = System::start().await;
    system.gateway.set(Knobs { error_rate: 0.2, lost_answer_rate: 0.2, ..Knobs::CALM });
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(system.place("book", 1).await);
    }
    for id in &ids {
        system.until_within(Duration::from_secs(600), id, "confirmed").await;
    }
    system.settled().await;
    assert_eq!(system.stock_of("book").await, (80, 0));
}

#[tokio::test(start_paused = true)]
async fn an_order_cancelled_while_it_is_charged_is_refunded() {
    let system = System::start().await;
    system.gateway.set(Knobs { latency_ms: 2_000, ..Knobs::CALM });
    let id = system.place("lamp", 5).await;
    system.until(&id, "reserved").await;
    let pending = async || system.payment_of(&id).await["status"] == "pending";
    system.bench.time.until("the charge under way", pending).await;
    assert_eq!(system.cancel(&id).await, 200);
    assert_eq!(system.order(&id).await["status"], "cancelled");
    let ended =
        async || matches!(system.payment_of(&id).await["status"].as_str(), Some("refunded" | "failed"));
    let minute = Duration::from_secs(90);
    system.bench.time.until_within(minute, Duration::from_secs(1), "refunded", ended).await;
    system.settled().await;
    assert_eq!(system.order(&id).await["status"], "cancelled");
    assert_eq!(system.stock_of("lamp").await, (5, 0));
    let timeline = system.timeline(&id).await;
    assert!(
        timeline.contains(&"payments.refunded".to_owned())
            || timeline.contains(&"orders.cancelled".to_owned())
    );
    assert_eq!(system.cancel(&id).await, 200, "cancelling twice is the same as once");
}

#[tokio::test(start_paused = true)]
async fn a_confirmed_order_cannot_be_cancelled() {
    let system = System::start().await;
    let id = system.place("book", 1).await;
    system.until(&id, "confirmed").await;
    assert_eq!(system.cancel(&id).await, 409);
}

#[tokio::test(start_paused = true)]
async fn an_event_for_an_unknown_order_is_retried_and_then_kept() {
    let system = System::start().await;
    let event = PaymentSucceeded {
        payment_id: Uuid::now_v7(),
        order_id: Uuid::now_v7(),
        amount: 1,
        currency: "EUR".into(),
    };
    publish(&system, &event, "/services/payment").await;
    let dead = async || {
        let open = dead_letter::list(system.order.db(), &Filter::default(), Some(Status::Open), None, 10)
            .await
            .unwrap();
        open.first().is_some_and(|l| l.reason == "retries_exhausted" && l.attempts == 5)
    };
    system
        .bench
        .time
        .until_within(Duration::from_secs(600), Duration::from_secs(1), "a dead letter", dead)
        .await;

    // An operator finds it over HTTP, whole, runs it again in vain, and gives it up.
    let list = system.admin_get("/admin/dead-letters?reason=retries_exhausted").await;
    let id = list["dead_letters"][0]["id"].as_str().unwrap().to_owned();
    let whole = system.admin_get(&format!("/admin/dead-letters/{id}")).await;
    assert_eq!(whole["payload"]["order_id"], event.order_id.to_string());
    assert_eq!(whole["audit"][0]["action"], "dead");
    assert!(whole["error"].as_str().unwrap().contains("there is no order"), "{whole}");
    let all = json!({"filter": {"ids": [id]}});
    let dry = json!({"filter": {"consumer": "order-payments"}, "dry_run": true});
    assert_eq!(system.admin_post("/admin/dead-letters/redrive", &dry).await.1["ids"], json!([id]));
    assert_eq!(system.admin_post("/admin/dead-letters/redrive", &json!({})).await.0, 400, "all must be said");
    assert_eq!(system.admin_post("/admin/dead-letters/redrive", &all).await.1["ids"], json!([id]));
    // It is counted, and open, before it has run.
    let again = async || {
        let letter = system.admin_get(&format!("/admin/dead-letters/{id}")).await;
        letter["audit"].as_array().unwrap().iter().any(|a| a["action"] == "failed_again")
    };
    system.bench.time.until("the redrive in vain", again).await;
    assert_eq!(system.admin_post("/admin/dead-letters/discard", &all).await.1["ids"], json!([id]));
    assert_eq!(system.admin_post("/admin/dead-letters/redrive", &all).await.1["ids"], json!([]));
    let actions = system.admin_get(&format!("/admin/dead-letters/{id}")).await["audit"].clone();
    let actions: Vec<&str> =
        actions.as_array().unwrap().iter().map(|a| a["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["dead", "queued", "failed_again", "discarded"]);
}

/// A hundred lines and their customer are all wrong: the answer names as many faults as it may.
#[tokio::test(start_paused = true)]
async fn an_order_with_more_faults_than_an_answer_holds_is_refused_all_the_same() {
    let system = System::start().await;
    let line = contracts::WantedLine { product_id: "not an id".into(), quantity: 1 };
    let wrong = contracts::OrderRequested {
        order_id: Uuid::now_v7(),
        customer_id: "nor this".into(),
        items: vec![line; 100],
        payment_method: None,
        shipping_address: None,
        gift_note: None,
    };
    publish(&system, &wrong, "/tests").await;
    let refused = async || system.bench.broker.find("ORDERS", "orders.refused.>", Find::Last).await.unwrap();
    system.bench.time.until("refused", async || refused().await.is_some()).await;
    let refused: Value = serde_json::from_slice(&refused().await.unwrap().message.payload).unwrap();
    assert_eq!(refused["faults"].as_array().unwrap().len(), 100);
    assert_eq!(refused["faults"][0]["pointer"], "/customer_id");
}

fn euros(amount: i64) -> contracts::Money {
    contracts::Money { amount, currency: "EUR".into() }
}

#[tokio::test(start_paused = true)]
async fn a_cancellation_that_comes_before_its_order_forbids_it() {
    let system = System::start().await;
    let early = OrderCancelled { order_id: Uuid::now_v7(), reason: contracts::CancelReason::Requested };
    publish(&system, &early, "/services/order").await;
    let tombstone = async || system.payment_of(&early.order_id.to_string()).await["status"] == "forbidden";
    system.bench.time.until("payment's tombstone", tombstone).await;
    let late = contracts::OrderCreated {
        order_id: early.order_id,
        customer_id: "ada".into(),
        items: vec![contracts::OrderLine { product_id: "lamp".into(), quantity: 5, unit_price: euros(2500) }],
        total: euros(12_500),
        deadline: system.now() + Duration::from_secs(900),
        payment_method: None,
        shipping_address: None,
        gift_note: None,
    };
    publish(&system, &late, "/services/order").await;
    system.settled().await;
    assert_eq!(system.stock_of("lamp").await, (5, 0), "not reserved any more");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_oversold_when_many_want_the_last_ones() {
    let system = System::start().await;
    let mut ids = Vec::new();
    for _ in 0..12 {
        ids.push(system.place("lamp", 1).await);
    }
    let mut confirmed = 0;
    for id in &ids {
        let ended =
            async || matches!(system.order(id).await["status"].as_str(), Some("confirmed" | "cancelled"));
        system.bench.time.until("every order ended", ended).await;
        confirmed += i32::from(system.order(id).await["status"] == "confirmed");
    }
    system.settled().await;
    assert_eq!(confirmed, 5);
    assert_eq!(system.stock_of("lamp").await, (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_broker_outage_is_absorbed_until_the_outbox_is_full() {
    let system = System::start_with(|order| order.outbox.max_pending = 10).await;
    system.bench.broker.close().await;
    for _ in 0..10 {
        assert_eq!(system.try_to_place("book").await.0, 202, "an outage is absorbed");
    }
    let full = async || system.order.db().outbox_depth() == 10;
    system.bench.time.until("ten events waiting", full).await;
    let (status, retry_after) = system.try_to_place("book").await;
    assert_eq!((status, retry_after.is_some()), (503, true), "and then refused, with when to try again");
    assert_eq!(
        (system.probe("/livez").await, system.probe("/readyz").await, system.probe("/health").await),
        (200, 503, 503)
    );
}
