//! From a message to what a handler takes: bounds, envelope, schema, type, upcasters. All of it works on what anybody may have published, so
//! nothing here may panic, nor cost more than the message's size; the fuzz target in `fuzz/` tries.

use std::sync::Arc;

use serde_json::Value;
use thiserror::Error;

use super::{ReadyConsumer, Route};
use crate::Timestamp;
use crate::broker::Message;
use crate::dead_letter::Reason;
use crate::event::Envelope;
use crate::handler::Incoming;
use crate::schema::bounds;

pub(super) type Decoded<'a> = Result<(Incoming, &'a Route), Reject>;

/// A message that no handler will see.
#[derive(Debug, Error)]
#[error("{error}")]
pub struct Reject {
    /// The reason that its dead letter has.
    pub reason: Reason,
    /// What is wrong with it.
    pub error: String,
    /// Its attributes, if they could be read.
    pub envelope: Option<Box<Envelope>>,
}

impl ReadyConsumer {
    /// What this consumer would make of a message: the event that its handler takes, such as `orders.created.v2`.
    ///
    /// # Errors
    /// The message is no event, too large, older than the inbox remembers, of a version that cannot be read, or breaks its schema.
    pub fn read(&self, message: &Message, now: Timestamp) -> Result<String, Reject> {
        self.decode(message, now).map(|(_, route)| route.target.to_string())
    }

    pub(super) fn decode(&self, message: &Message, now: Timestamp) -> Decoded<'_> {
        let undecodable = |error: String| Reject { reason: Reason::Undecodable, error, envelope: None };
        let envelope = Envelope::from_message(message).map_err(|e| undecodable(e.to_string()))?;
        let reject = |reason, error| Reject { reason, error, envelope: Some(Box::new(envelope.clone())) };
        let Some(route) = self.routes.get(&envelope.name()) else {
            return Err(reject(Reason::Unaccepted, format!("{} is not accepted here", envelope.name())));
        };
        let horizon = self.options.inbox_retention;
        if now.since(envelope.time) > horizon {
            let error = format!("older than the inbox remembers ({horizon:?}): it may have been handled");
            return Err(reject(Reason::BeyondHorizon, error));
        }
        bounds::check(&message.payload)
            .map_err(|e| reject(Reason::Undecodable, format!("the payload cannot be an event: {e}")))?;
        let value: Value = serde_json::from_slice(&message.payload)
            .map_err(|e| reject(Reason::Undecodable, format!("the payload is not JSON: {e}")))?;
        route.schema.validate(&value).map_err(|e| reject(Reason::BreaksSchema, e.to_string()))?;
        let event = (route.decode)(value).map_err(|e| reject(Reason::BreaksSchema, e.to_string()))?;
        Ok((Incoming { envelope: Arc::new(envelope), event }, route))
    }
}
