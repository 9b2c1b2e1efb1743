//! Every step of the saga fails, hangs, is repeated, and comes late: whatever does, each order ends, and every cent and piece is accounted
//! for. On virtual time.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::Duration;

use consign_tests::System;
use consign_tests::chaos::{How, Plan};
use payment::gateway::Knobs;
use serde_json::json;

/// The steps: which consumer handles which event, and what the gateway is asked.
const STEPS: [&str; 17] = [
    "inventory-orders orders.created",
    "inventory-orders orders.confirmed",
    "inventory-orders orders.cancelled",
    "inventory-orders orders.deadline_extended",
    "inventory-orders orders.refunded",
    "payment-inventory inventory.reserved",
    "payment-orders orders.cancelled",
    "payment-orders orders.deadline_extended",
    "payment-orders orders.refund_requested",
    "order-inventory inventory.reserved",
    "order-inventory inventory.rejected",
    "order-payments payments.succeeded",
    "order-payments payments.failed",
    "order-payments payments.refunded",
    "order-payments payments.gateway_unavailable",
    "gateway charge",
    "gateway refund",
];

const SECOND: Duration = Duration::from_secs(1);

async fn system(plan: &Plan) -> System {
    System::start_faulty(plan, |order| {
        // Short, so that an outage outlasts it; and with it the time that faults may take.
        order.deadline = Duration::from_secs(60);
        order.on_payment_outage = order::OnOutage::Extend;
    })
    .await
}

async fn ends(system: &System, id: &str, wanted: &[&str]) {
    let ended = async || {
        let order = system.order(id).await;
        wanted.contains(&order["status"].as_str().unwrap())
    };
    system.bench.time.until_within(Duration::from_secs(600), SECOND, &format!("{id} ends"), ended).await;
}

/// Orders that between them take every step, and come to their ends whatever happens on the way.
async fn every_way(system: &System) {
    // Bought, and part of it given back.
    let bought = system.place("book", 2).await;
    // Too many.
    let short = system.place("lamp", 100).await;
    ends(system, &bought, &["confirmed"]).await;
    ends(system, &short, &["cancelled"]).await;
    let part = json!({"lines": [{"product_id": "book", "quantity": 1}]});
    assert_eq!(system.refund(&bought, &format!("r-{bought}"), &part).await.0, 202);
    let given_back = async || system.order(&bought).await["refunded"] == 1000;
    system.bench.time.until_within(Duration::from_secs(600), SECOND, "given back", given_back).await;

    // Declined.
    system.gateway.set(Knobs { decline_rate: 1.0, ..Knobs::CALM });
    let declined = system.place("book", 1).await;
    ends(system, &declined, &["cancelled"]).await;

    // Cancelled while it is charged.
    system.gateway.set(Knobs { latency_ms: 3_000, ..Knobs::CALM });
    let cancelled = system.place("book", 1).await;
    let charging = async || system.payment_of(&cancelled).await["status"] == "pending";
    system.bench.time.until_within(Duration::from_secs(300), SECOND, "the charge under way", charging).await;
    // Or too late for it, when a fault held this step up and not the other.
    assert!(matches!(system.cancel(&cancelled).await, 200 | 409));
    ends(system, &cancelled, &["cancelled", "confirmed"]).await;
    system.gateway.set(Knobs::CALM);

    // The gateway is away for longer than the deadline.
    system.gateway.set(Knobs { error_rate: 1.0, ..Knobs::CALM });
    let mut waiting = Vec::new();
    for _ in 0..30 {
        waiting.push(system.place("book", 1).await);
    }
    let extended = async || {
        let timeline = system.timeline(&waiting[0]).await;
        timeline.iter().any(|e| e == "orders.deadline_extended")
    };
    system.bench.time.until_within(Duration::from_secs(600), SECOND, "more time", extended).await;
    system.gateway.set(Knobs::CALM);
    for id in &waiting {
        ends(system, id, &["confirmed", "cancelled"]).await;
    }
    settled(system).await;
    system.verify().await;
    system.stock("book", 100, &format!("more-{bought}")).await;
}

/// Until nothing is under way, retries that wait for their time included.
async fn settled(system: &System) {
    let quiet = async || {
        let pending = system.payment_get("/payments/stuck?after_seconds=0").await;
        pending["stuck"].as_array().unwrap().is_empty()
    };
    system.bench.time.until_within(Duration::from_secs(900), SECOND, "no payment under way", quiet).await;
    system.bench.time.advance(Duration::from_secs(10)).await;
    system.settled().await;
}

async fn each_step(how: How, times: u32) {
    let plan = Plan::default();
    let system = system(&plan).await;
    for step in STEPS {
        println!("{step} {how:?}");
        plan.goes_wrong(step, how, times);
        every_way(&system).await;
        assert!(plan.hits(step) > 0, "{step} was never taken, so nothing was tried");
    }
}

#[tokio::test(start_paused = true)]
async fn each_step_fails() {
    each_step(How::Fails, 2).await;
}

#[tokio::test(start_paused = true)]
async fn each_step_fails_after_it_has_done_its_work() {
    each_step(How::FailsAfterwards, 2).await;
}

#[tokio::test(start_paused = true)]
async fn each_step_hangs() {
    each_step(How::Hangs, 1).await;
}

#[tokio::test(start_paused = true)]
async fn each_step_is_repeated() {
    let plan = Plan::default();
    let system = system(&plan).await;
    plan.comes_twice(true);
    every_way(&system).await;
    every_way(&system).await;
}

#[tokio::test(start_paused = true)]
async fn each_step_comes_after_what_follows_it() {
    let plan = Plan::default();
    let system = system(&plan).await;
    let events: std::collections::BTreeSet<&str> =
        STEPS.iter().filter_map(|s| s.split_once(' ').map(|(_, e)| e)).filter(|e| e.contains('.')).collect();
    for event in events {
        println!("{event} is late");
        plan.is_late(Some((event, Duration::from_secs(7))));
        every_way(&system).await;
        assert!(plan.hits(event) > 0, "{event} was never sent, so nothing was tried");
        plan.is_late(None);
    }
}
