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
use uuid::Uuid;

use super::Problem;
use crate::db::{DbError, Tx};

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
    let rows = tx
        .query(
            "SELECT key, fingerprint, answer FROM idempotency WHERE operation = $1 AND key IN (SELECT k FROM {$2: k})",
        )
        .bind(operation)
        .rows(keys.iter().map(|k| (*k,)))
        .fetch_all()
        .await?;
    rows.iter()
        .map(|r| {
            Ok((r.get("key")?, Recorded { fingerprint: r.get("fingerprint")?, answer: r.get("answer")? }))
        })
        .collect()
}

/// Records answers, in the transaction of what they answer, in one statement.
///
/// # Errors
/// [`DbError::Conflict`] if another replica has answered one of the keys meanwhile.
pub async fn record(tx: &mut Tx, operation: &str, answers: &[(&str, Uuid, String)]) -> Result<(), DbError> {
    if answers.is_empty() {
        return Ok(());
    }
    let now = tx.now();
    let mut answers: Vec<&(&str, Uuid, String)> = answers.iter().collect();
    answers.sort_unstable();
    let recorded = tx
        .query(
            "INSERT INTO idempotency (operation, key, fingerprint, answer, created_at)
             SELECT $1, k, print, text, $2 FROM {$3: k, print, text} WHERE true ON CONFLICT DO NOTHING",
        )
        .bind(operation)
        .bind(now)
        .rows(answers.iter().map(|(key, print, answer)| (*key, *print, answer.as_str())))
        .execute()
        .await?;
    if recorded < answers.len() as u64 {
        Err(DbError::Conflict("an idempotency key's answer"))
    } else {
        Ok(())
    }
}

/// The answer to a key used before with another body.
pub fn key_reused() -> Problem {
    Problem::unprocessable(
        "this Idempotency-Key was used with another body; take a new key for a new request",
        Vec::new(),
    )
}
