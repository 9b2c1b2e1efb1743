//! What every database must do for a service, written against [`Db`] and [`Tx`]: each test is named after the promise it checks.
#![allow(clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use axum::extract::State;
use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::broker::Broker;
use crate::broker::StreamConfig;
use crate::broker::embedded::EmbeddedBroker;
use crate::config::ServiceConfig;
use crate::db::Json;
use crate::event::{Cause, Lane};
use crate::handler::{Batch, Failure};
use crate::http::idempotency;
use crate::tasks::{Leased, Task, TaskHandler, TaskOptions};
use crate::{
    Clock, Consumer, ConsumerOptions, Db, DbError, Emission, Event, Migration, Service, Timestamp, Tx, inbox,
};

/// A database under test, on real time.
pub trait Subject: Sync {
    /// A fresh one.
    fn fresh(&self) -> impl Future<Output = Db>;
    /// Another replica's view of the same; none where a database has one process.
    fn replica(&self, db: &Db) -> impl Future<Output = Option<Db>>;
}

/// What the suite keeps in a fresh database.
pub const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        name: "values",
        sqlite: "CREATE TABLE things (id TEXT PRIMARY KEY, amount INTEGER, flag INTEGER, at INTEGER, doc TEXT, body BLOB, note TEXT)",
        postgres: "CREATE TABLE things (id UUID PRIMARY KEY, amount BIGINT, flag BOOLEAN, at TIMESTAMPTZ, doc JSONB, body BYTEA, note TEXT)",
    },
    Migration::new(
        2,
        "counters",
        "CREATE TABLE counters (name TEXT PRIMARY KEY, n BIGINT NOT NULL CHECK (n >= 0))",
    ),
];

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "things.counted", version = 1)]
struct Counted {
    n: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "things.weighed", version = 1)]
struct Weighed {
    n: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Tick {
    n: u32,
}

impl Task for Tick {
    const KIND: &'static str = "tick";
}

/// Runs the whole suite; panics at the first broken promise.
pub async fn run(subject: &impl Subject) {
    type Test<'a> = (&'static str, Pin<Box<dyn Future<Output = ()> + 'a>>);
    let tests: Vec<Test<'_>> = vec![
        ("values come back as they went in", Box::pin(values(subject))),
        ("a batch is one statement", Box::pin(batches(subject))),
        ("a transaction is all or nothing", Box::pin(all_or_nothing(subject))),
        ("a violated constraint is the statement's fault, and rolls back", Box::pin(constraints(subject))),
        ("an event is claimed once per consumer", Box::pin(claims(subject))),
        ("concurrent claims of the same events let one through", Box::pin(concurrent_claims(subject))),
        ("what commits is published, once and in order", Box::pin(publishes(subject))),
        ("a row that commits late is not passed over", Box::pin(late_commit(subject))),
        ("what a replica left behind is published by another", Box::pin(left_behind(subject))),
        ("tasks run once, whoever runs them", Box::pin(tasks(subject))),
        ("express tasks run first", Box::pin(express_tasks_first(subject))),
        (
            "replicas that handle several kinds of events do not wait for each other in a circle",
            Box::pin(several_kinds(subject)),
        ),
        ("an idempotency key has one answer", Box::pin(idempotency_keys(subject))),
        ("concurrent changes of one row add up", Box::pin(concurrent_changes(subject))),
        ("migrations run once, however many start together", Box::pin(migrations(subject))),
    ];
    for (name, test) in tests {
        println!("conformance: {name}");
        test.await;
    }
}

/// Waits for a condition, in real time.
async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < Duration::from_secs(30), "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The database, and where there may be one a second replica of it; without, both are the same.
async fn pair(subject: &impl Subject) -> (Db, Db) {
    let db = subject.fresh().await;
    let other = subject.replica(&db).await.unwrap_or_else(|| db.clone());
    (db, other)
}

