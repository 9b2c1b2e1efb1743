//! What the tests of the whole share: the three services on virtual time, and the real program as a process.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

pub mod chaos;
pub mod fleet;
pub mod stripe;

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use consign::broker::Broker;
use consign::service::Running;
use consign::testing::Bench;
use consign::{Db, Timestamp};
use payment::Outside;
use payment::gateway::{Knobs, SimulatedGateway};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::chaos::{FaultyBroker, FaultyGateway, Plan};

/// The admin token of systems under test.
pub const TOKEN: &str = "test-token";

/// The production services on the in-memory broker and virtual time.
pub struct System {
    pub bench: Bench,
    pub gateway: SimulatedGateway,
    pub order: Running,
    pub inventory: Running,
    pub payment: Running,
    http: reqwest::Client,
}

impl System {
    /// All three, with 100 of `book` (1000 cents) and 5 of `lamp` (2500 cents) in stock.
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// The same, with order configured by `configure`.
    pub async fn start_with(configure: impl FnOnce(&mut order::Config)) -> Self {
        Self::start_on(None, configure, |_| {}).await
    }

    /// The same, with payment configured by `configure`.
    pub async fn start_paying(configure: impl FnOnce(&mut payment::Config)) -> Self {
        Self::start_on(None, |_| {}, configure).await
    }

    /// The same, where things go wrong as planned.
    pub async fn start_faulty(plan: &Plan, configure: impl FnOnce(&mut order::Config)) -> Self {
        Self::start_on(Some(plan), configure, |_| {}).await
    }

    async fn start_on(
        plan: Option<&Plan>,
        configure: impl FnOnce(&mut order::Config),
        configure_payment: impl FnOnce(&mut payment::Config),
    ) -> Self {
        let bench = Bench::start();
        let faulty = plan.is_some();
        let plan = plan.cloned().unwrap_or_default();
        let broker: Arc<dyn Broker> = Arc::new(FaultyBroker::new(Arc::clone(&bench.broker), plan.clone()));
        let clock = bench.time.clock();
        let mut order_config = order::Config::default();
        configure(&mut order_config);
        let mut inventory_config = inventory::Config::default();
        let mut payment_config = payment::Config::default();
        configure_payment(&mut payment_config);
        for http in [&mut order_config.http, &mut inventory_config.http, &mut payment_config.http] {
            http.listen.set_port(0);
            http.admin_token = Some(TOKEN.to_owned().into());
            // Virtual time may be moved on while a request is under way.
            http.request_timeout = Duration::from_secs(100_000);
        }
        let gateway =
            SimulatedGateway::open(&bench.file("gateway.db"), Knobs::CALM, clock.clone()).await.unwrap();
        let inventory_db = inventory::open(&bench.file("inventory.db"), clock.clone()).await.unwrap();
        let payment_db = payment::open(&bench.file("payment.db"), clock.clone()).await.unwrap();
        let order_db = order::open(&bench.file("order.db"), clock).await.unwrap();
        let outside = if faulty {
            Outside::Real(Arc::new(FaultyGateway { inner: gateway.clone(), plan: plan.clone() }))
        } else if payment_config.gateway.kind == payment::gateway::Kind::Simulated {
            Outside::Simulated(gateway.clone())
        } else {
            Outside::open(&payment_config.gateway, &bench.file("gateway.db"), bench.time.clock())
                .await
                .unwrap()
        };
        let order = order::service(&order_config, order_db, Arc::clone(&broker)).layer(plan.clone());
        let inventory =
            inventory::service(&inventory_config, inventory_db, Arc::clone(&broker)).layer(plan.clone());
        let payment = payment::service(&payment_config, payment_db, broker, outside).layer(plan);
        let (order, inventory, payment) =
            (order.start().await.unwrap(), inventory.start().await.unwrap(), payment.start().await.unwrap());
        let system = Self { bench, gateway, order, inventory, payment, http: reqwest::Client::new() };
        for (id, price, stock) in [("book", 1000, 100), ("lamp", 2500, 5)] {
            system.put(id, price).await;
            system.stock(id, stock, &format!("first-{id}")).await;
        }
        // Consumers that started before their stream was there wait a moment of virtual time before they look again.
        system.bench.time.advance(Duration::from_secs(2)).await;
        system.settled().await;
        system
    }

    /// The answer to a request; one that waits for a writer which a handler holds gets the time that the handler takes.
    async fn send(&self, request: reqwest::RequestBuilder) -> reqwest::Response {
        self.bench.time.carry(Duration::from_secs(60), "an answer", request.send()).await.unwrap()
    }

    async fn put(&self, id: &str, price: i64) {
        let url = format!("http://{}/products/{id}", self.inventory.address());
        let body = json!({"name": id, "price": price, "currency": "EUR"});
        let response = self.send(self.http.put(url).bearer_auth(TOKEN).json(&body)).await;
        assert!(response.status().is_success(), "{}", response.text().await.unwrap());
    }

