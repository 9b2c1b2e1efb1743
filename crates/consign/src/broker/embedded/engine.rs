//! The embedded broker's state machine: streams, consumers, and what happens to them. Only [`super::run`] touches it.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::file::{FileStore, Journal, StreamRecord};
use super::{Command, Reply};
use crate::broker::subject::{is_valid_filter, matches, overlap};
use crate::broker::{
    BrokerError, ConsumerConfig, ConsumerInfo, DeliverPolicy, Delivery, Discard, Find, Message, PubAck,
    PublishError, Settlement, StoredMessage, StreamConfig, StreamInfo,
};
use crate::{Clock, Timestamp};

/// With a file, this many of the latest messages of a stream stay in memory; a consumer further back reads the file.
const TAIL: usize = 4_096;
/// How many messages are read from the file at once.
const READ_AHEAD: usize = 512;

pub(super) type Answer = Box<dyn FnOnce() + Send>;

pub(super) struct Engine {
    clock: Clock,
    file: Option<FileStore>,
    journal: Journal,
    streams: BTreeMap<String, Stream>,
}

struct Stream {
    id: i64,
    name: Arc<str>,
    config: StreamConfig,
    first: u64,
    last: u64,
    count: u64,
    bytes: u64,
    /// In memory: all messages. With a file: the tail.
    messages: BTreeMap<u64, Arc<StoredMessage>>,
    /// Only kept for streams that limit messages per subject.
    by_subject: HashMap<String, BTreeSet<u64>>,
    seen: HashMap<String, u64>,
    seen_order: VecDeque<(Timestamp, String)>,
    /// Its record differs from what is written.
    dirty: bool,
    consumers: BTreeMap<String, Consumer>,
}

struct Consumer {
    config: ConsumerConfig,
    /// The next sequence never delivered.
    next: u64,
    /// Matching messages at or after `next`.
    pending: u64,
    unsettled: BTreeMap<u64, Unsettled>,
    due: BTreeSet<(Instant, u64)>,
    waiting: VecDeque<Waiting>,
    read_ahead: BTreeMap<u64, Arc<StoredMessage>>,
    written_floor: u64,
    last_delivered_at: Option<Timestamp>,
}

struct Unsettled {
    due: Instant,
    delivered: u32,
}

struct Waiting {
    max: usize,
    until: Instant,
    reply: Reply<Vec<Delivery>>,
}

fn size(m: &Message) -> u64 {
    let headers: usize = m.headers.iter().map(|(n, v)| n.len() + v.len()).sum();
    (m.subject.len() + headers + m.payload.len()) as u64
}

impl Stream {
    fn new(id: i64, config: StreamConfig) -> Self {
        Self {
            id,
            name: config.name.as_str().into(),
            config,
            first: 1,
            last: 0,
            count: 0,
            bytes: 0,
            messages: BTreeMap::new(),
            by_subject: HashMap::new(),
            seen: HashMap::new(),
            seen_order: VecDeque::new(),
            dirty: false,
            consumers: BTreeMap::new(),
        }
    }

    fn stores(&self, subject: &str) -> bool {
        self.config.subjects.iter().any(|f| matches(f, subject))
    }

    fn remember(&mut self, id: &str, sequence: u64, at: Timestamp) {
        self.seen.insert(id.to_owned(), sequence);
        self.seen_order.push_back((at, id.to_owned()));
    }

    fn forget_before(&mut self, horizon: Timestamp) {
        while self.seen_order.front().is_some_and(|(at, _)| *at < horizon) {
            if let Some((_, id)) = self.seen_order.pop_front() {
                self.seen.remove(&id);
            }
        }
    }

    fn is_full_with(&self, extra: u64) -> bool {
        self.config.max_messages.is_some_and(|m| self.count >= m)
            || self.config.max_bytes.is_some_and(|m| self.bytes + extra > m)
    }

