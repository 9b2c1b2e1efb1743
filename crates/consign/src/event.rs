//! Events and the envelope they travel in.
//!
//! On the wire an event is a [CloudEvent 1.0](https://github.com/cloudevents/spec) in the NATS binding's binary mode:
//! attributes in `ce-` headers, data in the payload, so any stock client can read it.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;
use uuid::Uuid;

use crate::Timestamp;
use crate::broker::Message;

pub use consign_macros::Event;

/// A fact that crosses a service border. Derive it:
///
/// ```
/// use consign::Event;
/// use schemars::JsonSchema;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Serialize, Deserialize, JsonSchema, Event)]
/// #[event(type = "orders.created", version = 1)]
/// struct OrderCreated {
///     order_id: String,
/// }
/// assert_eq!(OrderCreated::name(), "orders.created.v1");
/// ```
pub trait Event: Serialize + DeserializeOwned + JsonSchema + Clone + Send + Sync + 'static {
    /// `<domain>.<event>`; only the service that owns the domain publishes it.
    const TYPE: &'static str;
    /// Counts from 1; a change that breaks a reader is a new version.
    const VERSION: u32;

    /// Type and version as one word, for example `orders.created.v1`.
    fn name() -> String {
        format!("{}.v{}", Self::TYPE, Self::VERSION)
    }
}

/// An event's identity, a UUIDv7: what idempotency is measured by, whatever the broker calls the message.
pub type EventId = Uuid;

/// Ties together everything that followed from one request: 1 to 128 of `A-Z a-z 0-9 . _ : -`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
pub struct CorrelationId(#[schemars(length(min = 1, max = 128))] String);

impl CorrelationId {
    /// A new one, when the caller brought none.
    pub fn generate() -> Self {
        Self(Uuid::now_v7().to_string())
    }

    /// The text of it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text is not fit to be a correlation id.
#[derive(Debug, Error)]
#[error("a correlation id is 1 to 128 characters of A-Z, a-z, 0-9, '.', '_', ':' and '-'")]
pub struct InvalidCorrelationId;

impl FromStr for CorrelationId {
    type Err = InvalidCorrelationId;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let sane = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-');
        if (1..=128).contains(&s.len()) && s.bytes().all(sane) {
            Ok(Self(s.to_owned()))
        } else {
            Err(InvalidCorrelationId)
        }
    }
}

impl<'de> Deserialize<'de> for CorrelationId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Cow::<'de, str>::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for CorrelationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How urgent an event is. Each lane has its own subjects, so that a flood of one cannot hold up the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// Ahead of everything else.
    Express,
    /// Everything else.
    #[default]
    Standard,
}

impl Lane {
    /// All lanes, the most urgent first.
    pub const ALL: [Self; 2] = [Self::Express, Self::Standard];

    /// In the order of their urgency, as tables keep it.
    pub(crate) const fn number(self) -> i64 {
        match self {
            Self::Express => 0,
            Self::Standard => 1,
        }
    }

    /// The word in the subject.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Express => "express",
            Self::Standard => "standard",
        }
    }
}

impl FromStr for Lane {
    type Err = EnvelopeError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "express" => Ok(Self::Express),
            "standard" => Ok(Self::Standard),
            _ => Err(EnvelopeError::Malformed { attribute: "lane" }),
        }
    }
}

/// Versions of one event that can be published side by side.
const MAX_SIBLINGS: usize = 16;
/// Headers that an event may have, those of other systems included.
const MAX_HEADERS: usize = 128;
/// Bytes of one attribute.
const MAX_ATTRIBUTE: usize = 1024;

/// What an event follows from: handed on from request to event, and from event to event.
#[derive(Clone, Debug)]
pub struct Cause {
    /// The request everything goes back to.
    pub correlation_id: CorrelationId,
    /// The event this one follows from; none for the first.
    pub causation_id: Option<EventId>,
    /// [W3C trace context](https://www.w3.org/TR/trace-context/).
    pub traceparent: Option<String>,
}

impl Cause {
    /// A beginning: a fresh correlation id, no cause.
    pub fn new() -> Self {
        Self { correlation_id: CorrelationId::generate(), causation_id: None, traceparent: None }
    }
}

impl Default for Cause {
    fn default() -> Self {
        Self::new()
    }
}

