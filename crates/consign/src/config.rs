//! Configuration in layers (defaults, a TOML file, the environment, flags), checked as a whole at start with every fault named.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::SecretString;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize, Serializer};
use thiserror::Error;
use toml::{Table, Value};

use crate::consumer::ConsumerOptions;
use crate::http::HttpConfig;
use crate::tasks::TaskOptions;

/// What every service has to be told.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServiceConfig {
    /// Where it listens.
    pub http: HttpConfig,
    /// How long published events are kept, and how many may wait.
    pub outbox: OutboxConfig,
    /// How its consumers behave.
    pub consumer: ConsumerOptions,
    /// How its tasks are worked off.
    pub tasks: TaskOptions,
}

/// The outbox's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutboxConfig {
    /// With so many events waiting for the broker, the service is not ready and refuses new work with 503.
    pub max_pending: u64,
    /// How long published events are kept.
    #[serde(with = "humantime_serde")]
    pub history: Duration,
}

impl Default for OutboxConfig {
    fn default() -> Self {
        Self { max_pending: 100_000, history: Duration::from_secs(7 * 24 * 3600) }
    }
}

impl ServiceConfig {
    /// Everything wrong with it, relations included. `stream_age` is how long the streams it reads keep messages.
    pub fn check(&self, service: &str, stream_age: Duration) -> Vec<String> {
        let mut faults = Vec::new();
        let mut need = |ok: bool, fault: String| {
            if !ok {
                faults.push(format!("{service}.{fault}"));
            }
        };
        let (c, t, h) = (&self.consumer, &self.tasks, &self.http);
        need(
            h.listen.ip().is_loopback() || h.admin_token.is_some(),
            format!("http.listen = {} is reachable from outside, so http.admin_token must be set", h.listen),
        );
        need(!h.request_timeout.is_zero(), "http.request_timeout must be above 0".into());
        need(h.body_limit >= 1024, format!("http.body_limit = {} must be at least 1024", h.body_limit));
        need(h.max_concurrent >= 1, "http.max_concurrent must be at least 1".into());
        need(self.outbox.max_pending >= 1, "outbox.max_pending must be at least 1".into());
        need((1..=5000).contains(&c.batch), format!("consumer.batch = {} must be 1 to 5000", c.batch));
        need(
            c.handler_timeout < c.ack_wait,
            format!(
                "consumer.handler_timeout = {:?} must be below consumer.ack_wait = {:?}, or the broker delivers again what is still at work",
                c.handler_timeout, c.ack_wait
            ),
        );
        need(c.retry.limit >= 1, "consumer.retry.limit must be at least 1".into());
        need(
            c.retry.base >= Duration::from_millis(10),
            format!(
                "consumer.retry.base = {:?} must be at least 10ms: instant retries burn the limit",
                c.retry.base
            ),
        );
        need(
            c.retry.base <= c.retry.cap,
            format!(
                "consumer.retry.base = {:?} must not be above consumer.retry.cap = {:?}",
                c.retry.base, c.retry.cap
            ),
        );
        let horizon = stream_age + self.outbox.history;
        need(
            c.inbox_retention >= horizon,
            format!(
                "consumer.inbox_retention = {:?} must be at least the streams' age plus outbox.history = {horizon:?}, or an event could be handled twice",
                c.inbox_retention
            ),
        );
        need(t.concurrency >= 1, "tasks.concurrency must be at least 1".into());
        need(
            t.timeout < t.lease,
            format!(
                "tasks.timeout = {:?} must be below tasks.lease = {:?}, or two workers run one task",
                t.timeout, t.lease
            ),
        );
        need(
            t.retry.base >= Duration::from_millis(10) && t.retry.base <= t.retry.cap,
            "tasks.retry.base must be at least 10ms and not above tasks.retry.cap".into(),
        );
        faults
    }
}

/// A secret as it is shown: for `serialize_with`, on an `Option<SecretString>`.
pub fn redacted<S: Serializer>(_: &Option<SecretString>, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str("(set)")
}

/// The configuration cannot be used; names every fault found.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration file {} cannot be read", path.display())]
    File {
        /// Which.
        path: PathBuf,
        #[source]
        /// Why.
        source: std::io::Error,
    },
    /// Something is wrong in it.
    #[error("{}", Faults(.0))]
    Faults(Vec<String>),
}

struct Faults<'a>(&'a [String]);

impl fmt::Display for Faults<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration has {} fault(s):", self.0.len())?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  - {fault}"))
    }
}

/// Layers of configuration, the later over the earlier.
#[derive(Debug)]
pub struct Layers {
    defaults: Table,
    table: Table,
    faults: Vec<String>,
}

impl Layers {
    /// The first layer.
    pub fn defaults<T: Serialize>(defaults: &T) -> Self {
        let mut faults = Vec::new();
        let table = Table::try_from(defaults).unwrap_or_else(|e| {
            faults.push(format!("the defaults cannot be written as TOML: {e}"));
            Table::new()
        });
        Self { defaults: table.clone(), table, faults }
    }

    /// A TOML file.
    pub fn file(mut self, path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
        match text.parse::<Table>() {
            Ok(table) => merge(&mut self.table, table),
            Err(e) => self.faults.push(format!("{}: {}", path.display(), e.to_string().trim_end())),
        }
        Ok(self)
    }

