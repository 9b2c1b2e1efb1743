//! What every service answers for its operators: liveness, readiness, health, metrics, dead letters.

use std::sync::Arc;

use aide::axum::ApiRouter;
use aide::axum::routing::{get_with, post_with};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Admin, Body, Id, Params, Problem};
use crate::breaker::{self, Breaker};
use crate::dead_letter::{self, DeadLetter, Filter, Reason, Status};
use crate::reconcile::{self, Report};
use crate::service::Vitals;
use crate::versions::{self, RetireError, Usage};
use crate::{Timestamp, telemetry};

pub(crate) fn router(vitals: Arc<Vitals>) -> ApiRouter {
    ApiRouter::new()
        .api_route("/livez", get_with(livez, |o| o.summary("Alive: the event loop turns").tag("operations")))
        .api_route("/readyz", get_with(readyz, |o| o.summary("Ready to take requests").tag("operations")))
        .api_route(
            "/health",
            get_with(health, |o| {
                o.summary("Everything, the broker included")
                    .tag("operations")
                    .response::<200, Json<serde_json::Value>>()
            }),
        )
        .api_route(
            "/metrics",
            get_with(metrics, |o| {
                o.summary("Prometheus metrics").tag("operations").response::<200, String>()
            }),
        )
        .api_route(
            "/admin/dead-letters",
            get_with(list, |o| o.summary("Dead letters, the newest first").tag("operations")),
        )
        .api_route(
            "/admin/dead-letters/{id}",
            get_with(show, |o| o.summary("One dead letter, whole").tag("operations")),
        )
        .api_route(
            "/admin/dead-letters/redrive",
            post_with(redrive, |o| o.summary("Run dead letters again").tag("operations")),
        )
        .api_route(
            "/admin/dead-letters/discard",
            post_with(discard, |o| o.summary("Give dead letters up").tag("operations")),
        )
        .api_route(
            "/admin/reconcile",
            post_with(reconcile_now, |o| {
                o.summary("Compare the outbox's history with the streams, and publish what they lack")
                    .tag("operations")
            }),
        )
        .api_route("/admin/breakers", get_with(breakers, |o| o.summary("Circuit breakers").tag("operations")))
        .api_route(
            "/admin/breakers/{id}",
            post_with(set_breaker, |o| {
                o.summary("Hold a circuit breaker open, or close it")
                    .description("Of this replica. Held open, it stays open until it is closed; closed, it opens again if calls fail.")
                    .tag("operations")
            }),
        )
        .api_route(
            "/admin/versions",
            get_with(usage, |o| o.summary("Who publishes and who reads which version of an event").tag("operations")),
        )
        .api_route(
            "/admin/versions/retire",
            post_with(retire, |o| {
                o.summary("Publish a version of an event no more")
                    .description("Refused while a consumer asks for it. Holds for all replicas, until it is restored.")
                    .tag("operations")
            }),
        )
        .api_route(
            "/admin/versions/restore",
            post_with(restore, |o| {
                o.summary("Publish a version that was retired again, if it is configured").tag("operations")
            }),
        )
        .with_state(vitals)
}

async fn livez() -> &'static str {
    "ok\n"
}

async fn readyz(State(vitals): State<Arc<Vitals>>) -> Result<&'static str, Problem> {
    match vitals.not_ready().await {
        None => Ok("ok\n"),
        Some(why) => Err(Problem::unavailable(why, 2)),
    }
}

