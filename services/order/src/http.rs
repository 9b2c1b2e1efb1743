//! Order's HTTP.

use std::time::Duration;

use aide::axum::ApiRouter;
use aide::axum::routing::{get_with, post_with};
use axum::Json;
use axum::extract::{FromRef, Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use consign::http::idempotency::{self, fingerprint, key_reused};
use consign::http::{Admin, Body, Correlation, Id, IdempotencyKey, Params, Problem};
use consign::schema::Fault;
use consign::{Db, Emission, EventId, Lane, Timestamp};
use contracts::{Address, OrderRefundRequested, ReturnedLine, WantedLine};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;

use crate::accept::{Acceptor, Answer, Request};
use crate::domain::{Decision, Input, Line, Order, Status, Wanted};
use crate::refunds::{self, Progress, RefundFault};
use crate::saga::{self, Advanced, Step};
use crate::store::{self, Entry};

#[derive(Clone, FromRef)]
pub struct AppState {
    pub db: Db,
    pub acceptor: Acceptor,
    pub limit: Pending,
}

/// With so many events waiting for the broker, no more orders are taken.
#[derive(Clone, Copy)]
pub struct Pending(pub u64);

pub fn router(state: AppState) -> ApiRouter {
    ApiRouter::new()
        .api_route(
            "/orders",
            post_with(place, |o| {
                o.summary("Place an order")
                    .description("Prices are the server's. With an Idempotency-Key a repeated request gets the first answer again.")
                    .tag("orders")
                    .response_with::<202, Json<OrderView>, _>(|r| r.description("Accepted; `Location` says where it is"))
            })
            .merge(get_with(list, |o| o.summary("Orders, the newest first").tag("orders"))),
        )
        .api_route("/orders/{id}", get_with(show, |o| o.summary("One order").tag("orders")))
        .api_route("/orders/{id}/events", get_with(events, |o| o.summary("What happened to it").tag("orders")))
        .api_route(
            "/orders/{id}/cancel",
            post_with(cancel, |o| o.summary("Cancel it, until it is confirmed").tag("orders")),
        )
        .api_route(
            "/orders/{id}/refund",
            post_with(refund, |o| {
                o.summary("Give money back for a confirmed order, all of it or by lines")
                    .description("Needs the admin token and an Idempotency-Key. Payment decides; `GET …/refunds` says how it ended.")
                    .tag("orders")
                    .response_with::<202, Json<RefundView>, _>(|r| r.description("Asked for"))
            }),
        )
        .api_route("/orders/{id}/refunds", get_with(refunds, |o| o.summary("Its refunds, the oldest first").tag("orders")))
        .with_state(state)
}

/// An order as it is shown.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct OrderView {
    id: Uuid,
    customer_id: String,
    /// `pending`, `reserved`, `confirmed` or `cancelled`.
    status: &'static str,
    /// Why it was cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    lane: Lane,
    items: Vec<Line>,
    /// In minor units.
    total: i64,
    /// ISO 4217.
    currency: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    payment_id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shipping_address: Option<Address>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gift_note: Option<String>,
    /// Of the total, in minor units, what was given back.
    refunded: i64,
    /// Of the total, in minor units, what is being given back.
    refunding: i64,
    correlation_id: String,
    created_at: Timestamp,
    updated_at: Timestamp,
    /// Unpaid by then, it is cancelled.
    deadline: Timestamp,
}

