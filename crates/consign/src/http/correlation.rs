//! `X-Correlation-ID` and `traceparent`: taken if sane, made otherwise, and handed on to every event that follows.

use std::convert::Infallible;

use aide::OperationInput;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName};

use crate::event::{Cause, CorrelationId};

pub(super) const HEADER: HeaderName = HeaderName::from_static("x-correlation-id");

/// What everything that follows from this request is caused by.
#[derive(Clone, Debug)]
pub struct Correlation(pub Cause);

impl Correlation {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let text = |name: &HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
        let correlation_id =
            text(&HEADER).and_then(|t| t.parse().ok()).unwrap_or_else(CorrelationId::generate);
        let traceparent =
            text(&HeaderName::from_static("traceparent")).filter(|t| is_traceparent(t)).map(str::to_owned);
        Self(Cause { correlation_id, causation_id: None, traceparent })
    }
}

/// `00-<32 hex>-<16 hex>-<2 hex>`, as W3C Trace Context version 00 has it.
fn is_traceparent(text: &str) -> bool {
    let lengths = [2, 32, 16, 2];
    let parts: Vec<&str> = text.split('-').collect();
    parts.len() == 4
        && parts.iter().zip(lengths).all(|(p, n)| p.len() == n && p.bytes().all(|b| b.is_ascii_hexdigit()))
}

impl<S: Send + Sync> FromRequestParts<S> for Correlation {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let known = parts.extensions.get::<Self>().cloned();
        Ok(known.unwrap_or_else(|| Self::of(&parts.headers)))
    }
}

impl OperationInput for Correlation {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn insane_ids_are_replaced() {
        let mut headers = HeaderMap::new();
        headers.insert(HEADER, "no spaces please".parse().unwrap());
        assert_ne!(Correlation::of(&headers).0.correlation_id.as_str(), "no spaces please");
        headers.insert(HEADER, "req-7".parse().unwrap());
        assert_eq!(Correlation::of(&headers).0.correlation_id.as_str(), "req-7");
    }

    #[test]
    fn traceparents_are_checked() {
        assert!(is_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
        assert!(!is_traceparent("00-xyz-b7ad6b7169203331-01"));
    }
}
