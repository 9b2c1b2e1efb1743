//! `consign orders`: place, show, list, watch.

use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::Table;
use consign::handler::BoxError;
use reqwest::Method;
use serde_json::{Value, json};

use crate::client::Client;
use crate::output::{Format, text};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Place an order.
    Place(Place),
    /// Show one order.
    Show {
        /// Its id.
        id: String,
    },
    /// List orders, the newest first.
    List(List),
    /// Follow an order's timeline to its end.
    Watch {
        /// Its id.
        id: String,
        /// Give up after so many seconds (exit code 1).
        #[arg(long, default_value_t = 60)]
        timeout: u64,
    },
}

#[derive(Debug, Args)]
pub struct Place {
    /// What, as PRODUCT or PRODUCT:QUANTITY.
    #[arg(required = true)]
    items: Vec<String>,
    /// Whose it is.
    #[arg(long, default_value = "cli")]
    customer: String,
    /// express or standard.
    #[arg(long, default_value = "standard")]
    lane: String,
    /// Repeated with the same key, it is placed once.
    #[arg(long)]
    idempotency_key: Option<String>,
    /// Follow it to its end.
    #[arg(long)]
    watch: bool,
}

#[derive(Debug, Args)]
pub struct List {
    /// pending, reserved, confirmed or cancelled.
    #[arg(long)]
    status: Option<String>,
    /// Whose.
    #[arg(long)]
    customer: Option<String>,
    /// How many.
    #[arg(long, default_value_t = 20)]
    limit: u32,
}

pub async fn run(command: Command, client: &Client, format: Format) -> Result<(), BoxError> {
    match command {
        Command::Place(place) => {
            let items: Vec<Value> = place.items.iter().map(|i| item(i)).collect::<Result<_, _>>()?;
            let body = json!({"customer_id": place.customer, "items": items, "lane": place.lane});
            let mut request = client.request(Method::POST, "/orders").json(&body);
            if let Some(key) = place.idempotency_key {
                request = request.header("Idempotency-Key", key);
            }
            let order: Value = client.send(request).await?;
            show(&order, format)?;
            if place.watch {
                let id = order["id"].as_str().unwrap_or_default().to_owned();
                watch(client, &id, Duration::from_secs(60), format).await?;
            }
            Ok(())
        }
        Command::Show { id } => show(&client.get(&format!("/orders/{id}")).await?, format),
        Command::List(l) => list(client, &l, format).await,
        Command::Watch { id, timeout } => watch(client, &id, Duration::from_secs(timeout), format).await,
    }
}

fn item(text: &str) -> Result<Value, String> {
    let (product, quantity) = text.split_once(':').unwrap_or((text, "1"));
    let quantity: u32 =
        quantity.parse().map_err(|_| format!("{text}: must be PRODUCT:QUANTITY, for example coffee:2"))?;
    Ok(json!({"product_id": product, "quantity": quantity}))
}

fn show(order: &Value, format: Format) -> Result<(), BoxError> {
    if format == Format::Json {
        println!("{}", serde_json::to_string_pretty(order)?);
        return Ok(());
    }
    let mut table = Table::new();
    for key in [
        "id",
        "status",
        "reason",
        "customer_id",
        "lane",
        "total",
        "currency",
        "created_at",
        "updated_at",
        "correlation_id",
    ] {
        if !order[key].is_null() {
            table.add_row([key.to_owned(), text(&order[key])]);
        }
    }
    println!("{table}");
    Ok(())
}

async fn list(client: &Client, l: &List, format: Format) -> Result<(), BoxError> {
    let limit = l.limit.to_string();
    let query = [
        ("limit", Some(limit.as_str())),
        ("status", l.status.as_deref()),
        ("customer_id", l.customer.as_deref()),
    ];
    let page: Value = client.query("/orders", &query).await?;
    if format == Format::Json {
        println!("{}", serde_json::to_string_pretty(&page)?);
        return Ok(());
    }
    let columns = ["id", "status", "reason", "customer_id", "total", "currency", "created_at"];
    let mut table = Table::new();
    table.set_header(columns);
    for order in page["orders"].as_array().into_iter().flatten() {
        table.add_row(columns.map(|c| text(&order[c])));
    }
    println!("{table}");
    Ok(())
}

async fn watch(client: &Client, id: &str, limit: Duration, format: Format) -> Result<(), BoxError> {
    let mut seen = 0;
    let started = tokio::time::Instant::now();
    loop {
        let timeline: Value = client.get(&format!("/orders/{id}/events")).await?;
        let events = timeline["events"].as_array().cloned().unwrap_or_default();
        for event in events.iter().skip(seen) {
            match format {
                Format::Json => println!("{event}"),
                Format::Table => {
                    println!(
                        "{}  {:<24} {}",
                        text(&event["at"]),
                        text(&event["event"]),
                        text(&event["detail"])
                    );
                }
            }
        }
        seen = events.len();
        let ended = |e: &Value| matches!(e["event"].as_str(), Some("orders.confirmed" | "orders.cancelled"));
        if events.iter().any(ended) {
            return Ok(());
        }
        if started.elapsed() > limit {
            return Err(format!("order {id} did not end within {limit:?}").into());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
