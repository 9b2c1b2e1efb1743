//! A service's own database, and transactions that carry their events and tasks with them.
//!
//! On SQLite one writer with `BEGIN IMMEDIATE`, as there is only one anyway, and readers on connections of their own; on PostgreSQL a pool,
//! and any number of replicas. What a transaction emits and schedules is buffered and written with a fixed number of statements when it
//! commits, however many events there are.

mod group;
mod migrate;
mod postgres;
mod sql;

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, PgPool, Postgres, SqliteConnection, SqlitePool};
use thiserror::Error;
use tokio::sync::{Mutex, Notify, OwnedMutexGuard, watch};

use crate::broker::Message;
use crate::event::Cause;
use crate::outbox::{self, Emission, EmitError, Recorded};
use crate::schema::SchemaViolation;
use crate::tasks::{self, Scheduled, Task};
use crate::{Clock, Event, EventId, Lane, Timestamp};
use postgres::Bell;
use sql::Target;

pub use group::{GroupCommit, GroupError, Work};
pub use migrate::Migration;
pub use postgres::PostgresConfig;
pub use sql::{Bind, Fetch, Json, Query, Row, Rows};

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
    /// Somebody else changed the same at the same time, so nothing was done; tried again, it will see the change.
    #[error("somebody else changed {0} meanwhile")]
    Conflict(&'static str),
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

/// Where a service keeps its data.
#[derive(Clone, Debug)]
pub enum Storage {
    /// A file of its own, for one process.
    Sqlite(PathBuf),
    /// A database of its own, for any number of replicas.
    Postgres(PostgresConfig),
}

impl From<&Path> for Storage {
    fn from(path: &Path) -> Self {
        Self::Sqlite(path.to_owned())
    }
}

impl From<&PathBuf> for Storage {
    fn from(path: &PathBuf) -> Self {
        Self::Sqlite(path.clone())
    }
}

impl From<PostgresConfig> for Storage {
    fn from(config: PostgresConfig) -> Self {
        Self::Postgres(config)
    }
}

/// A service's database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Db(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    service: String,
    clock: Clock,
    store: Store,
    relay_wake: Notify,
    tasks_wake: watch::Sender<()>,
    /// The earliest due time scheduled since the kind's worker last looked, by lane.
    tasks_announced: std::sync::Mutex<HashMap<(&'static str, Lane), Timestamp>>,
    /// Committed and not yet seen by the relay, so that it need not read back what was just written.
    fresh: std::sync::Mutex<Fresh>,
    redrive_wake: watch::Sender<()>,
    /// Of the streams published to, as far as they are known.
    incarnations: std::sync::Mutex<HashMap<String, String>>,
    outbox_depth: AtomicI64,
    commits: AtomicU64,
    statements: AtomicU64,
}

#[derive(Debug)]
enum Store {
    Sqlite { path: PathBuf, writer: Arc<Mutex<Writer>>, readers: SqlitePool },
    Postgres { pool: PgPool, bell: Arc<Bell> },
}

/// What the relay has not seen yet, by lane and in order.
#[derive(Debug, Default)]
pub(crate) struct Fresh {
    express: VecDeque<(i64, Message)>,
    standard: VecDeque<(i64, Message)>,
    /// More was committed than is kept here: the rest has to be read from the table.
    overflow: bool,
}

/// So many committed events are kept in memory for the relay.
const FRESH_CAP: usize = 8192;
/// Of so many events of a round, one is standard even while express ones wait.
const STANDARD_SHARE: usize = 4;
/// Where several replicas publish, what one has committed is its own to publish for so long.
const PUBLISH_LEASE: Duration = Duration::from_secs(10);
/// A database that does not answer at start is waited for this long.
const CONNECT_LIMIT: Duration = Duration::from_secs(300);

impl Fresh {
    fn len(&self) -> usize {
        self.express.len() + self.standard.len()
    }

    /// Up to `max`: what is express first, but a share for what is not.
    fn take(&mut self, max: usize) -> Vec<(i64, Message)> {
        let reserved = self.standard.len().min(max / STANDARD_SHARE);
        let express = self.express.len().min(max - reserved);
        let standard = self.standard.len().min(max - express);
        self.express.drain(..express).chain(self.standard.drain(..standard)).collect()
    }
}

#[derive(Debug)]
struct Writer {
    conn: SqliteConnection,
    /// A transaction was begun and neither committed nor rolled back.
    open: bool,
}

/// What was done on a database, for tests that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DbStats {
    /// Transactions committed.
    pub commits: u64,
    /// Statements executed in transactions, begin and commit included.
    pub statements: u64,
}

