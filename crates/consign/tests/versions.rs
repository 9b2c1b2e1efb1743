//! Versions of an event side by side: upcasting, dual publishing, and consumers that move in mid-stream. On the in-memory broker and virtual time.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::Duration;

use axum::extract::State;
use consign::broker::{Broker, StreamConfig};
use consign::config::ServiceConfig;
use consign::consumer::ReadyConsumer;
use consign::dead_letter::{self, Filter, Status};
use consign::event::{Cause, Envelope};
use consign::handler::{EventSet, Kind};
use consign::service::Running;
use consign::testing::Bench;
use consign::versions::Published;
use consign::{Batch, Consumer, Db, Emission, Event, Failure, Lane, Migration, Service, Tx};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcels.packed", version = 1)]
struct V1 {
    n: u32,
    grams: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcels.packed", version = 2)]
struct V2 {
    n: u32,
    kilos: f64,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcels.packed", version = 3)]
struct V3 {
    n: u32,
    kilos: f64,
    fragile: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcels.packed", version = 4)]
struct V4 {
    n: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcels.lost", version = 1)]
struct Lost {}

fn to_v2(old: V1) -> V2 {
    V2 { n: old.n, kilos: f64::from(old.grams) / 1000.0 }
}

fn to_v3(old: V2) -> V3 {
    V3 { n: old.n, kilos: old.kilos, fragile: false }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "grams of a test")]
fn to_v1(new: &V2) -> V1 {
    V1 { n: new.n, grams: (new.kilos * 1000.0) as u32 }
}

const MIGRATIONS: &[Migration] = &[Migration::new(
    1,
    "seen",
    "CREATE TABLE seen (who TEXT NOT NULL, n BIGINT NOT NULL, as_version BIGINT NOT NULL, grams BIGINT NOT NULL)",
)];

type Who = &'static str;

async fn see(tx: &mut Tx, rows: Vec<(Who, u32, u32, f64)>) -> Result<(), Failure> {
    #[expect(clippy::cast_possible_truncation, reason = "grams of a test")]
    let rows =
        rows.into_iter().map(|(who, n, version, kilos)| (who, n, version, (kilos * 1000.0).round() as i64));
    tx.query("INSERT INTO seen (who, n, as_version, grams) SELECT who, n, v, g FROM {$1: who, n, v, g}")
        .rows(rows)
        .execute()
        .await?;
    Ok(())
}

async fn v1(Batch(events): Batch<V1>, State(who): State<Who>, mut tx: Tx) -> Result<(), Failure> {
    let kilos = |grams: u32| f64::from(grams) / 1000.0;
    see(&mut tx, events.iter().map(|e| (who, e.n, 1, kilos(e.grams))).collect()).await
}

async fn v2(Batch(events): Batch<V2>, State(who): State<Who>, mut tx: Tx) -> Result<(), Failure> {
    see(&mut tx, events.iter().map(|e| (who, e.n, 2, e.kilos)).collect()).await
}

async fn v3(Batch(events): Batch<V3>, State(who): State<Who>, mut tx: Tx) -> Result<(), Failure> {
    see(&mut tx, events.iter().map(|e| (who, e.n, 3, e.kilos)).collect()).await
}

async fn fails(Batch(_): Batch<V2>, State(_): State<Who>, _: Tx) -> Result<(), Failure> {
    Err(Failure::dead_letter("kilos are not liked here"))
}

/// Several kinds for one handler.
#[derive(Clone)]
enum Parcel {
    Packed(V3),
    Lost,
}

impl EventSet for Parcel {
    fn kinds() -> Vec<Kind<Self>> {
        vec![Kind::of(Self::Packed), Kind::of(|_: Lost| Self::Lost)]
    }
}

/// Sees them in their order; what is lost weighs nothing.
async fn parcels(Batch(events): Batch<Parcel>, State(who): State<Who>, mut tx: Tx) -> Result<(), Failure> {
    let rows = events.iter().zip(1..).map(|(e, n)| match &e.event {
        Parcel::Packed(packed) => (who, n, 3, packed.kilos),
        Parcel::Lost => (who, n, 0, 0.0),
    });
    see(&mut tx, rows.collect()).await
}

fn consumer(who: Who) -> Consumer<Who> {
    Consumer::new(who, "PARCELS")
}

async fn start(bench: &Bench, db: &Db, consumers: Vec<ReadyConsumer>) -> Running {
    let service = Service::new(ServiceConfig::default(), db.clone(), bench.broker(), "test");
    let service = service.stream(StreamConfig::new("PARCELS", &["parcels.>"]));
    consumers.into_iter().fold(service, Service::consumer).start().await.unwrap()
}

/// Another replica, with a service around it that publishes `parcels.packed` as `configured`.
async fn publisher(bench: &Bench, db: &Db, configured: &[u32]) -> (Running, Published) {
    let published = Published::new::<V2>("PARCELS", &[1], configured);
    let service = Service::new(ServiceConfig::default(), db.clone(), bench.broker(), "test");
    let service = service.stream(StreamConfig::new("PARCELS", &["parcels.>"])).publishes(&published);
    (service.start().await.unwrap(), published)
}

async fn filters(bench: &Bench, durable: &str) -> Vec<String> {
    bench.broker.consumer_info("PARCELS", durable).await.unwrap().filters
}

fn only(version: u32) -> Vec<String> {
    ["standard", "standard.>"].iter().map(|lane| format!("parcels.packed.v{version}.{lane}")).collect()
}

/// A version by itself, that says it has siblings.
async fn publish_alone(bench: &Bench, n: u32, version: u32) {
    let mut envelope = Envelope {
        id: uuid::Uuid::now_v7(),
        event_type: "parcels.packed".into(),
        version,
        source: "/tests".into(),
        aggregate_id: "p".into(),
        aggregate_version: 1,
        time: bench.time.clock().now(),
        cause: Cause::new(),
        lane: Lane::Standard,
        siblings: vec![2, 1],
    };
    let payload = if version == 1 { json!({"n": n, "grams": 1500}) } else { json!({"n": n, "kilos": 1.5}) };
    if n >= 100 {
        envelope.siblings = Vec::new();
    }
    let message = envelope.into_message(None, payload.to_string().into());
    bench.broker.publish(vec![message]).await.remove(0).unwrap();
}

const STEP: Duration = Duration::from_secs(1);

async fn open(bench: &Bench) -> Db {
    Db::open(&bench.file("parcels.db"), "parcels", MIGRATIONS, bench.time.clock()).await.unwrap()
}

/// Who saw what, as which version, with which weight.
async fn seen(db: &Db, who: Who) -> Vec<(u32, u32, i64)> {
    let rows = db
        .query("SELECT * FROM seen WHERE who = $1 ORDER BY n, as_version")
        .bind(who)
        .fetch_all()
        .await
        .unwrap();
    rows.iter()
        .map(|r| (r.get("n").unwrap(), r.get("as_version").unwrap(), r.get("grams").unwrap()))
        .collect()
}

async fn emit<E: Event>(db: &Db, emission: Emission<E>) {
    let mut tx = db.begin().await.unwrap();
    tx.emit(emission).unwrap();
    tx.commit().await.unwrap();
}

fn packed(n: u32) -> Emission<V2> {
    Emission::new(V2 { n, kilos: 1.5 }, "p", u64::from(n)).also(to_v1)
}

async fn settled(bench: &Bench, db: &Db, whos: &[Who]) {
    let quiet = async || {
        for who in whos {
            match bench.broker.consumer_info("PARCELS", who).await {
                Ok(info) if info.pending == 0 && info.ack_pending == 0 => {}
                _ => return false,
            }
        }
        db.outbox_depth() == 0
    };
    bench.time.until("everything handled", quiet).await;
}

#[tokio::test(start_paused = true)]
async fn older_versions_are_made_into_the_one_that_is_handled() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let newest = consumer("newest").on(v3).upcast(to_v3).upcast(to_v2).with_state("newest");
    let _service = start(&bench, &db, vec![newest]).await;
    emit(&db, Emission::new(V1 { n: 1, grams: 700 }, "p", 1)).await;
    emit(&db, Emission::new(V2 { n: 2, kilos: 0.9 }, "p", 2)).await;
    emit(&db, Emission::new(V3 { n: 3, kilos: 2.0, fragile: true }, "p", 3)).await;
    emit(&db, Emission::new(V4 { n: 4 }, "p", 4)).await;
    settled(&bench, &db, &["newest"]).await;
    assert_eq!(seen(&db, "newest").await, [(1, 3, 700), (2, 3, 900), (3, 3, 2000)]);
    // Version 4 is not among the filters, so it does not even come.
    assert!(
        dead_letter::list(&db, &Filter::default(), Some(Status::Open), None, 9).await.unwrap().is_empty()
    );
}

#[tokio::test(start_paused = true)]
async fn several_kinds_come_to_one_handler_in_their_order_and_older_versions_too() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let (publisher, _) = publisher(&bench, &db, &[2]).await;
    let mut tx = db.begin().await.unwrap();
    tx.emit(Emission::new(V3 { n: 1, kilos: 2.0, fragile: true }, "p", 1)).unwrap();
    tx.emit(Emission::new(Lost {}, "p", 2)).unwrap();
    tx.emit(Emission::new(V1 { n: 2, grams: 700 }, "p", 3)).unwrap();
    tx.emit(Emission::new(Lost {}, "p", 4)).unwrap();
    tx.commit().await.unwrap();
    bench.time.until("published", async || db.outbox_depth() == 0).await;
    // All of it is there when the consumer comes: one batch, one call.
    let all = consumer("all").on(parcels).upcast(to_v3).upcast(to_v2).with_state("all");
    assert_eq!(all.reads()["parcels.packed.v1"], "parcels.packed.v3");
    let _service = start(&bench, &db, vec![all]).await;
    settled(&bench, &db, &["all"]).await;
    assert_eq!(seen(&db, "all").await, [(1, 3, 2000), (2, 0, 0), (3, 3, 700), (4, 0, 0)]);
    drop(publisher);
}

#[tokio::test(start_paused = true)]
async fn each_takes_effect_once_with_the_highest_version_it_accepts() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let only_old = consumer("old").on(v1).with_state("old");
    let both = consumer("both").on(v2).upcast(to_v2).with_state("both");
    let each = consumer("each").on(v1).on(v2).with_state("each");
    let only_new = consumer("new").on(v2).with_state("new");
    let _service = start(&bench, &db, vec![only_old, both, each, only_new]).await;
    for n in 1..=20 {
        emit(&db, packed(n)).await;
    }
    // Before the change, and after it.
    emit(&db, packed(21).versions([1])).await;
    emit(&db, packed(22).versions([2])).await;
    settled(&bench, &db, &["old", "both", "each", "new"]).await;
    let expect = |numbers: std::ops::RangeInclusive<u32>, version| numbers.map(move |n| (n, version, 1500));
    assert_eq!(seen(&db, "old").await, expect(1..=21, 1).collect::<Vec<_>>());
    assert_eq!(
        seen(&db, "both").await,
        expect(1..=22, 2).collect::<Vec<_>>(),
        "upcast where there is only the old one"
    );
    let mut each: Vec<_> = expect(1..=20, 2).collect();
    each.extend([(21, 1, 1500), (22, 2, 1500)]);
    assert_eq!(seen(&db, "each").await, each);
    let mut new: Vec<_> = expect(1..=20, 2).collect();
    new.push((22, 2, 1500));
    assert_eq!(seen(&db, "new").await, new);
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_moves_in_mid_stream_takes_effect_once() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let before = start(&bench, &db, vec![consumer("moves").on(v1).with_state("moves")]).await;
    for n in 1..=10 {
        emit(&db, packed(n)).await;
    }
    settled(&bench, &db, &["moves"]).await;
    before.shutdown(Duration::from_secs(5)).await;
    let db = open(&bench).await;
    let moved = consumer("moves").on(v2).upcast(to_v2).with_state("moves");
    let _after = start(&bench, &db, vec![moved]).await;
    for n in 11..=20 {
        emit(&db, packed(n)).await;
    }
    settled(&bench, &db, &["moves"]).await;
    let seen = seen(&db, "moves").await;
    let expected: Vec<_> = (1..=20).map(|n| (n, if n <= 10 { 1 } else { 2 }, 1500)).collect();
    assert_eq!(seen, expected, "those handled before are known by their id, whatever version comes");
}

