//! Writes each event's schema to the directory given: `cargo xtask schemas`. With a second one, the released ones go there:
//! `cargo xtask schemas --release`.

use std::path::{Path, PathBuf};

use consign::schema::compat::{Compatibility, compare};
use serde_json::Value;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let mut dirs = std::env::args().skip(1).map(PathBuf::from);
    let dir = dirs.next().ok_or("the directory to write to is missing")?;
    let released = dirs.next();
    for (name, schema) in contracts::schemas() {
        write(&dir, &name, &schema)?;
        if let Some(released) = &released {
            release(released, &name, &schema)?;
        }
    }
    Ok(())
}

fn write(dir: &Path, name: &str, schema: &Value) -> Result<(), Error> {
    let file = dir.join(format!("{name}.json"));
    std::fs::write(&file, serde_json::to_string_pretty(schema)? + "\n")?;
    println!("{}", file.display());
    Ok(())
}

/// From here on it is only changed so that nobody stumbles.
fn release(dir: &Path, name: &str, schema: &Value) -> Result<(), Error> {
    let file = dir.join(format!("{name}.json"));
    if file.exists() {
        let was: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
        let found = compare(&was, schema);
        if found.compatibility() != Compatibility::Full {
            return Err(format!(
                "{name} was released and is now {}: make a new version",
                found.compatibility().as_str()
            )
            .into());
        }
    }
    write(dir, name, schema)
}
