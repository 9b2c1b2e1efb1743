//! The `consign` command: every service in one process, and the operators' tools.
#![warn(clippy::print_stdout, reason = "it panics when the reader has gone; use `outln!`")]

#[macro_use]
mod output;

mod asyncapi;
mod breaker;
mod client;
pub mod config;
mod dead_letters;
mod load;
mod orders;
mod payments;
mod reconcile;
mod schema;
mod snapshot;
mod streams;
pub mod up;
mod verify;
mod versions;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use consign::handler::BoxError;

use client::Client;
use config::{Config, Endpoints};
use output::Format;

/// An order system of event-driven services, each event taking effect exactly once.
///
/// Exit codes: 0 done; 1 the answer is no (not clean, not accepted, not found); 2 it could not be tried (usage, configuration).
#[derive(Debug, Parser)]
#[command(name = "consign", version)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Args)]
struct Global {
    /// Configuration in TOML; ./consign.toml if it is there.
    #[arg(long, global = true, env = "CONSIGN_CONFIG")]
    config: Option<PathBuf>,
    /// Where databases, the broker's file and the admin token lie.
    #[arg(long, global = true)]
    data_dir: Option<PathBuf>,
    /// One setting, for example order.deadline=5m; may be repeated.
    #[arg(long = "set", global = true, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// How results are printed.
    #[arg(long, global = true, default_value = "table")]
    format: Format,
    /// Base URL of the order service. Of each service, replicas may be named with commas between.
    #[arg(long, global = true, env = "CONSIGN_ORDER_URL")]
    order_url: Option<String>,
    /// Base URL of the inventory service.
    #[arg(long, global = true, env = "CONSIGN_INVENTORY_URL")]
    inventory_url: Option<String>,
    /// Base URL of the payment service.
    #[arg(long, global = true, env = "CONSIGN_PAYMENT_URL")]
    payment_url: Option<String>,
    /// The admin token; by default the one in the data directory.
    #[arg(long, global = true, env = "CONSIGN_ADMIN_TOKEN", hide_env_values = true)]
    admin_token: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run all services in this process (the default).
    Up,
    /// Place orders and measure.
    Load(load::Options),
    /// Place, show, list and watch orders.
    #[command(subcommand)]
    Orders(orders::Command),
    /// List, show, redrive and discard dead letters.
    #[command(subcommand)]
    DeadLetters(dead_letters::Command),
    /// Show payments, and what does not come to an end.
    #[command(subcommand)]
    Payments(payments::Command),
    /// Show circuit breakers, hold them open, close them.
    #[command(subcommand)]
    Breaker(breaker::Command),
    /// Show or change how the simulated payment gateway behaves.
    #[command(subcommand)]
    Gateway(payments::GatewayCommand),
    /// Compare each service's outbox with the streams, and publish what they lack.
    Reconcile,
    /// Make streams and consumers on a NATS cluster as the services declare them, or say what differs.
    #[command(subcommand)]
    Streams(streams::Command),
    /// The events' schemas, and what a change of one means.
    #[command(subcommand)]
    Schema(schema::Command),
    /// Check that every order, cent and piece is accounted for.
    Verify(verify::Options),
    /// Check or show the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: Shell,
    },
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum ConfigCommand {
    /// Say whether it is valid, or name every fault.
    Check,
    /// Print it as it is in force, secrets left out.
    Show,
}

/// Runs the command of this process's arguments.
pub async fn main() -> ExitCode {
    // Prints help, or what is wrong with the arguments, and exits with 0 or 2.
    let cli = Cli::parse();
    match Box::pin(dispatch(cli)).await {
        Ok(code) => code,
        Err(e) => {
            eprintln!("consign: {}", consign::telemetry::chain(e.error.as_ref()));
            ExitCode::from(e.code)
        }
    }
}

/// An error with the exit code it ends in.
struct Exit {
    code: u8,
    error: BoxError,
}

fn no(error: BoxError) -> Exit {
    Exit { code: 1, error }
}

fn cannot(error: impl Into<BoxError>) -> Exit {
    Exit { code: 2, error: error.into() }
}

async fn dispatch(cli: Cli) -> Result<ExitCode, Exit> {
    let global = cli.global;
    let command = cli.command.unwrap_or(Command::Up);
    if let Command::Completions { shell } = command {
        clap_complete::generate(shell, &mut Cli::command(), "consign", &mut std::io::stdout());
        return Ok(ExitCode::SUCCESS);
    }
    if let Command::Schema(command) = &command
        && !command.asks_services()
    {
        // Needs no system and no configuration: it runs in any team's CI.
        let command = command.clone();
        let fine = schema::run(command, &[], &Config::default(), global.format).await.map_err(cannot)?;
        return Ok(if fine { ExitCode::SUCCESS } else { ExitCode::from(1) });
    }
    let config =
        Config::load(global.config.as_deref(), global.data_dir.as_deref(), &global.set).map_err(cannot)?;
    let endpoints = Endpoints::find(&config);
    let token = global.admin_token.or_else(|| {
        let kept = std::fs::read_to_string(config.data_dir.join("admin-token"));
        kept.ok().map(|t| t.trim().to_owned())
    });
    let replicas = |given: &Option<String>, found: &str| {
        Client::replicas(given.as_deref().unwrap_or(found), token.as_deref())
    };
    let orders = replicas(&global.order_url, &endpoints.order);
    let inventories = replicas(&global.inventory_url, &endpoints.inventory);
    let payments = replicas(&global.payment_url, &endpoints.payment);
    // Splitting gives one at least.
    let (order, inventory, payment) = (orders[0].clone(), inventories[0].clone(), payments[0].clone());
    match command {
        Command::Up => up::run(config).await.map_err(cannot)?,
        Command::Load(options) => load::run(options, &order, &inventory, global.format).await.map_err(no)?,
        Command::Orders(command) => orders::run(command, &order, global.format).await.map_err(no)?,
        Command::DeadLetters(command) => {
            let services = [("order", order), ("inventory", inventory), ("payment", payment)];
            dead_letters::run(command, &services, global.format).await.map_err(no)?;
        }
        Command::Payments(command) => {
            if !payments::run(command, &payment, global.format).await.map_err(no)? {
                return Ok(ExitCode::from(1));
            }
        }
        Command::Breaker(command) => {
            let all = [orders, inventories, payments].concat();
            breaker::run(command, &all, global.format).await.map_err(no)?;
        }
        Command::Gateway(command) => {
            payments::gateway(command, &payments, global.format).await.map_err(no)?;
        }
        Command::Reconcile => {
            let services = [("order", order), ("inventory", inventory), ("payment", payment)];
            reconcile::run(&services, global.format).await.map_err(no)?;
        }
        Command::Streams(command) => {
            let settled = streams::run(command, &config, global.format).await.map_err(cannot)?;
            if !settled {
                return Ok(ExitCode::from(1));
            }
        }
        Command::Verify(options) => {
            let clean = verify::run(options, &config.data_dir, global.format).await.map_err(cannot)?;
            if !clean {
                return Ok(ExitCode::from(1));
            }
        }
        Command::Config(ConfigCommand::Check) => outln!("the configuration is valid"),
        Command::Config(ConfigCommand::Show) => {
            out!("{}", toml::to_string_pretty(&config).map_err(cannot)?);
        }
        Command::Schema(command) => {
            let services = [order, inventory, payment];
            if !schema::run(command, &services, &config, global.format).await.map_err(no)? {
                return Ok(ExitCode::from(1));
            }
        }
        Command::Completions { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}
