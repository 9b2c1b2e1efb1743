//! HTTP manners every service shares: problem+json, validated bodies, correlation ids, limits, an admin token.

mod admin;
mod body;
mod correlation;
mod edge;
pub mod idempotency;
mod ops;
mod problem;

pub use admin::{Admin, AdminToken};
pub use body::{Body, Id, Params};
pub use correlation::Correlation;
pub use idempotency::IdempotencyKey;
pub use problem::Problem;

pub(crate) use edge::{Edge, guard, method_not_allowed, not_found};
pub(crate) use ops::router as ops_router;

use std::net::SocketAddr;
use std::time::Duration;

use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use crate::config::redacted;

/// Where a service listens, and what it bears.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
    /// A request that takes longer is answered 503.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
    /// Larger bodies are answered 413. Bytes.
    pub body_limit: usize,
    /// So many requests at a time; more are answered 429.
    pub max_concurrent: usize,
    /// How long the answers to idempotency keys are remembered.
    #[serde(with = "humantime_serde")]
    pub idempotency_retention: Duration,
    /// Needed for whatever changes stock, prices, money or dead letters by hand. Required to listen beyond loopback.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "redacted")]
    pub admin_token: Option<SecretString>,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            request_timeout: Duration::from_secs(10),
            body_limit: 64 * 1024,
            max_concurrent: 1024,
            idempotency_retention: Duration::from_secs(7 * 24 * 3600),
            admin_token: None,
        }
    }
}
