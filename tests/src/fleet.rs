//! The services as processes of their own, two replicas of each, on real servers: what faults are tried on.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use consign::testing::servers::{NatsServer, PostgresServer};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

use crate::{TOKEN, program};

pub const SERVICES: [&str; 3] = ["order", "inventory", "payment"];

/// One process of one service.
pub struct Replica {
    pub service: &'static str,
    child: Child,
    pub url: String,
}

/// Three services in replicas, on NATS and PostgreSQL.
pub struct Fleet {
    pub nats: Vec<NatsServer>,
    pub postgres: PostgresServer,
    databases: BTreeMap<&'static str, String>,
    settings: Vec<(String, String)>,
    pub replicas: Vec<Replica>,
    logs: PathBuf,
    http: reqwest::Client,
    loads: AtomicUsize,
}

/// Each load has numbers, and with them idempotency keys, of its own.
const NUMBERS: usize = 1_000_000;

impl Fleet {
    /// `replicas` of each, on these NATS servers; with 1000 of each of ten products in stock. In settings, `{service}` is its name; one called
    /// `order:NAME` is for that service alone.
    pub async fn start(nats: Vec<NatsServer>, replicas: usize, settings: &[(&str, &str)]) -> Self {
        let postgres = tokio::task::block_in_place(PostgresServer::start);
        Self::start_on(nats, postgres, replicas, settings).await
    }

    /// The same, on this PostgreSQL server.
    pub async fn start_on(
        nats: Vec<NatsServer>,
        postgres: PostgresServer,
        replicas: usize,
        settings: &[(&str, &str)],
    ) -> Self {
        let databases = SERVICES.iter().map(|s| (*s, postgres.database(s))).collect();
        let logs = std::env::temp_dir().join(format!("consign-fleet-{}", std::process::id()));
        std::fs::create_dir_all(&logs).unwrap();
        let http = reqwest::Client::builder().timeout(Duration::from_secs(10)).build().unwrap();
        let settings = settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let mut fleet = Self {
            nats,
            postgres,
            databases,
            settings,
            replicas: Vec::new(),
            logs,
            http,
            loads: AtomicUsize::new(1),
        };
        for _ in 0..replicas {
            for service in ["inventory", "payment", "order"] {
                fleet.add(service).await;
            }
        }
        fleet.seed().await;
        fleet
    }

