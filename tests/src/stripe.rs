//! A stand-in for Stripe: localstripe, which knows payment intents but neither idempotency keys nor faults, behind a proxy that knows both, over
//! TLS as the real one.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// The version that `cargo xtask test --install` installs.
const VERSION: &str = "1.15.10";
/// What it is told to be paid with.
pub const API_KEY: &str = "sk_test_12345";
/// What it signs webhooks with.
pub const WEBHOOK_SECRET: &str = "whsec_12345";

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// 500 without effect, and the same again for this key for good, as Stripe does.
    ServerError,
    /// 429 without effect.
    TooMany,
    /// It takes effect, but the connection breaks before the answer.
    AnswerLost,
    /// The connection breaks before it takes effect.
    RequestLost,
    /// It takes effect, and no answer ever comes.
    Hangs,
}

impl Fault {
    pub const ALL: [Self; 5] =
        [Self::ServerError, Self::TooMany, Self::AnswerLost, Self::RequestLost, Self::Hangs];
}

/// A request that was made: `POST /v1/payment_intents`, its key, and the answer's status.
#[derive(Clone, Debug)]
pub struct Made {
    pub what: String,
    pub key: Option<String>,
    pub status: u16,
}

#[derive(Default)]
struct Proxied {
    /// By path's end, in order.
    faults: HashMap<String, VecDeque<Fault>>,
    answers: HashMap<String, (Bytes, StatusCode, Bytes)>,
    made: Vec<Made>,
}

#[derive(Clone)]
struct Proxy {
    backend: String,
    http: reqwest::Client,
    state: Arc<Mutex<Proxied>>,
}

/// It, until dropped.
pub struct Stripe {
    child: Child,
    proxy: Proxy,
    /// Where the proxy is.
    pub url: String,
    /// Whom its certificate is signed by.
    pub ca_file: PathBuf,
    _dir: tempfile::TempDir,
}

