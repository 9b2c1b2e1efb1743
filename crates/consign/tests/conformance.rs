//! The embedded broker, in memory and in a file, against the broker conformance suite.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use consign::broker::Broker;
use consign::broker::embedded::EmbeddedBroker;
use consign::testing::VirtualTime;
use consign::testing::conformance::{Subject, run};

struct InMemory(VirtualTime);

impl Subject for InMemory {
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
