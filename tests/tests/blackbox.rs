//! The real program as a process: killed at random, corrupted on purpose, spoken to badly.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::process::Stdio;
use std::time::Duration;

use consign_tests::{Process, consign, program};
use rand::{RngExt, SeedableRng};
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, Connection};
use tokio::process::Command;

async fn verify(dir: &std::path::Path, settle: &str) -> (i32, String) {
    let (code, out, err) =
        consign(&["verify", "--data-dir", dir.to_str().unwrap(), "--settle", settle, "--format", "json"])
            .await;
    (code, format!("{out}{err}"))
}

/// Places orders as fast as it goes until told to stop; the ids and keys of those accepted. An order whose answer was lost is placed again
/// with its key by the next caller.
async fn place_until(base: &str, stop: &tokio_util::sync::CancellationToken, next: &mut u64) -> Vec<String> {
    let http = Client::builder().timeout(Duration::from_secs(5)).build().unwrap();
    let mut accepted = Vec::new();
    while !stop.is_cancelled() {
        let product = ["coffee", "grinder", "kettle", "scale", "filter"][usize::try_from(*next % 5).unwrap()];
        let body =
            json!({"customer_id": "storm", "items": [{"product_id": product, "quantity": 1 + *next % 3}]});
        let request =
            http.post(format!("{base}/orders")).header("Idempotency-Key", format!("k-{next}")).json(&body);
        match request.send().await {
            Ok(r) if r.status() == StatusCode::ACCEPTED => {
                if let Ok(order) = r.json::<Value>().await {
                    accepted.push(order["id"].as_str().unwrap().to_owned());
                    *next += 1;
                }
            }
            Ok(_) | Err(_) => return accepted,
        }
    }
    accepted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random_moments_nothing_is_lost_or_done_twice() {
    const KILLS: usize = 20;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("data");
    std::fs::create_dir(&dir).unwrap();
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let mut accepted: Vec<String> = Vec::new();
    let mut next = [0u64, 1_000_000, 2_000_000, 3_000_000];
    let flaky = [
        "payment.gateway.simulated.error_rate=0.03",
        "payment.gateway.simulated.lost_answer_rate=0.03",
        "payment.gateway.simulated.decline_rate=0.05",
        "payment.gateway.simulated.callback_rate=0.2",
        "payment.gateway.simulated.duplicate_callback_rate=0.5",
    ];
    for _ in 0..KILLS {
        let process = Process::start(&dir, &flaky).await;
        let stop = tokio_util::sync::CancellationToken::new();
        let base = process.order.clone();
        let [a, b, c, d] = &mut next;
        let killing = async {
            tokio::time::sleep(Duration::from_millis(rng.random_range(20..700))).await;
            process.kill().await;
            stop.cancel();
        };
        let (w, x, y, z, ()) = tokio::join!(
            place_until(&base, &stop, a),
            place_until(&base, &stop, b),
            place_until(&base, &stop, c),
            place_until(&base, &stop, d),
            killing
        );
        accepted.extend([w, x, y, z].into_iter().flatten());
    }
    let process = Process::start(&dir, &[]).await;
    let (code, report) = verify(&dir, "60").await;
    assert_eq!(code, 0, "{report}");
    assert!(accepted.len() > KILLS * 5, "the storm was no storm: {} orders", accepted.len());
    let http = Client::new();
    let mut outcomes = std::collections::BTreeMap::<String, u32>::new();
    for id in &accepted {
        let order: Value =
            http.get(format!("{}/orders/{id}", process.order)).send().await.unwrap().json().await.unwrap();
        let status = order["status"].as_str().unwrap_or("lost").to_owned();
        *outcomes.entry(status).or_default() += 1;
    }
    println!("{} orders accepted through {KILLS} kills: {outcomes:?}", accepted.len());
    assert!(outcomes.keys().all(|s| s == "confirmed" || s == "cancelled"), "{outcomes:?}");
    assert!(process.terminate().await < Duration::from_secs(10));
    let (code, report) = verify(&dir, "1").await;
    assert_eq!(code, 0, "stopped as well: {report}");
}

/// The command on a data directory: exit code, standard output, standard error.
async fn operate(dir: &std::path::Path, args: &[&str]) -> (i32, String, String) {
    consign(&[&["--data-dir", dir.to_str().unwrap()], args].concat()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_holds_the_breaker_open_looks_at_what_is_stuck_and_gives_money_back() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("data");
    std::fs::create_dir(&dir).unwrap();
    let process = Process::start(&dir, &[]).await;
    let run = async |args: &[&str]| operate(&dir, args).await;
    let json = async |args: &[&str]| -> Value {
        let (code, out, err) = run(&[args, &["--format", "json"]].concat()).await;
        assert_eq!(code, 0, "{args:?}: {err}");
        serde_json::from_str(&out).unwrap()
    };
    assert_eq!(json(&["breaker", "status"]).await[0]["state"], "closed");
    assert_eq!(json(&["breaker", "open", "gateway"]).await[0]["held_open"], true);
    let (code, _, err) = run(&["breaker", "open", "nothing"]).await;
    assert!(code == 1 && err.contains("breaker status"), "{code} {err}");
    let order = json(&["orders", "place", "coffee:3"]).await;
    let id = order["id"].as_str().unwrap();
    let reserved = async || {
        let (code, out, _) = run(&["payments", "stuck", "--after", "0"]).await;
        code == 1 && out.contains(id)
    };
    let started = std::time::Instant::now();
    while !reserved().await {
        assert!(started.elapsed() < Duration::from_secs(10), "the payment waits and is listed");
    }
    assert_eq!(run(&["payments", "stuck"]).await.0, 0, "not for long enough");
    assert_eq!(json(&["breaker", "close", "gateway"]).await[0]["state"], "closed");
    assert_eq!(run(&["orders", "watch", id, "--timeout", "20"]).await.0, 0);
    assert_eq!(json(&["gateway", "set", "--error-rate", "0.25"]).await[0]["error_rate"], 0.25);
    let (code, _, err) = run(&["gateway", "set", "--error-rate", "2"]).await;
    assert!(code == 1 && err.contains("error_rate"), "{code} {err}");
    assert_eq!(json(&["gateway", "set", "--reset"]).await[0]["error_rate"], 0.0);
    let (code, _, err) = run(&["orders", "refund", id, "coffee:4"]).await;
    assert!(code == 1 && err.contains("/lines/0"), "{code} {err}");
    let part = json(&["orders", "refund", id, "coffee:1", "--write-off", "--reason", "stale"]).await;
    assert_eq!((&part["status"], &part["restock"]), (&Value::from("done"), &Value::from(false)), "{part}");
    assert_eq!(json(&["orders", "refund", id]).await["status"], "done");
    assert_eq!(run(&["orders", "refund", id]).await.0, 1, "nothing is left");
    assert_eq!(json(&["payments", "show", id]).await["refunds"].as_array().unwrap().len(), 2);
    assert_eq!(run(&["--admin-token", "wrong", "breaker", "status"]).await.0, 1);
    assert_eq!(verify(&dir, "5").await.0, 0);
    process.terminate().await;
}

async fn execute(file: &std::path::Path, sql: &'static str) {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file);
    let mut conn = options.connect().await.unwrap();
    assert!(sqlx::query(sql).execute(&mut conn).await.unwrap().rows_affected() > 0, "{sql}");
    conn.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_sees_what_was_corrupted() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("data");
    std::fs::create_dir(&dir).unwrap();
    let process = Process::start(&dir, &[]).await;
    let (code, _, err) =
        consign(&["load", "--orders", "50", "--concurrency", "8", "--data-dir", dir.to_str().unwrap()]).await;
    assert_eq!(code, 0, "{err}");
    let args = ["orders", "list", "--status", "confirmed", "--limit", "1", "--format", "json"];
    let page: Value = serde_json::from_str(&operate(&dir, &args).await.1).unwrap();
    let bought = page["orders"][0]["id"].as_str().unwrap();
    assert_eq!(operate(&dir, &["orders", "refund", bought]).await.0, 0);
    // Stopped in order, what the refund leaves for inventory is done too.
    process.terminate().await;
    assert_eq!(verify(&dir, "1").await.0, 0);
    let copies = [
        ("gateway.db", "UPDATE refunds SET amount = amount - 1", "refunds"),
        ("gateway.db", "INSERT INTO refunds VALUES ('refund-x', 'x', 5, 0)", "refunds"),
        ("payment.db", "UPDATE payments SET refunded = 0 WHERE refunded > 0", "refunds end"),
        ("payment.db", "UPDATE refunds SET status = 'pending'", "refunds end"),
        ("order.db", "UPDATE refunds SET status = 'rejected'", "refunds end"),
        ("inventory.db", "DELETE FROM returns", "returns"),
        ("inventory.db", "UPDATE returns SET restocked = 0", "returns"),
        ("order.db", "UPDATE orders SET total = total + 1 WHERE id = (SELECT MIN(id) FROM orders)", "totals"),
        (
            "order.db",
            "UPDATE orders SET status = 'pending', deadline = 0 WHERE id = (SELECT MIN(id) FROM orders)",
            "orders end",
        ),
        ("gateway.db", "DELETE FROM charges WHERE key = (SELECT MIN(key) FROM charges)", "charged once"),
        ("gateway.db", "INSERT INTO charges VALUES ('twice', NULL, 5, 'EUR', 0)", "charged once"),
        (
            "payment.db",
            "UPDATE payments SET status = 'failed' WHERE order_id = (SELECT MIN(order_id) FROM payments)",
            "payments fit orders",
        ),
        (
            "inventory.db",
            "UPDATE products SET received = received + 1, on_hand = on_hand + 1 WHERE id = 'coffee'",
            "stock",
        ),
        (
            "inventory.db",
            "UPDATE reservations SET status = 'reserved' WHERE order_id = (SELECT MIN(order_id) FROM reservations)",
            "reservations",
        ),
        ("inventory.db", "DELETE FROM inbox WHERE event_id = (SELECT MIN(event_id) FROM inbox)", "inboxes"),
        (
            "order.db",
            "DELETE FROM timeline WHERE order_id = (SELECT MIN(id) FROM orders) AND version = 1",
            "timeline",
        ),
        ("order.db", "INSERT INTO outbox_pending (seq) SELECT MIN(seq) FROM outbox", "outboxes"),
    ];
    for (i, (file, sql, check)) in copies.into_iter().enumerate() {
        let copy = dir.with_file_name(format!("copy-{i}"));
        std::fs::create_dir(&copy).unwrap();
        for name in ["order.db", "inventory.db", "payment.db", "gateway.db"] {
            std::fs::copy(dir.join(name), copy.join(name)).unwrap();
        }
        execute(&copy.join(file), sql).await;
        let (code, report) = verify(&copy, "1").await;
        assert_eq!(code, 1, "{sql}: {report}");
        let report: Value = serde_json::from_str(&report).unwrap();
        let found = report["violations"].as_array().unwrap();
        assert!(found.iter().any(|v| v["check"] == check), "{sql} must break {check:?}: {report}");
    }
}

struct Api {
    http: Client,
    process: Process,
}

impl Api {
    async fn send(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> (u16, Value, reqwest::header::HeaderMap) {
        let mut request = self.http.request(method, url).body(body.to_owned());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.unwrap();
        if status >= 400 {
            assert_eq!(headers["content-type"], "application/problem+json", "{url}: {text}");
            let problem: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(problem["status"], status, "{text}");
        }
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)), headers)
    }

    async fn order(&self, headers: &[(&str, &str)], body: &str) -> (u16, Value) {
        let mut all = vec![("content-type", "application/json")];
        all.extend(headers);
        let url = format!("{}/orders", self.process.order);
        let (status, value, _) = self.send(Method::POST, &url, &all, body).await;
        (status, value)
    }
}

