//! `consign schema`: the events' schemas, and what a change of one means for those who read and write it. For a team's CI too: exit code 1
//! says no.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};
use comfy_table::Table;
use consign::handler::BoxError;
use consign::schema::compat::{self, Break, Compatibility};
use consign::schema::{CompiledSchema, Fault};
use serde::Serialize;
use serde_json::{Value, json};

use crate::asyncapi;
use crate::client::Client;
use crate::config::Config;
use crate::output::{Format, text};
use crate::versions::{self, Version};

#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// List all events with their versions.
    List,
    /// Print a schema.
    Show {
        /// An event such as orders.created.v1, or a file.
        schema: String,
    },
    /// Check events against a schema: JSON, one after the other (exit code 1 if one breaks it).
    Check {
        /// An event such as orders.created.v1, or a file.
        schema: String,
        /// The events; standard input if none is named, or as `-`.
        files: Vec<PathBuf>,
    },
    /// Name the differences between two schemas.
    Diff {
        /// The old one: an event such as orders.created.v1, or a file.
        old: String,
        /// The new one.
        new: String,
    },
    /// Say whether readers and writers of two versions understand each other (exit code 1 if not as needed).
    Compat {
        /// The old one: an event such as orders.created.v1, or a file.
        old: String,
        /// The new one.
        new: String,
        /// What is needed.
        #[arg(long, default_value = "full")]
        need: Need,
    },
    /// Describe all services, channels, messages and schemas, as AsyncAPI 3.0 or as a page to read.
    Export {
        /// As what.
        #[arg(long = "as", default_value = "asyncapi")]
        document: Document,
        /// Where to; standard output if left out.
        #[arg(long, short)]
        output: Option<PathBuf>,
    },
    /// Say of each version who still reads it, and when it last took effect (asks the running services).
    Usage {
        /// Only of this event, for example orders.created.
        event: Option<String>,
    },
    /// Publish a version no more; refused while somebody asks for it (exit code 1).
    Retire {
        /// The event, for example orders.created.
        event: String,
        /// The version, for example v1.
        version: Version,
    },
    /// Publish a version that was retired again, if it is configured.
    Restore {
        /// The event, for example orders.created.
        event: String,
        /// The version, for example v1.
        version: Version,
    },
}

/// What is written by `export`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Document {
    /// [AsyncAPI 3.0](https://www.asyncapi.com/docs/reference/specification/v3.0.0), in JSON.
    Asyncapi,
    /// One page of HTML, which needs nothing else.
    Html,
}

/// Standard input among files.
const STDIN: &str = "-";

/// In which directions two versions have to understand each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Need {
    /// Consumers of the new one read old events.
    Backward,
    /// Consumers of the old one read new events.
    Forward,
    /// Both: what a version that is released may change to.
    Full,
}

impl Command {
    /// Whether it has to ask the running services. The others run in any team's CI.
    pub fn asks_services(&self) -> bool {
        matches!(self, Self::Usage { .. } | Self::Retire { .. } | Self::Restore { .. })
    }
}

/// `false` if the answer is no. `services` are asked by the commands that have to.
pub async fn run(
    command: Command,
    services: &[Client],
    config: &Config,
    format: Format,
) -> Result<bool, BoxError> {
    match command {
        Command::Export { document, output } => {
            let text = match document {
                Document::Asyncapi => format!("{:#}\n", asyncapi::document(config)),
                Document::Html => asyncapi::page(config),
            };
            match output {
                Some(path) => std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?,
                None => out!("{text}"),
            }
            Ok(true)
        }
        Command::Usage { event } => versions::usage(services, event.as_deref(), format).await.map(|()| true),
        Command::Retire { event, version } => {
            versions::change(services, &event, version, "retire", format).await
        }
        Command::Restore { event, version } => {
            versions::change(services, &event, version, "restore", format).await
        }
        Command::List => list(format).map(|()| true),
        Command::Show { schema } => {
            outln!("{}", serde_json::to_string_pretty(&find(&schema)?)?);
            Ok(true)
        }
        Command::Check { schema, files } => check(&schema, &files, format),
        Command::Diff { old, new } => diff(&old, &new, format).map(|()| true),
        Command::Compat { old, new, need } => compat(&old, &new, need, format),
    }
}

