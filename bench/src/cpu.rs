//! Who used the processor: what bounds a figure on a machine whose cores are all busy.

use std::collections::{BTreeMap, HashMap};
use std::fs;

/// Clock ticks a second, which Linux has fixed at 100 for what it tells of processes.
const TICKS: f64 = 100.0;

/// Seconds of processor time of this process and all that descend from it, by program.
pub fn by_program() -> BTreeMap<String, f64> {
    let mut parents = HashMap::new();
    let mut used = HashMap::new();
    let processes =
        fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
    for id in processes {
        // Those that ended meanwhile are missed.
        let Ok(stat) = fs::read_to_string(format!("/proc/{id}/stat")) else { continue };
        let (name, rest) = stat.rsplit_once(')').unwrap();
        let name = name.split_once('(').unwrap().1.to_owned();
        let fields: Vec<u64> = rest.split_whitespace().skip(1).map(|f| f.parse().unwrap_or(0)).collect();
        parents.insert(id, u32::try_from(fields[0]).unwrap());
        // PostgreSQL has a process per connection, and counts those that have ended.
        let ended = if name == "postgres" { fields[12] + fields[13] } else { 0 };
        used.insert(id, (name, (fields[10] + fields[11] + ended) as f64 / TICKS));
    }
    let ours = |mut id: u32| {
        while id != std::process::id() {
            match parents.get(&id) {
                Some(parent) => id = *parent,
                None => return false,
            }
        }
        true
    };
    let mut programs = BTreeMap::new();
    for (id, (name, seconds)) in &used {
        if ours(*id) {
            *programs.entry(name.clone()).or_insert(0.0) += seconds;
        }
    }
    programs
}

/// What was used since, a line.
pub fn since(before: &BTreeMap<String, f64>, wall: f64) -> String {
    let mut used: Vec<(String, f64)> = by_program()
        .into_iter()
        .map(|(name, s)| (name.clone(), s - before.get(&name).unwrap_or(&0.0)))
        .collect();
    used.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total: f64 = used.iter().map(|(_, s)| s).sum();
    let parts: Vec<String> = used
        .iter()
        .filter(|(_, s)| *s >= total / 100.0)
        .map(|(name, s)| format!("{name} {:.0} %", s / total * 100.0))
        .collect();
    format!("{:.1} cores busy for {wall:.1} s: {}", total / wall, parts.join(", "))
}
