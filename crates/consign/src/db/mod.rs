//! A service's own database, and transactions that carry their events and tasks with them.
//!
//! One writer with `BEGIN IMMEDIATE`, as SQLite has only one anyway; readers on connections of their own. What a
//! transaction emits and schedules is buffered and written with a fixed number of statements when it commits, however many events there are.

mod group;
mod migrate;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, SqliteConnection, SqlitePool};
use thiserror::Error;
use tokio::sync::{Mutex, Notify, OwnedMutexGuard, watch};

use crate::broker::Message;
use crate::event::Cause;
use crate::outbox::{self, Emission, EmitError, Recorded};
use crate::schema::SchemaViolation;
use crate::tasks::{self, Scheduled, Task};
use crate::{Clock, Event, EventId, Timestamp};

pub use group::{GroupCommit, GroupError, Work};
pub use migrate::Migration;

/// A transaction or a query failed.
#[derive(Debug, Error)]
pub enum DbError {
    /// The database said no, or did not answer.
    #[error("database")]
    Sql(#[from] sqlx::Error),
    /// An event that breaks its schema was emitted in this transaction, which therefore cannot commit.
    #[error("an emitted event breaks its schema")]
    InvalidEvent(#[source] SchemaViolation),
    /// The handler kept the transaction instead of giving it back by returning.
    #[error("the transaction was not returned when the handler ended; do not move it into a spawned task")]
    TransactionKept,
    /// A migration that was applied before has another text now.
    #[error("migration `{set}` {version} was changed after it was applied; add a new one instead")]
    MigrationChanged {
        /// The set of migrations, `consign` or the service's.
        set: &'static str,
        /// Its number.
        version: i64,
    },
    /// The database was last used by a newer version of the program.
    #[error("the database has migration `{set}` {version}, which this version of the program does not know")]
    NewerDatabase {
        /// The set of migrations.
        set: &'static str,
        /// Its number.
        version: i64,
    },
}

/// A service's database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Db(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    service: String,
    path: PathBuf,
    clock: Clock,
    writer: Arc<Mutex<Writer>>,
    readers: SqlitePool,
    relay_wake: Notify,
    tasks_wake: watch::Sender<()>,
    /// The earliest due time scheduled since the kind's worker last looked.
    tasks_announced: std::sync::Mutex<HashMap<&'static str, Timestamp>>,
    /// Committed and not yet seen by the relay, so that it need not read back what was just written.
    fresh: std::sync::Mutex<Fresh>,
    redrive_wake: watch::Sender<()>,
    outbox_depth: AtomicI64,
    commits: AtomicU64,
    statements: AtomicU64,
}

/// What the relay has not seen yet.
#[derive(Debug, Default)]
pub(crate) struct Fresh {
    /// Rows with their messages, in order.
    pub rows: Vec<(i64, Message)>,
    /// More was committed than is kept here: the rest has to be read from the table.
    pub overflow: bool,
}

/// So many committed events are kept in memory for the relay.
const FRESH_CAP: usize = 8192;

#[derive(Debug)]
struct Writer {
    conn: SqliteConnection,
    /// A transaction was begun and neither committed nor rolled back.
    open: bool,
}

/// What the library itself has done on a database, for tests that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DbStats {
    /// Transactions committed.
    pub commits: u64,
    /// Statements of the library's own: begin, commit, inbox, outbox, tasks, dead letters.
    pub statements: u64,
}