async fn values(subject: &impl Subject) {
    let db = subject.fresh().await;
    let (id, at) = (Uuid::now_v7(), Timestamp::from_millis(1_767_225_600_123));
    let doc: Value = json!({"a": [1, "two", null], "ü": {"b": true}});
    let body = Bytes::from_static(b"\x00\xff bytes");
    let mut tx = db.begin().await.expect("a transaction");
    tx.query(
        "INSERT INTO things (id, amount, flag, at, doc, body, note) VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(id)
    .bind(i64::MIN)
    .bind(true)
    .bind(at)
    .bind(Json(doc.clone()))
    .bind(body.clone())
    .bind("it's \"quoted\"")
    .execute()
    .await
    .expect("an insert");
    let empty = Uuid::now_v7();
    tx.query("INSERT INTO things (id, amount, at, doc, note) VALUES ($1, $2, $3, $4, $5)")
        .bind(empty)
        .bind(None::<i64>)
        .bind(None::<Timestamp>)
        .bind(None::<Json<Value>>)
        .bind(None::<&str>)
        .execute()
        .await
        .expect("an insert of nothing");
    tx.commit().await.expect("a commit");
    let rows = db.query("SELECT * FROM things ORDER BY id").fetch_all().await.expect("rows");
    let row = &rows[0];
    assert_eq!(row.get::<Uuid>("id").expect("a uuid"), id);
    assert_eq!(row.get::<i64>("amount").expect("a number"), i64::MIN);
    assert!(row.get::<bool>("flag").expect("a flag"));
    assert_eq!(row.get::<Timestamp>("at").expect("a time"), at);
    assert_eq!(row.get::<Json<Value>>("doc").expect("JSON").0, doc);
    assert_eq!(row.get::<Bytes>("body").expect("bytes"), body);
    assert_eq!(row.get::<String>("note").expect("text"), "it's \"quoted\"");
    let nothing = &rows[1];
    assert_eq!(nothing.get::<Option<i64>>("amount").expect("null"), None);
    assert_eq!(nothing.get::<Option<Timestamp>>("at").expect("null"), None);
    assert_eq!(nothing.get::<Option<String>>("note").expect("null"), None);
    assert!(nothing.get::<i64>("amount").is_err(), "nothing is no number");
    assert!(row.get::<i64>("missing").is_err());
}

async fn batches(subject: &impl Subject) {
    type Thing = (Uuid, Option<i64>, bool, Timestamp, Json<Value>, Bytes, Option<String>);
    let db = subject.fresh().await;
    let at = Timestamp::from_millis(5);
    let things: Vec<Thing> = (0..500)
        .map(|n| {
            let note = (n % 2 == 0).then(|| format!("number {n}"));
            let amount = (n % 3 == 0).then_some(n);
            (
                Uuid::now_v7(),
                amount,
                n % 2 == 0,
                at,
                Json(json!({"n": n})),
                Bytes::from(format!("{{\"n\":{n}}}")),
                note,
            )
        })
        .collect();
    let before = db.stats().statements;
    let mut tx = db.begin().await.expect("a transaction");
    let n = tx
        .query(
            "INSERT INTO things (id, amount, flag, at, doc, body, note) SELECT id, amount, flag, at, doc, body, note
             FROM {$1: id, amount, flag, at, doc, body bytes, note}",
        )
        .rows(things.clone())
        .execute()
        .await
        .expect("a batch");
    assert_eq!(n, 500);
    let changed = tx
        .query("UPDATE things SET amount = $1 + r.more FROM {$2: which, more} WHERE things.id = r.which")
        .bind(10_i64)
        .rows(things[..2].iter().map(|t| (t.0, 5_i64)))
        .execute()
        .await
        .expect("a batch of updates");
    assert_eq!(changed, 2);
    tx.commit().await.expect("a commit");
    assert_eq!(db.stats().statements - before, 4, "begin, two statements, commit");
    let rows = db
        .query("SELECT * FROM things WHERE id IN (SELECT i FROM {$1: i}) ORDER BY id")
        .rows(things[1..4].iter().map(|t| (t.0,)))
        .fetch_all()
        .await
        .expect("rows");
    let amounts: Vec<Option<i64>> = rows.iter().map(|r| r.get("amount").expect("an amount")).collect();
    assert_eq!(amounts, [Some(15), None, Some(3)]);
    assert_eq!(rows[0].get::<Json<Value>>("doc").expect("JSON").0, json!({"n": 1}));
    assert_eq!(rows[1].get::<Bytes>("body").expect("bytes"), "{\"n\":2}");
    let none =
        db.query("SELECT * FROM things WHERE id IN (SELECT i FROM {$1: i})").rows(Vec::<(Uuid,)>::new());
    assert_eq!(none.fetch_all().await.expect("no rows").len(), 0, "an empty batch is no error");
}

async fn count(db: &Db, name: &str) -> i64 {
    let row =
        db.query("SELECT n FROM counters WHERE name = $1").bind(name).fetch_optional().await.expect("a look");
    row.map_or(0, |r| r.get("n").expect("a number"))
}

async fn add(tx: &mut Tx, name: &str, n: i64) -> Result<u64, DbError> {
    tx.query("INSERT INTO counters (name, n) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET n = counters.n + excluded.n")
        .bind(name)
        .bind(n)
        .execute()
        .await
}

async fn all_or_nothing(subject: &impl Subject) {
    let db = subject.fresh().await;
    for how in ["commit", "rollback", "drop"] {
        let mut tx = db.begin().await.expect("a transaction");
        add(&mut tx, how, 1).await.expect("an insert");
        tx.emit(Emission::new(Counted { n: 1 }, how, 1)).expect("an event");
        let due = tx.now();
        tx.schedule(how, &Tick { n: 1 }, due).expect("a task");
        match how {
            "commit" => tx.commit().await.expect("a commit"),
            "rollback" => tx.rollback().await,
            _ => drop(tx),
        }
    }
    // What was dropped is gone at the latest when somebody else begins.
    db.begin().await.expect("a transaction").commit().await.expect("a commit");
    assert_eq!(
        (count(&db, "commit").await, count(&db, "rollback").await, count(&db, "drop").await),
        (1, 0, 0)
    );
    let pending: i64 =
        db.query("SELECT COUNT(*) AS n FROM outbox_pending").fetch_scalar().await.expect("a count");
    let due: i64 = db.query("SELECT COUNT(*) AS n FROM tasks").fetch_scalar().await.expect("a count");
    assert_eq!((pending, due, db.outbox_depth()), (1, 1, 1));
}

async fn constraints(subject: &impl Subject) {
    let db = subject.fresh().await;
    let mut tx = db.begin().await.expect("a transaction");
    add(&mut tx, "kept", 1).await.expect("an insert");
    let refused = add(&mut tx, "below zero", -1).await.expect_err("the check holds");
    let failure = crate::Failure::from(refused);
    assert_eq!(failure.fate, crate::handler::Fate::Retry, "{failure}");
    drop(tx);
    db.begin().await.expect("a transaction").commit().await.expect("a commit");
    assert_eq!(count(&db, "kept").await, 0);
}

async fn claims(subject: &impl Subject) {
    let db = subject.fresh().await;
    let ids: Vec<Uuid> = (0..50).map(|_| Uuid::now_v7()).collect();
    let claim = async |consumer: &str, ids: &[Uuid]| {
        let mut tx = db.begin().await.expect("a transaction");
        let claimed = inbox::claim(&mut tx, consumer, ids.to_vec()).await.expect("a claim");
        tx.commit().await.expect("a commit");
        claimed.into_iter().collect::<BTreeSet<_>>()
    };
    assert_eq!(claim("a", &ids[..30]).await, ids[..30].iter().copied().collect());
    assert_eq!(claim("a", &ids).await, ids[30..].iter().copied().collect());
    assert_eq!(claim("a", &ids).await, BTreeSet::new());
    assert_eq!(claim("b", &ids).await.len(), 50, "another consumer has its own");
}

async fn concurrent_claims(subject: &impl Subject) {
    let (db, other) = pair(subject).await;
    let ids: Vec<Uuid> = (0..200).map(|_| Uuid::now_v7()).collect();
    let mut reversed = ids.clone();
    reversed.reverse();
    let claim = async |db: &Db, ids: Vec<Uuid>| {
        let mut tx = db.begin().await.expect("a transaction");
        let claimed = inbox::claim(&mut tx, "c", ids).await.expect("a claim, and no deadlock");
        tokio::time::sleep(Duration::from_millis(50)).await;
        tx.commit().await.expect("a commit");
        claimed.len()
    };
    let (a, b) = tokio::join!(claim(&db, ids), claim(&other, reversed));
    assert_eq!(
        (a.min(b), a.max(b)),
        (0, 200),
        "one claims all, and the other waits for it and finds nothing"
    );
}

/// A broker and a service that only publishes.
async fn publisher(db: &Db) -> (Arc<EmbeddedBroker>, crate::service::Running) {
    let broker = Arc::new(EmbeddedBroker::memory(Clock::system()));
    let running = publish_to(db, &broker).await;
    (broker, running)
}

async fn publish_to(db: &Db, broker: &Arc<EmbeddedBroker>) -> crate::service::Running {
    Service::new(ServiceConfig::default(), db.clone(), Arc::clone(broker) as Arc<dyn Broker>, "test")
        .stream(StreamConfig::new("THINGS", &["things.>"]))
        .start()
        .await
        .expect("a service")
}

async fn emit(db: &Db, numbers: impl IntoIterator<Item = u32>) {
    let mut tx = db.begin().await.expect("a transaction");
    for n in numbers {
        tx.emit(Emission::new(Counted { n }, n.to_string(), 1)).expect("an event");
    }
    tx.commit().await.expect("a commit");
}

/// The numbers published, in order.
async fn published(broker: &EmbeddedBroker) -> Vec<u32> {
    let Ok(info) = broker.stream_info("THINGS").await else { return Vec::new() };
    let mut numbers = Vec::new();
    for sequence in 1..=info.last_sequence {
        let stored = broker.get("THINGS", sequence).await.expect("a look").expect("a message");
        let counted: Counted = serde_json::from_slice(&stored.message.payload).expect("an event");
        numbers.push(counted.n);
    }
    numbers
}

async fn publishes(subject: &impl Subject) {
    let db = subject.fresh().await;
    emit(&db, 0..300).await;
    let (broker, running) = publisher(&db).await;
    emit(&db, 300..350).await;
    until("everything published", async || published(&broker).await.len() >= 350).await;
    until("and marked", async || db.outbox_depth() == 0).await;
    let expected: Vec<u32> = (0..350).collect();
    let mut got = published(&broker).await;
    got.sort_unstable();
    assert_eq!(got, expected, "each once");
    assert_eq!(published(&broker).await[..300], expected[..300], "and one transaction's in their order");
    let left: i64 =
        db.query("SELECT COUNT(*) AS n FROM outbox_pending").fetch_scalar().await.expect("a count");
    let kept: i64 =
        db.query("SELECT COUNT(*) AS n FROM outbox_published").fetch_scalar().await.expect("a count");
    assert_eq!((left, kept), (0, 350));
    running.shutdown(Duration::from_secs(5)).await;
}

async fn late_commit(subject: &impl Subject) {
    let db = subject.fresh().await;
    let Some(other) = subject.replica(&db).await else {
        println!("  one process writes one after the other: nothing can commit late");
        return;
    };
    let (broker, running) = publisher(&db).await;
    let mut early = other.begin().await.expect("a transaction");
    // It has taken its number, and commits after greater ones were published.
    early
        .query(
            "WITH new AS (INSERT INTO outbox (event_id, msg_id, subject, headers, payload, created_at)
                          VALUES ($1, 'late', 'things.counted.v1.standard', '[]', $2, $3) RETURNING seq)
             INSERT INTO outbox_pending (seq, lane, not_before) SELECT seq, 1, $3 FROM new",
        )
        .bind(Uuid::now_v7())
        .bind(Bytes::from_static(b"{\"n\":7}"))
        .bind(Timestamp::from_millis(0))
        .execute()
        .await
        .expect("a row");
    emit(&db, 100..200).await;
    until("the later ones", async || published(&broker).await.len() == 100).await;
    early.commit().await.expect("a commit");
    until("the late one", async || published(&broker).await.contains(&7)).await;
    assert_eq!(published(&broker).await.len(), 101);
    running.shutdown(Duration::from_secs(5)).await;
}

