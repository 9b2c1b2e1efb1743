//! `Idempotency-Key`: the same key and body get the first answer again; the same key with another body gets 422.

use std::collections::HashMap;

use aide::OperationInput;
use aide::generate::GenContext;
use aide::openapi::{
    HeaderStyle, Operation, Parameter, ParameterData, ParameterSchemaOrContent, SchemaObject,
};
use aide::operation::add_parameters;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use serde_json::Value;
use sqlx::Row;
use uuid::Uuid;

use super::Problem;
use crate::db::{DbError, Tx};
use crate::outbox::to_json;

/// The request's key, if it brought one: 1 to 255 visible ASCII characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey(pub Option<String>);

impl<S: Send + Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let Some(value) = parts.headers.get("idempotency-key") else { return Ok(Self(None)) };
        let key = value
            .to_str()
            .ok()
            .filter(|k| (1..=255).contains(&k.len()) && k.bytes().all(|b| b.is_ascii_graphic()));
        let key =
            key.ok_or_else(|| Problem::bad_request("Idempotency-Key: 1 to 255 visible ASCII characters"))?;
        Ok(Self(Some(key.to_owned())))
    }
}

impl OperationInput for IdempotencyKey {
    #[expect(
        clippy::default_trait_access,
        reason = "the maps' types are a dependency of aide's, not of ours"
    )]
    fn operation_input(ctx: &mut GenContext, operation: &mut Operation) {
        let json_schema = ctx.schema.subschema_for::<String>();
        let schema = SchemaObject { json_schema, external_docs: None, example: None };
        let parameter_data = ParameterData {
            name: "Idempotency-Key".into(),
            description: Some(
                "The same key and body get the first answer again; 1 to 255 visible ASCII characters.".into(),
            ),
            required: false,
            deprecated: None,
            format: ParameterSchemaOrContent::Schema(schema),
            example: None,
            examples: Default::default(),
            explode: None,
            extensions: Default::default(),
        };
        add_parameters(ctx, operation, [Parameter::Header { parameter_data, style: HeaderStyle::Simple }]);
    }
}

/// What identifies a request's body, whatever its white space and order of fields.
pub fn fingerprint(body: &Value) -> Uuid {
    // serde_json sorts the keys of objects, so equal documents have equal texts.
    Uuid::new_v5(&Uuid::nil(), body.to_string().as_bytes())
}

/// An answer given before.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Of the body it answered.
    pub fingerprint: Uuid,
    /// What was answered.
    pub answer: String,
}

/// What was answered to these keys of an operation, in one statement.
pub async fn lookup(
    tx: &mut Tx,
    operation: &str,
    keys: &[&str],
) -> Result<HashMap<String, Recorded>, DbError> {
    if keys.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = sqlx::query(
        "SELECT key, fingerprint, answer FROM idempotency WHERE operation = ? AND key IN (SELECT value FROM json_each(?))",
    )
    .bind(operation)
    .bind(to_json(&keys)?)
    .fetch_all(tx.sqlite())
    .await?;
    let read = |r: &sqlx::sqlite::SqliteRow| {
        let fingerprint: &str = r.try_get("fingerprint")?;
        let fingerprint = fingerprint.parse().map_err(|e| sqlx::Error::Decode(Box::new(e)))?;
        Ok::<_, sqlx::Error>((r.try_get("key")?, Recorded { fingerprint, answer: r.try_get("answer")? }))
    };
    Ok(rows.iter().map(read).collect::<Result<_, _>>()?)
}

/// Records answers, in the transaction of what they answer, in one statement.
pub async fn record(tx: &mut Tx, operation: &str, answers: &[(&str, Uuid, String)]) -> Result<(), DbError> {
    if answers.is_empty() {
        return Ok(());
    }
    let now = tx.now().as_millis();
    sqlx::query(
        "INSERT INTO idempotency (operation, key, fingerprint, answer, created_at)
         SELECT ?, value ->> 0, value ->> 1, value ->> 2, ? FROM json_each(?)",
    )
    .bind(operation)
    .bind(now)
    .bind(to_json(&answers)?)
    .execute(tx.sqlite())
    .await?;
    Ok(())
}

/// The answer to a key used before with another body.
pub fn key_reused() -> Problem {
    Problem::unprocessable(
        "this Idempotency-Key was used with another body; take a new key for a new request",
        Vec::new(),
    )
}
