//! The gateway calls back: whatever it says, the payment's call is made now rather than later, and asks. A callback that comes twice, or about
//! what has ended, changes nothing.

use consign::{Db, DbError};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use crate::calls::{ChargeTask, RefundTask};
use crate::gateway::simulated::Callback;
use crate::store;

/// Takes note of a callback about the payment that the gateway knows by `reference`. `false` if it was known.
pub async fn take(db: &Db, id: &str, kind: &str, reference: Option<&str>) -> Result<bool, DbError> {
    let mut tx = db.begin().await?;
    if !store::record_callback(&mut tx, id, kind, reference).await? {
        tx.rollback().await;
        count("duplicate");
        return Ok(false);
    }
    if let Some(reference) = reference
        && let Some(payment) = store::find_by_reference(&mut tx, reference).await?
    {
        tx.expedite_task::<ChargeTask>(payment.order_id.to_string());
        for refund in store::pending_refunds(&mut tx, payment.order_id).await? {
            tx.expedite_task::<RefundTask>(refund.to_string());
        }
    }
    tx.commit().await?;
    count("taken");
    Ok(true)
}

fn count(outcome: &'static str) {
    metrics::counter!("payment_callbacks_total", "outcome" => outcome).increment(1);
}

/// Takes the simulated gateway's callbacks until it is gone.
pub async fn listen(db: Db, mut callbacks: Receiver<Callback>) {
    loop {
        match callbacks.recv().await {
            Ok(callback) => {
                let taken = take(&db, &callback.id, "charge", Some(&callback.payment_id)).await;
                if let Err(error) = taken {
                    // The task asks by itself in the end.
                    tracing::warn!(error = consign::telemetry::chain(&error), "a callback is lost");
                }
            }
            Err(RecvError::Lagged(lost)) => tracing::warn!(lost, "callbacks came too fast and are lost"),
            Err(RecvError::Closed) => return,
        }
    }
}