impl Drop for Stripe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Stripe {
    /// # Panics
    /// If it is not installed or does not start.
    pub async fn start() -> Self {
        let tools = crate::program().ancestors().find(|p| p.ends_with("target")).unwrap().join("tools");
        let installed = tools.join(format!("localstripe-{VERSION}"));
        assert!(installed.exists(), "localstripe {VERSION} is needed; run `cargo xtask test --install`");
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        // Its own start listens on all addresses and keeps a file in /tmp.
        let run = format!(
            "import localstripe.resources as r\nr.Store.dump_to_disk = lambda self: None\n\
             from aiohttp import web\nfrom localstripe.server import app\nweb.run_app(app, host='127.0.0.1', port={port}, print=None)"
        );
        let child = Command::new("python3")
            .args(["-c", &run])
            .env("PYTHONPATH", &installed)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("python3");
        let backend = format!("http://127.0.0.1:{port}");
        let http = reqwest::Client::new();
        let started = Instant::now();
        while http.get(format!("{backend}/v1/charges")).send().await.is_err() {
            assert!(started.elapsed() < Duration::from_secs(30), "localstripe did not start within 30 s");
            std::thread::sleep(Duration::from_millis(50));
        }
        let dir = tempfile::tempdir().unwrap();
        let (listener, ca_file) = tls(dir.path()).await;
        let url = format!("https://localhost:{}", listener.tcp.local_addr().unwrap().port());
        let proxy = Proxy { backend, http, state: Arc::default() };
        let router = Router::new().fallback(forward).with_state(proxy.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { child, proxy, url, ca_file, _dir: dir }
    }

    /// The next requests whose path ends so go wrong like this, one after the other.
    pub fn goes_wrong(&self, path_end: &str, faults: &[Fault]) {
        let mut state = self.proxy.state.lock().unwrap();
        state.faults.entry(path_end.to_owned()).or_default().extend(faults);
    }

    /// Whether everything that was to go wrong did.
    pub fn all_went_wrong(&self) -> bool {
        self.proxy.state.lock().unwrap().faults.values().all(VecDeque::is_empty)
    }

    /// What was asked so far.
    pub fn made(&self) -> Vec<Made> {
        self.proxy.state.lock().unwrap().made.clone()
    }

    /// Forgets idempotency keys, as Stripe does after a day.
    pub fn forget_keys(&self) {
        self.proxy.state.lock().unwrap().answers.clear();
    }

    /// All objects of a kind, past the proxy.
    pub async fn all(&self, kind: &str) -> Vec<Value> {
        let url = format!("{}/v1/{kind}?limit=100", self.proxy.backend);
        let page: Value =
            self.proxy.http.get(url).bearer_auth(API_KEY).send().await.unwrap().json().await.unwrap();
        page["data"].as_array().unwrap().clone()
    }

    /// A payment method, as the customer's browser would make it.
    pub async fn method(&self, form: &[(&str, &str)]) -> String {
        let url = format!("{}/v1/payment_methods", self.proxy.backend);
        let body = form.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join("&");
        let request = self.proxy.http.post(url).bearer_auth(API_KEY).body(body);
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        let method: Value = request.send().await.unwrap().json().await.unwrap();
        method["id"].as_str().unwrap_or_else(|| panic!("{method}")).to_owned()
    }

    /// A card of this number.
    pub async fn card(&self, number: &str) -> String {
        let form = [
            ("type", "card"),
            ("card[number]", number),
            ("card[exp_month]", "12"),
            ("card[exp_year]", "2030"),
            ("card[cvc]", "123"),
        ];
        self.method(&form).await
    }

    /// Sends webhooks there from now on.
    pub async fn call_back(&self, url: &str) {
        let body = json!({"url": url, "secret": WEBHOOK_SECRET});
        let config = format!("{}/_config/webhooks/test", self.proxy.backend);
        assert!(self.proxy.http.post(config).json(&body).send().await.unwrap().status().is_success());
    }
}

/// One request through the proxy.
async fn forward(
    State(proxy): State<Proxy>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let path = uri.path().to_owned();
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let key = header("idempotency-key");
    let answer = |status: StatusCode, body: Bytes| {
        let made = Made { what: format!("{method} {path}"), key: key.clone(), status: status.as_u16() };
        proxy.state.lock().unwrap().made.push(made);
        (status, [("content-type", "application/json")], body).into_response()
    };
    let error = |status: u16, kind: &str, code: &str| {
        let body = json!({"error": {"type": kind, "code": code, "message": "as told"}});
        (StatusCode::from_u16(status).unwrap(), Bytes::from(body.to_string()))
    };
    if header("stripe-version").as_deref() != Some(payment::gateway::stripe::API_VERSION) {
        let (status, body) = error(400, "invalid_request_error", "no_pinned_version");
        return answer(status, body);
    }
    let known = key.as_ref().and_then(|k| proxy.state.lock().unwrap().answers.get(k).cloned());
    if let Some((first, status, stored)) = known {
        if first == body {
            return answer(status, stored);
        }
        let (status, body) = error(400, "idempotency_error", "key_reused");
        return answer(status, body);
    }
    let fault = {
        let mut state = proxy.state.lock().unwrap();
        let faults =
            state.faults.iter_mut().find(|(end, faults)| path.ends_with(end.as_str()) && !faults.is_empty());
        faults.and_then(|(_, faults)| faults.pop_front())
    };
    let remember = |status: StatusCode, stored: &Bytes| {
        if let Some(key) = &key {
            let stored = (body.clone(), status, stored.clone());
            proxy.state.lock().unwrap().answers.insert(key.clone(), stored);
        }
    };
    match fault {
        Some(Fault::ServerError) => {
            let (status, stored) = error(500, "api_error", "internal");
            remember(status, &stored);
            return answer(status, stored);
        }
        Some(Fault::TooMany) => {
            let (status, body) = error(429, "invalid_request_error", "rate_limit");
            return answer(status, body);
        }
        Some(Fault::RequestLost) => return broken(),
        None | Some(Fault::AnswerLost | Fault::Hangs) => {}
    }
    let url = format!("{}{uri}", proxy.backend);
    let mut request = proxy.http.request(method.clone(), url).body(body.clone());
    for name in ["authorization", "content-type"] {
        if let Some(value) = header(name) {
            request = request.header(name, value);
        }
    }
    let response = request.send().await.unwrap();
    let status = StatusCode::from_u16(response.status().as_u16()).unwrap();
    let stored = response.bytes().await.unwrap();
    remember(status, &stored);
    match fault {
        Some(Fault::AnswerLost) => broken(),
        Some(Fault::Hangs) => std::future::pending().await,
        _ => answer(status, stored),
    }
}

/// An answer that breaks off.
fn broken() -> Response {
    let nothing = futures_util::stream::once(async { Err::<Bytes, _>(std::io::Error::other("as told")) });
    Response::new(Body::from_stream(nothing))
}

struct TlsListener {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = std::net::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok((stream, from)) = self.tcp.accept().await else { continue };
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, from);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}

/// A listener with a certificate of its own, and the authority that signed it.
async fn tls(dir: &Path) -> (TlsListener, PathBuf) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_file = dir.join("ca.pem");
    std::fs::write(&ca_file, ca.self_signed(&ca_key).unwrap().pem()).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key.into())
        .unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (TlsListener { tcp, acceptor: TlsAcceptor::from(Arc::new(config)) }, ca_file)
}
