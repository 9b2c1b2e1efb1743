//! Circuit breaker: stops calling what is failing, and stops what drives the calls.
//!
//! Closed, it counts; when too many of the last calls failed or were slow, it opens. Open, calls are refused at once and whatever
//! drives them pauses (a consumer: [`Consumer::behind`](crate::Consumer::behind); tasks:
//! [`TaskHandler::breaker`](crate::tasks::TaskHandler::breaker)), so that an outage burns no attempt. After a while it is half-open: a few
//! probes are let through. If all of them succeed it closes, and work goes on at once; if one fails it opens again, for longer. The pattern is
//! Michael Nygard's (<https://martinfowler.com/bliki/CircuitBreaker.html>).
//!
//! Each replica has its own: what one has paused, another that still gets answers takes over.
//!
//! ```
//! use consign::breaker::{Breaker, BreakerOptions};
//! use consign::handler::BoxError;
//! use consign::layer::CircuitBreaker;
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), BoxError> {
//! let breaker = Breaker::new("gateway", BreakerOptions::default());
//! let mut call = ServiceBuilder::new()
//!     .layer(CircuitBreaker::new(breaker.clone()))
//!     .service(service_fn(async |amount: u32| Ok::<_, BoxError>(amount)));
//! assert_eq!(call.ready().await?.call(5).await?, 5);
//! breaker.hold_open();
//! assert!(call.ready().await?.call(5).await.is_err());
//! # use tower::Service;
//! # Ok(())
//! # }
//! ```

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics::Counter;
use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::telemetry;

/// When a breaker opens, and how it closes again.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BreakerOptions {
    /// It judges by the last so many calls …
    pub window_calls: usize,
    /// … that ended no longer ago than this.
    #[serde(with = "humantime_serde")]
    pub window: Duration,
    /// Of fewer calls it makes no judgement.
    pub min_calls: usize,
    /// It opens when this share of them failed; above 0, up to 1.
    pub failure_rate: f64,
    /// A call that takes longer is slow.
    #[serde(with = "humantime_serde")]
    pub slow_call: Duration,
    /// It opens when this share of them was slow; above 0, up to 1.
    pub slow_rate: f64,
    /// How long it stays open the first time. A fifth more or less by chance, so that replicas do not probe together.
    #[serde(with = "humantime_serde")]
    pub open_for: Duration,
    /// Twice as long each time the probes fail, but no longer than this.
    #[serde(with = "humantime_serde")]
    pub open_cap: Duration,
    /// So many calls are let through to see whether it works again.
    pub probes: usize,
}

impl Default for BreakerOptions {
    fn default() -> Self {
        Self {
            window_calls: 100,
            window: Duration::from_secs(60),
            min_calls: 20,
            failure_rate: 0.5,
            slow_call: Duration::from_secs(3),
            slow_rate: 0.8,
            open_for: Duration::from_secs(5),
            open_cap: Duration::from_secs(10),
            probes: 3,
        }
    }
}

impl BreakerOptions {
    /// What is wrong with them.
    pub fn faults(&self) -> Vec<String> {
        let rate = |r: f64| r > 0.0 && r <= 1.0;
        let rules = [
            ((1..=10_000).contains(&self.window_calls), "window_calls must be 1 to 10000"),
            (
                (1..=self.window_calls).contains(&self.min_calls),
                "min_calls must be at least 1 and not above window_calls",
            ),
            (!self.window.is_zero(), "window must be above 0"),
            (rate(self.failure_rate), "failure_rate must be above 0 and not above 1"),
            (rate(self.slow_rate), "slow_rate must be above 0 and not above 1"),
            (!self.slow_call.is_zero(), "slow_call must be above 0"),
            (
                self.open_for >= Duration::from_millis(100) && self.open_for <= self.open_cap,
                "open_for must be at least 100ms and not above open_cap",
            ),
            (self.probes >= 1, "probes must be at least 1"),
        ];
        rules.iter().filter(|(ok, _)| !ok).map(|(_, fault)| (*fault).to_owned()).collect()
    }
}