    /// Starts one more replica, and waits until it is ready.
    pub async fn add(&mut self, service: &'static str) {
        let urls: Vec<String> = self.nats.iter().map(NatsServer::url).collect();
        let n = self.replicas.len();
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.logs.join(format!("{service}.log")))
            .unwrap();
        let mut command = Command::new(program().with_file_name(format!("consign-{service}")));
        command
            .env("CONSIGN_BROKER", "nats")
            .env("CONSIGN_NATS__URLS", format!("{urls:?}"))
            .env("CONSIGN_DATABASE", "postgres")
            .env("CONSIGN_POSTGRES__URL", &self.databases[service])
            .env("CONSIGN_SERVICE__HTTP__LISTEN", "127.0.0.1:0")
            .env("CONSIGN_SERVICE__HTTP__ADMIN_TOKEN", TOKEN)
            .envs(self.settings.iter().filter_map(|(k, v)| {
                let name = match k.split_once(':') {
                    Some((only, name)) if only == service => name,
                    Some(_) => return None,
                    None => k,
                };
                Some((name, v.replace("{service}", service).replace("{SERVICE}", &service.to_uppercase())))
            }))
            .kill_on_drop(true)
            .stdout(Stdio::piped())
            .stderr(log);
        let mut child = command.spawn().unwrap_or_else(|e| panic!("consign-{service}: {e}; build it first"));
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = tokio::time::timeout(Duration::from_secs(30), lines.next_line()).await;
        let line = first.expect("ready within 30 s").unwrap();
        let line = line.unwrap_or_else(|| panic!("{service} ended; see {}", self.logs.display()));
        let url = line.split_whitespace().last().unwrap().to_owned();
        assert!(url.starts_with("http://"), "{line}, replica {n}");
        self.replicas.push(Replica { service, child, url });
    }

    /// Changes a setting for replicas that are started from now on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.settings.retain(|(n, _)| n != name);
        self.settings.push((name.to_owned(), value.to_owned()));
    }

    /// Replaces each replica of a service by a new one, one after the other, as a rolling deployment does.
    pub async fn roll(&mut self, service: &'static str, load: &Load) {
        for _ in 0..self.urls(service).len() {
            self.add(service).await;
            load.replicas(self);
            self.terminate(service).await;
            load.replicas(self);
        }
    }

    /// Runs a command of `consign` that asks the services.
    pub async fn consign(&self, args: &[&str]) -> (i32, String, String) {
        let [order, inventory, payment] = SERVICES.map(|s| self.urls(s).join(","));
        let urls = ["--order-url", &order, "--inventory-url", &inventory, "--payment-url", &payment];
        crate::consign(&[args, &urls, &["--admin-token", TOKEN]].concat()).await
    }

    /// The base URLs of a service's replicas.
    pub fn urls(&self, service: &str) -> Vec<String> {
        self.replicas.iter().filter(|r| r.service == service).map(|r| r.url.clone()).collect()
    }

    async fn seed(&self) {
        let inventory = &self.urls("inventory")[0];
        for n in 0..10 {
            let body = json!({"name": format!("product {n}"), "price": 100 + n, "currency": "EUR"});
            let url = format!("{inventory}/products/p{n}");
            let put = self.http.put(url).bearer_auth(TOKEN).json(&body).send().await.unwrap();
            assert!(put.status().is_success(), "{}", put.text().await.unwrap());
            let url = format!("{inventory}/products/p{n}/stock");
            let body = json!({"delta": 1000, "reason": "test"});
            let request =
                self.http.post(url).bearer_auth(TOKEN).header("Idempotency-Key", format!("seed-{n}"));
            assert!(request.json(&body).send().await.unwrap().status().is_success());
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.try_place(&self.urls("order")[0], "probe").await.is_none() {
            assert!(Instant::now() < deadline, "the products never reached the order service");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn try_place(&self, order: &str, key: &str) -> Option<String> {
        place(&self.http, order, key, 9, "standard").await
    }

    /// Kills the first replica of a service with -9.
    pub async fn kill(&mut self, service: &str) {
        let at = self.replicas.iter().position(|r| r.service == service).expect("a replica to kill");
        let mut replica = self.replicas.remove(at);
        replica.child.kill().await.unwrap();
    }

    /// Sends a signal to the first replica of a service.
    pub async fn signal(&self, service: &str, signal: &str) {
        let replica = self.replicas.iter().find(|r| r.service == service).expect("a replica to signal");
        let pid = replica.child.id().unwrap().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().await.unwrap().success());
    }

    /// Asks the first replica of a service to end, and waits until it has; how long that took.
    pub async fn terminate(&mut self, service: &str) -> Duration {
        let at = self.replicas.iter().position(|r| r.service == service).expect("a replica to end");
        self.signal(service, "-TERM").await;
        let started = Instant::now();
        let mut replica = self.replicas.remove(at);
        let status = tokio::time::timeout(Duration::from_secs(29), replica.child.wait()).await;
        assert!(status.expect("well below Kubernetes' 30 s").unwrap().success());
        started.elapsed()
    }

    /// Places orders, so many a second, until stopped.
    pub fn load(&self, per_second: u32) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let orders = Arc::new(Mutex::new(self.urls("order")));
        let first = self.loads.fetch_add(1, Ordering::Relaxed) * NUMBERS;
        let run = {
            let (stop, orders, http) = (Arc::clone(&stop), Arc::clone(&orders), self.http.clone());
            tokio::spawn(async move {
                let mut placing = JoinSet::new();
                let mut ids = Vec::new();
                let mut tick = tokio::time::interval(Duration::from_secs(1) / per_second);
                for n in first.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    tick.tick().await;
                    let (orders, http) = (Arc::clone(&orders), http.clone());
                    let lane = if n % 4 == 0 { "express" } else { "standard" };
                    placing.spawn(async move { place_surely(&http, &orders, n, lane).await });
                    while let Some(done) = placing.try_join_next() {
                        ids.push(done.unwrap());
                    }
                }
                ids.extend(placing.join_all().await);
                ids
            })
        };
        Load { stop, orders, run }
    }

    /// Places `count` orders on a lane, each accepted: all at once, or one every so often. Their ids.
    pub async fn place_many(
        &self,
        first: usize,
        count: usize,
        lane: &'static str,
        every: Duration,
    ) -> Vec<String> {
        let orders = Arc::new(Mutex::new(self.urls("order")));
        let mut placing = JoinSet::new();
        let mut ids = Vec::new();
        for n in first..first + count {
            let (http, orders) = (self.http.clone(), Arc::clone(&orders));
            placing.spawn(async move { place_surely(&http, &orders, n, lane).await });
            if every.is_zero() {
                if placing.len() >= 128 {
                    ids.extend(placing.join_next().await.map(Result::unwrap));
                }
            } else {
                tokio::time::sleep(every).await;
            }
        }
        ids.extend(placing.join_all().await);
        ids
    }

    /// Places an order of so many pieces of a product with one replica of order, and waits until it is confirmed. Its id.
    pub async fn buy(&self, product: &str, quantity: u32) -> String {
        let url = format!("{}/orders", self.urls("order")[0]);
        let body = json!({"customer_id": "ada", "items": [{"product_id": product, "quantity": quantity}]});
        let answer = self.http.post(&url).json(&body).send().await.unwrap();
        assert_eq!(answer.status(), 202);
        let id = answer.json::<Value>().await.unwrap()["id"].as_str().unwrap().to_owned();
        let confirmed: Value =
            self.http.get(format!("{url}/{id}?wait=5")).send().await.unwrap().json().await.unwrap();
        assert_eq!(confirmed["status"], "confirmed", "{confirmed}");
        id
    }

    /// Asks a replica of order for a refund of one piece; the status of the answer.
    pub async fn refund_one(&self, order: &str, id: &str, product: &str, key: &str) -> u16 {
        let body = json!({"lines": [{"product_id": product, "quantity": 1}]});
        let request = self.http.post(format!("{order}/orders/{id}/refund")).bearer_auth(TOKEN);
        let answer = request.header("Idempotency-Key", key).json(&body).send().await.unwrap();
        answer.status().as_u16()
    }

    /// What the order service tells of an order.
    pub async fn order(&self, id: &str) -> Value {
        let url = format!("{}/orders/{id}", self.urls("order")[0]);
        self.http.get(url).send().await.unwrap().json().await.unwrap()
    }

    /// Waits until every one of these orders has ended.
    ///
    /// # Panics
    /// After `limit`.
    pub async fn all_end(&self, ids: &[String], limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut open: Vec<&String> = ids.iter().collect();
        while !open.is_empty() {
            let order = &self.urls("order")[0];
            let mut still = Vec::new();
            for id in open {
                let asked = self.http.get(format!("{order}/orders/{id}")).send().await;
                let status = match asked {
                    Ok(answer) => {
                        answer.json::<Value>().await.map(|o| o["status"].clone()).unwrap_or_default()
                    }
                    Err(_) => Value::Null,
                };
                if status != "confirmed" && status != "cancelled" {
                    still.push(id);
                }
            }
            open = still;
            assert!(
                Instant::now() < deadline || open.is_empty(),
                "{} of {} orders have not ended within {limit:?}, for example {}; logs in {}",
                open.len(),
                ids.len(),
                open[0],
                self.logs.display()
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Every order, cent and piece is accounted for, and nothing is dead. What a process that was killed had in hand comes again after
    /// AckWait, so that much is waited for.
    pub async fn verify(&self) {
        let [order, inventory, payment] = SERVICES.map(|s| self.databases[s].as_str());
        let (code, out, err) = crate::consign(&[
            "verify",
            "--settle",
            "40",
            "--order-db",
            order,
            "--inventory-db",
            inventory,
            "--payment-db",
            payment,
        ])
        .await;
        assert_eq!(code, 0, "{out}{err}; logs in {}", self.logs.display());
    }

    /// Sets the share of calls to the simulated gateway that bring no answer, half of them after they took effect, in every replica.
    pub async fn gateway(&self, failure_rate: f64) {
        self.set_gateway(&json!({"error_rate": failure_rate / 2.0, "lost_answer_rate": failure_rate / 2.0}))
            .await;
    }

    /// Sets how the simulated gateway behaves, in every replica; what is not named is as by default.
    pub async fn set_gateway(&self, knobs: &Value) {
        for url in self.urls("payment") {
            let put =
                self.http.put(format!("{url}/gateway")).bearer_auth(TOKEN).json(knobs).send().await.unwrap();
            assert!(put.status().is_success(), "{}", put.text().await.unwrap());
        }
    }

    /// Waits until no charge and no refund is under way.
    ///
    /// # Panics
    /// After `limit`.
    pub async fn until_nothing_is_stuck(&self, limit: Duration) {
        let (started, url) =
            (Instant::now(), format!("{}/payments/stuck?after_seconds=0", self.urls("payment")[0]));
        loop {
            let page: Value = self.http.get(&url).send().await.unwrap().json().await.unwrap();
            if page["stuck"].as_array().unwrap().is_empty() {
                return;
            }
            assert!(started.elapsed() < limit, "not within {limit:?}: {page}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// What a count in a service's database comes to.
    pub async fn count(&self, service: &str, sql: &'static str) -> i64 {
        let mut conn = PgConnection::connect(&self.databases[service]).await.unwrap();
        let count = sqlx::query_scalar(sql).fetch_one(&mut conn).await.unwrap();
        conn.close().await.unwrap();
        count
    }

    /// Has each service compare its outbox with the streams; their reports.
    pub async fn reconcile(&self) -> Vec<Value> {
        let mut reports = Vec::new();
        for service in SERVICES {
            let url = format!("{}/admin/reconcile", self.urls(service)[0]);
            let answer = self.http.post(url).bearer_auth(TOKEN).send().await.unwrap();
            assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
            reports.push(answer.json().await.unwrap());
        }
        reports
    }

    /// What a service tells Prometheus.
    pub async fn metrics(&self, service: &str) -> String {
        let url = format!("{}/metrics", self.urls(service)[0]);
        self.http.get(url).send().await.unwrap().text().await.unwrap()
    }

    /// What a service says of its health.
    pub async fn health(&self, service: &str) -> Value {
        let url = format!("{}/health", self.urls(service)[0]);
        self.http.get(url).send().await.unwrap().json().await.unwrap()
    }
}

/// Orders being placed.
pub struct Load {
    stop: Arc<AtomicBool>,
    orders: Arc<Mutex<Vec<String>>>,
    run: tokio::task::JoinHandle<Vec<String>>,
}

impl Load {
    /// Tells it which replicas there are now.
    pub fn replicas(&self, fleet: &Fleet) {
        *self.orders.lock().unwrap() = fleet.urls("order");
    }

    /// No more orders; the ids of all that were accepted.
    pub async fn stop(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        let ids = self.run.await.unwrap();
        assert!(!ids.is_empty());
        ids
    }
}

/// An order of one piece; its id, if it was accepted.
async fn place(http: &reqwest::Client, order: &str, key: &str, n: usize, lane: &str) -> Option<String> {
    let body = json!({
        "customer_id": "ada", "lane": lane,
        "items": [{"product_id": format!("p{}", n % 10), "quantity": 1}],
    });
    let request = http.post(format!("{order}/orders")).header("Idempotency-Key", key).json(&body);
    let answer = request.send().await.ok()?;
    if answer.status() != 202 {
        return None;
    }
    answer.json::<Value>().await.ok()?["id"].as_str().map(str::to_owned)
}

/// Tries until it is accepted, by whichever replica answers, always with the same key.
async fn place_surely(http: &reqwest::Client, orders: &Mutex<Vec<String>>, n: usize, lane: &str) -> String {
    let key = format!("order-{n}");
    for attempt in 0_usize.. {
        let order = {
            let orders = orders.lock().unwrap();
            orders[(n + attempt) % orders.len()].clone()
        };
        if let Some(id) = place(http, &order, &key, n, lane).await {
            return id;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    unreachable!("it tries for ever")
}
