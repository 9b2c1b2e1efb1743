//! Accepting orders. Concurrent requests share one transaction: its statements are the same for one order as for a hundred.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use consign::db::GroupCommit;
use consign::event::Cause;
use consign::http::idempotency;
use consign::schema::Fault;
use consign::versions::Published;
use consign::{Db, DbError, Emission, Lane, Tx};
use contracts::{Address, OrderCreatedV1, is_payment_method, is_product_id};
use uuid::Uuid;

use crate::deadline;
use crate::domain::{self, Order, PriceFault, Status, Wanted};
use crate::http::OrderView;
use crate::store::{self, Entry};

/// Under which idempotency keys of HTTP requests are kept.
const OPERATION: &str = "place order";
/// Orders per transaction.
const GROUP: usize = 128;

/// A request to place an order, checked as far as one can without the database.
#[derive(Debug)]
pub struct Request {
    pub order_id: Uuid,
    pub customer_id: String,
    pub wanted: Vec<Wanted>,
    pub lane: Lane,
    pub payment_method: Option<String>,
    pub shipping_address: Option<Address>,
    pub gift_note: Option<String>,
    /// The idempotency key and the fingerprint of the body, if a key was sent.
    pub key: Option<(String, Uuid)>,
    pub cause: Cause,
}

/// What became of it.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Accepted, now or when the key was first used.
    Accepted {
        /// The order.
        id: String,
        /// The body of the answer.
        body: String,
    },
    /// It cannot be priced.
    Refused(Vec<PriceFault>),
    /// The key was used with another body.
    KeyReused,
}

impl Request {
    /// What is wrong with it beyond what its schema says.
    pub fn faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        let mut need = |ok: bool, pointer: &str, detail: &str| {
            if !ok {
                faults.push(Fault { pointer: pointer.to_owned(), detail: detail.to_owned() });
            }
        };
        let id = "1 to 64 of A-Z, a-z, 0-9, '_' and '-'";
        need(is_product_id(&self.customer_id), "/customer_id", id);
        let token = self.payment_method.as_deref();
        need(
            token.is_none_or(is_payment_method),
            "/payment_method",
            "the payment gateway's token, 1 to 255 of A-Z, a-z, 0-9, '_' and '-'; a card number must never come here",
        );
        let country = self.shipping_address.as_ref().map(|a| a.country.as_bytes());
        need(
            country.is_none_or(|c| c.iter().all(u8::is_ascii_uppercase)),
            "/shipping_address/country",
            "ISO 3166-1 alpha-2: two capital letters, for example DE",
        );
        for (i, w) in self.wanted.iter().enumerate() {
            need(is_product_id(&w.product_id), &format!("/items/{i}/product_id"), id);
        }
        faults
    }
}

pub type Acceptor = GroupCommit<Request, Answer>;

/// Starts the task that accepts orders on this database.
pub fn acceptor(db: Db, terms: Terms) -> Acceptor {
    GroupCommit::start(db, GROUP, Accept(terms))
}

/// What holds for all orders.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Unpaid for so long, an order is cancelled.
    pub deadline: Duration,
    /// In which versions `orders.created` is published.
    pub created: Published,
}

struct Accept(Terms);

impl<'a> consign::db::Work<'a, Request, Answer> for Accept {
    type Future = Pin<Box<dyn Future<Output = Result<Vec<Answer>, DbError>> + Send + 'a>>;
    fn call(&self, tx: &'a mut Tx, group: &'a [Request]) -> Self::Future {
        let terms = self.0.clone();
        Box::pin(async move { accept(tx, OPERATION, group, &terms).await })
    }
}

/// Accepts a group of orders; idempotency keys are those of `operation`.
pub async fn accept(
    tx: &mut Tx,
    operation: &str,
    group: &[Request],
    terms: &Terms,
) -> Result<Vec<Answer>, DbError> {
    let versions = terms.created.now();
    let keys: Vec<&str> = group.iter().filter_map(|r| r.key.as_ref().map(|(k, _)| k.as_str())).collect();
    let mut known: HashMap<String, (Uuid, Answer)> = idempotency::lookup(tx, operation, &keys)
        .await?
        .into_iter()
        .map(|(key, r)| {
            let id = serde_json::from_str::<serde_json::Value>(&r.answer)
                .ok()
                .and_then(|v| v["id"].as_str().map(str::to_owned))
                .unwrap_or_default();
            (key, (r.fingerprint, Answer::Accepted { id, body: r.answer }))
        })
        .collect();
    let products: BTreeSet<&str> =
        group.iter().flat_map(|r| r.wanted.iter().map(|w| &*w.product_id)).collect();
    let prices = store::prices(tx, &products.into_iter().collect::<Vec<_>>()).await?;
    let now = tx.now();
    let mut orders = Vec::with_capacity(group.len());
    let mut entries = Vec::with_capacity(group.len());
    let mut recorded = Vec::new();
    let mut answers = Vec::with_capacity(group.len());
    for r in group {
        if let Some((fingerprint, answer)) = r.key.as_ref().and_then(|(k, _)| known.get(k)) {
            let same = r.key.as_ref().is_some_and(|(_, f)| f == fingerprint);
            answers.push(if same { answer.clone() } else { Answer::KeyReused });
            continue;
        }
        let priced = match domain::price(&r.wanted, &prices) {
            Ok(priced) => priced,
            Err(faults) => {
                answers.push(Answer::Refused(faults));
                continue;
            }
        };
        let order = Order {
            id: r.order_id,
            customer_id: r.customer_id.clone(),
            status: Status::Pending,
            reason: None,
            lane: r.lane,
            currency: priced.currency,
            total: priced.total,
            items: priced.items,
            payment_id: None,
            payment_method: r.payment_method.clone(),
            shipping_address: r.shipping_address.clone(),
            gift_note: r.gift_note.clone(),
            refunding: 0,
            refunded: 0,
            correlation_id: r.cause.correlation_id.to_string(),
            version: 1,
            created_at: now,
            updated_at: now,
            deadline: now + terms.deadline,
        };
        let emission = Emission::new(order.created(), order.id.to_string(), 1)
            .also(|new| OrderCreatedV1::from(new))
            .versions(&versions)
            .lane(r.lane)
            .caused_by(r.cause.clone());
        let event_id = tx.emit(emission).map_err(|e| DbError::Sql(sqlx::Error::Encode(Box::new(e))))?;
        deadline::schedule(tx, &order, r.cause.clone())?;
        entries.push(Entry {
            order_id: order.id,
            version: 1,
            event: "orders.created".into(),
            detail: None,
            event_id: Some(event_id),
        });
        let body = serde_json::to_string(&OrderView::from(order.clone()))
            .map_err(|e| DbError::Sql(sqlx::Error::Encode(Box::new(e))))?;
        let answer = Answer::Accepted { id: order.id.to_string(), body: body.clone() };
        if let Some((key, fingerprint)) = &r.key {
            recorded.push((key.as_str(), *fingerprint, body));
            known.insert(key.clone(), (*fingerprint, answer.clone()));
        }
        answers.push(answer);
        orders.push(order);
    }
    store::insert(tx, &orders).await?;
    store::append(tx, &entries).await?;
    idempotency::record(tx, operation, &recorded).await?;
    Ok(answers)
}
