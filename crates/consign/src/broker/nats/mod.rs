//! NATS JetStream. What was measured of the server and the client, and what follows from it, is said where it matters.

mod connect;
mod provision;
mod pull;
mod rights;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use async_nats::header::{HeaderMap, NATS_MESSAGE_ID};
use async_nats::jetstream::context::{ContextBuilder, PublishAckFuture, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::{self, ErrorCode, consumer, stream};
use async_nats::{Client, HeaderName};
use async_trait::async_trait;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    Broker, BrokerError, BrokerStatus, ConsumerConfig, ConsumerInfo, Delivery, Find, Message, PubAck,
    PublishError, Settlement, StoredMessage, StreamConfig, StreamInfo, is_valid_subject,
};
use crate::{Timestamp, telemetry};
use connect::Watch;
pub use connect::{ConnectError, NatsConfig, Provision, TlsConfig};
pub use provision::{Difference, Drift};
use pull::{Inboxes, Pulled};
pub use rights::{Rights, rights};

/// Publishes in flight at a time. More brings nothing: 512 reach what 4096 do.
const WINDOW: usize = 512;

/// A connection to NATS, shared by all of a service.
pub struct NatsBroker {
    context: jetstream::Context,
    watch: Arc<Watch>,
    inboxes: Inboxes,
    config: NatsConfig,
}

impl NatsBroker {
    /// Connects as `name`, trying until `connect_limit`; afterwards the connection is made again whenever it is lost.
    ///
    /// # Errors
    /// A file of the configuration cannot be read, or nobody answered in time.
    pub async fn connect(config: &NatsConfig, name: &str) -> Result<Self, ConnectError> {
        let (client, watch) = connect::connect(config, name).await?;
        let context = ContextBuilder::new()
            .timeout(config.timeout)
            .ack_timeout(config.timeout)
            // Both, for the limit is 5000 and enforced by default, which the documentation denies.
            .max_ack_inflight(WINDOW * 8)
            .backpressure_on_inflight(true)
            .build(client);
        Ok(Self { context, watch, inboxes: Inboxes::default(), config: config.clone() })
    }

    /// Sends what is still to be sent, settlements above all, and closes the connection, within `limit`.
    pub async fn close(&self, limit: Duration) {
        let closing = async {
            self.inboxes.close(&self.context).await;
            let client = self.client();
            // Drain returns at once; that it is done is told by an event.
            if client.flush().await.is_ok() && client.drain().await.is_ok() {
                self.watch.closed().await;
            }
        };
        if tokio::time::timeout(limit, closing).await.is_err() {
            tracing::warn!(?limit, "the connection to NATS did not close in time");
        }
    }

    fn client(&self) -> Client {
        self.context.client()
    }

    /// A call of JetStream's API; some calls take no body, not even an empty one in JSON.
    async fn api<T: DeserializeOwned>(&self, subject: &str, body: Option<Value>) -> Result<T, ApiError> {
        if !connect::is_connected(&self.client()) {
            // A request while disconnected would wait in a queue, and leak if it is never answered.
            return Err(ApiError::Unavailable(self.watch.fault().unwrap_or_else(|| "disconnected".into())));
        }
        let body = body.map_or_else(Bytes::new, |b| b.to_string().into());
        let answer = self.client().request(format!("$JS.API.{subject}"), body).await;
        let answer = answer.map_err(|e| ApiError::Unavailable(telemetry::chain(&e)))?;
        match serde_json::from_slice(&answer.payload) {
            Ok(Response::Ok(answer)) => Ok(answer),
            Ok(Response::Err { error }) => Err(ApiError::Refused(error)),
            Err(error) => {
                Err(ApiError::Unavailable(format!("{subject}: an answer that cannot be read: {error}")))
            }
        }
    }

    /// Sends a message; its acknowledgement is waited for by whoever awaits what is returned.
    async fn send(&self, message: Message) -> Result<PublishAckFuture, PublishError> {
        // The client would panic.
        message.check()?;
        let Message { subject, msg_id, headers, payload } = message;
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name.as_str(), value);
        }
        if let Some(id) = msg_id {
            map.insert(NATS_MESSAGE_ID, id);
        }
        let publish = PublishMessage::build().payload(payload).headers(map);
        self.context
            .send_publish(subject, publish)
            .await
            .map_err(|e| PublishError::Unknown(telemetry::chain(&e)))
    }

    /// Why nobody answers for a consumer.
    async fn missing(&self, stream: &str, durable: &str) -> BrokerError {
        match self.consumer(stream, durable).await {
            Ok(_) => BrokerError::Unavailable(format!("consumer {durable} of {stream} has no leader")),
            Err(e) => e,
        }
    }

    async fn stream(&self, name: &str) -> Result<stream::Info, BrokerError> {
        self.api(&format!("STREAM.INFO.{name}"), None).await.map_err(|e| e.of(name, ""))
    }

    /// One message, asked for as the API's `STREAM.MSG.GET` has it.
    async fn message(&self, stream: &str, which: Value) -> Result<Option<Arc<StoredMessage>>, BrokerError> {
        #[derive(serde::Deserialize)]
        struct Answer {
            message: stream::RawMessage,
        }
        let asked: Result<Answer, ApiError> =
            self.api(&format!("STREAM.MSG.GET.{stream}"), Some(which)).await;
        let raw = match asked {
            Ok(answer) => answer.message,
            Err(ApiError::Refused(e)) if e.error_code() == ErrorCode::NO_MESSAGE_FOUND => return Ok(None),
            Err(e) => return Err(e.of(stream, "")),
        };
        let found = jetstream::message::StreamMessage::try_from(raw)
            .map_err(|e| BrokerError::Unavailable(e.to_string()))?;
        Ok(Some(Arc::new(stored(
            found.sequence,
            timestamp(found.time),
            found.subject.into_string(),
            Some(found.headers),
            found.payload,
        ))))
    }

    async fn consumer(&self, stream: &str, durable: &str) -> Result<consumer::Info, BrokerError> {
        self.api(&format!("CONSUMER.INFO.{stream}.{durable}"), None).await.map_err(|e| e.of(stream, durable))
    }
}