async fn left_behind(subject: &impl Subject) {
    let (db, other) = pair(subject).await;
    // Committed by a replica that is gone before it could publish.
    emit(&db, 0..10).await;
    let (broker, running) = publisher(&other).await;
    until("the other publishes it", async || published(&broker).await.len() == 10).await;
    running.shutdown(Duration::from_secs(5)).await;
}

/// Counts runs per task.
#[derive(Clone, Default)]
struct Clicks {
    runs: Arc<Mutex<Vec<u32>>>,
    failing: Arc<AtomicU32>,
    /// Ticks from [`SLOW`] on wait for this.
    gate: Arc<Notify>,
}

const SLOW: u32 = 5000;

#[async_trait]
impl TaskHandler for Clicks {
    type Task = Tick;
    type Context = ();
    type Output = ();

    async fn prepare(&self, _: &mut Tx, tasks: &[Leased<Tick>]) -> Result<Vec<()>, DbError> {
        Ok(vec![(); tasks.len()])
    }

    async fn run(&self, task: &Leased<Tick>, (): &()) -> Result<(), Failure> {
        if self.failing.load(Ordering::SeqCst) > 0 {
            self.failing.fetch_sub(1, Ordering::SeqCst);
            return Err(Failure::pause("not now"));
        }
        if task.payload.n >= SLOW {
            self.gate.notified().await;
        }
        self.runs.lock().expect("a lock").push(task.payload.n);
        Ok(())
    }

