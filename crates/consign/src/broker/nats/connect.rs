//! The connection to NATS: how it is configured, made with backoff, watched, and closed in order.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::config::redacted;
use crate::retry::{self, Backoff};
use crate::telemetry;

/// A hung server is noticed after about three of these.
const PING: Duration = Duration::from_secs(5);
/// One attempt to connect takes no longer.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Between attempts to connect, at least and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Messages that one subscription holds for its reader; a slow reader loses what goes beyond, and it comes again after `AckWait`.
const SUBSCRIPTION: usize = 16 * 1024;

/// Where NATS is, who we are to it, and what we may do there.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NatsConfig {
    /// Servers of one cluster, `nats://host:port` or `tls://host:port`.
    pub urls: Vec<String>,
    /// A `.creds` file: JWT and seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials: Option<PathBuf>,
    /// A file with an NKEY seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nkey: Option<PathBuf>,
    /// A user's name, with `password`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The user's password.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "redacted")]
    pub password: Option<SecretString>,
    /// A token.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "redacted")]
    pub token: Option<SecretString>,
    /// TLS, and with a certificate of our own mutual TLS.
    pub tls: TlsConfig,
    /// What reply subjects begin with, so that a service may be allowed only its own. `_INBOX` if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inbox_prefix: Option<String>,
    /// The first connection is given up after this; zero means never. Later ones are tried for ever.
    #[serde(with = "humantime_serde")]
    pub connect_limit: Duration,
    /// Every call is given up after this.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// On how many servers each stream lives: 1, or 3 in a cluster.
    pub replicas: usize,
    /// Whether a service makes what it needs, or only binds to what `consign streams apply` made.
    pub provision: Provision,
}

/// Certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// Refuse to talk in the clear.
    pub required: bool,
    /// Whom to trust, in PEM; the system's roots if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// Our certificate, in PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<PathBuf>,
    /// Its key, in PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

/// Who makes streams and consumers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provision {
    /// The service, at start: for development.
    #[default]
    Create,
    /// `consign streams apply`; the service binds to what is there, and needs no right to change it.
    Bind,
}

impl Default for NatsConfig {
    fn default() -> Self {
        Self {
            urls: vec!["nats://127.0.0.1:4222".into()],
            credentials: None,
            nkey: None,
            user: None,
            password: None,
            token: None,
            tls: TlsConfig::default(),
            inbox_prefix: None,
            connect_limit: Duration::from_secs(300),
            timeout: Duration::from_secs(5),
            replicas: 1,
            provision: Provision::Create,
        }
    }
}

impl NatsConfig {
    /// Everything wrong with it.
    pub fn check(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut need = |ok: bool, fault: String| {
            if !ok {
                faults.push(format!("nats.{fault}"));
            }
        };
        need(
            !self.urls.is_empty(),
            "urls must name at least one server, for example nats://127.0.0.1:4222".into(),
        );
        for url in &self.urls {
            need(
                url.parse::<ServerAddr>().is_ok(),
                format!("urls: `{url}` is not a URL like nats://127.0.0.1:4222"),
            );
            need(
                !url.contains('@'),
                "urls: put no passwords into URLs, which are logged; set user and password".into(),
            );
        }
        let ways =
            [self.credentials.is_some(), self.nkey.is_some(), self.user.is_some(), self.token.is_some()];
        need(
            ways.iter().filter(|w| **w).count() <= 1,
            "credentials, nkey, user and token exclude one another; set one".into(),
        );
        need(self.user.is_some() == self.password.is_some(), "user and password must be set together".into());
        need(
            self.tls.cert.is_some() == self.tls.key.is_some(),
            "tls.cert and tls.key must be set together".into(),
        );
        need(
            self.inbox_prefix.as_deref().is_none_or(super::is_valid_subject),
            "inbox_prefix must be a subject without wildcards, for example _INBOX_order".into(),
        );
        need(matches!(self.replicas, 1 | 3 | 5), format!("replicas = {} must be 1, 3 or 5", self.replicas));
        need(
            (Duration::from_millis(100)..=Duration::from_secs(60)).contains(&self.timeout),
            format!("timeout = {:?} must be 100ms to 1m", self.timeout),
        );
        faults
    }
}

