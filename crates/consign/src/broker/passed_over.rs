//! What a consumer would miss if its filter became narrower: the reason why a consumer moves v1 → v1+v2 → v2, and not in one step.

use std::fmt;

use super::subject::{covers, matches, versioned};
use super::{Broker, BrokerError, ConsumerInfo, Find, Message};

/// So many unsettled messages are looked at; with more, the consumer is too far behind to be narrowed.
const LOOK_AT: usize = 20_000;

/// Why a filter cannot become narrower yet.
#[derive(Debug)]
pub(crate) enum PassedOver {
    /// This message is not settled, and nothing that the new filter matches stands for it.
    Message { subject: String, sequence: u64 },
    /// The event is still published only in the version that would be left out.
    OnlyVersion { subject: String },
    /// Too many to look at.
    TooMany,
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message { subject, sequence } => {
                write!(
                    f,
                    "{subject} (sequence {sequence}), which is not settled yet; let the consumer finish first"
                )
            }
            Self::OnlyVersion { subject } => {
                write!(
                    f,
                    "what comes next: {subject} is still published in this version alone; let its owner publish the other one too"
                )
            }
            Self::TooMany => f.write_str("more than can be looked at; let the consumer catch up first"),
        }
    }
}

/// What would be passed over if the consumer's filters were these. An event that was published in several versions is there as long as one of
/// them is matched.
pub(crate) async fn passed_over(
    broker: &dyn Broker,
    stream: &str,
    is: &ConsumerInfo,
    filters: &[String],
) -> Result<Option<PassedOver>, BrokerError> {
    let dropped = dropped(&is.filters, filters);
    if let Some(message) = first_passed_over(broker, stream, &dropped, is.ack_floor + 1, filters).await? {
        return Ok(Some(message));
    }
    for subject in dropped {
        if is_only_version(broker, stream, &subject, filters).await? {
            return Ok(Some(PassedOver::OnlyVersion { subject }));
        }
    }
    Ok(None)
}

/// Those of the old filters that the new ones do not cover.
pub(crate) fn dropped(old: &[String], filters: &[String]) -> Vec<String> {
    if filters.is_empty() {
        return Vec::new();
    }
    if old.is_empty() {
        return vec![">".to_owned()];
    }
    old.iter().filter(|o| !filters.iter().any(|n| covers(n, o))).cloned().collect()
}

/// The first message from a sequence on that one of the `dropped` filters matches and, siblings included, none of the others.
pub(crate) async fn first_passed_over(
    broker: &dyn Broker,
    stream: &str,
    dropped: &[String],
    from: u64,
    filters: &[String],
) -> Result<Option<PassedOver>, BrokerError> {
    for filter in dropped {
        let mut from = from;
        for looked_at in 0.. {
            let Some(found) = broker.find(stream, filter, Find::From(from)).await? else { break };
            if !is_matched(&found.message, filters) {
                let subject = found.message.subject.clone();
                return Ok(Some(PassedOver::Message { subject, sequence: found.sequence }));
            }
            if looked_at == LOOK_AT {
                return Ok(Some(PassedOver::TooMany));
            }
            from = found.sequence + 1;
        }
    }
    Ok(None)
}

/// Whether one of the filters matches it, or one of its siblings.
fn is_matched(message: &Message, filters: &[String]) -> bool {
    let matched = |subject: &str| filters.iter().any(|f| matches(f, subject));
    matched(&message.subject)
        || message.header("ce-siblings").zip(versioned(&message.subject)).is_some_and(
            |(siblings, (event_type, _, rest))| {
                siblings.split(',').any(|v| matched(&format!("{event_type}.v{v}{rest}")))
            },
        )
}

/// Whether the last event of this type came in the dropped version, and in none that the new filters match.
async fn is_only_version(
    broker: &dyn Broker,
    stream: &str,
    dropped: &str,
    filters: &[String],
) -> Result<bool, BrokerError> {
    let Some((event_type, ..)) = versioned(dropped) else { return Ok(false) };
    let others = || filters.iter().filter(|f| versioned(f).is_some_and(|(t, ..)| t == event_type));
    if others().next().is_none() {
        return Ok(false);
    }
    let Some(last) = broker.find(stream, dropped, Find::Last).await? else { return Ok(false) };
    if is_matched(&last.message, filters) {
        return Ok(false);
    }
    for other in others() {
        if broker.find(stream, other, Find::Last).await?.is_some_and(|m| m.sequence > last.sequence) {
            return Ok(false);
        }
    }
    Ok(true)
}