/// An event's attributes: everything but its data.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// One per logical event, whatever versions and copies of it are published.
    pub id: EventId,
    /// `<domain>.<event>`.
    pub event_type: Cow<'static, str>,
    /// The version of the data's schema.
    pub version: u32,
    /// The service that published it, as `/services/<name>`.
    pub source: Cow<'static, str>,
    /// The aggregate it is about (CloudEvents `subject`).
    pub aggregate_id: String,
    /// The aggregate's version after the event; rises by at least one with each.
    pub aggregate_version: u64,
    /// When it happened.
    pub time: Timestamp,
    /// See [`Cause`].
    pub cause: Cause,
    /// See [`Lane`].
    pub lane: Lane,
    /// All versions in which this one logical event was published, if there are several.
    pub siblings: Vec<u32>,
}

/// The message is no event we can read.
#[derive(Debug, Error)]
pub enum EnvelopeError {
    /// A required attribute is not there.
    #[error("header `ce-{attribute}` is missing; events are CloudEvents 1.0 in NATS binary mode")]
    Missing {
        /// Its name without `ce-`.
        attribute: &'static str,
    },
    /// More headers than an event may have.
    #[error("it has {0} headers; {MAX_HEADERS} are allowed")]
    TooManyHeaders(usize),
    /// An attribute is there but cannot be read.
    #[error("header `ce-{attribute}` is malformed")]
    Malformed {
        /// Its name without `ce-`.
        attribute: &'static str,
    },
}

impl Envelope {
    /// What events that follow from this one are caused by.
    pub fn as_cause(&self) -> Cause {
        Cause {
            correlation_id: self.cause.correlation_id.clone(),
            causation_id: Some(self.id),
            traceparent: self.cause.traceparent.clone(),
        }
    }

    /// Type and version as one word, for example `orders.created.v1`.
    pub fn name(&self) -> String {
        format!("{}.v{}", self.event_type, self.version)
    }

    /// The message that carries this event. `key` becomes the subject's last token, for streams that keep the last
    /// message per subject.
    pub fn into_message(self, key: Option<&str>, payload: Bytes) -> Message {
        let name = self.name();
        let mut subject = format!("{name}.{}", self.lane.as_str());
        if let Some(key) = key {
            subject.push('.');
            subject.push_str(key);
        }
        let mut headers = vec![
            ("ce-specversion".into(), "1.0".into()),
            ("ce-id".into(), self.id.to_string()),
            ("ce-type".into(), name.clone()),
            ("ce-source".into(), self.source.into_owned()),
            ("ce-subject".into(), self.aggregate_id),
            ("ce-time".into(), self.time.to_string()),
            ("ce-dataschema".into(), format!("urn:consign:schema:{name}")),
            ("content-type".into(), "application/json".into()),
            ("ce-aggregateversion".into(), self.aggregate_version.to_string()),
            ("ce-correlationid".into(), self.cause.correlation_id.0),
            ("ce-lane".into(), self.lane.as_str().into()),
        ];
        if !self.siblings.is_empty() {
            let versions: Vec<String> = self.siblings.iter().map(u32::to_string).collect();
            headers.push(("ce-siblings".into(), versions.join(",")));
        }
        if let Some(id) = self.cause.causation_id {
            headers.push(("ce-causationid".into(), id.to_string()));
        }
        if let Some(traceparent) = self.cause.traceparent {
            headers.push(("traceparent".into(), traceparent));
        }
        Message { subject, msg_id: Some(format!("{}:v{}", self.id, self.version)), headers, payload }
    }

