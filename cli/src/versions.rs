//! `consign schema usage|retire|restore`: who reads which version of an event and when last, and the end of one that nobody reads.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use comfy_table::Table;
use consign::Timestamp;
use consign::broker::overlap;
use consign::handler::BoxError;
use consign::versions::{PublishedEvent, Usage};
use contracts::Contract;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::client::{Client, ClientError};
use crate::output::Format;

/// `v1`, or `1`.
#[derive(Clone, Copy, Debug)]
pub struct Version(u32);

impl FromStr for Version {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let number = s.strip_prefix('v').unwrap_or(s).parse();
        number.map(Self).map_err(|_| format!("{s:?} is no version; they look like v1"))
    }
}

/// One consumer of one version of an event.
#[derive(Debug, Serialize)]
struct Line {
    event: String,
    version: u32,
    /// `published`, `published for …`, `retired`, `not published`.
    state: String,
    consumer: Option<String>,
    /// The version that its handler takes.
    handled_as: Option<String>,
    /// Whether the broker gives it to the consumer.
    given: bool,
    /// Events that took effect as this version, or none if the consumer does not say.
    handled: Option<u64>,
    /// When the last took effect; of a consumer that does not say, when it was last given any event.
    last: Option<Timestamp>,
    replicas: Option<u64>,
}

/// Shows who reads what.
pub async fn usage(services: &[Client], only: Option<&str>, format: Format) -> Result<(), BoxError> {
    let lines = lines(&ask(services).await?, only);
    if let (Some(event), true) = (only, lines.is_empty()) {
        let known: BTreeSet<&str> = contracts::all().iter().map(|c| c.event).collect();
        return Err(format!(
            "there is no event {event:?}; there is: {}",
            known.into_iter().collect::<Vec<_>>().join(", ")
        )
        .into());
    }
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(&lines)?);
        return Ok(());
    }
    let mut table = Table::new();
    table.set_header([
        "event",
        "state",
        "consumer",
        "handled as",
        "given",
        "took effect",
        "last",
        "replicas",
    ]);
    let mut before = String::new();
    for l in &lines {
        let name = format!("{}.v{}", l.event, l.version);
        let (event, state) =
            if name == before { (String::new(), String::new()) } else { (name.clone(), l.state.clone()) };
        before = name;
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        table.add_row([
            event,
            state,
            or_dash(l.consumer.clone()),
            or_dash(l.handled_as.clone()),
            if l.given { "yes" } else { "no" }.to_owned(),
            or_dash(l.handled.map(|n| n.to_string())),
            or_dash(l.last.map(|at| at.to_string())),
            or_dash(l.replicas.map(|n| n.to_string())),
        ]);
    }
    outln!("{table}");
    Ok(())
}

async fn ask(services: &[Client]) -> Result<Vec<Usage>, BoxError> {
    let mut all = Vec::with_capacity(services.len());
    for client in services {
        all.push(client.get("/admin/versions").await?);
    }
    Ok(all)
}

fn lines(usages: &[Usage], only: Option<&str>) -> Vec<Line> {
    let mut lines = Vec::new();
    for contract in contracts::all().iter().filter(|c| only.is_none_or(|event| event == c.event)) {
        let name = contract.name();
        let subjects = format!("{name}.>");
        // Lanes are durables of their own.
        let mut given: BTreeMap<&str, Option<Timestamp>> = BTreeMap::new();
        for c in usages.iter().flat_map(|u| &u.consumers).filter(|c| c.stream == contract.stream) {
            if c.filters.is_empty() || c.filters.iter().any(|f| overlap(f, &subjects)) {
                let name = c.durable.strip_suffix("-express").unwrap_or(&c.durable);
                let last = given.entry(name).or_default();
                *last = (*last).max(c.last_delivered_at);
            }
        }
        let published = usages.iter().flat_map(|u| &u.published).find(|p| p.event == contract.event);
        let line = |consumer: Option<String>| Line {
            event: contract.event.to_owned(),
            version: contract.version,
            state: state(contract, published),
            given: consumer.as_deref().is_some_and(|c| given.contains_key(c)),
            consumer,
            handled_as: None,
            handled: None,
            last: None,
            replicas: None,
        };
        let before = lines.len();
        let ours = usages.iter().flat_map(|u| &u.consumed).filter(|c| c.event == name);
        for c in ours.clone() {
            lines.push(Line {
                handled_as: Some(c.handled_as.clone()),
                handled: Some(c.handled),
                last: c.last_handled_at,
                replicas: Some(c.replicas),
                ..line(Some(c.consumer.clone()))
            });
        }
        for (consumer, last) in &given {
            if ours.clone().all(|c| c.consumer != *consumer) {
                lines.push(Line { last: *last, ..line(Some((*consumer).to_owned())) });
            }
        }
        if lines.len() == before {
            lines.push(line(None));
        }
    }
    lines
}

fn state(contract: &Contract, published: Option<&PublishedEvent>) -> String {
    let Some(p) = published else { return "published".to_owned() };
    let version = contract.version;
    match p.needed_by.get(&version) {
        Some(by) => format!("published for {}", by.iter().cloned().collect::<Vec<_>>().join(", ")),
        None if p.published.contains(&version) => "published".to_owned(),
        None if p.retired.contains(&version) => "retired".to_owned(),
        None => "not published".to_owned(),
    }
}

#[derive(Deserialize)]
struct PublishedNow {
    published: Vec<u32>,
}

/// Retires a version with its owner, or restores it. `false` if that was refused.
pub async fn change(
    services: &[Client],
    event: &str,
    Version(version): Version,
    what: &str,
    format: Format,
) -> Result<bool, BoxError> {
    let mut events = Vec::new();
    for client in services {
        let usage: Usage = client.get("/admin/versions").await?;
        if !usage.published.iter().any(|p| p.event == event) {
            events.extend(usage.published.into_iter().map(|p| p.event));
            continue;
        }
        let body = json!({"event": event, "version": version});
        let now: PublishedNow = match client.post(&format!("/admin/versions/{what}"), &body).await {
            Ok(now) => now,
            Err(ClientError::Refused { status: 404 | 409, text }) => {
                eprintln!("consign: {text}");
                return Ok(false);
            }
            Err(e) => return Err(e.into()),
        };
        match format {
            Format::Json => outln!("{}", json!({"event": event, "published": now.published})),
            Format::Table => outln!("{event} is published as {}", list(&now.published)),
        }
        return Ok(true);
    }
    let known = events.join(", ");
    Err(format!("{event:?} is not published in several versions; there is: {known}").into())
}

fn list(versions: &[u32]) -> String {
    versions.iter().map(|v| format!("v{v}")).collect::<Vec<_>>().join(" and ")
}
