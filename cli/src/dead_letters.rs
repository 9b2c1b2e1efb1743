//! `consign dead-letters`: list, show, redrive, discard, over the services' admin endpoints.

use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::Table;
use consign::dead_letter::Filter;
use consign::handler::BoxError;
use consign::{Clock, Timestamp};
use serde_json::{Value, json};

use crate::client::{Client, ClientError};
use crate::output::{Format, bar, text};

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
    Redrive {
        #[command(flatten)]
        change: Change,
        /// No more than so many a second, of each service.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
        rate: u32,
    },
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
                        outln!("{}", serde_json::to_string_pretty(&letter)?);
                        return Ok(());
                    }
                    Err(ClientError::Refused { status: 404, .. }) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            Err(format!("no service has a dead letter {id}").into())
        }
        Command::Redrive { change, rate } => apply(&change, "redrive", Some(rate), services, format).await,
        Command::Discard(change) => apply(&change, "discard", None, services, format).await,
    }
}

/// Finds what is meant, and does it: in steps of a tenth of a second, if there is a rate.
async fn apply(
    change: &Change,
    action: &str,
    rate: Option<u32>,
    services: &Services,
    format: Format,
) -> Result<(), BoxError> {
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
    let path = format!("/admin/dead-letters/{action}");
    let mut total = 0;
    for (service, client) in services {
        let body = |filter: &Filter, all: bool, dry_run: bool| json!({"filter": filter, "all": all, "force": change.force, "dry_run": dry_run});
        let found = ids(&client.post(&path, &body(&filter, change.all, true)).await?);
        total += found.len();
        if change.dry_run {
            print_changed(service, &found, action, true, format);
            continue;
        }
        let (step, pause) = steps(rate, found.len());
        let bar = bar(found.len() as u64, format!("{action} in {service}"));
        for (n, some) in found.chunks(step).enumerate() {
            if n > 0 {
                tokio::time::sleep(pause).await;
            }
            let those = Filter { ids: Some(some.to_vec()), ..Filter::default() };
            // Somebody else may have been faster with some of them.
            let done = ids(&client.post(&path, &body(&those, false, false)).await?);
            bar.suspend(|| print_changed(service, &done, action, false, format));
            bar.inc(some.len() as u64);
        }
        bar.finish_and_clear();
    }
    if total == 0 {
        return Err("no open dead letter matches".into());
    }
    Ok(())
}

/// Those that an answer names.
fn ids(answer: &Value) -> Vec<String> {
    answer["ids"].as_array().into_iter().flatten().filter_map(|id| id.as_str().map(str::to_owned)).collect()
}

/// How many at a time, and how long between.
fn steps(rate: Option<u32>, all: usize) -> (usize, Duration) {
    /// What one request may name.
    const MOST: usize = 1000;
    match rate {
        None => (all.clamp(1, MOST), Duration::ZERO),
        Some(rate) if rate < 10 => (1, Duration::from_secs(1) / rate),
        Some(rate) => ((rate as usize / 10).min(MOST), Duration::from_millis(100)),
    }
}

fn print_changed(service: &str, ids: &[String], action: &str, dry_run: bool, format: Format) {
    for id in ids {
        match format {
            Format::Json => {
                outln!("{}", json!({"service": service, "id": id, "action": action, "dry_run": dry_run}));
            }
            Format::Table => {
                outln!("{service}  {id}  {action}{}", if dry_run { " (dry run)" } else { "" });
            }
        }
    }
}

fn print_list(letters: &[Value], format: Format) -> Result<(), BoxError> {
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(letters)?);
        return Ok(());
    }
    let columns = ["id", "consumer", "event", "reason", "attempts", "redrives", "dead_at", "error"];
    let mut table = Table::new();
    table.set_header(columns);
    for letter in letters {
        table.add_row(columns.map(|c| text(&letter[c])));
    }
    outln!("{table}\n{} dead letter(s)", letters.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_keep_the_rate() {
        for rate in [1, 3, 9, 10, 55, 100, 5000, 1_000_000] {
            let (step, pause) = steps(Some(rate), 100_000);
            let each = pause / u32::try_from(step).unwrap();
            assert!(each >= Duration::from_secs(1) / (rate + 1), "{rate}: {step} each {pause:?}");
            assert!((1..=1000).contains(&step));
        }
        assert_eq!(steps(None, 5), (5, Duration::ZERO));
    }
}
