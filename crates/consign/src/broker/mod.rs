//! What a broker must do, once, as a trait with its promises. The shape is JetStream's; the embedded broker follows it,
//! and the conformance suite in `testing::conformance` holds every implementation to what is written here.

pub mod embedded;
pub mod nats;
mod passed_over;
mod subject;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::Timestamp;
pub(crate) use passed_over::{PassedOver, dropped, first_passed_over, passed_over};
pub(crate) use subject::versioned;
pub use subject::{is_valid_filter, is_valid_subject, matches, overlap};

/// What is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Where to: dot-separated tokens, no wildcards.
    pub subject: String,
    /// A second message with the same id inside the stream's window is not stored again (`Nats-Msg-Id`).
    pub msg_id: Option<String>,
    /// Names and values, in order.
    pub headers: Vec<(String, String)>,
    /// The body, which the broker does not read.
    pub payload: Bytes,
}

impl Message {
    /// Whether a broker can carry it: NATS writes headers as lines, `name: value`.
    pub(crate) fn check(&self) -> Result<(), PublishError> {
        if !is_valid_subject(&self.subject) {
            return Err(PublishError::InvalidSubject(self.subject.clone()));
        }
        let breaks_line = |value: &str| value.bytes().any(|b| b == b'\r' || b == b'\n');
        let names = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b':');
        let header = self.headers.iter().find(|(name, value)| !names(name) || breaks_line(value));
        if let Some((name, _)) = header {
            return Err(PublishError::InvalidHeader(name.clone()));
        }
        if self.msg_id.as_deref().is_some_and(breaks_line) {
            return Err(PublishError::InvalidHeader("Nats-Msg-Id".into()));
        }
        Ok(())
    }

    /// A header's value; names are compared without case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }
}

/// How long streams keep messages unless they say otherwise.
pub const STREAM_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// A stream: what is stored, and for how long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamConfig {
    /// Upper case by convention.
    pub name: String,
    /// Which subjects it stores; wildcards `*` and `>`; no two streams may overlap.
    pub subjects: Vec<String>,
    /// Messages older than this are removed.
    pub max_age: Option<Duration>,
    /// How many messages it holds.
    pub max_messages: Option<u64>,
    /// How many bytes of subjects, headers and payloads it holds.
    pub max_bytes: Option<u64>,
    /// How many messages per subject it holds; the oldest of that subject goes.
    pub max_messages_per_subject: Option<u64>,
    /// What gives way when `max_messages` or `max_bytes` is reached.
    pub discard: Discard,
    /// How long a message id is remembered.
    pub duplicate_window: Duration,
}

impl StreamConfig {
    /// A stream of the given subjects kept for seven days, refusing when full, remembering ids for two minutes.
    pub fn new(name: &str, subjects: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            subjects: subjects.iter().map(|&s| s.to_owned()).collect(),
            max_age: Some(STREAM_AGE),
            max_messages: None,
            max_bytes: None,
            max_messages_per_subject: None,
            discard: Discard::New,
            duplicate_window: Duration::from_secs(120),
        }
    }

    /// The same, but holding only the last message of each subject, for ever.
    #[must_use]
    pub fn last_per_subject(self) -> Self {
        Self { max_messages_per_subject: Some(1), max_age: None, ..self }
    }
}

/// What gives way when a stream is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Discard {
    /// The publish is refused with [`PublishError::StreamFull`]: nothing is dropped silently.
    New,
    /// The oldest messages are removed.
    Old,
}

/// A durable consumer: a named position in a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsumerConfig {
    /// Its name, unique within the stream.
    pub durable: String,
    /// Which subjects it wants, no two overlapping; empty means all.
    pub filter_subjects: Vec<String>,
    /// Unsettled for so long, a message is delivered again.
    pub ack_wait: Duration,
    /// Overrides `ack_wait` for the first, second, … delivery; the last entry repeats. Not applied to naks.
    pub backoff: Vec<Duration>,
    /// After so many deliveries a message is given up and an advisory published; none means never.
    pub max_deliver: Option<u32>,
    /// How many messages may be delivered and unsettled.
    pub max_ack_pending: usize,
    /// Where a new consumer begins.
    pub deliver: DeliverPolicy,
}

