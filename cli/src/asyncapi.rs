//! `consign schema export`: who says what to whom and on which subjects, as an AsyncAPI 3.0 document and as a page to read. Both are made
//! of the contracts and of what the services really consume.

use std::collections::BTreeMap;

use consign::Lane;
use contracts::{Contract, streams};
use serde_json::{Map, Value, json};

use crate::config::Config;

/// Services by name, and what each consumer of theirs can read.
struct Reader {
    service: &'static str,
    consumer: String,
    reads: Vec<String>,
}

fn readers(config: &Config) -> Vec<Reader> {
    let services = [
        (order::NAME, order::topology(&config.order)),
        (inventory::NAME, inventory::topology(&config.inventory)),
        (payment::NAME, payment::topology(&config.payment)),
    ];
    let mut all = Vec::new();
    for (service, topology) in services {
        for consumer in topology.consumers() {
            let reads = consumer.reads().into_keys().collect();
            all.push(Reader { service, consumer: consumer.name().to_owned(), reads });
        }
    }
    all
}

/// The subject of an event, with its lane, and its key where the stream keeps the last of each.
fn address(contract: &Contract) -> String {
    let key = if contract.stream == streams::PRODUCTS { ".{key}" } else { "" };
    format!("{}.{{lane}}{key}", contract.name())
}

/// The AsyncAPI document (<https://www.asyncapi.com/docs/reference/specification/v3.0.0>).
pub fn document(config: &Config) -> Value {
    let (mut channels, mut operations) = (Map::new(), Map::new());
    let (mut messages, mut schemas) = (Map::new(), Map::new());
    schemas.insert("CloudEvent".to_owned(), cloud_event());
    for contract in contracts::all() {
        let name = contract.name();
        channels.insert(name.clone(), channel(&contract));
        operations.insert(
            format!("{}.send.{name}", contract.publisher),
            operation("send", contract.publisher, &name),
        );
        messages.insert(name.clone(), message(&contract));
        hoist(&name, contract.schema, &mut schemas);
    }
    for reader in readers(config) {
        for name in &reader.reads {
            let id = format!("{}.receive.{name}", reader.consumer);
            operations.insert(id, operation("receive", reader.service, name));
        }
    }
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Consign",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The events of an order system: order, inventory, payment. Each is a CloudEvent 1.0 in NATS binary mode: \
                            attributes in headers, data in the payload. Delivered at least once; the id is what idempotency is \
                            measured by. Readers ignore fields that they do not know.",
        },
        "defaultContentType": "application/json",
        "servers": {
            "nats": {"host": "127.0.0.1:4222", "protocol": "nats", "description": "NATS with JetStream; each domain has a stream of its own"},
        },
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": schemas},
    })
}

fn channel(contract: &Contract) -> Value {
    let name = contract.name();
    let lanes = Lane::ALL.map(Lane::as_str);
    let mut parameters =
        json!({"lane": {"description": "How urgent it is", "enum": lanes, "default": "standard"}});
    if contract.stream == streams::PRODUCTS {
        parameters["key"] =
            json!({"description": "The product's id; the stream keeps the last event of each"});
    }
    json!({
        "address": address(contract),
        "title": name,
        "description": format!("On stream {}", contract.stream),
        "messages": {name.as_str(): {"$ref": format!("#/components/messages/{name}")}},
        "parameters": parameters,
    })
}

fn operation(action: &str, service: &str, name: &str) -> Value {
    json!({
        "action": action,
        "channel": {"$ref": format!("#/channels/{name}")},
        "messages": [{"$ref": format!("#/channels/{name}/messages/{name}")}],
        "tags": [{"name": service}],
    })
}

fn message(contract: &Contract) -> Value {
    let name = contract.name();
    let examples = contract.schema["examples"].as_array().into_iter().flatten();
    let examples: Vec<Value> = examples.map(|payload| json!({"payload": payload})).collect();
    json!({
        "name": name,
        "title": name,
        "summary": contract.schema["description"],
        "contentType": "application/json",
        "headers": {"$ref": "#/components/schemas/CloudEvent"},
        "payload": {"$ref": format!("#/components/schemas/{name}")},
        "examples": examples,
    })
}

