//! What streams and consumers should be, compared with what they are; changed in place where that loses nothing, refused where not.

use std::time::Duration;

use async_nats::jetstream::consumer::{self, AckPolicy};
use async_nats::jetstream::stream::{self, DiscardPolicy, RetentionPolicy, StorageType};
use serde_json::{Value, json};

use super::{NatsBroker, Provision};
use crate::broker::subject::overlap;
use crate::broker::{BrokerError, ConsumerConfig, DeliverPolicy, Discard, StreamConfig, passed_over};

/// One setting that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// Its name, as NATS calls it.
    pub setting: &'static str,
    /// What it is.
    pub is: String,
    /// What it should be.
    pub should: String,
}

/// How what is there compares with what is declared.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Drift {
    /// It is as declared.
    None,
    /// It is not there, and can be made.
    Missing,
    /// It differs, and can be changed in place.
    Changed(Vec<Difference>),
    /// It differs, and cannot be changed in place without losing something.
    Refused {
        /// What differs.
        differences: Vec<Difference>,
        /// What to do about it.
        way_out: String,
    },
}

/// Gathers differences.
#[derive(Default)]
struct Compare(Vec<Difference>);

impl Compare {
    fn setting<T: PartialEq + std::fmt::Debug>(&mut self, setting: &'static str, is: &T, should: &T) {
        if is != should {
            self.0.push(Difference { setting, is: format!("{is:?}"), should: format!("{should:?}") });
        }
    }
}

fn limit(value: Option<u64>) -> i64 {
    value.map_or(-1, |v| i64::try_from(v).unwrap_or(i64::MAX))
}

fn sorted(mut subjects: Vec<String>) -> Vec<String> {
    subjects.sort();
    subjects
}

/// `base` with what we declare; what we do not declare stays as it is.
fn stream_config(base: stream::Config, config: &StreamConfig, replicas: usize) -> stream::Config {
    stream::Config {
        name: config.name.clone(),
        subjects: config.subjects.clone(),
        max_age: config.max_age.unwrap_or_default(),
        max_messages: limit(config.max_messages),
        max_bytes: limit(config.max_bytes),
        max_messages_per_subject: limit(config.max_messages_per_subject),
        discard: match config.discard {
            Discard::New => DiscardPolicy::New,
            Discard::Old => DiscardPolicy::Old,
        },
        duplicate_window: config.duplicate_window,
        num_replicas: replicas,
        ..base
    }
}

/// The filters of a consumer, which the server keeps in one of two places.
pub(super) fn filters(config: &consumer::Config) -> Vec<String> {
    let mut filters = config.filter_subjects.clone();
    if !config.filter_subject.is_empty() {
        filters.push(config.filter_subject.clone());
    }
    sorted(filters)
}

fn consumer_config(base: consumer::Config, config: &ConsumerConfig) -> consumer::Config {
    let one = config.filter_subjects.len() == 1;
    consumer::Config {
        durable_name: Some(config.durable.clone()),
        name: Some(config.durable.clone()),
        filter_subject: if one { config.filter_subjects[0].clone() } else { String::new() },
        filter_subjects: if one { Vec::new() } else { config.filter_subjects.clone() },
        ack_policy: AckPolicy::Explicit,
        ack_wait: if config.backoff.is_empty() { config.ack_wait } else { Duration::ZERO },
        backoff: config.backoff.clone(),
        max_deliver: config.max_deliver.map_or(-1, i64::from),
        max_ack_pending: i64::try_from(config.max_ack_pending).unwrap_or(i64::MAX),
        ..base
    }
}

impl NatsBroker {
    /// How a stream compares with its declaration.
    pub async fn stream_drift(&self, config: &StreamConfig) -> Result<Drift, BrokerError> {
        match self.stream(&config.name).await {
            Ok(info) => Ok(self.compare_stream(&info.config, config)),
            Err(BrokerError::NoStream(_)) => Ok(Drift::Missing),
            Err(e) => Err(e),
        }
    }

