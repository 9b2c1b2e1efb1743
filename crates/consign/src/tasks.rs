//! Durable work in the caller's transaction: calls to the outside, deadlines, polling.
//!
//! A task is scheduled in a transaction and exists if that commits. A worker leases it, runs it outside any transaction, and
//! commits its outcome together with its removal. A crash between leaves the lease to run out, and the task runs again; so what it calls must
//! take an idempotency key.
//!
//! A run that fails says why, as a handler of events does: [`Failure::retry`] is counted, and after `retry.limit` of them the task is a dead
//! letter; [`Failure::dead_letter`] makes it one at once; [`Failure::pause`] is the outside's fault, and tried again for ever. A call refused by
//! the handler's circuit breaker counts for nothing: the worker leases no tasks until the breaker lets calls through, and others may take them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::breaker::Breaker;
use crate::broker::{Message, StoredMessage};
use crate::db::{Db, DbError, Json, Row, Tx, TxState};
use crate::dead_letter::{self, Burial, Reason};
use crate::event::{Cause, Lane};
use crate::handler::{BoxError, Failure, Fate};
use crate::retry::{Backoff, RetryPolicy};
use crate::{Timestamp, telemetry};

/// What is to be done, as it is stored.
pub trait Task: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Names its handler, for good: rows carry it.
    const KIND: &'static str;
}

/// A task a worker has leased.
#[derive(Clone, Debug)]
pub struct Leased<T> {
    id: i64,
    /// Unique among tasks of its kind.
    pub key: String,
    /// What is to be done.
    pub payload: T,
    /// How often it was taken up, this time included: above 1, something may have happened before.
    pub attempts: u32,
    /// Failures counted against it.
    pub failures: u32,
    /// Since when it could run.
    pub due_at: Timestamp,
    created_at: Timestamp,
    /// Express ones run first.
    pub lane: Lane,
    /// What it follows from.
    pub cause: Cause,
}

/// How a kind of task is worked off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TaskOptions {
    /// How many run at a time. A quarter of them is kept for express ones.
    pub concurrency: usize,
    /// A run is given up after this, and tried again later.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// A task leased for longer is taken over; longer than `timeout`.
    #[serde(with = "humantime_serde")]
    pub lease: Duration,
    /// Waits between tries, and how many counted failures make a dead letter.
    pub retry: RetryPolicy,
}

impl Default for TaskOptions {
    fn default() -> Self {
        Self {
            concurrency: 256,
            timeout: Duration::from_secs(10),
            lease: Duration::from_secs(30),
            retry: RetryPolicy::default(),
        }
    }
}

/// Does the tasks of one kind.
#[async_trait]
pub trait TaskHandler: Send + Sync + 'static {
    /// The task.
    type Task: Task + Clone;
    /// What a run needs to know, read in the transaction that leases the tasks.
    type Context: Send + Sync + 'static;
    /// What a run found out.
    type Output: Send + 'static;

    /// Reads what the runs need, for all tasks leased at once and in their order.
    async fn prepare(&self, tx: &mut Tx, tasks: &[Leased<Self::Task>])
    -> Result<Vec<Self::Context>, DbError>;

    /// Does it, outside any transaction. Given up after `timeout`, which counts as [`Failure::pause`].
    async fn run(&self, task: &Leased<Self::Task>, context: &Self::Context) -> Result<Self::Output, Failure>;

    /// Records outcomes, all that have gathered, in the transaction that removes their tasks. May run again for the same outputs if
    /// the transaction fails.
    async fn finish(&self, tx: &mut Tx, done: &[(Leased<Self::Task>, Self::Output)]) -> Result<(), DbError>;

    /// The circuit breaker around what a run calls: while it is open, no tasks are leased.
    fn breaker(&self) -> Option<&Breaker> {
        None
    }
}

/// A row of `tasks` to be.
#[derive(Debug)]
pub(crate) struct Scheduled {
    kind: &'static str,
    key: String,
    payload: Value,
    due_at: Timestamp,
    lane: Lane,
    cause: Cause,
}

impl Scheduled {
    pub(crate) fn lane(&self) -> Lane {
        self.lane
    }

