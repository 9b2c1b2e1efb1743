//! Stripe's HTTP: forms out, JSON back, errors told apart (<https://docs.stripe.com/api/errors>).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use consign::handler::BoxError;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, Uri, header};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use thiserror::Error;

use super::{API_VERSION, StripeConfig, StripeError};
use crate::gateway::GatewayError;

/// Larger answers are not read.
const LARGEST: usize = 1024 * 1024;

/// Stripe did not do what was asked.
#[derive(Debug, Error)]
pub(super) enum ApiError {
    /// The card, or whatever it is, was declined.
    #[error("declined: {0}")]
    Card(String),
    /// The request is wrong, or does not fit the state of what it is about.
    #[error("{0}")]
    Invalid(String),
    /// No answer, or one that says nothing about the request.
    #[error("{0}")]
    Outage(BoxError),
}

impl From<ApiError> for GatewayError {
    fn from(e: ApiError) -> Self {
        match e {
            ApiError::Card(why) | ApiError::Invalid(why) => Self::Refused(why),
            ApiError::Outage(why) => Self::Unavailable(why),
        }
    }
}

/// The API of one account.
pub(super) struct Api {
    base: String,
    key: SecretString,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Api {
    pub(super) fn new(config: &StripeConfig) -> Result<Self, StripeError> {
        let base = endpoint(&config.base_url).map_err(StripeError::Config)?;
        let key = config.api_key.clone().ok_or_else(|| StripeError::Config("api_key must be set".into()))?;
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(Duration::from_secs(3)));
        // Plain HTTP is for loopback only; `endpoint` has seen to that.
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls(config)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(30))
            .pool_timer(TokioTimer::new())
            .build(connector);
        Ok(Self { base, key, client })
    }

    pub(super) async fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, ApiError> {
        let path = if query.is_empty() { path.to_owned() } else { format!("{path}?{}", encode(query)) };
        self.send(Method::GET, &path, String::new(), None).await
    }

    pub(super) async fn post(&self, path: &str, form: &[(&str, &str)], key: &str) -> Result<Value, ApiError> {
        self.send(Method::POST, path, encode(form), Some(key)).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: String,
        key: Option<&str>,
    ) -> Result<Value, ApiError> {
        let outage = |e: BoxError| ApiError::Outage(e);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(header::AUTHORIZATION, format!("Bearer {}", self.key.expose_secret()))
            .header("Stripe-Version", API_VERSION);
        if let Some(key) = key {
            request = request
                .header("Idempotency-Key", key)
                .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        }
        let request = request.body(Full::from(body)).map_err(|e| ApiError::Invalid(e.to_string()))?;
        let response = self.client.request(request).await.map_err(|e| outage(e.into()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LARGEST).collect().await.map_err(outage)?.to_bytes();
        let answer: Result<Value, _> = serde_json::from_slice(&body);
        match answer {
            Ok(value) if status.is_success() => Ok(value),
            Ok(value) => Err(classify(status, &value["error"])),
            Err(_) => Err(outage(format!("{status}, and no JSON").into())),
        }
    }
}

/// What an error means for who made the request.
fn classify(status: StatusCode, error: &Value) -> ApiError {
    let text = |name: &str| error[name].as_str();
    let code = text("decline_code").or(text("code")).unwrap_or("card_declined");
    let said = format!("{status}: {}", text("message").or(text("code")).unwrap_or("no message"));
    match status {
        // What a card error is depends on the type; 402 is its status, and some that speak like Stripe say only that.
        _ if text("type") == Some("card_error") => ApiError::Card(code.to_owned()),
        StatusCode::PAYMENT_REQUIRED => ApiError::Card(code.to_owned()),
        // Our key is wrong or may not do this: no order's fault, and it may be mended.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            ApiError::Outage(format!("{said}; is payment.gateway.stripe.api_key right?").into())
        }
        // The same key is at work elsewhere, or the object is locked; or too many requests.
        StatusCode::CONFLICT | StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => {
            ApiError::Outage(said.into())
        }
        status if status.is_server_error() => ApiError::Outage(said.into()),
        _ => ApiError::Invalid(said),
    }
}

fn encode(pairs: &[(&str, &str)]) -> String {
    form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish()
}

/// The base URL, if it can be one.
pub(super) fn endpoint(base: &str) -> Result<String, String> {
    let uri: Uri = base.parse().map_err(|e| format!("no URL: {e}"))?;
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let loopback = host == "localhost" || host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
    match uri.scheme_str() {
        Some("https") if !host.is_empty() => {}
        Some("http") if loopback => {}
        Some("http") => return Err("plain HTTP is for loopback only; use https://".into()),
        _ => return Err("must be https://host".into()),
    }
    if uri.path_and_query().is_some_and(|p| p.as_str() != "/") {
        return Err("must not have a path".into());
    }
    Ok(base.trim_end_matches('/').to_owned())
}

fn tls(config: &StripeConfig) -> Result<rustls::ClientConfig, StripeError> {
    let mut roots = RootCertStore::empty();
    let authorities = |e: &dyn std::fmt::Display| StripeError::Authorities(e.to_string());
    if let Some(file) = &config.ca_file {
        for certificate in CertificateDer::pem_file_iter(file).map_err(|e| authorities(&e))? {
            roots.add(certificate.map_err(|e| authorities(&e))?).map_err(|e| authorities(&e))?;
        }
        if roots.is_empty() {
            return Err(StripeError::Authorities(format!("{} holds no certificate", file.display())));
        }
    } else {
        // Where the system has none, every connection fails, and says so.
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| authorities(&e))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn errors_are_told_apart() {
        let kind = |status: u16, error: Value| match classify(StatusCode::from_u16(status).unwrap(), &error) {
            ApiError::Card(_) => "declined",
            ApiError::Invalid(_) => "refused",
            ApiError::Outage(_) => "retried",
        };
        for (status, error, expected) in [
            (402, json!({"type": "card_error", "decline_code": "insufficient_funds"}), "declined"),
            (402, json!({"type": "invalid_request_error", "code": "card_declined"}), "declined"),
            (400, json!({"type": "invalid_request_error"}), "refused"),
            (400, json!({"type": "idempotency_error"}), "refused"),
            (404, json!({"code": "resource_missing"}), "refused"),
            (401, json!({}), "retried"),
            (409, json!({"code": "lock_timeout"}), "retried"),
            (429, json!({"code": "rate_limit"}), "retried"),
            (500, json!({"type": "api_error"}), "retried"),
            (503, Value::Null, "retried"),
        ] {
            assert_eq!(kind(status, error.clone()), expected, "{status} {error}");
        }
    }

    #[test]
    fn plain_http_is_for_loopback_only() {
        assert_eq!(endpoint("https://api.stripe.com/").unwrap(), "https://api.stripe.com");
        assert!(endpoint("http://127.0.0.1:8420").is_ok() && endpoint("http://[::1]:1").is_ok());
        for bad in ["http://api.stripe.com", "api.stripe.com", "ftp://a", "https://a/v1", ""] {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_unencrypted_key_is_never_shown() {
        let config = StripeConfig { api_key: Some("sk_test_x".to_owned().into()), ..StripeConfig::default() };
        assert!(!format!("{config:?}").contains("sk_test_x"));
        assert!(!serde_json::to_string(&config).unwrap().contains("sk_test_x"));
    }
}