impl Db {
    /// Opens or makes the SQLite file of `service` and brings it to today's schema.
    ///
    /// `synchronous=FULL`: a commit survives a power failure.
    pub async fn open(
        path: &Path,
        service: &str,
        migrations: &'static [Migration],
        clock: Clock,
    ) -> Result<Self, DbError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(5))
            .pragma("wal_autocheckpoint", "4000")
            .pragma("cache_size", "-32000")
            .pragma("temp_store", "memory")
            .statement_cache_capacity(256)
            .disable_statement_logging();
        let mut conn = SqliteConnection::connect_with(&options).await?;
        migrate::run(&mut conn, "consign", migrate::LIBRARY, clock.now()).await?;
        migrate::run(&mut conn, "service", migrations, clock.now()).await?;
        let depth: i64 =
            sqlx::query_scalar("SELECT COUNT(*) FROM outbox_pending").fetch_one(&mut conn).await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(4)
            .acquire_timeout(Duration::from_secs(5))
            .test_before_acquire(false)
            // Every commit of the writer empties a reader's cache, so a large one is only memory.
            .connect_with(options.read_only(true).pragma("cache_size", "-4000"))
            .await?;
        Ok(Self(Arc::new(Inner {
            service: service.to_owned(),
            path: path.to_owned(),
            clock,
            writer: Arc::new(Mutex::new(Writer { conn, open: false })),
            readers,
            relay_wake: Notify::new(),
            tasks_wake: watch::Sender::new(()),
            tasks_announced: std::sync::Mutex::default(),
            fresh: std::sync::Mutex::default(),
            redrive_wake: watch::Sender::new(()),
            outbox_depth: AtomicI64::new(depth),
            commits: AtomicU64::new(0),
            statements: AtomicU64::new(0),
        })))
    }

    /// The service that owns it.
    pub fn service(&self) -> &str {
        &self.0.service
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The clock everything in this service goes by.
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// Connections that only read, and never wait for the writer.
    pub fn readers(&self) -> &SqlitePool {
        &self.0.readers
    }

    /// Events recorded and not yet acknowledged by the broker.
    pub fn outbox_depth(&self) -> u64 {
        u64::try_from(self.0.outbox_depth.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// See [`DbStats`].
    pub fn stats(&self) -> DbStats {
        DbStats {
            commits: self.0.commits.load(Ordering::Relaxed),
            statements: self.0.statements.load(Ordering::Relaxed),
        }
    }

    /// Begins a transaction; waits for the one before. Dropped without [`Tx::commit`], it is rolled back.
    pub async fn begin(&self) -> Result<Tx, DbError> {
        self.begin_for(Cause::new()).await
    }

    /// The same, for events and tasks that follow from `cause`.
    pub async fn begin_for(&self, cause: Cause) -> Result<Tx, DbError> {
        let mut writer = Arc::clone(&self.0.writer).lock_owned().await;
        if writer.open {
            // The last owner was dropped in the middle.
            sqlx::raw_sql("ROLLBACK").execute(&mut writer.conn).await.ok();
            writer.open = false;
        }
        self.count_statement();
        writer.open = true;
        sqlx::query("BEGIN IMMEDIATE").execute(&mut writer.conn).await?;
        let state = TxState {
            writer,
            db: self.clone(),
            cause,
            emitted: Vec::new(),
            scheduled: Vec::new(),
            cancelled: Vec::new(),
            violation: None,
        };
        Ok(Tx { state: Some(Box::new(state)), home: None })
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), DbError> {
        sqlx::query("SELECT 1").execute(self.readers()).await?;
        Ok(())
    }

    /// Closes all connections, the last of which writes the log back into the file.
    pub async fn close(&self) {
        self.0.readers.close().await;
        let mut writer = self.0.writer.lock().await;
        if let Ok(memory) = SqliteConnection::connect("sqlite::memory:").await {
            let old = std::mem::replace(&mut writer.conn, memory);
            if let Err(error) = old.close().await {
                tracing::warn!(service = self.service(), %error, "the database did not close cleanly");
            }
        }
    }

    pub(crate) fn count_statement(&self) {
        self.0.statements.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn outbox_shrank(&self, by: usize) {
        self.0.outbox_depth.fetch_sub(i64::try_from(by).unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    /// What was committed since the relay last asked.
    pub(crate) fn take_fresh(&self) -> Fresh {
        std::mem::take(&mut *self.0.fresh.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The earliest due time of this kind scheduled since it was last asked for.
    pub(crate) fn take_announced(&self, kind: &'static str) -> Option<Timestamp> {
        self.0.tasks_announced.lock().unwrap_or_else(PoisonError::into_inner).remove(kind)
    }

    pub(crate) fn relay_wake(&self) -> &Notify {
        &self.0.relay_wake
    }

    pub(crate) fn tasks_wake(&self) -> &watch::Sender<()> {
        &self.0.tasks_wake
    }

    pub(crate) fn redrive_wake(&self) -> &watch::Sender<()> {
        &self.0.redrive_wake
    }
}

/// A transaction on the service's database. Query through [`Tx::sqlite`]; emit events and schedule tasks that exist
/// if and only if it commits.
///
/// As a handler's argument it is committed by the library after the handler returned `Ok`, together with the inbox.
#[derive(Debug)]
pub struct Tx {
    state: Option<Box<TxState>>,
    home: Option<Slot>,
}

#[derive(Debug)]
struct TxState {
    writer: OwnedMutexGuard<Writer>,
    db: Db,
    cause: Cause,
    emitted: Vec<Recorded>,
    scheduled: Vec<Scheduled>,
    cancelled: Vec<(&'static str, String)>,
    violation: Option<SchemaViolation>,
}

impl Tx {
    /// The connection, for queries.
    pub fn sqlite(&mut self) -> &mut SqliteConnection {
        &mut self.state().writer.conn
    }

    /// The moment by the service's clock.
    pub fn now(&self) -> Timestamp {
        self.peek().db.clock().now()
    }

    /// What events and tasks follow from unless they say otherwise.
    pub fn cause(&self) -> &Cause {
        &self.peek().cause
    }

    pub(crate) fn set_cause(&mut self, cause: Cause) {
        self.state().cause = cause;
    }

    /// Records an event, to be published after the commit: at least once, with one id.
    ///
    /// # Errors
    /// The event breaks its own schema. The transaction cannot commit any more, even if the error is ignored.
    pub fn emit<E: Event>(&mut self, emission: Emission<E>) -> Result<EventId, EmitError> {
        let state = self.state();
        match outbox::record(emission, &state.cause, state.db.service(), state.db.clock().now()) {
            Ok(recorded) => {
                let id = recorded.event_id;
                state.emitted.push(recorded);
                Ok(id)
            }
            Err(e) => {
                if let EmitError::Invalid(violation) = &e {
                    state.violation = Some(violation.clone());
                }
                Err(e)
            }
        }
    }

    /// Publishes a message that is no event of a contract: dead letters.
    pub(crate) fn emit_raw(&mut self, recorded: Recorded) {
        self.state().emitted.push(recorded);
    }

    /// Leaves work for later. A task of the same kind and key that is there already stays as it is.
    pub fn schedule<T: Task>(
        &mut self,
        key: impl Into<String>,
        payload: &T,
        due: Timestamp,
    ) -> Result<(), DbError> {
        let cause = self.peek().cause.clone();
        self.schedule_for(key, payload, due, cause)
    }

    /// The same, for a task that follows from something else than the transaction's cause.
    pub fn schedule_for<T: Task>(
        &mut self,
        key: impl Into<String>,
        payload: &T,
        due: Timestamp,
        cause: Cause,
    ) -> Result<(), DbError> {
        let scheduled = Scheduled::new(key.into(), payload, due, cause)?;
        self.state().scheduled.push(scheduled);
        Ok(())
    }

    /// Removes a task, if it is still there and nobody is at it. Applied when the transaction commits.
    pub fn cancel_task<T: Task>(&mut self, key: impl Into<String>) {
        self.state().cancelled.push((T::KIND, key.into()));
    }

    /// Commits the changes, the events and the tasks, or none of them.
    pub async fn commit(mut self) -> Result<(), DbError> {
        let Some(mut state) = self.state.take() else { return Err(DbError::TransactionKept) };
        if let Some(violation) = state.violation.take() {
            state.rollback().await;
            return Err(DbError::InvalidEvent(violation));
        }
        let result = state.write_and_commit().await;
        if result.is_err() {
            state.rollback().await;
        }
        result
    }

    /// Gives everything up.
    pub async fn rollback(mut self) {
        if let Some(mut state) = self.state.take() {
            state.rollback().await;
        }
    }

    pub(crate) fn db(&self) -> &Db {
        &self.peek().db
    }

    pub(crate) fn count_statement(&self) {
        self.peek().db.count_statement();
    }

    #[expect(
        clippy::expect_used,
        reason = "taken only by commit, rollback and drop, which consume the transaction"
    )]
    fn state(&mut self) -> &mut TxState {
        self.state.as_mut().expect("a transaction in use has its state")
    }

    #[expect(clippy::expect_used, reason = "as above")]
    fn peek(&self) -> &TxState {
        self.state.as_ref().expect("a transaction in use has its state")
    }
}

impl TxState {
    async fn write_and_commit(&mut self) -> Result<(), DbError> {
        let conn = &mut self.writer.conn;
        let first_seq = outbox::write(conn, &self.db, &self.emitted).await?;
        tasks::write(conn, &self.db, &self.scheduled, &self.cancelled).await?;
        self.db.count_statement();
        sqlx::query("COMMIT").execute(conn).await?;
        self.writer.open = false;
        self.db.0.commits.fetch_add(1, Ordering::Relaxed);
        if !self.emitted.is_empty() {
            let n = i64::try_from(self.emitted.len()).unwrap_or(i64::MAX);
            self.db.0.outbox_depth.fetch_add(n, Ordering::Relaxed);
            {
                let mut fresh = self.db.0.fresh.lock().unwrap_or_else(PoisonError::into_inner);
                fresh.overflow |= fresh.rows.len() + self.emitted.len() > FRESH_CAP;
                if !fresh.overflow {
                    fresh.rows.extend((first_seq..).zip(self.emitted.drain(..).map(|r| r.message)));
                }
            }
            self.db.0.relay_wake.notify_one();
        }
        if !self.scheduled.is_empty() {
            {
                let mut announced = self.db.0.tasks_announced.lock().unwrap_or_else(PoisonError::into_inner);
                for s in &self.scheduled {
                    let due = announced.entry(s.kind()).or_insert(s.due());
                    *due = s.due().min(*due);
                }
            }
            self.db.0.tasks_wake.send_replace(());
        }
        Ok(())
    }

    async fn rollback(&mut self) {
        if sqlx::query("ROLLBACK").execute(&mut self.writer.conn).await.is_ok() {
            self.writer.open = false;
        }
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        if let (Some(home), Some(state)) = (self.home.take(), self.state.take()) {
            home.put(state);
        }
        // Otherwise the writer is released with `open` set, and the next transaction rolls this one back first.
    }
}

/// Where a transaction waits while a handler does not hold it: extracting takes it out, dropping puts it back.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slot(Arc<std::sync::Mutex<Option<Box<TxState>>>>);

impl Slot {
    pub(crate) fn new(mut tx: Tx) -> Self {
        Self(Arc::new(std::sync::Mutex::new(tx.state.take())))
    }

    fn put(&self, state: Box<TxState>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
    }

    /// The transaction, to come back here when dropped.
    pub(crate) fn lend(&self) -> Option<Tx> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(Tx { state: Some(state), home: Some(self.clone()) })
    }

    /// The transaction, for good.
    pub(crate) fn take(&self) -> Result<Tx, DbError> {
        let mut tx = self.lend().ok_or(DbError::TransactionKept)?;
        tx.home = None;
        Ok(tx)
    }
}