    pub(crate) fn kind(&self) -> &'static str {
        self.kind
    }

    pub(crate) fn due(&self) -> Timestamp {
        self.due_at
    }

    pub(crate) fn new<T: Task>(
        key: String,
        payload: &T,
        due: Timestamp,
        lane: Lane,
        cause: Cause,
    ) -> Result<Self, DbError> {
        let payload =
            serde_json::to_value(payload).map_err(|e| DbError::Sql(sqlx::Error::Encode(Box::new(e))))?;
        Ok(Self { kind: T::KIND, key, payload, due_at: due, lane, cause })
    }
}

/// One statement for all that is scheduled, one per kind for all that is cancelled.
pub(crate) async fn write(
    tx: &mut TxState,
    scheduled: &[Scheduled],
    cancelled: &[(&'static str, String)],
    expedited: &[(&'static str, String)],
) -> Result<(), DbError> {
    let now = tx.db().clock().now();
    if !scheduled.is_empty() {
        let rows = scheduled.iter().map(|s| {
            (
                s.kind,
                s.key.as_str(),
                Json(s.payload.clone()),
                s.due_at,
                s.lane.number(),
                s.cause.correlation_id.as_str(),
                s.cause.causation_id,
                s.cause.traceparent.as_deref(),
            )
        });
        tx.query(
            "INSERT INTO tasks (kind, key, payload, due_at, lane, correlation_id, causation_id, traceparent, created_at)
             SELECT kind, key, payload, due_at, lane, correlation_id, causation_id, traceparent, $1
             FROM {$2: kind, key, payload, due_at, lane, correlation_id, causation_id, traceparent}
             WHERE true ON CONFLICT (kind, key) DO NOTHING",
        )
        .bind(now)
        .rows(rows)
        .execute()
        .await?;
    }
    for (kind, keys) in by_kind(cancelled) {
        tx.query_each(
            "DELETE FROM tasks WHERE kind = $1 AND lease_until <= $2 AND key IN (SELECT k FROM {$3: k})",
            // Somebody who has one of them locked is at it. Each is looked up by itself: together, the planner may read all of the kind.
            "WITH free AS (SELECT one.id FROM {$3: k} CROSS JOIN LATERAL
                            (SELECT id FROM tasks WHERE kind = $1 AND key = r.k AND lease_until <= $2 LIMIT 1 {skip}) AS one)
             DELETE FROM tasks USING free WHERE tasks.id = free.id",
        )
        .bind(kind)
        .bind(now)
        .rows(keys.into_iter().map(|k| (k,)))
        .execute()
        .await?;
    }
    for (kind, keys) in by_kind(expedited) {
        tx.query_each(
            "UPDATE tasks SET due_at = $2 WHERE kind = $1 AND lease_until <= $2 AND due_at > $2 AND key IN (SELECT k FROM {$3: k})",
            "WITH free AS (SELECT one.id FROM {$3: k} CROSS JOIN LATERAL
                            (SELECT id FROM tasks WHERE kind = $1 AND key = r.k AND lease_until <= $2 AND due_at > $2 LIMIT 1 {skip}) AS one)
             UPDATE tasks SET due_at = $2 FROM free WHERE tasks.id = free.id",
        )
        .bind(kind)
        .bind(now)
        .rows(keys.into_iter().map(|k| (k,)))
        .execute()
        .await?;
    }
    Ok(())
}

/// Keys of each kind, sorted, so that replicas that want the same ones wait for each other rather than in a circle.
fn by_kind<'a>(keys: &'a [(&'static str, String)]) -> BTreeMap<&'static str, Vec<&'a str>> {
    let mut by_kind: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (kind, key) in keys {
        by_kind.entry(kind).or_default().push(key);
    }
    for keys in by_kind.values_mut() {
        keys.sort_unstable();
    }
    by_kind
}

/// Works off one kind of task until told to stop, then finishes what is under way. Each lane by itself, so that express tasks do not wait for
/// commits of the others.
pub(crate) async fn work<H: TaskHandler>(
    db: Db,
    handler: Arc<H>,
    options: TaskOptions,
    stop: CancellationToken,
) {
    if !released(&db, H::Task::KIND, &stop).await {
        return;
    }
    let at_work = Arc::new(AtWork::default());
    let lane = |lane| {
        let (db, handler, stop) = (db.clone(), Arc::clone(&handler), stop.clone());
        let next_due = Some(db.clock().now());
        let running = JoinSet::new();
        Worker { db, handler, options, lane, running, at_work: Arc::clone(&at_work), next_due }.run(stop)
    };
    tokio::join!(lane(Lane::Express), lane(Lane::Standard));
}

/// Looks at the table after this long even if nothing was announced.
const LOOK: Duration = Duration::from_secs(10);

/// How many tasks of a kind are leased or about to be, by lane.
#[derive(Debug, Default)]
struct AtWork {
    lanes: [AtomicUsize; 2],
    /// There is room again.
    freed: Notify,
}

impl AtWork {
    fn of(&self, lane: Lane) -> usize {
        self.lanes[index(lane)].load(Ordering::Relaxed)
    }

    fn all(&self) -> usize {
        Lane::ALL.into_iter().map(|lane| self.of(lane)).sum()
    }

    fn begin(&self, lane: Lane, n: usize) {
        self.lanes[index(lane)].fetch_add(n, Ordering::Relaxed);
    }

    fn end(&self, lane: Lane, n: usize) {
        self.lanes[index(lane)].fetch_sub(n, Ordering::Relaxed);
        self.freed.notify_waiters();
    }
}

/// A task that was run, and what came of it.
type Ran<H> = (Leased<<H as TaskHandler>::Task>, Result<<H as TaskHandler>::Output, Failure>);

/// Works off one lane of one kind.
struct Worker<H: TaskHandler> {
    db: Db,
    handler: Arc<H>,
    options: TaskOptions,
    lane: Lane,
    running: JoinSet<Ran<H>>,
    at_work: Arc<AtWork>,
    /// When the next task falls due, as far as is known.
    next_due: Option<Timestamp>,
}

impl<H: TaskHandler> Worker<H> {
    async fn run(mut self, stop: CancellationToken) {
        let kind = H::Task::KIND;
        let mut wake = self.db.tasks_wake().subscribe();
        let mut redrive = self.db.redrive_wake().subscribe();
        redrive.mark_changed();
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let at_work = Arc::clone(&self.at_work);
        loop {
            wake.mark_unchanged();
            // Made before room is looked for, so that what is freed in between is not missed.
            let freed = at_work.freed.notified();
            if let Some(announced) = self.db.take_announced(kind, self.lane) {
                self.expect_at(announced);
            }
            let room = self.room();
            let due = self.next_due.is_some_and(|t| t <= self.db.clock().now());
            if due && room > 0 && !stop.is_cancelled() {
                // Taken first, so that the other lane does not take the same room.
                self.at_work.begin(self.lane, room);
                let claimed = self.claim(room).await;
                self.at_work.end(self.lane, room - claimed.as_ref().copied().unwrap_or(0));
                if let Err(error) = claimed {
                    let delay = backoff.next();
                    tracing::warn!(kind, error = telemetry::chain(&error), retry_in = ?delay, "tasks cannot be claimed");
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = stop.cancelled() => {}
                    }
                    continue;
                }
                backoff.reset();
            }
            if stop.is_cancelled() && self.running.is_empty() {
                return;
            }
            let room = self.room();
            // Open: nothing can be begun before that changes. Half-open with all probes out: what changes is that they end.
            let breaker = self.handler.breaker().filter(|b| b.permits() == 0).cloned();
            let resumes = async {
                match breaker {
                    Some(breaker) => breaker.ready().await,
                    None => std::future::pending().await,
                }
            };
            let idle = self.next_due.map_or(LOOK, |t| t.since(self.db.clock().now()).min(LOOK));
            tokio::select! {
                Some(first) = self.running.join_next(), if !self.running.is_empty() => self.collect(first).await,
                () = resumes, if !stop.is_cancelled() => {}
                _ = redrive.changed(), if self.lane == Lane::Standard && !stop.is_cancelled() => {
                    self.redrive_queued().await;
                }
                _ = wake.changed(), if room > 0 && !stop.is_cancelled() => {}
                () = freed, if room == 0 && !stop.is_cancelled() => {}
                () = tokio::time::sleep(idle), if room > 0 && !stop.is_cancelled() => self.expect_at(self.db.clock().now()),
                () = stop.cancelled(), if !stop.is_cancelled() => {}
            }
        }
    }

    fn expect_at(&mut self, due: Timestamp) {
        self.next_due = Some(self.next_due.map_or(due, |t| t.min(due)));
    }

    /// How many more the circuit breaker lets begin, if there is one.
    fn allowed(&self) -> usize {
        match self.handler.breaker().map(Breaker::permits) {
            None | Some(usize::MAX) => usize::MAX,
            Some(0) => 0,
            // Those under way are, or will be, among the probes.
            Some(probes) => probes.saturating_sub(self.at_work.all()),
        }
    }

    /// How many more may be taken up now: standard ones leave room for express ones to come, and these do not take all at once.
    fn room(&self) -> usize {
        let all = self.options.concurrency;
        let free = all.saturating_sub(self.at_work.all()).min(self.allowed());
        match self.lane {
            Lane::Express => free.min((all / 4).max(1)),
            Lane::Standard => free.min((all - all / 4).saturating_sub(self.at_work.of(self.lane))),
        }
    }

    /// Leases what is due, up to `limit`, reads what the runs need, and starts them. How many there were.
    async fn claim(&mut self, limit: usize) -> Result<usize, DbError> {
        let now = self.db.clock().now();
        let mut tx = self.db.begin().await?;
        let rows = tx
            .query_each(
                "UPDATE tasks SET lease_until = $1, attempts = attempts + 1 WHERE id IN
                   (SELECT id FROM tasks WHERE kind = $2 AND lane = $3 AND due_at <= $4 AND lease_until <= $4 ORDER BY due_at LIMIT $5)
                 RETURNING *",
                "WITH due AS (SELECT id FROM tasks WHERE kind = $2 AND lane = $3 AND due_at <= $4 AND lease_until <= $4
                              ORDER BY due_at LIMIT $5 {skip})
                 UPDATE tasks SET lease_until = $1, attempts = attempts + 1 FROM due WHERE tasks.id = due.id RETURNING tasks.*",
            )
            .bind(now + self.options.lease)
            .bind(H::Task::KIND)
            .bind(self.lane.number())
            .bind(now)
            .bind(limit)
            .fetch_all()
            .await?;
        let next_due = if rows.len() < limit {
            tx.query_each(
                "SELECT MIN(at) AS at FROM (SELECT MAX(due_at, lease_until) AS at FROM tasks
                   WHERE kind = $1 AND lane = $2 ORDER BY due_at LIMIT $3)",
                "SELECT MIN(at) AS at FROM
                   (SELECT GREATEST(due_at, lease_until) AS at FROM tasks
                    WHERE kind = $1 AND lane = $2 ORDER BY due_at LIMIT $3) AS next",
            )
            .bind(H::Task::KIND)
            .bind(self.lane.number())
            // Those leased come first; one more is the first that is not.
            .bind(self.options.concurrency + 1)
            .fetch_scalar::<Option<Timestamp>>()
            .await?
        } else {
            Some(now)
        };
        let tasks: Vec<Leased<H::Task>> = rows.iter().map(leased).collect::<Result<_, _>>()?;
        let claimed = tasks.len();
        if tasks.is_empty() {
            tx.rollback().await;
        } else {
            let contexts = self.handler.prepare(&mut tx, &tasks).await?;
            tx.commit().await?;
            for (task, context) in tasks.into_iter().zip(contexts) {
                let (handler, timeout) = (Arc::clone(&self.handler), self.options.timeout);
                self.running.spawn(async move {
                    let result = run_one(handler.as_ref(), &task, &context, timeout).await;
                    (task, result)
                });
            }
        }
        self.next_due = next_due;
        Ok(claimed)
    }

    /// Commits what has finished so far, all at once.
    async fn collect(&mut self, first: Result<Ran<H>, tokio::task::JoinError>) {
        let mut done = Vec::new();
        let mut failed = Vec::new();
        let mut next = Some(first);
        while let Some(joined) = next {
            self.at_work.end(self.lane, 1);
            match joined {
                Ok((task, Ok(output))) => done.push((task, output)),
                Ok((task, Err(error))) => failed.push((task, error)),
                // Panics are caught in `run_one`, so this is a runtime going down; leases run out.
                Err(error) => tracing::error!(%error, "a task was aborted"),
            }
            next = self.running.try_join_next();
        }
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
        for _ in 0..10 {
            match self.settle(&mut done, &failed).await {
                Ok(()) => return,
                Err(error) => {
                    let delay = backoff.next();
                    tracing::warn!(
                        kind = H::Task::KIND, error = telemetry::chain(&error), retry_in = ?delay,
                        "outcomes of tasks cannot be recorded"
                    );
                    tokio::time::sleep(delay).await;
                }
            }
        }
        tracing::error!(
            kind = H::Task::KIND,
            tasks = done.len(),
            "outcomes given up; the tasks run again when their leases end"
        );
    }

    async fn settle(
        &mut self,
        done: &mut Vec<(Leased<H::Task>, H::Output)>,
        failed: &[(Leased<H::Task>, Failure)],
    ) -> Result<(), DbError> {
        let mut tx = self.db.begin().await?;
        if !done.is_empty() {
            let ours = remove(&mut tx, done.iter().map(|(t, _)| (t.id, t.attempts)).collect()).await?;
            done.retain(|(t, _)| ours.contains(&t.id));
            self.handler.finish(&mut tx, done).await?;
        }
        let limit = self.options.retry.limit;
        let dead: Vec<(&Leased<H::Task>, &Failure, Reason)> =
            failed.iter().filter_map(|(t, f)| Some((t, f, verdict(t, f, limit)?))).collect();
        if !dead.is_empty() {
            let ours = remove(&mut tx, dead.iter().map(|(t, ..)| (t.id, t.attempts)).collect()).await?;
            for (task, failure, reason) in dead.iter().filter(|(t, ..)| ours.contains(&t.id)) {
                bury(&mut tx, task, failure, *reason).await?;
            }
        }
        let now = self.db.clock().now();
        let mut again: Vec<(i64, u32, u32, Timestamp, String)> = Vec::new();
        for (task, failure) in failed {
            let (failures, due) = match failure.fate {
                _ if verdict(task, failure, limit).is_some() => continue,
                Fate::Rejected => (task.failures, task.due_at),
                Fate::Pause => (task.failures, now + self.options.retry.delay(task.attempts)),
                Fate::Retry | Fate::DeadLetter => {
                    (task.failures + 1, now + self.options.retry.delay(task.failures + 1))
                }
            };
            self.expect_at(due);
            again.push((task.id, task.attempts, failures, due, telemetry::chain(failure.error.as_ref())));
        }
        if !again.is_empty() {
            again.sort_unstable();
            tx.query(
                "UPDATE tasks SET lease_until = $1, failures = r.f, due_at = r.due, last_error = r.error
                 FROM {$2: i, n, f, due, error} WHERE tasks.id = r.i AND attempts = r.n",
            )
            .bind(Timestamp::from_millis(0))
            .rows(again)
            .execute()
            .await?;
        }
        tx.commit().await?;
        self.count("done", done.len());
        self.count("dead_lettered", dead.len());
        let fate = |fates: &[Fate]| {
            let again =
                failed.iter().filter(|(t, f)| fates.contains(&f.fate) && verdict(t, f, limit).is_none());
            again.count()
        };
        self.count("failed", fate(&[Fate::Retry]));
        self.count("paused", fate(&[Fate::Pause]));
        self.count("rejected", fate(&[Fate::Rejected]));
        Ok(())
    }

    fn count(&self, outcome: &'static str, n: usize) {
        if n > 0 {
            metrics::counter!("consign_tasks_total", "service" => self.db.service().to_owned(), "kind" => H::Task::KIND, "outcome" => outcome)
                .increment(n as u64);
        }
    }

    /// Schedules anew the dead letters of this kind that an operator queued.
    async fn redrive_queued(&mut self) {
        let kind = H::Task::KIND;
        let redriven = async {
            loop {
                let queued = dead_letter::queued(&self.db, kind).await?;
                if queued.is_empty() {
                    return Ok::<_, DbError>(());
                }
                for (id, stored) in queued {
                    if let Err(error) = redrive::<H::Task>(&self.db, id, &stored).await {
                        dead_letter::redrive_failed(&self.db, id, &telemetry::chain(error.as_ref())).await?;
                    }
                }
            }
        };
        if let Err(error) = redriven.await {
            tracing::warn!(kind, error = telemetry::chain(&error), "dead letters cannot be redriven");
        }
    }
}

