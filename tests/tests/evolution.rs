//! A real change of a contract, carried through while orders come in: `orders.created` and `inventory.reserved` from version 1 to version 2 and
//! back, with separate processes on NATS and PostgreSQL, two replicas of each, replaced one after the other. As `docs/how-to-change-an-event.md`
//! tells it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::{Duration, Instant};

use consign::testing::servers::{NATS, NatsServer};
use consign_tests::fleet::{Fleet, Load};
use serde_json::Value;

/// Orders a second while a step is taken.
const LOAD: u32 = 40;
const LIMIT: Duration = Duration::from_secs(60);

const CREATED: &str = "orders.created";
const RESERVED: &str = "inventory.reserved";
const ORDER_PUBLISHES: &str = "order:CONSIGN_SERVICE__PUBLISH__ORDERS_CREATED";
const ORDER_ACCEPTS: &str = "order:CONSIGN_SERVICE__ACCEPT__INVENTORY_RESERVED";
const INVENTORY_PUBLISHES: &str = "inventory:CONSIGN_SERVICE__PUBLISH__INVENTORY_RESERVED";
const INVENTORY_ACCEPTS: &str = "inventory:CONSIGN_SERVICE__ACCEPT__ORDERS_CREATED";
const PAYMENT_ACCEPTS: &str = "payment:CONSIGN_SERVICE__ACCEPT__INVENTORY_RESERVED";

/// What `consign schema usage` says of an event.
async fn usage(fleet: &Fleet, event: &str) -> Vec<Value> {
    let (code, out, err) = fleet.consign(&["schema", "usage", event, "--format", "json"]).await;
    assert_eq!(code, 0, "{err}");
    serde_json::from_str(&out).unwrap()
}

/// The versions of an event that the broker gives to a consumer.
async fn given(fleet: &Fleet, event: &str, consumer: &str) -> Vec<u64> {
    let lines = usage(fleet, event).await;
    let given = lines.iter().filter(|l| l["consumer"] == consumer && l["given"] == true);
    given.map(|l| l["version"].as_u64().unwrap()).collect()
}

