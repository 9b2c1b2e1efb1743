//! A broker inside the process: JetStream's behaviour for one node, in memory or in a file.
//!
//! One task owns all state. It takes whatever commands have queued up, applies them, writes them to the file in one
//! commit, and only then answers: many publishers share one `fsync`, and nothing acknowledged is unwritten. Its scope is the
//! conformance suite, no more; delivery counts are not kept across a restart, so killing the process burns no delivery limit.

mod engine;
mod file;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{
    Broker, BrokerError, BrokerStatus, ConsumerConfig, ConsumerInfo, Delivery, Find, Message, PubAck,
    PublishError, Settlement, StoredMessage, StreamConfig, StreamInfo, passed_over,
};
use crate::Clock;
use engine::Engine;
use file::FileStore;

/// Commands waiting for the broker's task; senders beyond that wait their turn.
const QUEUE: usize = 4096;
/// Commands applied per commit.
const BATCH: usize = 1024;
/// How often limits by age are looked after.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

type Reply<T> = oneshot::Sender<Result<T, BrokerError>>;

enum Command {
    Publish {
        messages: Vec<Message>,
        reply: oneshot::Sender<Vec<Result<PubAck, PublishError>>>,
    },
    Fetch {
        stream: String,
        durable: String,
        max: usize,
        until: Instant,
        reply: Reply<Vec<Delivery>>,
    },
    Settle {
        stream: String,
        durable: String,
        settlements: Vec<(String, Settlement)>,
        reply: Reply<()>,
    },
    EnsureStream {
        config: StreamConfig,
        reply: Reply<()>,
    },
    /// With a sequence, the consumer begins there, whatever it was at.
    EnsureConsumer {
        stream: String,
        config: ConsumerConfig,
        rewind: Option<u64>,
        reply: Reply<()>,
    },
    Get {
        stream: String,
        sequence: u64,
        reply: Reply<Option<Arc<StoredMessage>>>,
    },
    Find {
        stream: String,
        filter: String,
        which: Find,
        reply: Reply<Option<Arc<StoredMessage>>>,
    },
    StreamInfo {
        stream: String,
        reply: Reply<StreamInfo>,
    },
    Consumers {
        stream: String,
        reply: Reply<Vec<ConsumerInfo>>,
    },
    ConsumerInfo {
        stream: String,
        durable: String,
        reply: Reply<ConsumerInfo>,
    },
    Close {
        reply: oneshot::Sender<()>,
    },
}

/// The embedded broker's handle.
#[derive(Debug)]
pub struct EmbeddedBroker {
    commands: mpsc::Sender<Command>,
    kind: &'static str,
    failing: Arc<AtomicBool>,
    owner: Mutex<Option<JoinHandle<()>>>,
}

impl EmbeddedBroker {
    /// In memory, on tokio's clock: with paused time, tests advance `ack_wait`, backoff and windows at will.
    pub fn memory(clock: Clock) -> Self {
        Self::start(Engine::new(clock, None), "embedded (memory)")
    }

    /// In a SQLite file, made if it is not there. The file belongs to one process at a time.
    pub async fn open(path: &Path, clock: Clock) -> Result<Self, BrokerError> {
        let store = FileStore::open(path).await.map_err(unavailable)?;
        let engine = Engine::load(clock, store).await.map_err(unavailable)?;
        Ok(Self::start(engine, "embedded (file)"))
    }

    fn start(engine: Engine, kind: &'static str) -> Self {
        let (commands, queue) = mpsc::channel(QUEUE);
        let failing = Arc::new(AtomicBool::new(false));
        let owner = tokio::spawn(run(engine, queue, Arc::clone(&failing)));
        Self { commands, kind, failing, owner: Mutex::new(Some(owner)) }
    }

    /// Writes what is unwritten and stops. Calls after that fail with `Unavailable`.
    pub async fn close(&self) {
        let (reply, closed) = oneshot::channel();
        if self.commands.send(Command::Close { reply }).await.is_ok() {
            let _ = closed.await;
        }
        let owner = self.owner.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(owner) = owner {
            let _ = owner.await;
        }
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, BrokerError> {
        let closed = || BrokerError::Unavailable("the embedded broker is closed".into());
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }
}

fn unavailable(e: sqlx::Error) -> BrokerError {
    BrokerError::Unavailable(format!("the broker's file: {e}"))
}

/// The task that owns the engine, until it is told to close or the last handle is gone.
async fn run(mut engine: Engine, mut queue: mpsc::Receiver<Command>, failing: Arc<AtomicBool>) {
    let mut batch = Vec::with_capacity(BATCH);
    let mut housekeeping = Instant::now() + HOUSEKEEPING;
    loop {
        let wake = engine.next_timer().map_or(housekeeping, |t| t.min(housekeeping));
        let mut closing = None;
        let mut open = true;
        tokio::select! {
            n = queue.recv_many(&mut batch, BATCH) => open = n > 0,
            () = tokio::time::sleep_until(wake) => {}
        }
        let mut answers = Vec::new();
        for command in batch.drain(..) {
            match command {
                Command::Close { reply } => closing = Some(reply),
                command => engine.apply(command, &mut answers).await,
            }
        }
        if Instant::now() >= housekeeping {
            engine.housekeep().await;
            housekeeping = Instant::now() + HOUSEKEEPING;
        }
        engine.expire();
        let last = closing.is_some() || !open;
        if !write(&mut engine, &failing, last).await {
            // Closing on a file that cannot be written: whoever waits is told that it is unknown, not that it is stored.
            return;
        }
        for answer in answers {
            answer();
        }
        engine.dispatch().await;
        if last {
            if let Some(reply) = closing {
                let _ = reply.send(());
            }
            return;
        }
    }
}

/// Writes the journal, as often as it takes: answers wait for it, so a full disk delays but never loses. `false` if it could not be
/// written before the end.
async fn write(engine: &mut Engine, failing: &AtomicBool, last: bool) -> bool {
    let mut delay = Duration::from_millis(50);
    while let Err(error) = engine.write(last).await {
        failing.store(true, Ordering::Relaxed);
        tracing::error!(%error, retry_in = ?delay, "the embedded broker cannot write its file");
        if last {
            return false;
        }
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(Duration::from_secs(5));
    }
    failing.store(false, Ordering::Relaxed);
    true
}

#[async_trait]
impl Broker for EmbeddedBroker {
    async fn ensure_stream(&self, config: &StreamConfig) -> Result<(), BrokerError> {
        let config = config.clone();
        self.ask(|reply| Command::EnsureStream { config, reply }).await
    }

