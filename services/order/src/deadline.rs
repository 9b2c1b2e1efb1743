//! An order's deadline, owned by this service alone: unpaid past it, the order is cancelled.

use async_trait::async_trait;
use consign::tasks::{Leased, Task, TaskHandler};
use consign::{DbError, Failure, Tx};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::Input;
use crate::saga::{self, Step};

/// Falls due when an order may be unpaid no longer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Deadline {
    /// The order.
    pub order_id: Uuid,
}

impl Task for Deadline {
    const KIND: &'static str = "order-deadline";
}

/// Cancels what is still open.
pub struct Expire;

#[async_trait]
impl TaskHandler for Expire {
    type Task = Deadline;
    type Context = ();
    type Output = ();

    async fn prepare(&self, _: &mut Tx, tasks: &[Leased<Deadline>]) -> Result<Vec<()>, DbError> {
        Ok(vec![(); tasks.len()])
    }

    async fn run(&self, _: &Leased<Deadline>, (): &()) -> Result<(), Failure> {
        Ok(())
    }

    async fn finish(&self, tx: &mut Tx, due: &[(Leased<Deadline>, ())]) -> Result<(), DbError> {
        let steps: Vec<Step> = due
            .iter()
            .map(|(task, ())| Step {
                order_id: task.payload.order_id,
                input: Input::Expired,
                event: "order.deadline".into(),
                detail: None,
                event_id: None,
                cause: task.cause.clone(),
            })
            .collect();
        saga::advance(tx, &steps).await.map_err(|e| DbError::Sql(sqlx::Error::Protocol(e.to_string())))?;
        Ok(())
    }
}
