//! For tests: the production service without a server, on the in-memory broker and virtual time; and the broker conformance suite.
//!
//! ```
//! use std::time::Duration;
//! use consign::testing::VirtualTime;
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() {
//! let time = VirtualTime::start();
//! let clock = time.clock();
//! let before = clock.now();
//! time.advance(Duration::from_secs(10)).await;
//! assert_eq!(clock.now().since(before), Duration::from_secs(10));
//! # }
//! ```

pub mod conformance;
pub mod database;
#[allow(clippy::expect_used, reason = "in tests, a panic is how a step fails")]
pub mod partition;
#[allow(clippy::expect_used, reason = "in tests, a panic is how a step fails")]
pub mod servers;

use std::future::Future;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use tempfile::TempDir;

use crate::broker::Broker;
use crate::broker::embedded::EmbeddedBroker;
use crate::{Clock, Timestamp};

/// Time that moves only when told to, on a runtime started paused (`#[tokio::test(start_paused = true)]`).
///
/// A paused runtime jumps ahead by itself whenever all tasks wait, and it cannot know that one of them waits for SQLite's thread. While
/// this lives it does not: tokio never jumps while a blocking task runs, and this holds one.
#[derive(Debug)]
pub struct VirtualTime {
    clock: Clock,
    _release: mpsc::Sender<()>,
}

impl VirtualTime {
    /// Stops the clock at the beginning of 2026.
    pub fn start() -> Self {
        let (release, released) = mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || released.recv());
        Self { clock: Clock::tokio(Timestamp::from_millis(1_767_225_600_000)), _release: release }
    }

    /// The clock to hand to databases, brokers and services.
    pub fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// Moves time on in steps of at most 100 ms of virtual time, with all due work done between, so that what falls due on the way
    /// happens in order.
    pub async fn advance(&self, by: Duration) {
        let mut left = by;
        while !left.is_zero() {
            let step = left.min(Duration::from_millis(100));
            tokio::time::advance(step).await;
            breathe().await;
            left -= step;
        }
    }

    /// Moves time on in one step: for days, where what would have happened on the way does not matter.
    pub async fn leap(&self, by: Duration) {
        tokio::time::advance(by).await;
        breathe().await;
    }

    /// Waits, in real time and without moving the virtual one, until `condition` holds.
    ///
    /// # Panics
    /// After ten real seconds, with `what`.
    pub async fn until<F: Future<Output = bool>>(&self, what: &str, mut condition: impl FnMut() -> F) {
        let start = std::time::Instant::now();
        while !condition().await {
            assert!(start.elapsed() < Duration::from_secs(10), "not within ten seconds: {what}");
            breathe().await;
        }
    }

    /// The same, moving virtual time on by `step` between looks, up to `limit` of it.
    ///
    /// # Panics
    /// When `limit` has passed, with `what`.
    pub async fn until_within<F: Future<Output = bool>>(
        &self,
        limit: Duration,
        step: Duration,
        what: &str,
        mut condition: impl FnMut() -> F,
    ) {
        let mut passed = Duration::ZERO;
        while !condition().await {
            assert!(passed < limit, "not within {limit:?} of virtual time: {what}");
            self.advance(step).await;
            passed += step;
        }
    }

    /// Awaits `work`, which may itself wait for time to pass: given a real second without an end, it moves virtual time on until there is one.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use consign::testing::VirtualTime;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let time = VirtualTime::start();
    /// let before = time.clock().now();
    /// time.carry(Duration::from_secs(60), "a nap", tokio::time::sleep(Duration::from_secs(5))).await;
    /// assert_eq!(time.clock().now().since(before), Duration::from_secs(5));
    /// # }
    /// ```
    ///
    /// # Panics
    /// When `limit` of virtual time has passed, with `what`.
    pub async fn carry<T>(&self, limit: Duration, what: &str, work: impl Future<Output = T>) -> T {
        const STEP: Duration = Duration::from_millis(100);
        let mut work = std::pin::pin!(work);
        let start = std::time::Instant::now();
        let mut passed = Duration::ZERO;
        loop {
            tokio::select! {
                biased;
                result = &mut work => return result,
                () = breathe() => {}
            }
            if start.elapsed() >= Duration::from_secs(1) {
                assert!(passed < limit, "not within {limit:?} of virtual time: {what}");
                self.advance(STEP).await;
                passed += STEP;
            }
        }
    }
}

/// A little real time for tasks and SQLite's threads.
async fn breathe() {
    for _ in 0..3 {
        let _ = tokio::task::spawn_blocking(|| std::thread::sleep(Duration::from_micros(700))).await;
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }
}

/// An in-memory broker and a directory for databases, on virtual time.
#[derive(Debug)]
pub struct Bench {
    /// The clock's hand.
    pub time: VirtualTime,
    /// The broker.
    pub broker: Arc<EmbeddedBroker>,
    dir: TempDir,
}

impl Bench {
    /// An empty one.
    ///
    /// # Panics
    /// If no temporary directory can be made.
    #[expect(clippy::expect_used, reason = "for tests")]
    pub fn start() -> Self {
        let time = VirtualTime::start();
        let broker = Arc::new(EmbeddedBroker::memory(time.clock()));
        Self { broker, dir: tempfile::tempdir().expect("a temporary directory"), time }
    }

    /// A file in the directory.
    pub fn file(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// The broker, as services take it.
    pub fn broker(&self) -> Arc<dyn Broker> {
        Arc::clone(&self.broker) as Arc<dyn Broker>
    }
}
