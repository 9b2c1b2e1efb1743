//! The floors: what bare async-nats and bare PostgreSQL reach.

use std::process::Command;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::{self, consumer, stream};
use bytes::Bytes;
use consign::testing::servers::{NatsServer, PostgresServer};
use futures_util::StreamExt;

/// As large as an order's event with its headers, some 250 and 500 bytes.
const BODY: usize = 750;
const WINDOW: usize = 512;

async fn context(nats: &NatsServer) -> jetstream::Context {
    jetstream::new(async_nats::connect(nats.url()).await.unwrap())
}

async fn make_stream(context: &jetstream::Context, name: &str) {
    let config = stream::Config {
        name: name.to_owned(),
        subjects: vec![format!("{}.>", name.to_lowercase())],
        ..stream::Config::default()
    };
    context.create_stream(config).await.unwrap();
}

/// Pipelined publishes with message ids, of so many bytes each, a second.
pub async fn publish(nats: &NatsServer, name: &str, count: usize, body: usize) -> f64 {
    let context = context(nats).await;
    make_stream(&context, name).await;
    let started = Instant::now();
    publish_to(&context, &format!("{}.a", name.to_lowercase()), count, body).await;
    count as f64 / started.elapsed().as_secs_f64()
}

async fn publish_to(context: &jetstream::Context, subject: &str, count: usize, body: usize) {
    let body = Bytes::from(vec![b'x'; body]);
    futures_util::stream::iter(0..count)
        .map(|n| {
            let (subject, body) = (subject.to_owned(), body.clone());
            async move {
                let mut headers = HeaderMap::new();
                headers.insert("Nats-Msg-Id", format!("{subject}-{n}"));
                context.publish_with_headers(subject, headers, body).await.unwrap().await.unwrap();
            }
        })
        .buffer_unordered(WINDOW)
        .collect::<()>()
        .await;
}

async fn make_consumer(context: &jetstream::Context, stream: &str, name: &str) -> consumer::PullConsumer {
    let stream = context.get_stream(stream).await.unwrap();
    let config = consumer::pull::Config {
        durable_name: Some(name.to_owned()),
        max_ack_pending: 1024,
        ..consumer::pull::Config::default()
    };
    stream.create_consumer(config).await.unwrap()
}

async fn consume_all(consumer: &consumer::PullConsumer, count: usize) {
    let mut got = 0;
    while got < count {
        let mut batch =
            consumer.batch().max_messages(256).expires(Duration::from_secs(2)).messages().await.unwrap();
        while let Some(message) = batch.next().await {
            message.unwrap().ack().await.unwrap();
            got += 1;
            if got == count {
                break;
            }
        }
    }
}

/// Fetches and acknowledgements of what a stream holds, a second.
pub async fn consume(nats: &NatsServer, stream: &str, count: usize) -> f64 {
    let context = context(nats).await;
    let consumer = make_consumer(&context, stream, "floor").await;
    let started = Instant::now();
    consume_all(&consumer, count).await;
    count as f64 / started.elapsed().as_secs_f64()
}

/// Orders a second, if an order were nothing but its four publishes, five deliveries and five acknowledgements.
pub async fn transport(nats: &NatsServer, orders: usize) -> f64 {
    let context = context(nats).await;
    // Who publishes what, and how many consume it.
    let hops = [("CREATED", 1), ("RESERVED", 2), ("PAID", 1), ("CONFIRMED", 1)];
    let mut consumers = Vec::new();
    for (name, readers) in hops {
        make_stream(&context, name).await;
        for reader in 0..readers {
            consumers.push(make_consumer(&context, name, &format!("reader{reader}")).await);
        }
    }
    let started = Instant::now();
    let publishing = futures_util::future::join_all(hops.iter().map(|(name, _)| {
        let subject = format!("{}.a", name.to_lowercase());
        let context = context.clone();
        async move { publish_to(&context, &subject, orders, BODY).await }
    }));
    let consuming = futures_util::future::join_all(consumers.iter().map(|c| consume_all(c, orders)));
    tokio::join!(publishing, consuming);
    orders as f64 / started.elapsed().as_secs_f64()
}

/// Orders a second that pgbench inserts: an order's row and its event's, in transactions of 64, each row by a statement of its own.
pub fn inserts(postgres: &PostgresServer) -> f64 {
    postgres.database("floor");
    postgres.sql(
        "floor",
        "CREATE TABLE orders (id UUID PRIMARY KEY DEFAULT gen_random_uuid(), customer_id TEXT, status TEXT, lane TEXT, currency TEXT,
           total BIGINT, items JSONB, correlation_id TEXT, version BIGINT, created_at TIMESTAMPTZ, updated_at TIMESTAMPTZ, deadline TIMESTAMPTZ);
         CREATE INDEX ON orders (customer_id, id); CREATE INDEX ON orders (status, id);
         CREATE TABLE outbox (seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, event_id UUID, msg_id TEXT, subject TEXT, headers JSONB,
           payload BYTEA, created_at TIMESTAMPTZ);
         GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO PUBLIC;",
    );
    let order = "INSERT INTO orders (customer_id, status, lane, currency, total, items, correlation_id, version, created_at, updated_at, deadline)
        VALUES ('customer', 'pending', 'standard', 'EUR', 100, '[{\"product_id\":\"p1\",\"quantity\":1,\"unit_price\":100}]', 'correlation', 1, now(), now(), now());";
    let event = format!(
        "INSERT INTO outbox (event_id, msg_id, subject, headers, payload, created_at) VALUES (gen_random_uuid(), 'id', \
         'orders.created.v1.standard', '[]', '{}', now());",
        "x".repeat(BODY)
    );
    let one = format!("{}\n{event}\n", order.replace('\n', " "));
    let script = format!("BEGIN;\n{}COMMIT;\n", one.repeat(64));
    let dir = std::env::temp_dir().join(format!("consign-pgbench-{}.sql", std::process::id()));
    std::fs::write(&dir, script).unwrap();
    let url = postgres.url("floor", "floor");
    let done = Command::new(postgres.program("pgbench"))
        .args([
            "--no-vacuum",
            "--client",
            "4",
            "--jobs",
            "1",
            "--time",
            "8",
            "--protocol",
            "prepared",
            "--file",
        ])
        .arg(&dir)
        .arg(&url)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let tps = text
        .lines()
        .find_map(|l| l.strip_prefix("tps = "))
        .and_then(|l| l.split(' ').next()?.parse::<f64>().ok());
    tps.unwrap_or_else(|| panic!("pgbench: {text} {}", String::from_utf8_lossy(&done.stderr))) * 64.0
}
