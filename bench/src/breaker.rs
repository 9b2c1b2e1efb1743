//! What a circuit breaker costs a call while it is closed, beside the bare call.

use std::convert::Infallible;
use std::hint::black_box;
use std::time::Instant;

use consign::breaker::{Breaker, BreakerOptions, Rejected};
use consign::layer::CircuitBreaker;
use tower::{Service, ServiceBuilder, service_fn};

use crate::{Figure, percentile};

const CALLS: u32 = 1_000_000;
const ROUNDS: usize = 9;

#[derive(Debug)]
struct Error;

impl From<Rejected> for Error {
    fn from(_: Rejected) -> Self {
        Self
    }
}

impl From<Infallible> for Error {
    fn from(e: Infallible) -> Self {
        match e {}
    }
}

/// Nanoseconds a call.
async fn time<S: Service<u64, Response = u64, Error = Error>>(service: &mut S) -> f64 {
    let started = Instant::now();
    for n in 0..u64::from(CALLS) {
        let answer = service.call(black_box(n)).await;
        black_box(answer.is_ok());
    }
    started.elapsed().as_nanos() as f64 / f64::from(CALLS)
}

pub async fn run() -> Vec<Figure> {
    let bare = || service_fn(async |n: u64| Ok::<_, Error>(n + 1));
    let breaker = Breaker::new("bench", BreakerOptions::default());
    let mut guarded = ServiceBuilder::new().layer(CircuitBreaker::new(breaker)).service(bare());
    let mut bare = bare();
    let mut costs = Vec::new();
    // In turns, so that both have the same of whatever else the machine does.
    for _ in 0..ROUNDS {
        let without = time(&mut bare).await;
        costs.push(time(&mut guarded).await - without);
    }
    costs.sort_by(f64::total_cmp);
    vec![Figure {
        what: "circuit breaker, closed, on top of the bare call",
        reached: percentile(&costs, 0.5),
        unit: "ns",
        floor: None,
        goal: 200.0,
    }]
}
