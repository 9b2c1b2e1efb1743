//! A panic in a handler costs that event one failure and nothing else.

use std::panic::AssertUnwindSafe;
use std::task::{Context, Poll};

use futures_util::FutureExt;
use tower::{Layer, Service};

use super::BoxFuture;
use crate::handler::{Call, Failure};
use crate::telemetry;

/// Turns a panic into a failure to be retried.
#[derive(Clone, Copy, Debug)]
pub struct CatchPanic;

/// See [`CatchPanic`].
#[derive(Clone, Debug)]
pub struct CatchPanicService<S>(S);

impl<S> Layer<S> for CatchPanic {
    type Service = CatchPanicService<S>;
    fn layer(&self, inner: S) -> Self::Service {
        CatchPanicService(inner)
    }
}

impl<S> Service<Call> for CatchPanicService<S>
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
        let future = AssertUnwindSafe(self.0.call(call)).catch_unwind();
        Box::pin(async move {
            future.await.unwrap_or_else(|panic| {
                Err(Failure::retry(format!("the handler panicked: {}", telemetry::panic_message(&*panic))))
            })
        })
    }
}
