//! `consign dead-letters`: list, show, redrive, discard, over the services' admin endpoints.

use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::Table;
use consign::dead_letter::Filter;
use consign::handler::BoxError;
use consign::{Clock, Timestamp};
use serde_json::{Value, json};

use crate::client::{Client, ClientError};
use crate::output::{Format, text};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List dead letters of all services, the newest first.
    List {
        #[command(flatten)]
        filter: FilterArgs,
        /// open, queued, redriven or discarded.
        #[arg(long, default_value = "open")]
        status: String,
        /// Of each service.
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Show one with payload and history.
    Show {
        /// Its id.
        id: String,
    },
    /// Run dead letters again, each for the consumer that failed.
    Redrive(Change),
    /// Give dead letters up; they stay on record.
    Discard(Change),
}

#[derive(Debug, Args)]
pub struct FilterArgs {
    /// Of this consumer.
    #[arg(long)]
    consumer: Option<String>,
    /// Of this event, for example orders.created.v1.
    #[arg(long)]
    event: Option<String>,
    /// For this reason, for example retries_exhausted.
    #[arg(long)]
    reason: Option<String>,
    /// Dead for longer than this, for example 2h.
    #[arg(long, value_name = "AGE", value_parser = age)]
    older_than: Option<Duration>,
    /// Dead for less long than this.
    #[arg(long, value_name = "AGE", value_parser = age)]
    newer_than: Option<Duration>,
}

fn age(text: &str) -> Result<Duration, String> {
    humantime_serde::re::humantime::parse_duration(text).map_err(|e| format!("{e}; for example 90s, 15m, 2h"))
}

impl FilterArgs {
    /// The bounds on the time of death.
    fn died(&self) -> (Option<Timestamp>, Option<Timestamp>) {
        let now = Clock::system().now();
        (self.newer_than.map(|age| now - age), self.older_than.map(|age| now - age))
    }
}

#[derive(Debug, Args)]
pub struct Change {
    /// These ids.
    ids: Vec<String>,
    #[command(flatten)]
    filter: FilterArgs,
    /// All that are open.
    #[arg(long)]
    all: bool,
    /// Also what failed too often already.
    #[arg(long)]
    force: bool,
    /// Only say which it would be.
    #[arg(long)]
    dry_run: bool,
}

/// The services, each with its client.
pub type Services = [(&'static str, Client); 3];

pub async fn run(command: Command, services: &Services, format: Format) -> Result<(), BoxError> {
    match command {
        Command::List { filter, status, limit } => {
            let limit = limit.to_string();
            let (from, before) = filter.died();
            let (from, before) = (from.map(|t| t.to_string()), before.map(|t| t.to_string()));
            let query = [
                ("dead_from", from.as_deref()),
                ("dead_before", before.as_deref()),
                ("status", Some(status.as_str())),
                ("limit", Some(limit.as_str())),
                ("consumer", filter.consumer.as_deref()),
                ("event", filter.event.as_deref()),
                ("reason", filter.reason.as_deref()),
            ];
            let mut letters = Vec::new();
            for (_, client) in services {
                let page: Value = client.query("/admin/dead-letters", &query).await?;
                letters.extend(page["dead_letters"].as_array().cloned().unwrap_or_default());
            }
            print_list(&letters, format)
        }
        Command::Show { id } => {
            for (_, client) in services {
                match client.get::<Value>(&format!("/admin/dead-letters/{id}")).await {
                    Ok(letter) => {
                        println!("{}", serde_json::to_string_pretty(&letter)?);
                        return Ok(());
                    }
                    Err(ClientError::Refused { status: 404, .. }) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            Err(format!("no service has a dead letter {id}").into())
        }
        Command::Redrive(change) => apply(&change, "redrive", services, format).await,
        Command::Discard(change) => apply(&change, "discard", services, format).await,
    }
}

async fn apply(change: &Change, action: &str, services: &Services, format: Format) -> Result<(), BoxError> {
    let reason = match &change.filter.reason {
        Some(word) => Some(serde_json::from_value(json!(word)).map_err(|e| format!("--reason {word}: {e}"))?),
        None => None,
    };
    let (dead_from, dead_before) = change.filter.died();
    let filter = Filter {
        dead_from,
        dead_before,
        ids: (!change.ids.is_empty()).then(|| change.ids.clone()),
        consumer: change.filter.consumer.clone(),
        event: change.filter.event.clone(),
        reason,
    };
    let body = json!({"filter": filter, "all": change.all, "force": change.force, "dry_run": change.dry_run});
    let mut total = 0;
    for (service, client) in services {
        let done: Value = client.post(&format!("/admin/dead-letters/{action}"), &body).await?;
        let ids = done["ids"].as_array().cloned().unwrap_or_default();
        total += ids.len();
        for id in &ids {
            match format {
                Format::Json => println!(
                    "{}",
                    json!({"service": service, "id": id, "action": action, "dry_run": change.dry_run})
                ),
                Format::Table => println!(
                    "{service}  {}  {action}{}",
                    text(id),
                    if change.dry_run { " (dry run)" } else { "" }
                ),
            }
        }
    }
    if total == 0 {
        return Err("no open dead letter matches".into());
    }
    Ok(())
}

fn print_list(letters: &[Value], format: Format) -> Result<(), BoxError> {
    if format == Format::Json {
        println!("{}", serde_json::to_string_pretty(letters)?);
        return Ok(());
    }
    let columns = ["id", "consumer", "event", "reason", "attempts", "redrives", "dead_at", "error"];
    let mut table = Table::new();
    table.set_header(columns);
    for letter in letters {
        table.add_row(columns.map(|c| text(&letter[c])));
    }
    println!("{table}\n{} dead letter(s)", letters.len());
    Ok(())
}
