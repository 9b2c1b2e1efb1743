//! A flood of standard orders does not delay express ones: on real servers, with standard events waiting at every hop.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::Duration;

use consign::Timestamp;
use consign::testing::servers::{NATS, NatsServer, PostgresServer};
use consign_tests::fleet::Fleet;

/// Express orders of each phase.
const EXPRESS: usize = 150;
const EVERY: Duration = Duration::from_millis(40);
/// Standard orders: more than the services get done while the express ones pass them.
const FLOOD: usize = 3000;

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_standard_orders_does_not_delay_express_ones() {
    let (nats, postgres) = tokio::task::block_in_place(|| {
        // A disk whose every commit takes 20 ms: what waits, waits for its turn and not for a processor.
        (NatsServer::start(NATS), PostgresServer::start_with(&["commit_delay=20000", "commit_siblings=0"]))
    });
    // Few at a time, so that the flood waits in all streams and at the gateway.
    let settings = [("CONSIGN_SERVICE__CONSUMER__BATCH", "8"), ("CONSIGN_LOG__FILTER", "warn")];
    let fleet = Fleet::start_on(vec![nats], postgres, 1, &settings).await;

    let alone = fleet.place_many(0, EXPRESS, "express", EVERY).await;
    fleet.all_end(&alone, Duration::from_secs(30)).await;

    let flood = fleet.place_many(EXPRESS, FLOOD, "standard", Duration::ZERO).await;
    let beside = fleet.place_many(EXPRESS + FLOOD, EXPRESS, "express", EVERY).await;
    fleet.all_end(&beside, Duration::from_secs(30)).await;
    let mut waiting = 0;
    for id in flood.iter().rev().take(100) {
        waiting += usize::from(fleet.order(id).await["status"] == "pending");
    }
    assert!(
        waiting > 50,
        "the flood was over too early to have been one: {waiting} of its last 100 orders wait"
    );

    let (alone, beside) = (p99(&fleet, &alone).await, p99(&fleet, &beside).await);
    println!("p99 of express orders: alone {alone:?}, beside the flood {beside:?}");
    assert!(beside <= alone * 2, "p99 of express orders: alone {alone:?}, beside the flood {beside:?}");
    fleet.all_end(&flood, Duration::from_secs(120)).await;
    fleet.verify().await;
}

/// From accepted to confirmed, as the order's own times tell.
async fn p99(fleet: &Fleet, ids: &[String]) -> Duration {
    let mut took = Vec::new();
    for id in ids {
        let order = fleet.order(id).await;
        assert_eq!(order["status"], "confirmed", "{order}");
        let at = |field: &str| order[field].as_str().unwrap().parse::<Timestamp>().unwrap();
        took.push(at("updated_at").since(at("created_at")));
    }
    took.sort();
    took[took.len() * 99 / 100]
}
