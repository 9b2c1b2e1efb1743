//! The configuration of `consign up`, and where the operators' commands find a running system.

use std::path::{Path, PathBuf};

use consign::broker::nats::NatsConfig;
use consign::config::{ConfigError, Layers};
use consign::telemetry::LogConfig;
use serde::{Deserialize, Serialize};

/// Everything `consign up` can be told. `consign config show` prints it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where databases, the broker's file and the admin token lie.
    pub data_dir: PathBuf,
    /// Make the demo products at first start.
    pub demo: bool,
    /// What is logged, and where to.
    pub log: LogConfig,
    /// Where NATS is, for `consign streams`; `consign up` has a broker of its own.
    pub nats: NatsConfig,
    /// The order service.
    pub order: order::Config,
    /// The inventory service.
    pub inventory: inventory::Config,
    /// The payment service.
    pub payment: payment::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "consign-data".into(),
            demo: true,
            log: LogConfig::default(),
            nats: NatsConfig::default(),
            order: order::Config::default(),
            inventory: inventory::Config::default(),
            payment: payment::Config::default(),
        }
    }
}

/// Variables that begin like settings and are none.
const NOT_SETTINGS: &[&str] = &[
    "CONFIG",
    "ADMIN_TOKEN",
    "ORDER_URL",
    "INVENTORY_URL",
    "PAYMENT_URL",
    "ORDER_DB",
    "INVENTORY_DB",
    "PAYMENT_DB",
];

impl Config {
    /// Defaults, then the file, then the environment, then flags. Without `file`, `consign.toml` is read if it is there.
    pub fn load(file: Option<&Path>, data_dir: Option<&Path>, set: &[String]) -> Result<Self, ConfigError> {
        let mut layers = Layers::defaults(&Self::default());
        let default_file = Path::new("consign.toml");
        if let Some(path) = file.or_else(|| default_file.exists().then_some(default_file)) {
            layers = layers.file(path)?;
        }
        layers = layers.environment("CONSIGN_", NOT_SETTINGS, std::env::vars());
        for pair in set {
            let (path, value) = pair.split_once('=').ok_or_else(|| {
                ConfigError::Faults(vec![format!(
                    "--set {pair}: must be key=value, for example order.deadline=5m"
                )])
            })?;
            layers = layers.flag(path, value);
        }
        if let Some(dir) = data_dir {
            layers = layers.flag("data_dir", &dir.to_string_lossy());
        }
        layers.build(Self::check)
    }

    fn check(&self) -> Vec<String> {
        let mut faults = self.order.check();
        faults.extend(self.inventory.check());
        faults.extend(self.payment.check());
        if let Err(e) = self.log.parse_filter() {
            faults.push(consign::telemetry::chain(&e));
        }
        let listens = [self.order.http.listen, self.inventory.http.listen, self.payment.http.listen];
        for (i, a) in listens.iter().enumerate() {
            if a.port() != 0 && listens[..i].contains(a) {
                faults.push(format!("two services are to listen on {a}; give each its own http.listen"));
            }
        }
        faults
    }
}

/// Where a running system answers; written to the data directory by `consign up`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Endpoints {
    /// Base URL of the order service.
    pub order: String,
    /// Base URL of the inventory service.
    pub inventory: String,
    /// Base URL of the payment service.
    pub payment: String,
}

impl Endpoints {
    /// The file's name in the data directory.
    pub const FILE: &'static str = "endpoints.json";

    /// What the running system wrote, or else what the configuration says.
    pub fn find(config: &Config) -> Self {
        let written = std::fs::read(config.data_dir.join(Self::FILE)).ok();
        written.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_else(|| Self {
            order: format!("http://{}", config.order.http.listen),
            inventory: format!("http://{}", config.inventory.http.listen),
            payment: format!("http://{}", config.payment.http.listen),
        })
    }
}
