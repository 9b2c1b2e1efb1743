//! Faults, on real processes and real servers: two replicas of each service under load. After each, every accepted order ends, every
//! cent and piece is accounted for, and nothing healthy is among the dead letters.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::Duration;

use consign::testing::servers::{NATS, NatsServer};
use consign_tests::fleet::{Fleet, SERVICES};

/// From the heal: 60 s, and one AckWait.
const HEALED: Duration = Duration::from_secs(90);

async fn pause(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

async fn fleet() -> Fleet {
    let nats = tokio::task::block_in_place(|| NatsServer::start(NATS));
    Fleet::start(vec![nats], 2, &[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_each_service_in_turn() {
    let mut fleet = fleet().await;
    let load = fleet.load(30);
    for service in SERVICES {
        pause(2).await;
        fleet.kill(service).await;
        load.replicas(&fleet);
        pause(1).await;
        fleet.add(service).await;
        load.replicas(&fleet);
    }
    let ids = load.stop().await;
    fleet.all_end(&ids, HEALED).await;
    fleet.verify().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_the_broker() {
    let mut fleet = fleet().await;
    let load = fleet.load(30);
    pause(2).await;
    tokio::task::block_in_place(|| fleet.nats[0].kill());
    pause(3).await;
    let health = fleet.health("order").await;
    assert_eq!(health["status"], "degraded", "{health}");
    assert_eq!(health["broker"]["connected"], false, "{health}");
    tokio::task::block_in_place(|| fleet.nats[0].start_again());
    pause(2).await;
    let ids = load.stop().await;
    fleet.all_end(&ids, HEALED).await;
    fleet.verify().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_postgres() {
    let mut fleet = fleet().await;
    let load = fleet.load(30);
    pause(2).await;
    tokio::task::block_in_place(|| fleet.postgres.stop());
    pause(3).await;
    tokio::task::block_in_place(|| fleet.postgres.start_again());
    pause(2).await;
    let ids = load.stop().await;
    fleet.all_end(&ids, HEALED).await;
    fleet.verify().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_brokers_whole_store_is_deleted() {
    let mut fleet = fleet().await;
    let load = fleet.load(30);
    pause(4).await;
    tokio::task::block_in_place(|| {
        fleet.nats[0].delete_store();
        fleet.nats[0].start_again();
    });
    pause(4).await;
    let ids = load.stop().await;
    fleet.all_end(&ids, HEALED).await;
    fleet.verify().await;
    // Done again, with nothing missing, it changes nothing.
    for report in fleet.reconcile().await {
        for stream in report["streams"].as_array().unwrap() {
            assert_eq!(stream["republished"], 0, "{report}");
        }
        assert_eq!(report["rewound"].as_array().unwrap().len(), 0, "{report}");
    }
}