async fn until_given(fleet: &Fleet, event: &str, consumer: &str, versions: &[u64]) {
    let started = Instant::now();
    loop {
        let now = given(fleet, event, consumer).await;
        if now == versions {
            return;
        }
        assert!(started.elapsed() < LIMIT, "{consumer} is given {now:?} of {event}, not {versions:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The versions of an event that are published.
async fn published(fleet: &Fleet, event: &str) -> Vec<u64> {
    let lines = usage(fleet, event).await;
    let mut published: Vec<u64> = lines
        .iter()
        .filter(|l| l["state"].as_str().unwrap().starts_with("published"))
        .map(|l| l["version"].as_u64().unwrap())
        .collect();
    published.dedup();
    published
}

/// Lets orders come in for a while longer; all of them come to an end, and all is accounted for.
async fn clean(fleet: &Fleet, load: Load, step: &str) {
    tokio::time::sleep(Duration::from_secs(1)).await;
    let ids = load.stop().await;
    println!("{step}: {} orders", ids.len());
    fleet.all_end(&ids, LIMIT).await;
    fleet.verify().await;
}

/// One consumer moves from one version to another: both for a while, then the new one alone.
async fn move_consumer(
    fleet: &mut Fleet,
    (service, setting): (&'static str, &str),
    (event, consumer): (&str, &str),
    to: u64,
) {
    let load = fleet.load(LOAD);
    fleet.set(setting, "[1, 2]");
    fleet.roll(service, &load).await;
    until_given(fleet, event, consumer, &[1, 2]).await;
    clean(fleet, load, &format!("{consumer} reads both")).await;
    let load = fleet.load(LOAD);
    fleet.set(setting, &format!("[{to}]"));
    fleet.roll(service, &load).await;
    until_given(fleet, event, consumer, &[to]).await;
    clean(fleet, load, &format!("{consumer} reads version {to}")).await;
}

async fn publish(fleet: &mut Fleet, versions: &str, expected: &[u64]) {
    let load = fleet.load(LOAD);
    fleet.set(ORDER_PUBLISHES, versions);
    fleet.set(INVENTORY_PUBLISHES, versions);
    fleet.roll("order", &load).await;
    fleet.roll("inventory", &load).await;
    assert_eq!(published(fleet, CREATED).await, expected);
    assert_eq!(published(fleet, RESERVED).await, expected);
    clean(fleet, load, &format!("published as {versions}")).await;
}

/// Ends a version, if nobody reads it; the exit code, and what is said.
async fn retire(fleet: &Fleet, event: &str, version: &str) -> (i32, String) {
    let (code, out, err) = fleet.consign(&["schema", "retire", event, version]).await;
    (code, out + &err)
}

async fn consumers_move(fleet: &mut Fleet, to: u64) {
    let inventory = ("inventory", INVENTORY_ACCEPTS);
    move_consumer(fleet, inventory, (CREATED, "inventory-orders"), to).await;
    move_consumer(fleet, ("payment", PAYMENT_ACCEPTS), (RESERVED, "payment-inventory"), to).await;
    move_consumer(fleet, ("order", ORDER_ACCEPTS), (RESERVED, "order-inventory"), to).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_gets_another_version_under_load_and_loses_it_again() {
    let nats = tokio::task::block_in_place(|| NatsServer::start(NATS));
    let all = [ORDER_PUBLISHES, ORDER_ACCEPTS, INVENTORY_PUBLISHES, INVENTORY_ACCEPTS, PAYMENT_ACCEPTS];
    let mut fleet = Fleet::start(vec![nats], 2, &all.map(|setting| (setting, "[1]"))).await;
    let load = fleet.load(LOAD);
    assert_eq!(published(&fleet, CREATED).await, [1]);
    clean(&fleet, load, "all on version 1").await;

    publish(&mut fleet, "[1, 2]", &[1, 2]).await;
    for (event, consumer) in [(CREATED, "inventory-orders"), (RESERVED, "payment-inventory")] {
        let (code, told) = retire(&fleet, event, "v1").await;
        assert!(code == 1 && told.contains(consumer), "somebody reads it: {told}");
    }
    consumers_move(&mut fleet, 2).await;
    for event in [CREATED, RESERVED] {
        let (code, told) = retire(&fleet, event, "v1").await;
        assert_eq!((code, told.contains("published as v2")), (0, true), "{told}");
        assert_eq!(published(&fleet, event).await, [2]);
    }
    publish(&mut fleet, "[2]", &[2]).await;

    // Backwards: what is retired comes again, and what is not configured is published as long as somebody needs it.
    for event in [CREATED, RESERVED] {
        let (code, _, err) = fleet.consign(&["schema", "restore", event, "v1"]).await;
        assert_eq!(code, 0, "{err}");
    }
    publish(&mut fleet, "[1, 2]", &[1, 2]).await;
    consumers_move(&mut fleet, 1).await;
    publish(&mut fleet, "[1]", &[1]).await;

    // Each took effect once, as what it was then.
    for (service, sql) in [
        (
            "inventory",
            "SELECT COUNT(*) FROM consumed WHERE consumer = 'inventory-orders' AND event LIKE 'orders.created.v_' AND handled > 0",
        ),
        (
            "payment",
            "SELECT COUNT(*) FROM consumed WHERE consumer = 'payment-inventory' AND event LIKE 'inventory.reserved.v_' AND handled > 0",
        ),
    ] {
        assert_eq!(fleet.count(service, sql).await, 2, "{service}");
    }
    let orders = fleet.count("order", "SELECT COUNT(*) FROM orders").await;
    let handled = "SELECT SUM(handled)::BIGINT FROM consumed WHERE event LIKE 'orders.created.v_'";
    // Replicas tell every ten seconds.
    let started = Instant::now();
    while fleet.count("inventory", handled).await < orders && started.elapsed() < LIMIT {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(fleet.count("inventory", handled).await, orders, "each once");
}