/// Why a task that failed is a dead letter now; none if it is tried again.
fn verdict<T>(task: &Leased<T>, failure: &Failure, limit: u32) -> Option<Reason> {
    match failure.fate {
        Fate::DeadLetter => Some(Reason::Permanent),
        Fate::Retry if task.failures + 1 >= limit => Some(Reason::RetriesExhausted),
        Fate::Retry | Fate::Pause | Fate::Rejected => None,
    }
}

/// Removes tasks that ended. Attempts fence: who lost the lease to somebody else finds its row changed, and it is not among the ids returned.
async fn remove(tx: &mut Tx, mut keys: Vec<(i64, u32)>) -> Result<HashSet<i64>, DbError> {
    keys.sort_unstable();
    let rows = tx
        .query("DELETE FROM tasks WHERE (id, attempts) IN (SELECT i, n FROM {$1: i, n}) RETURNING id")
        .rows(keys)
        .fetch_all()
        .await?;
    rows.iter().map(|r| r.get("id")).collect()
}

/// Headers of a task among the dead letters.
const KEY: &str = "task-key";
const LANE: &str = "lane";
const CORRELATION: &str = "correlation-id";

/// A task that is given up is a dead letter like an event: its kind is the consumer, its payload the payload.
async fn bury<T: Task>(
    tx: &mut Tx,
    task: &Leased<T>,
    failure: &Failure,
    reason: Reason,
) -> Result<(), DbError> {
    let error = telemetry::chain(failure.error.as_ref());
    tracing::error!(
        kind = T::KIND, key = task.key, reason = reason.as_str(), error,
        correlation_id = %task.cause.correlation_id, "a task became a dead letter"
    );
    let payload =
        serde_json::to_vec(&task.payload).map_err(|e| DbError::Sql(sqlx::Error::Encode(Box::new(e))))?;
    let message = Message {
        subject: format!("tasks.{}", T::KIND),
        msg_id: None,
        headers: vec![
            (KEY.into(), task.key.clone()),
            (LANE.into(), task.lane.as_str().into()),
            (CORRELATION.into(), task.cause.correlation_id.to_string()),
        ],
        payload: payload.into(),
    };
    let stored = StoredMessage { sequence: task.id.unsigned_abs(), stored_at: task.created_at, message };
    let burial = Burial {
        consumer: T::KIND,
        envelope: None,
        stream: "tasks",
        stored: &stored,
        reason,
        error: &error,
        attempts: task.failures + u32::from(failure.fate == Fate::Retry),
    };
    dead_letter::bury(tx, &burial).await.map(drop)
}

