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
