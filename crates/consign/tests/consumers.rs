//! Consumers, handlers, dead letters and outbox on the in-memory broker and virtual time.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use bytes::Bytes;
use consign::broker::{Broker, ConsumerConfig, Message, StreamConfig};
use consign::config::ServiceConfig;
use consign::dead_letter::{self, Filter, Status};
use consign::event::{Cause, Envelope};
use consign::service::Running;
use consign::testing::Bench;
use consign::{
    Batch, Consumer, Db, DbError, Emission, Event, Failure, Meta, Migration, Received, Service, Tx,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "things.happened", version = 1)]
struct Happened {
    #[schemars(range(min = 0, max = 1000))]
    number: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "notes.taken", version = 1)]
struct Noted {
    #[schemars(range(max = 900))]
    number: u32,
}

const MIGRATIONS: &[Migration] = &[Migration::new(
    1,
    "notes",
    "CREATE TABLE notes (number BIGINT NOT NULL, times BIGINT NOT NULL DEFAULT 1, PRIMARY KEY (number))",
)];

/// What the handlers do, as a test wants it.
#[derive(Clone, Default)]
struct Mood {
    calls: Arc<Mutex<BTreeMap<u32, u32>>>,
    fail: Arc<Mutex<BTreeMap<u32, &'static str>>>,
    slow: Arc<Mutex<Duration>>,
}

impl Mood {
    fn fails(&self, number: u32, how: &'static str) {
        self.fail.lock().unwrap().insert(number, how);
    }
    fn heals(&self) {
        self.fail.lock().unwrap().clear();
    }
    fn calls(&self, number: u32) -> u32 {
        self.calls.lock().unwrap().get(&number).copied().unwrap_or(0)
    }
    fn called(&self, number: u32) -> Result<(), Failure> {
        *self.calls.lock().unwrap().entry(number).or_default() += 1;
        let how = self.fail.lock().unwrap().get(&number).copied();
        match how {
            None => Ok(()),
            Some("retry") => Err(Failure::retry("not now")),
            Some("never") => Err(Failure::dead_letter("never")),
            Some("pause") => Err(Failure::pause("the database is away")),
            Some(_) => panic!("as told"),
        }
    }
}

async fn write_notes(tx: &mut Tx, numbers: &[u32]) -> Result<(), DbError> {
    tx.query(
        "INSERT INTO notes (number) SELECT number FROM {$1: number} WHERE true
         ON CONFLICT (number) DO UPDATE SET times = notes.times + 1",
    )
    .rows(numbers.iter().map(|n| (*n,)))
    .execute()
    .await?;
    Ok(())
}

async fn note(mut tx: Tx, number: u32, cause: Cause) -> Result<(), Failure> {
    write_notes(&mut tx, &[number]).await?;
    tx.emit(Emission::new(Noted { number }, number.to_string(), 1).caused_by(cause))?;
    Ok(())
}

async fn one(
    Received(e): Received<Happened>,
    State(mood): State<Mood>,
    Meta(meta): Meta,
    tx: Tx,
) -> Result<(), Failure> {
    let slow = *mood.slow.lock().unwrap();
    tokio::time::sleep(slow).await;
    // Written before the failure, so that a test sees whether it was rolled back.
    note(tx, e.number, meta.as_cause()).await?;
    mood.called(e.number)
}

async fn many(Batch(events): Batch<Happened>, State(mood): State<Mood>, mut tx: Tx) -> Result<(), Failure> {
    let numbers: Vec<u32> = events.iter().map(|e| e.number).collect();
    write_notes(&mut tx, &numbers).await?;
    numbers.into_iter().try_for_each(|n| mood.called(n))
}

struct Rig {
    bench: Bench,
    db: Db,
    mood: Mood,
    service: Running,
}

fn message(bench: &Bench, number: u32) -> Message {
    let envelope = Envelope {
        id: Uuid::now_v7(),
        event_type: Happened::TYPE.into(),
        version: 1,
        source: "/services/test".into(),
        aggregate_id: number.to_string(),
        aggregate_version: 1,
        time: bench.time.clock().now(),
        cause: Cause::new(),
        lane: consign::Lane::Standard,
        siblings: Vec::new(),
    };
    envelope.into_message(None, Bytes::from(serde_json::to_vec(&Happened { number }).unwrap()))
}