    /// The account of a message that is no longer stored.
    fn removed(&mut self, m: &StoredMessage) {
        self.count -= 1;
        self.bytes = self.bytes.saturating_sub(size(&m.message));
        self.messages.remove(&m.sequence);
        if let Some(of_subject) = self.by_subject.get_mut(&m.message.subject) {
            of_subject.remove(&m.sequence);
        }
        for c in self.consumers.values_mut() {
            if c.next <= m.sequence && c.wants(&m.message.subject) {
                c.pending = c.pending.saturating_sub(1);
            }
            c.read_ahead.remove(&m.sequence);
            c.settle(m.sequence);
        }
    }

    fn record(&self) -> StreamRecord {
        StreamRecord {
            id: self.id,
            config: self.config.clone(),
            first: self.first,
            last: self.last,
            count: self.count,
            bytes: self.bytes,
        }
    }
}

impl Consumer {
    fn new(config: ConsumerConfig, next: u64) -> Self {
        Self {
            config,
            next,
            pending: 0,
            unsettled: BTreeMap::new(),
            due: BTreeSet::new(),
            waiting: VecDeque::new(),
            read_ahead: BTreeMap::new(),
            written_floor: next.saturating_sub(1),
            last_delivered_at: None,
        }
    }

    fn info(&self) -> ConsumerInfo {
        ConsumerInfo {
            durable: self.config.durable.clone(),
            filters: self.config.filter_subjects.clone(),
            pending: self.pending,
            ack_pending: self.unsettled.len() as u64,
            redelivered: self.unsettled.values().filter(|u| u.delivered > 1).count() as u64,
            ack_floor: self.floor(),
            delivered: self.next - 1,
            last_delivered_at: self.last_delivered_at,
        }
    }

    fn wants(&self, subject: &str) -> bool {
        let filters = &self.config.filter_subjects;
        filters.is_empty() || filters.iter().any(|f| matches(f, subject))
    }

    fn floor(&self) -> u64 {
        self.unsettled.keys().next().map_or(self.next, |&s| s) - 1
    }

    fn settle(&mut self, sequence: u64) -> bool {
        match self.unsettled.remove(&sequence) {
            Some(u) => self.due.remove(&(u.due, sequence)),
            None => false,
        }
    }

    fn reschedule(&mut self, sequence: u64, due: Instant) {
        if let Some(u) = self.unsettled.get_mut(&sequence) {
            self.due.remove(&(u.due, sequence));
            u.due = due;
            self.due.insert((due, sequence));
        }
    }

    fn ack_wait(&self, delivered: u32) -> Duration {
        let i = delivered.saturating_sub(1) as usize;
        let backoff = &self.config.backoff;
        backoff.get(i).or(backoff.last()).copied().unwrap_or(self.config.ack_wait)
    }

    /// Counts a delivery, and says which one it is.
    fn deliver(&mut self, sequence: u64, now: Instant) -> u32 {
        let before = self.unsettled.get(&sequence);
        let delivered = before.map_or(0, |u| u.delivered) + 1;
        if let Some(u) = before {
            self.due.remove(&(u.due, sequence));
        }
        let due = now + self.ack_wait(delivered);
        self.unsettled.insert(sequence, Unsettled { due, delivered });
        self.due.insert((due, sequence));
        delivered
    }
}

/// The sequence in a delivery's `reply`.
fn sequence_of(reply: &str) -> Option<u64> {
    reply.split('.').next()?.parse().ok()
}

impl Engine {
    pub(super) fn new(clock: Clock, file: Option<FileStore>) -> Self {
        Self { clock, file, journal: Journal::default(), streams: BTreeMap::new() }
    }