#[tokio::test(start_paused = true)]
async fn a_filter_becomes_wider_when_all_replicas_can_read_what_is_new() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let old = start(&bench, &open(&bench).await, vec![consumer("c").on(v1).with_state("c")]).await;
    let moved = || vec![consumer("c").on(v2).upcast(to_v2).with_state("c")];
    let _new = start(&bench, &open(&bench).await, moved()).await;
    for n in 1..=5 {
        emit(&db, packed(n)).await;
    }
    // In real time too, for whoever gets them: the two share one durable.
    bench
        .time
        .until_within(Duration::from_secs(30), STEP, "handled", async || seen(&db, "c").await.len() == 5)
        .await;
    assert_eq!(filters(&bench, "c").await, only(1), "one of them cannot read version 2");
    old.shutdown(Duration::from_secs(5)).await;
    let both = || [only(1), only(2)].concat();
    bench
        .time
        .until_within(Duration::from_secs(30), STEP, "wider", async || filters(&bench, "c").await == both())
        .await;
    // One that is older than those that run leaves the events to them.
    let _late = start(&bench, &open(&bench).await, vec![consumer("c").on(v1).with_state("c")]).await;
    bench.time.advance(Duration::from_secs(10)).await;
    for n in 6..=10 {
        emit(&db, packed(n)).await;
    }
    bench
        .time
        .until_within(Duration::from_secs(60), STEP, "handled", async || seen(&db, "c").await.len() == 10)
        .await;
    let as_new = seen(&db, "c").await.into_iter().filter(|(n, version, _)| *n > 5 && *version == 2).count();
    assert_eq!(as_new, 5);
    assert!(dead_letters(&db).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_filter_becomes_narrower_when_nothing_is_passed_over() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let before = start(&bench, &db, vec![consumer("c").on(v1).with_state("c")]).await;
    settled(&bench, &db, &["c"]).await;
    before.shutdown(Duration::from_secs(5)).await;
    // Published while nobody reads: some as before the change, some while it is under way.
    for n in 100..=104 {
        publish_alone(&bench, n, 1).await;
    }
    let db = open(&bench).await;
    let new = consumer("c").on(v2).upcast(to_v2).accept::<V2>(&[2]).with_state("c");
    let _after = start(&bench, &db, vec![new]).await;
    bench
        .time
        .until_within(Duration::from_secs(60), STEP, "handled", async || seen(&db, "c").await.len() == 5)
        .await;
    bench.time.advance(Duration::from_secs(20)).await;
    assert_eq!(
        filters(&bench, "c").await,
        [only(1), only(2)].concat(),
        "it is still published as version 1 alone"
    );
    for n in 1..=5 {
        emit(&db, packed(n)).await;
    }
    bench
        .time
        .until_within(Duration::from_secs(60), STEP, "narrower", async || {
            filters(&bench, "c").await == only(2)
        })
        .await;
    settled(&bench, &db, &["c"]).await;
    let numbers: Vec<u32> = seen(&db, "c").await.iter().map(|(n, ..)| *n).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 100, 101, 102, 103, 104]);
    assert!(dead_letters(&db).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_is_published_alone_just_when_it_is_asked_for_no_more_is_handled_all_the_same() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let both = start(&bench, &db, vec![consumer("c").on(v2).upcast(to_v2).with_state("c")]).await;
    emit(&db, packed(1)).await;
    settled(&bench, &db, &["c"]).await;
    both.shutdown(Duration::from_secs(5)).await;
    let db = open(&bench).await;
    let new = consumer("c").on(v2).upcast(to_v2).accept::<V2>(&[2]).with_state("c");
    let _new = start(&bench, &db, vec![new]).await;
    bench.time.until("narrower", async || filters(&bench, "c").await == only(2)).await;
    // Its owner saw it ask for both, a moment ago.
    publish_alone(&bench, 100, 1).await;
    emit(&db, packed(2)).await;
    bench
        .time
        .until_within(Duration::from_secs(30), STEP, "seen", async || seen(&db, "c").await.len() == 3)
        .await;
    bench.time.advance(Duration::from_secs(30)).await;
    assert_eq!(seen(&db, "c").await, [(1, 2, 1500), (2, 2, 1500), (100, 2, 1500)], "each once");
}

