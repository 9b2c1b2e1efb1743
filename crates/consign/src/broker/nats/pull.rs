//! Pulling messages of a durable consumer: a subscription that lives as long as somebody fetches, and one open request at a time.
//!
//! A fetch returns what has arrived; the rest of its request goes on arriving while the batch is worked on and is there for the next fetch.
//! Nothing is lost between fetches, nor when one is cancelled: the subscription goes back to where the next fetch finds it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_nats::jetstream::message::Message as JsMessage;
use async_nats::{StatusCode, Subscriber, jetstream};
use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{FutureExt, StreamExt};
use serde_json::json;
use tokio::time::{Instant, timeout};

use super::connect::Watch;
use crate::broker::{BrokerError, Delivery};

/// Subscribing and asking only put something into the client's queue; a full queue must not hold us up.
const QUEUED: Duration = Duration::from_secs(2);
/// Nothing more is on its way when nothing has come for this long.
const QUIET: Duration = Duration::from_millis(100);
/// What is on its way when a subscription ends has arrived after this.
const ON_ITS_WAY: Duration = Duration::from_millis(300);
/// A request whose end has not been told by so long after it is gone.
const SLACK: Duration = Duration::from_secs(2);
/// Waits that are at least this long are kept alive by heartbeats, so that a dead leader is noticed before their end.
const HEARTBEATS_FROM: Duration = Duration::from_secs(2);

/// Subscriptions nobody is fetching with at the moment, by stream and durable.
#[derive(Default)]
pub(super) struct Inboxes(Mutex<HashMap<(String, String), Vec<Inbox>>>);

/// A subscription to the replies of one fetcher.
struct Inbox {
    subscriber: Subscriber,
    prefix: String,
    request: Option<Request>,
    requests: u64,
}

/// What the server was asked for and has not sent yet.
struct Request {
    reply: String,
    outstanding: usize,
    /// Nothing is to be expected after this.
    end: Instant,
    heartbeat: Option<Duration>,
    /// Of which connection; the server forgets the requests of an old one.
    epoch: u64,
}

/// What came of a fetch.
pub(super) enum Pulled {
    /// Messages, or none within the wait.
    Messages(Vec<Delivery>),
    /// Nobody answers for this consumer: it is not there, or its leader is not.
    NoResponders,
}

/// What a message in the subscription is.
enum Received {
    Delivery(Box<Delivery>),
    NoResponders,
    Nothing,
    Fault(String),
}

/// Lends an inbox, and puts it back even if the fetch is cancelled.
struct Lent<'a> {
    inboxes: &'a Inboxes,
    key: (String, String),
    inbox: Option<Inbox>,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(inbox) = self.inbox.take() {
            let mut idle = self.inboxes.0.lock().unwrap_or_else(PoisonError::into_inner);
            idle.entry(std::mem::take(&mut self.key)).or_default().push(inbox);
        }
    }
}

impl Inboxes {
    pub(super) async fn fetch(
        &self,
        context: &jetstream::Context,
        watch: &Watch,
        stream: &str,
        durable: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Pulled, BrokerError> {
        let key = (stream.to_owned(), durable.to_owned());
        let idle = self.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&key).and_then(Vec::pop);
        let inbox = match idle {
            Some(inbox) => inbox,
            None => Inbox::open(context).await?,
        };
        let mut lent = Lent { inboxes: self, key, inbox: Some(inbox) };
        let Some(inbox) = lent.inbox.as_mut() else { return Ok(Pulled::Messages(Vec::new())) };
        let pulled = inbox.pull(context, watch, stream, durable, max, wait).await;
        if pulled.is_err() {
            // What it still holds comes again after AckWait; a new one starts clean.
            lent.inbox = None;
        }
        pulled
    }

    /// Gives back what was delivered and never looked at, and ends all subscriptions.
    pub(super) async fn close(&self, context: &jetstream::Context) {
        let idle = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let all = idle.into_values().flatten().map(|mut inbox| async move {
            // First what is on its way: a message that meets no subscription any more would come again only after AckWait. Its request is
            // still open, though, and may bring more and more.
            let _ = timeout(ON_ITS_WAY, inbox.give_back(context, QUIET)).await;
            if inbox.subscriber.drain().await.is_ok() {
                inbox.give_back(context, QUEUED).await;
            }
        });
        join_all(all).await;
    }
}

impl Inbox {
    /// Naks what arrives, until nothing does for `quiet` or the subscription ends. Nothing has failed, so it comes again soon, but not before
    /// we are gone.
    async fn give_back(&mut self, context: &jetstream::Context, quiet: Duration) {
        while let Ok(Some(message)) = timeout(quiet, self.subscriber.next()).await {
            if let (None, Some(reply)) = (message.status, message.reply) {
                let nak = Bytes::from_static(b"-NAK {\"delay\":1000000000}");
                let _ = timeout(QUEUED, context.client().publish(reply, nak)).await;
            }
        }
    }

    async fn open(context: &jetstream::Context) -> Result<Self, BrokerError> {
        let client = context.client();
        let prefix = client.new_inbox();
        let subscriber = timeout(QUEUED, client.subscribe(format!("{prefix}.*")))
            .await
            .map_err(|_| BrokerError::Unavailable("no subscription in time".into()))?
            .map_err(|e| BrokerError::Unavailable(e.to_string()))?;
        Ok(Self { subscriber, prefix, request: None, requests: 0 })
    }