impl Rig {
    async fn start(batch: bool) -> Self {
        Self::with(Consumer::new("notes", "THINGS"), batch).await
    }

    async fn with(consumer: Consumer<Mood>, batch: bool) -> Self {
        Self::on(Bench::start(), consumer, batch).await
    }

    async fn on(bench: Bench, consumer: Consumer<Mood>, batch: bool) -> Self {
        let db = Db::open(&bench.file("notes.db"), "notes", MIGRATIONS, bench.time.clock()).await.unwrap();
        let mood = Mood::default();
        let consumer = if batch { consumer.on(many) } else { consumer.on(one) };
        bench.broker.ensure_stream(&StreamConfig::new("THINGS", &["things.>"])).await.unwrap();
        let service = Service::new(ServiceConfig::default(), db.clone(), bench.broker(), "test")
            .stream(StreamConfig::new("NOTES", &["notes.>"]))
            .consumer(consumer.with_state(mood.clone()))
            .start()
            .await
            .unwrap();
        Self { bench, db, mood, service }
    }

    fn message(&self, number: u32) -> Message {
        message(&self.bench, number)
    }

    async fn publish(&self, messages: Vec<Message>) {
        for answer in self.bench.broker.publish(messages).await {
            answer.unwrap();
        }
    }

    async fn notes(&self) -> Vec<(u32, u32)> {
        let rows =
            self.db.query("SELECT number, times FROM notes ORDER BY number").fetch_all().await.unwrap();
        rows.iter().map(|r| (r.get("number").unwrap(), r.get("times").unwrap())).collect()
    }

    async fn until_notes(&self, expected: &[(u32, u32)]) {
        let what = format!("notes {expected:?}");
        self.bench.time.until(&what, async || self.notes().await == expected).await;
    }

    async fn dead(&self, status: Status) -> Vec<dead_letter::DeadLetter> {
        dead_letter::list(&self.db, &Filter::default(), Some(status), None, 100).await.unwrap()
    }

    async fn until_dead(&self, n: usize, limit: Duration) {
        let look = async || self.dead(Status::Open).await.len() == n;
        self.bench.time.until_within(limit, Duration::from_millis(500), "dead letters", look).await;
    }

    async fn settled(&self) {
        let look = async || {
            let info = self.bench.broker.consumer_info("THINGS", "notes").await.unwrap();
            info.pending == 0 && info.ack_pending == 0
        };
        self.bench.time.until("everything settled", look).await;
    }
}

const MINUTES: Duration = Duration::from_secs(600);

#[tokio::test(start_paused = true)]
async fn an_event_takes_effect_once_and_its_own_events_follow() {
    let rig = Rig::start(false).await;
    let message = rig.message(1);
    // The broker's window does not know the second copy: another message id, the same event.
    let copy = Message { msg_id: Some("other".into()), ..message.clone() };
    rig.publish(vec![message.clone(), copy]).await;
    rig.until_notes(&[(1, 1)]).await;
    rig.settled().await;
    assert_eq!(rig.notes().await, [(1, 1)]);
    let published = async || rig.bench.broker.stream_info("NOTES").await.unwrap().messages == 1;
    rig.bench.time.until("the event that follows", published).await;
    let noted = rig.bench.broker.get("NOTES", 1).await.unwrap().unwrap();
    let (cause, effect) =
        (Envelope::from_message(&message).unwrap(), Envelope::from_message(&noted.message).unwrap());
    assert_eq!(effect.cause.causation_id, Some(cause.id));
    assert_eq!(effect.cause.correlation_id, cause.cause.correlation_id);
    assert_eq!(effect.source, "/services/notes");
}