#[tokio::test(start_paused = true)]
async fn a_filter_for_all_versions_stays_until_what_only_it_matches_is_settled() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let all = start(&bench, &db, vec![consumer("c").on(v2).from_outside().with_state("c")]).await;
    settled(&bench, &db, &["c"]).await;
    assert_eq!(filters(&bench, "c").await, ["parcels.packed.*.standard", "parcels.packed.*.standard.>"]);
    all.shutdown(Duration::from_secs(5)).await;
    publish_alone(&bench, 100, 7).await;
    let db = open(&bench).await;
    let _some = start(&bench, &db, vec![consumer("c").on(v2).with_state("c")]).await;
    bench
        .time
        .until_within(Duration::from_secs(30), STEP, "narrower", async || {
            filters(&bench, "c").await == only(2)
        })
        .await;
    assert_eq!(dead_letters(&db).await, [("parcels.packed.v7".to_owned(), "unaccepted".to_owned())]);
}

async fn dead_letters(db: &Db) -> Vec<(String, String)> {
    let open = dead_letter::list(db, &Filter::default(), Some(Status::Open), None, 99).await.unwrap();
    open.into_iter().map(|d| (d.event.unwrap_or_default(), d.reason)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_version_takes_effect_itself_when_the_better_one_never_comes() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let both = consumer("c").on(v2).upcast(to_v2).with_state("c");
    let _service = start(&bench, &db, vec![both]).await;
    settled(&bench, &db, &["c"]).await;
    publish_alone(&bench, 1, 1).await;
    bench.time.advance(Duration::from_secs(4)).await;
    assert_eq!(seen(&db, "c").await, [], "version 2 may still come");
    bench
        .time
        .until_within(Duration::from_secs(10), STEP, "given up waiting", async || {
            !seen(&db, "c").await.is_empty()
        })
        .await;
    assert_eq!(seen(&db, "c").await, [(1, 2, 1500)]);
}

#[tokio::test(start_paused = true)]
async fn a_version_gives_way_to_a_better_one_that_has_failed() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let _service = start(&bench, &db, vec![consumer("c").on(v1).on(fails).with_state("c")]).await;
    emit(&db, packed(1)).await;
    bench
        .time
        .until_within(Duration::from_secs(60), STEP, "buried", async || !dead_letters(&db).await.is_empty())
        .await;
    settled(&bench, &db, &["c"]).await;
    assert_eq!(seen(&db, "c").await, [], "not as the older version instead: nothing is lost to a downcast");
    assert_eq!(dead_letters(&db).await, [("parcels.packed.v2".to_owned(), "permanent".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn what_no_replica_can_read_is_a_dead_letter_as_such_and_is_redriven_by_one_that_can() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let new = start(&bench, &db, vec![consumer("c").on(v2).with_state("c")]).await;
    settled(&bench, &db, &["c"]).await;
    new.shutdown(Duration::from_secs(5)).await;
    publish_alone(&bench, 100, 2).await;
    // Rolled back, while the other version is published alone: against the recipe.
    let db = open(&bench).await;
    let old = start(&bench, &db, vec![consumer("c").on(v1).with_state("c")]).await;
    bench
        .time
        .until_within(Duration::from_secs(60), STEP, "buried", async || !dead_letters(&db).await.is_empty())
        .await;
    assert_eq!(dead_letters(&db).await, [("parcels.packed.v2".to_owned(), "unaccepted".to_owned())]);
    assert!(
        dead_letter::list(&db, &Filter::default(), None, None, 9).await.unwrap()[0]
            .error
            .contains("parcels.packed.v2")
    );
    old.shutdown(Duration::from_secs(5)).await;
    let db = open(&bench).await;
    let _new = start(&bench, &db, vec![consumer("c").on(v3).upcast(to_v3).with_state("c")]).await;
    dead_letter::redrive(&db, &Filter { consumer: Some("c".into()), ..Filter::default() }, false, false)
        .await
        .unwrap();
    bench
        .time
        .until_within(Duration::from_secs(60), STEP, "redriven", async || dead_letters(&db).await.is_empty())
        .await;
    bench
        .time
        .until_within(Duration::from_secs(60), STEP, "seen", async || !seen(&db, "c").await.is_empty())
        .await;
    assert_eq!(seen(&db, "c").await, [(100, 3, 1500)], "through the upcaster");
}

#[tokio::test(start_paused = true)]
async fn a_replay_from_the_start_goes_through_todays_code() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let (_service, _) = publisher(&bench, &db, &[1]).await;
    for (n, versions) in [(1, vec![1]), (2, vec![1, 2]), (3, vec![2]), (4, vec![2, 1]), (5, vec![1])] {
        emit(&db, packed(n).versions(versions)).await;
    }
    bench.time.until("published", async || db.outbox_depth() == 0).await;
    let replay = consumer("replay").on(v3).upcast(to_v3).upcast(to_v2).with_state("replay");
    let _replaying = start(&bench, &open(&bench).await, vec![replay]).await;
    bench
        .time
        .until_within(Duration::from_secs(60), STEP, "all", async || seen(&db, "replay").await.len() == 5)
        .await;
    assert_eq!(seen(&db, "replay").await, (1..=5).map(|n| (n, 3, 1500)).collect::<Vec<_>>());
    assert!(dead_letters(&db).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_somebody_needs_is_published_whatever_is_configured() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let old = start(&bench, &db, vec![consumer("old").on(v1).with_state("old")]).await;
    settled(&bench, &db, &["old"]).await;
    let owner = open(&bench).await;
    let (_publisher, published) = publisher(&bench, &owner, &[2]).await;
    assert_eq!(published.now(), [1, 2], "before the first event");
    emit(&owner, packed(1).versions(published.now())).await;
    bench
        .time
        .until_within(Duration::from_secs(20), STEP, "seen", async || seen(&db, "old").await.len() == 1)
        .await;
    // It moves on: both, then the new one alone; version 1 ends by itself.
    old.shutdown(Duration::from_secs(5)).await;
    let db = open(&bench).await;
    let _new = start(&bench, &db, vec![consumer("old").on(v2).upcast(to_v2).with_state("old")]).await;
    bench
        .time
        .until_within(Duration::from_secs(60), STEP, "no longer needed", async || published.now() == [2])
        .await;
    emit(&owner, packed(2).versions(published.now())).await;
    bench
        .time
        .until_within(Duration::from_secs(20), STEP, "seen", async || seen(&db, "old").await.len() == 2)
        .await;
    assert_eq!(seen(&db, "old").await, [(1, 1, 1500), (2, 2, 1500)]);
}

#[tokio::test(start_paused = true)]
async fn the_only_version_that_somebody_reads_is_published_backwards_too() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let _new = start(&bench, &db, vec![consumer("new").on(v2).with_state("new")]).await;
    settled(&bench, &db, &["new"]).await;
    let owner = open(&bench).await;
    let (_publisher, published) = publisher(&bench, &owner, &[1]).await;
    assert_eq!(published.now(), [1, 2]);
}

#[tokio::test(start_paused = true)]
async fn versions_that_do_not_exist_or_do_not_fit_are_refused() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let mut tx = db.begin().await.unwrap();
    let error = tx.emit(packed(1).versions([7])).unwrap_err().to_string();
    assert!(error.contains("parcels.packed") && error.contains('7'), "{error}");
    let error = tx.emit(packed(1).also(|_| Lost {})).unwrap_err().to_string();
    assert!(error.contains("parcels.lost"), "{error}");
    // Recorded or not, both versions or none.
    tx.rollback().await;
    assert_eq!(db.outbox_depth(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_took_effect_is_counted_even_by_a_replica_that_does_not_live_long() {
    let bench = Bench::start();
    let db = open(&bench).await;
    for round in 1..=3 {
        let own = open(&bench).await;
        let service = start(&bench, &own, vec![consumer("c").on(v2).with_state("c")]).await;
        emit(&own, packed(round)).await;
        bench.time.until("handled", async || seen(&db, "c").await.len() == round as usize).await;
        service.shutdown(Duration::from_secs(5)).await;
    }
    let row = db.query("SELECT handled FROM consumed WHERE event = 'parcels.packed.v2'").fetch_optional();
    assert_eq!(row.await.unwrap().unwrap().get::<u64>("handled").unwrap(), 3);
    let there = db.query("SELECT COUNT(*) AS n FROM readers").fetch_optional().await.unwrap().unwrap();
    assert_eq!(there.get::<u64>("n").unwrap(), 0, "each has said goodbye");
}