fn references_in<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(map) => {
            found.extend(map.get("$ref").and_then(Value::as_str));
            map.values().for_each(|v| references_in(v, found));
        }
        Value::Array(items) => items.iter().for_each(|v| references_in(v, found)),
        _ => {}
    }
}

fn pointers(problem: &Value) -> Vec<&str> {
    problem["errors"].as_array().into_iter().flatten().filter_map(|e| e["pointer"].as_str()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_gets_the_right_answer() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("data");
    std::fs::create_dir(&dir).unwrap();
    let process = Process::start(&dir, &["order.http.body_limit=2048"]).await;
    let api = Api { http: Client::new(), process };
    let good = r#"{"customer_id":"ada","items":[{"product_id":"coffee","quantity":1}]}"#;
    let order = format!("{}/orders", api.process.order);

    // 400, 415, 413
    assert_eq!(api.order(&[], "{").await.0, 400);
    let (status, ..) = api.send(Method::POST, &order, &[("content-type", "text/plain")], good).await;
    assert_eq!(status, 415);
    let large = format!(r#"{{"customer_id":"{}"}}"#, "x".repeat(4000));
    assert_eq!(api.order(&[], &large).await.0, 413);
    assert_eq!(api.order(&[("idempotency-key", "white space")], good).await.0, 400);
    for query in ["wait=6", "limit=0", "limit=501", "limit=x", "status=lost", "cursor=1", "colour=red"] {
        assert_eq!(api.send(Method::GET, &format!("{order}?{query}"), &[], "").await.0, 400, "{query}");
    }

    // The lines that are printed for a newcomer: the order has ended by the time the third is answered.
    let (status, placed) = api.order(&[], &good.replace("ada", "newcomer")).await;
    assert_eq!(status, 202);
    let (_, page, _) =
        api.send(Method::GET, &format!("{order}?customer_id=newcomer&limit=1&wait=5"), &[], "").await;
    assert_eq!(
        (&page["orders"][0]["id"], &page["orders"][0]["status"]),
        (&placed["id"], &json!("confirmed"))
    );
    let url = format!("{order}/{}?wait=5", placed["id"].as_str().unwrap());
    assert_eq!(api.send(Method::GET, &url, &[], "").await.1["status"], "confirmed");

    // 422, each field at fault named
    let (status, problem) = api
        .order(
            &[],
            r#"{"customer_id":"","items":[{"product_id":"coffee","quantity":0},{"quantity":1}],"colour":1}"#,
        )
        .await;
    assert_eq!(status, 422);
    assert_eq!(pointers(&problem).len(), 4, "{problem}");
    for pointer in ["/customer_id", "/items/0/quantity", "/items/1", "/colour"] {
        assert!(pointers(&problem).contains(&pointer), "{pointer} in {problem}");
    }
    let (status, problem) =
        api.order(&[], r#"{"customer_id":"a b","items":[{"product_id":"x.y","quantity":1}]}"#).await;
    assert_eq!((status, pointers(&problem)), (422, vec!["/customer_id", "/items/0/product_id"]));
    let (status, problem) = api.order(&[], r#"{"customer_id":"ada","items":[{"product_id":"coffee","quantity":1},{"product_id":"nothing","quantity":1}]}"#).await;
    assert_eq!((status, pointers(&problem)), (422, vec!["/items/1"]));
    for quantity in ["10001", "-1", "1.5", "\"2\"", "99999999999999999999"] {
        let body =
            format!(r#"{{"customer_id":"ada","items":[{{"product_id":"coffee","quantity":{quantity}}}]}}"#);
        assert_eq!(api.order(&[], &body).await.0, 422, "{quantity}");
    }
    assert_eq!(api.order(&[], r#"{"customer_id":"ada","items":[]}"#).await.0, 422);
    assert_eq!(
        api.order(
            &[],
            r#"{"customer_id":"ada","items":[{"product_id":"coffee","quantity":1}],"lane":"fast"}"#
        )
        .await
        .0,
        422
    );

    // 404, 405
    for path in ["/orders/nonsense", "/orders/018f0e3c-0000-7000-8000-000000000000", "/nowhere"] {
        assert_eq!(
            api.send(Method::GET, &format!("{}{path}", api.process.order), &[], "").await.0,
            404,
            "{path}"
        );
    }
    let (status, _, headers) = api.send(Method::DELETE, &order, &[], "").await;
    assert_eq!(status, 405);
    assert!(headers.contains_key("allow"));

    // Idempotency
    let (status, first) = api.order(&[("idempotency-key", "k1")], good).await;
    assert_eq!(status, 202);
    let spaced = r#"{ "items": [ {"quantity": 1, "product_id": "coffee"} ], "customer_id": "ada" }"#;
    let (status, again) = api.order(&[("idempotency-key", "k1")], spaced).await;
    assert_eq!((status, &again["id"]), (202, &first["id"]), "the same body in other clothes");
    let other = r#"{"customer_id":"ada","items":[{"product_id":"coffee","quantity":2}]}"#;
    assert_eq!(api.order(&[("idempotency-key", "k1")], other).await.0, 422);

    // Correlation ids
    let (_, _, headers) = api.send(Method::GET, &order, &[("x-correlation-id", "mine-1")], "").await;
    assert_eq!(headers["x-correlation-id"], "mine-1");
    let (_, _, headers) = api.send(Method::GET, &order, &[("x-correlation-id", "not sane")], "").await;
    assert_ne!(headers["x-correlation-id"], "not sane");

    // 401 for whatever changes stock, prices, money or dead letters
    let (inventory, payment) = (&api.process.inventory, &api.process.payment);
    let bearer = format!("Bearer {}", api.process.token);
    let json_type = ("content-type", "application/json");
    let product = r#"{"name":"Tea","price":500,"currency":"EUR"}"#;
    let stock = r#"{"delta":5,"reason":"test"}"#;
    let guarded = [
        (Method::PUT, format!("{inventory}/products/tea"), product),
        (Method::POST, format!("{inventory}/products/coffee/stock"), stock),
        (Method::PUT, format!("{payment}/gateway"), "{}"),
        (Method::GET, format!("{}/admin/dead-letters", api.process.order), ""),
        (Method::POST, format!("{inventory}/admin/dead-letters/redrive"), r#"{"all":true}"#),
        (Method::POST, format!("{payment}/admin/dead-letters/discard"), r#"{"all":true}"#),
    ];
    for (method, url, body) in guarded {
        for auth in ["Bearer wrong", "Basic abc", ""] {
            let (status, _, headers) = api
                .send(
                    method.clone(),
                    &url,
                    &[json_type, ("authorization", auth), ("idempotency-key", "g")],
                    body,
                )
                .await;
            assert_eq!(status, 401, "{url} with {auth:?}");
            assert_eq!(headers["www-authenticate"], "Bearer");
        }
        let (status, ..) = api
            .send(method, &url, &[json_type, ("authorization", &bearer), ("idempotency-key", "g")], body)
            .await;
        assert!((200..300).contains(&status), "{url} with the token: {status}");
    }

    // Inventory's own rules
    let admin = [json_type, ("authorization", bearer.as_str())];
    let bad = r#"{"name":"","price":-1,"currency":"euro"}"#;
    let (status, problem, _) = api.send(Method::PUT, &format!("{inventory}/products/tea"), &admin, bad).await;
    assert_eq!((status, pointers(&problem).len()), (422, 3), "{problem}");
    let (status, problem, _) = api
        .send(
            Method::PUT,
            &format!("{inventory}/products/te.a"),
            &admin,
            r#"{"name":"x","price":1,"currency":"eur"}"#,
        )
        .await;
    assert_eq!((status, pointers(&problem).len()), (422, 2), "{problem}");
    let url = format!("{inventory}/products/tea/stock");
    assert_eq!(api.send(Method::POST, &url, &admin, stock).await.0, 400, "without an Idempotency-Key");
    let with_key =
        |key: &'static str| [json_type, ("authorization", bearer.as_str()), ("idempotency-key", key)];
    assert_eq!(api.send(Method::POST, &url, &with_key("m0"), r#"{"delta":0,"reason":"x"}"#).await.0, 422);
    assert_eq!(
        api.send(Method::POST, &url, &with_key("m1"), r#"{"delta":-1,"reason":"x"}"#).await.0,
        409,
        "below what is there"
    );
    let (status, p, _) = api.send(Method::POST, &url, &with_key("m2"), stock).await;
    assert_eq!((status, &p["on_hand"]), (200, &json!(5)));
    let (status, p, _) = api.send(Method::POST, &url, &with_key("m2"), stock).await;
    assert_eq!((status, &p["on_hand"]), (200, &json!(5)), "counted once");
    assert_eq!(api.send(Method::POST, &url, &with_key("m2"), r#"{"delta":6,"reason":"test"}"#).await.0, 422);
    let nowhere = format!("{inventory}/products/nothing/stock");
    assert_eq!(api.send(Method::POST, &nowhere, &with_key("m3"), stock).await.0, 404);

    // A total that would overflow
    let dear = r#"{"name":"Moon","price":1000000000000,"currency":"EUR"}"#;
    assert_eq!(api.send(Method::PUT, &format!("{inventory}/products/moon"), &admin, dear).await.0, 201);
    let body = r#"{"customer_id":"ada","items":[{"product_id":"moon","quantity":10000}]}"#;
    let known = async {
        loop {
            let (status, problem) = api.order(&[], body).await;
            if !problem["errors"][0]["detail"].as_str().unwrap_or_default().contains("no product") {
                return (status, problem);
            }
            tokio::task::yield_now().await;
        }
    };
    let (status, problem) = tokio::time::timeout(Duration::from_secs(10), known).await.unwrap();
    assert_eq!(status, 422);
    assert!(problem["errors"][0]["detail"].as_str().unwrap().contains("total"), "{problem}");

    // Every service describes itself, and the description names its routes.
    for (base, path) in
        [(&api.process.order, "/orders"), (inventory, "/products/{id}/stock"), (payment, "/payments")]
    {
        let (status, api_doc, _) = api.send(Method::GET, &format!("{base}/openapi.json"), &[], "").await;
        assert_eq!((status, api_doc["openapi"].as_str().unwrap().starts_with("3.1")), (200, true));
        assert!(api_doc["paths"][path].is_object(), "{path}");
        let mut references = Vec::new();
        references_in(&api_doc, &mut references);
        assert!(!references.is_empty());
        for reference in references {
            let found = api_doc.pointer(reference.strip_prefix('#').unwrap());
            assert!(found.is_some(), "{reference} is nowhere in {base}/openapi.json");
        }
        let id = &api_doc["paths"]["/admin/dead-letters/{id}"]["get"]["parameters"][0];
        assert_eq!((&id["name"], &id["in"]), (&json!("id"), &json!("path")));
        for (path, part) in [
            ("/docs", "<html"),
            ("/livez", "ok"),
            ("/readyz", "ok"),
            ("/health", ""),
            ("/metrics", "consign_outbox_pending"),
        ] {
            let (status, body, _) = api.send(Method::GET, &format!("{base}{path}"), &[], "").await;
            assert_eq!(status, 200, "{base}{path}");
            let text = body.as_str().map_or_else(|| body.to_string(), str::to_owned);
            assert!(text.contains(part), "{part} in {base}{path}");
        }
    }
    api.process.terminate().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_much_at_a_time_is_turned_away() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("data");
    std::fs::create_dir(&dir).unwrap();
    let process = Process::start(&dir, &["payment.http.max_concurrent=1"]).await;
    let http = Client::new();
    let url = format!("{}/payments?limit=500", process.payment);
    let mut statuses = std::collections::BTreeSet::new();
    for _ in 0..50 {
        let many = (0..32).map(|_| http.get(&url).send());
        let probes = (0..4).map(|_| http.get(format!("{}/livez", process.payment)).send());
        let (many, probes) =
            tokio::join!(futures_util::future::join_all(many), futures_util::future::join_all(probes));
        assert!(probes.into_iter().all(|r| r.unwrap().status() == 200), "probes get through");
        for response in many {
            let response = response.unwrap();
            if response.status() == 429 {
                assert_eq!(response.headers()["retry-after"], "1");
            }
            statuses.insert(response.status().as_u16());
        }
    }
    assert_eq!(statuses.into_iter().collect::<Vec<_>>(), [200, 429]);
    process.terminate().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_says_what_is_wrong_and_how_to_mend_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let (code, _, err) = consign(&[
        "config",
        "check",
        "--data-dir",
        path,
        "--set",
        "order.http.listen=0.0.0.0:8080",
        "--set",
        "payment.consumer.handler_timeout=1m",
        "--set",
        "inventory.tasks.lease=1s",
    ])
    .await;
    assert_eq!(code, 2);
    for part in [
        "3 fault(s)",
        "order.http.listen",
        "admin_token",
        "payment.consumer.handler_timeout",
        "inventory.tasks.timeout",
    ] {
        assert!(err.contains(part), "{part} in {err}");
    }
    let (code, _, err) = consign(&["config", "check", "--set", "order.colour=red"]).await;
    assert_eq!((code, err.contains("colour")), (2, true), "{err}");
    assert_eq!(consign(&["config", "check", "--data-dir", path]).await.0, 0);
    let (code, out, _) = consign(&["config", "show", "--set", "order.http.admin_token=hush"]).await;
    assert_eq!((code, out.contains("hush")), (0, false), "secrets are not shown");
    let (code, _, err) = consign(&["verify", "--data-dir", path]).await;
    assert_eq!((code, err.contains("--data-dir")), (2, true), "{err}");
    let (code, _, err) = consign(&["orders", "list", "--order-url", "http://127.0.0.1:9"]).await;
    assert_eq!((code, err.contains("consign up")), (1, true), "{err}");
    assert_eq!(consign(&["nonsense"]).await.0, 2);
    for shell in ["bash", "zsh", "fish"] {
        assert!(consign(&["completions", shell]).await.1.contains("consign"));
    }

    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let process = Process::start(&data, &[]).await;
    let data = data.to_str().unwrap();
    let (code, _, err) = consign(&["up", "--data-dir", data]).await;
    assert_eq!((code, err.contains("in use by another process")), (2, true), "{err}");
    let (code, out, err) =
        consign(&["orders", "place", "coffee:2", "filter", "--watch", "--data-dir", data]).await;
    assert_eq!((code, out.contains("orders.confirmed")), (0, true), "{out}{err}");
    let (code, out, _) =
        consign(&["orders", "list", "--customer", "cli", "--format", "json", "--data-dir", data]).await;
    let page: Value = serde_json::from_str(&out).unwrap();
    let id = page["orders"][0]["id"].as_str().unwrap();
    assert_eq!((code, page["orders"].as_array().unwrap().len()), (0, 1));
    assert_eq!(consign(&["orders", "show", id, "--data-dir", data]).await.0, 0);
    assert_eq!(consign(&["orders", "watch", id, "--data-dir", data]).await.0, 0);
    let (code, _, err) = consign(&["orders", "place", "nothing", "--data-dir", data]).await;
    assert_eq!((code, err.contains("/items/0")), (1, true), "{err}");
    let (code, out, _) = consign(&["dead-letters", "list", "--data-dir", data, "--format", "json"]).await;
    assert_eq!((code, out.trim()), (0, "[]"));
    assert_eq!(consign(&["dead-letters", "redrive", "--all", "--data-dir", data]).await.0, 1);
    let (code, out, err) = consign(&[
        "load",
        "--orders",
        "200",
        "--concurrency",
        "16",
        "--rate",
        "400",
        "--format",
        "json",
        "--data-dir",
        data,
    ])
    .await;
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    assert_eq!(
        (code, &report["completed"], &report["outcomes"]["confirmed"]),
        (0, &json!(200), &json!(200)),
        "{report}"
    );
    process.terminate().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_is_retired_when_nobody_asks_for_it_and_restored() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("data");
    std::fs::create_dir(&dir).unwrap();
    let process =
        Process::start(&dir, &["order.publish.orders_created=[1,2]", "inventory.accept.orders_created=[2]"])
            .await;
    let data = ["--data-dir", dir.to_str().unwrap()];
    let run = async |args: &[&str]| consign(&[args, &data].concat()).await;
    let (code, out, err) = run(&["schema", "usage", "orders.created", "--format", "json"]).await;
    assert_eq!(code, 0, "{err}");
    let lines: Vec<Value> = serde_json::from_str(&out).unwrap();
    let of = |version: u64| lines.iter().find(|l| l["version"] == version).unwrap();
    assert_eq!((&of(1)["given"], &of(1)["handled_as"]), (&json!(false), &json!("orders.created.v2")));
    assert_eq!((&of(2)["given"], &of(2)["replicas"]), (&json!(true), &json!(1)));
    // Somebody asks for version 2, so it stays; nobody for version 1.
    let (code, _, err) = run(&["schema", "retire", "orders.created", "v2"]).await;
    assert!(code == 1 && err.contains("inventory-orders"), "{err}");
    let (code, out, err) = run(&["schema", "retire", "orders.created", "v1"]).await;
    assert!(code == 0 && out.contains("published as v2"), "{out}{err}");
    let (_, out, _) = run(&["schema", "usage", "orders.created"]).await;
    assert!(out.contains("retired"), "{out}");
    let metrics = reqwest::get(format!("{}/metrics", process.order)).await.unwrap().text().await.unwrap();
    for line in [r#"{event="orders.created",version="1"} 0"#, r#"{event="orders.created",version="2"} 1"#] {
        assert!(metrics.contains(&format!("consign_event_version_published{line}")), "{metrics}");
    }
    let (_, out, _) = run(&["schema", "restore", "orders.created", "1"]).await;
    assert!(out.contains("v1 and v2"), "{out}");
    for (bad, said) in [
        (["retire", "orders.created", "v9"], "no version 9"),
        (["retire", "orders.confirmed", "v1"], "not published in several versions"),
        (["retire", "orders.created", "one"], "they look like v1"),
    ] {
        let (code, _, err) = run(&[&["schema"][..], &bad].concat()).await;
        assert!(code != 0 && err.contains(said), "{bad:?}: {err}");
    }
    let (code, _, err) = run(&["schema", "usage", "orders.nothing"]).await;
    assert!(code == 1 && err.contains("orders.created"), "{err}");
    process.kill().await;
    // What is configured must be a version that there is.
    let (code, _, err) = consign(&["config", "check", "--set", "order.publish.orders_created=[3]"]).await;
    assert!(code == 2 && err.contains("order.publish.orders_created = [3]"), "{err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn schemas_are_compared_and_checked_with_exit_codes_for_a_ci() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (code, out, _) = consign(&["schema", "show", "orders.cancelled.v1"]).await;
    assert_eq!(code, 0);
    let mut changed: Value = serde_json::from_str(&out).unwrap();
    changed["properties"]["order_id"] = serde_json::json!({"type": "integer"});
    changed["required"] = serde_json::json!(["order_id"]);
    let changed = file("changed.json", &changed.to_string());
    let (code, out, _) = consign(&["schema", "compat", "orders.cancelled.v1", "orders.cancelled.v1"]).await;
    assert!(code == 0 && out.contains("fully compatible"), "{out}");
    let (code, out, _) = consign(&["schema", "compat", "orders.cancelled.v1", &changed]).await;
    assert!(code == 1 && out.contains("/order_id: may be string, and must be integer"), "{out}");
    let (_, out, _) = consign(&["schema", "diff", "orders.cancelled.v1", &changed]).await;
    assert!(out.contains("/reason: was required, is optional"), "{out}");
    let good = r#"{"order_id":"0190a5e4-0000-7000-8000-000000000000","reason":"expired"}"#;
    let good = file("good.json", &good.repeat(2));
    assert_eq!(consign(&["schema", "check", "orders.cancelled.v1", &good]).await.0, 0);
    let bad = file("bad.json", r#"{"order_id":"x","reason":"bored"}"#);
    let (code, out, _) = consign(&["schema", "check", "orders.cancelled.v1", &good, &bad]).await;
    assert!(
        code == 1 && out.contains("/reason: must be one of") && out.contains("3 events, 1 of them"),
        "{out}"
    );
    let odd = file("odd.json", r#"{"pattern":"a"}"#);
    let (code, _, err) = consign(&["schema", "check", &odd, &good]).await;
    assert!(code == 2 && err.contains("pattern"), "{err}");
    for stdin in
        [&["schema", "check", "orders.cancelled.v1"][..], &["schema", "check", "orders.cancelled.v1", "-"]]
    {
        let check = Command::new(program()).args(stdin).stdin(std::fs::File::open(&bad).unwrap()).output();
        let out = String::from_utf8(check.await.unwrap().stdout).unwrap();
        assert!(out.contains("standard input, event 1: /reason"), "{out}");
    }
}

/// `consign … | head` ends as other programs do, and without a panic.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_whose_reader_has_gone_ends_quietly() {
    let mut child = Command::new(program())
        .args(["schema", "export"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().await.unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap()), (Some(141), String::new()));
}