    async fn pull(
        &mut self,
        context: &jetstream::Context,
        watch: &Watch,
        stream: &str,
        durable: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Pulled, BrokerError> {
        let end = Instant::now() + wait;
        let mut epoch = watch.epoch();
        let mut got = Vec::new();
        loop {
            // Whatever is there.
            while got.len() < max {
                let Some(next) = self.subscriber.next().now_or_never() else { break };
                match self.received(context, next)? {
                    Received::Delivery(delivery) => got.push(*delivery),
                    Received::NoResponders if got.is_empty() => return Ok(Pulled::NoResponders),
                    Received::Fault(why) if got.is_empty() => return Err(BrokerError::Unavailable(why)),
                    Received::NoResponders | Received::Fault(_) | Received::Nothing => {}
                }
            }
            let now = Instant::now();
            if !got.is_empty() || now >= end {
                return Ok(Pulled::Messages(got));
            }
            let current = *epoch.borrow_and_update();
            if self.request.as_ref().is_none_or(|r| r.epoch != current || r.end + SLACK <= now) {
                self.ask(context, stream, durable, max, end - now, current).await?;
            }
            let patience =
                self.request.as_ref().and_then(|r| r.heartbeat).map_or(wait + SLACK, |h| h * 5 / 2);
            tokio::select! {
                next = timeout(patience, self.subscriber.next()) => {
                    let Ok(next) = next else {
                        // 2.10 says nothing at all where later servers say that there is no responder.
                        self.request = None;
                        return Ok(Pulled::NoResponders);
                    };
                    match self.received(context, next)? {
                        Received::Delivery(delivery) => got.push(*delivery),
                        Received::NoResponders => return Ok(Pulled::NoResponders),
                        Received::Fault(why) => return Err(BrokerError::Unavailable(why)),
                        Received::Nothing => {}
                    }
                }
                // The server forgot the request when the connection was lost.
                _ = epoch.changed() => {}
            }
        }
    }

    async fn ask(
        &mut self,
        context: &jetstream::Context,
        stream: &str,
        durable: &str,
        batch: usize,
        wait: Duration,
        epoch: u64,
    ) -> Result<(), BrokerError> {
        self.requests += 1;
        let reply = format!("{}.{}", self.prefix, self.requests);
        let heartbeat = (wait >= HEARTBEATS_FROM).then_some(wait / 5);
        let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        let mut body = json!({"batch": batch, "expires": nanos(wait.max(Duration::from_millis(1)))});
        if let Some(heartbeat) = heartbeat {
            body["idle_heartbeat"] = nanos(heartbeat).into();
        }
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}");
        timeout(QUEUED, context.client().publish_with_reply(subject, reply.clone(), body.to_string().into()))
            .await
            .map_err(|_| BrokerError::Unavailable("a request for messages was not sent in time".into()))?
            .map_err(|e| BrokerError::Unavailable(e.to_string()))?;
        self.request =
            Some(Request { reply, outstanding: batch, end: Instant::now() + wait, heartbeat, epoch });
        Ok(())
    }

    fn received(
        &mut self,
        context: &jetstream::Context,
        message: Option<async_nats::Message>,
    ) -> Result<Received, BrokerError> {
        let message = message.ok_or_else(|| BrokerError::Unavailable("the subscription ended".into()))?;
        let Some(status) = message.status else {
            if let Some(request) = &mut self.request {
                request.outstanding = request.outstanding.saturating_sub(1);
                if request.outstanding == 0 {
                    self.request = None;
                }
            }
            return Ok(
                delivery(context, message).map_or(Received::Nothing, |d| Received::Delivery(Box::new(d)))
            );
        };
        if status == StatusCode::IDLE_HEARTBEAT {
            return Ok(Received::Nothing);
        }
        if self.request.as_ref().is_none_or(|r| r.reply != message.subject.as_str()) {
            // Of an earlier request, which is over anyway.
            return Ok(Received::Nothing);
        }
        self.request = None;
        Ok(match status {
            StatusCode::NO_RESPONDERS => Received::NoResponders,
            StatusCode::NOT_FOUND | StatusCode::TIMEOUT => Received::Nothing,
            // 409: the consumer was deleted, its leader moved, or a limit of the server's was reached.
            _ => match message.description {
                Some(why) if why.eq_ignore_ascii_case("Consumer Deleted") => Received::NoResponders,
                Some(why) if why.contains("Leadership Change") => Received::Nothing,
                why => Received::Fault(why.unwrap_or_else(|| status.to_string())),
            },
        })
    }
}

/// A message as its consumer gets it.
fn delivery(context: &jetstream::Context, message: async_nats::Message) -> Option<Delivery> {
    let message = JsMessage { message, context: context.clone() };
    let info = match message.info() {
        Ok(info) => info,
        Err(error) => {
            // Not from JetStream: nobody else knows the inbox.
            tracing::warn!(%error, subject = %message.subject, "a message without a JetStream reply was passed over");
            return None;
        }
    };
    let (sequence, stored_at) = (info.stream_sequence, super::timestamp(info.published));
    let delivered = u32::try_from(info.delivered).unwrap_or(u32::MAX);
    let stream = info.stream.into();
    let JsMessage { message, .. } = message;
    let reply = message.reply.map(async_nats::Subject::into_string).unwrap_or_default();
    let stored =
        super::stored(sequence, stored_at, message.subject.into_string(), message.headers, message.payload);
    Some(Delivery { message: stored.into(), stream, delivered, reply })
}
