//! Payment's HTTP: payments to read, the gateway's webhooks, and the simulated gateway's knobs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use aide::axum::ApiRouter;
use aide::axum::routing::{get_with, put_with};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRef, State};
use axum::http::HeaderMap;
use axum::routing::post;
use consign::http::{Admin, Body, Params, Problem};
use consign::schema::Fault;
use consign::{Db, Timestamp, tasks};
use schemars::JsonSchema;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::callbacks;
use crate::calls::{ChargeTask, RefundTask};
use crate::gateway::stripe::webhook;
use crate::gateway::{GatewayConfig, Kind, Knobs, SimulatedGateway};
use crate::store;

#[derive(Clone, FromRef)]
pub struct AppState {
    pub db: Db,
    pub simulated: Simulated,
    pub webhooks: Webhooks,
    pub stuck_after: StuckAfter,
}

/// The simulated gateway, if that is the one.
#[derive(Clone)]
pub struct Simulated(pub Option<SimulatedGateway>);

/// What takes longer is stuck.
#[derive(Clone, Copy)]
pub struct StuckAfter(pub Duration);

/// How Stripe's webhooks are known to be Stripe's.
#[derive(Clone)]
pub struct Webhooks {
    secret: Option<Arc<SecretString>>,
    tolerance: Duration,
}

impl Webhooks {
    pub fn new(config: &GatewayConfig) -> Self {
        let secret = config.stripe.webhook_secret.clone().filter(|_| config.kind == Kind::Stripe);
        Self { secret: secret.map(Arc::new), tolerance: config.stripe.webhook_tolerance }
    }
}

/// Larger webhooks are refused. Stripe's are of some kilobytes; bytes.
const WEBHOOK_LIMIT: usize = 512 * 1024;

pub fn router(state: AppState) -> ApiRouter {
    ApiRouter::new()
        .api_route("/payments", get_with(list, |o| o.summary("Payments, or an order's").tag("payments")))
        .api_route(
            "/payments/stuck",
            get_with(stuck, |o| {
                o.summary("Charges and refunds that do not come to an end, the oldest first").tag("payments")
            }),
        )
        .route("/webhooks/stripe", post(stripe).layer(DefaultBodyLimit::max(WEBHOOK_LIMIT)))
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
    /// Of it, in minor units, what was given back.
    refunded: i64,
    /// Of it, in minor units, what is being given back.
    refunding: i64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    refunds: Vec<Refund>,
    /// The gateway's own id.
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    correlation_id: String,
    /// Not charged after this.
    expires_at: Timestamp,
    created_at: Timestamp,
    updated_at: Timestamp,
}

#[derive(Serialize, JsonSchema)]
struct Refund {
    id: Uuid,
    /// In minor units.
    amount: i64,
    /// `pending`, `done` or `rejected`.
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    created_at: Timestamp,
    updated_at: Timestamp,
}

