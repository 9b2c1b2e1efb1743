//! Handler seconds, by consumer and outcome.

use std::task::{Context, Poll};

use tokio::time::Instant;
use tower::{Layer, Service};

use super::BoxFuture;
use crate::handler::{Call, Failure};

/// Records `consign_handler_seconds`.
#[derive(Clone, Copy, Debug)]
pub struct Measure;

/// See [`Measure`].
#[derive(Clone, Debug)]
pub struct MeasureService<S>(S);

impl<S> Layer<S> for Measure {
    type Service = MeasureService<S>;
    fn layer(&self, inner: S) -> Self::Service {
        MeasureService(inner)
    }
}

impl<S> Service<Call> for MeasureService<S>
where
    S: Service<Call, Response = (), Error = Failure>,
    S::Future: Send + 'static,
{
    type Response = ();
    type Error = Failure;
    type Future = BoxFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, call: Call) -> BoxFuture {
        let consumer = call.consumer.to_string();
        let start = Instant::now();
        let future = self.0.call(call);
        Box::pin(async move {
            let result = future.await;
            let outcome = if result.is_ok() { "ok" } else { "failed" };
            metrics::histogram!("consign_handler_seconds", "consumer" => consumer, "outcome" => outcome)
                .record(start.elapsed().as_secs_f64());
            result
        })
    }
}
