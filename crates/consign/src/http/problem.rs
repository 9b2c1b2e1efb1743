//! Errors as RFC 9457 `application/problem+json`, naming every field at fault.

use std::error::Error;

use aide::OperationOutput;
use aide::generate::GenContext;
use aide::openapi::{MediaType, Operation, Response as ApiResponse, SchemaObject};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Serialize;

use crate::db::{DbError, GroupError};
use crate::schema::{Fault, SchemaViolation};
use crate::telemetry;

/// An error as it is told to a client. The cause of a 5xx goes to the log, not to the client.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Problem {
    #[serde(rename = "type")]
    kind: &'static str,
    title: String,
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    /// Each field at fault.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<Fault>,
    #[serde(skip)]
    retry_after: Option<u64>,
    #[serde(skip)]
    allow_bearer: bool,
}

impl Problem {
    /// A problem of this status.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            kind: "about:blank",
            title: status.canonical_reason().unwrap_or("Error").to_owned(),
            status: status.as_u16(),
            detail: Some(detail.into()),
            errors: Vec::new(),
            retry_after: None,
            allow_bearer: false,
        }
    }

    /// 400: the request cannot be read.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// 401: an admin token is needed.
    pub fn unauthorized() -> Self {
        let detail = "this needs the admin token: Authorization: Bearer <token>";
        Self { allow_bearer: true, ..Self::new(StatusCode::UNAUTHORIZED, detail) }
    }

    /// 404: there is no such thing.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    /// 409: not in this state.
    pub fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, detail)
    }

    /// 422: readable, but not acceptable; with the fields at fault.
    pub fn unprocessable(detail: impl Into<String>, errors: Vec<Fault>) -> Self {
        Self { errors, ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, detail) }
    }

    /// 503: try again after so many seconds.
    pub fn unavailable(detail: impl Into<String>, retry_after: u64) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, detail) }
    }

    /// 429: try again after so many seconds.
    pub fn too_many(detail: impl Into<String>, retry_after: u64) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(StatusCode::TOO_MANY_REQUESTS, detail) }
    }

    /// 500, its cause logged.
    pub fn internal(error: &(dyn Error + 'static)) -> Self {
        tracing::error!(error = telemetry::chain(error), "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "an error on our side; it has been logged")
    }

    /// The status it is answered with.
    pub fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl From<SchemaViolation> for Problem {
    fn from(v: SchemaViolation) -> Self {
        Self::unprocessable("the body breaks its schema", v.faults)
    }
}

impl From<DbError> for Problem {
    fn from(e: DbError) -> Self {
        tracing::error!(error = telemetry::chain(&e), "a request failed on the database");
        Self::unavailable("the database cannot be reached; try again", 2)
    }
}

impl From<sqlx::Error> for Problem {
    fn from(e: sqlx::Error) -> Self {
        DbError::from(e).into()
    }
}

impl From<GroupError> for Problem {
    fn from(e: GroupError) -> Self {
        tracing::error!(error = telemetry::chain(&e), "a request failed on the database");
        Self::unavailable("the database cannot be written; try again", 2)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = (self.status(), body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.allow_bearer {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl OperationOutput for Problem {
    type Inner = Self;

    fn operation_response(ctx: &mut GenContext, _: &mut Operation) -> Option<ApiResponse> {
        let schema = ctx.schema.subschema_for::<Self>();
        Some(ApiResponse {
            description: "What is wrong (RFC 9457)".into(),
            content: [(
                "application/problem+json".to_owned(),
                MediaType {
                    schema: Some(SchemaObject { json_schema: schema, external_docs: None, example: None }),
                    ..MediaType::default()
                },
            )]
            .into_iter()
            .collect(),
            ..ApiResponse::default()
        })
    }

    fn inferred_responses(ctx: &mut GenContext, op: &mut Operation) -> Vec<(Option<u16>, ApiResponse)> {
        Self::operation_response(ctx, op).map(|r| (None, r)).into_iter().collect()
    }
}