/// Whether calls go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// They do.
    Closed,
    /// They do not.
    Open,
    /// A few do, to see.
    HalfOpen,
}

impl State {
    /// The word in metrics, logs and answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// A breaker as operators see it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// What it guards.
    pub name: String,
    /// Whether calls go through.
    pub state: State,
    /// Opened by an operator: it stays open until one closes it.
    pub held_open: bool,
    /// When it will let probes through, if it is open by itself. Seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probes_in_seconds: Option<f64>,
    /// Calls it judges by.
    pub calls: usize,
    /// Those of them that failed.
    pub failed: usize,
    /// Those of them that were slow.
    pub slow: usize,
    /// How often it has opened since the process started.
    pub opened: u64,
    /// Calls refused since the process started.
    pub rejected: u64,
}

/// The breaker is open: the call was not made.
#[derive(Clone, Debug, Error)]
#[error("the circuit breaker {name:?} is open: the call was not made")]
pub struct Rejected {
    /// Which.
    pub name: Arc<str>,
}

/// A circuit breaker; clones are the same one.
#[derive(Clone)]
pub struct Breaker(Arc<Inner>);

struct Inner {
    name: Arc<str>,
    options: BreakerOptions,
    circuit: Mutex<Circuit>,
    /// Rises whenever calls that could not be made may be possible again, or the other way round.
    changed: watch::Sender<u64>,
    succeeded: Counter,
    failed: Counter,
    refused: Counter,
}

impl fmt::Debug for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Breaker({}, {})", self.0.name, self.state().as_str())
    }
}

impl Breaker {
    /// A closed one. The name stands in metrics, logs and `/health`.
    pub fn new(name: &str, options: BreakerOptions) -> Self {
        telemetry::metrics();
        let calls = |outcome: &'static str| metrics::counter!("consign_breaker_calls_total", "breaker" => name.to_owned(), "outcome" => outcome);
        let inner = Inner {
            name: name.into(),
            options,
            circuit: Mutex::new(Circuit::new()),
            changed: watch::Sender::new(0),
            succeeded: calls("ok"),
            failed: calls("failed"),
            refused: calls("rejected"),
        };
        let breaker = Self(Arc::new(inner));
        breaker.show(State::Closed);
        breaker
    }

    /// What it guards.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// May a call be made? If so, its outcome is to be told to the permit.
    ///
    /// # Errors
    /// It is open, or half-open with all probes under way.
    pub fn acquire(&self) -> Result<Permit, Rejected> {
        let now = Instant::now();
        let (admitted, changed) = {
            let mut circuit = self.circuit();
            let before = circuit.state();
            let admitted = circuit.admit(now, &self.0.options);
            (admitted, (circuit.state() != before).then(|| circuit.state()))
        };
        if let Some(state) = changed {
            self.announce(state, "time to probe");
        }
        let Some(epoch) = admitted else {
            self.0.refused.increment(1);
            return Err(Rejected { name: Arc::clone(&self.0.name) });
        };
        Ok(Permit { breaker: self.clone(), started: now, epoch, told: false })
    }

    /// How many calls may be started now; `usize::MAX` when closed.
    pub fn permits(&self) -> usize {
        self.circuit().permits(Instant::now(), &self.0.options)
    }

    /// Whether calls go through.
    pub fn state(&self) -> State {
        self.circuit().state()
    }

