//! A version that was released goes on being understood, by whoever reads or writes it: other teams deploy at other times.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::collections::BTreeMap;
use std::path::Path;

use consign::schema::compat::{Compatibility, compare};
use serde_json::Value;

fn released() -> BTreeMap<String, Value> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../schemas/released");
    let files = std::fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path());
    let read = |path: std::path::PathBuf| {
        let schema = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        (path.file_stem().unwrap().to_string_lossy().into_owned(), schema)
    };
    files.map(read).collect()
}

#[test]
fn released_versions_change_in_no_way_that_anybody_stumbles_on() {
    let today: BTreeMap<String, Value> = contracts::schemas().into_iter().collect();
    let released = released();
    assert!(!released.is_empty());
    for (name, was) in released {
        let is = today.get(&name).unwrap_or_else(|| panic!("{name} was released, and is gone"));
        let found = compare(&was, is);
        assert_eq!(
            found.compatibility(),
            Compatibility::Full,
            "{name} was released; make a new version of the event instead. Consumers of the new one: {:?}; of the old one: {:?}",
            found.backward,
            found.forward
        );
    }
}

#[test]
fn what_breaks_a_reader_is_noticed() {
    let (_, mut schema) = released().remove_entry("orders.created.v1").unwrap();
    let was = schema.clone();
    schema["required"].as_array_mut().unwrap().retain(|name| name != "total");
    assert_eq!(compare(&was, &schema).compatibility(), Compatibility::Backward);
    schema["$defs"]["OrderLine"]["properties"]["quantity"]["maximum"] = 5.into();
    assert_eq!(compare(&was, &schema).compatibility(), Compatibility::None);
}

#[test]
fn every_schema_explains_itself_and_sets_bounds() {
    for contract in contracts::all() {
        let name = contract.name();
        let s = &contract.schema;
        assert_eq!(s["$id"], format!("urn:consign:schema:{name}"));
        assert_eq!(s["title"], name.as_str());
        assert!(s["description"].is_string(), "{name} is not described");
        let examples = s["examples"].as_array().unwrap_or_else(|| panic!("{name} has no example"));
        let compiled = consign::schema::CompiledSchema::parse(&name, s.clone()).unwrap();
        for example in examples {
            compiled.validate(example).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        let parts =
            s["$defs"].as_object().into_iter().flatten().map(|(part, s)| (format!("{name} {part}"), s));
        for (part, s) in parts.chain([(name.clone(), s)]) {
            assert!(s["description"].is_string(), "{part} is not described");
            for (field, s) in s["properties"].as_object().into_iter().flatten() {
                assert!(s["description"].is_string(), "{part}: {field} is not described");
                // Released without a bound, which would be a change that breaks readers of old events.
                if (part.as_str(), field.as_str()) != ("inventory.rejected.v1", "shortages") {
                    assert!(is_bounded(s), "{part}: {field} has no bound: {s}");
                }
            }
        }
    }
}

fn is_bounded(s: &Value) -> bool {
    let is = |word: &str| match &s["type"] {
        Value::String(t) => t == word,
        Value::Array(all) => all.iter().any(|t| t == word),
        _ => false,
    };
    (!is("string") || s["maxLength"].is_number() || s["format"].is_string() || s["enum"].is_array())
        && (!is("array") || s["maxItems"].is_number())
        && (!(is("integer") || is("number")) || s["format"].is_string() || s["maximum"].is_number())
}

#[test]
fn older_versions_become_the_newer_ones_and_back() {
    use contracts::{OrderCreated, OrderCreatedV1, StockReserved, StockReservedV1};
    let example = |name: &str| {
        let all = contracts::all();
        all.into_iter().find(|c| c.name() == name).unwrap().schema["examples"][0].clone()
    };
    let old: OrderCreatedV1 = serde_json::from_value(example("orders.created.v1")).unwrap();
    let new: OrderCreated = serde_json::from_value(example("orders.created.v2")).unwrap();
    assert_eq!(OrderCreatedV1::from(&new), old);
    let upcast = OrderCreated::from(old.clone());
    assert_eq!(upcast, OrderCreated { shipping_address: None, gift_note: None, ..new });
    assert_eq!(OrderCreatedV1::from(&upcast), old);
    let old: StockReservedV1 = serde_json::from_value(example("inventory.reserved.v1")).unwrap();
    let new: StockReserved = serde_json::from_value(example("inventory.reserved.v2")).unwrap();
    assert_eq!((StockReservedV1::from(&new), StockReserved::from(old.clone())), (old, new));
}
