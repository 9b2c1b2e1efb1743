//! Calls to a gateway, guarded: bounded in number, retried within a budget, stopped by a circuit breaker, limited in time.

use std::future::{Ready, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use consign::Clock;
use consign::breaker::{Breaker, BreakerOptions};
use consign::layer::CircuitBreaker;
use consign::retry::RetryPolicy;
use futures_util::future::Either;
use serde::{Deserialize, Serialize};
use tokio::time::Sleep;
use tower::retry::budget::{Budget, TpsBudget};
use tower::retry::{Policy, RetryLayer};
use tower::util::BoxCloneSyncService;
use tower::{Service, ServiceBuilder, ServiceExt, layer::layer_fn, service_fn};

use super::stripe::StripeConfig;
use super::{Answer, Charge, GatewayError, Kind, Knobs, PaymentGateway, Refund, Refunded};

/// The section `[payment.gateway]`: which gateway, and how calls to it are guarded.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GatewayConfig {
    /// `simulated` or `stripe`.
    pub kind: Kind,
    /// An attempt is given up after this.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Attempts made at once after one that brought no answer; after these the task waits.
    pub retries: u32,
    /// Such attempts may be this share of all calls at most, and a few a second.
    pub retry_share: f32,
    /// So many calls at a time, charges and refunds together.
    pub concurrency: usize,
    /// When calls stop altogether.
    pub breaker: BreakerOptions,
    /// How the simulated gateway behaves at start.
    pub simulated: Knobs,
    /// Where Stripe is, and who we are to it.
    pub stripe: StripeConfig,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            kind: Kind::Simulated,
            timeout: Duration::from_secs(5),
            retries: 1,
            retry_share: 0.2,
            // As many as there are tasks of one kind: fewer at a time mean smaller commits, and a third less throughput.
            concurrency: 256,
            breaker: BreakerOptions::default(),
            simulated: Knobs::default(),
            stripe: StripeConfig::default(),
        }
    }
}

impl GatewayConfig {
    /// The longest a call takes once its turn has come.
    pub fn longest(&self) -> Duration {
        self.timeout * (self.retries + 1) + PAUSE.cap * self.retries
    }

    /// What is wrong with it.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.timeout.is_zero() {
            faults.push("timeout must be above 0".to_owned());
        }
        if self.retries > 5 {
            faults.push("retries must be at most 5: what does not work soon is tried later".to_owned());
        }
        if !(0.0..=1.0).contains(&self.retry_share) {
            faults.push("retry_share must be 0 to 1".to_owned());
        }
        if self.concurrency == 0 {
            faults.push("concurrency must be at least 1".to_owned());
        }
        faults.extend(self.breaker.faults().into_iter().map(|f| format!("breaker.{f}")));
        faults.extend(self.simulated.faults().into_iter().map(|f| format!("simulated.{f}")));
        if self.kind == Kind::Stripe {
            faults.extend(self.stripe.faults().into_iter().map(|f| format!("stripe.{f}")));
        }
        faults
    }
}

/// Between attempts made at once.
const PAUSE: RetryPolicy =
    RetryPolicy { limit: 0, base: Duration::from_millis(50), cap: Duration::from_millis(500) };

/// A gateway whose calls are guarded; clones share everything.
#[derive(Clone)]
pub struct Gateway {
    calls: BoxCloneSyncService<Call, Reply, GatewayError>,
    breaker: Breaker,
}

#[derive(Clone, Debug)]
enum Call {
    /// Once more, if it was attempted in this call already: then it may have charged.
    Charge {
        charge: Charge,
        again: bool,
    },
    Lookup(Charge),
    Cancel(Charge),
    Refund(Refund),
}

#[derive(Debug)]
enum Reply {
    Charge(Answer),
    Known(Option<Answer>),
    Refund(Refunded),
}