    fn compare_stream(&self, is: &stream::Config, config: &StreamConfig) -> Drift {
        let should = stream_config(is.clone(), config, self.config.replicas);
        let mut fixed = Compare::default();
        fixed.setting("retention", &is.retention, &RetentionPolicy::Limits);
        fixed.setting("storage", &is.storage, &StorageType::File);
        if !fixed.0.is_empty() {
            let name = &config.name;
            let way_out = format!(
                "these cannot be changed in place; back the stream up (nats stream backup {name}), delete it, apply again, restore, \
                 and run `consign reconcile`"
            );
            return Drift::Refused { differences: fixed.0, way_out };
        }
        let mut c = Compare::default();
        c.setting("subjects", &sorted(is.subjects.clone()), &sorted(should.subjects));
        c.setting("max_age", &is.max_age, &should.max_age);
        c.setting("max_msgs", &is.max_messages, &should.max_messages);
        c.setting("max_bytes", &is.max_bytes, &should.max_bytes);
        c.setting("max_msgs_per_subject", &is.max_messages_per_subject, &should.max_messages_per_subject);
        c.setting("discard", &is.discard, &should.discard);
        c.setting("duplicate_window", &is.duplicate_window, &should.duplicate_window);
        c.setting("num_replicas", &is.num_replicas, &should.num_replicas);
        if c.0.is_empty() { Drift::None } else { Drift::Changed(c.0) }
    }

    /// Makes a stream, or changes it to its declaration. What it was like before.
    pub async fn apply_stream(&self, config: &StreamConfig) -> Result<Drift, BrokerError> {
        let name = &config.name;
        let (drift, subject, body) = match self.stream(name).await {
            Ok(info) => {
                let drift = self.compare_stream(&info.config, config);
                let changed = stream_config(info.config, config, self.config.replicas);
                (drift, format!("STREAM.UPDATE.{name}"), changed)
            }
            Err(BrokerError::NoStream(_)) => {
                let new = stream_config(stream::Config::default(), config, self.config.replicas);
                (Drift::Missing, format!("STREAM.CREATE.{name}"), new)
            }
            Err(e) => return Err(e),
        };
        match &drift {
            Drift::None => {}
            Drift::Refused { differences, way_out } => {
                return Err(refused("stream", name, differences, way_out));
            }
            Drift::Missing | Drift::Changed(_) => {
                let _: stream::Info =
                    self.api(&subject, Some(json!(body))).await.map_err(|e| e.of(name, ""))?;
                tracing::info!(stream = name, ?drift, "the stream was made as declared");
            }
        }
        Ok(drift)
    }

    /// How a consumer compares with its declaration.
    pub async fn consumer_drift(&self, stream: &str, config: &ConsumerConfig) -> Result<Drift, BrokerError> {
        match self.consumer(stream, &config.durable).await {
            Ok(info) => self.compare_consumer(stream, info, config).await.map(|(drift, _)| drift),
            Err(BrokerError::NoConsumer { .. }) => Ok(Drift::Missing),
            Err(e) => Err(e),
        }
    }

    /// What differs, and what would be passed over if it were changed.
    async fn compare_consumer(
        &self,
        stream: &str,
        info: consumer::Info,
        config: &ConsumerConfig,
    ) -> Result<(Drift, Option<String>), BrokerError> {
        match compare_consumer(&info, config) {
            Drift::Changed(differences) => {
                let what = passed_over(self, stream, &super::known(info), &config.filter_subjects).await?;
                Ok(match what.map(|what| what.to_string()) {
                    None => (Drift::Changed(differences), None),
                    Some(what) => {
                        let way_out = format!("it would pass over {what}");
                        (Drift::Refused { differences, way_out }, Some(what))
                    }
                })
            }
            drift => Ok((drift, None)),
        }
    }

    /// Makes a consumer, or changes it to its declaration; its position stays. What it was like before.
    pub async fn apply_consumer(&self, stream: &str, config: &ConsumerConfig) -> Result<Drift, BrokerError> {
        check(config)?;
        let durable = &config.durable;
        let (drift, body) = match self.consumer(stream, durable).await {
            Ok(info) => {
                let body = json!(consumer_config(info.config.clone(), config));
                match self.compare_consumer(stream, info, config).await? {
                    (_, Some(what)) => {
                        return Err(BrokerError::PassesOver { consumer: durable.clone(), what });
                    }
                    (drift, None) => (drift, body),
                }
            }
            Err(BrokerError::NoConsumer { .. }) => {
                let mut new = json!(consumer_config(consumer::Config::default(), config));
                let (policy, start) = match config.deliver {
                    DeliverPolicy::All => ("all", Value::Null),
                    DeliverPolicy::New => ("new", Value::Null),
                    DeliverPolicy::FromSequence(n) => ("by_start_sequence", json!(n)),
                };
                new["deliver_policy"] = policy.into();
                if !start.is_null() {
                    new["opt_start_seq"] = start;
                }
                (Drift::Missing, new)
            }
            Err(e) => return Err(e),
        };
        match &drift {
            Drift::None => {}
            Drift::Refused { differences, way_out } => {
                return Err(refused("consumer", durable, differences, way_out));
            }
            Drift::Missing | Drift::Changed(_) => {
                let request = json!({"stream_name": stream, "config": body});
                // Not the form with the filter in the subject: there may be several.
                let _: consumer::Info = self
                    .api(&format!("CONSUMER.CREATE.{stream}.{durable}"), Some(request))
                    .await
                    .map_err(|e| e.of(stream, durable))?;
                tracing::info!(stream, consumer = durable, ?drift, "the consumer was made as declared");
            }
        }
        Ok(drift)
    }

