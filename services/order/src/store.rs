//! Order's SQL. Each function is one statement, however many rows.

use std::collections::HashMap;

use consign::db::{Json, Row};
use consign::{Db, DbError, EventId, Timestamp, Tx};
use uuid::Uuid;

use crate::domain::{Order, Price, Status};
use crate::refunds::{Progress, Refund};

fn order(row: &Row) -> Result<Order, DbError> {
    Ok(Order {
        id: row.get("id")?,
        customer_id: row.get("customer_id")?,
        status: Status::parse(&row.get::<String>("status")?)
            .ok_or_else(|| sqlx::Error::Decode("an unknown status of an order".into()))?,
        reason: row.get("reason")?,
        lane: row.parse("lane")?,
        currency: row.get("currency")?,
        total: row.get("total")?,
        items: row.get::<Json<_>>("items")?.0,
        payment_id: row.get("payment_id")?,
        payment_method: row.get("payment_method")?,
        shipping_address: row.get::<Option<Json<_>>>("shipping_address")?.map(|json| json.0),
        gift_note: row.get("gift_note")?,
        refunding: row.get("refunding")?,
        refunded: row.get("refunded")?,
        correlation_id: row.get("correlation_id")?,
        version: row.get("version")?,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
        deadline: row.get("deadline")?,
    })
}

pub async fn insert(tx: &mut Tx, orders: &[Order]) -> Result<(), DbError> {
    if orders.is_empty() {
        return Ok(());
    }
    let rows = orders.iter().map(|o| {
        (
            o.id,
            &*o.customer_id,
            o.lane.as_str(),
            &*o.currency,
            o.total,
            Json(o.items.clone()),
            &*o.correlation_id,
            o.created_at,
            o.deadline,
            o.payment_method.as_deref(),
            o.shipping_address.clone().map(Json),
            o.gift_note.as_deref(),
        )
    });
    tx.query(
        "INSERT INTO orders (id, customer_id, status, lane, currency, total, items, correlation_id, version, created_at,
             updated_at, deadline, payment_method, shipping_address, gift_note)
         SELECT id, customer_id, 'pending', lane, currency, total, items, correlation_id, 1, created_at, created_at, deadline,
             payment_method, shipping_address, gift_note
         FROM {$1: id, customer_id, lane, currency, total, items, correlation_id, created_at, deadline, payment_method,
             shipping_address, gift_note}",
    )
    .rows(rows)
    .execute()
    .await?;
    Ok(())
}

/// Orders by id. Until the transaction ends nobody else changes them.
pub async fn load(tx: &mut Tx, ids: &[Uuid]) -> Result<HashMap<Uuid, Order>, DbError> {
    let rows = tx
        .query("SELECT * FROM orders WHERE id IN (SELECT i FROM {$1: i}) ORDER BY id {lock}")
        .rows(ids.iter().map(|id| (*id,)))
        .fetch_all()
        .await?;
    rows.iter().map(|r| order(r).map(|o| (o.id, o))).collect()
}

/// Writes orders that moved on, guarded by the version they had: the count of rows that were still as they were.
pub async fn update(tx: &mut Tx, changed: &[(u64, &Order)]) -> Result<u64, DbError> {
    if changed.is_empty() {
        return Ok(0);
    }
    let rows = changed.iter().map(|(was, o)| {
        let (status, reason) = (o.status.as_str(), o.reason.as_deref());
        (o.id, *was, o.version, status, reason, o.payment_id, o.refunding, o.refunded, o.deadline)
    });
    let now = tx.now();
    tx.query(
        "UPDATE orders SET version = r.new_version, status = r.new_status, reason = r.new_reason, payment_id = r.new_payment,
             refunding = r.new_refunding, refunded = r.new_refunded, deadline = r.new_deadline, updated_at = $1
         FROM {$2: order_id, was, new_version, new_status, new_reason, new_payment, new_refunding, new_refunded, new_deadline}
         WHERE orders.id = r.order_id AND version = r.was",
    )
    .bind(now)
    .rows(rows)
    .execute()
    .await
}