    async fn ensure_consumer(&self, stream: &str, config: &ConsumerConfig) -> Result<(), BrokerError> {
        match self.consumer_info(stream, &config.durable).await {
            Ok(is) => {
                if let Some(what) = passed_over(self, stream, &is, &config.filter_subjects).await? {
                    let (consumer, what) = (config.durable.clone(), what.to_string());
                    return Err(BrokerError::PassesOver { consumer, what });
                }
            }
            Err(BrokerError::NoConsumer { .. }) => {}
            Err(e) => return Err(e),
        }
        let (stream, config) = (stream.to_owned(), config.clone());
        self.ask(|reply| Command::EnsureConsumer { stream, config, rewind: None, reply }).await
    }

    async fn rewind_consumer(
        &self,
        stream: &str,
        config: &ConsumerConfig,
        sequence: u64,
    ) -> Result<(), BrokerError> {
        let (stream, config) = (stream.to_owned(), config.clone());
        self.ask(|reply| Command::EnsureConsumer { stream, config, rewind: Some(sequence), reply }).await
    }

    async fn publish(&self, messages: Vec<Message>) -> Vec<Result<PubAck, PublishError>> {
        let count = messages.len();
        let closed = || vec![Err(PublishError::Unknown("the embedded broker is closed".into())); count];
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Publish { messages, reply }).await.is_err() {
            return closed();
        }
        answer.await.unwrap_or_else(|_| closed())
    }

    async fn fetch(
        &self,
        stream: &str,
        durable: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, BrokerError> {
        let (stream, durable, until) = (stream.to_owned(), durable.to_owned(), Instant::now() + wait);
        self.ask(|reply| Command::Fetch { stream, durable, max, until, reply }).await
    }

    async fn settle(
        &self,
        stream: &str,
        durable: &str,
        settlements: Vec<(String, Settlement)>,
    ) -> Result<(), BrokerError> {
        let (stream, durable) = (stream.to_owned(), durable.to_owned());
        self.ask(|reply| Command::Settle { stream, durable, settlements, reply }).await
    }

    async fn get(&self, stream: &str, sequence: u64) -> Result<Option<Arc<StoredMessage>>, BrokerError> {
        let stream = stream.to_owned();
        self.ask(|reply| Command::Get { stream, sequence, reply }).await
    }

    async fn find(
        &self,
        stream: &str,
        filter: &str,
        which: Find,
    ) -> Result<Option<Arc<StoredMessage>>, BrokerError> {
        let (stream, filter) = (stream.to_owned(), filter.to_owned());
        self.ask(|reply| Command::Find { stream, filter, which, reply }).await
    }

    async fn stream_info(&self, stream: &str) -> Result<StreamInfo, BrokerError> {
        let stream = stream.to_owned();
        self.ask(|reply| Command::StreamInfo { stream, reply }).await
    }

    async fn consumer_info(&self, stream: &str, durable: &str) -> Result<ConsumerInfo, BrokerError> {
        let (stream, durable) = (stream.to_owned(), durable.to_owned());
        self.ask(|reply| Command::ConsumerInfo { stream, durable, reply }).await
    }

    async fn consumers(&self, stream: &str) -> Result<Vec<ConsumerInfo>, BrokerError> {
        let stream = stream.to_owned();
        self.ask(|reply| Command::Consumers { stream, reply }).await
    }

    fn status(&self) -> BrokerStatus {
        let failing = self.failing.load(Ordering::Relaxed);
        let closed = self.commands.is_closed();
        BrokerStatus {
            kind: self.kind,
            connected: !failing && !closed,
            detail: match (closed, failing) {
                (true, _) => Some("closed".into()),
                (_, true) => Some("cannot write its file".into()),
                _ => None,
            },
        }
    }
}