    /// Reads the attributes of a message. Those that are not CloudEvents' own may be left out, as stock clients do: the correlation id is the
    /// event's id then, the aggregate's version 1, the lane the standard one.
    pub fn from_message(message: &Message) -> Result<Self, EnvelopeError> {
        if message.headers.len() > MAX_HEADERS {
            return Err(EnvelopeError::TooManyHeaders(message.headers.len()));
        }
        let malformed = |attribute| EnvelopeError::Malformed { attribute };
        let get = |attribute: &'static str, header: &str| match message.header(header) {
            // Attributes have no control characters (CloudEvents 1.0, type system), and databases do not keep all of them.
            Some(text) if text.len() > MAX_ATTRIBUTE || text.contains(char::is_control) => {
                Err(malformed(attribute))
            }
            Some(text) => Ok(text),
            None => Err(EnvelopeError::Missing { attribute }),
        };
        if get("specversion", "ce-specversion")? != "1.0" {
            return Err(malformed("specversion"));
        }
        let (event_type, version) =
            get("type", "ce-type")?.rsplit_once(".v").ok_or_else(|| malformed("type"))?;
        let version = version.parse().map_err(|_| malformed("type"))?;
        let causation_id = match message.header("ce-causationid") {
            Some(text) => Some(text.parse().map_err(|_| malformed("causationid"))?),
            None => None,
        };
        let siblings: Result<Vec<u32>, _> = match message.header("ce-siblings") {
            Some(text) if text.split(',').count() > MAX_SIBLINGS => return Err(malformed("siblings")),
            Some(text) => text.split(',').map(str::parse).collect(),
            None => Ok(Vec::new()),
        };
        let id: EventId = get("id", "ce-id")?.parse().map_err(|_| malformed("id"))?;
        let correlation_id = match message.header("ce-correlationid") {
            Some(text) => text.parse().map_err(|_| malformed("correlationid"))?,
            None => CorrelationId(id.to_string()),
        };
        let aggregate_version = match message.header("ce-aggregateversion") {
            Some(text) => text.parse().map_err(|_| malformed("aggregateversion"))?,
            None => 1,
        };
        Ok(Self {
            siblings: siblings.map_err(|_| malformed("siblings"))?,
            id,
            event_type: event_type.to_owned().into(),
            version,
            source: get("source", "ce-source")?.to_owned().into(),
            aggregate_id: get("subject", "ce-subject")?.to_owned(),
            aggregate_version,
            time: get("time", "ce-time")?.parse().map_err(|_| malformed("time"))?,
            cause: Cause {
                correlation_id,
                causation_id,
                traceparent: message
                    .header("traceparent")
                    .filter(|text| text.len() <= MAX_ATTRIBUTE && !text.contains(char::is_control))
                    .map(str::to_owned),
            },
            lane: message.header("ce-lane").map_or(Ok(Lane::Standard), str::parse)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope() -> Envelope {
        Envelope {
            id: Uuid::now_v7(),
            event_type: "orders.created".into(),
            version: 2,
            source: "/services/order".into(),
            aggregate_id: "o-1".into(),
            aggregate_version: 7,
            time: Timestamp::from_millis(1_700_000_000_123),
            cause: Cause { causation_id: Some(Uuid::now_v7()), ..Cause::new() },
            lane: Lane::Express,
            siblings: vec![1, 2],
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let sent = envelope();
        let message = sent.clone().into_message(Some("key"), Bytes::from_static(b"{}"));
        assert_eq!(message.subject, "orders.created.v2.express.key");
        assert_eq!(message.msg_id.as_deref(), Some(format!("{}:v2", sent.id).as_str()));
        let read = Envelope::from_message(&message).unwrap();
        assert_eq!(format!("{sent:?}"), format!("{read:?}"));
    }

    #[test]
    fn a_missing_attribute_is_named() {
        let mut message = envelope().into_message(None, Bytes::new());
        message.headers.retain(|(name, _)| name != "ce-id");
        let e = Envelope::from_message(&message).unwrap_err();
        assert!(e.to_string().contains("ce-id"), "{e}");
    }

    #[test]
    fn a_stock_clients_event_is_read() {
        let mut message = envelope().into_message(None, Bytes::new());
        let ours = ["ce-aggregateversion", "ce-correlationid", "ce-lane", "ce-siblings", "ce-causationid"];
        message.headers.retain(|(name, _)| !ours.contains(&name.as_str()));
        let read = Envelope::from_message(&message).unwrap();
        assert_eq!(read.cause.correlation_id.as_str(), read.id.to_string());
        assert_eq!((read.aggregate_version, read.lane), (1, Lane::Standard));
    }

    #[test]
    fn more_siblings_than_there_can_be_are_refused() {
        let mut message = envelope().into_message(None, Bytes::new());
        message.headers.retain(|(name, _)| name != "ce-siblings");
        message.headers.push(("ce-siblings".into(), "1,".repeat(5_000) + "1"));
        assert!(Envelope::from_message(&message).unwrap_err().to_string().contains("siblings"));
    }

    #[test]
    fn insane_correlation_ids_are_refused() {
        for bad in ["", "a b", "a\nb", &"x".repeat(129)] {
            assert!(bad.parse::<CorrelationId>().is_err(), "{bad:?}");
        }
        assert!("req-1.2:3_4".parse::<CorrelationId>().is_ok());
    }
}
