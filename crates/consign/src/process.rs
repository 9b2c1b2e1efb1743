//! A service as a program of its own: configuration, logs, broker, start, and an orderly stop.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rand::RngExt;
use secrecy::SecretString;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};

use crate::Clock;
use crate::broker::Broker;
use crate::broker::embedded::EmbeddedBroker;
use crate::config::Layers;
use crate::handler::BoxError;
use crate::http::HttpConfig;
use crate::service::Running;
use crate::telemetry::{self, LogConfig};

/// From the signal to the end, at most.
pub const DRAIN: Duration = Duration::from_secs(8);

/// Returns when the process is asked to stop, by Ctrl-C or SIGTERM.
pub async fn stop_signal() {
    let mut terminate = match signal(SignalKind::terminate()) {
        Ok(s) => s,
        Err(error) => {
            tracing::error!(%error, "SIGTERM cannot be listened for");
            return;
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

/// The data directory cannot be used.
#[derive(Debug, Error)]
pub enum DataDirError {
    /// Not to be made or written.
    #[error("the data directory {} cannot be used", path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        #[source]
        /// Why.
        source: std::io::Error,
    },
    /// Somebody else is in it.
    #[error("the data directory {} is in use by another process; stop that, or name another (--data-dir, or CONSIGN_DATA_DIR)", .0.display())]
    InUse(PathBuf),
}

/// A data directory that belongs to this process until dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: fs::File,
}

impl DataDir {
    /// Makes it if need be, and locks it: SQLite files and the embedded broker have one process at a time.
    pub fn claim(path: &Path) -> Result<Self, DataDirError> {
        let unusable = |source| DataDirError::Unusable { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(unusable)?;
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(path.join("lock"));
        let lock = file.map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(fs::TryLockError::WouldBlock) => Err(DataDirError::InUse(path.to_owned())),
            Err(fs::TryLockError::Error(source)) => Err(unusable(source)),
        }
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The admin token kept in it; made, readable by the owner alone, at first start. `true` if it is new.
    pub fn admin_token(&self) -> Result<(SecretString, bool), DataDirError> {
        let path = self.file("admin-token");
        let unusable = |source| DataDirError::Unusable { path: path.clone(), source };
        match fs::read_to_string(&path) {
            Ok(text) if !text.trim().is_empty() => return Ok((text.trim().to_owned().into(), false)),
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(unusable(e)),
        }
        let token: String = {
            let mut rng = rand::rng();
            (0..32).map(|_| char::from_digit(rng.random_range(0..36), 36).unwrap_or('0')).collect()
        };
        let mut options = fs::OpenOptions::new();
        options.create(true).write(true).truncate(true);
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&path).map_err(unusable)?;
        file.write_all(token.as_bytes()).and_then(|()| file.sync_all()).map_err(unusable)?;
        Ok((token.into(), true))
    }
}

/// What a service's program reads beside the service's own section.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ProgramConfig<C> {
    data_dir: PathBuf,
    log: LogConfig,
    service: C,
}

impl<C: Default> Default for ProgramConfig<C> {
    fn default() -> Self {
        Self { data_dir: "consign-data".into(), log: LogConfig::default(), service: C::default() }
    }
}

/// What a program hands to its service.
pub struct Setup {
    /// Where its files lie; claimed for this process.
    pub data_dir: PathBuf,
    /// Its clock.
    pub clock: Clock,
    /// The broker it publishes to and consumes from.
    pub broker: Arc<dyn Broker>,
}

/// The `main` of a service's own program: configuration from `CONSIGN_CONFIG` (TOML) and `CONSIGN_…` variables, an embedded broker of its
/// own, SQLite in the data directory; runs until asked to stop.
pub async fn main<C, F>(
    name: &str,
    http: fn(&mut C) -> &mut HttpConfig,
    check: fn(&C) -> Vec<String>,
    start: F,
) -> ExitCode
where
    C: Serialize + DeserializeOwned + Default,
    F: AsyncFnOnce(C, Setup) -> Result<Running, BoxError>,
{
    match run(name, http, check, start).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("consign-{name}: {}", telemetry::chain(e.as_ref()));
            ExitCode::from(2)
        }
    }
}

async fn run<C, F>(
    name: &str,
    http: fn(&mut C) -> &mut HttpConfig,
    check: fn(&C) -> Vec<String>,
    start: F,
) -> Result<(), BoxError>
where
    C: Serialize + DeserializeOwned + Default,
    F: AsyncFnOnce(C, Setup) -> Result<Running, BoxError>,
{
    let mut layers = Layers::defaults(&ProgramConfig::<C>::default());
    if let Some(path) = std::env::var_os("CONSIGN_CONFIG") {
        layers = layers.file(Path::new(&path))?;
    }
    let mut config: ProgramConfig<C> = layers
        .environment("CONSIGN_", &["CONFIG"], std::env::vars())
        .build(|c: &ProgramConfig<C>| check(&c.service))?;
    telemetry::init_logs(&config.log)?;
    telemetry::metrics();
    let data_dir = DataDir::claim(&config.data_dir)?;
    let (token, _) = data_dir.admin_token()?;
    http(&mut config.service).admin_token.get_or_insert(token);
    let clock = Clock::system();
    let broker = Arc::new(EmbeddedBroker::open(&data_dir.file("broker.db"), clock.clone()).await?);
    tracing::warn!(
        service = name,
        "on an embedded broker of its own: no other process hears its events; `consign up` runs all services on one"
    );
    let setup =
        Setup { data_dir: config.data_dir.clone(), clock, broker: Arc::clone(&broker) as Arc<dyn Broker> };
    let running = start(config.service, setup).await?;
    println!("{name} listens on http://{}", running.address());
    stop_signal().await;
    running.shutdown(DRAIN).await;
    broker.close().await;
    Ok(())
}
