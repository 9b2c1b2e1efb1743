//! Programs that are not ours: a shop in Python, AsyncAPI's parser, and somebody who publishes nonsense.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::path::PathBuf;
use std::process::Output;
use std::time::{Duration, Instant};

use consign::broker::nats::{NatsBroker, NatsConfig};
use consign::broker::{Broker, Message};
use consign::testing::servers::{NATS, NatsServer};
use consign_tests::consign;
use consign_tests::fleet::Fleet;
use serde_json::Value;
use tokio::process::Command;

type Headers = Vec<(String, String)>;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The example, as its README says.
async fn shop(nats: &str, args: &[&str]) -> Output {
    let packages = root().join("target/tools/python-example-1");
    assert!(packages.exists(), "run `cargo xtask test --install`");
    let mut shop = Command::new("python3");
    shop.arg(root().join("examples/python/shop.py")).args(["--nats", nats]).args(args);
    shop.env("PYTHONPATH", packages).kill_on_drop(true);
    tokio::time::timeout(Duration::from_secs(60), shop.output()).await.expect("it ends").unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_in_python_places_an_order_and_reads_its_confirmation() {
    let nats = tokio::task::block_in_place(|| NatsServer::start(NATS));
    // Both versions, so that what the shop reads are both.
    let mut fleet =
        Fleet::start(vec![nats], 1, &[("order:CONSIGN_SERVICE__PUBLISH__ORDERS_CREATED", "[1, 2]")]).await;
    let url = fleet.nats[0].url();
    let id = "7f3f6c1e-8a52-4d0c-9b36-4f8f0f0a9c11";
    let order = ["--customer", "grace", "--order-id", id, "--gift-note", "Grüße!", "p3=2", "p4=1"];
    let output = shop(&url, &order).await;
    assert!(output.status.success(), "{}", said(&output));
    let text = said(&output);
    assert!(text.contains("created: 3.10 EUR") && text.contains("confirmed: paid"), "{text}");
    let placed = fleet.order(id).await;
    assert_eq!(
        (&placed["status"], &placed["customer_id"], &placed["gift_note"]),
        (&"confirmed".into(), &"grace".into(), &"Grüße!".into())
    );
    // The same id again is answered once; another order under it is refused.
    let again = shop(&url, &[&order[..], &["--timeout", "2"]].concat()).await;
    assert_eq!(again.status.code(), Some(2), "{}", said(&again));
    let other = shop(&url, &["--order-id", id, "p1=1"]).await;
    assert!(
        other.status.code() == Some(1) && said(&other).contains("/order_id: this id has been used"),
        "{}",
        said(&other)
    );
    // What cannot be taken is refused with every fault, and nothing is a dead letter.
    let wrong = shop(&url, &["--customer", "not an id", "p1=1", "n\u{f6}=1"]).await;
    let text = said(&wrong);
    assert_eq!(wrong.status.code(), Some(1), "{text}");
    assert!(text.contains("/customer_id") && text.contains("/items/1/product_id"), "{text}");
    let unknown = shop(&url, &["p1=1", "nothing=1"]).await;
    assert!(said(&unknown).contains("/items/1: there is no product"), "{}", said(&unknown));
    fleet.verify().await;
    let orders = "SELECT COUNT(*) FROM orders WHERE customer_id = 'grace'";
    assert_eq!(fleet.count("order", orders).await, 1);
    // Nobody there.
    let nobody = shop("nats://127.0.0.1:1", &["p1=1"]).await;
    assert_eq!(nobody.status.code(), Some(2), "{}", said(&nobody));
    fleet.terminate("order").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_on_a_stream_becomes_dead_letters_with_their_reasons() {
    let nats = tokio::task::block_in_place(|| NatsServer::start(NATS));
    let fleet = Fleet::start(vec![nats], 1, &[]).await;
    let config = NatsConfig { urls: vec![fleet.nats[0].url()], ..NatsConfig::default() };
    let broker = NatsBroker::connect(&config, "hostile").await.unwrap();
    let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let good = |n: u32| {
        vec![
            header("ce-specversion", "1.0"),
            header("ce-id", &format!("00000000-0000-4000-8000-{n:012}")),
            header("ce-type", "storefront.order_requested.v1"),
            header("ce-source", "/tests"),
            header("ce-subject", "x"),
            header("ce-time", "2099-01-01T00:00:00.123456+02:00"),
        ]
    };
    let without_id = vec![header("ce-specversion", "1.0")];
    let deep = "[".repeat(400_000);
    let wide = format!("[{}1]", "1,".repeat(120_000));
    // Escaped, six times as large: its dead letter must still fit on the stream of dead letters.
    let large = "\u{1}".repeat(900_000);
    let mut headers_galore = good(7);
    headers_galore.extend((0..500).map(|n| header(&format!("x-{n}"), "x")));
    let mut of_tomorrow = good(9);
    of_tomorrow[2].1 = "storefront.order_requested.v7".into();
    // PostgreSQL keeps no U+0000: what has one must not hold up what comes after it.
    let gift = r#"{"order_id":"00000000-0000-4000-8000-000000000001","customer_id":"ada","items":[{"product_id":"p1","quantity":1}],"gift_note":"\u0000"}"#;
    let mut about_nothing = good(11);
    about_nothing[4].1 = "a\u{0}b".into();
    let mut traced = good(12);
    traced.extend([header("traceparent", "\u{0}"), header("x-other", "\u{0}")]);
    let hostile: [(Headers, String, &str, &str); 13] = [
        (good(10), gift.into(), "undecodable", "U+0000"),
        (about_nothing, "{}".into(), "undecodable", "subject"),
        (traced, "[]".into(), "breaks_schema", "object"),
        (without_id, "{}".into(), "undecodable", "ce-type"),
        (good(1), "not JSON".into(), "undecodable", "not JSON"),
        (good(2), deep, "undecodable", "nested deeper"),
        (good(3), wide, "undecodable", "values"),
        (good(4), "{}".into(), "breaks_schema", "order_id"),
        (good(5), r#"{"order_id":7,"customer_id":"","items":[]}"#.into(), "breaks_schema", "/items"),
        (good(6), "\u{0}".into(), "undecodable", "not JSON"),
        (good(8), large, "undecodable", "900000 bytes"),
        (of_tomorrow, "{}".into(), "unaccepted", "storefront.order_requested.v7 is not accepted"),
        (headers_galore, "{}".into(), "undecodable", "506 headers"),
    ];
    for (headers, payload, ..) in hostile.clone() {
        let version =
            headers.iter().find(|(name, _)| name == "ce-type").map_or("v1", |(_, t)| &t[t.len() - 2..]);
        let subject = format!("storefront.order_requested.{version}.standard");
        let message = Message { subject, msg_id: None, headers, payload: payload.into() };
        broker.publish(vec![message]).await.remove(0).unwrap();
    }
    let url = &fleet.urls("order")[0];
    let args = [
        "dead-letters",
        "list",
        "--format",
        "json",
        "--admin-token",
        consign_tests::TOKEN,
        "--order-url",
        url,
    ];
    let others = [fleet.urls("inventory"), fleet.urls("payment")].concat();
    let args = [&args[..], &["--inventory-url", &others[0], "--payment-url", &others[1]]].concat();
    let started = Instant::now();
    let letters = loop {
        let (code, out, err) = consign(&args).await;
        assert_eq!(code, 0, "{err}");
        let letters: Vec<Value> = serde_json::from_str(&out).unwrap();
        if letters.len() == hostile.len() {
            break letters;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "{out}");
    };
    for (_, payload, reason, told) in &hostile {
        let fits = |l: &&Value| l["reason"] == *reason && l["error"].as_str().unwrap().contains(told);
        let start: String = payload.chars().take(20).collect();
        assert!(letters.iter().any(|l| fits(&l)), "{start}: {reason}, {told}: {letters:#?}");
    }
    // Each stands on the stream of dead letters too: nothing is stuck on its way there.
    while broker.stream_info("DEAD_LETTERS_ORDER").await.unwrap().messages < hostile.len() as u64 {
        assert!(started.elapsed() < Duration::from_secs(60), "{} dead letters", hostile.len());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Over HTTP it is said at once, and harms nobody whose order is written with it.
    let body = r#"{"customer_id":"ada","items":[{"product_id":"p1","quantity":1}],"gift_note":"\u0000"}"#;
    let answer = reqwest::Client::new()
        .post(format!("{url}/orders"))
        .header("content-type", "application/json")
        .body(body)
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 400);
    assert!(answer.text().await.unwrap().contains("U+0000"));
    // And the consumer goes on.
    let output = shop(&fleet.nats[0].url(), &["p1=1"]).await;
    assert!(output.status.success(), "{}", said(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_exported_is_asyncapi_by_its_own_parser() {
    let dir = tempfile::tempdir().unwrap();
    let (document, page) = (dir.path().join("asyncapi.json"), dir.path().join("events.html"));
    let (code, _, err) = consign(&["schema", "export", "--output", document.to_str().unwrap()]).await;
    assert_eq!(code, 0, "{err}");
    let check = async |document: &PathBuf| {
        let tool = root().join("target/tools/asyncapi-3.6.3/check.mjs");
        assert!(tool.exists(), "run `cargo xtask test --install`");
        Command::new("node").arg(tool).arg(document).output().await.unwrap()
    };
    let output = check(&document).await;
    assert!(output.status.success(), "{}", said(&output));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["version"], "3.0.0");
    let has = |list: &str, id: &str| found[list].as_array().unwrap().iter().any(|x| x == id);
    for contract in contracts::all() {
        let name = contract.name();
        assert!(has("channels", &name), "{name}");
        assert!(has("operations", &format!("{}.send.{name}", contract.publisher)), "{name}");
    }
    assert!(has("operations", "inventory-orders.receive.orders.created.v1"), "{found}");
    // The check can fail.
    let mut broken: Value = serde_json::from_slice(&std::fs::read(&document).unwrap()).unwrap();
    broken["operations"]["order.send.orders.created.v2"]["action"] = "shout".into();
    std::fs::write(&document, broken.to_string()).unwrap();
    assert!(!check(&document).await.status.success());
    let (code, _, err) =
        consign(&["schema", "export", "--as", "html", "--output", page.to_str().unwrap()]).await;
    assert_eq!(code, 0, "{err}");
    let page = std::fs::read_to_string(&page).unwrap();
    for contract in contracts::all() {
        assert!(page.contains(&format!("<section id=\"{}\">", contract.name())), "{}", contract.name());
    }
    assert!(page.contains("shipping_address.city"), "parts are shown too");
}
