//! The worker: fetch a batch → decode → claim in the inbox → handlers → commit → acknowledge.
//!
//! Failures are counted, not deliveries: a killed process or a database outage costs an event nothing. If one event of a batch
//! fails, it is set aside and the rest runs again without it; it then runs alone, and its fate is decided in [`Worker::failed`].

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use uuid::Uuid;

use super::binding::{self, Binding};
use super::decode::{Decoded, Reject};
use super::readers::Readers;
use super::{ReadyConsumer, Route};
use crate::broker::{Broker, BrokerError, Delivery, Settlement, StoredMessage};
use crate::db::{Db, DbError, Slot};
use crate::dead_letter::{self, Burial, Reason};
use crate::event::{Cause, Envelope, EventId, Lane};
use crate::handler::{BoxError, Call, Failure, Fate, Incoming};
use crate::retry::Backoff;
use crate::{inbox, telemetry};

/// How long one fetch waits for a message.
const FETCH_WAIT: Duration = Duration::from_secs(5);
/// While express events are at work, standard ones wait for them, but no longer than this a batch: neither lane starves.
const GIVE_WAY: Duration = Duration::from_millis(25);
/// After express events were seen, standard batches stay small for so long, so that the next ones need not wait for a large one to end.
const EXPRESS_RECENTLY: Duration = Duration::from_secs(2);
/// By how much they are smaller then.
const SMALLER: usize = 8;
/// How often a filter that is not yet as asked for is looked at, in the first minute and after it.
const BIND_AGAIN: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(30)];
const FIRST: Duration = Duration::from_secs(60);
/// A version that another one stands for is given back so often, for so long, until the other one is known to have come.
const STAND_IN: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(30)];

/// Who goes first: express events, but the others get their turn.
#[derive(Debug, Default)]
pub(super) struct Turns {
    express_at_work: AtomicBool,
    express_seen: Mutex<Option<Instant>>,
    express_done: Notify,
}

impl Turns {
    fn express_begins(&self) {
        *self.express_seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.express_at_work.store(true, Ordering::Relaxed);
    }

    fn express_ends(&self) {
        self.express_at_work.store(false, Ordering::Relaxed);
        self.express_done.notify_waiters();
    }

    fn express_recently(&self) -> bool {
        let seen = *self.express_seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.is_some_and(|at| at.elapsed() < EXPRESS_RECENTLY)
    }

    async fn give_way(&self) {
        let done = self.express_done.notified();
        if self.express_at_work.load(Ordering::Relaxed) {
            let _ = tokio::time::timeout(GIVE_WAY, done).await;
        }
    }
}

/// An event ready to be handled.
struct Entry<'a> {
    delivery: &'a Delivery,
    incoming: Incoming,
    route: &'a Route,
}

