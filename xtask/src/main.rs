//! What people run: `cargo xtask test`, `bench`, `schemas`, `tidy`.

mod fuzz;
mod install;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::{Parser, Subcommand, ValueEnum};

/// Chores of this repository.
#[derive(Debug, Parser)]
#[command(name = "xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Format, lints, documentation and all tests.
    Test {
        /// Install what tests need and is not there: under target/tools, PostgreSQL and Node.js from the system's packages.
        #[arg(long)]
        install: bool,
        /// All faults, also those that take minutes.
        #[arg(long)]
        full: bool,
    },
    /// The figures of bench/README.md, measured here and now, on servers of its own.
    Bench {
        /// Everything, if not said; `backlog` is only run by name.
        #[arg(value_enum)]
        what: Option<Bench>,
        /// Orders per run of `embedded`.
        #[arg(long, default_value_t = 20_000)]
        orders: u64,
        /// Stored orders before the last run of `embedded`.
        #[arg(long, default_value_t = 0)]
        stored: u64,
    },
    /// Write the JSON Schemas of all events to schemas/.
    Schemas {
        /// As released too, to schemas/released/: from then on only compatible changes pass the tests.
        #[arg(long)]
        release: bool,
    },
    /// Throw what anybody may have published at every consumer. Needs a compiler for C++, for libFuzzer.
    Fuzz {
        /// So many times.
        #[arg(long, default_value_t = 100_000)]
        runs: u64,
        /// Inputs of at most so many bytes. Short ones are tried faster; for the bounds on depth and values it takes long ones.
        #[arg(long, default_value_t = 2048)]
        max_len: usize,
    },
    /// Format, and look for lints.
    Tidy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Bench {
    /// Relay and consumers beside bare async-nats.
    Library,
    /// The services on NATS and PostgreSQL beside bare async-nats and pgbench.
    Saga,
    /// The relay with ten million rows pending.
    Backlog,
    /// What a circuit breaker costs a call.
    Breaker,
    /// What it costs to look at an event before a handler sees it.
    Schema,
    /// The services while the payment gateway fails every call for a minute.
    Outage,
    /// `consign up`: everything in one process.
    Embedded,
}

fn main() -> ExitCode {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let root = root.parent().map(Path::to_owned).unwrap_or(root);
    let started = Instant::now();
    let done = match Cli::parse().task {
        Task::Test { install, full } => {
            let installed = if install { install::all(&root) } else { Ok(()) };
            installed.and_then(|()| test(&root, full))
        }
        Task::Bench { what, orders, stored } => {
            let servers = match what {
                Some(Bench::Embedded) => Ok(()),
                Some(Bench::Library) => bench(&root, &["library"]),
                Some(Bench::Saga) => bench(&root, &["saga"]),
                Some(Bench::Backlog) => bench(&root, &["backlog"]),
                Some(Bench::Breaker) => bench(&root, &["breaker"]),
                Some(Bench::Schema) => bench(&root, &["schema"]),
                Some(Bench::Outage) => bench(&root, &["outage"]),
                None => bench(&root, &[]),
            };
            let embedded = matches!(what, None | Some(Bench::Embedded));
            servers.and_then(|()| if embedded { bench_embedded(&root, orders, stored) } else { Ok(()) })
        }
        Task::Schemas { release } => {
            let mut args =
                vec!["run", "--quiet", "--package", "consign-contracts", "--example", "schemas", "schemas"];
            if release {
                args.push("schemas/released");
            }
            cargo(&root, &args)
        }
        Task::Fuzz { runs, max_len } => fuzz::run(&root, runs, max_len),
        Task::Tidy => cargo(&root, &["fmt", "--all"]).and_then(|()| {
            cargo(&root, &["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"])
        }),
    };
    match done {
        Ok(()) => {
            println!("done in {} s", started.elapsed().as_secs());
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("xtask: {e}");
            ExitCode::FAILURE
        }
    }
}

fn test(root: &Path, full: bool) -> Result<(), String> {
    cargo(root, &["fmt", "--all", "--check"])?;
    cargo(root, &["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"])?;
    // The black-box tests start these programs.
    cargo(root, &["build", "--workspace", "--bins"])?;
    cargo(root, &["test", "--workspace", "--no-fail-fast", "--exclude", "consign-tests"])?;
    // Real processes on real servers: one fault at a time, or two cores measure each other.
    let mut whole = vec!["test", "--package", "consign-tests", "--no-fail-fast", "--", "--test-threads", "2"];
    if full {
        whole.push("--include-ignored");
    }
    cargo(root, &whole)
}

fn cargo(root: &Path, args: &[&str]) -> Result<(), String> {
    println!("cargo {}", args.join(" "));
    run(Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).args(args).current_dir(root))
}

fn run(command: &mut Command) -> Result<(), String> {
    let status = command.status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} ended with {status}")) }
}

/// Starts private servers, and measures the library and the services on them.
fn bench(root: &Path, what: &[&str]) -> Result<(), String> {
    let mut build = vec!["build", "--profile", "dist", "--package", "consign-bench"];
    for service in ["consign-order", "consign-inventory", "consign-payment"] {
        build.extend(["--package", service]);
    }
    cargo(root, &build)?;
    run(Command::new(root.join("target/dist/consign-bench")).args(what))
}

/// Starts the optimised program on a data directory of its own, and loads it.
fn bench_embedded(root: &Path, orders: u64, stored: u64) -> Result<(), String> {
    cargo(root, &["build", "--profile", "dist", "--package", "consign-cli"])?;
    let program = root.join("target/dist/consign");
    let dir = root.join("target/bench-data");
    let _ = std::fs::remove_dir_all(&dir);
    let dir = dir.to_string_lossy().into_owned();
    let mut up = Command::new(&program)
        .args(["up", "--data-dir", &dir, "--set", "log.filter=warn"])
        .spawn()
        .map_err(|e| format!("{}: {e}", program.display()))?;
    let load = |title: &str, orders: u64, extra: &[&str]| {
        println!("\n{title}");
        let count = orders.to_string();
        run(Command::new(&program)
            .args(["load", "--data-dir", &dir, "--orders", &count, "--wait", "600"])
            .args(extra))
    };
    let measured = (|| {
        wait_until_up(&program, &dir)?;
        load("warm-up", 2_000, &["--concurrency", "64"])?;
        load("as fast as it goes, 256 at a time", orders, &["--concurrency", "256"])?;
        load("at 750 orders/s", orders / 2, &["--concurrency", "256", "--rate", "750"])?;
        if stored > 0 {
            load("storing more", stored, &["--concurrency", "256"])?;
            load("as fast as it goes, with those stored", orders, &["--concurrency", "256"])?;
        }
        println!();
        run(Command::new(&program).args(["verify", "--data-dir", &dir]))
    })();
    let stopped = run(Command::new("kill").args(["-INT", &up.id().to_string()]));
    let ended = up.wait().map_err(|e| e.to_string());
    measured.and(stopped).and(ended.map(drop))
}

fn wait_until_up(program: &Path, dir: &str) -> Result<(), String> {
    for _ in 0..300 {
        let listed = Command::new(program).args(["orders", "list", "--data-dir", dir]).output();
        if listed.is_ok_and(|o| o.status.success()) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    Err("consign up did not answer within 30 s".into())
}
