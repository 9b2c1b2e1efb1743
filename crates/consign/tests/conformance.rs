//! Every broker against the broker conformance suite: the embedded one in memory and in a file, and NATS JetStream, today's and the oldest
//! supported.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use consign::broker::Broker;
use consign::broker::embedded::EmbeddedBroker;
use consign::broker::nats::NatsBroker;
use consign::testing::VirtualTime;
use consign::testing::conformance::{Subject, run, run_together};
use consign::testing::servers::{NATS, NatsServer, OLDEST_NATS};

struct InMemory(VirtualTime);

impl Subject for InMemory {
    const HASTE: u32 = 1;
    const SOON: Duration = Duration::from_millis(50);

    async fn fresh(&self) -> Arc<dyn Broker> {
        Arc::new(EmbeddedBroker::memory(self.0.clock()))
    }
    async fn pass(&self, time: Duration) {
        self.0.advance(time).await;
    }
    async fn restart(&self, _: Arc<dyn Broker>) -> Option<Arc<dyn Broker>> {
        None
    }
}

struct InFile {
    time: VirtualTime,
    dir: tempfile::TempDir,
    last: Mutex<(u32, Option<Arc<EmbeddedBroker>>)>,
}

impl InFile {
    async fn open(&self, n: u32) -> Arc<EmbeddedBroker> {
        let path = self.dir.path().join(format!("{n}.db"));
        Arc::new(EmbeddedBroker::open(&path, self.time.clock()).await.unwrap())
    }
}

impl Subject for InFile {
    const HASTE: u32 = 1;
    const SOON: Duration = Duration::from_millis(50);

    async fn fresh(&self) -> Arc<dyn Broker> {
        let n = self.last.lock().unwrap().0 + 1;
        let broker = self.open(n).await;
        *self.last.lock().unwrap() = (n, Some(Arc::clone(&broker)));
        broker
    }
    async fn pass(&self, time: Duration) {
        self.time.advance(time).await;
    }
    async fn restart(&self, broker: Arc<dyn Broker>) -> Option<Arc<dyn Broker>> {
        drop(broker);
        let (n, old) = {
            let mut last = self.last.lock().unwrap();
            (last.0, last.1.take())
        };
        old.unwrap().close().await;
        Some(self.open(n).await)
    }
}

#[tokio::test(start_paused = true)]
async fn in_memory() {
    run(&InMemory(VirtualTime::start())).await;
}

#[tokio::test(start_paused = true)]
async fn in_a_file() {
    let time = VirtualTime::start();
    run(&InFile { time, dir: tempfile::tempdir().unwrap(), last: Mutex::new((0, None)) }).await;
}

/// A server for each test, so that all can run together: time cannot be made to pass faster.
struct JetStream {
    version: &'static str,
    servers: Mutex<Vec<(Arc<dyn Broker>, NatsServer)>>,
}

impl JetStream {
    async fn connect(&self, server: NatsServer) -> Arc<dyn Broker> {
        let broker: Arc<dyn Broker> =
            Arc::new(NatsBroker::connect(&server.config(), "conformance").await.unwrap());
        self.servers.lock().unwrap().push((Arc::clone(&broker), server));
        broker
    }
}

impl Subject for JetStream {
    const HASTE: u32 = 6;
    const SOON: Duration = Duration::from_millis(250);

    async fn fresh(&self) -> Arc<dyn Broker> {
        let version = self.version;
        let server = tokio::task::spawn_blocking(move || NatsServer::start(version)).await.unwrap();
        self.connect(server).await
    }
    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
    async fn restart(&self, broker: Arc<dyn Broker>) -> Option<Arc<dyn Broker>> {
        let mut server = {
            let mut servers = self.servers.lock().unwrap();
            let at = servers.iter().position(|(b, _)| Arc::ptr_eq(b, &broker)).unwrap();
            servers.remove(at).1
        };
        drop(broker);
        server.start_again();
        Some(self.connect(server).await)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_jetstream() {
    run_together(&JetStream { version: NATS, servers: Mutex::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_oldest_jetstream_supported() {
    run_together(&JetStream { version: OLDEST_NATS, servers: Mutex::default() }).await;
}
