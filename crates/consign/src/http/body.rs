//! Request bodies and query parameters, checked before a handler sees them.

use aide::OperationInput;
use aide::generate::GenContext;
use aide::openapi::Operation;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::{Json, RequestExt};
use bytes::Bytes;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Problem;
use crate::schema::{self, bounds};

/// A JSON body that satisfies its type's schema: 415 if it is not JSON by its content type, 413 if too large, 400 if it is not JSON,
/// 422 with every fault if it breaks the schema.
#[derive(Clone, Copy, Debug)]
pub struct Body<T>(pub T);

impl<S, T> FromRequest<S> for Body<T>
where
    S: Send + Sync,
    T: DeserializeOwned + JsonSchema + 'static,
{
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let essence = content_type.unwrap_or_default().split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            let detail = "the body must be JSON: Content-Type: application/json";
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail));
        }
        let raw: Bytes = request.extract().await.map_err(|e: BytesRejection| {
            let status = e.status();
            let detail = if status == StatusCode::PAYLOAD_TOO_LARGE {
                "the body is larger than this service takes".to_owned()
            } else {
                e.body_text()
            };
            Problem::new(status, detail)
        })?;
        bounds::check(&raw).map_err(|e| Problem::bad_request(format!("the body cannot be taken: {e}")))?;
        let value: Value = serde_json::from_slice(&raw)
            .map_err(|e| Problem::bad_request(format!("the body is not JSON: {e}")))?;
        schema::of_type::<T>().validate(&value)?;
        let value =
            serde_json::from_value(value).map_err(|e| Problem::unprocessable(e.to_string(), Vec::new()))?;
        Ok(Self(value))
    }
}

impl<T: JsonSchema> OperationInput for Body<T> {
    fn operation_input(ctx: &mut GenContext, operation: &mut Operation) {
        Json::<T>::operation_input(ctx, operation);
    }
}

/// Query parameters; 400 if they cannot be read.
#[derive(Clone, Copy, Debug)]
pub struct Params<T>(pub T);

impl<S, T> FromRequestParts<S> for Params<T>
where
    S: Send + Sync,
    T: DeserializeOwned,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(value) = Query::<T>::from_request_parts(parts, state)
            .await
            .map_err(|e| Problem::bad_request(e.body_text()))?;
        Ok(Self(value))
    }
}

impl<T: JsonSchema> OperationInput for Params<T> {
    fn operation_input(ctx: &mut GenContext, operation: &mut Operation) {
        Query::<T>::operation_input(ctx, operation);
    }
}

/// The `{id}` of a path.
#[derive(Clone, Debug, serde::Deserialize, JsonSchema)]
pub struct Id {
    /// As it stands in the path.
    pub id: String,
}
