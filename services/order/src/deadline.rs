//! An order's deadline, owned by this service alone: unpaid past it, the order is cancelled, or given more time while the payment gateway is out
//! of reach.

use std::collections::HashMap;
use std::time::Duration;

use async_trait::async_trait;
use consign::event::Cause;
use consign::tasks::{Leased, Task, TaskHandler};
use consign::{DbError, Failure, Timestamp, Tx};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::{Input, Order};
use crate::saga::{self, Step};
use crate::store;

/// Falls due when an order may be unpaid no longer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Deadline {
    /// The order.
    pub order_id: Uuid,
}

impl Task for Deadline {
    const KIND: &'static str = "order-deadline";
}

/// Falls due when the order's deadline passes.
pub fn schedule(tx: &mut Tx, order: &Order, cause: Cause) -> Result<(), DbError> {
    let task = Deadline { order_id: order.id };
    tx.schedule_for(order.id.to_string(), &task, order.deadline, order.lane, cause)
}

/// What an outage of the payment gateway beyond orders' deadlines means for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnOutage {
    /// They are cancelled, and their stock goes back, as if there were none.
    #[default]
    Expire,
    /// They get their time once more, as long as payment says that the gateway is out of reach, up to `order.extend_limit`.
    Extend,
}

/// Cancels what is still open, or gives it more time.
#[derive(Clone, Copy, Debug)]
pub struct Expire {
    pub on_outage: OnOutage,
    /// What an order gets, at first and each time.
    pub deadline: Duration,
    /// No order stays unpaid for longer.
    pub extend_limit: Duration,
}

impl Expire {
    /// Until when these orders may go on; none if they may not.
    async fn more_time(&self, tx: &mut Tx, due: &[Uuid]) -> Result<HashMap<Uuid, Timestamp>, DbError> {
        if self.on_outage == OnOutage::Expire || !store::is_outage(tx).await? {
            return Ok(HashMap::new());
        }
        let now = tx.now();
        let orders = store::load(tx, due).await?;
        let until = |o: &Order| (now + self.deadline).min(o.created_at + self.extend_limit);
        Ok(orders.values().map(|o| (o.id, until(o))).filter(|(_, until)| *until > now).collect())
    }
}

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
        let orders: Vec<Uuid> = due.iter().map(|(task, ())| task.payload.order_id).collect();
        let more_time = self.more_time(tx, &orders).await?;
        let input = |id: &Uuid| more_time.get(id).map_or(Input::Expired, |until| Input::GivenTime(*until));
        let steps: Vec<Step> = due
            .iter()
            .map(|(task, ())| Step {
                order_id: task.payload.order_id,
                input: input(&task.payload.order_id),
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