impl From<Order> for OrderView {
    fn from(o: Order) -> Self {
        Self {
            id: o.id,
            customer_id: o.customer_id,
            status: o.status.as_str(),
            reason: o.reason,
            lane: o.lane,
            items: o.items,
            total: o.total,
            currency: o.currency,
            payment_id: o.payment_id,
            shipping_address: o.shipping_address,
            gift_note: o.gift_note,
            refunded: o.refunded,
            refunding: o.refunding,
            correlation_id: o.correlation_id,
            created_at: o.created_at,
            updated_at: o.updated_at,
            deadline: o.deadline,
        }
    }
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PlaceOrder {
    /// Whose it is.
    #[schemars(length(min = 1, max = 64))]
    customer_id: String,
    #[schemars(length(min = 1, max = 100))]
    items: Vec<WantedLine>,
    /// `standard` if left out.
    #[serde(default)]
    lane: Lane,
    /// What to charge: the payment gateway's token, as `pm_…` of Stripe. Never a card number. The simulated gateway needs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    payment_method: Option<String>,
    /// Where it is sent to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shipping_address: Option<Address>,
    /// A few words that come along with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 500))]
    gift_note: Option<String>,
}

async fn place(
    State(app): State<AppState>,
    Correlation(cause): Correlation,
    IdempotencyKey(key): IdempotencyKey,
    Body(order): Body<PlaceOrder>,
) -> Result<Response, Problem> {
    let key = match key {
        Some(key) => {
            let body = serde_json::to_value(&order).map_err(|e| Problem::internal(&e))?;
            Some((key, fingerprint(&body)))
        }
        None => None,
    };
    let wanted =
        order.items.into_iter().map(|i| Wanted { product_id: i.product_id, quantity: i.quantity }).collect();
    let request = Request {
        order_id: Uuid::now_v7(),
        customer_id: order.customer_id,
        wanted,
        lane: order.lane,
        payment_method: order.payment_method,
        shipping_address: order.shipping_address,
        gift_note: order.gift_note,
        key,
        cause,
    };
    let faults = request.faults();
    if !faults.is_empty() {
        return Err(Problem::unprocessable("the order cannot be taken", faults));
    }
    if app.db.outbox_depth() >= app.limit.0 {
        return Err(Problem::unavailable("the broker is away and the outbox is full; try again later", 5));
    }
    match app.acceptor.run(request).await? {
        Answer::Accepted { id, body } => {
            let mut response = (StatusCode::ACCEPTED, body).into_response();
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            if let Ok(location) = HeaderValue::from_str(&format!("/orders/{id}")) {
                headers.insert(header::LOCATION, location);
            }
            Ok(response)
        }
        Answer::Refused(faults) => {
            let faults = faults
                .iter()
                .map(|f| Fault { pointer: format!("/items/{}", f.line()), detail: f.to_string() });
            Err(Problem::unprocessable("the order cannot be priced", faults.collect()))
        }
        Answer::KeyReused => Err(key_reused()),
    }
}

fn order_id(id: &str) -> Result<Uuid, Problem> {
    id.parse().map_err(|_| Problem::not_found(format!("{id:?} is no order id; they look like 0190a5e4-….")))
}

fn unknown(id: Uuid) -> Problem {
    Problem::not_found(format!("there is no order {id}"))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ShowParams {
    /// Answer once the order has ended, or after so many seconds: 0 to 5.
    wait: Option<u32>,
}

/// The moment until which a request may wait for orders to end.
fn wait_until(wait: Option<u32>) -> Result<Instant, Problem> {
    match wait.unwrap_or(0) {
        seconds @ 0..=5 => Ok(Instant::now() + Duration::from_secs(seconds.into())),
        _ => Err(Problem::bad_request("wait: 0 to 5 seconds")),
    }
}

/// How often a waiting request looks.
const LOOK: Duration = Duration::from_millis(10);

async fn show(
    State(db): State<Db>,
    Path(Id { id }): Path<Id>,
    Params(p): Params<ShowParams>,
) -> Result<Json<OrderView>, Problem> {
    let id = order_id(&id)?;
    let until = wait_until(p.wait)?;
    loop {
        let Some(order) = store::find(&db, id).await? else { return Err(unknown(id)) };
        if order.status.is_final() || Instant::now() >= until {
            return Ok(Json(order.into()));
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[derive(Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum StatusParam {
    Pending,
    Reserved,
    Confirmed,
    Cancelled,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ListParams {
    status: Option<StatusParam>,
    customer_id: Option<String>,
    /// 1 to 500; 50 if left out.
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<Uuid>,
    /// Answer once all orders of the page have ended, or after so many seconds: 0 to 5.
    wait: Option<u32>,
}

#[derive(Serialize, JsonSchema)]
struct Orders {
    orders: Vec<OrderView>,
    /// Where the next page begins, if there is one.
    next_cursor: Option<Uuid>,
}

async fn list(State(db): State<Db>, Params(p): Params<ListParams>) -> Result<Json<Orders>, Problem> {
    let limit = p.limit.unwrap_or(50);
    if !(1..=500).contains(&limit) {
        return Err(Problem::bad_request("limit: 1 to 500"));
    }
    let status = p.status.map(|s| match s {
        StatusParam::Pending => Status::Pending,
        StatusParam::Reserved => Status::Reserved,
        StatusParam::Confirmed => Status::Confirmed,
        StatusParam::Cancelled => Status::Cancelled,
    });
    let until = wait_until(p.wait)?;
    let mut found = loop {
        let found = store::list(&db, p.customer_id.as_deref(), status, p.cursor, limit + 1).await?;
        if found.iter().all(|o| o.status.is_final()) || Instant::now() >= until {
            break found;
        }
        tokio::time::sleep(LOOK).await;
    };
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next_cursor = found.last().filter(|_| more).map(|o| o.id);
    Ok(Json(Orders { orders: found.into_iter().map(OrderView::from).collect(), next_cursor }))
}

#[derive(Serialize, JsonSchema)]
struct TimelineEntry {
    version: u64,
    event: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_id: Option<EventId>,
    at: Timestamp,
}

#[derive(Serialize, JsonSchema)]
struct Timeline {
    order_id: Uuid,
    correlation_id: String,
    events: Vec<TimelineEntry>,
}

async fn events(State(db): State<Db>, Path(Id { id }): Path<Id>) -> Result<Json<Timeline>, Problem> {
    let id = order_id(&id)?;
    let Some(order) = store::find(&db, id).await? else { return Err(unknown(id)) };
    let events = store::timeline(&db, id).await?;
    let events = events.into_iter().map(|e| TimelineEntry {
        version: e.version,
        event: e.event,
        detail: e.detail,
        event_id: e.event_id,
        at: e.at,
    });
    Ok(Json(Timeline { order_id: id, correlation_id: order.correlation_id, events: events.collect() }))
}

async fn cancel(
    State(db): State<Db>,
    Correlation(cause): Correlation,
    Path(Id { id }): Path<Id>,
) -> Result<Json<OrderView>, Problem> {
    let id = order_id(&id)?;
    let mut tx = db.begin_for(cause.clone()).await?;
    // Everything about an order carries the correlation id it was placed with; the request's own is in the log.
    let Some(order) = store::load(&mut tx, &[id]).await?.remove(&id) else { return Err(unknown(id)) };
    let correlation_id = order.correlation_id.parse().unwrap_or_else(|_| cause.correlation_id.clone());
    let step = Step {
        order_id: id,
        input: Input::CancelRequested,
        event: "order.cancel_requested".into(),
        detail: None,
        event_id: None,
        cause: consign::event::Cause { correlation_id, ..cause },
    };
    let (results, mut orders) = saga::advance(&mut tx, &[step]).await.map_err(|e| Problem::internal(&e))?;
    match results.first() {
        Some(Advanced::Decided(Decision::TooLate)) => {
            Err(Problem::conflict("the order is confirmed; it cannot be cancelled any more"))
        }
        Some(Advanced::Decided(_)) => {
            tx.commit().await?;
            orders.remove(&id).map(|o| Json(o.into())).ok_or_else(|| unknown(id))
        }
        _ => Err(unknown(id)),
    }
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RefundOrder {
    /// Which pieces; if left out, all that are left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 100))]
    lines: Option<Vec<ReturnedLine>>,
    /// Whether they go back to the shelf (`true` if left out), or are written off.
    #[serde(default = "yes")]
    restock: bool,
    /// For the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200))]
    reason: Option<String>,
}

fn yes() -> bool {
    true
}

/// A refund as it is shown.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
struct RefundView {
    id: Uuid,
    order_id: Uuid,
    /// In minor units.
    amount: i64,
    /// `pending`, `done` or `rejected`.
    status: String,
    lines: Vec<ReturnedLine>,
    /// Back to the shelf; otherwise written off.
    restock: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Why payment would not.
    #[serde(skip_serializing_if = "Option::is_none")]
    rejection: Option<String>,
    created_at: Timestamp,
    updated_at: Timestamp,
}

impl From<refunds::Refund> for RefundView {
    fn from(r: refunds::Refund) -> Self {
        Self {
            id: r.id,
            order_id: r.order_id,
            amount: r.amount,
            status: r.progress.as_str().to_owned(),
            lines: r.lines,
            restock: r.restock,
            reason: r.reason,
            rejection: r.rejection,
            created_at: r.created_at,
            updated_at: r.updated_at,
        }
    }
}

const REFUND: &str = "refund order";

async fn refund(
    _: Admin,
    State(db): State<Db>,
    Correlation(cause): Correlation,
    Path(Id { id }): Path<Id>,
    IdempotencyKey(key): IdempotencyKey,
    Body(body): Body<RefundOrder>,
) -> Result<(StatusCode, Json<RefundView>), Problem> {
    let id = order_id(&id)?;
    let key = key.ok_or_else(|| {
        Problem::bad_request(
            "the Idempotency-Key header is missing; a repeated request must not refund twice",
        )
    })?;
    let print = fingerprint(&serde_json::json!([id, &body]));
    let mut tx = db.begin_for(cause.clone()).await?;
    // Loaded first, for that locks it: of two requests at a time the second sees what the first did.
    let Some(mut order) = store::load(&mut tx, &[id]).await?.remove(&id) else { return Err(unknown(id)) };
    if let Some(before) = idempotency::lookup(&mut tx, REFUND, &[&key]).await?.remove(&key) {
        tx.rollback().await;
        if before.fingerprint != print {
            return Err(key_reused());
        }
        let answer = serde_json::from_str(&before.answer).map_err(|e| Problem::internal(&e))?;
        return Ok((StatusCode::ACCEPTED, Json(answer)));
    }
    let earlier = store::refunds_of(&mut tx, id).await?;
    let (lines, amount) = refunds::plan(&order, &earlier, body.lines.as_deref()).map_err(|e| match &e {
        RefundFault::TooMany { line, .. } => {
            let fault = Fault { pointer: format!("/lines/{line}"), detail: e.to_string() };
            Problem::unprocessable("the order cannot be refunded so", vec![fault])
        }
        _ => Problem::conflict(e.to_string()),
    })?;
    let now = tx.now();
    let refund = refunds::Refund {
        id: Uuid::now_v7(),
        order_id: id,
        amount,
        lines,
        restock: body.restock,
        reason: body.reason,
        progress: Progress::Pending,
        rejection: None,
        created_at: now,
        updated_at: now,
    };
    let was = order.version;
    order.version += 1;
    order.refunding += amount;
    let correlation_id = order.correlation_id.parse().unwrap_or_else(|_| cause.correlation_id.clone());
    let event = OrderRefundRequested {
        refund_id: refund.id,
        order_id: id,
        amount,
        currency: order.currency.clone(),
        reason: refund.reason.clone(),
    };
    let emission = Emission::new(event, id.to_string(), order.version)
        .lane(order.lane)
        .caused_by(consign::event::Cause { correlation_id, ..cause });
    let event_id = tx.emit(emission).map_err(|e| Problem::internal(&e))?;
    let detail = match &refund.reason {
        Some(reason) => format!("{amount} {}: {reason}", order.currency),
        None => format!("{amount} {}", order.currency),
    };
    let entry = Entry {
        order_id: id,
        version: order.version,
        event: "orders.refund_requested".into(),
        detail: Some(detail),
        event_id: Some(event_id),
    };
    store::insert_refund(&mut tx, &refund).await?;
    store::update(&mut tx, &[(was, &order)]).await?;
    store::append(&mut tx, &[entry]).await?;
    let view = RefundView::from(refund);
    let answer = serde_json::to_string(&view).map_err(|e| Problem::internal(&e))?;
    idempotency::record(&mut tx, REFUND, &[(&key, print, answer)]).await?;
    tx.commit().await?;
    Ok((StatusCode::ACCEPTED, Json(view)))
}

#[derive(Serialize, JsonSchema)]
struct Refunds {
    refunds: Vec<RefundView>,
}

async fn refunds(State(db): State<Db>, Path(Id { id }): Path<Id>) -> Result<Json<Refunds>, Problem> {
    let id = order_id(&id)?;
    if store::find(&db, id).await?.is_none() {
        return Err(unknown(id));
    }
    let found = store::list_refunds(&db, id).await?;
    Ok(Json(Refunds { refunds: found.into_iter().map(RefundView::from).collect() }))
}
