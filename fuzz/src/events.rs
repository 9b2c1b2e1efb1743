//! Decode → validate → upcast, for every consumer of every service: no panic, no unbounded memory or time, whatever was published.
//!
//! The first byte chooses: 0, and headers are part of the input (`name: value` lines, an empty line, the payload); otherwise the headers are
//! those of one of the contracts, and the rest of the input is the payload. `cargo xtask fuzz` makes the seeds of the contracts' examples.
#![no_main]

use std::sync::LazyLock;

use consign::broker::Message;
use consign::service::Topology;
use consign::{Lane, Timestamp};
use libfuzzer_sys::fuzz_target;

static SERVICES: LazyLock<[Topology; 3]> = LazyLock::new(|| {
    [
        order::topology(&order::Config::default()),
        inventory::topology(&inventory::Config::default()),
        payment::topology(&payment::Config::default()),
    ]
});
/// In the order of the files in `schemas/`.
static NAMES: LazyLock<Vec<String>> = LazyLock::new(|| {
    let mut names: Vec<String> = contracts::all().iter().map(contracts::Contract::name).collect();
    names.sort();
    names
});

/// The first of January 2026, and an event of that day.
const NOW: i64 = 1_767_225_600_000;

fuzz_target!(|input: &[u8]| {
    let Some((choice, rest)) = input.split_first() else { return };
    let message = match usize::from(*choice).checked_sub(1) {
        None => with_headers(rest),
        Some(n) => of_contract(&NAMES[n % NAMES.len()], rest),
    };
    for consumer in SERVICES.iter().flat_map(Topology::consumers) {
        match consumer.read(&message, Timestamp::from_millis(NOW)) {
            Ok(target) => assert!(consumer.reads().values().any(|t| *t == target)),
            Err(reject) => assert!(!reject.error.is_empty()),
        }
    }
});

fn with_headers(input: &[u8]) -> Message {
    let end = input.windows(2).position(|two| two == b"\n\n");
    let (head, payload) = end.map_or((input, &b""[..]), |at| (&input[..at], &input[at + 2..]));
    let head = String::from_utf8_lossy(head);
    let headers = head.lines().filter_map(|l| l.split_once(": ")).map(|(n, v)| (n.to_owned(), v.to_owned()));
    let payload = payload.to_vec().into();
    Message { subject: "fuzz".into(), msg_id: None, headers: headers.collect(), payload }
}

fn of_contract(name: &str, payload: &[u8]) -> Message {
    let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let headers = vec![
        header("ce-specversion", "1.0"),
        header("ce-id", "01990000-0000-7000-8000-000000000009"),
        header("ce-type", name),
        header("ce-source", "/fuzz"),
        header("ce-subject", "x"),
        header("ce-time", "2026-01-01T00:00:00Z"),
        header("ce-lane", Lane::Standard.as_str()),
    ];
    Message { subject: "fuzz".into(), msg_id: None, headers, payload: payload.to_vec().into() }
}