/// An entry of an order's timeline to be.
#[derive(Debug)]
pub struct Entry {
    pub order_id: Uuid,
    pub version: u64,
    pub event: String,
    pub detail: Option<String>,
    pub event_id: Option<EventId>,
}

pub async fn append(tx: &mut Tx, entries: &[Entry]) -> Result<(), DbError> {
    if entries.is_empty() {
        return Ok(());
    }
    let rows =
        entries.iter().map(|e| (e.order_id, e.version, e.event.as_str(), e.detail.as_deref(), e.event_id));
    let now = tx.now();
    tx.query(
        "INSERT INTO timeline (order_id, version, event, detail, event_id, at)
         SELECT order_id, version, event, detail, event_id, $1 FROM {$2: order_id, version, event, detail, event_id}",
    )
    .bind(now)
    .rows(rows)
    .execute()
    .await?;
    Ok(())
}

pub async fn prices(tx: &mut Tx, products: &[&str]) -> Result<HashMap<String, Price>, DbError> {
    let rows = tx
        .query("SELECT id, price, currency FROM products WHERE id IN (SELECT i FROM {$1: i})")
        .rows(products.iter().map(|id| (*id,)))
        .fetch_all()
        .await?;
    rows.iter()
        .map(|r| Ok((r.get("id")?, Price { amount: r.get("price")?, currency: r.get("currency")? })))
        .collect()
}

/// Takes over products that are newer than our copy; each at most once, for a statement can change a row only once.
pub async fn save_products(tx: &mut Tx, products: &[&contracts::ProductChanged]) -> Result<(), DbError> {
    let rows = products
        .iter()
        .map(|p| (p.product_id.as_str(), p.name.as_str(), p.price, p.currency.as_str(), p.version));
    tx.query(
        "INSERT INTO products (id, name, price, currency, version)
         SELECT id, name, price, currency, version FROM {$1: id, name, price, currency, version} WHERE true
         ON CONFLICT (id) DO UPDATE SET name = excluded.name, price = excluded.price, currency = excluded.currency,
             version = excluded.version WHERE excluded.version > products.version",
    )
    .rows(rows)
    .execute()
    .await?;
    Ok(())
}

pub async fn find(db: &Db, id: Uuid) -> Result<Option<Order>, DbError> {
    let row = db.query("SELECT * FROM orders WHERE id = $1").bind(id).fetch_optional().await?;
    row.as_ref().map(order).transpose()
}

/// Orders below `before`, the newest first.
pub async fn list(
    db: &Db,
    customer: Option<&str>,
    status: Option<Status>,
    before: Option<Uuid>,
    limit: u32,
) -> Result<Vec<Order>, DbError> {
    let before = before.unwrap_or(Uuid::max());
    let status = status.map(Status::as_str);
    // One statement per shape, so that each uses its index.
    let query = match (customer, status) {
        (None, None) => db.query("SELECT * FROM orders WHERE id < $1 ORDER BY id DESC LIMIT $2"),
        (Some(customer), None) => db
            .query("SELECT * FROM orders WHERE customer_id = $1 AND id < $2 ORDER BY id DESC LIMIT $3")
            .bind(customer),
        (None, Some(status)) => {
            db.query("SELECT * FROM orders WHERE status = $1 AND id < $2 ORDER BY id DESC LIMIT $3").bind(status)
        }
        (Some(customer), Some(status)) => db
            .query("SELECT * FROM orders WHERE customer_id = $1 AND status = $2 AND id < $3 ORDER BY id DESC LIMIT $4")
            .bind(customer)
            .bind(status),
    };
    let rows = query.bind(before).bind(limit).fetch_all().await?;
    rows.iter().map(order).collect()
}

/// An entry of an order's timeline.
#[derive(Debug)]
pub struct StoredEntry {
    pub version: u64,
    pub event: String,
    pub detail: Option<String>,
    pub event_id: Option<EventId>,
    pub at: Timestamp,
}