/// Makes a task of a dead letter again.
async fn redrive<T: Task>(db: &Db, id: uuid::Uuid, stored: &StoredMessage) -> Result<(), BoxError> {
    if !dead_letter::begin_redrive(db, id).await? {
        return Ok(());
    }
    let header = |name: &str| {
        let found = stored.message.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.clone()).ok_or_else(|| format!("it has no header {name}"))
    };
    let payload: T = serde_json::from_slice(&stored.message.payload)?;
    let cause = Cause { correlation_id: header(CORRELATION)?.parse()?, ..Cause::new() };
    let mut tx = db.begin_for(cause.clone()).await?;
    if dead_letter::take(&mut tx, id).await? {
        let now = tx.now();
        tx.schedule_for(header(KEY)?, &payload, now, header(LANE)?.parse()?, cause)?;
        tx.commit().await?;
        tracing::info!(kind = T::KIND, dead_letter = %id, "a dead letter is a task again");
    } else {
        tx.rollback().await;
    }
    Ok(())
}

const fn index(lane: Lane) -> usize {
    match lane {
        Lane::Express => 0,
        Lane::Standard => 1,
    }
}

async fn run_one<H: TaskHandler>(
    handler: &H,
    task: &Leased<H::Task>,
    context: &H::Context,
    timeout: Duration,
) -> Result<H::Output, Failure> {
    let run = AssertUnwindSafe(handler.run(task, context)).catch_unwind();
    let result = match tokio::time::timeout(timeout, run).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(Failure::retry(format!("panicked: {}", telemetry::panic_message(&*panic)))),
        Err(_) => Err(Failure::pause(format!("no outcome within {timeout:?}"))),
    };
    match &result {
        // The breaker has told of it once; not once more for each task.
        Ok(_) | Err(Failure { fate: Fate::Rejected, .. }) => {}
        Err(failure) => tracing::warn!(
            kind = H::Task::KIND, key = task.key, attempts = task.attempts, correlation_id = %task.cause.correlation_id,
            error = telemetry::chain(failure.error.as_ref()), "a task failed"
        ),
    }
    result
}

