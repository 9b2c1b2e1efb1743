//! A circuit breaker around any outgoing call.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tower::{Layer, Service};

use crate::breaker::{Breaker, Rejected};

/// Asks a breaker before each call, and tells it the outcome. Refused calls end in the inner service's error, made from [`Rejected`].
///
/// Place it inside of retries, so that each try is judged and none is made while it is open, and outside of the timeout, so that a call
/// that hangs counts as failed.
#[derive(Clone, Debug)]
pub struct CircuitBreaker<C> {
    breaker: Breaker,
    is_fault: C,
}

impl CircuitBreaker<EveryError> {
    /// Every error is the called one's fault.
    pub fn new(breaker: Breaker) -> Self {
        Self { breaker, is_fault: EveryError }
    }
}

impl<C> CircuitBreaker<C> {
    /// Only errors for which `is_fault` holds are the called one's fault; a declined card is an answer, not a failure.
    pub fn when<F>(self, is_fault: F) -> CircuitBreaker<F> {
        CircuitBreaker { breaker: self.breaker, is_fault }
    }
}

/// Which errors count.
pub trait IsFault<E>: Clone + Send + 'static {
    /// Whether the called one is to blame.
    fn is_fault(&self, error: &E) -> bool;
}

/// All of them.
#[derive(Clone, Copy, Debug)]
pub struct EveryError;

impl<E> IsFault<E> for EveryError {
    fn is_fault(&self, _: &E) -> bool {
        true
    }
}

impl<E, F: Fn(&E) -> bool + Clone + Send + 'static> IsFault<E> for F {
    fn is_fault(&self, error: &E) -> bool {
        self(error)
    }
}

/// See [`CircuitBreaker`].
#[derive(Clone, Debug)]
pub struct CircuitBreakerService<S, C> {
    inner: S,
    breaker: Breaker,
    is_fault: C,
}

impl<S, C: Clone> Layer<S> for CircuitBreaker<C> {
    type Service = CircuitBreakerService<S, C>;
    fn layer(&self, inner: S) -> Self::Service {
        CircuitBreakerService { inner, breaker: self.breaker.clone(), is_fault: self.is_fault.clone() }
    }
}

impl<S, C, Request> Service<Request> for CircuitBreakerService<S, C>
where
    S: Service<Request>,
    S::Response: 'static,
    S::Error: From<Rejected> + 'static,
    S::Future: Send + 'static,
    C: IsFault<S::Error>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let permit = match self.breaker.acquire() {
            Ok(permit) => permit,
            Err(rejected) => return Box::pin(async { Err(rejected.into()) }),
        };
        let (future, is_fault) = (self.inner.call(request), self.is_fault.clone());
        Box::pin(async move {
            let result = future.await;
            match &result {
                Err(error) if is_fault.is_fault(error) => permit.failed(),
                _ => permit.succeeded(),
            }
            result
        })
    }
}
