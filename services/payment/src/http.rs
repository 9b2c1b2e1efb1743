//! Payment's HTTP: payments to read, and the simulated gateway's knobs.

use aide::axum::ApiRouter;
use aide::axum::routing::{get_with, put_with};
use axum::Json;
use axum::extract::{FromRef, State};
use consign::http::{Admin, Body, Params, Problem};
use consign::schema::Fault;
use consign::{Db, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::gateway::{Knobs, SimulatedGateway};
use crate::store;

#[derive(Clone, FromRef)]
pub struct AppState {
    pub db: Db,
    pub gateway: SimulatedGateway,
}

pub fn router(state: AppState) -> ApiRouter {
    ApiRouter::new()
        .api_route("/payments", get_with(list, |o| o.summary("Payments, or an order's").tag("payments")))
        .api_route(
            "/gateway",
            get_with(knobs, |o| o.summary("How the simulated gateway behaves").tag("gateway")).merge(
                put_with(set_knobs, |o| o.summary("Change how the simulated gateway behaves").tag("gateway")),
            ),
        )
        .with_state(state)
}

#[derive(Serialize, JsonSchema)]
struct Payment {
    id: Uuid,
    order_id: Uuid,
    /// `pending`, `succeeded`, `failed`, `refunding`, `refunded`, or `forbidden`.
    status: &'static str,
    /// In minor units.
    amount: i64,
    /// ISO 4217.
    currency: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    correlation_id: String,
    /// Not charged after this.
    expires_at: Timestamp,
    created_at: Timestamp,
    updated_at: Timestamp,
}

impl From<store::Payment> for Payment {
    fn from(p: store::Payment) -> Self {
        Self {
            id: p.payment_id,
            order_id: p.order_id,
            status: p.state.status.as_str(),
            amount: p.amount,
            currency: p.currency,
            reason: p.reason,
            correlation_id: p.correlation_id,
            expires_at: p.expires_at,
            created_at: p.created_at,
            updated_at: p.updated_at,
        }
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ListParams {
    order_id: Option<Uuid>,
    /// 1 to 500; 50 if left out.
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<Uuid>,
}

#[derive(Serialize, JsonSchema)]
struct Payments {
    payments: Vec<Payment>,
    /// Where the next page begins, if there is one.
    next_cursor: Option<Uuid>,
}

async fn list(State(db): State<Db>, Params(p): Params<ListParams>) -> Result<Json<Payments>, Problem> {
    if let Some(order) = p.order_id {
        let payments = store::find(&db, order).await?.into_iter().map(Payment::from).collect();
        return Ok(Json(Payments { payments, next_cursor: None }));
    }
    let limit = p.limit.unwrap_or(50);
    if !(1..=500).contains(&limit) {
        return Err(Problem::bad_request("limit: 1 to 500"));
    }
    let mut found = store::list(&db, p.cursor, limit + 1).await?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next_cursor = found.last().filter(|_| more).map(|p| p.order_id);
    Ok(Json(Payments { payments: found.into_iter().map(Payment::from).collect(), next_cursor }))
}

async fn knobs(State(gateway): State<SimulatedGateway>) -> Json<Knobs> {
    Json(gateway.knobs())
}

async fn set_knobs(
    _: Admin,
    State(gateway): State<SimulatedGateway>,
    Body(knobs): Body<Knobs>,
) -> Result<Json<Knobs>, Problem> {
    let faults = knobs.faults();
    if !faults.is_empty() {
        let faults = faults.into_iter().map(|detail| Fault { pointer: String::new(), detail }).collect();
        return Err(Problem::unprocessable("these knobs cannot be set", faults));
    }
    gateway.set(knobs);
    tracing::info!(?knobs, "the simulated gateway was changed");
    Ok(Json(knobs))
}
