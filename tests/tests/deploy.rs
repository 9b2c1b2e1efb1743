//! What deploy/compose configures, tried: services that have the rights they need on NATS, and no others.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::path::PathBuf;
use std::time::Duration;

use consign::broker::nats::{NatsBroker, NatsConfig};
use consign::broker::{Broker, Message};
use consign::testing::servers::{NATS, NatsServer};
use consign_tests::consign;
use consign_tests::fleet::{Fleet, SERVICES};

fn deploy(file: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/compose").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[tokio::test(flavor = "multi_thread")]
async fn services_with_the_least_rights() {
    let users = deploy("users.conf");
    let (_, printed, _) = consign(&["streams", "rights"]).await;
    assert_eq!(printed, users, "run `consign streams rights > deploy/compose/users.conf`");

    let configured = users.replace("$NATS_", "x").replace("_PASSWORD", "");
    let nats = tokio::task::block_in_place(|| {
        NatsServer::start_with(NATS, &format!("authorization {{\n{configured}}}"))
    });
    let url = format!("nats.urls=[\"{}\"]", nats.url());
    let as_admin = ["--set", &url, "--set", "nats.user=admin", "--set", "nats.password=xADMIN"];
    let (code, out, err) = consign(&[&["streams", "diff"], &as_admin[..]].concat()).await;
    assert_eq!(code, 1, "nothing is there yet: {out}{err}");
    for expected in ["ORDERS", "payment-inventory-express", "missing"] {
        assert!(out.contains(expected), "{expected} in {out}");
    }
    for _ in 0..2 {
        let (code, out, err) = consign(&[&["streams", "apply"], &as_admin[..]].concat()).await;
        assert_eq!(code, 0, "{out}{err}");
    }

    let orders_rights = NatsConfig {
        user: Some("order".into()),
        password: Some("xORDER".to_owned().into()),
        inbox_prefix: Some("_INBOX_order".into()),
        timeout: Duration::from_secs(1),
        ..nats.config()
    };
    let settings = [
        ("CONSIGN_NATS__USER", "{service}"),
        ("CONSIGN_NATS__PASSWORD", "x{SERVICE}"),
        ("CONSIGN_NATS__INBOX_PREFIX", "_INBOX_{service}"),
        ("CONSIGN_NATS__PROVISION", "bind"),
    ];
    let fleet = Fleet::start(vec![nats], 2, &settings).await;
    let ids = fleet.place_many(0, 40, "standard", Duration::from_millis(20)).await;
    let express = fleet.place_many(40, 10, "express", Duration::from_millis(20)).await;
    fleet.all_end(&[ids, express].concat(), Duration::from_secs(30)).await;
    // Comparing the outbox with the streams needs rights too.
    fleet.reconcile().await;
    fleet.verify().await;
    for service in SERVICES {
        let metrics = fleet.metrics(service).await;
        let refused = metrics.lines().find(|l| l.starts_with("consign_nats_permission_errors_total"));
        assert!(refused.is_none_or(|l| l.ends_with(" 0")), "{service}: {refused:?}");
    }
    let (code, out, err) = consign(&[&["streams", "diff"], &as_admin[..]].concat()).await;
    assert_eq!(code, 0, "{out}{err}");

    // A service that was taken over cannot speak for another.
    let order = NatsBroker::connect(&orders_rights, "order").await.unwrap();
    let forged = Message {
        subject: "payments.succeeded.v1.standard".into(),
        msg_id: Some("forged".into()),
        headers: Vec::new(),
        payload: "{}".into(),
    };
    assert!(order.publish(vec![forged]).await.remove(0).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_finds_no_broker_says_so_and_ends() {
    let program = consign_tests::program().with_file_name("consign-order");
    let ended = tokio::process::Command::new(program)
        .env("CONSIGN_BROKER", "nats")
        .env("CONSIGN_NATS__URLS", "[\"nats://127.0.0.1:1\"]")
        .env("CONSIGN_NATS__CONNECT_LIMIT", "1s")
        .env("CONSIGN_DATABASE", "postgres")
        .env("CONSIGN_POSTGRES__URL", "postgres://order@127.0.0.1:1/order")
        .env("CONSIGN_LOG__FORMAT", "json")
        .output()
        .await
        .unwrap();
    let err = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(2), "{err}");
    assert!(err.contains("nats://127.0.0.1:1") && err.contains("nats.urls"), "{err}");
    let attempts = err.lines().filter(|l| l.contains("no connection to NATS yet")).count();
    assert!(
        (1..20).contains(&attempts) && err.contains("retry_in"),
        "each attempt once, with its delay: {err}"
    );
}