/// The headers of every event.
fn cloud_event() -> Value {
    let text = |description: &str, example: &str| json!({"type": "string", "description": description, "examples": [example]});
    let id = "01990000-0000-7000-8000-000000000009";
    json!({
        "type": "object",
        "description": "CloudEvents 1.0 attributes in NATS binary mode",
        "required": ["ce-specversion", "ce-id", "ce-type", "ce-source", "ce-subject", "ce-time"],
        "properties": {
            "ce-specversion": {"type": "string", "const": "1.0"},
            "ce-id": text("One per logical event, a UUID, whatever versions and copies of it are published", id),
            "ce-type": text("Type and version", "orders.created.v2"),
            "ce-source": text("Who published it", "/services/order"),
            "ce-subject": text("The aggregate it is about", "01990000-0000-7000-8000-000000000001"),
            "ce-time": {"type": "string", "format": "date-time", "description": "When it happened"},
            "ce-dataschema": text("The `$id` of its JSON Schema", "urn:consign:schema:orders.created.v2"),
            "content-type": {"type": "string", "const": "application/json"},
            "ce-aggregateversion": text("Rises with each event about one aggregate; 1 if left out", "1"),
            "ce-correlationid": text("Ties together all that followed from one request; the id if left out", id),
            "ce-causationid": text("The event that this one follows from", id),
            "ce-lane": {"type": "string", "enum": Lane::ALL.map(Lane::as_str), "default": "standard", "description": "As in the subject"},
            "ce-siblings": text("All versions that this event was published in, if several", "2,1"),
            "Nats-Msg-Id": text("Id and version, so that the broker stores it once", &format!("{id}:v2")),
            "traceparent": text("W3C trace context", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        },
    })
}

/// Puts a schema and its definitions among the components: references in a document are to the document.
fn hoist(name: &str, mut schema: Value, schemas: &mut Map<String, Value>) {
    let Some(object) = schema.as_object_mut() else { return };
    object.remove("$schema");
    if let Some(id) = object.remove("$id") {
        object.insert("x-schema-id".to_owned(), id);
    }
    if let Some(Value::Object(definitions)) = object.remove("$defs") {
        for (part, mut definition) in definitions {
            refer(name, &mut definition);
            schemas.insert(format!("{name}.{part}"), definition);
        }
    }
    refer(name, &mut schema);
    schemas.insert(name.to_owned(), schema);
}

fn refer(name: &str, schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            let part = object.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix("#/$defs/"));
            if let Some(part) = part {
                // What stands beside a reference is ignored (JSON Schema draft 7, 8.3), so it goes one level up.
                let reference = json!({"$ref": format!("#/components/schemas/{name}.{part}")});
                object.remove("$ref");
                if object.is_empty() {
                    *schema = reference;
                } else {
                    object.insert("allOf".to_owned(), json!([reference]));
                }
                return;
            }
            for (key, value) in object {
                if key != "examples" {
                    refer(name, value);
                }
            }
        }
        Value::Array(all) => all.iter_mut().for_each(|s| refer(name, s)),
        _ => {}
    }
}