    /// Everything the file holds. What was delivered and not settled below the written floor is delivered again.
    pub(super) async fn load(clock: Clock, mut file: FileStore) -> Result<Self, sqlx::Error> {
        let now = clock.now();
        let mut streams = BTreeMap::new();
        for record in file.streams().await? {
            let mut s = Stream::new(record.id, record.config);
            (s.first, s.last, s.count, s.bytes) = (record.first, record.last, record.count, record.bytes);
            for (id, sequence, at) in file.ids_since(s.id, now - s.config.duplicate_window).await? {
                s.remember(&id, sequence, at);
            }
            if s.config.max_messages_per_subject.is_some() {
                for (sequence, subject) in file.subjects(s.id).await? {
                    s.by_subject.entry(subject).or_default().insert(sequence);
                }
            }
            let tail_from = s.last.saturating_sub(TAIL as u64 / 2);
            s.messages = file.read(s.id, tail_from, TAIL).await?;
            for (config, floor) in file.consumers(s.id).await? {
                let mut c = Consumer::new(config, floor + 1);
                for (subject, count) in file.count_by_subject(s.id, c.next).await? {
                    c.pending += if c.wants(&subject) { count } else { 0 };
                }
                s.consumers.insert(c.config.durable.clone(), c);
            }
            streams.insert(s.config.name.clone(), s);
        }
        Ok(Self { clock, file: Some(file), journal: Journal::default(), streams })
    }

    fn stream(&mut self, name: &str) -> Result<&mut Stream, BrokerError> {
        self.streams.get_mut(name).ok_or_else(|| BrokerError::NoStream(name.to_owned()))
    }

    fn consumer(&mut self, stream: &str, durable: &str) -> Result<&mut Consumer, BrokerError> {
        self.stream(stream)?.consumers.get_mut(durable).ok_or_else(|| BrokerError::NoConsumer {
            stream: stream.to_owned(),
            consumer: durable.to_owned(),
        })
    }