impl Gateway {
    /// Guards `gateway`; `name` is the circuit breaker's.
    pub fn new(name: &str, gateway: Arc<dyn PaymentGateway>, config: &GatewayConfig, clock: Clock) -> Self {
        let breaker = Breaker::new(name, config.breaker);
        let timeout = config.timeout;
        let attempt = service_fn(move |call: Call| {
            let gateway = Arc::clone(&gateway);
            async move { attempt(gateway.as_ref(), call, timeout).await }
        });
        // From the outside in. The order matters:
        let calls = ServiceBuilder::new()
            // The bulkhead first: a place is held for the whole call, pauses included, so that retries cannot grow what the gateway has to bear.
            .concurrency_limit(config.concurrency)
            // Retries around the breaker: each attempt is judged by it, and one that it refuses is not retried.
            .layer(RetryLayer::new(Again::new(config)))
            // What is too late is not called, which says nothing about the gateway: so outside of the breaker, and for each attempt anew.
            .layer(layer_fn(move |inner| InTime { inner, clock: clock.clone() }))
            // The breaker around the timeout: what hangs counts as failed.
            .layer(CircuitBreaker::new(breaker.clone()).when(GatewayError::is_outage))
            // The timeout innermost, in `attempt`: per attempt, not per call.
            .service(attempt);
        Self { calls: BoxCloneSyncService::new(calls), breaker }
    }

    /// The circuit breaker around it.
    pub fn breaker(&self) -> &Breaker {
        &self.breaker
    }

    async fn call(&self, call: Call) -> Result<Reply, GatewayError> {
        self.calls.clone().oneshot(call).await
    }

    /// See [`PaymentGateway::charge`].
    pub async fn charge(&self, charge: Charge) -> Result<Answer, GatewayError> {
        match self.call(Call::Charge { charge, again: false }).await? {
            Reply::Charge(answer) => Ok(answer),
            other => Err(mixed_up(&other)),
        }
    }

    /// See [`PaymentGateway::lookup`].
    pub async fn lookup(&self, charge: Charge) -> Result<Option<Answer>, GatewayError> {
        match self.call(Call::Lookup(charge)).await? {
            Reply::Known(answer) => Ok(answer),
            other => Err(mixed_up(&other)),
        }
    }

    /// See [`PaymentGateway::cancel`].
    pub async fn cancel(&self, charge: Charge) -> Result<Answer, GatewayError> {
        match self.call(Call::Cancel(charge)).await? {
            Reply::Charge(answer) => Ok(answer),
            other => Err(mixed_up(&other)),
        }
    }

    /// See [`PaymentGateway::refund`].
    pub async fn refund(&self, refund: Refund) -> Result<Refunded, GatewayError> {
        match self.call(Call::Refund(refund)).await? {
            Reply::Refund(refunded) => Ok(refunded),
            other => Err(mixed_up(&other)),
        }
    }
}

fn mixed_up(reply: &Reply) -> GatewayError {
    GatewayError::Refused(format!("a reply to another call: {reply:?}"))
}

/// One attempt.
async fn attempt(gateway: &dyn PaymentGateway, call: Call, timeout: Duration) -> Result<Reply, GatewayError> {
    let made = async {
        match &call {
            Call::Charge { charge, .. } => gateway.charge(charge).await.map(Reply::Charge),
            Call::Lookup(charge) => gateway.lookup(charge).await.map(Reply::Known),
            Call::Cancel(charge) => gateway.cancel(charge).await.map(Reply::Charge),
            Call::Refund(refund) => gateway.refund(refund).await.map(Reply::Refund),
        }
    };
    tokio::time::timeout(timeout, made)
        .await
        .unwrap_or_else(|_| Err(GatewayError::unavailable(format!("none within {timeout:?}"))))
}

/// Lets no charge begin after its time.
#[derive(Clone)]
struct InTime<S> {
    inner: S,
    clock: Clock,
}

impl<S> Service<Call> for InTime<S>
where
    S: Service<Call, Response = Reply, Error = GatewayError>,
{
    type Response = Reply;
    type Error = GatewayError;
    type Future = Either<Ready<Result<Reply, GatewayError>>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), GatewayError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        match &call {
            Call::Charge { charge, again } if self.clock.now() >= charge.not_after => {
                let late = if *again {
                    GatewayError::unavailable("too late to try again, and what was tried gave no answer")
                } else {
                    GatewayError::TooLate
                };
                Either::Left(ready(Err(late)))
            }
            _ => Either::Right(self.inner.call(call)),
        }
    }
}