    async fn finish(&self, tx: &mut Tx, done: &[(Leased<Tick>, ())]) -> Result<(), DbError> {
        add(tx, "ticks", i64::try_from(done.len()).expect("a few")).await.map(drop)
    }
}

async fn tasks(subject: &impl Subject) {
    let db = subject.fresh().await;
    let other = subject.replica(&db).await;
    let broker = Arc::new(EmbeddedBroker::memory(Clock::system()));
    let clicks = Clicks::default();
    clicks.failing.store(3, Ordering::SeqCst);
    let mut tx = db.begin().await.expect("a transaction");
    let now = tx.now();
    for n in 0..200 {
        tx.schedule(n.to_string(), &Tick { n }, now).expect("a task");
    }
    // The first of a key stays as it is, and this one never comes.
    tx.schedule("0", &Tick { n: 999 }, now).expect("a task");
    tx.schedule("cancelled", &Tick { n: 1000 }, now + Duration::from_secs(1)).expect("a task");
    tx.commit().await.expect("a commit");
    let mut tx = db.begin().await.expect("a transaction");
    tx.cancel_task::<Tick>("cancelled");
    tx.commit().await.expect("a commit");
    let options = TaskOptions { concurrency: 8, ..TaskOptions::default() };
    let mut running = Vec::new();
    for db in std::iter::once(&db).chain(&other) {
        let service = Service::new(
            ServiceConfig::default(),
            db.clone(),
            Arc::clone(&broker) as Arc<dyn Broker>,
            "test",
        );
        running.push(service.tasks(clicks.clone(), options).start().await.expect("a service"));
    }
    until("all have run", async || count(&db, "ticks").await >= 200).await;
    let left: i64 = db.query("SELECT COUNT(*) AS n FROM tasks").fetch_scalar().await.expect("a count");
    let mut runs = clicks.runs.lock().expect("a lock").clone();
    runs.sort_unstable();
    assert_eq!((runs, left), ((0..200).collect::<Vec<u32>>(), 0));
    assert_eq!(count(&db, "ticks").await, 200);
    for r in running {
        r.shutdown(Duration::from_secs(5)).await;
    }
}