    /// Applies a command. Its answer is given once the journal is written.
    pub(super) async fn apply(&mut self, command: Command, answers: &mut Vec<Answer>) {
        fn later<T: Send + 'static>(answers: &mut Vec<Answer>, reply: oneshot::Sender<T>, value: T) {
            answers.push(Box::new(move || drop(reply.send(value))));
        }
        match command {
            Command::Publish { messages, reply } => {
                let mut acks = Vec::with_capacity(messages.len());
                for m in messages {
                    acks.push(self.publish(m).await);
                }
                later(answers, reply, acks);
            }
            Command::Fetch { stream, durable, max, until, reply } => match self.consumer(&stream, &durable) {
                Ok(c) => c.waiting.push_back(Waiting { max, until, reply }),
                Err(e) => later(answers, reply, Err(e)),
            },
            Command::Settle { stream, durable, settlements, reply } => {
                let settled = self.settle(&stream, &durable, settlements).await;
                later(answers, reply, settled);
            }
            Command::EnsureStream { config, reply } => {
                let made = self.ensure_stream(config);
                later(answers, reply, made);
            }
            Command::EnsureConsumer { stream, config, rewind, reply } => {
                let made = self.ensure_consumer(&stream, config, rewind).await;
                later(answers, reply, made);
            }
            Command::Get { stream, sequence, reply } => {
                let found = self.get(&stream, sequence).await;
                later(answers, reply, found);
            }
            Command::StreamInfo { stream, reply } => {
                let info = self.stream(&stream).map(|s| StreamInfo {
                    incarnation: s.id.to_string(),
                    messages: s.count,
                    bytes: s.bytes,
                    first_sequence: s.first,
                    last_sequence: s.last,
                });
                later(answers, reply, info);
            }
            Command::ConsumerInfo { stream, durable, reply } => {
                let info = self.consumer(&stream, &durable).map(|c| c.info());
                later(answers, reply, info);
            }
            Command::Consumers { stream, reply } => {
                let all = self.stream(&stream).map(|s| s.consumers.values().map(Consumer::info).collect());
                later(answers, reply, all);
            }
            Command::Find { stream, filter, which, reply } => {
                let found = self.find(&stream, &filter, which).await;
                later(answers, reply, found);
            }
            Command::Close { .. } => {}
        }
    }

    fn ensure_stream(&mut self, config: StreamConfig) -> Result<(), BrokerError> {
        if config.name.is_empty() || config.subjects.is_empty() {
            return Err(BrokerError::Config("a stream needs a name and at least one subject".into()));
        }
        if let Some(bad) = config.subjects.iter().find(|s| !is_valid_filter(s)) {
            return Err(BrokerError::Config(format!("`{bad}` is no valid subject")));
        }
        for other in self.streams.values().filter(|s| s.config.name != config.name) {
            for a in &config.subjects {
                if let Some(b) = other.config.subjects.iter().find(|b| overlap(a, b)) {
                    return Err(BrokerError::Config(format!(
                        "subject `{a}` of stream `{}` overlaps `{b}` of stream `{}`",
                        config.name, other.config.name
                    )));
                }
            }
        }
        // Never given out twice, not even by another file that takes this one's place: the id is the stream's incarnation.
        let above = self.streams.values().map(|s| s.id).max().unwrap_or(0) + 1;
        let id = above.max(self.clock.now().as_millis());
        let s = self.streams.entry(config.name.clone()).or_insert_with(|| Stream::new(id, config.clone()));
        let per_subject = |c: &StreamConfig| c.max_messages_per_subject.is_some();
        if per_subject(&s.config) != per_subject(&config) && s.count > 0 {
            return Err(BrokerError::Config(format!(
                "stream `{}` holds messages; whether it limits them per subject cannot be changed any more",
                config.name
            )));
        }
        s.config = config;
        s.dirty = true;
        Ok(())
    }

    async fn ensure_consumer(
        &mut self,
        stream: &str,
        config: ConsumerConfig,
        rewind: Option<u64>,
    ) -> Result<(), BrokerError> {
        if config.durable.is_empty() || config.max_ack_pending == 0 {
            return Err(BrokerError::Config(
                "a consumer needs a name and room for one unsettled message".into(),
            ));
        }
        if let (Some(max), n) = (config.max_deliver, config.backoff.len())
            && n > max as usize
        {
            return Err(BrokerError::Config(format!(
                "consumer `{}` has {n} backoff entries but delivers only {max} times",
                config.durable
            )));
        }
        for (i, a) in config.filter_subjects.iter().enumerate() {
            if let Some(b) = config.filter_subjects[..i].iter().find(|b| overlap(a, b)) {
                return Err(BrokerError::Config(format!(
                    "consumer `{}`: its filters `{a}` and `{b}` overlap",
                    config.durable
                )));
            }
        }
        let s = self.stream(stream)?;
        let (id, first, last) = (s.id, s.first, s.last);
        let next = match (s.consumers.get(&config.durable), config.deliver) {
            _ if let Some(from) = rewind => from.clamp(first, last + 1),
            (Some(existing), _) => existing.next,
            (None, DeliverPolicy::All) => first,
            (None, DeliverPolicy::New) => last + 1,
            (None, DeliverPolicy::FromSequence(from)) => from.clamp(first, last + 1),
        };
        let mut c = Consumer::new(config.clone(), next);
        match &mut self.file {
            None => {
                let s = self.stream(stream)?;
                c.pending =
                    s.messages.range(next..).filter(|(_, m)| c.wants(&m.message.subject)).count() as u64;
            }
            Some(file) => {
                // What is in the journal is not in the file yet.
                self.journal.write(file).await.map_err(super::unavailable)?;
                for (subject, count) in file.count_by_subject(id, next).await.map_err(super::unavailable)? {
                    c.pending += if c.wants(&subject) { count } else { 0 };
                }
            }
        }
        // Nothing above has touched the consumer that is there, for any of it may fail.
        if let Some(existing) = self.stream(stream)?.consumers.remove(&config.durable)
            && rewind.is_none()
        {
            c = Consumer { config: config.clone(), pending: c.pending, ..existing };
        }
        self.journal.consumer(id, &config, c.floor());
        self.stream(stream)?.consumers.insert(config.durable, c);
        Ok(())
    }

    async fn publish(&mut self, message: Message) -> Result<PubAck, PublishError> {
        message.check()?;
        let now = self.clock.now();
        let Some(s) = self.streams.values_mut().find(|s| s.stores(&message.subject)) else {
            return Err(PublishError::NoStream(message.subject));
        };
        s.forget_before(now - s.config.duplicate_window);
        if let Some(&sequence) = message.msg_id.as_ref().and_then(|id| s.seen.get(id)) {
            return Ok(PubAck { stream: Arc::clone(&s.name), sequence, duplicate: true });
        }
        let bytes = size(&message);
        let name = s.config.name.clone();
        if s.is_full_with(bytes) && s.config.discard == Discard::New {
            return Err(PublishError::StreamFull(Arc::clone(&s.name)));
        }
        while self.streams[&name].is_full_with(bytes) && self.streams[&name].count > 0 {
            self.remove_first(&name).await.map_err(|e| PublishError::Unknown(e.to_string()))?;
        }
        let Some(s) = self.streams.get_mut(&name) else {
            return Err(PublishError::NoStream(message.subject));
        };
        s.dirty = true;
        s.last += 1;
        s.count += 1;
        s.bytes += bytes;
        let sequence = s.last;
        if let Some(id) = &message.msg_id {
            s.remember(&id.clone(), sequence, now);
        }
        for c in s.consumers.values_mut() {
            c.pending += u64::from(c.wants(&message.subject));
        }
        let stored = Arc::new(StoredMessage { sequence, stored_at: now, message });
        s.messages.insert(sequence, Arc::clone(&stored));
        let mut surplus = None;
        if let Some(max) = s.config.max_messages_per_subject {
            let of_subject = s.by_subject.entry(stored.message.subject.clone()).or_default();
            of_subject.insert(sequence);
            if of_subject.len() as u64 > max {
                surplus = of_subject.first().copied();
            }
        }
        let (id, ack) = (s.id, PubAck { stream: Arc::clone(&s.name), sequence, duplicate: false });
        self.journal.insert(id, stored);
        if self.file.is_some() && s.messages.len() > TAIL {
            let from = s.last - TAIL as u64 / 2;
            s.messages = s.messages.split_off(&from);
        }
        if let Some(surplus) = surplus {
            self.remove(&name, surplus).await.map_err(|e| PublishError::Unknown(e.to_string()))?;
        }
        Ok(ack)
    }

    async fn remove_first(&mut self, stream: &str) -> Result<(), BrokerError> {
        let first = self.stream(stream)?.first;
        self.remove(stream, first).await
    }

    /// Removes a message and moves `first` past the gap.
    async fn remove(&mut self, stream: &str, sequence: u64) -> Result<(), BrokerError> {
        let found = self.get(stream, sequence).await?;
        let s = self.stream(stream)?;
        s.dirty = true;
        if let Some(m) = found {
            s.removed(&m);
        }
        if sequence == s.first {
            let in_memory = s.messages.range(sequence + 1..).next().map(|(&k, _)| k);
            let in_file = s.by_subject.values().filter_map(|q| q.range(sequence + 1..).next().copied()).min();
            let next = match (in_file, in_memory) {
                (Some(a), Some(b)) => a.min(b),
                (a, b) => a.or(b).unwrap_or(s.last + 1),
            };
            // Without an index by subject, messages lie without gaps.
            s.first =
                if s.config.max_messages_per_subject.is_some() || s.count == 0 { next } else { sequence + 1 };
        }
        let id = s.id;
        self.journal.delete(id, sequence);
        Ok(())
    }

    async fn get(&mut self, stream: &str, sequence: u64) -> Result<Option<Arc<StoredMessage>>, BrokerError> {
        let s = self.stream(stream)?;
        if let Some(m) = s.messages.get(&sequence) {
            return Ok(Some(Arc::clone(m)));
        }
        let (id, inside) = (s.id, (s.first..=s.last).contains(&sequence));
        match &mut self.file {
            Some(file) if inside => {
                let found = file.read(id, sequence, 1).await.map_err(super::unavailable)?;
                Ok(found.get(&sequence).cloned().filter(|_| !self.journal.deletes(id, sequence)))
            }
            _ => Ok(None),
        }
    }

    async fn find(
        &mut self,
        stream: &str,
        filter: &str,
        which: Find,
    ) -> Result<Option<Arc<StoredMessage>>, BrokerError> {
        let wanted = |m: &&Arc<StoredMessage>| matches(filter, &m.message.subject);
        let s = self.stream(stream)?;
        let (id, mut from) = (s.id, s.first);
        let Some(file) = &mut self.file else {
            let s = self.stream(stream)?;
            let found = match which {
                Find::From(from) => s.messages.range(from..).map(|(_, m)| m).find(wanted),
                Find::Last => s.messages.values().rev().find(wanted),
            };
            return Ok(found.cloned());
        };
        // What is in the journal is not in the file yet.
        self.journal.write(file).await.map_err(super::unavailable)?;
        match which {
            Find::From(first) => from = from.max(first),
            Find::Last => {
                let last = file.last_by_subject(id).await.map_err(super::unavailable)?;
                let last = last.iter().filter(|(subject, _)| matches(filter, subject)).map(|(_, n)| *n).max();
                let Some(last) = last else { return Ok(None) };
                from = last;
            }
        }
        loop {
            let chunk = file.read(id, from, READ_AHEAD).await.map_err(super::unavailable)?;
            if let Some(found) = chunk.values().find(wanted) {
                return Ok(Some(Arc::clone(found)));
            }
            let Some((&end, _)) = chunk.last_key_value() else { return Ok(None) };
            from = end + 1;
        }
    }

    async fn settle(
        &mut self,
        stream: &str,
        durable: &str,
        settlements: Vec<(String, Settlement)>,
    ) -> Result<(), BrokerError> {
        let now = Instant::now();
        for (reply, settlement) in settlements {
            let c = self.consumer(stream, durable)?;
            let Some(sequence) = sequence_of(&reply) else { continue };
            let Some(u) = c.unsettled.get(&sequence) else { continue };
            let delivered = u.delivered;
            match settlement {
                Settlement::Ack => {
                    c.settle(sequence);
                }
                Settlement::Nak(delay) => c.reschedule(sequence, now + delay),
                Settlement::Progress => {
                    let wait = c.ack_wait(delivered);
                    c.reschedule(sequence, now + wait);
                }
                Settlement::Term(reason) => {
                    c.settle(sequence);
                    self.advise("MSG_TERMINATED", stream, durable, sequence, delivered, &reason).await;
                }
            }
        }
        Ok(())
    }

    /// An advisory as nats-server words it; stored if some stream captures its subject.
    async fn advise(
        &mut self,
        kind: &str,
        stream: &str,
        consumer: &str,
        sequence: u64,
        delivered: u32,
        reason: &str,
    ) {
        let subject = format!("$JS.EVENT.ADVISORY.CONSUMER.{kind}.{stream}.{consumer}");
        if !self.streams.values().any(|s| s.stores(&subject)) {
            return;
        }
        let body = serde_json::json!({
            "type": format!("io.nats.jetstream.advisory.v1.{}", if kind == "MSG_TERMINATED" { "terminated" } else { "max_deliver" }),
            "stream": stream, "consumer": consumer, "stream_seq": sequence, "deliveries": delivered, "reason": reason,
        });
        let message =
            Message { subject, msg_id: None, headers: Vec::new(), payload: Bytes::from(body.to_string()) };
        if let Err(error) = Box::pin(self.publish(message)).await {
            tracing::error!(%error, stream, consumer, sequence, "an advisory could not be stored");
        }
    }

    /// Removes what is too old.
    pub(super) async fn housekeep(&mut self) {
        let now = self.clock.now();
        let names: Vec<String> = self.streams.keys().cloned().collect();
        for name in names {
            let Some(age) = self.streams.get(&name).and_then(|s| s.config.max_age) else { continue };
            // A bounded step each second keeps everything else moving.
            for _ in 0..10_000 {
                let Some(first) = self.streams.get(&name).filter(|s| s.count > 0).map(|s| s.first) else {
                    break;
                };
                match self.get(&name, first).await {
                    Ok(Some(m)) if m.stored_at >= now - age => break,
                    Ok(_) => {}
                    Err(_) => break,
                }
                if self.remove(&name, first).await.is_err() {
                    break;
                }
            }
        }
    }

    /// When something falls due by itself.
    pub(super) fn next_timer(&self) -> Option<Instant> {
        let consumers = self.streams.values().flat_map(|s| s.consumers.values());
        consumers
            .flat_map(|c| {
                let waiting = c.waiting.iter().map(|w| w.until).min();
                let due = c.due.first().map(|(at, _)| *at);
                // A due message with nobody waiting for it needs no timer, unless it is to be given up.
                let due = due.filter(|_| !c.waiting.is_empty() || c.config.max_deliver.is_some());
                // Given up or handed out already, what is past due must not spin the loop.
                let due = due.filter(|at| !c.waiting.is_empty() || *at > Instant::now());
                [waiting, due]
            })
            .flatten()
            .min()
    }

    /// Answers fetches whose time is up.
    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        for c in self.streams.values_mut().flat_map(|s| s.consumers.values_mut()) {
            let (over, still) = c
                .waiting
                .drain(..)
                .partition::<VecDeque<_>, _>(|w| w.until <= now && c.due.is_empty() && c.pending == 0);
            c.waiting = still;
            for w in over {
                let _ = w.reply.send(Ok(Vec::new()));
            }
        }
    }

    /// Hands out what is due and what is new to whoever waits.
    pub(super) async fn dispatch(&mut self) {
        let names: Vec<(String, String)> = self
            .streams
            .values()
            .flat_map(|s| s.consumers.keys().map(|c| (s.config.name.clone(), c.clone())))
            .collect();
        for (stream, durable) in names {
            if let Err(error) = self.dispatch_to(&stream, &durable).await {
                tracing::error!(%error, stream, durable, "the embedded broker cannot read its file");
            }
        }
    }

    async fn dispatch_to(&mut self, stream: &str, durable: &str) -> Result<(), BrokerError> {
        self.give_up(stream, durable).await?;
        loop {
            let c = self.consumer(stream, durable)?;
            c.waiting.retain(|w| !w.reply.is_closed());
            let Some(max) = c.waiting.front().map(|w| w.max) else { return Ok(()) };
            let deliveries = self.take(stream, durable, max).await?;
            let now = Instant::now();
            let c = self.consumer(stream, durable)?;
            if deliveries.is_empty() && c.waiting.front().is_some_and(|w| w.until > now) {
                return Ok(());
            }
            let Some(w) = c.waiting.pop_front() else { return Ok(()) };
            if let Err(Ok(unheard)) = w.reply.send(Ok(deliveries)) {
                // Nobody took them: due at once for the next.
                for d in unheard {
                    c.reschedule(d.message.sequence, now);
                }
            }
        }
    }

    /// Messages whose deliveries are used up leave the consumer, announced by an advisory.
    async fn give_up(&mut self, stream: &str, durable: &str) -> Result<(), BrokerError> {
        let now = Instant::now();
        let c = self.consumer(stream, durable)?;
        let Some(max) = c.config.max_deliver else { return Ok(()) };
        let spent: Vec<(u64, u32)> = c
            .due
            .iter()
            .take_while(|(at, _)| *at <= now)
            .filter_map(|&(_, s)| {
                c.unsettled.get(&s).filter(|u| u.delivered >= max).map(|u| (s, u.delivered))
            })
            .collect();
        for (sequence, delivered) in spent {
            self.consumer(stream, durable)?.settle(sequence);
            self.advise("MAX_DELIVERIES", stream, durable, sequence, delivered, "").await;
        }
        Ok(())
    }

    async fn take(&mut self, stream: &str, durable: &str, max: usize) -> Result<Vec<Delivery>, BrokerError> {
        let now = Instant::now();
        let mut taken: Vec<(u64, Arc<StoredMessage>)> = Vec::new();
        let due: Vec<u64> = {
            let c = self.consumer(stream, durable)?;
            c.due.iter().take_while(|(at, _)| *at <= now).take(max).map(|&(_, s)| s).collect()
        };
        for sequence in due {
            match self.get(stream, sequence).await? {
                Some(m) => taken.push((sequence, m)),
                // Aged out meanwhile.
                None => drop(self.consumer(stream, durable)?.settle(sequence)),
            }
        }
        let (mut fresh, mut from) = (0, self.consumer(stream, durable)?.next);
        while taken.len() < max {
            let c = self.consumer(stream, durable)?;
            if c.pending <= fresh as u64 || c.unsettled.len() + fresh >= c.config.max_ack_pending {
                break;
            }
            let Some(m) = self.next_from(stream, durable, from).await? else { break };
            (fresh, from) = (fresh + 1, m.sequence + 1);
            taken.push((m.sequence, m));
        }
        let name = Arc::clone(&self.stream(stream)?.name);
        let wall = self.clock.now();
        let c = self.consumer(stream, durable)?;
        if !taken.is_empty() {
            c.last_delivered_at = Some(wall);
        }
        Ok(taken
            .into_iter()
            .map(|(sequence, message)| {
                if sequence >= c.next {
                    c.next = sequence + 1;
                    c.pending = c.pending.saturating_sub(1);
                }
                let delivered = c.deliver(sequence, now);
                let reply = format!("{sequence}.{delivered}");
                Delivery { message, stream: Arc::clone(&name), delivered, reply }
            })
            .collect())
    }

    /// The next message the consumer wants, at or after `from`.
    async fn next_from(
        &mut self,
        stream: &str,
        durable: &str,
        mut from: u64,
    ) -> Result<Option<Arc<StoredMessage>>, BrokerError> {
        loop {
            let s = self.stream(stream)?;
            from = from.max(s.first);
            if from > s.last {
                return Ok(None);
            }
            let Some(c) = s.consumers.get_mut(durable) else { return Ok(None) };
            let tail = s.messages.keys().next().copied().unwrap_or(s.last + 1);
            if from >= tail {
                c.read_ahead.clear();
                return Ok(s
                    .messages
                    .range(from..)
                    .map(|(_, m)| m)
                    .find(|m| c.wants(&m.message.subject))
                    .cloned());
            }
            if let Some(m) = c.read_ahead.range(from..).map(|(_, m)| m).find(|m| c.wants(&m.message.subject))
            {
                return Ok(Some(Arc::clone(m)));
            }
            let behind = c.read_ahead.last_key_value().map_or(0, |(&k, _)| k + 1);
            from = from.max(behind);
            let id = s.id;
            let Some(file) = &mut self.file else { return Ok(None) };
            if from >= tail {
                continue;
            }
            self.journal.write(file).await.map_err(super::unavailable)?;
            let chunk = file.read(id, from, READ_AHEAD).await.map_err(super::unavailable)?;
            if chunk.is_empty() {
                return Ok(None);
            }
            self.consumer(stream, durable)?.read_ahead = chunk;
        }
    }

    /// Writes the journal. Floors are written along with it, or when `everything` is asked for.
    pub(super) async fn write(&mut self, everything: bool) -> Result<(), sqlx::Error> {
        let Some(file) = &mut self.file else {
            self.journal.clear();
            return Ok(());
        };
        if self.journal.is_empty() && !everything && !self.streams.values().any(|s| s.dirty) {
            return Ok(());
        }
        for s in self.streams.values_mut() {
            if s.dirty {
                self.journal.stream(s.record());
                s.dirty = false;
            }
            for c in s.consumers.values_mut() {
                let floor = c.floor();
                if floor != c.written_floor {
                    self.journal.consumer(s.id, &c.config, floor);
                    c.written_floor = floor;
                }
            }
        }
        self.journal.write(file).await
    }
}
