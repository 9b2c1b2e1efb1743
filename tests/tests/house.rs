//! Rules of the house that a machine can check.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

#[test]
fn schemas_are_what_the_types_say() {
    let dir = root().join("schemas");
    let mut expected = Vec::new();
    for (name, schema) in contracts::schemas() {
        let file = dir.join(format!("{name}.json"));
        let text = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        let found = fs::read_to_string(&file).unwrap_or_default();
        assert!(
            found == text,
            "{} is not what the type says; run `cargo xtask schemas`, and see whether readers can bear the change",
            file.display()
        );
        expected.push(file);
    }
    let stray: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|f| f.unwrap().path())
        .filter(|f| f.is_file() && !expected.contains(f))
        .collect();
    assert!(stray.is_empty(), "no event has these schemas: {stray:?}");
}

#[test]
fn services_depend_on_contracts_and_the_library_never_on_each_other() {
    let services = ["order", "inventory", "payment"];
    for service in services {
        let manifest = fs::read_to_string(root().join("services").join(service).join("Cargo.toml")).unwrap();
        let (_, dependencies) = manifest.split_once("[dependencies]").unwrap();
        for other in services.iter().filter(|o| **o != service) {
            assert!(!dependencies.contains(&format!("{other}.workspace")), "{service} depends on {other}");
            assert!(!dependencies.contains(&format!("consign-{other}")), "{service} depends on {other}");
        }
    }
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn nothing_is_left_undone() {
    let mut files = Vec::new();
    rust_files(&root(), &mut files);
    let marks = ["todo", "unimplemented"].map(|m| format!("{m}!("));
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for mark in &marks {
            assert!(!text.contains(mark.as_str()), "{} in {}", mark, file.display());
        }
        // What takes minutes says which command runs it; nothing else is left out.
        let skipped = text.replace(&format!("#[{} = \"cargo xtask test --full\"]", "ignore"), "");
        assert!(!skipped.contains(&format!("#[{}", "ignore")), "{} skips a test", file.display());
    }
}

/// The domain is pure: it is handed time, ids and rows.
#[test]
fn the_domain_is_pure() {
    for service in ["order", "inventory", "payment"] {
        let text = fs::read_to_string(root().join("services").join(service).join("src/domain.rs")).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for impure in ["sqlx", "tokio", "now()", "now_v7", "rand::", "std::env", "std::fs", "async "] {
            assert!(!code.contains(impure), "{service}'s domain has `{impure}`; pass it in");
        }
    }
}