impl ConsumerConfig {
    /// Everything the filters match from the beginning; `ack_wait` 30 s, at most 4096 unsettled, never given up.
    pub fn new(durable: &str, filter_subjects: Vec<String>) -> Self {
        Self {
            durable: durable.to_owned(),
            filter_subjects,
            ack_wait: Duration::from_secs(30),
            backoff: Vec::new(),
            max_deliver: None,
            max_ack_pending: 4096,
            deliver: DeliverPolicy::All,
        }
    }
}

/// Where a new consumer begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeliverPolicy {
    /// At the first message stored.
    All,
    /// After the last message stored when the consumer is made.
    New,
    /// At this sequence, or the next that is there.
    FromSequence(u64),
}

/// The broker has stored the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PubAck {
    /// In which stream.
    pub stream: Arc<str>,
    /// At which sequence; for a duplicate, the first one's.
    pub sequence: u64,
    /// The id was known, so nothing was stored.
    pub duplicate: bool,
}

/// A message as a stream holds it.
#[derive(Clone, Debug)]
pub struct StoredMessage {
    /// Counts up from 1 within the stream.
    pub sequence: u64,
    /// When the broker stored it.
    pub stored_at: Timestamp,
    /// The message.
    pub message: Message,
}

/// A message handed to a consumer, to be settled by its `reply`.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The message.
    pub message: Arc<StoredMessage>,
    /// From which stream.
    pub stream: Arc<str>,
    /// How often it has been delivered, this time included.
    pub delivered: u32,
    /// Names this delivery to [`Broker::settle`].
    pub reply: String,
}

/// What becomes of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Done; never delivered again.
    Ack,
    /// Deliver again after this delay. Never zero in this project: an instant nak burns the delivery limit.
    Nak(Duration),
    /// Give up at once, with a reason for the advisory.
    Term(String),
    /// Still at work: the wait starts anew.
    Progress,
}

/// The broker's view of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StreamInfo {
    /// Another one if the stream was deleted and made anew, when its sequences begin again.
    pub incarnation: String,
    /// How many messages are stored.
    pub messages: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// The first sequence stored; one past `last_sequence` when empty.
    pub first_sequence: u64,
    /// The last sequence given out; 0 before the first.
    pub last_sequence: u64,
}

/// The broker's view of a consumer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConsumerInfo {
    /// Its name.
    pub durable: String,
    /// Which subjects it is given; empty means all.
    pub filters: Vec<String>,
    /// Matching messages not yet delivered once.
    pub pending: u64,
    /// Delivered and unsettled.
    pub ack_pending: u64,
    /// Of those, delivered more than once.
    pub redelivered: u64,
    /// Everything up to here is settled.
    pub ack_floor: u64,
    /// The last sequence delivered.
    pub delivered: u64,
    /// When that was, as far as the broker remembers.
    pub last_delivered_at: Option<Timestamp>,
}

/// Which of the messages that a filter matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Find {
    /// The first one at this sequence or after it.
    From(u64),
    /// The last one.
    Last,
}

/// Whether the broker can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BrokerStatus {
    /// `embedded (memory)`, `embedded (file)`, `nats`.
    pub kind: &'static str,
    /// Can it be published to now.
    pub connected: bool,
    /// What is wrong, if something is.
    pub detail: Option<String>,
}

/// A publish was not acknowledged. Whether it was stored is unknown unless stated: repeat it with the same id.
#[derive(Clone, Debug, Error)]
pub enum PublishError {
    /// No stream stores this subject. Not stored.
    #[error("no stream stores subject `{0}`")]
    NoStream(String),
    /// The stream is full and discards new messages. Not stored.
    #[error("stream `{0}` is full")]
    StreamFull(Arc<str>),
    /// The subject is not one that can be published to. Not stored.
    #[error("`{0}` is no valid subject to publish to")]
    InvalidSubject(String),
    /// A header's name is not printable ASCII without `:`, or its value breaks the line. Not stored.
    #[error("header {0:?} cannot be sent: names are printable ASCII without colons, values are one line")]
    InvalidHeader(String),
    /// No answer: it may have been stored.
    #[error("the broker did not answer: {0}")]
    Unknown(String),
}

