//! `consign up`: every service in one process, on the embedded broker and SQLite files, with nothing else installed.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use consign::Clock;
use consign::broker::Broker;
use consign::broker::embedded::EmbeddedBroker;
use consign::handler::BoxError;
use consign::process::{DRAIN, DataDir, stop_signal};
use consign::service::Running;
use consign::telemetry;
use contracts::streams::PRODUCTS;
use payment::Outside;
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};

use crate::client::Client;
use crate::config::{Config, Endpoints};

/// The demo catalogue: id, name, price in cents.
const DEMO: [(&str, &str, i64); 5] = [
    ("coffee", "Coffee beans, 1 kg", 1_890),
    ("grinder", "Hand grinder", 7_900),
    ("kettle", "Gooseneck kettle", 5_450),
    ("scale", "Scale, 0.1 g", 3_200),
    ("filter", "Paper filters, 100", 690),
];
const DEMO_STOCK: i64 = 1_000_000;

/// The three services on one broker.
pub struct System {
    broker: Arc<EmbeddedBroker>,
    services: Vec<Running>,
    outside: Outside,
    /// Where they listen.
    pub endpoints: Endpoints,
    /// What admins need.
    pub admin_token: String,
}

impl System {
    /// Starts everything in a data directory.
    pub async fn start(mut config: Config, dir: &DataDir) -> Result<Self, BoxError> {
        let (token, _) = dir.admin_token()?;
        for http in [&mut config.order.http, &mut config.inventory.http, &mut config.payment.http] {
            http.admin_token.get_or_insert_with(|| token.clone());
        }
        let admin_token =
            config.inventory.http.admin_token.as_ref().map_or("", |t| t.expose_secret()).to_owned();
        let clock = Clock::system();
        let embedded = Arc::new(EmbeddedBroker::open(&dir.file("broker.db"), clock.clone()).await?);
        let broker = || Arc::clone(&embedded) as Arc<dyn Broker>;
        let order_db = order::open(&dir.file("order.db"), clock.clone()).await?;
        let inventory_db = inventory::open(&dir.file("inventory.db"), clock.clone()).await?;
        let payment_db = payment::open(&dir.file("payment.db"), clock.clone()).await?;
        let outside = Outside::open(&config.payment.gateway, &dir.file("gateway.db"), clock).await?;
        let inventory = inventory::service(&config.inventory, inventory_db, broker());
        let payment = payment::service(&config.payment, payment_db, broker(), outside.clone());
        let order = order::service(&config.order, order_db, broker());
        for service in [&inventory, &payment, &order] {
            service.provision().await?;
        }
        let (inventory, payment, order) =
            (inventory.start().await?, payment.start().await?, order.start().await?);
        let url = |r: &Running| format!("http://{}", r.address());
        let endpoints = Endpoints { order: url(&order), inventory: url(&inventory), payment: url(&payment) };
        Ok(Self {
            broker: embedded,
            services: vec![order, payment, inventory],
            outside,
            endpoints,
            admin_token,
        })
    }

    /// Makes the demo products if there are none, and waits until orders can be placed.
    pub async fn seed_demo(&self) -> Result<(), BoxError> {
        let inventory = Client::new(&self.endpoints.inventory, Some(self.admin_token.clone()));
        let products: Value = inventory.get("/products?limit=1").await?;
        if products["products"].as_array().is_none_or(|p| !p.is_empty()) {
            return Ok(());
        }
        for (id, name, price) in DEMO {
            let product = json!({"name": name, "price": price, "currency": "EUR"});
            let put = inventory.request(Method::PUT, &format!("/products/{id}")).json(&product);
            inventory.send::<Value>(put).await?;
            let stock = json!({"delta": DEMO_STOCK, "reason": "demo"});
            let post = inventory.request(Method::POST, &format!("/products/{id}/stock"));
            inventory
                .send::<Value>(post.header("Idempotency-Key", format!("demo-{id}")).json(&stock))
                .await?;
        }
        Ok(())
    }

    /// Waits until the order service knows every product that inventory has, so that the first order is not refused.
    pub async fn until_orders_can_be_placed(&self) -> Result<(), BoxError> {
        let info = || async {
            let stream = self.broker.stream_info(PRODUCTS).await?;
            let consumer = self.broker.consumer_info(PRODUCTS, "order-products").await;
            Ok::<_, BoxError>(
                matches!(consumer, Ok(c) if c.pending == 0 && c.ack_pending == 0 && c.delivered >= stream.last_sequence),
            )
        };
        for _ in 0..500 {
            let pending =
                self.services.iter().any(|s| s.db().outbox_depth() > 0 && s.name() == inventory::NAME);
            if !pending && info().await? {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err("the order service did not learn the products within 5 s; see its log".into())
    }

    /// Drains all services at the same time, then closes what they used.
    pub async fn stop(self) {
        let mut stopping = tokio::task::JoinSet::new();
        for service in self.services {
            stopping.spawn(service.shutdown(DRAIN));
        }
        stopping.join_all().await;
        self.outside.close().await;
        self.broker.close().await;
    }
}

/// Runs until asked to stop.
pub async fn run(config: Config) -> Result<(), BoxError> {
    telemetry::init_logs(&config.log)?;
    telemetry::metrics();
    let dir = DataDir::claim(&config.data_dir)?;
    let demo = config.demo;
    let data_dir = std::path::absolute(&config.data_dir)?;
    let system = System::start(config, &dir).await?;
    if demo {
        system.seed_demo().await?;
    }
    system.until_orders_can_be_placed().await?;
    // Whoever looks for a running system finds it only now that everything works.
    std::fs::write(dir.file(Endpoints::FILE), serde_json::to_vec_pretty(&system.endpoints)?)?;
    print_welcome(&system, &data_dir.display().to_string());
    stop_signal().await;
    let _ = writeln!(std::io::stderr(), "draining; Ctrl-C again stops at once");
    tokio::select! {
        () = system.stop() => {}
        () = stop_signal() => {}
    }
    Ok(())
}

fn print_welcome(system: &System, data_dir: &str) {
    let Endpoints { order, inventory, payment } = &system.endpoints;
    // Nobody may be there to read it.
    let _ = writeln!(
        std::io::stdout(),
        "
Consign is up: broker and databases are embedded, nothing else is needed.

  order      {order}      API and a page to try it: {order}/docs
  inventory  {inventory}      {inventory}/docs
  payment    {payment}      {payment}/docs
  data       {data_dir}
  admin      {token}  (in {data_dir}/admin-token)

Try it:

  curl -s {inventory}/products
  curl -s {order}/orders -H 'Content-Type: application/json' -d '{{\"customer_id\":\"ada\",\"items\":[{{\"product_id\":\"coffee\",\"quantity\":2}}]}}'
  curl -s '{order}/orders?customer_id=ada&limit=1&wait=5'

Ctrl-C stops it in order; killed, it carries on at the next start.",
        token = system.admin_token,
    );
}