/// The same for people: one page of HTML.
pub fn page(config: &Config) -> String {
    let readers = readers(config);
    let contracts = contracts::all();
    let mut streams: BTreeMap<&str, Vec<&Contract>> = BTreeMap::new();
    for contract in &contracts {
        streams.entry(contract.stream).or_default().push(contract);
    }
    let (mut index, mut body) = (String::new(), String::new());
    for (stream, contracts) in &streams {
        let publisher = contracts[0].publisher;
        index.push_str(&format!("<h3>{stream} <small>published by {publisher}</small></h3>\n<ul>\n"));
        body.push_str(&format!("<h2>{stream}</h2>\n"));
        for contract in contracts {
            let name = contract.name();
            let newest = contracts.iter().all(|c| c.event != contract.event || c.version <= contract.version);
            let older = if newest { "" } else { " <em>older</em>" };
            index.push_str(&format!("<li><a href=\"#{name}\">{name}</a>{older}</li>\n"));
            body.push_str(&section(contract, older, &readers));
        }
        index.push_str("</ul>\n");
    }
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>Consign: events</title>\n<style>{STYLE}</style>\n<h1>Events</h1>\n\
         <p>Version {}. Each event is a <a href=\"https://cloudevents.io\">CloudEvent 1.0</a> in NATS binary mode: attributes in headers \
         (<code>ce-id</code>, <code>ce-type</code>, …), data in the payload, as described here. Lanes are <code>express</code> and \
         <code>standard</code>. Readers ignore fields that they do not know.</p>\n<nav>\n{index}</nav>\n{body}</html>\n",
        env!("CARGO_PKG_VERSION")
    )
}

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}\
nav{columns:3 16rem}nav h3{margin-top:0}nav ul,nav h3{break-inside:avoid}nav h3{break-after:avoid}small,em{font-weight:normal;opacity:.7}\
section{border-top:1px solid #8884;padding-top:1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}\
th,td{text-align:left;vertical-align:top;padding:.25rem .75rem .25rem 0;border-bottom:1px solid #8883}\
pre{background:#8881;padding:1rem;overflow:auto}td:first-child{font-family:monospace;white-space:nowrap}";

fn section(contract: &Contract, older: &str, readers: &[Reader]) -> String {
    let name = contract.name();
    let by: Vec<String> = readers
        .iter()
        .filter(|r| r.reads.contains(&name))
        .map(|r| format!("{} <small>({})</small>", r.service, r.consumer))
        .collect();
    let by = if by.is_empty() { "nobody here".to_owned() } else { by.join(", ") };
    let mut rows = String::new();
    fields(&contract.schema, &contract.schema, "", &mut rows);
    let example = format!("{:#}", contract.schema["examples"][0]);
    format!(
        "<section id=\"{name}\">\n<h3>{name}{older}</h3>\n<p>{}</p>\n<p>Subject <code>{}</code>. Published by {}, read by {by}.</p>\n\
         <table>\n<tr><th>field<th>type<th>what it is</tr>\n{rows}</table>\n<pre>{}</pre>\n</section>\n",
        escape(contract.schema["description"].as_str().unwrap_or_default()),
        escape(&address(contract)),
        contract.publisher,
        escape(&example),
    )
}

/// A row for each field, those of parts below them.
fn fields(root: &Value, schema: &Value, at: &str, rows: &mut String) {
    let required =
        |field: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|f| f == field));
    for (field, s) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{at}{field}");
        let resolved = resolve(root, s);
        let optional = if required(field) { "" } else { "<br><small>optional</small>" };
        let description = s["description"].as_str().or(resolved["description"].as_str()).unwrap_or_default();
        rows.push_str(&format!(
            "<tr><td>{}<td>{}{optional}<td>{}</tr>\n",
            escape(&path),
            escape(&kind(root, resolved)),
            escape(description)
        ));
        let inner = if resolved["items"].is_object() { resolve(root, &resolved["items"]) } else { resolved };
        let below = if resolved["items"].is_object() { format!("{path}[].") } else { format!("{path}.") };
        fields(root, inner, &below, rows);
    }
}

/// What a reference refers to; of a choice with null, the rest.
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let choice = schema["anyOf"].as_array().and_then(|all| all.iter().find(|s| s["type"] != "null"));
    let schema = choice.unwrap_or(schema);
    let part = schema["$ref"].as_str().and_then(|r| r.strip_prefix("#/$defs/"));
    part.map_or(schema, |part| &root["$defs"][part])
}

/// A field's type with its bounds.
fn kind(root: &Value, schema: &Value) -> String {
    let word = |t: &Value| t.as_str().filter(|t| *t != "null").map(str::to_owned);
    let plain = match &schema["type"] {
        Value::Array(all) => all.iter().find_map(word),
        one => word(one),
    };
    let values = |all: &Value| {
        let all = all.as_array().into_iter().flatten().filter_map(Value::as_str);
        all.map(|v| format!("\"{v}\"")).collect::<Vec<_>>()
    };
    let mut choices = values(&schema["enum"]);
    for one in schema["oneOf"].as_array().into_iter().flatten() {
        choices.extend(one["const"].as_str().map(|v| format!("\"{v}\"")));
        choices.extend(values(&one["enum"]));
    }
    if !choices.is_empty() {
        return choices.join(", ");
    }
    let range = |low: &str, high: &str, unit: &str| match (&schema[low], &schema[high]) {
        (Value::Null, Value::Null) => String::new(),
        (low, high) if low == high => format!(", {low}{unit}"),
        (low, Value::Null) => format!(", from {low}{unit}"),
        (Value::Null, high) => format!(", up to {high}{unit}"),
        (low, high) => format!(", {low} to {high}{unit}"),
    };
    match plain.as_deref() {
        Some("array") => format!(
            "list of {}{}",
            kind(root, resolve(root, &schema["items"])),
            range("minItems", "maxItems", "")
        ),
        Some("string") => match schema["format"].as_str() {
            Some(format) => format.to_owned(),
            None => format!("text{}", range("minLength", "maxLength", " characters")),
        },
        Some("integer") => format!("integer{}", range("minimum", "maximum", "")),
        Some(other) => other.to_owned(),
        None => "anything".to_owned(),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