/// A call to the broker failed.
#[derive(Clone, Debug, Error)]
pub enum BrokerError {
    /// There is no such stream.
    #[error("there is no stream `{0}`")]
    NoStream(String),
    /// There is no such consumer.
    #[error("stream `{stream}` has no consumer `{consumer}`")]
    NoConsumer {
        /// The stream.
        stream: String,
        /// The consumer that it does not have.
        consumer: String,
    },
    /// A narrower filter would pass over what the consumer has not settled. Nothing was changed.
    #[error("consumer {consumer}: its new filter would pass over {what}")]
    PassesOver {
        /// The consumer.
        consumer: String,
        /// What would be passed over, and the way out.
        what: String,
    },
    /// The configuration cannot be had, or not changed in place.
    #[error("{0}")]
    Config(String),
    /// The broker cannot be reached, or could not do it now; try again.
    #[error("broker unavailable: {0}")]
    Unavailable(String),
}

/// A broker with at-least-once delivery and durable consumers.
///
/// # Guarantees
/// 1. A publish that returned [`PubAck`] is stored, survives a restart of the process (unless in memory), and is delivered to every
///    consumer whose filter matches until that consumer settles it with `Ack` or `Term`, or `max_deliver` is used up.
/// 2. A message id seen inside the window gives the first sequence with `duplicate = true`, and stores nothing.
/// 3. Sequences in a stream rise; a consumer is given new messages in that order. Redeliveries come between.
/// 4. An unsettled delivery comes again after `ack_wait`; after `Progress` the wait starts anew; after `Nak(d)` it comes after `d`;
///    also if the consumer's filter does not match it any more.
/// 5. No more than `max_ack_pending` deliveries are unsettled at a time.
/// 6. Nothing is dropped silently: limits remove the oldest or refuse the newest as configured, and a message given up after
///    `max_deliver` is announced on `$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.<stream>.<consumer>`.
///
/// It does not promise that a message is delivered only once, nor that the window outlives its duration: the inbox is there for that.
#[async_trait]
pub trait Broker: Send + Sync + 'static {
    /// Makes the stream, or changes its limits. Subjects that another stream stores are refused.
    async fn ensure_stream(&self, config: &StreamConfig) -> Result<(), BrokerError>;
    /// Makes the consumer, or changes it; its position stays. A narrower filter that would pass something over is refused with
    /// [`BrokerError::PassesOver`].
    async fn ensure_consumer(&self, stream: &str, config: &ConsumerConfig) -> Result<(), BrokerError>;
    /// Makes the consumer anew, so that it is given everything from `sequence` on once more: where its stream has lost what it had passed.
    async fn rewind_consumer(
        &self,
        stream: &str,
        config: &ConsumerConfig,
        sequence: u64,
    ) -> Result<(), BrokerError>;
    /// Publishes all in this order, pipelined; the answers are in the same order.
    async fn publish(&self, messages: Vec<Message>) -> Vec<Result<PubAck, PublishError>>;
    /// Up to `max` messages as soon as there is at least one; none if there is none within `wait`.
    async fn fetch(
        &self,
        stream: &str,
        durable: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, BrokerError>;
    /// Settles deliveries by their `reply`. Settling what is settled is no error.
    async fn settle(
        &self,
        stream: &str,
        durable: &str,
        settlements: Vec<(String, Settlement)>,
    ) -> Result<(), BrokerError>;
    /// One stored message.
    async fn get(&self, stream: &str, sequence: u64) -> Result<Option<Arc<StoredMessage>>, BrokerError>;
    /// One of the messages whose subject matches a filter.
    async fn find(
        &self,
        stream: &str,
        filter: &str,
        which: Find,
    ) -> Result<Option<Arc<StoredMessage>>, BrokerError>;
    /// See [`StreamInfo`].
    async fn stream_info(&self, stream: &str) -> Result<StreamInfo, BrokerError>;
    /// See [`ConsumerInfo`].
    async fn consumer_info(&self, stream: &str, durable: &str) -> Result<ConsumerInfo, BrokerError>;
    /// All consumers of a stream, whoever they belong to.
    async fn consumers(&self, stream: &str) -> Result<Vec<ConsumerInfo>, BrokerError>;
    /// Whether it can be reached now; does not wait.
    fn status(&self) -> BrokerStatus;
}