/// All replicas have changed their first row before any goes on to another.
#[derive(Clone)]
struct Rendezvous {
    replicas: u32,
    calls: Arc<AtomicU32>,
    met: Arc<Notify>,
}

async fn counted(
    Batch(events): Batch<Counted>,
    State(all): State<Rendezvous>,
    mut tx: Tx,
) -> Result<(), Failure> {
    touch(&mut tx, events.iter().map(|e| e.n).collect()).await?;
    let met = all.met.notified();
    if all.calls.fetch_add(1, Ordering::SeqCst) + 1 < all.replicas {
        met.await;
    } else {
        all.met.notify_waiters();
    }
    Ok(())
}

async fn weighed(Batch(events): Batch<Weighed>, mut tx: Tx) -> Result<(), Failure> {
    touch(&mut tx, events.iter().map(|e| e.n).collect()).await
}

async fn touch(tx: &mut Tx, mut rows: Vec<u32>) -> Result<(), Failure> {
    rows.sort_unstable();
    for n in rows {
        add(tx, &n.to_string(), 1).await?;
    }
    Ok(())
}

async fn several_kinds(subject: &impl Subject) {
    let db = subject.fresh().await;
    let other = subject.replica(&db).await;
    let broker = Arc::new(EmbeddedBroker::memory(Clock::system()));
    let service = |db: &Db| {
        let broker = Arc::clone(&broker) as Arc<dyn Broker>;
        let service = Service::new(ServiceConfig::default(), db.clone(), broker, "test");
        service.stream(StreamConfig::new("THINGS", &["things.>"]))
    };
    let publisher = service(&db).start().await.expect("a service");
    let mut tx = db.begin().await.expect("a transaction");
    tx.query("INSERT INTO counters (name, n) VALUES ('1', 0), ('2', 0)").execute().await.expect("rows");
    // One batch has the rows in one order, the other one in the other.
    for (counted, weighed) in [(1, 2), (2, 1)] {
        tx.emit(Emission::new(Counted { n: counted }, "c", 1)).expect("an event");
        tx.emit(Emission::new(Weighed { n: weighed }, "w", 1)).expect("an event");
    }
    tx.commit().await.expect("a commit");
    until("published", async || db.outbox_depth() == 0).await;
    let replicas = 1 + u32::from(other.is_some());
    let all = Rendezvous { replicas, calls: Arc::default(), met: Arc::default() };
    let options = ConsumerOptions { batch: 2, ..ConsumerOptions::default() };
    let mut running = vec![publisher];
    for db in std::iter::once(&db).chain(&other) {
        let consumer = Consumer::new("both", "THINGS").options(options).on(counted).on(weighed);
        let service = service(db).consumer(consumer.with_state(all.clone()));
        running.push(service.start().await.expect("a service"));
    }
    until("all is handled", async || {
        let sum: i64 =
            db.query("SELECT CAST(SUM(n) AS BIGINT) AS n FROM counters").fetch_scalar().await.expect("a sum");
        sum == 4
    })
    .await;
    assert_eq!(
        all.calls.load(Ordering::SeqCst),
        2,
        "a batch ran again: its replica was the victim of a deadlock"
    );
    for r in running {
        r.shutdown(Duration::from_secs(5)).await;
    }
}