async fn health(State(vitals): State<Arc<Vitals>>) -> impl aide::axum::IntoApiResponse {
    let report = vitals.report().await;
    let status = if report["status"] == "failing" { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (status, Json(report)).into_response()
}

async fn metrics(State(vitals): State<Arc<Vitals>>) -> impl aide::axum::IntoApiResponse {
    vitals.measure().await;
    let content_type = [(axum::http::header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    (content_type, telemetry::metrics().render()).into_response()
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ListParams {
    consumer: Option<String>,
    event: Option<String>,
    reason: Option<Reason>,
    /// Dead since then or later.
    dead_from: Option<Timestamp>,
    /// Dead before then.
    dead_before: Option<Timestamp>,
    /// `open` if left out.
    status: Option<Status>,
    /// The last id of the page before.
    before: Option<Uuid>,
    /// 1 to 500.
    limit: Option<u32>,
}

#[derive(Serialize, JsonSchema)]
struct DeadLetters {
    dead_letters: Vec<DeadLetter>,
}

async fn list(
    _: Admin,
    State(vitals): State<Arc<Vitals>>,
    Params(p): Params<ListParams>,
) -> Result<Json<DeadLetters>, Problem> {
    let filter = Filter {
        ids: None,
        consumer: p.consumer,
        event: p.event,
        reason: p.reason,
        dead_from: p.dead_from,
        dead_before: p.dead_before,
    };
    let limit = p.limit.unwrap_or(100);
    if !(1..=500).contains(&limit) {
        return Err(Problem::bad_request("limit: 1 to 500"));
    }
    let status = p.status.unwrap_or(Status::Open);
    let dead_letters = dead_letter::list(&vitals.db, &filter, Some(status), p.before, limit).await?;
    Ok(Json(DeadLetters { dead_letters }))
}

async fn show(
    _: Admin,
    State(vitals): State<Arc<Vitals>>,
    Path(Id { id }): Path<Id>,
) -> Result<Json<DeadLetter>, Problem> {
    let found = match id.parse() {
        Ok(id) => dead_letter::get(&vitals.db, id).await?,
        Err(_) => None,
    };
    found.map(Json).ok_or_else(|| Problem::not_found(format!("no dead letter {id} here")))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Change {
    /// Which; must not be empty unless `all` is set.
    #[serde(default)]
    filter: Filter,
    /// Really all that are open.
    #[serde(default)]
    all: bool,
    /// Redrive also what failed too often already.
    #[serde(default)]
    force: bool,
    /// Only say which it would be.
    #[serde(default)]
    dry_run: bool,
}

#[derive(Serialize, JsonSchema)]
struct Changed {
    ids: Vec<String>,
    dry_run: bool,
}

fn checked(change: &Change) -> Result<(), Problem> {
    if change.filter.is_empty() && !change.all {
        return Err(Problem::bad_request(
            "name a filter (ids, consumer, event, reason, dead_from, dead_before), or set all to true",
        ));
    }
    Ok(())
}

async fn redrive(
    _: Admin,
    State(vitals): State<Arc<Vitals>>,
    Body(c): Body<Change>,
) -> Result<Json<Changed>, Problem> {
    checked(&c)?;
    let ids = dead_letter::redrive(&vitals.db, &c.filter, c.force, c.dry_run).await?;
    Ok(Json(Changed { ids, dry_run: c.dry_run }))
}

async fn discard(
    _: Admin,
    State(vitals): State<Arc<Vitals>>,
    Body(c): Body<Change>,
) -> Result<Json<Changed>, Problem> {
    checked(&c)?;
    let ids = dead_letter::discard(&vitals.db, &c.filter, c.dry_run).await?;
    Ok(Json(Changed { ids, dry_run: c.dry_run }))
}

async fn reconcile_now(_: Admin, State(vitals): State<Arc<Vitals>>) -> Result<Json<Report>, Problem> {
    let done = reconcile::reconcile(&vitals.db, vitals.broker.as_ref(), &vitals.scope).await;
    done.map(Json).map_err(|e| Problem::unavailable(format!("{}; run it again", telemetry::chain(&e)), 2))
}

#[derive(Serialize, JsonSchema)]
struct Breakers {
    breakers: Vec<breaker::Status>,
}

async fn breakers(_: Admin, State(vitals): State<Arc<Vitals>>) -> Json<Breakers> {
    Json(Breakers { breakers: vitals.breakers.iter().map(Breaker::status).collect() })
}

#[derive(Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Wanted {
    Open,
    Closed,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SetBreaker {
    /// `open` or `closed`.
    state: Wanted,
}

async fn set_breaker(
    _: Admin,
    State(vitals): State<Arc<Vitals>>,
    Path(Id { id }): Path<Id>,
    Body(set): Body<SetBreaker>,
) -> Result<Json<breaker::Status>, Problem> {
    let Some(breaker) = vitals.breakers.iter().find(|b| b.name() == id) else {
        let names: Vec<&str> = vitals.breakers.iter().map(Breaker::name).collect();
        return Err(Problem::not_found(format!(
            "no circuit breaker {id:?} here; there is: {}",
            names.join(", ")
        )));
    };
    match set.state {
        Wanted::Open => breaker.hold_open(),
        Wanted::Closed => breaker.close(),
    }
    Ok(Json(breaker.status()))
}

async fn usage(_: Admin, State(vitals): State<Arc<Vitals>>) -> Result<Json<Usage>, Problem> {
    let v = &vitals;
    let streams: Vec<String> = v.scope.streams.iter().map(|s| s.name.clone()).collect();
    let found = versions::usage(&v.db, v.broker.as_ref(), &v.published, &v.consumed, &streams).await;
    found.map(Json).map_err(|e| Problem::unavailable(telemetry::chain(&e), 2))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct EventVersion {
    /// The event's type, for example `orders.created`.
    event: String,
    /// The version, for example 1.
    version: u32,
}

#[derive(Serialize, JsonSchema)]
struct PublishedNow {
    /// The versions that are published from now on.
    published: Vec<u32>,
}

fn refused(e: &RetireError) -> Problem {
    match e {
        RetireError::Unknown { .. } | RetireError::NoVersion { .. } => Problem::not_found(e.to_string()),
        RetireError::OnlyOne { .. } | RetireError::StillRead { .. } => Problem::conflict(e.to_string()),
        RetireError::Db(_) | RetireError::Broker(_) => Problem::unavailable(telemetry::chain(e), 2),
    }
}

async fn retire(
    _: Admin,
    State(vitals): State<Arc<Vitals>>,
    Body(which): Body<EventVersion>,
) -> Result<Json<PublishedNow>, Problem> {
    let v = &vitals;
    let done = versions::retire(&v.db, v.broker.as_ref(), &v.published, &which.event, which.version).await;
    done.map(|published| Json(PublishedNow { published })).map_err(|e| refused(&e))
}

async fn restore(
    _: Admin,
    State(vitals): State<Arc<Vitals>>,
    Body(which): Body<EventVersion>,
) -> Result<Json<PublishedNow>, Problem> {
    let v = &vitals;
    let done = versions::restore(&v.db, v.broker.as_ref(), &v.published, &which.event, which.version).await;
    done.map(|published| Json(PublishedNow { published })).map_err(|e| refused(&e))
}