/// Whether and when a call is attempted again.
#[derive(Clone)]
struct Again {
    left: u32,
    tried: u32,
    /// Shared by all calls: during an outage retries must not multiply the load (<https://sre.google/sre-book/handling-overload/>).
    budget: Arc<TpsBudget>,
}

impl Again {
    fn new(config: &GatewayConfig) -> Self {
        let budget = TpsBudget::new(Duration::from_secs(10), 1, config.retry_share);
        Self { left: config.retries, tried: 0, budget: Arc::new(budget) }
    }
}

impl Policy<Call, Reply, GatewayError> for Again {
    type Future = Pin<Box<Sleep>>;

    fn retry(&mut self, call: &mut Call, result: &mut Result<Reply, GatewayError>) -> Option<Self::Future> {
        if !matches!(result, Err(e) if e.is_outage()) {
            if result.is_ok() {
                self.budget.deposit();
            }
            return None;
        }
        if self.left == 0 || !self.budget.withdraw() {
            return None;
        }
        self.left -= 1;
        self.tried += 1;
        match call {
            Call::Charge { charge, again } => {
                charge.attempt += 1;
                *again = true;
            }
            Call::Lookup(charge) | Call::Cancel(charge) => charge.attempt += 1,
            Call::Refund(_) => {}
        }
        Some(Box::pin(tokio::time::sleep(PAUSE.delay(self.tried))))
    }

    fn clone_request(&mut self, call: &Call) -> Option<Call> {
        Some(call.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use async_trait::async_trait;
    use consign::Timestamp;
    use consign::breaker::State;
    use uuid::Uuid;

    use super::*;

    /// Behaves as told, and counts.
    #[derive(Default)]
    struct Scripted {
        calls: AtomicU32,
        at_once: AtomicU32,
        most_at_once: AtomicU32,
        fails: AtomicU32,
        hangs: bool,
        takes: Duration,
    }

    #[async_trait]
    impl PaymentGateway for Scripted {
        async fn charge(&self, _: &Charge) -> Result<Answer, GatewayError> {
            self.calls.fetch_add(1, Ordering::SeqCst);
            let now = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_at_once.fetch_max(now, Ordering::SeqCst);
            tokio::time::sleep(self.takes).await;
            if self.hangs {
                std::future::pending::<()>().await;
            }
            self.at_once.fetch_sub(1, Ordering::SeqCst);
            match self.fails.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)) {
                Ok(_) => Err(GatewayError::unavailable("as told")),
                Err(_) => Ok(Answer::Declined("card".into())),
            }
        }
        async fn lookup(&self, _: &Charge) -> Result<Option<Answer>, GatewayError> {
            Ok(None)
        }
        async fn cancel(&self, _: &Charge) -> Result<Answer, GatewayError> {
            Err(GatewayError::Refused("no".into()))
        }
        async fn refund(&self, _: &Refund) -> Result<Refunded, GatewayError> {
            Ok(Refunded::Done)
        }
    }

    fn charge(clock: &Clock) -> Charge {
        Charge {
            payment_id: Uuid::now_v7(),
            order_id: Uuid::now_v7(),
            amount: 1,
            currency: "EUR".into(),
            method: None,
            reference: None,
            not_after: clock.now() + Duration::from_secs(60),
            attempt: 1,
        }
    }

    fn gateway(scripted: Scripted, config: &GatewayConfig) -> (Arc<Scripted>, Gateway, Clock) {
        let clock = Clock::tokio(Timestamp::from_millis(1_767_225_600_000));
        let scripted = Arc::new(scripted);
        (Arc::clone(&scripted), Gateway::new("t", scripted, config, clock.clone()), clock)
    }