    /// Moves stock.
    pub async fn stock(&self, id: &str, delta: i64, key: &str) {
        let url = format!("http://{}/products/{id}/stock", self.inventory.address());
        let body = json!({"delta": delta, "reason": "test"});
        let request = self.http.post(url).bearer_auth(TOKEN).header("Idempotency-Key", key).json(&body);
        let response = self.send(request).await;
        assert!(response.status().is_success(), "{}", response.text().await.unwrap());
    }

    /// Places an order of one line; its id.
    pub async fn place(&self, product: &str, quantity: u32) -> String {
        self.place_paid_with(product, quantity, None).await
    }

    /// The same, to be paid with this token.
    pub async fn place_paid_with(&self, product: &str, quantity: u32, method: Option<&str>) -> String {
        let url = format!("http://{}/orders", self.order.address());
        let mut body =
            json!({"customer_id": "ada", "items": [{"product_id": product, "quantity": quantity}]});
        if let Some(method) = method {
            body["payment_method"] = method.into();
        }
        let response = self.send(self.http.post(url).json(&body)).await;
        assert_eq!(response.status(), 202);
        let order: Value = response.json().await.unwrap();
        order["id"].as_str().unwrap().to_owned()
    }

    /// Tries to place an order; the status of the answer and its `Retry-After`.
    pub async fn try_to_place(&self, product: &str) -> (u16, Option<String>) {
        let url = format!("http://{}/orders", self.order.address());
        let body = json!({"customer_id": "ada", "items": [{"product_id": product, "quantity": 1}]});
        let response = self.send(self.http.post(url).json(&body)).await;
        let retry_after = response.headers().get("retry-after").map(|v| v.to_str().unwrap().to_owned());
        (response.status().as_u16(), retry_after)
    }

    /// The status of one of order's probes.
    pub async fn probe(&self, path: &str) -> u16 {
        let url = format!("http://{}{path}", self.order.address());
        self.send(self.http.get(url)).await.status().as_u16()
    }

    /// Asks for an order's cancellation; the status of the answer.
    pub async fn cancel(&self, id: &str) -> u16 {
        let url = format!("http://{}/orders/{id}/cancel", self.order.address());
        self.send(self.http.post(url)).await.status().as_u16()
    }

    async fn get(&self, service: &Running, path: &str) -> Value {
        let url = format!("http://{}{path}", service.address());
        self.send(self.http.get(url).bearer_auth(TOKEN)).await.json().await.unwrap()
    }

    /// What the order service answers its admin.
    pub async fn admin_get(&self, path: &str) -> Value {
        self.get(&self.order, path).await
    }

