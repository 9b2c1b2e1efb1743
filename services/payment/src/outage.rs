//! Tells the others that the gateway is out of reach: the order service may then give orders more time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use consign::breaker::{Breaker, State};
use consign::{Db, DbError, Emission, Timestamp};
use contracts::GatewayUnavailable;

/// Looked at so often.
pub const LOOK: Duration = Duration::from_secs(2);
/// Said again so often while it lasts, and only then, for each replica says it.
const REPEAT: Duration = Duration::from_secs(20);
/// Holds for so long, unless it is said again.
const HOLDS: Duration = Duration::from_secs(60);

/// What one replica last said.
#[derive(Clone, Debug, Default)]
pub struct Announcer {
    last: Arc<Mutex<Option<Timestamp>>>,
}

impl Announcer {
    /// Says so, if calls do not go through and that was not said just now.
    pub async fn announce(self, db: Db, breaker: Breaker) -> Result<(), DbError> {
        if breaker.state() == State::Closed {
            return Ok(());
        }
        let now = db.clock().now();
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|at| now.since(at) < REPEAT) {
            return Ok(());
        }
        let mut tx = db.begin().await?;
        let event = GatewayUnavailable { gateway: breaker.name().to_owned(), until: now + HOLDS };
        let version = now.as_millis().unsigned_abs();
        tx.emit(Emission::new(event, breaker.name().to_owned(), version))
            .map_err(|e| DbError::Sql(sqlx::Error::Encode(Box::new(e))))?;
        tx.commit().await?;
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        Ok(())
    }
}
