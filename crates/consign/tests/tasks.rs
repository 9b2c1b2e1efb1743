//! Tasks, and circuit breakers that pause them or a consumer, on the in-memory broker and virtual time.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use axum::extract::State;
use bytes::Bytes;
use consign::breaker::{Breaker, BreakerOptions, State as BreakerState};
use consign::broker::{Broker, StreamConfig};
use consign::config::ServiceConfig;
use consign::dead_letter::{self, Filter, Status};
use consign::event::{Cause, Envelope};
use consign::http::HttpConfig;
use consign::service::Running;
use consign::tasks::{Leased, Task, TaskHandler, TaskOptions};
use consign::testing::Bench;
use consign::{Consumer, Db, DbError, Event, Failure, Migration, Received, Service, Tx};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

const MINUTES: Duration = Duration::from_secs(600);
const SECOND: Duration = Duration::from_secs(1);

const MIGRATIONS: &[Migration] = &[Migration::new(
    1,
    "rung",
    "CREATE TABLE rung (number BIGINT NOT NULL, times BIGINT NOT NULL DEFAULT 1, PRIMARY KEY (number))",
)];

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Ring {
    number: u32,
}

impl Task for Ring {
    const KIND: &'static str = "ring";
}

/// How the outside behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Well,
    /// The outside's fault.
    Away,
    /// The task's fault.
    Wrong,
    /// The task's fault, for good.
    Hopeless,
    Broken,
}

#[derive(Clone)]
struct Bell {
    mood: Arc<Mutex<Mood>>,
    /// How often the outside was called.
    calls: Arc<AtomicU32>,
    breaker: Option<Breaker>,
}

impl Bell {
    fn is(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn calls(&self) -> u32 {
        self.calls.load(Ordering::SeqCst)
    }

    /// The outside.
    fn call(&self) -> Result<(), Failure> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let mood = *self.mood.lock().unwrap();
        match mood {
            Mood::Well => Ok(()),
            Mood::Away => Err(Failure::pause("no answer")),
            Mood::Wrong => Err(Failure::retry("wrong")),
            Mood::Hopeless => Err(Failure::dead_letter("hopeless")),
            Mood::Broken => panic!("broken"),
        }
    }

    fn guarded(&self) -> Result<(), Failure> {
        let Some(breaker) = &self.breaker else { return self.call() };
        let permit = breaker.acquire()?;
        let result = self.call();
        if result.is_ok() {
            permit.succeeded();
        } else {
            permit.failed();
        }
        result
    }
}

async fn write(tx: &mut Tx, numbers: &[u32]) -> Result<(), DbError> {
    tx.query(
        "INSERT INTO rung (number) SELECT number FROM {$1: number} WHERE true
         ON CONFLICT (number) DO UPDATE SET times = rung.times + 1",
    )
    .rows(numbers.iter().map(|n| (*n,)))
    .execute()
    .await?;
    Ok(())
}

#[async_trait]
impl TaskHandler for Bell {
    type Task = Ring;
    type Context = ();
    type Output = ();

    async fn prepare(&self, _: &mut Tx, tasks: &[Leased<Ring>]) -> Result<Vec<()>, DbError> {
        Ok(vec![(); tasks.len()])
    }

    async fn run(&self, _: &Leased<Ring>, (): &()) -> Result<(), Failure> {
        self.guarded()
    }

    async fn finish(&self, tx: &mut Tx, done: &[(Leased<Ring>, ())]) -> Result<(), DbError> {
        let numbers: Vec<u32> = done.iter().map(|(task, ())| task.payload.number).collect();
        write(tx, &numbers).await
    }

    fn breaker(&self) -> Option<&Breaker> {
        self.breaker.as_ref()
    }
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "doors.opened", version = 1)]
struct Opened {
    number: u32,
}

async fn opened(Received(e): Received<Opened>, State(bell): State<Bell>, mut tx: Tx) -> Result<(), Failure> {
    bell.guarded()?;
    Ok(write(&mut tx, &[e.number]).await?)
}

struct Rig {
    bench: Bench,
    db: Db,
    bell: Bell,
    service: Running,
}

/// A window that a test fills quickly.
const BREAKER: BreakerOptions = BreakerOptions {
    window_calls: 10,
    window: Duration::from_secs(60),
    min_calls: 4,
    failure_rate: 0.5,
    slow_call: Duration::from_secs(3),
    slow_rate: 0.8,
    open_for: Duration::from_secs(5),
    open_cap: Duration::from_secs(15),
    probes: 2,
};

