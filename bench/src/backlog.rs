//! The relay with a long backlog: what an outage of the broker for hours leaves behind.

use std::sync::Arc;
use std::time::Duration;

use consign::Service;
use consign::broker::nats::NatsBroker;
use consign::broker::{Broker, StreamConfig};
use consign::config::ServiceConfig;
use consign::testing::servers::{NatsServer, PostgresServer};

use crate::{Figure, library};

const LONG: u64 = 10_000_000;
/// Published of each backlog, and all there is of the short one.
const PUBLISHED: u64 = 200_000;

pub async fn run(nats: &NatsServer, postgres: &PostgresServer) -> Vec<Figure> {
    let short = speed(nats, postgres, "short", PUBLISHED).await;
    let long = speed(nats, postgres, "long", LONG).await;
    vec![Figure {
        what: "relay, 10,000,000 rows pending",
        reached: long,
        unit: "events/s",
        floor: Some(("events/s with 200,000 pending", short)),
        goal: 0.8,
    }]
}

/// Events a second that the relay publishes out of so many pending.
async fn speed(nats: &NatsServer, postgres: &PostgresServer, name: &str, pending: u64) -> f64 {
    let db = library::open(postgres, name).await;
    let stream = name.to_uppercase();
    println!("recording {pending} events");
    let rows = format!(
        "WITH new AS (INSERT INTO outbox (event_id, msg_id, subject, headers, payload, created_at)
                      SELECT gen_random_uuid(), 'message-' || n, '{name}.things.made.v1.standard', '[]', convert_to(repeat('x', 200), 'UTF8'), now()
                      FROM generate_series(1, {pending}) AS n RETURNING seq)
         INSERT INTO outbox_pending (seq, not_before) SELECT seq, 'epoch' FROM new"
    );
    tokio::task::block_in_place(|| postgres.sql(name, &rows));
    let broker: Arc<dyn Broker> = Arc::new(NatsBroker::connect(&nats.config(), "bench").await.unwrap());
    let service = Service::new(ServiceConfig::default(), db, Arc::clone(&broker), "bench")
        .stream(StreamConfig::new(&stream, &[&format!("{name}.>")]));
    let running = service.start().await.unwrap();
    let speed = library::relayed(&broker, &stream, PUBLISHED).await;
    running.shutdown(Duration::from_secs(5)).await;
    speed
}
