//! PostgreSQL: how it is configured and connected to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{ConnectOptions, PgPool};
use tokio::sync::Notify;

use super::DbError;
use crate::config::redacted;
use crate::retry::Backoff;
use crate::telemetry;

/// A replica that is frozen in the middle of a transaction loses it, and the locks with it, after this: well below `AckWait`, so that
/// what it held can be handled by another before it is delivered again.
const FROZEN: Duration = Duration::from_secs(10);
/// Nobody waits for a lock any longer than this.
const LOCK: Duration = Duration::from_secs(5);
/// A statement that takes longer is given up: none of ours should.
const STATEMENT: Duration = Duration::from_secs(15);
/// A connection is waited for no longer than this, whether a new one or one that somebody else uses.
const ACQUIRE: Duration = Duration::from_secs(5);
/// Other replicas are told of work no more often than this.
const COALESCE: Duration = Duration::from_millis(50);
/// What they listen to.
const CHANNEL: &str = "consign_outbox";

/// A service's own database, with a role of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PostgresConfig {
    /// `postgres://role@host:port/database?sslmode=verify-full`; without a password, which has a setting of its own.
    pub url: String,
    /// The role's password.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "redacted")]
    pub password: Option<SecretString>,
    /// Connections at most, per replica.
    pub max_connections: u32,
    /// A schema of its own in that database, made if need be; the default one if not set.
    #[serde(skip)]
    pub schema: Option<&'static str>,
}

impl Default for PostgresConfig {
    fn default() -> Self {
        Self { url: String::new(), password: None, max_connections: 16, schema: None }
    }
}

impl PostgresConfig {
    /// Everything wrong with it.
    pub fn check(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut need = |ok: bool, fault: &str| {
            if !ok {
                faults.push(format!("postgres.{fault}"));
            }
        };
        let authority =
            self.url.split_once("://").map(|(_, rest)| rest.split('/').next().unwrap_or_default());
        let user = authority.and_then(|a| a.split_once('@')).map(|(user, _)| user);
        need(
            self.url.parse::<PgConnectOptions>().is_ok_and(|o| o.get_database().is_some())
                && !self.url.is_empty(),
            "url must be like postgres://role@host:5432/database",
        );
        need(
            !user.is_some_and(|u| u.contains(':')),
            "url: put no password into it, for it is shown; set postgres.password",
        );
        need(self.max_connections >= 4, "max_connections must be at least 4");
        faults
    }

    fn options(&self, service: &str) -> Result<PgConnectOptions, DbError> {
        let millis = |d: Duration| d.as_millis().to_string();
        let mut options: PgConnectOptions = self.url.parse()?;
        if let Some(password) = &self.password {
            options = options.password(password.expose_secret());
        }
        if let Some(schema) = self.schema {
            options = options.options([("search_path", schema)]);
        }
        Ok(options
            .application_name(&format!("consign-{service}"))
            .statement_cache_capacity(256)
            .disable_statement_logging()
            .options([
                ("lock_timeout", millis(LOCK)),
                ("statement_timeout", millis(STATEMENT)),
                ("idle_in_transaction_session_timeout", millis(FROZEN)),
                // The server notices that we are gone, and lets go of our locks.
                ("tcp_keepalives_idle", "5".into()),
                ("tcp_keepalives_interval", "2".into()),
                ("tcp_keepalives_count", "3".into()),
                ("tcp_user_timeout", millis(FROZEN)),
                ("synchronous_commit", "on".into()),
                // A plan that is kept knows nothing of how a table grows: made while it was nearly empty, it would read all of it
                // again and again, just when a backlog builds up. And what a service touches is in memory, or nearly.
                ("plan_cache_mode", "force_custom_plan".into()),
                ("random_page_cost", "1.1".into()),
                ("jit", "off".into()),
            ]))
    }
}

/// Connects, with backoff, for as long as the server refuses: a database restarts now and then, and a service starts before it may be there.
pub(super) async fn connect(
    config: &PostgresConfig,
    service: &str,
    limit: Duration,
) -> Result<PgPool, DbError> {
    let options = config.options(service)?;
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    let started = tokio::time::Instant::now();
    loop {
        let pool = PgPoolOptions::new()
            .max_connections(config.max_connections)
            .acquire_timeout(ACQUIRE)
            // A broken connection shows in its first statement, which is tried again like any other.
            .test_before_acquire(false)
            .connect_with(options.clone())
            .await;
        let error = match pool {
            Ok(pool) => return Ok(pool),
            Err(error) => error,
        };
        let delay = backoff.next();
        if !is_passing(&error) || started.elapsed() + delay > limit {
            return Err(DbError::Sql(error));
        }
        tracing::warn!(service, error = telemetry::chain(&error), retry_in = ?delay, "PostgreSQL does not answer yet");
        tokio::time::sleep(delay).await;
    }
}

/// Whether trying again may help: nobody listens, or the server is starting or full. A wrong password stays wrong.
fn is_passing(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut => true,
        sqlx::Error::Database(e) => e.code().is_some_and(|c| c.starts_with("57P") || c.starts_with("53")),
        _ => false,
    }
}

/// Tells the relays of other replicas that there is work, on a connection of its own and after the commit: a NOTIFY inside a
/// transaction takes a lock that all committing transactions wait for.
#[derive(Debug, Default)]
pub(super) struct Bell {
    due: AtomicBool,
    wake: Notify,
}

impl Bell {
    pub(super) fn ring(&self) {
        if !self.due.swap(true, Ordering::Relaxed) {
            self.wake.notify_one();
        }
    }

    /// Sends what was rung, however often, as one notification.
    pub(super) async fn send(self: Arc<Self>, pool: PgPool) {
        while !pool.is_closed() {
            self.wake.notified().await;
            tokio::time::sleep(COALESCE).await;
            self.due.store(false, Ordering::Relaxed);
            if let Err(error) = sqlx::query("SELECT pg_notify($1, '')").bind(CHANNEL).execute(&pool).await {
                // They sweep in any case.
                tracing::debug!(%error, "other replicas could not be told of work");
            }
        }
    }
}

/// Calls `heard` whenever another replica has rung, until the pool is closed.
pub(super) async fn listen(pool: PgPool, heard: impl Fn()) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    while !pool.is_closed() {
        let listening = async {
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.listen(CHANNEL).await?;
            loop {
                listener.recv().await?;
                heard();
            }
        };
        let ended: Result<(), sqlx::Error> = listening.await;
        if let Err(error) = ended {
            tracing::debug!(%error, "the connection that listens was lost");
        }
        tokio::time::sleep(backoff.next()).await;
    }
}
