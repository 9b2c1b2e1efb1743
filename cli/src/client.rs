//! HTTP to the services, with errors a person can act on.

use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

/// A request to a service failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody answered.
    #[error(
        "{url} cannot be reached; is `consign up` running? (--order-url and the like name another place)"
    )]
    Unreachable {
        /// Where.
        url: String,
        #[source]
        /// Why.
        source: reqwest::Error,
    },
    /// An error was answered.
    #[error("{status}: {text}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What the service says, each field at fault included.
        text: String,
    },
    /// The answer is not what was expected.
    #[error("{url} answered something unexpected")]
    Unexpected {
        /// Where.
        url: String,
        #[source]
        /// Why.
        source: reqwest::Error,
    },
}

/// A service.
#[derive(Clone, Debug)]
pub struct Client {
    base: String,
    token: Option<String>,
    http: reqwest::Client,
}

impl Client {
    /// The service at this base URL.
    pub fn new(base: &str, token: Option<String>) -> Self {
        let http = reqwest::Client::builder()
            .timeout(Duration::from_secs(30))
            .connect_timeout(Duration::from_secs(3))
            .pool_max_idle_per_host(1024)
            .build()
            .unwrap_or_default();
        Self { base: base.trim_end_matches('/').to_owned(), token, http }
    }

    /// Several replicas of it, as base URLs with commas between; what is asked of one is asked of the first.
    pub fn replicas(bases: &str, token: Option<&str>) -> Vec<Self> {
        bases.split(',').map(|base| Self::new(base.trim(), token.map(str::to_owned))).collect()
    }

    /// Its base URL.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// A request to a path of it.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Sends it, and reads an answer of 2xx.
    pub async fn send<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let unreachable = |source| ClientError::Unreachable { url: self.base.clone(), source };
        let response = request.send().await.map_err(unreachable)?;
        if !response.status().is_success() {
            return Err(refused(response).await);
        }
        response.json().await.map_err(|source| ClientError::Unexpected { url: self.base.clone(), source })
    }

    /// `GET` of a path.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.send(self.request(Method::GET, path)).await
    }

    /// `GET` with those query parameters that have a value.
    pub async fn query<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, Option<&str>)],
    ) -> Result<T, ClientError> {
        let query: Vec<(&str, &str)> =
            query.iter().filter_map(|(name, value)| Some((*name, (*value)?))).collect();
        self.send(self.request(Method::GET, path).query(&query)).await
    }

    /// `POST` of a JSON body.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.send(self.request(Method::POST, path).json(body)).await
    }
}

async fn refused(response: Response) -> ClientError {
    let status = response.status().as_u16();
    let text = response.text().await.unwrap_or_default();
    let problem: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
    let mut said = problem["detail"].as_str().map_or(text, str::to_owned);
    for fault in problem["errors"].as_array().into_iter().flatten() {
        said.push_str(&format!(
            "\n  {}: {}",
            fault["pointer"].as_str().unwrap_or("/"),
            fault["detail"].as_str().unwrap_or_default()
        ));
    }
    ClientError::Refused { status, text: said }
}