#[tokio::test(start_paused = true)]
async fn the_fifth_failure_is_a_dead_letter_and_a_redrive_heals() {
    let rig = Rig::start(false).await;
    rig.mood.fails(1, "retry");
    rig.publish(vec![rig.message(1)]).await;
    rig.bench.time.until("the first failure", async || rig.mood.calls(1) == 1).await;
    rig.publish(vec![rig.message(2)]).await;
    rig.until_dead(1, MINUTES).await;
    assert_eq!(rig.mood.calls(1), 5, "no more and no fewer than the limit");
    assert_eq!(rig.notes().await, [(2, 1)], "what failed left nothing behind");
    rig.settled().await;
    let letter = &rig.dead(Status::Open).await[0];
    assert_eq!((letter.reason.as_str(), letter.attempts), ("retries_exhausted", 5));
    let whole = dead_letter::get(&rig.db, letter.id.parse().unwrap()).await.unwrap().unwrap();
    assert_eq!(whole.payload.unwrap()["number"], 1);
    assert!(whole.error.contains("not now"), "{}", whole.error);
    let projected = async || rig.bench.broker.stream_info("DEAD_LETTERS_NOTES").await.unwrap().messages == 1;
    rig.bench.time.until("the projection", projected).await;

    // Redriven while the fault lasts, it comes back; afterwards it heals; a third time there is nothing to do.
    let redrive =
        async || dead_letter::redrive(&rig.db, &Filter::default(), false, false).await.unwrap().len();
    assert_eq!(redrive().await, 1);
    let back = async || rig.dead(Status::Open).await.iter().any(|l| l.redrives == 1);
    rig.bench.time.until("back among the dead", back).await;
    rig.mood.heals();
    assert_eq!(redrive().await, 1);
    rig.until_notes(&[(1, 1), (2, 1)]).await;
    let redriven = async || rig.dead(Status::Redriven).await.len() == 1;
    rig.bench.time.until("redriven", redriven).await;
    assert_eq!(redrive().await, 0);
}

#[tokio::test(start_paused = true)]
async fn what_somebody_took_and_never_settled_comes_again_after_ack_wait() {
    // Another replica fetches the event, and dies.
    let bench = Bench::start();
    bench.broker.ensure_stream(&StreamConfig::new("THINGS", &["things.>"])).await.unwrap();
    let config = ConsumerConfig::new("notes", vec!["things.happened.v1.>".into()]);
    bench.broker.ensure_consumer("THINGS", &config).await.unwrap();
    bench.broker.publish(vec![message(&bench, 1)]).await.remove(0).unwrap();
    assert_eq!(bench.broker.fetch("THINGS", "notes", 1, Duration::from_secs(1)).await.unwrap().len(), 1);
    let rig = Rig::on(bench, Consumer::new("notes", "THINGS"), false).await;
    rig.bench.time.advance(Duration::from_secs(28)).await;
    assert_eq!(rig.notes().await, [], "not before AckWait");
    rig.bench.time.advance(Duration::from_secs(4)).await;
    rig.until_notes(&[(1, 1)]).await;
    rig.settled().await;
    let counted = failures(&rig.db).await;
    assert_eq!(counted, 0, "a death is not the event's failure");
}

#[tokio::test(start_paused = true)]
async fn what_the_broker_gave_up_is_taken_up_from_its_advisory() {
    let bench = Bench::start();
    for config in [
        StreamConfig::new("THINGS", &["things.>"]),
        StreamConfig::new(
            consign::advisories::STREAM,
            &["$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>", "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.>"],
        ),
    ] {
        bench.broker.ensure_stream(&config).await.unwrap();
    }
    let filters = vec!["things.happened.v1.standard".into()];
    let config = ConsumerConfig { max_deliver: Some(5), ..ConsumerConfig::new("notes", filters) };
    bench.broker.ensure_consumer("THINGS", &config).await.unwrap();
    bench.broker.publish(vec![message(&bench, 1)]).await.remove(0).unwrap();
    // Five processes die of something else, each with the event in hand.
    for _ in 0..5 {
        assert_eq!(bench.broker.fetch("THINGS", "notes", 1, Duration::from_secs(1)).await.unwrap().len(), 1);
        bench.time.advance(Duration::from_secs(31)).await;
    }
    let rig = Rig::on(bench, Consumer::new("notes", "THINGS"), false).await;
    let handled = async || rig.notes().await == [(1, 1)];
    rig.bench.time.until_within(MINUTES, Duration::from_secs(1), "run again by itself", handled).await;
    rig.settled().await;
    assert_eq!(rig.dead(Status::Open).await.len(), 0);
    let letter = rig.dead(Status::Redriven).await.remove(0);
    assert_eq!((letter.reason.as_str(), letter.stream_seq), ("exhausted", 1));
}

