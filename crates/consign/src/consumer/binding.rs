//! A consumer's filter at the broker, and how it follows what the consumer asks for: v1 → v1+v2 → v2.
//!
//! It becomes wider only when every replica that is running can read what is new, for replicas share it, and narrower only when nothing
//! would be passed over. Until then the consumer goes on with the filter that it has.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::readers::Readers;
use super::{ReadyConsumer, subjects};
use crate::broker::{
    Broker, BrokerError, ConsumerConfig, PassedOver, dropped, first_passed_over, matches, overlap, versioned,
};
use crate::event::Lane;
use crate::handler::BoxError;

/// What the broker gives to a consumer's lane.
#[derive(Debug, Default)]
pub(super) struct Binding {
    pub(super) filters: Vec<String>,
    asked: bool,
    /// The filter brings what this replica cannot read and others can: it leaves the events to them.
    pub(super) holds_back: bool,
    /// It has become narrower just now.
    narrowed: Option<Narrowed>,
}

/// For a while after a filter became narrower, what it leaves out is looked at: its owner may have begun at that very moment to publish that alone.
#[derive(Clone, Debug)]
struct Narrowed {
    dropped: Vec<String>,
    /// The stream's last sequence then.
    from: u64,
    until: Instant,
}

/// Owners look every ten seconds who needs what, and publish it.
const WATCH: Duration = Duration::from_secs(20);

impl Binding {
    /// Whether events of this version come.
    pub(super) fn brings(&self, name: &str, lane: Lane) -> bool {
        is_brought(&self.filters, name, lane)
    }

    /// Whether there is nothing left to change.
    pub(super) fn is_final(&self) -> bool {
        self.asked && !self.holds_back && self.narrowed.is_none()
    }
}

fn is_brought(filters: &[String], name: &str, lane: Lane) -> bool {
    let [subject, _] = subjects(name, lane);
    filters.is_empty() || filters.iter().any(|f| matches(f, &subject))
}

/// Brings the filter as close to what is asked for as can be now.
pub(super) async fn bind(
    broker: &dyn Broker,
    readers: &Readers,
    consumer: &ReadyConsumer,
    lane: Lane,
    before: &Binding,
) -> Result<Binding, BoxError> {
    let wanted = consumer.broker_config(lane);
    let (stream, durable) = (consumer.stream(), wanted.durable.as_str());
    let is = match broker.consumer_info(stream, durable).await {
        Ok(is) => is,
        Err(BrokerError::NoConsumer { .. }) => {
            broker.ensure_consumer(stream, &wanted).await?;
            return Ok(Binding { filters: wanted.filter_subjects, asked: true, ..Binding::default() });
        }
        Err(e) => return Err(e.into()),
    };
    if let Some(narrowed) = &before.narrowed
        && let Some(PassedOver::Message { subject, sequence }) =
            first_passed_over(broker, stream, &narrowed.dropped, narrowed.from + 1, &is.filters).await?
    {
        tracing::warn!(
            consumer = durable,
            stream,
            subject,
            sequence,
            "published alone just when it was asked for no more: asked for again, from there on"
        );
        let both = is.filters.iter().chain(&narrowed.dropped).cloned().collect();
        let config = ConsumerConfig { filter_subjects: sorted(both), ..wanted };
        broker.rewind_consumer(stream, &config, sequence.min(is.ack_floor + 1)).await?;
        return Ok(Binding { filters: config.filter_subjects, ..Binding::default() });
    }
    let last = broker.stream_info(stream).await?.last_sequence;
    let others = readers.others().await?;
    let added = consumer.asked.iter().filter(|name| !is_brought(&is.filters, name, lane));
    let too_new: BTreeSet<&String> =
        added.filter(|name| others.iter().any(|reads| !reads.contains(*name))).collect();
    let holds_back = is.filters.iter().filter_map(|f| versioned(f)).any(|(event_type, version, _)| {
        let name = format!("{event_type}.v{version}");
        !consumer.routes.contains_key(&name) && others.iter().any(|reads| reads.contains(&name))
    });
    if !too_new.is_empty() {
        tracing::info!(
            consumer = durable, stream, versions = ?too_new,
            "not asked for yet: another replica that is running cannot read it"
        );
    }
    if holds_back {
        tracing::warn!(
            consumer = durable, stream, filters = ?is.filters,
            "this replica cannot read all that its consumer is given, and leaves it to those that can; is it older than they are?"
        );
    }
    let kept = consumer.filters_of(consumer.asked.iter().filter(|name| !too_new.contains(name)), lane);
    let filters = if kept.is_empty() || holds_back { is.filters.clone() } else { kept.into_iter().collect() };
    let config = ConsumerConfig { filter_subjects: filters, ..wanted.clone() };
    match broker.ensure_consumer(stream, &config).await {
        Ok(()) => {}
        Err(BrokerError::PassesOver { what, .. }) => {
            tracing::info!(consumer = durable, stream, what, "its filter cannot become narrower yet");
            // Filters of one consumer must not overlap: what it is given already need not be asked for.
            let mut both = is.filters.clone();
            both.extend(
                config.filter_subjects.into_iter().filter(|f| !is.filters.iter().any(|i| overlap(i, f))),
            );
            let config = ConsumerConfig { filter_subjects: sorted(both), ..wanted.clone() };
            broker.ensure_consumer(stream, &config).await?;
        }
        Err(e) => return Err(e.into()),
    }
    // Where this service may not change it, it is what it was.
    let filters = sorted(broker.consumer_info(stream, durable).await?.filters);
    let asked = filters == wanted.filter_subjects;
    let dropped = dropped(&is.filters, &filters);
    let narrowed = if dropped.is_empty() {
        before.narrowed.clone().filter(|n| Instant::now() < n.until)
    } else {
        Some(Narrowed { dropped, from: last, until: Instant::now() + WATCH })
    };
    Ok(Binding { filters, asked, holds_back, narrowed })
}

fn sorted(mut filters: Vec<String>) -> Vec<String> {
    filters.sort();
    filters.dedup();
    filters
}