/// What goes to one handler together, in the order in which the first of each came.
fn by_handler<E>(entries: Vec<E>, handler: impl Fn(&E) -> usize) -> Vec<Vec<E>> {
    let mut groups: Vec<(usize, Vec<E>)> = Vec::new();
    for entry in entries {
        let number = handler(&entry);
        match groups.iter_mut().find(|(other, _)| *other == number) {
            Some((_, group)) => group.push(entry),
            None => groups.push((number, vec![entry])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

pub(super) struct Worker {
    consumer: Arc<ReadyConsumer>,
    lane: Lane,
    turns: Arc<Turns>,
    readers: Arc<Readers>,
    db: Db,
    broker: Arc<dyn Broker>,
    stop: CancellationToken,
    binding: Mutex<Arc<Binding>>,
}

impl Worker {
    pub(super) fn new(
        consumer: Arc<ReadyConsumer>,
        lane: Lane,
        turns: Arc<Turns>,
        readers: Arc<Readers>,
        db: Db,
        broker: Arc<dyn Broker>,
        stop: CancellationToken,
    ) -> Self {
        Self { consumer, lane, turns, readers, db, broker, stop, binding: Mutex::default() }
    }

    fn binding(&self) -> Arc<Binding> {
        Arc::clone(&self.binding.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) async fn run(self) {
        let durable = self.consumer.durable(self.lane);
        let (name, stream) = (durable.as_str(), self.consumer.stream.as_str());
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let (mut bound, mut bind_again, mut changed) = (false, Instant::now(), Instant::now());
        let mut redrive = self.db.redrive_wake().subscribe();
        redrive.mark_changed();
        while !self.stop.is_cancelled() {
            if !bound || (!self.binding().is_final() && Instant::now() >= bind_again) {
                let before = self.binding();
                let (broker, readers) = (self.broker.as_ref(), &self.readers);
                match binding::bind(broker, readers, &self.consumer, self.lane, &before).await {
                    Ok(binding) => {
                        if binding.filters != before.filters {
                            changed = Instant::now();
                        }
                        let [soon, later] = BIND_AGAIN;
                        let wait = if changed.elapsed() < FIRST { soon } else { later };
                        *self.binding.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(binding);
                        (bound, bind_again) = (true, Instant::now() + wait);
                        backoff.reset();
                    }
                    Err(error) => {
                        let (delay, error) = (backoff.next(), telemetry::chain(error.as_ref()));
                        tracing::warn!(consumer = name, stream, error, retry_in = ?delay, "the consumer cannot be made yet");
                        tokio::select! {
                            () = tokio::time::sleep(delay) => {}
                            () = self.stop.cancelled() => {}
                        }
                        continue;
                    }
                }
            }
            let holds_back = self.binding().holds_back;
            let batch = self.batch();
            let fetch = async {
                match &self.consumer.breaker {
                    _ if holds_back => {
                        tokio::time::sleep_until(bind_again).await;
                        Ok(Vec::new())
                    }
                    Some(breaker) if breaker.permits() == 0 => {
                        breaker.ready().await;
                        Ok(Vec::new())
                    }
                    _ => self.broker.fetch(stream, name, batch, FETCH_WAIT).await,
                }
            };
            let fetched = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                _ = redrive.changed(), if self.lane == Lane::Standard => {
                    self.redrive_queued().await;
                    continue;
                }
                fetched = fetch => fetched,
            };
            match fetched {
                Ok(deliveries) => {
                    backoff.reset();
                    if !deliveries.is_empty() {
                        self.keep_alive_while(&deliveries, self.in_turn(&deliveries)).await;
                    }
                }
                Err(error) => {
                    // It was there, so somebody has deleted it, or the broker has lost it.
                    bound = !matches!(error, BrokerError::NoConsumer { .. } | BrokerError::NoStream(_));
                    let delay = backoff.next();
                    tracing::warn!(consumer = name, stream, %error, retry_in = ?delay, "nothing can be fetched");
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = self.stop.cancelled() => {}
                    }
                }
            }
        }
    }

    /// How many events the next batch may have.
    fn batch(&self) -> usize {
        let batch = self.consumer.options.batch;
        let small = self.lane == Lane::Standard && self.turns.express_recently();
        let batch = if small { (batch / SMALLER).max(1) } else { batch };
        self.consumer.breaker.as_ref().map_or(batch, |b| batch.min(b.permits().max(1)))
    }

    async fn in_turn(&self, deliveries: &[Delivery]) {
        match self.lane {
            Lane::Express => {
                self.turns.express_begins();
                self.process(deliveries).await;
                self.turns.express_ends();
            }
            Lane::Standard => {
                self.turns.give_way().await;
                self.process(deliveries).await;
            }
        }
    }

    /// Extends the deliveries' AckWait while `work` goes on.
    async fn keep_alive_while(&self, deliveries: &[Delivery], work: impl Future<Output = ()>) {
        let period = self.consumer.options.ack_wait / 3;
        let alive = async {
            loop {
                tokio::time::sleep(period).await;
                self.settle(deliveries.iter().map(|d| (d.reply.clone(), Settlement::Progress)).collect())
                    .await;
            }
        };
        tokio::select! {
            () = work => {}
            () = alive => {}
        }
    }

    async fn settle(&self, settlements: Vec<(String, Settlement)>) {
        if settlements.is_empty() {
            return;
        }
        let (name, stream) = (self.consumer.durable(self.lane), self.consumer.stream.as_str());
        if let Err(error) = self.broker.settle(stream, &name, settlements).await {
            // Redelivered then, and acknowledged by the inbox.
            tracing::warn!(consumer = name, stream, %error, "deliveries could not be settled");
        }
    }

    async fn process(&self, deliveries: &[Delivery]) {
        let mut entries = Vec::with_capacity(deliveries.len());
        let mut others = Vec::new();
        let binding = self.binding();
        for d in deliveries {
            let decoded = self.consumer.decode(&d.message.message, self.db.clock().now());
            let envelope = match &decoded {
                Ok((incoming, _)) => Some(&*incoming.envelope),
                Err(reject) if reject.reason == Reason::Unaccepted => reject.envelope.as_deref(),
                Err(_) => None,
            };
            if let Some(better) = envelope.and_then(|e| self.better_version(e, &binding)) {
                others.push((d, better, decoded));
                continue;
            }
            match decoded {
                Ok((incoming, route)) => entries.push(Entry { delivery: d, incoming, route }),
                Err(reject) => self.reject(d, reject).await,
            }
        }
        self.stand_in(others, &mut entries).await;
        // Depth first: what a failure splits off is tried before what follows it.
        let mut stack = if self.db.is_shared() {
            // See `Consumer::on`.
            let mut by_handler = by_handler(entries, |e| e.route.handler);
            by_handler.reverse();
            by_handler
        } else {
            vec![entries]
        };
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        while let Some(mut group) = stack.pop() {
            if group.is_empty() {
                continue;
            }
            match self.transact(&group).await {
                Ok(()) => {
                    backoff.reset();
                    self.settle(group.iter().map(|e| (e.delivery.reply.clone(), Settlement::Ack)).collect())
                        .await;
                }
                Err(failure) if matches!(failure.fate, Fate::Pause | Fate::Rejected) => {
                    let delay = backoff.next();
                    tracing::warn!(
                        consumer = &*self.consumer.name, error = telemetry::chain(&failure), retry_in = ?delay,
                        events = group.len(), "the consumer pauses; no failure is counted"
                    );
                    tokio::select! {
                        () = self.pause(delay) => {}
                        // What is held goes back to the broker when AckWait runs out.
                        () = self.stop.cancelled() => return,
                    }
                    stack.push(group);
                }
                Err(failure) if group.len() == 1 => {
                    let fate = self.failed(&group[0], failure).await;
                    self.settle(fate.into_iter().collect()).await;
                }
                Err(failure) => {
                    let at = failure
                        .culprit
                        .and_then(|id| group.iter().position(|e| e.incoming.envelope.id == id));
                    if let Some(at) = at {
                        let culprit = group.remove(at);
                        stack.push(vec![culprit]);
                        stack.push(group);
                    } else {
                        // Nobody says which one it was: halve until it is found.
                        let second = group.split_off(group.len() / 2);
                        stack.push(second);
                        stack.push(group);
                    }
                }
            }
        }
    }

    /// The version of the same event that takes effect here instead of this one: the highest that can be read and is asked for.
    fn better_version(&self, envelope: &Envelope, binding: &Binding) -> Option<u32> {
        if envelope.siblings.is_empty() {
            return None;
        }
        let routes = &self.consumer.routes;
        let name = |version: u32| format!("{}.v{version}", envelope.event_type);
        let readable = routes.contains_key(&envelope.name());
        let better = |v: &u32| *v != envelope.version && (!readable || *v > envelope.version);
        let comes = |v: &u32| routes.contains_key(&name(*v)) && binding.brings(&name(*v), self.lane);
        envelope.siblings.iter().copied().filter(|v| better(v) && comes(v)).max()
    }

    /// Deals with versions that another one takes effect for. That it really comes is not taken for granted, for filters and replicas change:
    /// until it is known to have come, this one is given back, and in the end takes effect itself.
    async fn stand_in<'a>(
        &'a self,
        others: Vec<(&'a Delivery, u32, Decoded<'a>)>,
        entries: &mut Vec<Entry<'a>>,
    ) {
        if others.is_empty() {
            return;
        }
        let id = |decoded: &Decoded<'_>| match decoded {
            Ok((incoming, _)) => Some(incoming.envelope.id),
            Err(reject) => reject.envelope.as_ref().map(|e| e.id),
        };
        let here: HashSet<(EventId, u32)> =
            entries.iter().map(|e| (e.incoming.envelope.id, e.incoming.envelope.version)).collect();
        let ask = others.iter().filter_map(|(_, better, decoded)| Some((id(decoded)?, *better)));
        let ask: Vec<EventId> = ask.filter(|pair| !here.contains(pair)).map(|(id, _)| id).collect();
        let come = match inbox::come(&self.db, &self.consumer.name, &ask).await {
            Ok(come) => come,
            Err(error) => {
                // Not settled: they come again.
                tracing::warn!(
                    consumer = &*self.consumer.name,
                    error = telemetry::chain(&error),
                    "what came before cannot be read"
                );
                return;
            }
        };
        let mut settlements = Vec::with_capacity(others.len());
        let mut superseded = 0;
        for (delivery, better, decoded) in others {
            let has_come = id(&decoded).is_some_and(|id| come.contains(&id) || here.contains(&(id, better)));
            // What can be read takes effect a little earlier than what cannot is buried.
            let patience = if decoded.is_ok() { STAND_IN.len() - 1 } else { STAND_IN.len() };
            let delay = STAND_IN[..patience].get(delivery.delivered.saturating_sub(1) as usize);
            match (has_come, delay, decoded) {
                (true, ..) => {
                    superseded += 1;
                    settlements.push((delivery.reply.clone(), Settlement::Ack));
                }
                (false, Some(delay), _) => {
                    settlements.push((delivery.reply.clone(), Settlement::Nak(*delay)));
                }
                (false, None, Ok((incoming, route))) => entries.push(Entry { delivery, incoming, route }),
                (false, None, Err(reject)) => self.reject(delivery, reject).await,
            }
        }
        self.count("superseded", superseded);
        self.settle(settlements).await;
    }

    async fn pause(&self, delay: Duration) {
        tokio::time::sleep(delay).await;
        if let Some(breaker) = &self.consumer.breaker {
            breaker.ready().await;
        }
    }

    /// One transaction: claim, handle, commit. Events claimed before are passed over.
    async fn transact(&self, group: &[Entry<'_>]) -> Result<(), Failure> {
        let mut tx = self.db.begin().await?;
        let ids = group.iter().map(|e| e.incoming.envelope.id).collect();
        let fresh: HashSet<EventId> =
            inbox::claim(&mut tx, &self.consumer.name, ids).await?.into_iter().collect();
        let fresh: Vec<&Entry<'_>> = {
            // The same event may stand in a batch twice.
            let mut once = fresh.clone();
            group.iter().filter(|e| once.remove(&e.incoming.envelope.id)).collect()
        };
        self.count("duplicate", group.len() - fresh.len());
        if fresh.is_empty() {
            tx.rollback().await;
            return Ok(());
        }
        if fresh.iter().any(|e| e.delivery.delivered > 1) {
            let ids: Vec<EventId> = fresh.iter().map(|e| e.incoming.envelope.id).collect();
            tx.query("DELETE FROM failures WHERE consumer = $1 AND event_id IN (SELECT id FROM {$2: id})")
                .bind(&*self.consumer.name)
                .rows(ids.into_iter().map(|id| (id,)))
                .execute()
                .await?;
        }
        let slot = Slot::new(tx);
        for entries in by_handler(fresh.clone(), |e| e.route.handler) {
            let route = entries[0].route;
            if route.batch {
                let events = entries.iter().map(|e| e.incoming.clone()).collect();
                self.call(route, events, &slot).await?;
            } else {
                for e in entries {
                    self.call(route, Arc::new([e.incoming.clone()]), &slot).await?;
                }
            }
        }
        slot.take()?.commit().await?;
        self.count("handled", fresh.len());
        self.readers.handled(fresh.iter().map(|e| &*e.incoming.envelope));
        if tracing::enabled!(tracing::Level::DEBUG) {
            for Entry { incoming: Incoming { envelope, .. }, .. } in &fresh {
                tracing::debug!(
                    consumer = &*self.consumer.name, event = envelope.name(), event_id = %envelope.id,
                    correlation_id = %envelope.cause.correlation_id, "handled"
                );
            }
        }
        Ok(())
    }

    async fn call(&self, route: &Route, events: Arc<[Incoming]>, slot: &Slot) -> Result<(), Failure> {
        let alone = (events.len() == 1).then(|| events[0].envelope.id);
        if let Some(mut tx) = slot.lend() {
            tx.set_cause(events.first().map_or_else(Cause::new, |e| e.envelope.as_cause()));
        }
        let call = Call { events, slot: slot.clone(), consumer: Arc::clone(&self.consumer.name) };
        let result = route.service.clone().oneshot(call).await;
        result.map_err(|failure| Failure { culprit: failure.culprit.or(alone), ..failure })
    }

    /// The fate of an event that failed alone: counted, and then retried or buried. Nothing is settled before that is committed.
    async fn failed(&self, entry: &Entry<'_>, failure: Failure) -> Option<(String, Settlement)> {
        let (envelope, reply) = (&entry.incoming.envelope, entry.delivery.reply.clone());
        let name = &*self.consumer.name;
        let retry = &self.consumer.options.retry;
        let error = telemetry::chain(failure.error.as_ref());
        let recorded = async {
            let mut tx = self.db.begin_for(envelope.as_cause()).await?;
            let now = tx.now();
            let failures: u32 = tx
                .query(
                    "INSERT INTO failures (consumer, event_id, attempts, last_error, updated_at) VALUES ($1, $2, 1, $3, $4)
                     ON CONFLICT (consumer, event_id) DO UPDATE
                     SET attempts = failures.attempts + 1, last_error = excluded.last_error, updated_at = excluded.updated_at
                     RETURNING attempts",
                )
                .bind(name)
                .bind(envelope.id)
                .bind(error.as_str())
                .bind(now)
                .fetch_scalar()
                .await?;
            let reason = match failure.fate {
                Fate::DeadLetter => Some(Reason::Permanent),
                _ if failures >= retry.limit => Some(Reason::RetriesExhausted),
                _ => None,
            };
            if let Some(reason) = reason {
                self.bury(&mut tx, entry.delivery, Some(envelope), reason, &error, failures).await?;
            }
            tx.commit().await?;
            Ok::<_, DbError>((failures, reason))
        };
        match recorded.await {
            Ok((failures, None)) => {
                let delay = retry.delay(failures);
                self.count("retried", 1);
                tracing::warn!(
                    consumer = name, event = envelope.name(), event_id = %envelope.id, error, failures,
                    correlation_id = %envelope.cause.correlation_id, retry_in = ?delay, "an event failed"
                );
                Some((reply, Settlement::Nak(delay)))
            }
            Ok((_, Some(reason))) => Some((reply, Settlement::Term(reason.as_str().to_owned()))),
            Err(db) => {
                // Not recorded, so not counted: the delivery comes again when AckWait runs out.
                tracing::error!(consumer = name, event_id = %envelope.id, error, database = telemetry::chain(&db), "a failure could not be recorded");
                None
            }
        }
    }

    /// Buries what no handler may see, with its own transaction.
    async fn reject(&self, delivery: &Delivery, reject: Reject) {
        let Reject { reason, error, envelope } = reject;
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        loop {
            let buried = async {
                let cause = envelope.as_deref().map_or_else(Cause::new, Envelope::as_cause);
                let mut tx = self.db.begin_for(cause).await?;
                self.bury(&mut tx, delivery, envelope.as_deref(), reason, &error, 0).await?;
                tx.commit().await
            };
            match buried.await {
                Ok(()) => break,
                Err(db) => {
                    let delay = backoff.next();
                    tracing::warn!(consumer = &*self.consumer.name, error = telemetry::chain(&db), retry_in = ?delay, "a dead letter cannot be recorded");
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = self.stop.cancelled() => return,
                    }
                }
            }
        }
        self.settle(vec![(delivery.reply.clone(), Settlement::Term(reason.as_str().to_owned()))]).await;
    }

    async fn bury(
        &self,
        tx: &mut crate::Tx,
        delivery: &Delivery,
        envelope: Option<&Envelope>,
        reason: Reason,
        error: &str,
        attempts: u32,
    ) -> Result<(), DbError> {
        let burial = Burial {
            consumer: &self.consumer.name,
            envelope,
            stream: &delivery.stream,
            stored: &delivery.message,
            reason,
            error,
            attempts,
        };
        // Dealt with before, so this is a late copy: the inbox says so, and there is nothing to bury.
        if dead_letter::bury(tx, &burial).await? {
            self.count("dead_lettered", 1);
            tracing::error!(
                consumer = &*self.consumer.name,
                stream = &*delivery.stream,
                sequence = delivery.message.sequence,
                event = envelope.map(Envelope::name),
                event_id = envelope.map(|e| e.id.to_string()),
                correlation_id = envelope.map(|e| e.cause.correlation_id.to_string()),
                reason = reason.as_str(),
                error,
                "an event became a dead letter"
            );
        }
        Ok(())
    }

    /// Runs the dead letters that an operator queued, each in its own transaction, past the inbox: only this consumer sees them.
    async fn redrive_queued(&self) {
        let name = &*self.consumer.name;
        loop {
            let queued = match dead_letter::queued(&self.db, name).await {
                Ok(queued) if queued.is_empty() => return,
                Ok(queued) => queued,
                Err(error) => {
                    tracing::warn!(
                        consumer = name,
                        error = telemetry::chain(&error),
                        "dead letters cannot be read"
                    );
                    return;
                }
            };
            for (id, stored) in queued {
                if self.stop.is_cancelled() {
                    return;
                }
                let result = self.redrive(id, &stored).await;
                let recorded = match &result {
                    Ok(()) => Ok(()),
                    Err(e) => dead_letter::redrive_failed(&self.db, id, &telemetry::chain(e.as_ref())).await,
                };
                match (&result, recorded) {
                    (Ok(()), _) => {
                        self.count("redriven", 1);
                        tracing::info!(consumer = name, dead_letter = %id, "a dead letter was redriven");
                    }
                    (Err(e), Ok(())) => {
                        tracing::warn!(
                            consumer = name,
                            dead_letter = %id,
                            error = telemetry::chain(e.as_ref()),
                            "a redriven dead letter failed again"
                        );
                    }
                    (_, Err(db)) => {
                        tracing::warn!(
                            consumer = name,
                            dead_letter = %id,
                            error = telemetry::chain(&db),
                            "a redrive could not be recorded"
                        );
                        return;
                    }
                }
            }
        }
    }

    async fn redrive(&self, id: Uuid, stored: &StoredMessage) -> Result<(), BoxError> {
        // Counted before it runs: an event that kills the process must not do so for ever.
        if !dead_letter::begin_redrive(&self.db, id).await? {
            return Ok(());
        }
        let (incoming, route) = match self.consumer.decode(&stored.message, self.db.clock().now()) {
            Ok(decoded) => decoded,
            Err(reject) => return Err(reject.error.into()),
        };
        let mut tx = self.db.begin_for(incoming.envelope.as_cause()).await?;
        if !dead_letter::take(&mut tx, id).await? {
            tx.rollback().await;
            return Ok(());
        }
        let slot = Slot::new(tx);
        self.call(route, Arc::new([incoming]), &slot).await?;
        slot.take()?.commit().await?;
        Ok(())
    }

    fn count(&self, outcome: &'static str, n: usize) {
        if n > 0 {
            metrics::counter!("consign_events_handled_total", "consumer" => self.consumer.name.to_string(), "outcome" => outcome)
                .increment(n as u64);
        }
    }
}
