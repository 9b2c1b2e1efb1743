//! What the services and the library reach on NATS JetStream (one node, file storage) and PostgreSQL (`fsync` and `synchronous_commit` on),
//! each beside the floor of what it stands on, measured in the same run. Machines are noisy; ratios are not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a benchmark that cannot be run has nothing to say but why"
)]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures"
)]

mod backlog;
mod breaker;
mod cpu;
mod floor;
mod library;
mod outage;
mod saga;
mod schema;
mod statements;

use comfy_table::Table;
use consign::testing::servers::{NATS, NatsServer, PostgresServer};

/// One line of the result.
pub struct Figure {
    pub what: &'static str,
    pub reached: f64,
    pub unit: &'static str,
    /// What it is compared with, and how much that reaches.
    pub floor: Option<(&'static str, f64)>,
    /// At least this share of the floor; or without one, at most this.
    pub goal: f64,
}

impl Figure {
    fn row(&self) -> [String; 6] {
        let number = |n: f64| if n >= 100.0 { format!("{n:.0}") } else { format!("{n:.2}") };
        let (floor, reached, goal, met) = match self.floor {
            Some((floor, n)) => {
                let ratio = self.reached / n;
                (
                    format!("{} {floor}", number(n)),
                    format!("{ratio:.2}"),
                    format!("≥ {}", self.goal),
                    ratio >= self.goal,
                )
            }
            None => (
                String::new(),
                String::new(),
                format!("≤ {} {}", self.goal, self.unit),
                self.reached <= self.goal,
            ),
        };
        let met = if met { "yes" } else { "no" };
        [
            self.what.into(),
            format!("{} {}", number(self.reached), self.unit),
            floor,
            reached,
            goal,
            met.into(),
        ]
    }
}

#[tokio::main]
async fn main() {
    let only = std::env::args().nth(1);
    let wanted = |name: &str| only.as_deref().is_none_or(|o| o == name);
    let mut figures = Vec::new();
    if wanted("library") {
        let (nats, postgres) = servers();
        figures.extend(library::run(&nats, &postgres).await);
    }
    // Ten million rows take minutes and gigabytes, so they are asked for by name.
    if only.as_deref() == Some("backlog") {
        let (nats, postgres) = servers();
        figures.extend(backlog::run(&nats, &postgres).await);
    }
    if wanted("saga") {
        let (nats, postgres) = servers();
        figures.extend(saga::run(&nats, &postgres).await);
    }
    if wanted("breaker") {
        figures.extend(breaker::run().await);
    }
    if wanted("schema") {
        figures.extend(schema::run());
    }
    if wanted("outage") {
        let (nats, postgres) = servers();
        figures.extend(outage::run(&nats, &postgres).await);
    }
    let mut table = Table::new();
    table.set_header(["figure", "reached", "floor", "ratio", "goal", "met"]);
    for figure in &figures {
        table.add_row(figure.row());
    }
    println!("{table}");
}

fn servers() -> (NatsServer, PostgresServer) {
    tokio::task::block_in_place(|| {
        (NatsServer::start(NATS), PostgresServer::start_with(statements::SETTINGS))
    })
}

/// The value below which this share of the sorted values lies.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}
