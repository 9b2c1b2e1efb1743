//! The library alone: relay and consumers in this process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use consign::broker::nats::NatsBroker;
use consign::broker::{Broker, ConsumerConfig, Message, Settlement, StreamConfig};
use consign::config::ServiceConfig;
use consign::db::PostgresConfig;
use consign::event::{Cause, Envelope};
use consign::service::Running;
use consign::testing::servers::{NatsServer, PostgresServer};
use consign::{Batch, Clock, Consumer, Db, Emission, Event, Failure, Lane, Migration, Service, Tx};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Figure, cpu, floor, percentile, statements};

const EVENTS: usize = 100_000;
/// Bytes of an event, and about as many of its headers.
const BODY: usize = 480;
const HEADERS: usize = 500;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "things.made", version = 1)]
struct Made {
    n: u64,
    body: String,
}

const MIGRATIONS: &[Migration] =
    &[Migration::new(1, "things", "CREATE TABLE things (n BIGINT PRIMARY KEY, body TEXT NOT NULL)")];

fn made(n: usize) -> Made {
    Made { n: n as u64, body: "x".repeat(BODY) }
}

async fn keep(Batch(events): Batch<Made>, mut tx: Tx) -> Result<(), Failure> {
    tx.query("INSERT INTO things (n, body) SELECT n, body FROM {$1: n, body}")
        .rows(events.iter().map(|e| (e.n, e.body.as_str())))
        .execute()
        .await?;
    Ok(())
}

pub async fn open(postgres: &PostgresServer, name: &str) -> Db {
    let url = postgres.database(name);
    let config = PostgresConfig { url, ..PostgresConfig::default() };
    Db::open(config, name, MIGRATIONS, Clock::system()).await.unwrap()
}

async fn start(service: Service) -> Running {
    service.start().await.unwrap()
}

pub async fn run(nats: &NatsServer, postgres: &PostgresServer) -> Vec<Figure> {
    let broker: Arc<dyn Broker> = Arc::new(NatsBroker::connect(&nats.config(), "bench").await.unwrap());
    let mut figures = relay(nats, postgres, &broker).await;
    figures.extend(consume(nats, postgres, &broker).await);
    figures
}

async fn relay(nats: &NatsServer, postgres: &PostgresServer, broker: &Arc<dyn Broker>) -> Vec<Figure> {
    let bare = floor::publish(nats, "FLOOR", EVENTS, BODY + HEADERS).await;
    let db = open(postgres, "relay").await;
    // Recorded before the relay runs, so that it alone is measured.
    for chunk in (0..EVENTS).collect::<Vec<_>>().chunks(1000) {
        let mut tx = db.begin().await.unwrap();
        for n in chunk {
            tx.emit(Emission::new(made(*n), n.to_string(), 1)).unwrap();
        }
        tx.commit().await.unwrap();
    }
    let service = Service::new(ServiceConfig::default(), db.clone(), Arc::clone(broker), "bench")
        .stream(StreamConfig::new("THINGS", &["things.>"]));
    statements::forget(postgres);
    let (started, used) = (Instant::now(), cpu::by_program());
    let running = start(service).await;
    let reached = relayed(broker, "THINGS", EVENTS as u64).await;
    println!("relay: {}", cpu::since(&used, started.elapsed().as_secs_f64()));
    statements::print(postgres);
    let mut figures = vec![Figure {
        what: "relay, a backlog in PostgreSQL",
        reached,
        unit: "events/s",
        floor: Some(("bare pipelined publishes with ids/s", bare)),
        goal: 0.5,
    }];
    while db.outbox_depth() > 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Idle: one event at a time, from its commit until a consumer has it.
    let consumer = ConsumerConfig {
        deliver: consign::broker::DeliverPolicy::New,
        ..ConsumerConfig::new("latency", Vec::new())
    };
    broker.ensure_consumer("THINGS", &consumer).await.unwrap();
    let mut latencies = Vec::new();
    for n in 0..300 {
        let fetching = broker.fetch("THINGS", "latency", 1, Duration::from_secs(5));
        let committing = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let mut tx = db.begin().await.unwrap();
            tx.emit(Emission::new(made(EVENTS + n), "latency", 1)).unwrap();
            tx.commit().await.unwrap();
            Instant::now()
        };
        let (got, committed) = tokio::join!(async { (fetching.await.unwrap(), Instant::now()) }, committing);
        let (deliveries, at) = got;
        latencies.push(at.saturating_duration_since(committed).as_secs_f64() * 1000.0);
        let settlements = deliveries.iter().map(|d| (d.reply.clone(), Settlement::Ack)).collect();
        broker.settle("THINGS", "latency", settlements).await.unwrap();
    }
    latencies.sort_by(f64::total_cmp);
    for (what, share, goal) in
        [("commit to delivered, idle, p50", 0.5, 5.0), ("commit to delivered, idle, p99", 0.99, 25.0)]
    {
        figures.push(Figure { what, reached: percentile(&latencies, share), unit: "ms", floor: None, goal });
    }
    running.shutdown(Duration::from_secs(5)).await;
    figures
}

