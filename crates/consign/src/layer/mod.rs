//! Tower layers, one per file. Around handlers a consumer applies them from the inside out: panics are caught first, then time is
//! limited, then the outcome is measured; layers added with `Consumer::layer` come outside of these. [`CircuitBreaker`] fits around any
//! outgoing call.

mod catch_panic;
mod circuit_breaker;
mod measure;
mod timeout;

pub use catch_panic::CatchPanic;
pub use circuit_breaker::{CircuitBreaker, CircuitBreakerService, EveryError, IsFault};
pub use measure::Measure;
pub use timeout::Timeout;

use std::future::Future;
use std::pin::Pin;

use crate::handler::Failure;

type BoxFuture = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;
