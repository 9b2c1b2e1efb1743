//! Faults, on real processes and real servers: two replicas of each service under load. After each, every accepted order ends, every
//! cent and piece is accounted for, and nothing healthy is among the dead letters.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::Duration;

use consign::broker::nats::NatsBroker;
use consign::broker::{Broker, Message};
use consign::testing::partition::Links;
use consign::testing::servers::{NATS, NatsServer};
use consign_tests::fleet::{Fleet, Load, SERVICES};

/// From the heal: 60 s, and one AckWait.
const HEALED: Duration = Duration::from_secs(90);

async fn pause(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

/// What is to hold after every fault.
async fn ends_well(fleet: &Fleet, load: Load) {
    let ids = load.stop().await;
    fleet.all_end(&ids, HEALED).await;
    fleet.verify().await;
}

/// Events in hand of a killed process come again after this; short, so that tests are.
const ACK_WAIT: [(&str, &str); 2] =
    [("CONSIGN_SERVICE__CONSUMER__ACK_WAIT", "6s"), ("CONSIGN_SERVICE__CONSUMER__HANDLER_TIMEOUT", "3s")];

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
    ends_well(&fleet, load).await;
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
    ends_well(&fleet, load).await;
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
    ends_well(&fleet, load).await;
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
    ends_well(&fleet, load).await;
    // Done again, with nothing missing, it changes nothing.
    for report in fleet.reconcile().await {
        for stream in report["streams"].as_array().unwrap() {
            assert_eq!(stream["republished"], 0, "{report}");
        }
        assert_eq!(report["rewound"].as_array().unwrap().len(), 0, "{report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_a_node_of_the_cluster() {
    let nats = tokio::task::block_in_place(|| NatsServer::cluster(NATS));
    let mut fleet = Fleet::start(nats, 2, &[("CONSIGN_NATS__REPLICAS", "3")]).await;
    let load = fleet.load(20);
    // Each in turn, so that the leader of every stream and consumer is among them.
    for node in 0..3 {
        pause(2).await;
        tokio::task::block_in_place(|| fleet.nats[node].kill());
        pause(4).await;
        tokio::task::block_in_place(|| fleet.nats[node].start_again());
        pause(4).await;
    }
    ends_well(&fleet, load).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "cargo xtask test --full"]
async fn a_process_that_is_stopped_for_longer_than_ack_wait() {
    let nats = tokio::task::block_in_place(|| NatsServer::start(NATS));
    let fleet = Fleet::start(vec![nats], 2, &ACK_WAIT).await;
    let load = fleet.load(30);
    for service in SERVICES {
        pause(1).await;
        fleet.signal(service, "-STOP").await;
        pause(12).await;
        fleet.signal(service, "-CONT").await;
    }
    ends_well(&fleet, load).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "cargo xtask test --full"]
async fn a_gateway_that_fails_every_call_for_20_s() {
    let fleet = fleet().await;
    let load = fleet.load(30);
    pause(2).await;
    fleet.gateway(1.0).await;
    pause(20).await;
    fleet.gateway(0.0).await;
    pause(2).await;
    ends_well(&fleet, load).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "cargo xtask test --full"]
async fn postgres_that_refuses_connections_for_20_s() {
    let mut fleet = fleet().await;
    let load = fleet.load(30);
    pause(2).await;
    tokio::task::block_in_place(|| fleet.postgres.stop());
    pause(20).await;
    tokio::task::block_in_place(|| fleet.postgres.start_again());
    pause(2).await;
    ends_well(&fleet, load).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "cargo xtask test --full"]
async fn kill_9_at_random() {
    let nats = tokio::task::block_in_place(|| NatsServer::start(NATS));
    let mut fleet = Fleet::start(vec![nats], 2, &ACK_WAIT).await;
    let load = fleet.load(30);
    for _ in 0..12 {
        pause(rand::random_range(0..3)).await;
        let service = SERVICES[rand::random_range(0..3)];
        fleet.kill(service).await;
        load.replicas(&fleet);
        fleet.add(service).await;
        load.replicas(&fleet);
    }
    ends_well(&fleet, load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_in_order() {
    let mut fleet = fleet().await;
    let load = fleet.load(30);
    for service in SERVICES {
        pause(1).await;
        let took = fleet.terminate(service).await;
        assert!(took < Duration::from_secs(20), "{service} took {took:?}");
        load.replicas(&fleet);
        fleet.add(service).await;
        load.replicas(&fleet);
    }
    let ids = load.stop().await;
    // What was in hand was finished or given back, so nothing waits for AckWait.
    fleet.all_end(&ids, Duration::from_secs(20)).await;
    fleet.verify().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "cargo xtask test --full"]
async fn a_node_cut_off_from_the_others_for_longer_than_ack_wait() {
    let (nats, links) = tokio::task::block_in_place(|| Links::cluster(NATS));
    let fleet = Fleet::start(nats, 2, &[("CONSIGN_NATS__REPLICAS", "3")]).await;
    let load = fleet.load(20);
    // Its clients still reach it, and hear nothing of the streams.
    for node in 0..3 {
        pause(2).await;
        let alone = NatsBroker::connect(&fleet.nats[node].config(), "test").await.unwrap();
        // Nobody consumes this subject.
        let probe = |n: u32| Message {
            subject: "orders.probe".into(),
            msg_id: Some(format!("probe-{node}-{n}")),
            headers: Vec::new(),
            payload: "{}".into(),
        };
        alone.publish(vec![probe(1)]).await.remove(0).unwrap();
        links.cut(node);
        pause(30).await;
        let cut_off = alone.publish(vec![probe(2)]).await.remove(0);
        assert!(cut_off.is_err(), "a node alone has no quorum: {cut_off:?}");
        links.heal(node);
        pause(5).await;
    }
    ends_well(&fleet, load).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "cargo xtask test --full"]
async fn a_node_that_nobody_hears_of_for_longer_than_ack_wait() {
    let nats = tokio::task::block_in_place(|| NatsServer::cluster(NATS));
    let fleet = Fleet::start(nats, 2, &[("CONSIGN_NATS__REPLICAS", "3")]).await;
    let load = fleet.load(20);
    for node in 0..3 {
        pause(2).await;
        fleet.nats[node].freeze();
        pause(35).await;
        fleet.nats[node].thaw();
        pause(5).await;
    }
    ends_well(&fleet, load).await;
}