    /// Returns when a call may be made.
    pub async fn ready(&self) {
        let mut changed = self.0.changed.subscribe();
        loop {
            changed.mark_unchanged();
            let until = {
                let circuit = self.circuit();
                if circuit.permits(Instant::now(), &self.0.options) > 0 {
                    return;
                }
                circuit.opens_at()
            };
            let time_to_probe = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = time_to_probe => {}
                // It cannot be closed while `self` lives.
                _ = changed.changed() => {}
            }
        }
    }

    /// Opens it until somebody closes it.
    pub fn hold_open(&self) {
        self.circuit().go(Phase::Open { until: None });
        self.announce(State::Open, "held open by an operator");
    }

    /// Closes it and forgets what it counted; it opens again if calls fail.
    pub fn close(&self) {
        {
            let mut circuit = self.circuit();
            circuit.go(Phase::Closed);
            circuit.failed_rounds = 0;
        }
        self.announce(State::Closed, "closed by an operator");
    }

    /// As operators see it.
    pub fn status(&self) -> Status {
        let circuit = self.circuit();
        let now = Instant::now();
        Status {
            name: self.0.name.to_string(),
            state: circuit.state(),
            held_open: matches!(circuit.phase, Phase::Open { until: None }),
            probes_in_seconds: circuit.opens_at().map(|t| t.saturating_duration_since(now).as_secs_f64()),
            calls: circuit.window.calls.len(),
            failed: circuit.window.failed,
            slow: circuit.window.slow,
            opened: circuit.opened,
            rejected: circuit.rejected,
        }
    }

    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        self.0.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, permit: &Permit, verdict: Verdict) {
        let now = Instant::now();
        let changed = {
            let mut circuit = self.circuit();
            let before = circuit.state();
            circuit.record(permit.epoch, now, now - permit.started, verdict, &self.0.options);
            // Probes give their place back, or decide.
            (before != State::Closed || circuit.state() != before).then(|| (before, circuit.state()))
        };
        match verdict {
            Verdict::Succeeded => self.0.succeeded.increment(1),
            Verdict::Failed => self.0.failed.increment(1),
            Verdict::GivenUp => {}
        }
        match changed {
            Some((before, state)) if before != state => {
                let why = match before {
                    State::Closed => "too many calls failed or were slow",
                    _ if state == State::Closed => "the probes succeeded",
                    _ => "a probe failed or was slow",
                };
                self.announce(state, why);
            }
            Some(_) => self.0.changed.send_modify(|n| *n += 1),
            None => {}
        }
    }

    fn announce(&self, state: State, why: &str) {
        let name = &*self.0.name;
        match state {
            State::Open => {
                let status = self.status();
                tracing::warn!(
                    breaker = name,
                    why,
                    calls = status.calls,
                    failed = status.failed,
                    slow = status.slow,
                    probes_in_seconds = status.probes_in_seconds,
                    "the circuit breaker is open: no calls are made"
                );
            }
            State::HalfOpen => {
                tracing::info!(breaker = name, why, "the circuit breaker is half-open: a few calls are made");
            }
            State::Closed => {
                tracing::info!(breaker = name, why, "the circuit breaker is closed: calls are made");
            }
        }
        metrics::counter!("consign_breaker_transitions_total", "breaker" => name.to_owned(), "to" => state.as_str())
            .increment(1);
        self.show(state);
        self.0.changed.send_modify(|n| *n += 1);
    }

    /// 0 closed, 1 half-open, 2 open.
    fn show(&self, state: State) {
        let value = match state {
            State::Closed => 0.0,
            State::HalfOpen => 1.0,
            State::Open => 2.0,
        };
        metrics::gauge!("consign_breaker_state", "breaker" => self.0.name.to_string()).set(value);
    }
}

/// A call under way. Dropped without an outcome it was given up: that counts as failed if it was slow by then, and not at all otherwise.
#[derive(Debug)]
#[must_use]
pub struct Permit {
    breaker: Breaker,
    started: Instant,
    epoch: u64,
    told: bool,
}

impl Permit {
    /// What was called answered, whatever it said.
    pub fn succeeded(mut self) {
        self.tell(Verdict::Succeeded);
    }

    /// What was called is at fault.
    pub fn failed(mut self) {
        self.tell(Verdict::Failed);
    }

