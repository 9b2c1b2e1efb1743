//! What does not come to an end is not dropped silently: it is counted, logged once, and listed until it does.

use std::time::Duration;

use consign::{Db, DbError};

use crate::store;

/// Looks for payments and refunds that have been under way for longer than `after`, and tells of those that are new among them.
pub async fn escalate(db: Db, after: Duration) -> Result<(), DbError> {
    let before = db.clock().now() - after;
    let stuck = store::count_stuck(&db, before).await?;
    #[expect(clippy::cast_precision_loss, reason = "gauges are floating point")]
    metrics::gauge!("payment_stuck").set(stuck as f64);
    if stuck == 0 {
        return Ok(());
    }
    let mut tx = db.begin().await?;
    let (charges, refunds) = store::escalate(&mut tx, before).await?;
    tx.commit().await?;
    for (what, orders) in [("charge", charges), ("refund", refunds)] {
        metrics::counter!("payment_escalated_total", "what" => what).increment(orders.len() as u64);
        for order_id in orders {
            tracing::error!(%order_id, what, limit = ?after, "a payment does not come to an end; see `consign payments stuck`");
        }
    }
    Ok(())
}
