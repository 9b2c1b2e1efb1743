//! `consign orders`: place, show, list, watch.

use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::Table;
use consign::handler::BoxError;
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

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
    /// Cancel an order, until it is confirmed.
    Cancel {
        /// Its id.
        id: String,
    },
    /// Give money back for a confirmed order, all that is left or by lines.
    Refund(Refund),
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
    /// What to charge: the payment gateway's token. The simulated gateway needs none.
    #[arg(long)]
    payment_method: Option<String>,
    /// Repeated with the same key, it is placed once.
    #[arg(long)]
    idempotency_key: Option<String>,
    /// Follow it to its end.
    #[arg(long)]
    watch: bool,
}

#[derive(Debug, Args)]
pub struct Refund {
    /// The order.
    id: String,
    /// Which pieces, as PRODUCT or PRODUCT:QUANTITY; all that are left if none is named.
    items: Vec<String>,
    /// What comes back is not put on the shelf again.
    #[arg(long)]
    write_off: bool,
    /// For the record.
    #[arg(long)]
    reason: Option<String>,
    /// Repeated with the same key, it is refunded once; a new one each time if left out.
    #[arg(long)]
    idempotency_key: Option<String>,
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
            let mut body = json!({"customer_id": place.customer, "items": items, "lane": place.lane});
            if let Some(method) = place.payment_method {
                body["payment_method"] = method.into();
            }
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
        Command::Cancel { id } => {
            show(&client.post(&format!("/orders/{id}/cancel"), &json!({})).await?, format)
        }
        Command::Refund(r) => refund(client, r, format).await,
        Command::List(l) => list(client, &l, format).await,
        Command::Watch { id, timeout } => watch(client, &id, Duration::from_secs(timeout), format).await,
    }
}

async fn refund(client: &Client, r: Refund, format: Format) -> Result<(), BoxError> {
    let mut body = json!({"restock": !r.write_off});
    if !r.items.is_empty() {
        body["lines"] = r.items.iter().map(|i| item(i)).collect::<Result<Value, _>>()?;
    }
    if let Some(reason) = r.reason {
        body["reason"] = reason.into();
    }
    let key = r.idempotency_key.unwrap_or_else(|| Uuid::new_v4().to_string());
    let request = client.request(Method::POST, &format!("/orders/{}/refund", r.id)).json(&body);
    let mut refund: Value = client.send(request.header("Idempotency-Key", key)).await?;
    // Until payment and the gateway have answered, or for as long as somebody would look at it.
    for _ in 0..50 {
        if refund["status"] != "pending" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let all: Value = client.get(&format!("/orders/{}/refunds", r.id)).await?;
        let ours = all["refunds"].as_array().into_iter().flatten().find(|f| f["id"] == refund["id"]);
        refund = ours.cloned().unwrap_or(refund);
    }
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(&refund)?);
        return Ok(());
    }
    let mut table = Table::new();
    for key in ["id", "order_id", "amount", "status", "restock", "reason", "rejection"] {
        if !refund[key].is_null() {
            table.add_row([key.to_owned(), text(&refund[key])]);
        }
    }
    outln!("{table}");
    Ok(())
}

fn item(text: &str) -> Result<Value, String> {
    let (product, quantity) = text.split_once(':').unwrap_or((text, "1"));
    let quantity: u32 =
        quantity.parse().map_err(|_| format!("{text}: must be PRODUCT:QUANTITY, for example coffee:2"))?;
    Ok(json!({"product_id": product, "quantity": quantity}))
}

fn show(order: &Value, format: Format) -> Result<(), BoxError> {
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(order)?);
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
        "refunding",
        "refunded",
        "deadline",
        "created_at",
        "updated_at",
        "correlation_id",
    ] {
        if !order[key].is_null() {
            table.add_row([key.to_owned(), text(&order[key])]);
        }
    }
    outln!("{table}");
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
        outln!("{}", serde_json::to_string_pretty(&page)?);
        return Ok(());
    }
    let columns = ["id", "status", "reason", "customer_id", "total", "currency", "created_at"];
    let mut table = Table::new();
    table.set_header(columns);
    for order in page["orders"].as_array().into_iter().flatten() {
        table.add_row(columns.map(|c| text(&order[c])));
    }
    outln!("{table}");
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
                Format::Json => outln!("{event}"),
                Format::Table => {
                    outln!(
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