/// What became of a message that was sent.
async fn acknowledgement(
    subject: String,
    sent: Result<PublishAckFuture, PublishError>,
) -> Result<PubAck, PublishError> {
    let error = match sent?.await {
        Ok(ack) => {
            return Ok(PubAck {
                stream: ack.stream.into(),
                sequence: ack.sequence,
                duplicate: ack.duplicate,
            });
        }
        // Also while a stream has no leader, so it says nothing for good.
        Err(error) if error.kind() == PublishErrorKind::StreamNotFound => {
            return Err(PublishError::NoStream(subject));
        }
        Err(error) => error,
    };
    let full =
        std::error::Error::source(&error).and_then(|e| e.downcast_ref::<jetstream::Error>()).is_some_and(
            |e| e.error_code() == ErrorCode::STREAM_STORE_FAILED && e.to_string().contains("maximum"),
        );
    Err(if full {
        PublishError::StreamFull(subject.into())
    } else {
        PublishError::Unknown(telemetry::chain(&error))
    })
}

/// JetStream's API said no, or did not answer.
#[derive(Debug)]
enum ApiError {
    Refused(jetstream::Error),
    Unavailable(String),
}

impl ApiError {
    fn of(self, stream: &str, durable: &str) -> BrokerError {
        match self {
            Self::Unavailable(why) => BrokerError::Unavailable(why),
            Self::Refused(e) => match e.error_code() {
                ErrorCode::STREAM_NOT_FOUND => BrokerError::NoStream(stream.to_owned()),
                ErrorCode::CONSUMER_NOT_FOUND => {
                    BrokerError::NoConsumer { stream: stream.to_owned(), consumer: durable.to_owned() }
                }
                // A cluster whose nodes have not all found each other yet.
                ErrorCode::CLUSTER_NO_PEERS => BrokerError::Unavailable(e.to_string()),
                // No leader, no quorum, out of resources: it may pass.
                _ if e.code() >= 500 && e.error_code() != ErrorCode::STREAM_INVALID_CONFIG => {
                    BrokerError::Unavailable(e.to_string())
                }
                _ => BrokerError::Config(e.to_string()),
            },
        }
    }
}

fn timestamp(t: time::OffsetDateTime) -> Timestamp {
    Timestamp::from_millis(i64::try_from(t.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX))
}

/// A message as a stream holds it. The client keeps headers in a hash map, so they are put in the order of their names.
fn stored(
    sequence: u64,
    stored_at: Timestamp,
    subject: String,
    headers: Option<HeaderMap>,
    payload: Bytes,
) -> StoredMessage {
    let map = headers.unwrap_or_default();
    let text = |name: &HeaderName| name.to_string();
    let mut headers: Vec<(String, String)> = map
        .iter()
        .filter(|(name, _)| !AsRef::<str>::as_ref(*name).eq_ignore_ascii_case("Nats-Msg-Id"))
        .flat_map(|(name, values)| values.iter().map(move |v| (text(name), v.to_string())))
        .collect();
    headers.sort();
    let msg_id = map.get(NATS_MESSAGE_ID).map(ToString::to_string);
    StoredMessage { sequence, stored_at, message: Message { subject, msg_id, headers, payload } }
}

fn known(info: consumer::Info) -> ConsumerInfo {
    ConsumerInfo {
        durable: info.name,
        filters: provision::filters(&info.config),
        pending: info.num_pending,
        ack_pending: info.num_ack_pending as u64,
        redelivered: info.num_redelivered as u64,
        ack_floor: info.ack_floor.stream_sequence,
        delivered: info.delivered.stream_sequence,
        last_delivered_at: info.delivered.last_active.map(timestamp),
    }
}

#[async_trait]
impl Broker for NatsBroker {
    async fn ensure_stream(&self, config: &StreamConfig) -> Result<(), BrokerError> {
        match self.config.provision {
            Provision::Create => self.apply_stream(config).await.map(drop),
            // Whether it is there shows when it is published to; asking would need one more right.
            Provision::Bind => Ok(()),
        }
    }