#[tokio::test(start_paused = true)]
async fn what_fails_every_time_it_is_run_again_waits_for_somebody_in_the_end() {
    let rig = Rig::start(false).await;
    rig.mood.fails(1, "never");
    rig.publish(vec![rig.message(1)]).await;
    rig.until_dead(1, MINUTES).await;
    // As if the broker had given it up.
    let mut tx = rig.db.begin().await.unwrap();
    tx.query("UPDATE dead_letters SET reason = 'exhausted'").execute().await.unwrap();
    tx.commit().await.unwrap();
    let before = rig.mood.calls(1);
    let tried =
        async || rig.dead(Status::Open).await.iter().any(|l| l.redrives == dead_letter::REDRIVE_LIMIT);
    rig.bench.time.until_within(MINUTES, Duration::from_secs(5), "the limit of redrives", tried).await;
    rig.bench.time.advance(Duration::from_secs(600)).await;
    assert_eq!(rig.mood.calls(1) - before, dead_letter::REDRIVE_LIMIT);
}

#[tokio::test(start_paused = true)]
async fn retries_wait_and_are_not_burned_at_once() {
    let rig = Rig::start(false).await;
    rig.mood.fails(1, "retry");
    rig.publish(vec![rig.message(1)]).await;
    rig.bench.time.until("the first call", async || rig.mood.calls(1) == 1).await;
    rig.bench.time.advance(Duration::from_millis(400)).await;
    assert_eq!(rig.mood.calls(1), 1, "the second comes no sooner than the base delay");
    rig.mood.heals();
    rig.bench.time.advance(Duration::from_secs(2)).await;
    rig.until_notes(&[(1, 1)]).await;
    let left = failures(&rig.db).await;
    assert_eq!(left, 0, "a success forgets the failures before it");
}

#[tokio::test(start_paused = true)]
async fn one_bad_event_of_a_batch_does_not_stop_the_others() {
    let rig = Rig::start(true).await;
    rig.mood.fails(13, "never");
    rig.publish((1..=40).map(|n| rig.message(n)).collect()).await;
    rig.until_dead(1, MINUTES).await;
    rig.settled().await;
    let expected: Vec<(u32, u32)> = (1..=40).filter(|n| *n != 13).map(|n| (n, 1)).collect();
    assert_eq!(rig.notes().await, expected);
    assert_eq!(rig.dead(Status::Open).await[0].reason, "permanent");
}

