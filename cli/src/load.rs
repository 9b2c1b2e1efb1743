//! `consign load`: places orders and measures how long they take to be accepted and to be confirmed.
//!
//! With a rate, latency counts from when a request was due, not from when it could be sent, so that a stalled server cannot hide
//! its stall (coordinated omission).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Args;
use comfy_table::Table;
use consign::Timestamp;
use consign::handler::BoxError;
use indicatif::ProgressBar;
use rand::RngExt;
use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::client::Client;
use crate::output::{Format, bar};

#[derive(Clone, Debug, Args)]
pub struct Options {
    /// How many orders.
    #[arg(long, default_value_t = 1000)]
    pub orders: u64,
    /// How many requests at a time.
    #[arg(long, default_value_t = 64)]
    pub concurrency: u64,
    /// Orders per second; as fast as it goes if left out.
    #[arg(long)]
    pub rate: Option<f64>,
    /// Which products; all there are if left out.
    #[arg(long, value_delimiter = ',')]
    pub products: Vec<String>,
    /// Wait so many seconds for the last order to end.
    #[arg(long, default_value_t = 120)]
    pub wait: u64,
    /// express or standard.
    #[arg(long, default_value = "standard")]
    pub lane: String,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    orders: u64,
    accepted: u64,
    refused: BTreeMap<String, u64>,
    completed: u64,
    outcomes: BTreeMap<String, u64>,
    accepted_per_second: f64,
    completed_per_second: f64,
    to_accepted_ms: Percentiles,
    to_completed_ms: Percentiles,
    seconds: f64,
}

#[derive(Debug, Default, Serialize)]
struct Percentiles {
    p50: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

impl Percentiles {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index between 0 and the length"
    )]
    fn of(mut samples: Vec<f64>) -> Self {
        if samples.is_empty() {
            return Self::default();
        }
        samples.sort_by(f64::total_cmp);
        let at = |q: f64| samples[((samples.len() as f64 * q).ceil() as usize).clamp(1, samples.len()) - 1];
        Self { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: at(1.0) }
    }
}

/// What the workers share.
struct Run {
    client: Client,
    products: Vec<String>,
    customer: String,
    options: Options,
    next: AtomicU64,
    started: Instant,
    bar: ProgressBar,
}

#[derive(Default)]
struct Tally {
    latencies: Vec<f64>,
    refused: BTreeMap<String, u64>,
}

impl Run {
    async fn work(self: Arc<Self>) -> Tally {
        let mut tally = Tally::default();
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n >= self.options.orders {
                return tally;
            }
            let mut due = Instant::now();
            if let Some(rate) = self.options.rate {
                #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
                let offset = Duration::from_secs_f64(n as f64 / rate);
                due = self.started + offset;
                tokio::time::sleep_until(due).await;
            }
            let body = {
                let mut rng = rand::rng();
                let product = &self.products[rng.random_range(0..self.products.len())];
                json!({"customer_id": self.customer, "lane": self.options.lane,
                       "items": [{"product_id": product, "quantity": rng.random_range(1..=3)}]})
            };
            let key = format!("{}-{n}", self.customer);
            let request =
                self.client.request(Method::POST, "/orders").header("Idempotency-Key", key).json(&body);
            match request.send().await {
                Ok(response) if response.status().is_success() => {
                    // The connection is free for the next request only when the body has been read.
                    let _ = response.bytes().await;
                    tally.latencies.push(due.elapsed().as_secs_f64() * 1000.0);
                }
                Ok(response) => {
                    *tally.refused.entry(response.status().as_u16().to_string()).or_default() += 1;
                    let _ = response.bytes().await;
                }
                Err(e) => {
                    let kind = if e.is_timeout() { "timeout" } else { "connection" };
                    *tally.refused.entry(kind.to_owned()).or_default() += 1;
                }
            }
            self.bar.inc(1);
        }
    }
}

/// Runs the load and waits for its end. An error if anything was refused or did not end.
pub async fn run(
    options: Options,
    orders: &Client,
    inventory: &Client,
    format: Format,
) -> Result<(), BoxError> {
    if options.orders == 0 || options.concurrency == 0 || options.rate.is_some_and(|r| r <= 0.0) {
        return Err("--orders, --concurrency and --rate must be above 0".into());
    }
    let products =
        if options.products.is_empty() { all_products(inventory).await? } else { options.products.clone() };
    let customer = format!("load-{}", uuid::Uuid::now_v7().simple());
    let run = Arc::new(Run {
        client: orders.clone(),
        products,
        customer: customer.clone(),
        next: AtomicU64::new(0),
        started: Instant::now(),
        bar: bar(options.orders, "accepted"),
        options,
    });
    let mut workers = JoinSet::new();
    for _ in 0..run.options.concurrency {
        workers.spawn(Arc::clone(&run).work());
    }
    let mut total = Tally::default();
    while let Some(tally) = workers.join_next().await {
        let tally = tally?;
        total.latencies.extend(tally.latencies);
        for (why, n) in tally.refused {
            *total.refused.entry(why).or_default() += n;
        }
    }
    let accepting = run.started.elapsed().as_secs_f64();
    run.bar.finish_and_clear();
    let accepted = total.latencies.len() as u64;
    let ended = wait_for_end(orders, &customer, accepted, Duration::from_secs(run.options.wait)).await?;
    let report = report(run.options.orders, accepted, accepting, total, &ended);
    print(&report, format)?;
    if report.accepted < report.orders || report.completed < report.accepted {
        return Err(format!(
            "{} of {} orders were not accepted, {} did not end",
            report.orders - report.accepted,
            report.orders,
            report.accepted - report.completed
        )
        .into());
    }
    Ok(())
}

