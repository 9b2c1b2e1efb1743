//! What every request passes: correlation, a limit on how many at a time, a time limit, panics caught, counted and logged.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{AdminToken, Correlation, HttpConfig, Problem, correlation};
use crate::telemetry;

#[derive(Clone, Debug)]
pub(crate) struct Edge {
    service: Arc<str>,
    places: Arc<Semaphore>,
    timeout: Duration,
    token: AdminToken,
}

impl Edge {
    pub(crate) fn new(service: &str, config: &HttpConfig) -> Self {
        Self {
            service: service.into(),
            places: Arc::new(Semaphore::new(config.max_concurrent)),
            timeout: config.request_timeout,
            token: AdminToken::new(config.admin_token.clone()),
        }
    }
}

pub(crate) async fn guard(State(edge): State<Edge>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let correlation = Correlation::of(request.headers());
    let id = correlation.0.correlation_id.clone();
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("(none)", MatchedPath::as_str).to_owned();
    request.extensions_mut().insert(correlation);
    request.extensions_mut().insert(edge.token.clone());

    // Whoever looks after us must get through when customers do not.
    let exempt = matches!(route.as_str(), "/livez" | "/readyz" | "/health" | "/metrics");
    let place = edge.places.try_acquire();
    let mut response = match &place {
        Err(_) if !exempt => Problem::too_many("too many requests at a time; slow down", 1).into_response(),
        _ => {
            let answer = AssertUnwindSafe(next.run(request)).catch_unwind();
            match tokio::time::timeout(edge.timeout, answer).await {
                Ok(Ok(response)) => response,
                Ok(Err(panic)) => {
                    let message = telemetry::panic_message(&*panic);
                    tracing::error!(service = &*edge.service, route, correlation_id = %id, message, "a request panicked");
                    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "an error on our side; it has been logged")
                        .into_response()
                }
                Err(_) => Problem::unavailable("the request took too long; whether it took effect is unknown: repeat it with the same Idempotency-Key", 1)
                    .into_response(),
            }
        }
    };
    let status = response.status();
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        response.headers_mut().insert(correlation::HEADER, value);
    }
    let seconds = start.elapsed().as_secs_f64();
    tracing::debug!(service = &*edge.service, %method, route, status = status.as_u16(), seconds, correlation_id = %id, "request");
    let service = edge.service.to_string();
    metrics::histogram!("consign_http_request_seconds", "service" => service.clone(), "route" => route.clone())
        .record(seconds);
    metrics::counter!("consign_http_requests_total", "service" => service, "route" => route,
        "method" => method.to_string(), "status" => status.as_str().to_owned())
    .increment(1);
    response
}

pub(crate) async fn not_found() -> Problem {
    Problem::not_found("there is nothing here; GET /openapi.json says what there is")
}

pub(crate) async fn method_not_allowed() -> Problem {
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "not with this method; the Allow header says which")
}