impl Rig {
    async fn start(breaker: Option<Breaker>) -> Self {
        let bench = Bench::start();
        let db = Db::open(&bench.file("bell.db"), "bell", MIGRATIONS, bench.time.clock()).await.unwrap();
        let bell = Bell { mood: Arc::new(Mutex::new(Mood::Well)), calls: Arc::default(), breaker };
        let http = HttpConfig { admin_token: Some("t".to_owned().into()), ..HttpConfig::default() };
        let mut consumer = Consumer::new("bell-doors", "DOORS").on(opened);
        if let Some(breaker) = &bell.breaker {
            consumer = consumer.behind(breaker);
        }
        let config = ServiceConfig { http, ..ServiceConfig::default() };
        let service = Service::new(config, db.clone(), bench.broker(), "test")
            .stream(StreamConfig::new("DOORS", &["doors.>"]))
            .tasks(bell.clone(), TaskOptions::default())
            .consumer(consumer.with_state(bell.clone()))
            .start()
            .await
            .unwrap();
        Self { bench, db, bell, service }
    }

    async fn schedule(&self, numbers: std::ops::Range<u32>, after: Duration) {
        let mut tx = self.db.begin().await.unwrap();
        let due = tx.now() + after;
        for number in numbers {
            tx.schedule(number.to_string(), &Ring { number }, due).unwrap();
        }
        tx.commit().await.unwrap();
    }

    async fn publish(&self, number: u32) {
        let envelope = Envelope {
            id: Uuid::now_v7(),
            event_type: Opened::TYPE.into(),
            version: 1,
            source: "/test".into(),
            aggregate_id: "door".into(),
            aggregate_version: 1,
            time: self.bench.time.clock().now(),
            cause: Cause::new(),
            lane: consign::Lane::Standard,
            siblings: Vec::new(),
        };
        let payload = Bytes::from(serde_json::to_vec(&Opened { number }).unwrap());
        self.bench.broker.publish(vec![envelope.into_message(None, payload)]).await.remove(0).unwrap();
    }

    async fn rung(&self) -> Vec<(u32, u32)> {
        let rows = self.db.query("SELECT number, times FROM rung ORDER BY number").fetch_all().await.unwrap();
        rows.iter().map(|r| (r.get("number").unwrap(), r.get("times").unwrap())).collect()
    }

    async fn until_rung(&self, count: usize) {
        let done = async || self.rung().await.len() == count;
        self.bench.time.until_within(MINUTES, SECOND, "all rung", done).await;
        assert!(self.rung().await.iter().all(|(_, times)| *times == 1), "each once");
    }

    async fn dead(&self) -> Vec<dead_letter::DeadLetter> {
        dead_letter::list(&self.db, &Filter::default(), Some(Status::Open), None, 10).await.unwrap()
    }

    /// In steps of a second.
    async fn an_hour_passes(&self) {
        for _ in 0..3600 {
            self.bench.time.leap(SECOND).await;
        }
    }

    async fn health(&self) -> Value {
        let url = format!("http://{}/health", self.service.address());
        reqwest::get(url).await.unwrap().json().await.unwrap()
    }

    /// What an operator asks for.
    async fn set_breaker(&self, name: &str, state: &str, token: &str) -> u16 {
        let url = format!("http://{}/admin/breakers/{name}", self.service.address());
        let request = reqwest::Client::new().post(url).bearer_auth(token).json(&json!({"state": state}));
        request.send().await.unwrap().status().as_u16()
    }
}

