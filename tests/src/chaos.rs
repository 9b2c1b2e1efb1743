//! What may go wrong at each step, made to go wrong: handlers that fail or hang, a broker that repeats and is late, a gateway that does neither
//! what it is asked nor says what it did. For the services on virtual time.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use consign::Failure;
use consign::broker::embedded::EmbeddedBroker;
use consign::broker::{
    Broker, BrokerError, BrokerStatus, ConsumerConfig, ConsumerInfo, Delivery, Find, Message, PubAck,
    PublishError, Settlement, StoredMessage, StreamConfig, StreamInfo,
};
use consign::handler::Call;
use payment::gateway::{Answer, Charge, GatewayError, PaymentGateway, Refund, Refunded, SimulatedGateway};
use tokio::time::Instant;
use tower::{Layer, Service};

/// How a step goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It fails and has done nothing.
    Fails,
    /// It does all of its work and then fails.
    FailsAfterwards,
    /// It hangs until somebody gives it up.
    Hangs,
}

/// What is to go wrong, and how often still; shared by all that makes it so.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    steps: Arc<Mutex<HashMap<String, (How, u32)>>>,
    late: Arc<Mutex<Option<(String, Duration)>>>,
    twice: Arc<Mutex<bool>>,
    hit: Arc<Mutex<HashMap<String, u32>>>,
}

impl Plan {
    /// The next `times` times that `step` is taken. Steps are called `consumer event`, or `gateway operation`.
    pub fn goes_wrong(&self, step: &str, how: How, times: u32) {
        self.steps.lock().unwrap().insert(step.to_owned(), (how, times));
    }

    /// Events of this type reach their consumers so much later, and what follows them first.
    pub fn is_late(&self, event: Option<(&str, Duration)>) {
        *self.late.lock().unwrap() = event.map(|(e, by)| (e.to_owned(), by));
    }

    /// Every event is stored twice.
    pub fn comes_twice(&self, twice: bool) {
        *self.twice.lock().unwrap() = twice;
    }

    /// How often this went wrong, or was late.
    pub fn hits(&self, step: &str) -> u32 {
        self.hit.lock().unwrap().get(step).copied().unwrap_or(0)
    }

    fn take(&self, step: &str) -> Option<How> {
        let mut steps = self.steps.lock().unwrap();
        let (how, left) = steps.get_mut(step)?;
        if *left == 0 {
            return None;
        }
        *left -= 1;
        let how = *how;
        drop(steps);
        self.hits_one_more(step);
        Some(how)
    }

    fn hits_one_more(&self, step: &str) {
        *self.hit.lock().unwrap().entry(step.to_owned()).or_default() += 1;
    }
}

/// Around every handler.
impl<S> Layer<S> for Plan {
    type Service = Faulty<S>;
    fn layer(&self, inner: S) -> Faulty<S> {
        Faulty { inner, plan: self.clone() }
    }
}

/// See [`Plan`].
#[derive(Clone)]
pub struct Faulty<S> {
    inner: S,
    plan: Plan,
}

/// As long as the library gives a handler.
const HANDLER_TIMEOUT: Duration = Duration::from_secs(10);

impl<S> Service<Call> for Faulty<S>
where
    S: Service<Call, Response = (), Error = Failure>,
    S::Future: Send + 'static,
{
    type Response = ();
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        // A handler of several kinds goes wrong as a whole if one of them is to.
        let how =
            call.envelopes().find_map(|e| self.plan.take(&format!("{} {}", call.consumer(), e.event_type)));
        let work = self.inner.call(call);
        Box::pin(async move {
            match how {
                None => work.await,
                Some(How::Fails) => Err(Failure::retry("injected")),
                Some(How::FailsAfterwards) => {
                    work.await?;
                    Err(Failure::retry("injected afterwards"))
                }
                Some(How::Hangs) => {
                    tokio::time::sleep(HANDLER_TIMEOUT).await;
                    Err(Failure::retry("injected: it hung"))
                }
            }
        })
    }
}

/// A gateway that goes wrong as planned.
pub struct FaultyGateway {
    pub inner: SimulatedGateway,
    pub plan: Plan,
}

impl FaultyGateway {
    async fn goes<T>(
        &self,
        operation: &str,
        call: impl Future<Output = Result<T, GatewayError>>,
    ) -> Result<T, GatewayError> {
        match self.plan.take(&format!("gateway {operation}")) {
            None => call.await,
            Some(How::Fails) => Err(GatewayError::unavailable("injected")),
            Some(How::FailsAfterwards) => {
                call.await?;
                Err(GatewayError::unavailable("injected: the answer was lost"))
            }
            Some(How::Hangs) => std::future::pending().await,
        }
    }
}