async fn all_products(inventory: &Client) -> Result<Vec<String>, BoxError> {
    let page: Value = inventory.get("/products?limit=500").await?;
    let products: Vec<String> = page["products"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|p| p["available"].as_i64().is_some_and(|n| n > 0))
        .filter_map(|p| p["id"].as_str().map(str::to_owned))
        .collect();
    if products.is_empty() { Err("there is no product with stock to order".into()) } else { Ok(products) }
}

#[derive(Debug, Deserialize)]
struct Ended {
    status: String,
    created_at: Timestamp,
    updated_at: Timestamp,
}

#[derive(Debug, Deserialize)]
struct Page<T> {
    orders: Vec<T>,
    next_cursor: Option<String>,
}

/// All orders of this run once none is open, or those that ended within `limit`.
async fn wait_for_end(
    client: &Client,
    customer: &str,
    accepted: u64,
    limit: Duration,
) -> Result<Vec<Ended>, BoxError> {
    let waiting = Instant::now();
    let spinner = ProgressBar::new_spinner().with_message("waiting for the last orders to end");
    spinner.enable_steady_tick(Duration::from_millis(200));
    for status in ["pending", "reserved"] {
        loop {
            let query = [("customer_id", Some(customer)), ("status", Some(status)), ("limit", Some("1"))];
            let page: Page<Value> = client.query("/orders", &query).await?;
            if page.orders.is_empty() || waiting.elapsed() > limit {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    spinner.finish_and_clear();
    let bar = bar(accepted, "reading");
    let mut ended = Vec::new();
    let mut cursor = None::<String>;
    loop {
        let query = [("customer_id", Some(customer)), ("limit", Some("500")), ("cursor", cursor.as_deref())];
        let page: Page<Ended> = client.query("/orders", &query).await?;
        bar.inc(page.orders.len() as u64);
        ended.extend(page.orders.into_iter().filter(|o| o.status == "confirmed" || o.status == "cancelled"));
        cursor = page.next_cursor;
        if cursor.is_none() {
            bar.finish_and_clear();
            return Ok(ended);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts and milliseconds stay far below 2^52")]
fn report(orders: u64, accepted: u64, accepting: f64, total: Tally, ended: &[Ended]) -> Report {
    let first = ended.iter().map(|o| o.created_at).min();
    let last = ended.iter().map(|o| o.updated_at).max();
    let span = match (first, last) {
        (Some(first), Some(last)) => last.since(first).as_secs_f64().max(0.001),
        _ => 1.0,
    };
    let mut outcomes = BTreeMap::new();
    for o in ended {
        *outcomes.entry(o.status.clone()).or_default() += 1;
    }
    Report {
        orders,
        accepted,
        refused: total.refused,
        completed: ended.len() as u64,
        outcomes,
        accepted_per_second: accepted as f64 / accepting.max(0.001),
        completed_per_second: ended.len() as f64 / span,
        to_accepted_ms: Percentiles::of(total.latencies),
        to_completed_ms: Percentiles::of(
            ended.iter().map(|o| o.updated_at.since(o.created_at).as_secs_f64() * 1000.0).collect(),
        ),
        seconds: span,
    }
}

fn print(r: &Report, format: Format) -> Result<(), BoxError> {
    if format == Format::Json {
        outln!("{}", serde_json::to_string(r)?);
        return Ok(());
    }
    let mut table = Table::new();
    table.set_header(["", "orders", "per second", "p50 ms", "p99 ms", "p99.9 ms", "max ms"]);
    let mut row = |name: &str, count: u64, rate: f64, p: &Percentiles| {
        let ms = |v: f64| format!("{v:.1}");
        table.add_row([
            name.to_owned(),
            count.to_string(),
            format!("{rate:.0}"),
            ms(p.p50),
            ms(p.p99),
            ms(p.p999),
            ms(p.max),
        ]);
    };
    row("accepted", r.accepted, r.accepted_per_second, &r.to_accepted_ms);
    row("completed", r.completed, r.completed_per_second, &r.to_completed_ms);
    outln!("{table}");
    for (outcome, n) in &r.outcomes {
        outln!("{outcome}: {n}");
    }
    for (why, n) in &r.refused {
        outln!("refused ({why}): {n}");
    }
    Ok(())
}