#[tokio::test(start_paused = true)]
async fn tasks_run_when_due_once_per_key_unless_cancelled_or_expedited() {
    let rig = Rig::start(None).await;
    rig.schedule(1..2, Duration::from_secs(60)).await;
    rig.schedule(1..2, SECOND).await;
    rig.schedule(2..3, Duration::from_secs(60)).await;
    rig.schedule(3..4, Duration::from_secs(6000)).await;
    let mut tx = rig.db.begin().await.unwrap();
    tx.cancel_task::<Ring>("2");
    tx.expedite_task::<Ring>("3");
    tx.commit().await.unwrap();
    let expedited = async || rig.rung().await == [(3, 1)];
    rig.bench.time.until("the expedited one", expedited).await;
    rig.bench.time.advance(Duration::from_secs(57)).await;
    assert_eq!(rig.bell.calls(), 1, "the first of a key stays as it is");
    rig.bench.time.advance(Duration::from_secs(4)).await;
    rig.bench.time.until("the bell", async || rig.rung().await == [(1, 1), (3, 1)]).await;
    rig.bench.time.advance(Duration::from_secs(120)).await;
    assert_eq!(rig.bell.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_is_the_outsides_fault_is_tried_for_ever() {
    let rig = Rig::start(None).await;
    rig.bell.is(Mood::Away);
    rig.schedule(1..2, Duration::ZERO).await;
    let often = async || rig.bell.calls() >= 20;
    rig.bench.time.until_within(MINUTES * 6, SECOND, "twenty tries", often).await;
    assert!(rig.dead().await.is_empty());
    rig.bell.is(Mood::Well);
    rig.until_rung(1).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_the_tasks_fault_is_counted_and_then_a_dead_letter_that_can_be_redriven() {
    for (mood, calls, reason) in [
        (Mood::Wrong, 5, "retries_exhausted"),
        (Mood::Broken, 5, "retries_exhausted"),
        (Mood::Hopeless, 1, "permanent"),
    ] {
        let rig = Rig::start(None).await;
        rig.bell.is(mood);
        rig.schedule(1..2, Duration::ZERO).await;
        let dead = async || rig.dead().await.len() == 1;
        rig.bench.time.until_within(MINUTES, SECOND, "a dead letter", dead).await;
        let letter = rig.dead().await.remove(0);
        assert_eq!((rig.bell.calls(), &*letter.reason, &*letter.consumer), (calls, reason, "ring"));
        rig.bell.is(Mood::Well);
        dead_letter::redrive(&rig.db, &Filter::default(), false, false).await.unwrap();
        rig.until_rung(1).await;
        assert!(rig.dead().await.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn an_hours_outage_burns_no_attempt_of_a_task() {
    let breaker = Breaker::new("bell-tasks", BREAKER);
    let rig = Rig::start(Some(breaker.clone())).await;
    rig.bell.is(Mood::Away);
    rig.schedule(0..500, Duration::ZERO).await;
    rig.bench.time.until("open", async || breaker.state() == BreakerState::Open).await;
    let at_first = rig.bell.calls();
    rig.an_hour_passes().await;
    let probes = rig.bell.calls() - at_first;
    assert!((200..=700).contains(&probes), "two probes each 15 s or so: {probes}");
    let health = rig.health().await;
    assert_eq!(
        (&health["status"], &health["breakers"][0]["name"]),
        (&json!("degraded"), &json!("bell-tasks"))
    );
    let counted: u32 = rig.db.query("SELECT MAX(failures) AS n FROM tasks").fetch_scalar().await.unwrap();
    assert_eq!((counted, rig.dead().await.len()), (0, 0), "nothing is counted against the tasks");
    rig.bell.is(Mood::Well);
    rig.until_rung(500).await;
    assert_eq!((breaker.state(), &rig.health().await["status"]), (BreakerState::Closed, &json!("ok")));
}

#[tokio::test(start_paused = true)]
async fn an_hours_outage_burns_no_delivery_of_a_consumer() {
    let breaker = Breaker::new("bell-events", BREAKER);
    let rig = Rig::start(Some(breaker.clone())).await;
    rig.bell.is(Mood::Away);
    for number in 0..20 {
        rig.publish(number).await;
    }
    let open = async || breaker.state() == BreakerState::Open;
    rig.bench.time.until_within(MINUTES, SECOND, "open", open).await;
    rig.an_hour_passes().await;
    let counted: u32 = rig.db.query("SELECT COUNT(*) AS n FROM failures").fetch_scalar().await.unwrap();
    assert_eq!((counted, rig.dead().await.len()), (0, 0));
    rig.bell.is(Mood::Well);
    rig.until_rung(20).await;
}

#[tokio::test(start_paused = true)]
async fn what_one_replica_has_paused_another_takes_over() {
    let sick = Breaker::new("bell-sick", BREAKER);
    sick.hold_open();
    let rig = Rig::start(Some(sick)).await;
    rig.schedule(0..50, Duration::ZERO).await;
    rig.bench.time.advance(Duration::from_secs(60)).await;
    assert_eq!(rig.bell.calls(), 0);
    let well = Bell { breaker: Some(Breaker::new("bell-well", BREAKER)), ..rig.bell.clone() };
    let _other = Service::new(ServiceConfig::default(), rig.db.clone(), rig.bench.broker(), "test")
        .tasks(well, TaskOptions::default())
        .start()
        .await
        .unwrap();
    rig.until_rung(50).await;
}

#[tokio::test(start_paused = true)]
async fn an_operator_can_hold_a_breaker_open_and_close_it() {
    let rig = Rig::start(Some(Breaker::new("bell-held", BREAKER))).await;
    assert_eq!(rig.set_breaker("bell-held", "open", "wrong").await, 401, "not everybody");
    assert_eq!(rig.set_breaker("nothing", "open", "t").await, 404);
    assert_eq!(rig.set_breaker("bell-held", "ajar", "t").await, 422);
    assert_eq!(rig.set_breaker("bell-held", "open", "t").await, 200);
    rig.schedule(0..10, Duration::ZERO).await;
    rig.bench.time.advance(Duration::from_secs(600)).await;
    assert_eq!(rig.bell.calls(), 0);
    assert_eq!(rig.set_breaker("bell-held", "closed", "t").await, 200);
    rig.until_rung(10).await;
}