/// Frees leases from before the start, trying until it works. `false` if told to stop meanwhile.
async fn released(db: &Db, kind: &str, stop: &CancellationToken) -> bool {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    while let Err(error) = release_leases(db, kind).await {
        let delay = backoff.next();
        tracing::warn!(kind, error = telemetry::chain(&error), retry_in = ?delay, "leases cannot be released");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = stop.cancelled() => return false,
        }
    }
    true
}

/// At start nobody else holds a lease, where nobody else may: a SQLite file has one process. Elsewhere leases run out.
async fn release_leases(db: &Db, kind: &str) -> Result<(), DbError> {
    if db.is_shared() {
        return Ok(());
    }
    let mut tx = db.begin().await?;
    tx.query("UPDATE tasks SET lease_until = 0 WHERE kind = $1 AND lease_until > 0")
        .bind(kind)
        .execute()
        .await?;
    tx.commit().await
}

fn leased<T: Task>(row: &Row) -> Result<Leased<T>, DbError> {
    Ok(Leased {
        id: row.get("id")?,
        key: row.get("key")?,
        payload: row.get::<Json<T>>("payload")?.0,
        attempts: row.get("attempts")?,
        failures: row.get("failures")?,
        due_at: row.get("due_at")?,
        created_at: row.get("created_at")?,
        lane: if row.get::<i64>("lane")? == Lane::Express.number() { Lane::Express } else { Lane::Standard },
        cause: Cause {
            correlation_id: row.parse("correlation_id")?,
            causation_id: row.get("causation_id")?,
            traceparent: row.get("traceparent")?,
        },
    })
}

