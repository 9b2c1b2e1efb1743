//! Versions of an event side by side: upcasting, dual publishing, and consumers that move in mid-stream. On the in-memory broker and virtual time.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::time::Duration;

use axum::extract::State;
use consign::broker::{Broker, StreamConfig};
use consign::config::ServiceConfig;
use consign::consumer::ReadyConsumer;
use consign::dead_letter::{self, Filter, Status};
use consign::service::Running;
use consign::testing::Bench;
use consign::{Batch, Consumer, Db, Emission, Event, Failure, Migration, Service, Tx};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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

fn consumer(who: Who) -> Consumer<Who> {
    Consumer::new(who, "PARCELS")
}

async fn start(bench: &Bench, db: &Db, consumers: Vec<ReadyConsumer>) -> Running {
    let service = Service::new(ServiceConfig::default(), db.clone(), bench.broker(), "test");
    let service = service.stream(StreamConfig::new("PARCELS", &["parcels.>"]));
    consumers.into_iter().fold(service, Service::consumer).start().await.unwrap()
}

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
    emit(&db, packed(21).versions(&[1])).await;
    emit(&db, packed(22).versions(&[2])).await;
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
async fn versions_that_do_not_exist_or_do_not_fit_are_refused() {
    let bench = Bench::start();
    let db = open(&bench).await;
    let mut tx = db.begin().await.unwrap();
    let error = tx.emit(packed(1).versions(&[7])).unwrap_err().to_string();
    assert!(error.contains("parcels.packed") && error.contains('7'), "{error}");
    let error = tx.emit(packed(1).also(|_| Lost {})).unwrap_err().to_string();
    assert!(error.contains("parcels.lost"), "{error}");
    // Recorded or not, both versions or none.
    tx.rollback().await;
    assert_eq!(db.outbox_depth(), 0);
}