#[async_trait]
impl PaymentGateway for FaultyGateway {
    async fn charge(&self, charge: &Charge) -> Result<Answer, GatewayError> {
        self.goes("charge", self.inner.charge(charge)).await
    }
    async fn lookup(&self, charge: &Charge) -> Result<Option<Answer>, GatewayError> {
        self.goes("lookup", self.inner.lookup(charge)).await
    }
    async fn cancel(&self, charge: &Charge) -> Result<Answer, GatewayError> {
        self.goes("cancel", self.inner.cancel(charge)).await
    }
    async fn refund(&self, refund: &Refund) -> Result<Refunded, GatewayError> {
        self.goes("refund", self.inner.refund(refund)).await
    }
}

type Held = HashMap<(String, String), Vec<(Instant, Delivery)>>;

/// A broker that repeats, and is late, as planned.
pub struct FaultyBroker {
    pub inner: Arc<EmbeddedBroker>,
    pub plan: Plan,
    held: Mutex<Held>,
}

impl FaultyBroker {
    pub fn new(inner: Arc<EmbeddedBroker>, plan: Plan) -> Self {
        Self { inner, plan, held: Mutex::default() }
    }

    /// What was held back and is due now; and when the next is.
    fn due(&self, stream: &str, durable: &str) -> (Vec<Delivery>, Option<Instant>) {
        let mut held = self.held.lock().unwrap();
        let Some(waiting) = held.get_mut(&(stream.to_owned(), durable.to_owned())) else {
            return (Vec::new(), None);
        };
        let now = Instant::now();
        let due = waiting.extract_if(.., |(at, _)| *at <= now).map(|(_, d)| d).collect();
        (due, waiting.iter().map(|(at, _)| *at).min())
    }
}

#[async_trait]
impl Broker for FaultyBroker {
    async fn ensure_stream(&self, config: &StreamConfig) -> Result<(), BrokerError> {
        self.inner.ensure_stream(config).await
    }
    async fn ensure_consumer(&self, stream: &str, config: &ConsumerConfig) -> Result<(), BrokerError> {
        self.inner.ensure_consumer(stream, config).await
    }
    async fn rewind_consumer(
        &self,
        stream: &str,
        config: &ConsumerConfig,
        sequence: u64,
    ) -> Result<(), BrokerError> {
        self.inner.rewind_consumer(stream, config, sequence).await
    }

    async fn publish(&self, messages: Vec<Message>) -> Vec<Result<PubAck, PublishError>> {
        if *self.plan.twice.lock().unwrap() {
            // Another message id, as if the window were over.
            let again = messages.iter().map(|m| Message { msg_id: None, ..m.clone() }).collect();
            self.inner.publish(again).await;
        }
        self.inner.publish(messages).await
    }

    async fn fetch(
        &self,
        stream: &str,
        durable: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, BrokerError> {
        let (due, next) = self.due(stream, durable);
        if !due.is_empty() {
            return Ok(due);
        }
        let next_due = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let fetched = tokio::select! {
            fetched = self.inner.fetch(stream, durable, max, wait) => fetched?,
            () = next_due => return Ok(self.due(stream, durable).0),
        };
        let late = self.plan.late.lock().unwrap().clone();
        let Some((event, by)) = late else { return Ok(fetched) };
        let prefix = format!("{event}.v");
        let (late, in_time): (Vec<_>, Vec<_>) =
            fetched.into_iter().partition(|d| d.message.message.subject.starts_with(&prefix));
        if !late.is_empty() {
            self.plan.hits_one_more(&event);
            let mut held = self.held.lock().unwrap();
            let waiting = held.entry((stream.to_owned(), durable.to_owned())).or_default();
            waiting.extend(late.into_iter().map(|d| (Instant::now() + by, d)));
        }
        Ok(in_time)
    }

    async fn settle(
        &self,
        stream: &str,
        durable: &str,
        settlements: Vec<(String, Settlement)>,
    ) -> Result<(), BrokerError> {
        self.inner.settle(stream, durable, settlements).await
    }
    async fn get(&self, stream: &str, sequence: u64) -> Result<Option<Arc<StoredMessage>>, BrokerError> {
        self.inner.get(stream, sequence).await
    }
    async fn find(
        &self,
        stream: &str,
        filter: &str,
        which: Find,
    ) -> Result<Option<Arc<StoredMessage>>, BrokerError> {
        self.inner.find(stream, filter, which).await
    }
    async fn consumers(&self, stream: &str) -> Result<Vec<ConsumerInfo>, BrokerError> {
        self.inner.consumers(stream).await
    }
    async fn stream_info(&self, stream: &str) -> Result<StreamInfo, BrokerError> {
        self.inner.stream_info(stream).await
    }
    async fn consumer_info(&self, stream: &str, durable: &str) -> Result<ConsumerInfo, BrokerError> {
        self.inner.consumer_info(stream, durable).await
    }
    fn status(&self) -> BrokerStatus {
        self.inner.status()
    }
}