/// There is no connection, and none will be tried for any more.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// A file of the configuration cannot be used.
    #[error("nats.{setting}: {} cannot be read", path.display())]
    File {
        /// Which setting names it.
        setting: &'static str,
        /// Which file.
        path: PathBuf,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// Nobody answered in time.
    #[error(
        "no connection to NATS at {urls} within {limit:?} ({attempts} attempts); is it running there? Set nats.urls, or nats.connect_limit for how long to try"
    )]
    GivenUp {
        /// Where.
        urls: String,
        /// How long it was tried.
        limit: Duration,
        /// How often.
        attempts: u32,
        #[source]
        /// The last attempt's fault.
        last: async_nats::ConnectError,
    },
}

/// What is known of the connection, told by the client's events.
#[derive(Debug, Default)]
pub(super) struct Watch {
    connected_once: AtomicBool,
    lame_duck: AtomicBool,
    closed: Notify,
    attempts: AtomicU64,
    /// Counts connections: what was asked of the server on an earlier one is forgotten.
    epoch: watch::Sender<u64>,
    /// The last fault, until the connection is made again.
    fault: Mutex<Option<String>>,
}

impl Watch {
    fn set_fault(&self, fault: Option<String>) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    pub(super) fn fault(&self) -> Option<String> {
        let fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone();
        fault.or_else(|| {
            self.lame_duck.load(Ordering::Relaxed).then(|| "the server is shutting down".to_owned())
        })
    }

    fn heard(&self, event: &Event) {
        let kind = match event {
            Event::Connected => "connected",
            Event::Disconnected => "disconnected",
            Event::LameDuckMode => "lame_duck",
            Event::Draining => "draining",
            Event::Closed => "closed",
            Event::SlowConsumer(_) => "slow_consumer",
            Event::ServerError(_) => "server_error",
            Event::ClientError(_) => "client_error",
        };
        metrics::counter!("consign_nats_events_total", "event" => kind).increment(1);
        match event {
            Event::Connected => {
                self.set_fault(None);
                self.lame_duck.store(false, Ordering::Relaxed);
                self.epoch.send_modify(|n| *n += 1);
                if self.connected_once.swap(true, Ordering::Relaxed) {
                    let attempts = self.attempts.swap(0, Ordering::Relaxed);
                    tracing::info!(attempts, "connected to NATS again");
                }
            }
            Event::Disconnected => {
                self.set_fault(Some("disconnected".into()));
                tracing::warn!("the connection to NATS was lost; events wait in the outbox");
            }
            Event::LameDuckMode => {
                self.lame_duck.store(true, Ordering::Relaxed);
                tracing::warn!(
                    "the NATS server is shutting down (lame duck); another one will be connected to"
                );
            }
            Event::SlowConsumer(id) => {
                tracing::warn!(
                    subscription = id,
                    "deliveries were dropped: this process reads too slowly; they come again after AckWait"
                );
            }
            Event::ServerError(error) => {
                let error = error.to_string();
                // A missing right shows nowhere else: the call itself only times out.
                if error.to_ascii_lowercase().contains("permissions violation") {
                    metrics::counter!("consign_nats_permission_errors_total").increment(1);
                    tracing::error!(
                        error,
                        "NATS refuses what this service must do; grant it (docs/OPERATIONS.md lists the rights each service needs)"
                    );
                } else {
                    tracing::error!(error, "NATS reports an error");
                }
                self.set_fault(Some(error));
            }
            Event::ClientError(error) => {
                self.set_fault(Some(error.to_string()));
            }
            Event::Draining => tracing::debug!("draining"),
            Event::Closed => self.closed.notify_one(),
        }
    }