async fn express_tasks_first(subject: &impl Subject) {
    let db = subject.fresh().await;
    let broker = Arc::new(EmbeddedBroker::memory(Clock::system()));
    let clicks = Clicks::default();
    let mut tx = db.begin().await.expect("a transaction");
    let now = tx.now();
    for n in 0..20 {
        tx.schedule(n.to_string(), &Tick { n: SLOW + n }, now).expect("a task");
    }
    tx.commit().await.expect("a commit");
    let service = Service::new(ServiceConfig::default(), db.clone(), broker as Arc<dyn Broker>, "test");
    let options = TaskOptions { concurrency: 4, ..TaskOptions::default() };
    let running = service.tasks(clicks.clone(), options).start().await.expect("a service");
    let leased = async || {
        db.query("SELECT COUNT(*) AS n FROM tasks WHERE attempts > 0")
            .fetch_scalar::<i64>()
            .await
            .expect("a count")
    };
    until("the slow ones are at work", async || leased().await == 3).await;
    let mut tx = db.begin().await.expect("a transaction");
    for n in 0..8 {
        let key = format!("express-{n}");
        tx.schedule_for(key, &Tick { n }, now, Lane::Express, Cause::new()).expect("a task");
    }
    tx.commit().await.expect("a commit");
    let runs = || clicks.runs.lock().expect("a lock").clone();
    until("the express ones pass them", async || runs().len() == 8).await;
    assert!(runs().iter().all(|n| *n < SLOW), "{:?}", runs());
    until("all have run", async || {
        clicks.gate.notify_waiters();
        runs().len() == 28
    })
    .await;
    running.shutdown(Duration::from_secs(5)).await;
}

