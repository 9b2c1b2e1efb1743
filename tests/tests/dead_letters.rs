//! Dead letters on real servers, both ways they come about, handled with the operators' commands.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::{Duration, Instant};

use consign::broker::nats::NatsBroker;
use consign::broker::{Broker, Message, Settlement};
use consign::testing::servers::{NATS, NatsServer};
use consign_tests::fleet::Fleet;
use consign_tests::{TOKEN, consign};
use serde_json::Value;

async fn fleet() -> (Fleet, NatsBroker) {
    let nats = tokio::task::block_in_place(|| NatsServer::start(NATS));
    let broker = NatsBroker::connect(&nats.config(), "test").await.unwrap();
    (Fleet::start(vec![nats], 1, &[("CONSIGN_SERVICE__CONSUMER__ACK_WAIT", "11s")]).await, broker)
}

/// `consign dead-letters …`: its exit code, and what it printed as JSON values.
async fn dead_letters(fleet: &Fleet, arguments: &[&str]) -> (i32, Vec<Value>) {
    let [order, inventory, payment] = ["order", "inventory", "payment"].map(|s| fleet.urls(s)[0].clone());
    let endpoints = [
        ["--order-url", &order],
        ["--inventory-url", &inventory],
        ["--payment-url", &payment],
        ["--admin-token", TOKEN],
        ["--format", "json"],
    ];
    let (code, out, err) = consign(&[&["dead-letters"], arguments, &endpoints.concat()].concat()).await;
    let values: Vec<Value> = serde_json::Deserializer::from_str(&out)
        .into_iter::<Value>()
        .collect::<Result<_, _>>()
        .unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    // A list is one array, changes are a line each.
    match values.as_slice() {
        [Value::Array(list)] => (code, list.clone()),
        _ => (code, values),
    }
}

async fn until_listed(fleet: &Fleet, arguments: &[&str], count: usize) -> Vec<Value> {
    let started = Instant::now();
    loop {
        let (_, list) = dead_letters(fleet, arguments).await;
        if list.len() == count {
            return list;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "{count} expected of {arguments:?}: {list:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_consumer_can_read_is_listed_redriven_and_discarded() {
    let (fleet, broker) = fleet().await;
    let garbage = (0..12).map(|n| Message {
        subject: "orders.created.v1.standard".into(),
        msg_id: Some(format!("garbage-{n}")),
        headers: vec![("ce-id".into(), "not an id".into())],
        payload: "not JSON".into(),
    });
    broker.publish(garbage.collect()).await.into_iter().for_each(|a| drop(a.unwrap()));

    let of_inventory = ["list", "--consumer", "inventory-orders"];
    let list = until_listed(&fleet, &of_inventory, 12).await;
    assert!(list.iter().all(|l| l["reason"] == list[0]["reason"]), "{list:?}");
    let reason = list[0]["reason"].as_str().unwrap();
    assert_eq!(dead_letters(&fleet, &["list", "--reason", "retries_exhausted"]).await.1.len(), 0);
    assert_eq!(dead_letters(&fleet, &["list", "--older-than", "1h"]).await.1.len(), 0);
    let id = list[0]["id"].as_str().unwrap();

    let some = ["redrive", "--consumer", "inventory-orders", "--reason", reason];
    let (code, dry) = dead_letters(&fleet, &[&some[..], &["--dry-run"]].concat()).await;
    assert_eq!((code, dry.len()), (0, 12));
    assert!(dry.iter().all(|d| d["dry_run"] == true), "{dry:?}");
    let (_, shown) = dead_letters(&fleet, &["show", id]).await;
    assert_eq!(shown[0]["redrives"], 0, "{shown:?}");

    let (code, redriven) = dead_letters(&fleet, &[&some[..], &["--rate", "50"]].concat()).await;
    assert_eq!((code, redriven.len()), (0, 12));
    // They are no better than they were, and are open again. Each is counted before it runs, so only its history says that it has.
    let started = Instant::now();
    loop {
        let (_, list) = dead_letters(&fleet, &of_inventory).await;
        let (_, shown) = dead_letters(&fleet, &["show", id]).await;
        let history: Vec<&str> =
            shown[0]["audit"].as_array().unwrap().iter().map(|h| h["action"].as_str().unwrap()).collect();
        let failed = history.contains(&"queued") && history.contains(&"failed_again");
        if failed && list.len() == 12 && list.iter().all(|l| l["redrives"] == 1) {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "{history:?} {list:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    let (code, discarded) = dead_letters(&fleet, &["discard", "--consumer", "inventory-orders"]).await;
    assert_eq!((code, discarded.len()), (0, 12));
    assert_eq!(dead_letters(&fleet, &of_inventory).await.1.len(), 0);
    assert_eq!(dead_letters(&fleet, &["redrive", id]).await.0, 1, "what was discarded is not run again");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_gave_up_delivering_is_taken_up_from_its_advisory() {
    let (mut fleet, broker) = fleet().await;
    let started = Instant::now();
    // It consumes, and has done with the order that the fleet began with: created and confirmed.
    let info = async || broker.consumer_info("ORDERS", "inventory-orders").await;
    while !info().await.is_ok_and(|i| i.ack_floor >= 2) {
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", info().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    fleet.kill("inventory").await;
    let ids = fleet.place_many(0, 3, "standard", Duration::ZERO).await;
    // A worker that loses everything it is given, until the server has had enough.
    for delivery in 1..=5 {
        let mut got = Vec::new();
        while got.len() < ids.len() {
            got.extend(
                broker.fetch("ORDERS", "inventory-orders", 10, Duration::from_secs(20)).await.unwrap(),
            );
        }
        assert!(got.iter().all(|d| d.delivered == delivery), "{got:?}");
        let again = got.into_iter().map(|d| (d.reply, Settlement::Nak(Duration::ZERO))).collect();
        broker.settle("ORDERS", "inventory-orders", again).await.unwrap();
    }
    assert_eq!(
        broker.fetch("ORDERS", "inventory-orders", 10, Duration::from_secs(2)).await.unwrap().len(),
        0
    );
    broker.close(Duration::from_secs(2)).await;

    fleet.add("inventory").await;
    fleet.all_end(&ids, Duration::from_secs(60)).await;
    for id in &ids {
        assert_eq!(fleet.order(id).await["status"], "confirmed");
    }
    let list = until_listed(&fleet, &["list", "--reason", "exhausted", "--status", "redriven"], 3).await;
    assert!(list.iter().all(|l| l["consumer"] == "inventory-orders"), "{list:?}");
    fleet.verify().await;
}
