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
use crate::broker::nats::{NatsBroker, NatsConfig};
use crate::config::Layers;
use crate::db::{PostgresConfig, Storage};
use crate::handler::BoxError;
use crate::http::HttpConfig;
use crate::service::Running;
use crate::telemetry::{self, LogConfig};

/// From the signal to the end, at most.
pub const DRAIN: Duration = Duration::from_secs(8);
/// And then for the connection to the broker. Both together are well below the 30 s that Kubernetes gives.
const CLOSE: Duration = Duration::from_secs(4);

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
    broker: BrokerKind,
    nats: NatsConfig,
    database: DatabaseKind,
    postgres: PostgresConfig,
    service: C,
}

/// Which broker a program uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum BrokerKind {
    /// One of its own, that no other process hears.
    #[default]
    Embedded,
    Nats,
}

/// Where a program keeps its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum DatabaseKind {
    #[default]
    Sqlite,
    Postgres,
}

impl<C: Default> Default for ProgramConfig<C> {
    fn default() -> Self {
        Self {
            data_dir: "consign-data".into(),
            log: LogConfig::default(),
            broker: BrokerKind::default(),
            nats: NatsConfig::default(),
            database: DatabaseKind::default(),
            postgres: PostgresConfig::default(),
            service: C::default(),
        }
    }
}

impl<C> ProgramConfig<C> {
    fn check(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.broker == BrokerKind::Nats {
            faults.extend(self.nats.check());
        }
        if self.database == DatabaseKind::Postgres {
            faults.extend(self.postgres.check());
        }
        if let Err(e) = self.log.parse_filter() {
            faults.push(telemetry::chain(&e));
        }
        faults
    }
}

/// What a program hands to its service.
pub struct Setup {
    storage: Storage,
    data_dir: PathBuf,
    /// Its clock.
    pub clock: Clock,
    /// The broker it publishes to and consumes from.
    pub broker: Arc<dyn Broker>,
}

impl Setup {
    /// Where the service keeps its data.
    pub fn storage(&self) -> Storage {
        self.storage.clone()
    }

    /// Where something keeps its data that is apart from the service's: a file of its own, or a schema.
    pub fn storage_of(&self, name: &'static str) -> Storage {
        match &self.storage {
            Storage::Sqlite(_) => Storage::Sqlite(self.data_dir.join(format!("{name}.db"))),
            Storage::Postgres(config) => {
                Storage::Postgres(PostgresConfig { schema: Some(name), ..config.clone() })
            }
        }
    }
}

/// The `main` of a service's own program: configuration from `CONSIGN_CONFIG` (TOML) and `CONSIGN_…` variables; runs until asked to stop.
///
/// `broker = "nats"` and `database = "postgres"` make it one of any number of replicas. By default it has an embedded broker of its own and
/// SQLite in the data directory.
pub async fn main<C, F>(
    name: &'static str,
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

/// The broker a program has opened, to be closed after its service.
enum Opened {
    Embedded(Arc<EmbeddedBroker>),
    Nats(Arc<NatsBroker>),
}

async fn run<C, F>(
    name: &'static str,
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
    let mut config: ProgramConfig<C> =
        layers.environment("CONSIGN_", &["CONFIG"], std::env::vars()).build(|c: &ProgramConfig<C>| {
            let mut faults = c.check();
            faults.extend(check(&c.service));
            faults
        })?;
    telemetry::init_logs(&config.log)?;
    telemetry::metrics();
    // Files belong to one process; without any, there may be many.
    let on_files = config.broker == BrokerKind::Embedded || config.database == DatabaseKind::Sqlite;
    let _data_dir = if on_files {
        let data_dir = DataDir::claim(&config.data_dir)?;
        let (token, _) = data_dir.admin_token()?;
        http(&mut config.service).admin_token.get_or_insert(token);
        Some(data_dir)
    } else {
        if http(&mut config.service).admin_token.is_none() {
            tracing::warn!("no admin token is set (service.http.admin_token): whatever needs one is refused");
        }
        None
    };
    let clock = Clock::system();
    let opened = match config.broker {
        BrokerKind::Nats => Opened::Nats(Arc::new(NatsBroker::connect(&config.nats, name).await?)),
        BrokerKind::Embedded => {
            tracing::warn!(
                service = name,
                "on an embedded broker of its own: no other process hears its events; set broker = \"nats\", or let `consign up` run all \
                 services on one"
            );
            let file = config.data_dir.join("broker.db");
            Opened::Embedded(Arc::new(EmbeddedBroker::open(&file, clock.clone()).await?))
        }
    };
    let broker: Arc<dyn Broker> = match &opened {
        Opened::Embedded(broker) => Arc::clone(broker) as _,
        Opened::Nats(broker) => Arc::clone(broker) as _,
    };
    let storage = match config.database {
        DatabaseKind::Sqlite => Storage::Sqlite(config.data_dir.join(format!("{name}.db"))),
        DatabaseKind::Postgres => Storage::Postgres(config.postgres.clone()),
    };
    let setup = Setup { storage, data_dir: config.data_dir.clone(), clock, broker };
    let running = start(config.service, setup).await?;
    println!("{name} listens on http://{}", running.address());
    stop_signal().await;
    running.shutdown(DRAIN).await;
    match opened {
        Opened::Embedded(broker) => broker.close().await,
        Opened::Nats(broker) => broker.close(CLOSE).await,
    }
    Ok(())
}
