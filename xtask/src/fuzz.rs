//! Builds the fuzz target with the instrumentation that libFuzzer needs, on the stable toolchain, and runs it from seeds made of the contracts'
//! examples. What was found interesting is kept in `target/fuzz/corpus`, so that the next run goes on from there.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// What cargo-fuzz sets, but for the sanitizers, which the stable toolchain does not have.
const INSTRUMENTATION: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                               -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
                               -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
const TARGET: &str = "x86_64-unknown-linux-gnu";

pub fn run(root: &Path, runs: u64, max_len: usize) -> Result<(), String> {
    let folder = root.join("target/fuzz");
    let (corpus, crashes) = (folder.join("corpus"), folder.join("crashes"));
    for dir in [&corpus, &crashes] {
        fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    }
    seed(root, &corpus)?;
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    // A target of its own, so that build scripts and macros are not instrumented.
    crate::run(
        Command::new(cargo)
            .args(["build", "--release", "--locked", "--manifest-path"])
            .arg(root.join("fuzz/Cargo.toml"))
            .args(["--target", TARGET, "--target-dir"])
            .arg(folder.join("build"))
            .env("RUSTFLAGS", INSTRUMENTATION),
    )?;
    crate::run(
        Command::new(folder.join("build").join(TARGET).join("release/events"))
            .arg(&corpus)
            .arg(format!("-runs={runs}"))
            .arg(format!("-max_len={max_len}"))
            .arg(format!("-artifact_prefix={}/", crashes.display()))
            // No unbounded memory and no unbounded time.
            .args(["-rss_limit_mb=1024", "-malloc_limit_mb=64", "-timeout=2", "-print_final_stats=1"]),
    )
}

/// The contracts' examples: with the headers of their contract, and with headers of their own.
fn seed(root: &Path, corpus: &Path) -> Result<(), String> {
    let dir = root.join("schemas");
    let mut files: Vec<_> = fs::read_dir(&dir)
        .map_err(|e| format!("{}: {e}", dir.display()))?
        .flatten()
        .map(|f| f.path())
        .filter(|p| p.extension().is_some_and(|e| e == "json"))
        .collect();
    files.sort();
    for (n, path) in files.iter().enumerate() {
        let fault = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let text = fs::read(path).map_err(|e| fault(&e))?;
        let schema: Value = serde_json::from_slice(&text).map_err(|e| fault(&e))?;
        let (name, example) =
            (schema["title"].as_str().unwrap_or_default(), schema["examples"][0].to_string());
        let choice = u8::try_from(n + 1).map_err(|e| fault(&e))?;
        let payload = [&[choice], example.as_bytes()].concat();
        let headers = format!(
            "\0ce-specversion: 1.0\nce-id: 01990000-0000-7000-8000-000000000009\nce-type: {name}\nce-source: /x\nce-subject: x\n\
             ce-time: 2026-01-01T00:00:00Z\nce-siblings: 2,1\nce-lane: express\nce-correlationid: c\nce-aggregateversion: 1\n\n{example}"
        );
        fs::write(corpus.join(format!("{name}.payload")), payload).map_err(|e| fault(&e))?;
        fs::write(corpus.join(format!("{name}.headers")), headers).map_err(|e| fault(&e))?;
    }
    Ok(())
}