impl Db {
    /// Opens or makes the database of `service` and brings it to today's schema.
    ///
    /// A commit survives a power failure: SQLite with `synchronous=FULL`, PostgreSQL with `synchronous_commit=on`.
    ///
    /// # Errors
    /// It cannot be opened or migrated. A PostgreSQL server that does not answer is waited for, up to five minutes.
    pub async fn open(
        storage: impl Into<Storage>,
        service: &str,
        migrations: &'static [Migration],
        clock: Clock,
    ) -> Result<Self, DbError> {
        let now = clock.now();
        let (store, depth): (Store, i64) = match storage.into() {
            Storage::Sqlite(path) => open_sqlite(path, migrations, now).await?,
            Storage::Postgres(config) => {
                let pool = postgres::connect(&config, service, CONNECT_LIMIT).await?;
                let schema = config.schema;
                migrate::postgres(&pool, schema, "consign", migrate::LIBRARY, now).await?;
                migrate::postgres(&pool, schema, "service", migrations, now).await?;
                let depth =
                    sqlx::query_scalar("SELECT COUNT(*) FROM outbox_pending").fetch_one(&pool).await?;
                (Store::Postgres { pool, bell: Arc::default() }, depth)
            }
        };
        let db = Self(Arc::new(Inner {
            service: service.to_owned(),
            clock,
            store,
            relay_wake: Notify::new(),
            tasks_wake: watch::Sender::new(()),
            tasks_announced: std::sync::Mutex::default(),
            fresh: std::sync::Mutex::default(),
            redrive_wake: watch::Sender::new(()),
            incarnations: std::sync::Mutex::default(),
            outbox_depth: AtomicI64::new(depth),
            commits: AtomicU64::new(0),
            statements: AtomicU64::new(0),
        }));
        if let Store::Postgres { pool, bell } = &db.0.store {
            // Both end when the pool is closed.
            tokio::spawn(Arc::clone(bell).send(pool.clone()));
            let heard = Arc::downgrade(&db.0);
            tokio::spawn(postgres::listen(pool.clone(), move || {
                if let Some(db) = heard.upgrade() {
                    db.fresh.lock().unwrap_or_else(PoisonError::into_inner).overflow = true;
                    db.relay_wake.notify_one();
                }
            }));
        }
        Ok(db)
    }

    /// The service that owns it.
    pub fn service(&self) -> &str {
        &self.0.service
    }

