//! The three services as processes, one of each, under load.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use consign::testing::servers::{NatsServer, PostgresServer};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

use crate::{Figure, cpu, floor, statements};

const ORDERS: usize = 20_000;
/// Requests under way at a time.
const CONCURRENCY: usize = 512;
pub const TOKEN: &str = "bench-token";

pub struct Process {
    child: Child,
    pub url: String,
    ready_after: Duration,
}

fn program(name: &str) -> PathBuf {
    let path = std::env::current_exe().unwrap().with_file_name(format!("consign-{name}"));
    assert!(path.exists(), "{} is not there; run `cargo xtask bench`", path.display());
    path
}

pub async fn spawn(name: &'static str, nats: &NatsServer, database: &str) -> Process {
    let started = Instant::now();
    let mut child = Command::new(program(name))
        .env("CONSIGN_BROKER", "nats")
        .env("CONSIGN_NATS__URLS", format!("{:?}", [nats.url()]))
        .env("CONSIGN_DATABASE", "postgres")
        .env("CONSIGN_POSTGRES__URL", database)
        .env("CONSIGN_SERVICE__HTTP__LISTEN", "127.0.0.1:0")
        .env("CONSIGN_SERVICE__HTTP__ADMIN_TOKEN", TOKEN)
        .env("CONSIGN_LOG__FILTER", "warn")
        .kill_on_drop(true)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = lines.next_line().await.unwrap().expect("ready");
    let ready_after = started.elapsed();
    Process { child, url: line.split_whitespace().last().unwrap().to_owned(), ready_after }
}

/// Resident memory in MB.
fn resident(process: &Process) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.child.id().unwrap())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

pub async fn run(nats: &NatsServer, postgres: &PostgresServer) -> Vec<Figure> {
    let transport = floor::transport(nats, ORDERS).await;
    let inserts = tokio::task::block_in_place(|| floor::inserts(postgres));
    let databases = ["inventory", "payment", "order"].map(|name| (name, postgres.database(name)));
    // The first start makes tables and streams; the second is what a restart costs.
    for (name, database) in &databases {
        let mut first = spawn(name, nats, database).await;
        first.child.kill().await.unwrap();
    }
    let mut processes = Vec::new();
    for (name, database) in &databases {
        processes.push(spawn(name, nats, database).await);
    }
    let ready = processes.iter().map(|p| p.ready_after.as_secs_f64() * 1000.0).fold(0.0, f64::max);
    let http = reqwest::Client::builder().pool_max_idle_per_host(1024).build().unwrap();
    seed(&http, &processes[0].url).await;
    let orders = PgPool::connect(&databases[2].1).await.unwrap();
    while sqlx::query_scalar::<_, i64>("SELECT COUNT(*) FROM products").fetch_one(&orders).await.unwrap() < 10
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    place_many(&http, &processes[2].url, 1000).await;
    until_ended(&orders).await;

    statements::forget(postgres);
    let (started, used) = (Instant::now(), cpu::by_program());
    place_many(&http, &processes[2].url, ORDERS).await;
    let memory = processes.iter().map(resident).fold(0.0, f64::max);
    until_ended(&orders).await;
    let wall = started.elapsed().as_secs_f64();
    let completed = ORDERS as f64 / wall;
    println!("sagas: {}", cpu::since(&used, wall));

    statements::print(postgres);

    // pgbench had the machine to itself, so the order service gets it too.
    for other in &mut processes[..2] {
        other.child.kill().await.unwrap();
    }
    let (started, used) = (Instant::now(), cpu::by_program());
    place_many(&http, &processes[2].url, ORDERS).await;
    let wall = started.elapsed().as_secs_f64();
    let accepted = ORDERS as f64 / wall;
    println!("accepting: {}", cpu::since(&used, wall));
    vec![
        Figure {
            what: "sagas completed",
            reached: completed,
            unit: "orders/s",
            floor: Some(("orders/s of bare publishes, deliveries, acks", transport)),
            goal: 0.35,
        },
        Figure {
            what: "POST /orders, committed before the answer",
            reached: accepted,
            unit: "orders/s",
            floor: Some(("orders/s inserted by pgbench, 64 a transaction", inserts)),
            goal: 0.5,
        },
        Figure {
            what: "resident memory under load, the largest",
            reached: memory,
            unit: "MB",
            floor: None,
            goal: 60.0,
        },
        Figure { what: "start to ready, the slowest", reached: ready, unit: "ms", floor: None, goal: 200.0 },
    ]
}

pub async fn seed(http: &reqwest::Client, inventory: &str) {
    for n in 0..10 {
        let body = json!({"name": format!("product {n}"), "price": 100, "currency": "EUR"});
        let put = http
            .put(format!("{inventory}/products/p{n}"))
            .bearer_auth(TOKEN)
            .json(&body)
            .send()
            .await
            .unwrap();
        assert!(put.status().is_success());
        let body = json!({"delta": 1_000_000, "reason": "bench"});
        let url = format!("{inventory}/products/p{n}/stock");
        let request =
            http.post(url).bearer_auth(TOKEN).header("Idempotency-Key", format!("seed-{n}")).json(&body);
        assert!(request.send().await.unwrap().status().is_success());
    }
}

async fn place_many(http: &reqwest::Client, order: &str, count: usize) {
    let next = Arc::new(AtomicUsize::new(0));
    let mut placing = JoinSet::new();
    for _ in 0..CONCURRENCY {
        let (http, url, next) = (http.clone(), format!("{order}/orders"), Arc::clone(&next));
        placing.spawn(async move {
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= count {
                    return;
                }
                let body = json!({"customer_id": "bench", "items": [{"product_id": format!("p{}", n % 10), "quantity": 1}]});
                let answer = http.post(&url).json(&body).send().await.unwrap();
                assert_eq!(answer.status(), 202, "{:?}", answer.json::<Value>().await);
            }
        });
    }
    placing.join_all().await;
}

/// Waits until no order is under way. Looks at the few that are: counting all of them would be measured too.
async fn until_ended(orders: &PgPool) {
    let started = Instant::now();
    loop {
        let open: bool =
            sqlx::query_scalar("SELECT EXISTS (SELECT FROM orders WHERE status IN ('pending', 'reserved'))")
                .fetch_one(orders)
                .await
                .unwrap();
        if !open {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(300), "orders are still under way");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
