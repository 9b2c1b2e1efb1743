//! Tower layers around handlers, one per file. A consumer applies them from the inside out: panics are caught first, then time is
//! limited, then the outcome is measured; layers added with `Consumer::layer` come outside of these.

mod catch_panic;
mod measure;
mod timeout;

pub use catch_panic::CatchPanic;
pub use measure::Measure;
pub use timeout::Timeout;

use std::future::Future;
use std::pin::Pin;

use crate::handler::Failure;

type BoxFuture = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;
