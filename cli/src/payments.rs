//! `consign payments` and `consign gateway`: what is being charged, what does not come to an end, and how the simulated gateway behaves.

use clap::{Args, Subcommand};
use comfy_table::Table;
use consign::handler::BoxError;
use reqwest::Method;
use serde_json::{Map, Value};

use crate::client::Client;
use crate::output::{Format, text};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List payments, the newest first.
    List {
        /// How many.
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Show an order's payment with its refunds.
    Show {
        /// The order.
        order: String,
    },
    /// List charges and refunds that do not come to an end (exit code 1 if there are any).
    Stuck {
        /// Under way for so many seconds; the service's `stuck_after` if left out.
        #[arg(long)]
        after: Option<u64>,
    },
}

/// `false` if something is stuck.
pub async fn run(command: Command, client: &Client, format: Format) -> Result<bool, BoxError> {
    let (page, key, columns): (Value, _, &[&str]) = match command {
        Command::List { limit } => (
            client.query("/payments", &[("limit", Some(&limit.to_string()))]).await?,
            "payments",
            &["order_id", "status", "amount", "currency", "refunded", "reason", "updated_at"],
        ),
        Command::Show { order } => {
            let page: Value = client.query("/payments", &[("order_id", Some(&order))]).await?;
            let payment = page["payments"][0].clone();
            if payment.is_null() {
                return Err(format!("there is no payment of order {order}").into());
            }
            outln!("{}", serde_json::to_string_pretty(&payment)?);
            return Ok(true);
        }
        Command::Stuck { after } => {
            let after = after.map(|s| s.to_string());
            (
                client.query("/payments/stuck", &[("after_seconds", after.as_deref())]).await?,
                "stuck",
                &[
                    "what",
                    "order_id",
                    "amount",
                    "currency",
                    "since",
                    "attempts",
                    "next_attempt_at",
                    "last_error",
                ],
            )
        }
    };
    let rows = page[key].as_array().cloned().unwrap_or_default();
    let fine = key != "stuck" || rows.is_empty();
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(&page)?);
        return Ok(fine);
    }
    if key == "stuck" && rows.is_empty() {
        outln!("nothing is stuck");
        return Ok(fine);
    }
    let mut table = Table::new();
    table.set_header(columns.iter().map(|c| c.replace('_', " ")));
    for row in &rows {
        table.add_row(columns.iter().map(|c| text(&row[*c])));
    }
    outln!("{table}");
    Ok(fine)
}

#[derive(Debug, Subcommand)]
pub enum GatewayCommand {
    /// Show how the simulated gateway behaves.
    Show,
    /// Change how it behaves; what is not named stays as it is.
    Set(Box<Knobs>),
}

#[derive(Debug, Args)]
pub struct Knobs {
    /// Half of all calls take no longer. Milliseconds.
    #[arg(long)]
    latency_ms: Option<u64>,
    /// 99 of 100 calls take no longer. Milliseconds.
    #[arg(long)]
    latency_p99_ms: Option<u64>,
    /// Share of charges declined, 0 to 1.
    #[arg(long)]
    decline_rate: Option<f64>,
    /// Share of calls that fail without effect, 0 to 1.
    #[arg(long)]
    error_rate: Option<f64>,
    /// Share of calls that hang, 0 to 1.
    #[arg(long)]
    timeout_rate: Option<f64>,
    /// Share of calls that take effect, but whose answer is lost, 0 to 1.
    #[arg(long)]
    lost_answer_rate: Option<f64>,
    /// Share of charges it calls back about, 0 to 1.
    #[arg(long)]
    callback_rate: Option<f64>,
    /// Share of callbacks that come twice, 0 to 1.
    #[arg(long)]
    duplicate_callback_rate: Option<f64>,
    /// All as they are by default first.
    #[arg(long)]
    reset: bool,
}

impl Knobs {
    fn named(&self) -> Map<String, Value> {
        let whole = |n: Option<u64>| n.map(Value::from);
        let rate = |n: Option<f64>| n.map(Value::from);
        let all = [
            ("latency_ms", whole(self.latency_ms)),
            ("latency_p99_ms", whole(self.latency_p99_ms)),
            ("decline_rate", rate(self.decline_rate)),
            ("error_rate", rate(self.error_rate)),
            ("timeout_rate", rate(self.timeout_rate)),
            ("lost_answer_rate", rate(self.lost_answer_rate)),
            ("callback_rate", rate(self.callback_rate)),
            ("duplicate_callback_rate", rate(self.duplicate_callback_rate)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }
}

/// In each replica of payment.
pub async fn gateway(command: GatewayCommand, replicas: &[Client], format: Format) -> Result<(), BoxError> {
    let mut table = Table::new();
    let mut shown = Vec::new();
    for client in replicas {
        let mut knobs: Map<String, Value> = client.get("/gateway").await?;
        if let GatewayCommand::Set(set) = &command {
            if set.reset {
                knobs.clear();
            }
            knobs.extend(set.named());
            knobs = client.send(client.request(Method::PUT, "/gateway").json(&knobs)).await?;
        }
        if shown.is_empty() {
            table.set_header(
                std::iter::once("replica".to_owned()).chain(knobs.keys().map(|k| k.replace('_', " "))),
            );
        }
        table.add_row(std::iter::once(client.base().to_owned()).chain(knobs.values().map(text)));
        shown.push(knobs);
    }
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(&shown)?);
    } else {
        outln!("{table}");
    }
    Ok(())
}