pub async fn timeline(db: &Db, id: Uuid) -> Result<Vec<StoredEntry>, DbError> {
    let rows =
        db.query("SELECT * FROM timeline WHERE order_id = $1 ORDER BY version").bind(id).fetch_all().await?;
    rows.iter()
        .map(|r| {
            Ok(StoredEntry {
                version: r.get("version")?,
                event: r.get("event")?,
                detail: r.get("detail")?,
                event_id: r.get("event_id")?,
                at: r.get("at")?,
            })
        })
        .collect()
}

fn refund(row: &Row) -> Result<Refund, DbError> {
    Ok(Refund {
        id: row.get("id")?,
        order_id: row.get("order_id")?,
        amount: row.get("amount")?,
        lines: row.get::<Json<_>>("lines")?.0,
        restock: row.get("restock")?,
        reason: row.get("reason")?,
        progress: Progress::parse(&row.get::<String>("status")?)
            .ok_or_else(|| sqlx::Error::Decode("an unknown status of a refund".into()))?,
        rejection: row.get("rejection")?,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

/// Refunds by id. Their orders are to be loaded first: those are what is locked.
pub async fn load_refunds(tx: &mut Tx, ids: &[Uuid]) -> Result<HashMap<Uuid, Refund>, DbError> {
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = tx
        .query("SELECT * FROM refunds WHERE id IN (SELECT i FROM {$1: i})")
        .rows(ids.iter().map(|id| (*id,)))
        .fetch_all()
        .await?;
    rows.iter().map(|r| refund(r).map(|r| (r.id, r))).collect()
}

/// All refunds of an order that the transaction has locked, the oldest first.
pub async fn refunds_of(tx: &mut Tx, order: Uuid) -> Result<Vec<Refund>, DbError> {
    let rows =
        tx.query("SELECT * FROM refunds WHERE order_id = $1 ORDER BY id").bind(order).fetch_all().await?;
    rows.iter().map(refund).collect()
}

/// The refunds of an order, the oldest first.
pub async fn list_refunds(db: &Db, order: Uuid) -> Result<Vec<Refund>, DbError> {
    let rows =
        db.query("SELECT * FROM refunds WHERE order_id = $1 ORDER BY id").bind(order).fetch_all().await?;
    rows.iter().map(refund).collect()
}

pub async fn insert_refund(tx: &mut Tx, r: &Refund) -> Result<(), DbError> {
    tx.query(
        "INSERT INTO refunds (id, order_id, amount, lines, restock, reason, status, created_at, updated_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)",
    )
    .bind(r.id)
    .bind(r.order_id)
    .bind(r.amount)
    .bind(Json(r.lines.clone()))
    .bind(r.restock)
    .bind(r.reason.as_deref())
    .bind(r.progress.as_str())
    .bind(r.created_at)
    .execute()
    .await?;
    Ok(())
}

/// Writes how far refunds have come.
pub async fn update_refunds(tx: &mut Tx, refunds: &[&Refund]) -> Result<(), DbError> {
    if refunds.is_empty() {
        return Ok(());
    }
    let now = tx.now();
    tx.query(
        "UPDATE refunds SET status = r.new_status, rejection = r.new_rejection, updated_at = $1
         FROM {$2: refund_id, new_status, new_rejection} WHERE refunds.id = r.refund_id",
    )
    .bind(now)
    .rows(refunds.iter().map(|r| (r.id, r.progress.as_str(), r.rejection.as_deref())))
    .execute()
    .await?;
    Ok(())
}

/// Takes note of gateways that are out of reach, each once; what holds longer stays.
pub async fn save_outages(tx: &mut Tx, outages: &[(&str, Timestamp)]) -> Result<(), DbError> {
    tx.query(
        "INSERT INTO outages (gateway, until) SELECT gateway, until FROM {$1: gateway, until} WHERE true
         ON CONFLICT (gateway) DO UPDATE SET until = excluded.until WHERE excluded.until > outages.until",
    )
    .rows(outages.iter().copied())
    .execute()
    .await?;
    Ok(())
}

/// Whether a gateway is out of reach now.
pub async fn is_outage(tx: &mut Tx) -> Result<bool, DbError> {
    let now = tx.now();
    let known: u64 =
        tx.query("SELECT COUNT(*) AS n FROM outages WHERE until > $1").bind(now).fetch_scalar().await?;
    Ok(known > 0)
}