impl Payment {
    fn new(p: store::Payment, refunds: Vec<Refund>) -> Self {
        Self {
            id: p.payment_id,
            order_id: p.order_id,
            status: p.state.status.as_str(),
            amount: p.state.amount,
            currency: p.currency,
            refunded: p.state.refunded,
            refunding: p.state.refunding,
            refunds,
            reference: p.reference,
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

/// Payments with their refunds.
async fn shown(db: &Db, payments: Vec<store::Payment>) -> Result<Vec<Payment>, Problem> {
    let orders: Vec<Uuid> =
        payments.iter().filter(|p| p.state.refundable() < p.state.amount).map(|p| p.order_id).collect();
    let mut refunds: HashMap<Uuid, Vec<Refund>> = HashMap::new();
    let found = if orders.is_empty() { Vec::new() } else { store::refunds_of(db, &orders).await? };
    for r in found {
        refunds.entry(r.order_id).or_default().push(Refund {
            id: r.refund_id,
            amount: r.amount,
            status: r.status,
            reason: r.reason,
            created_at: r.created_at,
            updated_at: r.updated_at,
        });
    }
    let shown = |p: store::Payment| {
        let refunds = refunds.remove(&p.order_id).unwrap_or_default();
        Payment::new(p, refunds)
    };
    Ok(payments.into_iter().map(shown).collect())
}

async fn list(State(db): State<Db>, Params(p): Params<ListParams>) -> Result<Json<Payments>, Problem> {
    if let Some(order) = p.order_id {
        let payments = shown(&db, store::find(&db, order).await?.into_iter().collect()).await?;
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
    Ok(Json(Payments { payments: shown(&db, found).await?, next_cursor }))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct StuckParams {
    /// Under way for so many seconds; `payment.stuck_after` if left out.
    after_seconds: Option<u64>,
    /// 1 to 500; 100 if left out.
    limit: Option<u32>,
}

#[derive(Serialize, JsonSchema)]
struct StuckPayments {
    stuck: Vec<StuckPayment>,
}

#[derive(Serialize, JsonSchema)]
struct StuckPayment {
    /// `charge` or `refund`.
    what: String,
    order_id: Uuid,
    payment_id: Uuid,
    #[serde(skip_serializing_if = "Option::is_none")]
    refund_id: Option<Uuid>,
    /// In minor units.
    amount: i64,
    /// ISO 4217.
    currency: String,
    since: Timestamp,
    /// When somebody was told.
    #[serde(skip_serializing_if = "Option::is_none")]
    escalated_at: Option<Timestamp>,
    /// How often the gateway was asked; none if its call is a dead letter.
    #[serde(skip_serializing_if = "Option::is_none")]
    attempts: Option<u32>,
    /// When it is asked next.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_attempt_at: Option<Timestamp>,
    /// What came of it last.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error: Option<String>,
}

async fn stuck(
    State(db): State<Db>,
    State(StuckAfter(after)): State<StuckAfter>,
    Params(p): Params<StuckParams>,
) -> Result<Json<StuckPayments>, Problem> {
    let limit = p.limit.unwrap_or(100);
    if !(1..=500).contains(&limit) {
        return Err(Problem::bad_request("limit: 1 to 500"));
    }
    let after = p.after_seconds.map_or(after, |s| Duration::from_secs(s.min(u64::from(u32::MAX))));
    let found = store::stuck(&db, db.clock().now() - after, limit).await?;
    let keys = |what: &str| -> Vec<String> {
        let of = found.iter().filter(|s| s.what == what);
        of.map(|s| s.refund_id.unwrap_or(s.order_id).to_string()).collect()
    };
    let charges = tasks::progress::<ChargeTask>(&db, &keys("charge")).await?;
    let refunds = tasks::progress::<RefundTask>(&db, &keys("refund")).await?;
    let stuck = found.into_iter().map(|s| {
        let key = s.refund_id.unwrap_or(s.order_id).to_string();
        let progress = charges.get(&key).or(refunds.get(&key));
        StuckPayment {
            what: s.what,
            order_id: s.order_id,
            payment_id: s.payment_id,
            refund_id: s.refund_id,
            amount: s.amount,
            currency: s.currency,
            since: s.since,
            escalated_at: s.escalated_at,
            attempts: progress.map(|p| p.attempts),
            next_attempt_at: progress.map(|p| p.due_at),
            last_error: progress.and_then(|p| p.last_error.clone()),
        }
    });
    Ok(Json(StuckPayments { stuck: stuck.collect() }))
}

/// Stripe's webhooks. Whoever can sign may call; what is answered with 2xx does not come again.
async fn stripe(
    State(db): State<Db>,
    State(webhooks): State<Webhooks>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<&'static str, Problem> {
    let Some(secret) = &webhooks.secret else {
        return Err(Problem::not_found(
            "no webhooks are taken here; set payment.gateway.kind = \"stripe\" and payment.gateway.stripe.webhook_secret",
        ));
    };
    let signature = headers.get("stripe-signature").and_then(|v| v.to_str().ok());
    let webhook = webhook::verify(signature, &body, secret, webhooks.tolerance, db.clock().now())
        .map_err(|e| Problem::bad_request(e.to_string()))?;
    match webhook.kind.as_str() {
        // Nothing here can put these right.
        "refund.failed" | "charge.dispute.created" => {
            tracing::error!(
                event = webhook.id,
                kind = webhook.kind,
                intent = webhook.intent,
                "Stripe wants a person to look"
            );
        }
        _ => tracing::debug!(event = webhook.id, kind = webhook.kind, "a webhook"),
    }
    let fresh = callbacks::take(&db, &webhook.id, &webhook.kind, webhook.intent.as_deref()).await?;
    Ok(if fresh { "taken\n" } else { "known\n" })
}

fn simulated(gateway: Simulated) -> Result<SimulatedGateway, Problem> {
    gateway.0.ok_or_else(|| Problem::not_found("the gateway is not the simulated one, so it cannot be set"))
}

async fn knobs(State(gateway): State<Simulated>) -> Result<Json<Knobs>, Problem> {
    Ok(Json(simulated(gateway)?.knobs()))
}

async fn set_knobs(
    _: Admin,
    State(gateway): State<Simulated>,
    Body(knobs): Body<Knobs>,
) -> Result<Json<Knobs>, Problem> {
    let gateway = simulated(gateway)?;
    let faults = knobs.faults();
    if !faults.is_empty() {
        let faults = faults.into_iter().map(|detail| Fault { pointer: String::new(), detail }).collect();
        return Err(Problem::unprocessable("these knobs cannot be set", faults));
    }
    gateway.set(knobs);
    tracing::info!(?knobs, "the simulated gateway was changed");
    Ok(Json(knobs))
}
