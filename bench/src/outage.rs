//! The payment gateway fails every call for a minute, under load: what it costs those who place orders, how often the gateway is called all the
//! same, and how soon the backlog is paid.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use consign::testing::servers::{NatsServer, PostgresServer};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::saga::{Process, TOKEN, seed, spawn};
use crate::{Figure, percentile};

/// Orders a second, all the time.
const RATE: u32 = 150;
const HEALTHY: Duration = Duration::from_secs(30);
const OUTAGE: Duration = Duration::from_secs(60);
/// Replicas of payment: each has a breaker of its own.
const REPLICAS: usize = 2;
/// How long the breakers may take to open; calls after that are probes.
const OPENING: Duration = Duration::from_secs(5);

/// Milliseconds until each order was accepted, since this was last asked.
type Latencies = Arc<Mutex<Vec<f64>>>;

pub async fn run(nats: &NatsServer, postgres: &PostgresServer) -> Vec<Figure> {
    let databases = ["inventory", "payment", "order"].map(|name| (name, postgres.database(name)));
    let inventory = spawn("inventory", nats, &databases[0].1).await;
    let order = spawn("order", nats, &databases[2].1).await;
    let mut payments = Vec::new();
    for _ in 0..REPLICAS {
        payments.push(spawn("payment", nats, &databases[1].1).await);
    }
    let http = reqwest::Client::builder().pool_max_idle_per_host(1024).build().unwrap();
    seed(&http, &inventory.url).await;
    let orders = PgPool::connect(&databases[2].1).await.unwrap();
    let payment = PgPool::connect(&databases[1].1).await.unwrap();
    while sqlx::query_scalar::<_, i64>("SELECT COUNT(*) FROM products").fetch_one(&orders).await.unwrap() < 10
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (latencies, stop) = (Latencies::default(), Arc::new(AtomicBool::new(false)));
    let load =
        tokio::spawn(place(http.clone(), order.url.clone(), Arc::clone(&latencies), Arc::clone(&stop)));
    tokio::time::sleep(Duration::from_secs(10)).await;
    taken(&latencies).await;
    tokio::time::sleep(HEALTHY).await;
    let healthy = taken(&latencies).await;

    let before = calls(&http, &payments).await;
    set_gateway(&http, &payments, &json!({"error_rate": 1.0})).await;
    let failed_at = Instant::now();
    tokio::time::sleep(OPENING).await;
    let opened = calls(&http, &payments).await;
    tokio::time::sleep(OUTAGE.saturating_sub(failed_at.elapsed())).await;
    let during = taken(&latencies).await;
    let ended = calls(&http, &payments).await;
    let counted: i64 = sqlx::query_scalar(
        "SELECT COALESCE(SUM(failures), 0)::bigint + (SELECT COUNT(*) FROM dead_letters) FROM tasks",
    )
    .fetch_one(&payment)
    .await
    .unwrap();

    set_gateway(&http, &payments, &json!({})).await;
    let healed_at = Instant::now();
    // Those that wait for the gateway now.
    let backlog: Vec<uuid::Uuid> = sqlx::query_scalar("SELECT id FROM orders WHERE status = 'reserved'")
        .fetch_all(&orders)
        .await
        .unwrap();
    let mut paid_95 = None;
    while paid_95.is_none() && healed_at.elapsed() < Duration::from_secs(120) {
        let open: i64 =
            sqlx::query_scalar("SELECT COUNT(*) FROM orders WHERE id = ANY($1) AND status <> 'confirmed'")
                .bind(&backlog)
                .fetch_one(&orders)
                .await
                .unwrap();
        if open as f64 <= backlog.len() as f64 * 0.05 {
            paid_95 = Some(healed_at.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    stop.store(true, Ordering::Relaxed);
    load.await.unwrap();
    let ms = |sorted: &[f64]| percentile(sorted, 0.99);
    println!(
        "outage: {RATE} orders/s, {REPLICAS} replicas of payment; {} orders waited; accepted p99 {:.1} ms before and {:.1} ms during; \
         gateway calls {} until the breakers were open, {} after",
        backlog.len(),
        ms(&healthy),
        ms(&during),
        opened - before,
        ended - opened
    );
    let most = |what, reached, unit, goal| Figure { what, reached, unit, floor: None, goal };
    vec![
        most("accepting during the outage, p99 against healthy", ms(&during) / ms(&healthy), "times", 1.5),
        // Rounds are 5, 10, 10, … s apart, a fifth less at least, of three probes.
        most(
            "calls of an open gateway, a minute and replica",
            (ended - opened) as f64 / REPLICAS as f64,
            "calls",
            24.0,
        ),
        most("attempts counted and dead letters", counted as f64, "", 0.0),
        most(
            "95 % of the backlog paid after the heal",
            paid_95.map_or(f64::INFINITY, |t| t.as_secs_f64()),
            "s",
            30.0,
        ),
    ]
}

/// Places orders at a steady rate until stopped.
async fn place(http: reqwest::Client, order: String, latencies: Latencies, stop: Arc<AtomicBool>) {
    let mut placing = JoinSet::new();
    let mut tick = tokio::time::interval(Duration::from_secs(1) / RATE);
    for n in 0_usize.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        tick.tick().await;
        let (http, url, latencies) = (http.clone(), format!("{order}/orders"), Arc::clone(&latencies));
        placing.spawn(async move {
            let body = json!({"customer_id": "bench", "items": [{"product_id": format!("p{}", n % 10), "quantity": 1}]});
            let started = Instant::now();
            let answer = http.post(&url).json(&body).send().await.unwrap();
            assert_eq!(answer.status(), 202, "{:?}", answer.json::<Value>().await);
            latencies.lock().await.push(started.elapsed().as_secs_f64() * 1000.0);
        });
        while placing.try_join_next().is_some_and(|joined| joined.is_ok()) {}
    }
    placing.join_all().await;
}

async fn taken(latencies: &Latencies) -> Vec<f64> {
    let mut sorted = std::mem::take(&mut *latencies.lock().await);
    sorted.sort_by(f64::total_cmp);
    sorted
}

async fn set_gateway(http: &reqwest::Client, payments: &[Process], knobs: &Value) {
    for p in payments {
        let put = http.put(format!("{}/gateway", p.url)).bearer_auth(TOKEN).json(knobs).send().await.unwrap();
        assert!(put.status().is_success());
    }
}

/// How often the gateway was called so far.
async fn calls(http: &reqwest::Client, payments: &[Process]) -> u64 {
    let mut sum = 0;
    for p in payments {
        let metrics = http.get(format!("{}/metrics", p.url)).send().await.unwrap().text().await.unwrap();
        let line = metrics.lines().find(|l| l.starts_with("payment_simulated_gateway_calls_total "));
        sum += line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0);
    }
    sum
}
