//! What must happen once although there are several replicas: refunds and deadlines, on real processes and real servers.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::{Duration, Instant};

use consign::testing::servers::{NATS, NatsServer};
use consign_tests::fleet::Fleet;
use futures_util::future::join_all;
use serde_json::json;

async fn fleet(settings: &[(&str, &str)]) -> Fleet {
    let nats = tokio::task::block_in_place(|| NatsServer::start(NATS));
    Fleet::start(vec![nats], 2, settings).await
}

#[tokio::test(flavor = "multi_thread")]
async fn refunds_asked_for_at_the_same_time_are_never_more_than_was_paid() {
    let fleet = fleet(&[]).await;
    let replicas = fleet.urls("order");
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(fleet.buy("p3", 3).await);
    }
    for id in &ids {
        // Six people, each twice with the same key, each time with another replica.
        let asked = (0..12).map(|n| {
            let (fleet, replica) = (&fleet, &replicas[n % 2]);
            async move {
                let key = format!("{id}-{}", n / 2);
                let started = Instant::now();
                loop {
                    let status = fleet.refund_one(replica, id, "p3", &key).await;
                    // Two at a time with one key: one of them is told to try again.
                    if status != 503 || started.elapsed() > Duration::from_secs(10) {
                        return (n / 2, status);
                    }
                }
            }
        });
        let answers = join_all(asked).await;
        let taken: std::collections::BTreeSet<usize> =
            answers.iter().filter(|(_, status)| *status == 202).map(|(person, _)| *person).collect();
        assert_eq!(taken.len(), 3, "three pieces were bought: {answers:?}");
        assert!(answers.iter().all(|(_, status)| matches!(status, 202 | 409 | 422)), "{answers:?}");
        let given_back = Instant::now() + Duration::from_secs(20);
        while fleet.order(id).await["refunded"] != 3 * 103 {
            assert!(Instant::now() < given_back, "{}", fleet.order(id).await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    fleet.verify().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_passes_once_although_a_replica_is_killed_and_the_gateway_is_away() {
    let mut fleet = fleet(&[("order:CONSIGN_SERVICE__DEADLINE", "6s")]).await;
    // Half of what fails has charged all the same.
    fleet.gateway(1.0).await;
    let ids = fleet.place_many(0, 60, "standard", Duration::from_millis(5)).await;
    fleet.kill("order").await;
    fleet.add("order").await;
    fleet.all_end(&ids, Duration::from_secs(60)).await;
    for id in &ids {
        let order = fleet.order(id).await;
        assert_eq!((&order["status"], &order["reason"]), (&json!("cancelled"), &json!("expired")), "{order}");
    }
    fleet.gateway(0.0).await;
    // What was charged in secret is given back; the breakers probe within twelve seconds.
    fleet.until_nothing_is_stuck(Duration::from_secs(60)).await;
    fleet.verify().await;
    let twice = "SELECT COUNT(*) - COUNT(DISTINCT order_id) FROM timeline WHERE event = 'orders.cancelled'";
    assert_eq!(fleet.count("order", twice).await, 0, "each once");
}