    /// The same for a change; with the status.
    pub async fn admin_post(&self, path: &str, body: &Value) -> (u16, Value) {
        let url = format!("http://{}{path}", self.order.address());
        let response = self.send(self.http.post(url).bearer_auth(TOKEN).json(body)).await;
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// Asks for a refund of an order; the status and the answer.
    pub async fn refund(&self, id: &str, key: &str, body: &Value) -> (u16, Value) {
        let url = format!("http://{}/orders/{id}/refund", self.order.address());
        let request = self.http.post(url).bearer_auth(TOKEN).header("Idempotency-Key", key).json(body);
        let response = self.send(request).await;
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// An order's refunds.
    pub async fn refunds(&self, id: &str) -> Vec<Value> {
        let page = self.get(&self.order, &format!("/orders/{id}/refunds")).await;
        page["refunds"].as_array().unwrap().clone()
    }

    /// What the payment service answers.
    pub async fn payment_get(&self, path: &str) -> Value {
        self.get(&self.payment, path).await
    }

    /// Every order, cent and piece is accounted for, by the databases' files. What is open is left out of it: the real clock is far beyond
    /// every deadline.
    pub async fn verify(&self) {
        let dir = self.bench.file("");
        let (code, out, err) = consign(&[
            "--data-dir",
            dir.to_str().unwrap(),
            "verify",
            "--settle",
            "2",
            "--grace",
            "1000000000",
        ])
        .await;
        assert_eq!(code, 0, "{out}{err}");
    }

    /// An order.
    pub async fn order(&self, id: &str) -> Value {
        self.get(&self.order, &format!("/orders/{id}")).await
    }

    /// The names on an order's timeline.
    pub async fn timeline(&self, id: &str) -> Vec<String> {
        let timeline = self.get(&self.order, &format!("/orders/{id}/events")).await;
        timeline["events"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e["event"].as_str().unwrap().to_owned())
            .collect()
    }

    /// An order's payment, `null` if there is none.
    pub async fn payment_of(&self, id: &str) -> Value {
        self.get(&self.payment, &format!("/payments?order_id={id}")).await["payments"][0].clone()
    }

    /// On hand and reserved of a product.
    pub async fn stock_of(&self, id: &str) -> (i64, i64) {
        let p = self.get(&self.inventory, &format!("/products/{id}")).await;
        (p["on_hand"].as_i64().unwrap(), p["reserved"].as_i64().unwrap())
    }

    /// Waits, without moving time, until an order has this status.
    pub async fn until(&self, id: &str, status: &str) {
        let look = async || self.order(id).await["status"] == status;
        self.bench.time.until(&format!("order {id} {status}"), look).await;
    }

    /// The same, moving time on up to `limit`.
    pub async fn until_within(&self, limit: Duration, id: &str, status: &str) {
        let look = async || self.order(id).await["status"] == status;
        let what = format!("order {id} {status}");
        self.bench.time.until_within(limit, Duration::from_secs(1), &what, look).await;
    }

    /// Waits until nothing is under way that does not wait for time to pass.
    pub async fn settled(&self) {
        let consumers = [
            ("ORDERS", "inventory-orders"),
            ("ORDERS", "payment-orders"),
            ("INVENTORY", "payment-inventory"),
            ("INVENTORY", "order-inventory"),
            ("PAYMENTS", "order-payments"),
            ("PRODUCTS", "order-products"),
        ];
        let look = async || {
            for (stream, consumer) in consumers {
                for durable in [consumer.to_owned(), format!("{consumer}-express")] {
                    match self.bench.broker.consumer_info(stream, &durable).await {
                        Ok(info) if info.pending == 0 && info.ack_pending == 0 => {}
                        _ => return false,
                    }
                }
            }
            [&self.order, &self.inventory, &self.payment].iter().all(|s| s.db().outbox_depth() == 0)
        };
        self.bench.time.until("everything settled", look).await;
    }

    /// The databases of the services.
    pub fn dbs(&self) -> [&Db; 3] {
        [self.order.db(), self.inventory.db(), self.payment.db()]
    }

    /// The moment by the system's clock.
    pub fn now(&self) -> Timestamp {
        self.bench.time.clock().now()
    }
}

/// The `consign` program that belongs to this test run.
///
/// # Panics
/// If it has not been built; `cargo xtask test` builds it first.
pub fn program() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    while path.file_name().is_none_or(|n| n != "deps") {
        assert!(path.pop(), "tests run from target/…/deps");
    }
    let program = path.with_file_name("consign");
    assert!(
        program.exists(),
        "{} is not there; run `cargo build -p consign-cli`, or `cargo xtask test`",
        program.display()
    );
    program
}

/// `consign up` as a process, in a data directory, on ports of its own.
pub struct Process {
    child: Child,
    pub dir: PathBuf,
    pub order: String,
    pub inventory: String,
    pub payment: String,
    pub token: String,
}

impl Process {
    /// Starts it and waits until orders can be placed.
    pub async fn start(dir: &std::path::Path, set: &[&str]) -> Self {
        let _ = std::fs::remove_file(dir.join("endpoints.json"));
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(dir.with_extension("log")).unwrap();
        let mut command = Command::new(program());
        command.arg("up").arg("--data-dir").arg(dir).kill_on_drop(true).stdout(Stdio::null()).stderr(log);
        for service in ["order", "inventory", "payment"] {
            command.arg("--set").arg(format!("{service}.http.listen=127.0.0.1:0"));
        }
        for set in set {
            command.arg("--set").arg(set);
        }
        let mut child = command.spawn().unwrap();
        let started = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("consign up ended with {status}; see {}", dir.with_extension("log").display());
            }
            let endpoints = std::fs::read(dir.join("endpoints.json")).ok();
            let endpoints: Option<Value> = endpoints.and_then(|b| serde_json::from_slice(&b).ok());
            if let Some(e) = endpoints {
                let url = |name: &str| e[name].as_str().unwrap().to_owned();
                let token = std::fs::read_to_string(dir.join("admin-token")).unwrap();
                return Self {
                    child,
                    dir: dir.to_owned(),
                    order: url("order"),
                    inventory: url("inventory"),
                    payment: url("payment"),
                    token,
                };
            }
            assert!(started.elapsed() < Duration::from_secs(30), "consign up did not start within 30 s");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// kill -9.
    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }

    /// SIGTERM, and how long it took to end.
    pub async fn terminate(mut self) -> Duration {
        let started = Instant::now();
        let pid = self.child.id().unwrap().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
        let status = tokio::time::timeout(Duration::from_secs(20), self.child.wait()).await;
        assert!(status.expect("must end within 20 s").unwrap().success());
        started.elapsed()
    }
}

/// Runs `consign` with these arguments: exit code, standard output, standard error.
pub async fn consign(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(program()).args(args).output().await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}