async fn idempotency_keys(subject: &impl Subject) {
    let (db, other) = pair(subject).await;
    let print = Uuid::now_v7();
    let answer = async |db: &Db, text: &str| -> Result<(), DbError> {
        let mut tx = db.begin().await?;
        let known = idempotency::lookup(&mut tx, "op", &["key"]).await?;
        if known.is_empty() {
            idempotency::record(&mut tx, "op", &[("key", print, text.to_owned())]).await?;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
        tx.commit().await
    };
    let (a, b) = tokio::join!(answer(&db, "first"), answer(&other, "second"));
    let conflicts = [&a, &b].iter().filter(|r| matches!(r, Err(DbError::Conflict(_)))).count();
    assert!(a.is_ok() || b.is_ok());
    assert!(conflicts <= 1 && (a.is_ok() && b.is_ok()) == (conflicts == 0), "{a:?} {b:?}");
    let mut tx = db.begin().await.expect("a transaction");
    let known = idempotency::lookup(&mut tx, "op", &["key", "other"]).await.expect("a lookup");
    tx.rollback().await;
    assert_eq!((known.len(), known["key"].fingerprint), (1, print));
}

async fn concurrent_changes(subject: &impl Subject) {
    let (db, other) = pair(subject).await;
    let mut tx = db.begin().await.expect("a transaction");
    add(&mut tx, "shared", 100).await.expect("an insert");
    tx.commit().await.expect("a commit");
    // Each reads, thinks, and writes what it has computed: without the lock one of two would be lost.
    let take = async |db: &Db| {
        for _ in 0..20 {
            let mut tx = db.begin().await.expect("a transaction");
            let row = tx
                .query("SELECT n FROM counters WHERE name = 'shared' {lock}")
                .fetch_one()
                .await
                .expect("a row");
            let n: i64 = row.get("n").expect("a number");
            tokio::task::yield_now().await;
            tx.query("UPDATE counters SET n = $1 WHERE name = 'shared'")
                .bind(n - 1)
                .execute()
                .await
                .expect("a change");
            tx.commit().await.expect("a commit");
        }
    };
    tokio::join!(take(&db), take(&other), take(&db), take(&other));
    assert_eq!(count(&db, "shared").await, 20);
}

async fn migrations(subject: &impl Subject) {
    let db = subject.fresh().await;
    let (a, b, c) = tokio::join!(subject.replica(&db), subject.replica(&db), subject.replica(&db));
    for replica in [a, b, c].into_iter().flatten() {
        replica.ping().await.expect("an answer");
    }
    let applied: i64 = db
        .query("SELECT COUNT(*) AS n FROM migrations WHERE migration_set = 'service'")
        .fetch_scalar()
        .await
        .expect("a count");
    assert_eq!(applied, 2);
}