    #[tokio::test(start_paused = true)]
    async fn one_lost_answer_is_retried_and_a_decline_is_no_failure() {
        let scripted = Scripted { fails: 1.into(), ..Scripted::default() };
        let (scripted, gateway, clock) = gateway(scripted, &GatewayConfig::default());
        assert_eq!(gateway.charge(charge(&clock)).await.unwrap(), Answer::Declined("card".into()));
        assert_eq!(scripted.calls.load(Ordering::SeqCst), 2);
        for _ in 0..200 {
            gateway.charge(charge(&clock)).await.unwrap();
            gateway.cancel(charge(&clock)).await.unwrap_err();
        }
        assert_eq!(gateway.breaker().state(), State::Closed, "answers, whatever they say, do not open it");
    }

    #[tokio::test(start_paused = true)]
    async fn retries_have_a_budget_and_the_breaker_ends_it() {
        let config = GatewayConfig {
            breaker: BreakerOptions { min_calls: 100, ..BreakerOptions::default() },
            ..GatewayConfig::default()
        };
        let scripted = Scripted { fails: u32::MAX.into(), ..Scripted::default() };
        let (scripted, gateway, clock) = gateway(scripted, &config);
        for _ in 0..80 {
            assert!(gateway.charge(charge(&clock)).await.unwrap_err().is_outage());
        }
        let calls = scripted.calls.load(Ordering::SeqCst);
        assert!((80..=95).contains(&calls), "a few a second may be retried, not every one: {calls}");
        while gateway.breaker().state() == State::Closed {
            gateway.charge(charge(&clock)).await.unwrap_err();
        }
        let before = scripted.calls.load(Ordering::SeqCst);
        assert!(matches!(gateway.charge(charge(&clock)).await, Err(GatewayError::Rejected(_))));
        assert_eq!(scripted.calls.load(Ordering::SeqCst), before);
    }

    #[tokio::test(start_paused = true)]
    async fn what_hangs_is_given_up_and_opens_the_breaker() {
        let config = GatewayConfig { retries: 0, ..GatewayConfig::default() };
        let (_, gateway, clock) = gateway(Scripted { hangs: true, ..Scripted::default() }, &config);
        let calls = (0..20).map(|_| gateway.charge(charge(&clock)));
        let since = tokio::time::Instant::now();
        assert!(futures_util::future::join_all(calls).await.iter().all(Result::is_err));
        assert_eq!(since.elapsed().as_secs(), 5);
        assert_eq!(gateway.breaker().state(), State::Open);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_calls_at_a_time_than_allowed_and_none_too_late() {
        let config = GatewayConfig { concurrency: 3, ..GatewayConfig::default() };
        let scripted = Scripted { takes: Duration::from_secs(1), ..Scripted::default() };
        let (scripted, gateway, clock) = gateway(scripted, &config);
        futures_util::future::join_all((0..10).map(|_| gateway.charge(charge(&clock)))).await;
        assert_eq!(scripted.most_at_once.load(Ordering::SeqCst), 3);
        let late = Charge { not_after: clock.now(), ..charge(&clock) };
        assert!(matches!(gateway.charge(late).await, Err(GatewayError::TooLate)));
        assert_eq!(scripted.calls.load(Ordering::SeqCst), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_tried_in_time_and_is_too_late_to_try_again_stays_unknown() {
        let scripted = Scripted { fails: 1.into(), ..Scripted::default() };
        let (scripted, gateway, clock) = gateway(scripted, &GatewayConfig::default());
        // Over before the pause between attempts is.
        let late = Charge { not_after: clock.now() + Duration::from_millis(20), ..charge(&clock) };
        let error = gateway.charge(late).await.unwrap_err();
        assert_eq!(scripted.calls.load(Ordering::SeqCst), 1);
        assert!(error.is_outage(), "the first attempt may have charged: {error}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_called_closes_no_breaker() {
        let (_, gateway, clock) =
            gateway(Scripted { fails: u32::MAX.into(), ..Scripted::default() }, &GatewayConfig::default());
        while gateway.breaker().state() == State::Closed {
            gateway.charge(charge(&clock)).await.unwrap_err();
        }
        gateway.breaker().ready().await;
        for _ in 0..10 {
            let late = Charge { not_after: clock.now(), ..charge(&clock) };
            assert!(matches!(gateway.charge(late).await, Err(GatewayError::TooLate)));
        }
        assert_ne!(gateway.breaker().state(), State::Closed);
    }
}