    async fn ensure_consumer(&self, stream: &str, config: &ConsumerConfig) -> Result<(), BrokerError> {
        match self.config.provision {
            Provision::Create => self.apply_consumer(stream, config).await.map(drop),
            Provision::Bind => self.bind_consumer(stream, config).await,
        }
    }

    async fn rewind_consumer(
        &self,
        stream: &str,
        config: &ConsumerConfig,
        sequence: u64,
    ) -> Result<(), BrokerError> {
        self.rewind(stream, config, sequence).await
    }

    async fn publish(&self, messages: Vec<Message>) -> Vec<Result<PubAck, PublishError>> {
        let mut answers = Vec::with_capacity(messages.len());
        let mut in_flight = VecDeque::with_capacity(WINDOW);
        for message in messages {
            if in_flight.len() == WINDOW
                && let Some((subject, sent)) = in_flight.pop_front()
            {
                answers.push(acknowledgement(subject, sent).await);
            }
            // One after the other, so that a stream holds them in this order.
            let subject = message.subject.clone();
            in_flight.push_back((subject, self.send(message).await));
        }
        for (subject, sent) in in_flight {
            answers.push(acknowledgement(subject, sent).await);
        }
        answers
    }

    async fn fetch(
        &self,
        stream: &str,
        durable: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, BrokerError> {
        if !connect::is_connected(&self.client()) {
            return Err(BrokerError::Unavailable(
                self.watch.fault().unwrap_or_else(|| "disconnected".into()),
            ));
        }
        match self.inboxes.fetch(&self.context, &self.watch, stream, durable, max, wait).await? {
            Pulled::Messages(messages) => Ok(messages),
            Pulled::NoResponders => Err(self.missing(stream, durable).await),
        }
    }

    async fn settle(
        &self,
        _stream: &str,
        _durable: &str,
        settlements: Vec<(String, Settlement)>,
    ) -> Result<(), BrokerError> {
        let client = self.client();
        let send = async {
            for (reply, settlement) in settlements {
                let body = match settlement {
                    Settlement::Ack => Bytes::from_static(b"+ACK"),
                    Settlement::Progress => Bytes::from_static(b"+WPI"),
                    Settlement::Term(reason) => format!("+TERM {reason}").into(),
                    Settlement::Nak(delay) => {
                        let nanos = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
                        format!("-NAK {}", json!({"delay": nanos})).into()
                    }
                };
                client.publish(reply, body).await.map_err(|e| BrokerError::Unavailable(e.to_string()))?;
            }
            Ok(())
        };
        // The client's queue blocks without a limit once it is full.
        let sent = tokio::time::timeout(self.config.timeout, send).await;
        sent.unwrap_or_else(|_| Err(BrokerError::Unavailable("settlements were not sent in time".into())))
    }

    async fn get(&self, stream: &str, sequence: u64) -> Result<Option<Arc<StoredMessage>>, BrokerError> {
        self.message(stream, json!({"seq": sequence})).await
    }

    async fn find(
        &self,
        stream: &str,
        filter: &str,
        which: Find,
    ) -> Result<Option<Arc<StoredMessage>>, BrokerError> {
        let which = match which {
            Find::From(sequence) => json!({"seq": sequence.max(1), "next_by_subj": filter}),
            Find::Last => json!({"last_by_subj": filter}),
        };
        self.message(stream, which).await
    }

    async fn stream_info(&self, stream: &str) -> Result<StreamInfo, BrokerError> {
        let info = self.stream(stream).await?;
        let state = info.state;
        Ok(StreamInfo {
            incarnation: info.created.unix_timestamp_nanos().to_string(),
            messages: state.messages,
            bytes: state.bytes,
            // An empty new stream says 0.
            first_sequence: if state.messages == 0 { state.last_sequence + 1 } else { state.first_sequence },
            last_sequence: state.last_sequence,
        })
    }

    async fn consumer_info(&self, stream: &str, durable: &str) -> Result<ConsumerInfo, BrokerError> {
        Ok(known(self.consumer(stream, durable).await?))
    }

    async fn consumers(&self, stream: &str) -> Result<Vec<ConsumerInfo>, BrokerError> {
        #[derive(serde::Deserialize)]
        struct Page {
            total: usize,
            #[serde(default)]
            consumers: Option<Vec<consumer::Info>>,
        }
        let mut all = Vec::new();
        loop {
            let asked =
                self.api(&format!("CONSUMER.LIST.{stream}"), Some(json!({"offset": all.len()}))).await;
            let page: Page = asked.map_err(|e| e.of(stream, ""))?;
            let found = page.consumers.unwrap_or_default();
            let done = found.is_empty();
            all.extend(found.into_iter().map(known));
            if done || all.len() >= page.total {
                return Ok(all);
            }
        }
    }

    fn status(&self) -> BrokerStatus {
        let connected = connect::is_connected(&self.client());
        // The state changes before the event that tells why is heard.
        let detail = self.watch.fault().or_else(|| (!connected).then(|| "disconnected".to_owned()));
        BrokerStatus { kind: "nats", connected, detail }
    }
}
