//! What it costs to look at an event before a handler sees it: bounds and schema beside bare parsing, and the whole way through an upcaster.

use std::hint::black_box;
use std::time::Instant;

use consign::broker::Message;
use consign::event::{Cause, Envelope};
use consign::schema::{self, bounds};
use consign::{Event, Lane, Timestamp};
use contracts::{OrderCreated, OrderCreatedV1};
use serde_json::Value;

use crate::{Figure, percentile};

const EVENTS: u32 = 50_000;
const ROUNDS: usize = 9;

/// Nanoseconds an event.
fn time(mut work: impl FnMut()) -> f64 {
    let started = Instant::now();
    for _ in 0..EVENTS {
        work();
    }
    started.elapsed().as_nanos() as f64 / f64::from(EVENTS)
}

fn example<E: Event>() -> Vec<u8> {
    schema::of::<E>().document()["examples"][0].to_string().into_bytes()
}

fn message<E: Event>() -> Message {
    let envelope = Envelope {
        id: uuid::Uuid::now_v7(),
        event_type: E::TYPE.into(),
        version: E::VERSION,
        source: "/services/order".into(),
        aggregate_id: uuid::Uuid::now_v7().to_string(),
        aggregate_version: 1,
        time: Timestamp::from_millis(0),
        cause: Cause::new(),
        lane: Lane::Standard,
        siblings: Vec::new(),
    };
    envelope.into_message(None, example::<E>().into())
}

pub fn run() -> Vec<Figure> {
    let payload = example::<OrderCreated>();
    let compiled = schema::of::<OrderCreated>();
    let topology = inventory::topology(&inventory::Config::default());
    let consumer = &topology.consumers()[0];
    let (new, old) = (message::<OrderCreated>(), message::<OrderCreatedV1>());
    let now = Timestamp::from_millis(0);
    let mut parsing = Vec::new();
    let mut looking = Vec::new();
    let (mut reading, mut upcasting) = (Vec::new(), Vec::new());
    // In turns, so that all have the same of whatever else the machine does.
    for _ in 0..ROUNDS {
        parsing.push(time(|| drop(black_box(serde_json::from_slice::<Value>(black_box(&payload)).unwrap()))));
        looking.push(time(|| {
            bounds::check(black_box(&payload)).unwrap();
            let value: Value = serde_json::from_slice(black_box(&payload)).unwrap();
            compiled.validate(black_box(&value)).unwrap();
        }));
        reading.push(time(|| drop(black_box(consumer.read(black_box(&new), now).unwrap()))));
        upcasting.push(time(|| drop(black_box(consumer.read(black_box(&old), now).unwrap()))));
    }
    let median = |mut all: Vec<f64>| {
        all.sort_by(f64::total_cmp);
        percentile(&all, 0.5)
    };
    let (parsing, looking) = (median(parsing), median(looking));
    let per_second = |nanos: f64| 1e9 / nanos;
    let whole =
        |what, nanos: f64| Figure { what, reached: nanos / 1e3, unit: "µs", floor: None, goal: 20.0 };
    vec![
        Figure {
            what: "orders.created.v2: bounds, parse, validate",
            reached: per_second(looking),
            unit: "events/s",
            floor: Some(("parse alone", per_second(parsing))),
            goal: 0.6,
        },
        whole("from message to handler, as it came", median(reading)),
        whole("from message to handler, through an upcaster", median(upcasting)),
    ]
}
