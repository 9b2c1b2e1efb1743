//! A handler that hangs is given up, so that it does not hold the service's transaction for ever.

use std::task::{Context, Poll};
use std::time::Duration;

use tower::{Layer, Service};

use super::BoxFuture;
use crate::handler::{Call, Failure};

/// Fails a call, to be retried, after this long.
#[derive(Clone, Copy, Debug)]
pub struct Timeout(pub Duration);

/// See [`Timeout`].
#[derive(Clone, Debug)]
pub struct TimeoutService<S> {
    inner: S,
    limit: Duration,
}

impl<S> Layer<S> for Timeout {
    type Service = TimeoutService<S>;
    fn layer(&self, inner: S) -> Self::Service {
        TimeoutService { inner, limit: self.0 }
    }
}

impl<S> Service<Call> for TimeoutService<S>
where
    S: Service<Call, Response = (), Error = Failure>,
    S::Future: Send + 'static,
{
    type Response = ();
    type Error = Failure;
    type Future = BoxFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, call: Call) -> BoxFuture {
        let (future, limit) = (self.inner.call(call), self.limit);
        Box::pin(async move {
            tokio::time::timeout(limit, future).await.unwrap_or_else(|_| {
                Err(Failure::retry(format!("the handler did not finish within {limit:?}")))
            })
        })
    }
}