    /// Deletes the consumer, if it is there, and makes it anew from `sequence` on.
    pub(super) async fn rewind(
        &self,
        stream: &str,
        config: &ConsumerConfig,
        sequence: u64,
    ) -> Result<(), BrokerError> {
        let durable = &config.durable;
        if self.config.provision == Provision::Bind {
            return Err(BrokerError::Config(format!(
                "consumer {durable} of {stream} stands ahead of its stream, and this service may only bind; run `consign streams apply`"
            )));
        }
        let deleted: Result<Value, _> = self.api(&format!("CONSUMER.DELETE.{stream}.{durable}"), None).await;
        match deleted.map_err(|e| e.of(stream, durable)) {
            Ok(_) | Err(BrokerError::NoConsumer { .. }) => {}
            Err(e) => return Err(e),
        }
        let from = ConsumerConfig { deliver: DeliverPolicy::FromSequence(sequence.max(1)), ..config.clone() };
        self.apply_consumer(stream, &from).await.map(drop)
    }

    /// Finds the consumer, and says if it is not as declared.
    pub(super) async fn bind_consumer(
        &self,
        stream: &str,
        config: &ConsumerConfig,
    ) -> Result<(), BrokerError> {
        let info = self.consumer(stream, &config.durable).await?;
        match compare_consumer(&info, config) {
            Drift::None | Drift::Missing => {}
            Drift::Changed(differences) | Drift::Refused { differences, .. } => {
                tracing::warn!(
                    stream,
                    consumer = config.durable,
                    ?differences,
                    "the consumer is not as this version declares it; run `consign streams apply`"
                );
            }
        }
        Ok(())
    }
}

/// What some versions of the server refuse and others accept.
fn check(config: &ConsumerConfig) -> Result<(), BrokerError> {
    let fault = |what: String| Err(BrokerError::Config(format!("consumer {}: {what}", config.durable)));
    if let Some(max) = config.max_deliver
        && config.backoff.len() > max as usize
    {
        return fault(format!("{} backoff steps are more than max_deliver = {max}", config.backoff.len()));
    }
    for (i, a) in config.filter_subjects.iter().enumerate() {
        if let Some(b) = config.filter_subjects[..i].iter().find(|b| overlap(a, b)) {
            return fault(format!("its filters `{a}` and `{b}` overlap"));
        }
    }
    Ok(())
}

fn compare_consumer(info: &consumer::Info, config: &ConsumerConfig) -> Drift {
    let is = &info.config;
    let mut fixed = Compare::default();
    fixed.setting("ack_policy", &is.ack_policy, &AckPolicy::Explicit);
    fixed.setting("deliver_subject", &is.deliver_subject, &None);
    if !fixed.0.is_empty() {
        let way_out = format!(
            "delete the consumer and apply again: the service then handles the stream from the start, and its inbox passes over what \
             it has handled (nats consumer rm {} {})",
            info.stream_name, config.durable
        );
        return Drift::Refused { differences: fixed.0, way_out };
    }
    let should = consumer_config(is.clone(), config);
    let (old, new) = (filters(is), filters(&should));
    let mut c = Compare::default();
    c.setting("filter_subjects", &old, &new);
    if config.backoff.is_empty() {
        c.setting("ack_wait", &is.ack_wait, &should.ack_wait);
    }
    c.setting("backoff", &is.backoff, &should.backoff);
    c.setting("max_deliver", &is.max_deliver, &should.max_deliver);
    c.setting("max_ack_pending", &is.max_ack_pending, &should.max_ack_pending);
    if c.0.is_empty() { Drift::None } else { Drift::Changed(c.0) }
}

fn refused(what: &str, name: &str, differences: &[Difference], way_out: &str) -> BrokerError {
    let list: Vec<String> =
        differences.iter().map(|d| format!("{} is {}, declared {}", d.setting, d.is, d.should)).collect();
    BrokerError::Config(format!("{what} {name}: {}; {way_out}", list.join(", ")))
}
