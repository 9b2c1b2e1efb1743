//! Writes each event's schema to the directory given: `cargo xtask schemas`.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = PathBuf::from(std::env::args().nth(1).ok_or("the directory to write to is missing")?);
    for (name, schema) in contracts::schemas() {
        let file = dir.join(format!("{name}.json"));
        std::fs::write(&file, serde_json::to_string_pretty(&schema)? + "\n")?;
        println!("{}", file.display());
    }
    Ok(())
}