    /// Variables called `<prefix>SECTION__KEY`: `CONSIGN_ORDER__HTTP__LISTEN` sets `order.http.listen`. Names whose first part is
    /// listed in `not_ours` are passed over.
    #[must_use]
    pub fn environment(
        mut self,
        prefix: &str,
        not_ours: &[&str],
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Self {
        for (name, text) in variables {
            let Some(path) = name.strip_prefix(prefix) else { continue };
            if not_ours.contains(&path) {
                continue;
            }
            let path = path.to_lowercase();
            self.set(&path.split("__").collect::<Vec<_>>(), &text, &name);
        }
        self
    }

    /// One value, by its dotted path, as a flag gives it.
    #[must_use]
    pub fn flag(mut self, path: &str, text: &str) -> Self {
        self.set(&path.split('.').collect::<Vec<_>>(), text, path);
        self
    }

    fn set(&mut self, path: &[&str], text: &str, name: &str) {
        // A text stays text where the default is one; elsewhere it is read as TOML would.
        let mut default = Some(&self.defaults);
        let mut leaf = None;
        for part in path {
            leaf = default.and_then(|t| t.get(*part));
            default = leaf.and_then(Value::as_table);
        }
        let as_text = || Value::String(text.to_owned());
        let value = match leaf {
            Some(Value::String(_)) => as_text(),
            _ => format!("v = {text}")
                .parse::<Table>()
                .ok()
                .and_then(|mut t| t.remove("v"))
                .unwrap_or_else(as_text),
        };
        let mut table = Table::new();
        let mut parts = path.iter().rev();
        let Some(last) = parts.next() else { return };
        table.insert((*last).to_owned(), value);
        for part in parts {
            table = Table::from_iter([((*part).to_owned(), Value::Table(table))]);
        }
        if path.iter().any(|p| p.is_empty()) {
            self.faults.push(format!("{name} is not the name of a setting"));
        } else {
            merge(&mut self.table, table);
        }
    }

    /// The configuration, if each of its sections can be read. `check` adds what is wrong beyond that.
    pub fn build<T: DeserializeOwned>(self, check: impl FnOnce(&T) -> Vec<String>) -> Result<T, ConfigError> {
        let Self { defaults, table, mut faults } = self;
        // Each section alone against the defaults, so that a fault in one does not hide another's.
        for (section, value) in &table {
            let mut alone = defaults.clone();
            alone.insert(section.clone(), value.clone());
            if let Err(e) = alone.try_into::<T>() {
                let message = e.to_string();
                let message = message.lines().next().unwrap_or_default();
                faults.push(if message.contains(&format!("`{section}`")) {
                    message.to_owned()
                } else {
                    format!("{section}: {}", message.trim_end())
                });
            }
        }
        if !faults.is_empty() {
            return Err(ConfigError::Faults(faults));
        }
        let config: T = table.try_into().map_err(|e| ConfigError::Faults(vec![e.to_string()]))?;
        let faults = check(&config);
        if faults.is_empty() { Ok(config) } else { Err(ConfigError::Faults(faults)) }
    }
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(a)), Value::Table(b)) => merge(a, b),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Whole {
        name: String,
        order: ServiceConfig,
        payment: ServiceConfig,
    }

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn later_layers_win() {
        let built: Whole = Layers::defaults(&Whole::default())
            .environment(
                "T_",
                &["SKIPPED"],
                env(&[("T_ORDER__CONSUMER__BATCH", "7"), ("T_NAME", "12"), ("T_SKIPPED", "x")]),
            )
            .flag("order.http.listen", "127.0.0.1:81")
            .build(|_| Vec::new())
            .unwrap();
        assert_eq!(built.order.consumer.batch, 7);
        assert_eq!(built.order.http.listen.port(), 81);
        assert_eq!(built.name, "12");
    }

    #[test]
    fn every_fault_is_named() {
        let e = Layers::defaults(&Whole::default())
            .environment(
                "T_",
                &[],
                env(&[
                    ("T_ORDER__CONSUMER__BATCH", "many"),
                    ("T_PAYMENT__HTTP__LISTEN", "nowhere"),
                    ("T_COLOUR", "red"),
                ]),
            )
            .build::<Whole>(|_| Vec::new())
            .unwrap_err()
            .to_string();
        for part in ["order", "payment", "colour"] {
            assert!(e.contains(part), "{part} is not in: {e}");
        }
    }

    #[test]
    fn relations_are_checked() {
        let mut c = ServiceConfig::default();
        assert_eq!(c.check("order", Duration::from_secs(7 * 24 * 3600)), Vec::<String>::new());
        c.http.listen = "0.0.0.0:80".parse().unwrap();
        c.consumer.handler_timeout = Duration::from_secs(60);
        c.consumer.inbox_retention = Duration::from_secs(60);
        c.tasks.lease = Duration::from_secs(1);
        let faults = c.check("order", Duration::from_secs(7 * 24 * 3600)).join("\n");
        for part in ["order.http.listen", "handler_timeout", "inbox_retention", "tasks.lease"] {
            assert!(faults.contains(part), "{part} is not in: {faults}");
        }
    }
}
