//! Whatever anybody may have published: it is read, or it has a reason. What `fuzz/` does for hours, some thousand times in each test run.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use axum::extract::State;
use consign::broker::Message;
use consign::consumer::ReadyConsumer;
use consign::dead_letter::Reason;
use consign::schema::bounds::{MAX_DEPTH, MAX_VALUES};
use consign::{Batch, Consumer, Event, Failure, Timestamp, Tx};
use proptest::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcels.packed", version = 1)]
struct V1 {
    #[schemars(length(min = 1, max = 8))]
    name: String,
    #[schemars(range(max = 1000))]
    grams: u32,
    /// Refers to itself, so that depth is the sender's to choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inner: Option<Box<Part>>,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
struct Part {
    inner: Option<Box<Part>>,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcels.packed", version = 2)]
struct V2 {
    name: String,
    kilos: f64,
}

async fn packed(Batch(_): Batch<V2>, State(()): State<()>, _: Tx) -> Result<(), Failure> {
    Ok(())
}

fn consumer() -> ReadyConsumer {
    let upcast = |old: V1| V2 { name: old.name, kilos: f64::from(old.grams) / 1000.0 };
    Consumer::new("c", "PARCELS").on(packed).upcast(upcast).with_state(())
}

const NOW: Timestamp = Timestamp::from_millis(1_767_225_600_000);

fn message(payload: impl Into<Vec<u8>>) -> Message {
    let headers = [
        ("ce-specversion", "1.0"),
        ("ce-id", "01990000-0000-7000-8000-000000000009"),
        ("ce-type", "parcels.packed.v1"),
        ("ce-source", "/tests"),
        ("ce-subject", "p"),
        ("ce-time", "2026-01-01T00:00:00Z"),
    ];
    Message {
        subject: "parcels.packed.v1.standard".into(),
        msg_id: None,
        headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
        payload: payload.into().into(),
    }
}

fn read(message: &Message) -> Result<String, Reason> {
    consumer().read(message, NOW).map_err(|reject| {
        assert!(!reject.error.is_empty());
        reject.reason
    })
}

#[test]
fn unknown_fields_are_ignored() {
    let payload = json!({"name": "a", "grams": 1, "colour": {"of": ["the", "day"]}});
    assert_eq!(read(&message(payload.to_string())).unwrap(), "parcels.packed.v2");
}

#[test]
fn each_way_to_be_wrong_has_its_reason() {
    let nested = (0..=MAX_DEPTH).fold(json!(null), |inner, _| json!({"inner": inner}));
    for (payload, reason) in [
        (r#"{"name":"a","grams":1001}"#.to_owned(), Reason::BreaksSchema),
        (r#"{"name":"too long to be one","grams":1}"#.to_owned(), Reason::BreaksSchema),
        ("{".to_owned(), Reason::Undecodable),
        (json!({"name": "a", "grams": 1, "inner": nested}).to_string(), Reason::Undecodable),
        (format!("[{}1]", "1,".repeat(MAX_VALUES)), Reason::Undecodable),
    ] {
        assert_eq!(
            read(&message(payload.clone())),
            Err(reason),
            "{}",
            payload.chars().take(80).collect::<String>()
        );
    }
    let mut unknown = message("{}");
    unknown.headers[2].1 = "parcels.packed.v3".into();
    assert_eq!(read(&unknown), Err(Reason::Unaccepted));
    let mut old = message("{}");
    old.headers[5].1 = "2025-01-01T00:00:00Z".into();
    assert_eq!(read(&old), Err(Reason::BeyondHorizon));
}

fn json_values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 40, 5, |inner| {
        let field = prop_oneof!["name", "grams", "inner", ".{0,6}"];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map(field, inner, 0..5)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_get_an_answer(payload in prop::collection::vec(any::<u8>(), 0..2048)) {
        let _ = read(&message(payload));
    }

    #[test]
    fn any_headers_get_an_answer(headers in prop::collection::vec((".{0,20}", ".{0,60}"), 0..20)) {
        let _ = read(&Message { headers, ..message("{}") });
    }

    /// Any one attribute replaced by anything.
    #[test]
    fn any_attribute_gets_an_answer(at in 0..6_usize, value in ".{0,60}") {
        let mut message = message(json!({"name": "a", "grams": 1}).to_string());
        message.headers[at].1 = value;
        let _ = read(&message);
    }

    /// What is accepted is what the schema describes, and nothing else is.
    #[test]
    fn any_document_is_accepted_if_and_only_if_it_fits(document in json_values()) {
        let fits = serde_json::from_value::<V1>(document.clone()).is_ok_and(|event| {
            (1..=8).contains(&event.name.chars().count()) && event.grams <= 1000
        });
        let answer = read(&message(document.to_string()));
        prop_assert_eq!(answer.is_ok(), fits, "{}: {:?}", document, answer);
    }
}