    /// The wait before another attempt, called by the client before each.
    fn before_attempt(&self, attempt: usize) -> Duration {
        if !self.connected_once.load(Ordering::Relaxed) {
            // The first connection has its own loop.
            return Duration::ZERO;
        }
        self.attempts.fetch_add(1, Ordering::Relaxed);
        let n = u32::try_from(attempt).unwrap_or(u32::MAX).saturating_sub(1);
        let delay = retry::delay(BACKOFF.0, BACKOFF.1, n);
        tracing::warn!(attempt, cause = self.fault(), retry_in = ?delay, "connecting to NATS again");
        delay
    }

    pub(super) fn epoch(&self) -> watch::Receiver<u64> {
        self.epoch.subscribe()
    }

    /// Waits until the connection is closed for good.
    pub(super) async fn closed(&self) {
        self.closed.notified().await;
    }
}

/// Connects, with exponential backoff and jitter, until it works or the limit is reached.
pub(super) async fn connect(config: &NatsConfig, name: &str) -> Result<(Client, Arc<Watch>), ConnectError> {
    let watch = Arc::new(Watch::default());
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    let started = Instant::now();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let error = match options(config, name, &watch)?.connect(&config.urls).await {
            Ok(client) => {
                watch.connected_once.store(true, Ordering::Relaxed);
                let server = client.server_info();
                tracing::info!(
                    server = server.server_name,
                    version = server.version,
                    attempts,
                    "connected to NATS"
                );
                return Ok((client, watch));
            }
            Err(error) => error,
        };
        let delay = backoff.next();
        let limit = config.connect_limit;
        if !limit.is_zero() && started.elapsed() + delay > limit {
            return Err(ConnectError::GivenUp { urls: config.urls.join(", "), limit, attempts, last: error });
        }
        tracing::warn!(
            attempt = attempts, urls = config.urls.join(", "), error = telemetry::chain(&error), retry_in = ?delay,
            "no connection to NATS yet"
        );
        tokio::time::sleep(delay).await;
    }
}

fn options(config: &NatsConfig, name: &str, watch: &Arc<Watch>) -> Result<ConnectOptions, ConnectError> {
    let (events, attempts) = (Arc::clone(watch), Arc::clone(watch));
    let mut options = ConnectOptions::new()
        .name(name)
        .ping_interval(PING)
        .connection_timeout(ATTEMPT)
        .request_timeout(Some(config.timeout))
        .subscription_capacity(SUBSCRIPTION)
        .require_tls(config.tls.required)
        .reconnect_delay_callback(move |attempt| attempts.before_attempt(attempt))
        .event_callback(move |event| {
            events.heard(&event);
            std::future::ready(())
        });
    if let Some(prefix) = &config.inbox_prefix {
        options = options.custom_inbox_prefix(prefix);
    }
    if let Some(path) = &config.credentials {
        let text = read("credentials", path)?;
        let file = |source| ConnectError::File { setting: "credentials", path: path.clone(), source };
        options = options.credentials(&text).map_err(file)?;
    }
    if let Some(path) = &config.nkey {
        options = options.nkey(read("nkey", path)?.trim().to_owned());
    }
    if let (Some(user), Some(password)) = (&config.user, &config.password) {
        options = options.user_and_password(user.clone(), password.expose_secret().to_owned());
    }
    if let Some(token) = &config.token {
        options = options.token(token.expose_secret().to_owned());
    }
    if let Some(path) = &config.tls.ca {
        read("tls.ca", path)?;
        options = options.add_root_certificates(path.clone());
    }
    if let (Some(cert), Some(key)) = (&config.tls.cert, &config.tls.key) {
        read("tls.cert", cert)?;
        read("tls.key", key)?;
        options = options.add_client_certificate(cert.clone(), key.clone());
    }
    Ok(options)
}

/// Read once to say which file is at fault; the client's own error would not.
fn read(setting: &'static str, path: &Path) -> Result<String, ConnectError> {
    std::fs::read_to_string(path).map_err(|source| ConnectError::File {
        setting,
        path: path.to_owned(),
        source,
    })
}

pub(super) fn is_connected(client: &Client) -> bool {
    client.connection_state() == State::Connected
}