    /// Where the file lies, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match &self.0.store {
            Store::Sqlite { path, .. } => Some(path),
            Store::Postgres { .. } => None,
        }
    }

    /// Whether other processes may work on the same database.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.0.store, Store::Postgres { .. })
    }

    /// The clock everything in this service goes by.
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// A statement that only reads, outside any transaction; it never waits for a writer. The marks it may contain are described at
    /// [`Query`]'s module: parameters are `$1`, `$2`, … on both databases.
    pub fn query(&self, text: &'static str) -> Query<'_> {
        Query::new(self.target(), text)
    }

    /// The same, where the databases' texts differ.
    pub fn query_each(&self, sqlite: &'static str, postgres: &'static str) -> Query<'_> {
        self.query(if self.is_shared() { postgres } else { sqlite })
    }

    fn target(&self) -> Target<'_> {
        match &self.0.store {
            Store::Sqlite { readers, .. } => Target::SqlitePool(readers),
            Store::Postgres { pool, .. } => Target::PgPool(pool),
        }
    }

    /// Events recorded and not yet acknowledged by the broker. With several replicas, as of a few seconds ago.
    pub fn outbox_depth(&self) -> u64 {
        u64::try_from(self.0.outbox_depth.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// Counts what is pending, where other replicas change it too.
    pub(crate) async fn count_outbox(&self) -> Result<(), DbError> {
        if self.is_shared() {
            let depth: i64 = self.query("SELECT COUNT(*) AS n FROM outbox_pending").fetch_scalar().await?;
            self.0.outbox_depth.store(depth, Ordering::Relaxed);
        }
        Ok(())
    }

    /// See [`DbStats`].
    pub fn stats(&self) -> DbStats {
        DbStats {
            commits: self.0.commits.load(Ordering::Relaxed),
            statements: self.0.statements.load(Ordering::Relaxed),
        }
    }

    /// Begins a transaction; on SQLite it waits for the one before. Dropped without [`Tx::commit`], it is rolled back.
    pub async fn begin(&self) -> Result<Tx, DbError> {
        self.begin_for(Cause::new()).await
    }

    /// The same, for events and tasks that follow from `cause`.
    pub async fn begin_for(&self, cause: Cause) -> Result<Tx, DbError> {
        self.count_statement();
        let conn = match &self.0.store {
            Store::Sqlite { writer, .. } => {
                let mut writer = Arc::clone(writer).lock_owned().await;
                if writer.open {
                    // The last owner was dropped in the middle.
                    sqlx::raw_sql("ROLLBACK").execute(&mut writer.conn).await.ok();
                    writer.open = false;
                }
                writer.open = true;
                sqlx::query("BEGIN IMMEDIATE").execute(&mut writer.conn).await?;
                TxConn::Sqlite(writer)
            }
            Store::Postgres { pool, .. } => TxConn::Postgres(pool.begin().await?),
        };
        let state = TxState {
            conn,
            db: self.clone(),
            cause,
            emitted: Vec::new(),
            scheduled: Vec::new(),
            cancelled: Vec::new(),
            expedited: Vec::new(),
            violation: None,
        };
        Ok(Tx { state: Some(Box::new(state)), home: None })
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), DbError> {
        self.query("SELECT 1").execute().await.map(drop)
    }

    /// Closes all connections; the last one to a SQLite file writes the log back into it.
    pub async fn close(&self) {
        match &self.0.store {
            Store::Sqlite { writer, readers, .. } => {
                readers.close().await;
                let mut writer = writer.lock().await;
                if let Ok(memory) = SqliteConnection::connect("sqlite::memory:").await {
                    let old = std::mem::replace(&mut writer.conn, memory);
                    if let Err(error) = old.close().await {
                        tracing::warn!(service = self.service(), %error, "the database did not close cleanly");
                    }
                }
            }
            Store::Postgres { pool, bell } => {
                bell.ring();
                pool.close().await;
            }
        }
    }

    fn count_statement(&self) {
        self.0.statements.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn outbox_shrank(&self, by: u64) {
        self.0.outbox_depth.fetch_sub(i64::try_from(by).unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    /// What was committed since the relay last asked, up to `max`, and whether there is more in the table.
    pub(crate) fn take_fresh(&self, max: usize) -> (Vec<(i64, Message)>, bool) {
        let mut fresh = self.0.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = fresh.take(max);
        let overflow = fresh.overflow;
        if fresh.len() == 0 {
            fresh.overflow = false;
        }
        (rows, overflow)
    }

    /// Until when what is committed now is this replica's own to publish; none if there is no room to keep it in mind, so that whoever
    /// reads it from the table first may publish it.
    fn publish_lease(&self, count: usize) -> Option<Timestamp> {
        let fresh = self.0.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        (self.is_shared() && fresh.len() + count <= FRESH_CAP).then(|| self.clock().now() + PUBLISH_LEASE)
    }

    /// The earliest due time of this kind and lane scheduled since it was last asked for.
    pub(crate) fn take_announced(&self, kind: &'static str, lane: Lane) -> Option<Timestamp> {
        self.0.tasks_announced.lock().unwrap_or_else(PoisonError::into_inner).remove(&(kind, lane))
    }

    /// Which incarnation of a stream is published to now; empty if that is not known.
    pub(crate) fn incarnation(&self, stream: &str) -> String {
        self.0
            .incarnations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(stream)
            .cloned()
            .unwrap_or_default()
    }

    pub(crate) fn set_incarnation(&self, stream: &str, incarnation: &str) {
        let mut incarnations = self.0.incarnations.lock().unwrap_or_else(PoisonError::into_inner);
        incarnations.insert(stream.to_owned(), incarnation.to_owned());
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

async fn open_sqlite(
    path: PathBuf,
    migrations: &'static [Migration],
    now: Timestamp,
) -> Result<(Store, i64), DbError> {
    let options = SqliteConnectOptions::new()
        .filename(&path)
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
    migrate::sqlite(&mut conn, "consign", migrate::LIBRARY, now).await?;
    migrate::sqlite(&mut conn, "service", migrations, now).await?;
    let depth = sqlx::query_scalar("SELECT COUNT(*) FROM outbox_pending").fetch_one(&mut conn).await?;
    let readers = SqlitePoolOptions::new()
        .max_connections(4)
        .acquire_timeout(Duration::from_secs(5))
        .test_before_acquire(false)
        // Every commit of the writer empties a reader's cache, so a large one is only memory.
        .connect_with(options.read_only(true).pragma("cache_size", "-4000"))
        .await?;
    let writer = Arc::new(Mutex::new(Writer { conn, open: false }));
    Ok((Store::Sqlite { path, writer, readers }, depth))
}

/// A transaction on the service's database. Query through [`Tx::query`]; emit events and schedule tasks that exist
/// if and only if it commits.
///
/// As a handler's argument it is committed by the library after the handler returned `Ok`, together with the inbox.
#[derive(Debug)]
pub struct Tx {
    state: Option<Box<TxState>>,
    home: Option<Slot>,
}

#[derive(Debug)]
pub(crate) struct TxState {
    conn: TxConn,
    db: Db,
    cause: Cause,
    emitted: Vec<Recorded>,
    scheduled: Vec<Scheduled>,
    cancelled: Vec<(&'static str, String)>,
    expedited: Vec<(&'static str, String)>,
    violation: Option<SchemaViolation>,
}

#[derive(Debug)]
enum TxConn {
    Sqlite(OwnedMutexGuard<Writer>),
    /// Dropped, it is rolled back before its connection is used again.
    Postgres(sqlx::Transaction<'static, Postgres>),
}

impl Tx {
    /// A statement in this transaction. Parameters are `$1`, `$2`, … on both databases; the marks that stand for what differs are
    /// described at [`Query`]'s module.
    ///
    /// ```
    /// # async fn example(tx: &mut consign::Tx) -> Result<(), consign::DbError> {
    /// let counted = tx
    ///     .query("UPDATE stock SET count = count + r.more FROM {$1: id, more} WHERE stock.id = r.id")
    ///     .rows([("lamp", 2_i64), ("book", 5)])
    ///     .execute()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn query(&mut self, text: &'static str) -> Query<'_> {
        self.count_statement();
        Query::new(self.state().target(), text)
    }

    /// The same, where the databases' texts differ.
    pub fn query_each(&mut self, sqlite: &'static str, postgres: &'static str) -> Query<'_> {
        let shared = self.db().is_shared();
        self.query(if shared { postgres } else { sqlite })
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
                // There is at least one, and all have the same id.
                let id = recorded.first().map_or_else(uuid::Uuid::nil, |r| r.event_id);
                state.emitted.extend(recorded);
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
        self.schedule_for(key, payload, due, Lane::Standard, cause)
    }

    /// The same on a lane, for a task that follows from something else than the transaction's cause.
    pub fn schedule_for<T: Task>(
        &mut self,
        key: impl Into<String>,
        payload: &T,
        due: Timestamp,
        lane: Lane,
        cause: Cause,
    ) -> Result<(), DbError> {
        let scheduled = Scheduled::new(key.into(), payload, due, lane, cause)?;
        self.state().scheduled.push(scheduled);
        Ok(())
    }

    /// Removes a task, if it is still there and nobody is at it. Applied when the transaction commits.
    pub fn cancel_task<T: Task>(&mut self, key: impl Into<String>) {
        self.state().cancelled.push((T::KIND, key.into()));
    }

    /// Lets a task run now that would fall due later, if it is there and nobody is at it. Applied when the transaction commits.
    pub fn expedite_task<T: Task>(&mut self, key: impl Into<String>) {
        self.state().expedited.push((T::KIND, key.into()));
    }

    /// Commits the changes, the events and the tasks, or none of them.
    ///
    /// # Errors
    /// Nothing was committed; unless the connection to PostgreSQL was lost while it answered, when it is unknown. Whoever tries again must be
    /// able to tell, as the inbox, idempotency keys and task attempts do.
    pub async fn commit(mut self) -> Result<(), DbError> {
        let Some(mut state) = self.state.take() else { return Err(DbError::TransactionKept) };
        if let Some(violation) = state.violation.take() {
            state.rollback().await;
            return Err(DbError::InvalidEvent(violation));
        }
        state.commit().await
    }

    /// Gives everything up.
    pub async fn rollback(mut self) {
        if let Some(state) = self.state.take() {
            state.rollback().await;
        }
    }

    pub(crate) fn db(&self) -> &Db {
        &self.peek().db
    }

    fn count_statement(&self) {
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
    fn target(&mut self) -> Target<'_> {
        match &mut self.conn {
            TxConn::Sqlite(writer) => Target::Sqlite(&mut writer.conn),
            TxConn::Postgres(tx) => Target::Postgres(tx),
        }
    }

    pub(crate) fn query(&mut self, text: &'static str) -> Query<'_> {
        self.db.count_statement();
        Query::new(self.target(), text)
    }

    pub(crate) fn query_each(&mut self, sqlite: &'static str, postgres: &'static str) -> Query<'_> {
        let shared = self.db.is_shared();
        self.query(if shared { postgres } else { sqlite })
    }

    pub(crate) fn db(&self) -> &Db {
        &self.db
    }

    async fn commit(mut self) -> Result<(), DbError> {
        let emitted = std::mem::take(&mut self.emitted);
        let scheduled = std::mem::take(&mut self.scheduled);
        let cancelled = std::mem::take(&mut self.cancelled);
        let expedited = std::mem::take(&mut self.expedited);
        let lease = self.db.publish_lease(emitted.len());
        let written = async {
            let seqs = outbox::write(&mut self, &emitted, lease).await?;
            tasks::write(&mut self, &scheduled, &cancelled, &expedited).await?;
            Ok(seqs)
        };
        let seqs = match written.await {
            Ok(seqs) => seqs,
            Err(e) => {
                self.rollback().await;
                return Err(e);
            }
        };
        self.db.count_statement();
        match self.conn {
            TxConn::Sqlite(mut writer) => {
                if let Err(e) = sqlx::query("COMMIT").execute(&mut writer.conn).await {
                    // Left open, it is rolled back before the next one.
                    return Err(e.into());
                }
                writer.open = false;
            }
            TxConn::Postgres(tx) => tx.commit().await?,
        }
        self.db.0.commits.fetch_add(1, Ordering::Relaxed);
        self.db.committed(seqs, emitted, lease.is_some());
        self.db.announce(&scheduled, &expedited);
        Ok(())
    }

    async fn rollback(self) {
        match self.conn {
            TxConn::Sqlite(mut writer) => {
                if sqlx::query("ROLLBACK").execute(&mut writer.conn).await.is_ok() {
                    writer.open = false;
                }
            }
            // If that fails the connection is gone, and the transaction with it.
            TxConn::Postgres(tx) => tx.rollback().await.unwrap_or_default(),
        }
    }
}

impl Db {
    /// Hands what was just committed to the relay.
    fn committed(&self, seqs: Vec<i64>, emitted: Vec<Recorded>, leased: bool) {
        if emitted.is_empty() {
            return;
        }
        let n = i64::try_from(emitted.len()).unwrap_or(i64::MAX);
        self.0.outbox_depth.fetch_add(n, Ordering::Relaxed);
        {
            let mut fresh = self.0.fresh.lock().unwrap_or_else(PoisonError::into_inner);
            if fresh.len() + emitted.len() > FRESH_CAP || (self.is_shared() && !leased) {
                fresh.overflow = true;
            } else {
                for (seq, recorded) in seqs.into_iter().zip(emitted) {
                    let lane = match recorded.lane {
                        Lane::Express => &mut fresh.express,
                        Lane::Standard => &mut fresh.standard,
                    };
                    lane.push_back((seq, recorded.message));
                }
            }
        }
        self.0.relay_wake.notify_one();
        if let (false, Store::Postgres { bell, .. }) = (leased, &self.0.store) {
            bell.ring();
        }
    }

    /// Wakes the workers of what was just scheduled.
    fn announce(&self, scheduled: &[Scheduled], expedited: &[(&'static str, String)]) {
        if scheduled.is_empty() && expedited.is_empty() {
            return;
        }
        {
            let mut announced = self.0.tasks_announced.lock().unwrap_or_else(PoisonError::into_inner);
            let mut announce = |kind, lane, at: Timestamp| {
                let due = announced.entry((kind, lane)).or_insert(at);
                *due = at.min(*due);
            };
            for s in scheduled {
                announce(s.kind(), s.lane(), s.due());
            }
            for (kind, _) in expedited {
                for lane in Lane::ALL {
                    announce(kind, lane, self.clock().now());
                }
            }
        }
        self.0.tasks_wake.send_replace(());
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