    fn tell(&mut self, verdict: Verdict) {
        self.told = true;
        self.breaker.record(self, verdict);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if !self.told {
            self.tell(Verdict::GivenUp);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Succeeded,
    Failed,
    GivenUp,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Closed,
    /// Without an end it was opened by hand.
    Open {
        until: Option<Instant>,
    },
    HalfOpen {
        admitted: usize,
        succeeded: usize,
    },
}

/// The state machine; time is passed in.
#[derive(Debug)]
struct Circuit {
    phase: Phase,
    window: Window,
    /// Rises with each change of phase: the outcome of a call made before says nothing about the phase after.
    epoch: u64,
    /// Rounds of probes that failed since it was last closed.
    failed_rounds: u32,
    opened: u64,
    rejected: u64,
}

impl Circuit {
    fn new() -> Self {
        Self {
            phase: Phase::Closed,
            window: Window::default(),
            epoch: 0,
            failed_rounds: 0,
            opened: 0,
            rejected: 0,
        }
    }

    fn state(&self) -> State {
        match self.phase {
            Phase::Closed => State::Closed,
            Phase::Open { .. } => State::Open,
            Phase::HalfOpen { .. } => State::HalfOpen,
        }
    }

    fn opens_at(&self) -> Option<Instant> {
        match self.phase {
            Phase::Open { until } => until,
            Phase::Closed | Phase::HalfOpen { .. } => None,
        }
    }

    fn permits(&self, now: Instant, options: &BreakerOptions) -> usize {
        match self.phase {
            Phase::Closed => usize::MAX,
            Phase::Open { until: Some(until) } if until <= now => options.probes,
            Phase::Open { .. } => 0,
            Phase::HalfOpen { admitted, .. } => options.probes - admitted,
        }
    }

    /// The epoch of the call, if it may be made.
    fn admit(&mut self, now: Instant, options: &BreakerOptions) -> Option<u64> {
        if self.permits(now, options) == 0 {
            self.rejected += 1;
            return None;
        }
        if let Phase::Open { .. } = self.phase {
            self.go(Phase::HalfOpen { admitted: 0, succeeded: 0 });
        }
        if let Phase::HalfOpen { admitted, .. } = &mut self.phase {
            *admitted += 1;
        }
        Some(self.epoch)
    }

    fn record(
        &mut self,
        epoch: u64,
        now: Instant,
        took: Duration,
        verdict: Verdict,
        options: &BreakerOptions,
    ) {
        if epoch != self.epoch {
            return;
        }
        let slow = took >= options.slow_call;
        let failed = verdict == Verdict::Failed || (verdict == Verdict::GivenUp && slow);
        match &mut self.phase {
            Phase::Closed => {
                if verdict == Verdict::GivenUp && !slow {
                    return;
                }
                self.window.push(Outcome { at: now, failed, slow }, options);
                if self.window.is_bad(options) {
                    self.open(now, options);
                }
            }
            Phase::HalfOpen { admitted, .. } if verdict == Verdict::GivenUp && !slow => *admitted -= 1,
            Phase::HalfOpen { .. } if failed || slow => {
                self.failed_rounds += 1;
                self.open(now, options);
            }
            Phase::HalfOpen { succeeded, .. } => {
                *succeeded += 1;
                if *succeeded >= options.probes {
                    self.failed_rounds = 0;
                    self.go(Phase::Closed);
                }
            }
            // An open one admits no calls, so none of this epoch can end.
            Phase::Open { .. } => {}
        }
    }

    fn open(&mut self, now: Instant, options: &BreakerOptions) {
        let wait = options
            .open_for
            .saturating_mul(2u32.saturating_pow(self.failed_rounds.min(16)))
            .min(options.open_cap);
        let wait = wait.mul_f64(rand::rng().random_range(0.8..1.2));
        let (failed, slow, calls) =
            (self.window.failed, self.window.slow, std::mem::take(&mut self.window.calls));
        self.go(Phase::Open { until: Some(now + wait) });
        // What it opened for stays to be seen.
        self.window = Window { calls, failed, slow };
    }

    fn go(&mut self, phase: Phase) {
        if matches!(phase, Phase::Open { .. }) && !matches!(self.phase, Phase::Open { .. }) {
            self.opened += 1;
        }
        self.phase = phase;
        self.epoch += 1;
        self.window = Window::default();
    }
}

#[derive(Clone, Copy, Debug)]
struct Outcome {
    at: Instant,
    failed: bool,
    slow: bool,
}

/// The last calls, bounded in number and in age.
#[derive(Debug, Default)]
struct Window {
    calls: VecDeque<Outcome>,
    failed: usize,
    slow: usize,
}

impl Window {
    fn push(&mut self, outcome: Outcome, options: &BreakerOptions) {
        while let Some(oldest) = self.calls.front() {
            if self.calls.len() < options.window_calls && outcome.at - oldest.at <= options.window {
                break;
            }
            self.failed -= usize::from(oldest.failed);
            self.slow -= usize::from(oldest.slow);
            self.calls.pop_front();
        }
        self.failed += usize::from(outcome.failed);
        self.slow += usize::from(outcome.slow);
        self.calls.push_back(outcome);
    }

    #[expect(clippy::cast_precision_loss, reason = "at most ten thousand")]
    fn is_bad(&self, options: &BreakerOptions) -> bool {
        let calls = self.calls.len();
        let share = |n: usize| n as f64 / calls as f64;
        calls >= options.min_calls
            && (share(self.failed) >= options.failure_rate || share(self.slow) >= options.slow_rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn options() -> BreakerOptions {
        BreakerOptions { min_calls: 4, window_calls: 10, probes: 2, ..BreakerOptions::default() }
    }

    fn fail(breaker: &Breaker, times: usize) {
        for _ in 0..times {
            breaker.acquire().expect("closed").failed();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn opens_probes_and_closes() {
        let breaker = Breaker::new("t", options());
        breaker.acquire().unwrap().succeeded();
        fail(&breaker, 2);
        assert_eq!(breaker.state(), State::Closed, "fewer than min_calls");
        fail(&breaker, 1);
        assert_eq!(breaker.state(), State::Open);
        assert!(breaker.acquire().is_err());
        breaker.ready().await;
        assert_eq!(breaker.permits(), 2);
        let (first, second) = (breaker.acquire().unwrap(), breaker.acquire().unwrap());
        assert!(breaker.acquire().is_err(), "no more than the probes");
        first.succeeded();
        assert_eq!(breaker.state(), State::HalfOpen);
        second.succeeded();
        assert_eq!((breaker.state(), breaker.status().rejected), (State::Closed, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn stays_open_longer_each_time_up_to_its_cap() {
        let breaker = Breaker::new("t", options());
        fail(&breaker, 4);
        let mut waits = Vec::new();
        for _ in 0..4 {
            let since = Instant::now();
            breaker.ready().await;
            waits.push(since.elapsed().as_secs_f64());
            breaker.acquire().unwrap().failed();
        }
        for (waited, about) in waits.iter().zip([5.0, 10.0, 10.0, 10.0]) {
            assert!((about * 0.79..about * 1.21).contains(waited), "{waits:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn slow_calls_open_it_too() {
        let breaker = Breaker::new("t", options());
        let slow: Vec<Permit> = (0..4).map(|_| breaker.acquire().unwrap()).collect();
        tokio::time::advance(Duration::from_secs(4)).await;
        slow.into_iter().for_each(Permit::succeeded);
        assert_eq!(breaker.state(), State::Open);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_given_up_counts_only_if_it_was_slow() {
        let breaker = Breaker::new("t", options());
        for _ in 0..10 {
            drop(breaker.acquire().unwrap());
        }
        assert_eq!(breaker.status().calls, 0);
        let hung: Vec<Permit> = (0..4).map(|_| breaker.acquire().unwrap()).collect();
        tokio::time::advance(Duration::from_secs(4)).await;
        drop(hung);
        assert_eq!(breaker.state(), State::Open);
        breaker.ready().await;
        drop(breaker.acquire().unwrap());
        assert_eq!(breaker.permits(), 2, "a probe given up leaves its place");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_long_ago_does_not_count() {
        let breaker = Breaker::new("t", options());
        fail(&breaker, 3);
        tokio::time::advance(Duration::from_secs(61)).await;
        fail(&breaker, 3);
        assert_eq!((breaker.state(), breaker.status().calls), (State::Closed, 3));
    }

    #[tokio::test(start_paused = true)]
    async fn held_open_until_closed_by_hand() {
        let breaker = Breaker::new("t", options());
        breaker.hold_open();
        let waiting = tokio::spawn({
            let breaker = breaker.clone();
            async move { breaker.ready().await }
        });
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(breaker.acquire().is_err() && breaker.status().held_open && !waiting.is_finished());
        breaker.close();
        waiting.await.unwrap();
        assert_eq!(breaker.state(), State::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn late_outcomes_do_not_judge_the_next_phase() {
        let breaker = Breaker::new("t", options());
        let late: Vec<Permit> = (0..8).map(|_| breaker.acquire().unwrap()).collect();
        fail(&breaker, 4);
        breaker.ready().await;
        let probe = breaker.acquire().unwrap();
        late.into_iter().for_each(Permit::failed);
        assert_eq!(breaker.state(), State::HalfOpen, "calls made before it opened are no probes");
        probe.succeeded();
        breaker.acquire().unwrap().succeeded();
        assert_eq!(breaker.state(), State::Closed);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Acquire,
        End(usize, Verdict),
        Pass(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let verdict = prop_oneof![Just(Verdict::Succeeded), Just(Verdict::Failed), Just(Verdict::GivenUp)];
        let step = prop_oneof![
            3 => Just(Step::Acquire),
            3 => (0..8usize, verdict).prop_map(|(i, v)| Step::End(i, v)),
            1 => (1..20_000u64).prop_map(Step::Pass),
        ];
        prop::collection::vec(step, 0..200)
    }

    proptest! {
        /// Whatever happens: counts fit the window, probes are bounded, and after enough time calls are possible again.
        #[test]
        fn counts_and_bounds_hold(steps in steps()) {
            let options = options();
            let mut circuit = Circuit::new();
            let mut now = Instant::now();
            let mut running: Vec<(u64, Instant)> = Vec::new();
            for step in steps {
                match step {
                    Step::Acquire => if let Some(epoch) = circuit.admit(now, &options) { running.push((epoch, now)) },
                    Step::End(i, verdict) if i < running.len() => {
                        let (epoch, since) = running.swap_remove(i);
                        circuit.record(epoch, now, now - since, verdict, &options);
                    }
                    Step::End(..) => {}
                    Step::Pass(millis) => now += Duration::from_millis(millis),
                }
                let w = &circuit.window;
                prop_assert_eq!(w.failed, w.calls.iter().filter(|c| c.failed).count());
                prop_assert_eq!(w.slow, w.calls.iter().filter(|c| c.slow).count());
                prop_assert!(w.calls.len() <= options.window_calls);
                if let Phase::HalfOpen { admitted, succeeded } = circuit.phase {
                    let probes = running.iter().filter(|(e, _)| *e == circuit.epoch).count();
                    prop_assert_eq!(admitted, probes + succeeded);
                    prop_assert!(admitted <= options.probes);
                }
            }
            now += options.open_cap * 2;
            let probing = matches!(circuit.phase, Phase::HalfOpen { .. });
            prop_assert!(probing || circuit.permits(now, &options) > 0);
        }
    }
}
