//! The admin token: nobody without it changes stock, prices, money or dead letters.

use std::sync::Arc;

use aide::OperationInput;
use aide::generate::GenContext;
use aide::openapi::{Operation, SecurityRequirement};
use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;

use super::Problem;

/// The token a service accepts; without one, nobody is an admin.
#[derive(Clone, Debug)]
pub struct AdminToken(Option<Arc<SecretString>>);

impl AdminToken {
    pub(crate) fn new(token: Option<SecretString>) -> Self {
        Self(token.map(Arc::new))
    }

    fn admits(&self, given: &str) -> bool {
        self.0.as_ref().is_some_and(|t| t.expose_secret().as_bytes().ct_eq(given.as_bytes()).into())
    }
}

/// An argument that only requests with the admin token get past.
#[derive(Clone, Copy, Debug)]
pub struct Admin;

impl<S: Send + Sync> FromRequestParts<S> for Admin {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let given = parts.headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        let given =
            given.and_then(|v| v.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let admitted = match (parts.extensions.get::<AdminToken>(), given) {
            (Some(token), Some((_, given))) => token.admits(given.trim()),
            _ => false,
        };
        if admitted { Ok(Self) } else { Err(Problem::unauthorized()) }
    }
}

impl OperationInput for Admin {
    fn operation_input(_: &mut GenContext, operation: &mut Operation) {
        operation.security = vec![SecurityRequirement::from_iter([("admin".to_owned(), Vec::new())])];
    }
}