#[tokio::test(start_paused = true)]
async fn a_panic_costs_one_failure_and_nothing_else() {
    let rig = Rig::start(false).await;
    rig.mood.fails(1, "panic");
    rig.publish(vec![rig.message(1), rig.message(2)]).await;
    rig.until_notes(&[(2, 1)]).await;
    let error = async || {
        let failure = rig.db.query("SELECT last_error FROM failures").fetch_optional().await.unwrap();
        failure.is_some_and(|f| f.get::<String>("last_error").unwrap().contains("panicked: as told"))
    };
    rig.bench.time.until("the failure on record", error).await;
    rig.mood.heals();
    rig.bench.time.advance(Duration::from_secs(2)).await;
    rig.until_notes(&[(1, 1), (2, 1)]).await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_burns_no_attempt() {
    let rig = Rig::start(false).await;
    rig.mood.fails(1, "pause");
    rig.publish(vec![rig.message(1)]).await;
    // Far longer than AckWait and any backoff.
    rig.bench.time.advance(Duration::from_secs(180)).await;
    assert!(rig.mood.calls(1) > 5, "it keeps trying: {}", rig.mood.calls(1));
    assert_eq!(rig.dead(Status::Open).await.len(), 0);
    let counted = failures(&rig.db).await;
    assert_eq!(counted, 0);
    let info = rig.bench.broker.consumer_info("THINGS", "notes").await.unwrap();
    assert_eq!((info.ack_pending, info.redelivered), (1, 0), "what is held is kept alive");
    rig.mood.heals();
    rig.bench.time.advance(Duration::from_secs(15)).await;
    rig.until_notes(&[(1, 1)]).await;
}

#[tokio::test(start_paused = true)]
async fn a_long_handler_keeps_its_delivery() {
    let options = consign::ConsumerOptions {
        ack_wait: Duration::from_secs(3),
        handler_timeout: Duration::from_secs(60),
        ..Default::default()
    };
    let rig = Rig::with(Consumer::new("notes", "THINGS").options(options), false).await;
    *rig.mood.slow.lock().unwrap() = Duration::from_secs(20);
    rig.publish(vec![rig.message(1)]).await;
    rig.bench.time.advance(Duration::from_secs(21)).await;
    rig.until_notes(&[(1, 1)]).await;
    rig.settled().await;
    assert_eq!(rig.mood.calls(1), 1, "AckWait passed six times, and it was not delivered again");
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_hangs_is_given_up_and_retried() {
    let rig = Rig::start(false).await;
    *rig.mood.slow.lock().unwrap() = Duration::from_secs(3600);
    rig.publish(vec![rig.message(1)]).await;
    rig.bench.time.advance(Duration::from_secs(5)).await;
    *rig.mood.slow.lock().unwrap() = Duration::ZERO;
    rig.bench.time.advance(Duration::from_secs(8)).await;
    rig.until_notes(&[(1, 1)]).await;
}

#[tokio::test(start_paused = true)]
async fn malformed_events_are_dead_letters_that_name_the_fault() {
    let rig = Rig::start(false).await;
    let garbage = Message { payload: Bytes::from_static(b"\xff\xfe no json"), ..rig.message(1) };
    let breaks = Message { payload: Bytes::from_static(br#"{"number": 5000}"#), ..rig.message(2) };
    let headless = Message { headers: Vec::new(), msg_id: Some("h".into()), ..rig.message(3) };
    let mut ancient = rig.message(4);
    for (name, value) in &mut ancient.headers {
        if name == "ce-time" {
            *value = "2020-01-01T00:00:00Z".into();
        }
    }
    rig.publish(vec![garbage, breaks, headless, ancient, rig.message(5)]).await;
    rig.until_notes(&[(5, 1)]).await;
    rig.until_dead(4, MINUTES).await;
    rig.settled().await;
    let letters = rig.dead(Status::Open).await;
    let error_of = |reason: &str| {
        let found = letters.iter().find(|l| l.reason == reason);
        found.unwrap_or_else(|| panic!("no {reason} among {letters:?}")).error.clone()
    };
    assert!(error_of("breaks_schema").contains("/number"), "{}", error_of("breaks_schema"));
    assert!(error_of("beyond_horizon").contains("older"), "{}", error_of("beyond_horizon"));
    assert_eq!(letters.iter().filter(|l| l.reason == "undecodable").count(), 2);
    assert!(letters.iter().any(|l| l.error.contains("ce-specversion")), "{letters:?}");
}

#[tokio::test(start_paused = true)]
async fn an_invalid_event_cannot_be_emitted() {
    let rig = Rig::start(false).await;
    rig.publish(vec![rig.message(950)]).await;
    rig.until_dead(1, MINUTES).await;
    assert_eq!(rig.notes().await, [], "the transaction failed with it");
    assert!(rig.dead(Status::Open).await[0].error.contains("/number"));
    // Even if the error is swallowed.
    let mut tx = rig.db.begin().await.unwrap();
    assert!(tx.emit(Emission::new(Noted { number: 950 }, "x", 1)).is_err());
    assert!(matches!(tx.commit().await, Err(DbError::InvalidEvent(_))));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_transaction_leaves_nothing() {
    let rig = Rig::start(false).await;
    let mut tx = rig.db.begin().await.unwrap();
    write_notes(&mut tx, &[1]).await.unwrap();
    tx.emit(Emission::new(Noted { number: 1 }, "x", 1)).unwrap();
    drop(tx);
    rig.db.begin().await.unwrap().commit().await.unwrap();
    assert_eq!(rig.notes().await, []);
    assert_eq!(rig.db.outbox_depth(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_librarys_statements_and_commits_do_not_grow_with_the_batch() {
    let mut counts = Vec::new();
    for events in [8u32, 200] {
        let rig = Rig::start(true).await;
        // Looking for old rows at start begins one transaction per table that is pruned, and tries one delete in each; the consumer says
        // that it is there, and asks for both lanes who else is.
        let quiet = async || {
            let before = rig.db.stats().statements;
            rig.bench.time.advance(Duration::from_millis(500)).await;
            before >= 10 && rig.db.stats().statements == before
        };
        rig.bench.time.until("the first looks are over", quiet).await;
        let before = rig.db.stats();
        rig.publish((1..=events).map(|n| rig.message(n)).collect()).await;
        let all: Vec<(u32, u32)> = (1..=events).map(|n| (n, 1)).collect();
        rig.until_notes(&all).await;
        rig.settled().await;
        let after = rig.db.stats();
        counts.push((after.commits - before.commits, after.statements - before.statements));
    }
    assert_eq!(counts[0], counts[1], "(commits, statements) for 8 events and for 200");
    assert_eq!(counts[0].0, 1, "one commit for the batch");
}

#[tokio::test(start_paused = true)]
async fn a_stopped_service_finishes_what_it_has_and_carries_on_later() {
    let rig = Rig::start(false).await;
    *rig.mood.slow.lock().unwrap() = Duration::from_secs(2);
    rig.publish(vec![rig.message(1)]).await;
    rig.bench.time.advance(Duration::from_secs(1)).await;
    let Rig { bench, mood, service, db, .. } = rig;
    tokio::join!(service.shutdown(Duration::from_secs(20)), bench.time.advance(Duration::from_secs(6)));
    drop(db);
    assert_eq!(mood.calls(1), 1);
    let info = bench.broker.consumer_info("THINGS", "notes").await.unwrap();
    assert_eq!((info.ack_pending, info.ack_floor), (0, 1), "committed and acknowledged before the end");
    assert_eq!(
        bench.broker.stream_info("NOTES").await.unwrap().messages,
        1,
        "and what follows was published"
    );
}

async fn failures(db: &Db) -> u64 {
    db.query("SELECT COUNT(*) AS n FROM failures").fetch_scalar().await.unwrap()
}

/// Nobody stores its subject, until somebody does.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "orphans.made", version = 1)]
struct Orphan {}

#[tokio::test(start_paused = true)]
async fn a_row_the_broker_refuses_does_not_hold_up_the_rest() {
    let rig = Rig::start(false).await;
    let mut tx = rig.db.begin().await.unwrap();
    tx.emit(Emission::new(Orphan {}, "x", 1)).unwrap();
    tx.emit(Emission::new(Noted { number: 7 }, "7", 1)).unwrap();
    tx.commit().await.unwrap();
    let published = async || rig.bench.broker.stream_info("NOTES").await.unwrap().messages == 1;
    rig.bench.time.until_within(MINUTES, Duration::from_secs(1), "the good one", published).await;
    assert_eq!(rig.db.outbox_depth(), 1, "the other waits");
    rig.bench.broker.ensure_stream(&StreamConfig::new("ORPHANS", &["orphans.>"])).await.unwrap();
    let found = async || {
        rig.bench.broker.stream_info("ORPHANS").await.unwrap().messages == 1 && rig.db.outbox_depth() == 0
    };
    rig.bench.time.until_within(MINUTES, Duration::from_secs(1), "the orphan", found).await;
}

#[tokio::test(start_paused = true)]
async fn history_is_pruned_when_its_time_is_over_and_not_before() {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let rig = Rig::start(false).await;
    // More than one step of pruning takes.
    let mut tx = rig.db.begin().await.unwrap();
    for _ in 0..2499 {
        tx.emit(Emission::new(Noted { number: 7 }, "7", 1)).unwrap();
    }
    tx.commit().await.unwrap();
    rig.publish(vec![rig.message(1)]).await;
    rig.until_notes(&[(1, 1)]).await;
    rig.settled().await;
    rig.bench.time.until("published", async || rig.db.outbox_depth() == 0).await;
    let rows = async || {
        let count = "SELECT (SELECT COUNT(*) FROM outbox) AS o, (SELECT COUNT(*) FROM outbox_published) AS p,
                (SELECT COUNT(*) FROM inbox) AS i";
        let row = rig.db.query(count).fetch_one().await.unwrap();
        let n = |column| row.get::<u64>(column).unwrap();
        (n("o"), n("p"), n("i"))
    };
    rig.bench.time.leap(DAY * 6).await;
    rig.bench.time.advance(Duration::from_secs(31)).await;
    assert_eq!(rows().await, (2500, 2500, 1), "kept for seven days");
    rig.bench.time.leap(DAY * 2).await;
    let gone = async || rows().await == (0, 0, 1);
    rig.bench
        .time
        .until_within(MINUTES, Duration::from_secs(1), "the outbox pruned, the inbox not", gone)
        .await;
    rig.bench.time.leap(DAY * 14).await;
    let gone = async || rows().await == (0, 0, 0);
    rig.bench.time.until_within(MINUTES, Duration::from_secs(1), "the inbox pruned", gone).await;
}