/// Events a second that a relay publishes to a stream, from its first until there are so many.
pub async fn relayed(broker: &Arc<dyn Broker>, stream: &str, until: u64) -> f64 {
    let published = async || broker.stream_info(stream).await.map_or(0, |i| i.messages);
    while published().await == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (started, first) = (Instant::now(), published().await);
    let mut last = first;
    while last < until {
        tokio::time::sleep(Duration::from_millis(10)).await;
        last = published().await;
    }
    (last - first) as f64 / started.elapsed().as_secs_f64()
}

async fn consume(nats: &NatsServer, postgres: &PostgresServer, broker: &Arc<dyn Broker>) -> Vec<Figure> {
    let stream = StreamConfig::new("EVENTS", &["things2.>"]);
    broker.ensure_stream(&stream).await.unwrap();
    let messages: Vec<Message> = (0..EVENTS)
        .map(|n| {
            let envelope = Envelope {
                id: Uuid::now_v7(),
                event_type: Made::TYPE.into(),
                version: 1,
                source: "/services/bench".into(),
                aggregate_id: n.to_string(),
                aggregate_version: 1,
                time: Clock::system().now(),
                cause: Cause::new(),
                lane: Lane::Standard,
                siblings: Vec::new(),
            };
            let message = envelope.into_message(None, Bytes::from(serde_json::to_vec(&made(n)).unwrap()));
            // Apart from the stream that the relay published to.
            Message { subject: message.subject.replace("things.", "things2."), ..message }
        })
        .collect();
    for chunk in messages.chunks(1024) {
        broker.publish(chunk.to_vec()).await.into_iter().for_each(|a| drop(a.unwrap()));
    }
    let bare = floor::consume(nats, "EVENTS", EVENTS).await;
    broker.ensure_consumer("EVENTS", &ConsumerConfig::new("empty", Vec::new())).await.unwrap();
    let started = Instant::now();
    let mut got = 0;
    while got < EVENTS {
        let deliveries = broker.fetch("EVENTS", "empty", 256, Duration::from_secs(5)).await.unwrap();
        got += deliveries.len();
        let settlements = deliveries.into_iter().map(|d| (d.reply, Settlement::Ack)).collect();
        broker.settle("EVENTS", "empty", settlements).await.unwrap();
    }
    let empty = EVENTS as f64 / started.elapsed().as_secs_f64();

    // Through the whole consumer: decoded, validated, claimed in the inbox, one row written, committed, acknowledged.
    let db = open(postgres, "consume").await;
    let service = Service::new(ServiceConfig::default(), db.clone(), Arc::clone(broker), "bench")
        .consumer(Consumer::new("whole", "THINGS").on(keep).with_state(()));
    let total = broker.stream_info("THINGS").await.unwrap().messages;
    let started = Instant::now();
    let running = start(service).await;
    let handled = async || db.query("SELECT COUNT(*) AS n FROM inbox").fetch_scalar::<u64>().await.unwrap();
    while handled().await < total {
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(started.elapsed() < Duration::from_secs(120), "of {total} events");
    }
    let whole = total as f64 / started.elapsed().as_secs_f64();
    running.shutdown(Duration::from_secs(5)).await;
    vec![
        Figure {
            what: "consuming, empty handler, no database",
            reached: empty,
            unit: "events/s",
            floor: Some(("bare fetches and acks/s", bare)),
            goal: 0.95,
        },
        Figure {
            what: "consuming, inbox and one row per event",
            reached: whole,
            unit: "events/s",
            floor: Some(("bare fetches and acks/s", bare)),
            goal: 0.25,
        },
    ]
}