/// A schema by its event's name, or from a file.
fn find(named: &str) -> Result<Value, BoxError> {
    let known = contracts::schemas();
    if let Some((_, document)) = known.iter().find(|(name, _)| name == named) {
        return Ok(document.clone());
    }
    let path = Path::new(named);
    if !path.exists() {
        let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
        return Err(format!("{named:?} is neither a file nor one of {}", names.join(", ")).into());
    }
    let bytes = std::fs::read(path).map_err(|e| format!("{named}: {e}"))?;
    Ok(serde_json::from_slice(&bytes).map_err(|e| format!("{named} is not JSON: {e}"))?)
}

fn list(format: Format) -> Result<(), BoxError> {
    let schemas = contracts::schemas();
    if format == Format::Json {
        let listed = schemas
            .iter()
            .map(|(name, s)| json!({"name": name, "id": s["$id"], "description": s["description"]}));
        outln!("{}", serde_json::to_string_pretty(&listed.collect::<Vec<_>>())?);
        return Ok(());
    }
    let mut table = Table::new();
    table.set_header(["event", "what it says"]);
    for (name, schema) in &schemas {
        table.add_row([name.clone(), text(&schema["description"])]);
    }
    outln!("{table}");
    Ok(())
}

#[derive(Serialize)]
struct Checked {
    source: String,
    /// Counts from 1.
    event: usize,
    faults: Vec<Fault>,
}

fn check(named: &str, files: &[PathBuf], format: Format) -> Result<bool, BoxError> {
    let schema = CompiledSchema::parse(named, find(named)?)?;
    let mut sources = Vec::new();
    let stdin = [PathBuf::from(STDIN)];
    for file in if files.is_empty() { &stdin } else { files } {
        if file.as_os_str() == STDIN {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes)?;
            sources.push(("standard input".to_owned(), bytes));
        } else {
            let bytes = std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
            sources.push((file.display().to_string(), bytes));
        }
    }
    let (mut looked_at, mut broken) = (0, Vec::new());
    for (source, bytes) in sources {
        for (n, event) in serde_json::Deserializer::from_slice(&bytes).into_iter::<Value>().enumerate() {
            looked_at += 1;
            let faults = match event {
                Ok(event) => schema.validate(&event).err().map(|e| e.faults),
                Err(e) => Some(vec![Fault { pointer: String::new(), detail: format!("not JSON: {e}") }]),
            };
            broken.extend(faults.map(|faults| Checked { source: source.clone(), event: n + 1, faults }));
        }
    }
    if looked_at == 0 {
        return Err("there is no event to check; give files, or JSON on standard input".into());
    }
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(&json!({"looked_at": looked_at, "broken": broken}))?);
    } else {
        for b in &broken {
            for fault in &b.faults {
                let pointer = if fault.pointer.is_empty() { "/" } else { &fault.pointer };
                outln!("{}, event {}: {pointer}: {}", b.source, b.event, fault.detail);
            }
        }
        outln!("{looked_at} events, {} of them break {named}", broken.len());
    }
    Ok(broken.is_empty())
}

fn diff(old: &str, new: &str, format: Format) -> Result<(), BoxError> {
    let changes = compat::changes(&find(old)?, &find(new)?);
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(&changes)?);
        return Ok(());
    }
    if changes.is_empty() {
        outln!("no difference that matters to who reads or writes it");
    }
    for change in &changes {
        outln!("{change}");
    }
    Ok(())
}

fn compat(old: &str, new: &str, need: Need, format: Format) -> Result<bool, BoxError> {
    let found = compat::compare(&find(old)?, &find(new)?);
    let verdict = found.compatibility();
    let fine = match need {
        Need::Backward => found.backward.is_empty(),
        Need::Forward => found.forward.is_empty(),
        Need::Full => verdict == Compatibility::Full,
    };
    if format == Format::Json {
        let report = json!({"compatibility": verdict, "as_needed": fine, "backward": found.backward, "forward": found.forward});
        outln!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(fine);
    }
    outln!("{old} → {new}: {}", verdict.as_str());
    let told = |who: &str, breaks: &[Break]| {
        if !breaks.is_empty() {
            outln!("\n{who}:");
            for b in breaks {
                outln!("  {b}");
            }
        }
    };
    told("consumers of the new one stumble on old events (backward)", &found.backward);
    told("consumers of the old one stumble on new events (forward)", &found.forward);
    Ok(fine)
}
