//! `consign breaker`: circuit breakers, of each replica by itself.

use clap::Subcommand;
use comfy_table::Table;
use consign::breaker::Status;
use consign::handler::BoxError;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::client::Client;
use crate::output::Format;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show all of them.
    Status,
    /// Make no calls until it is closed again.
    Open {
        /// Its name, as `status` shows it.
        name: String,
    },
    /// Make calls again; it opens by itself if they fail.
    Close {
        /// Its name, as `status` shows it.
        name: String,
    },
}

#[derive(Deserialize)]
struct Breakers {
    breakers: Vec<Status>,
}

#[derive(Serialize)]
struct Shown {
    replica: String,
    #[serde(flatten)]
    status: Status,
}

/// `replicas` are those of all services; breakers are opened and closed in each replica that has one of that name.
pub async fn run(command: Command, replicas: &[Client], format: Format) -> Result<(), BoxError> {
    let mut shown = Vec::new();
    for client in replicas {
        let found: Breakers = client.get("/admin/breakers").await?;
        for status in found.breakers {
            let status = match &command {
                Command::Status => status,
                Command::Open { name } | Command::Close { name } if *name != status.name => continue,
                Command::Open { name } => set(client, name, "open").await?,
                Command::Close { name } => set(client, name, "closed").await?,
            };
            shown.push(Shown { replica: client.base().to_owned(), status });
        }
    }
    if let (Command::Open { name } | Command::Close { name }, true) = (&command, shown.is_empty()) {
        return Err(
            format!("there is no circuit breaker {name:?}; `consign breaker status` lists them").into()
        );
    }
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(&shown)?);
        return Ok(());
    }
    let mut table = Table::new();
    table.set_header([
        "breaker",
        "replica",
        "state",
        "probes in",
        "failed",
        "slow",
        "of the last",
        "opened",
        "rejected",
    ]);
    for Shown { replica, status: s } in &shown {
        let state = if s.held_open { "open, by hand".to_owned() } else { s.state.as_str().replace('_', "-") };
        table.add_row([
            s.name.clone(),
            replica.clone(),
            state,
            s.probes_in_seconds.map_or_else(String::new, |t| format!("{t:.1} s")),
            s.failed.to_string(),
            s.slow.to_string(),
            s.calls.to_string(),
            s.opened.to_string(),
            s.rejected.to_string(),
        ]);
    }
    outln!("{table}");
    Ok(())
}

async fn set(client: &Client, name: &str, state: &str) -> Result<Status, BoxError> {
    Ok(client.post(&format!("/admin/breakers/{name}"), &json!({"state": state})).await?)
}
