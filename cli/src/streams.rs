//! `consign streams`: what the services declare, compared with what a NATS cluster has, and made so.

use std::collections::BTreeMap;

use clap::Subcommand;
use comfy_table::Table;
use consign::broker::nats::{Difference, Drift, NatsBroker, NatsConfig, Provision, rights};
use consign::broker::{BrokerError, StreamConfig};
use consign::handler::BoxError;
use consign::reconcile::{Scope, rewind_if_ahead};
use serde::Serialize;

use crate::config::Config;
use crate::output::Format;

#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Command {
    /// Make every stream and consumer as declared; what is as declared stays untouched.
    Apply,
    /// Say what `apply` would change; exit code 1 if anything.
    Diff,
    /// Print what each service must be allowed to do, as the users of a NATS server's configuration.
    Rights,
}

#[derive(Debug, Serialize)]
struct Line {
    kind: &'static str,
    name: String,
    state: &'static str,
    detail: String,
}

/// Whether all is as declared, afterwards.
pub async fn run(command: Command, config: &Config, format: Format) -> Result<bool, BoxError> {
    let scopes = [
        (order::NAME, order::topology(&config.order).scope()),
        (inventory::NAME, inventory::topology(&config.inventory).scope()),
        (payment::NAME, payment::topology(&config.payment).scope()),
    ];
    if matches!(command, Command::Rights) {
        out!("{}", users(&scopes));
        return Ok(true);
    }
    let scopes = scopes.map(|(_, scope)| scope);
    let faults = config.nats.check();
    if !faults.is_empty() {
        return Err(faults.join("; ").into());
    }
    let nats = NatsConfig { provision: Provision::Create, ..config.nats.clone() };
    let broker = NatsBroker::connect(&nats, "consign-streams").await?;
    let apply = matches!(command, Command::Apply);
    // All services share the stream of advisories, and consumers may be of another service's stream: streams first, each once.
    let mut streams: BTreeMap<&str, &StreamConfig> = BTreeMap::new();
    for stream in scopes.iter().flat_map(|s| &s.streams) {
        streams.insert(&stream.name, stream);
    }
    let mut lines = Vec::new();
    for (name, stream) in streams {
        let drift = broker.stream_drift(stream).await?;
        let applied = if apply { broker.apply_stream(stream).await.map(drop) } else { Ok(()) };
        lines.push(line("stream", name.to_owned(), drift, apply, applied)?);
    }
    for (stream, consumer) in scopes.iter().flat_map(|s| &s.consumers) {
        let drift = match broker.consumer_drift(stream, consumer).await {
            Err(BrokerError::NoStream(_)) => Drift::Missing,
            drift => drift?,
        };
        let applied = if apply { broker.apply_consumer(stream, consumer).await.map(drop) } else { Ok(()) };
        let mut line = line("consumer", format!("{stream} {}", consumer.durable), drift, apply, applied)?;
        if apply && line.state != "refused" && rewind_if_ahead(&broker, stream, consumer).await? {
            line.state = "rewound";
            "it stood ahead of its stream, which has lost messages".clone_into(&mut line.detail);
        }
        lines.push(line);
    }
    broker.close(std::time::Duration::from_secs(2)).await;
    let settled = |l: &Line| l.state == "as declared" || apply && l.state != "refused";
    let all = lines.iter().all(settled);
    print(&lines, format)?;
    Ok(all)
}

/// Users of a NATS server: an administrator for `consign streams apply`, and each service with the least it needs. Passwords come from the
/// server's environment.
fn users(services: &[(&str, Scope)]) -> String {
    let mut text = String::from(
        "# Written by `consign streams rights`: services that bind to what is there (nats.provision = \"bind\") need no more than this.\n\
         users: [\n  { user: admin, password: $NATS_ADMIN_PASSWORD }\n",
    );
    for (name, scope) in services {
        let rights = rights(scope, &format!("_INBOX_{name}"));
        let list = |subjects: &[String]| {
            let quoted: Vec<String> = subjects.iter().map(|s| format!("      {s:?}\n")).collect();
            quoted.concat()
        };
        text.push_str(&format!(
            "  {{ user: {name}, password: $NATS_{}_PASSWORD, permissions: {{\n    publish: [\n{}    ]\n    subscribe: [\n{}    ]\n  }} }}\n",
            name.to_uppercase(),
            list(&rights.publish),
            list(&rights.subscribe),
        ));
    }
    text + "]\n"
}

fn line(
    kind: &'static str,
    name: String,
    drift: Drift,
    apply: bool,
    applied: Result<(), BrokerError>,
) -> Result<Line, BoxError> {
    if let Err(e @ (BrokerError::Config(_) | BrokerError::PassesOver { .. })) = &applied {
        return Ok(Line { kind, name, state: "refused", detail: e.to_string() });
    }
    applied?;
    let list = |differences: &[Difference]| {
        let all = differences.iter().map(|d| format!("{}: {} -> {}", d.setting, d.is, d.should));
        all.collect::<Vec<_>>().join("\n")
    };
    let (state, detail) = match drift {
        Drift::None => ("as declared", String::new()),
        Drift::Missing => (if apply { "made" } else { "missing" }, String::new()),
        Drift::Changed(d) => (if apply { "changed" } else { "differs" }, list(&d)),
        Drift::Refused { differences, way_out } => ("refused", format!("{}\n{way_out}", list(&differences))),
    };
    Ok(Line { kind, name, state, detail })
}

fn print(lines: &[Line], format: Format) -> Result<(), BoxError> {
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(lines)?);
        return Ok(());
    }
    let mut table = Table::new();
    table.set_header(["kind", "name", "state", "detail"]);
    for l in lines {
        table.add_row([l.kind, &l.name, l.state, &l.detail]);
    }
    outln!("{table}");
    Ok(())
}