/// How far a task has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// How often it was taken up.
    pub attempts: u32,
    /// When it runs next.
    pub due_at: Timestamp,
    /// What went wrong last, with its causes.
    pub last_error: Option<String>,
}

/// How far these tasks have come, by key; those that have ended, or are dead letters, are not among them.
pub async fn progress<T: Task>(db: &Db, keys: &[String]) -> Result<HashMap<String, Progress>, DbError> {
    if keys.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = db
        .query("SELECT key, attempts, due_at, last_error FROM tasks WHERE kind = $1 AND key IN (SELECT k FROM {$2: k})")
        .bind(T::KIND)
        .rows(keys.iter().map(|k| (k.as_str(),)))
        .fetch_all()
        .await?;
    rows.iter()
        .map(|r| {
            let (attempts, due_at, last_error) = (r.get("attempts")?, r.get("due_at")?, r.get("last_error")?);
            Ok((r.get("key")?, Progress { attempts, due_at, last_error }))
        })
        .collect()
}

/// How many tasks could run now, for metrics.
pub(crate) async fn due(db: &Db) -> Result<u64, DbError> {
    db.query("SELECT COUNT(*) AS n FROM tasks WHERE due_at <= $1 AND lease_until <= $1")
        .bind(db.clock().now())
        .fetch_scalar()
        .await
}
