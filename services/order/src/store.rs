//! Order's SQL. Each function is one statement, however many rows.

use std::collections::HashMap;

use consign::{DbError, EventId, Lane, Timestamp, Tx, to_json};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqlitePool};
use uuid::Uuid;

use crate::domain::{Order, Price, Status};

fn decode(e: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::Decode(Box::new(e))
}

fn order(row: &SqliteRow) -> Result<Order, sqlx::Error> {
    let payment_id: Option<&str> = row.try_get("payment_id")?;
    Ok(Order {
        id: row.try_get::<&str, _>("id")?.parse().map_err(decode)?,
        customer_id: row.try_get("customer_id")?,
        status: Status::parse(row.try_get("status")?)
            .ok_or_else(|| sqlx::Error::Decode("an unknown status of an order".into()))?,
        reason: row.try_get("reason")?,
        lane: row.try_get::<&str, _>("lane")?.parse::<Lane>().map_err(decode)?,
        currency: row.try_get("currency")?,
        total: row.try_get("total")?,
        items: serde_json::from_str(row.try_get("items")?).map_err(decode)?,
        payment_id: payment_id.map(str::parse).transpose().map_err(decode)?,
        correlation_id: row.try_get("correlation_id")?,
        version: u64::try_from(row.try_get::<i64, _>("version")?).unwrap_or(0),
        created_at: Timestamp::from_millis(row.try_get("created_at")?),
        updated_at: Timestamp::from_millis(row.try_get("updated_at")?),
        deadline: Timestamp::from_millis(row.try_get("deadline")?),
    })
}

pub async fn insert(tx: &mut Tx, orders: &[Order]) -> Result<(), DbError> {
    type Row<'a> = (Uuid, &'a str, &'a str, &'a str, i64, String, &'a str, i64, i64);
    if orders.is_empty() {
        return Ok(());
    }
    let rows: Vec<Row<'_>> = orders
        .iter()
        .map(|o| {
            let items = to_json(&o.items)?;
            let (created, deadline) = (o.created_at.as_millis(), o.deadline.as_millis());
            Ok((
                o.id,
                &*o.customer_id,
                o.lane.as_str(),
                &*o.currency,
                o.total,
                items,
                &*o.correlation_id,
                created,
                deadline,
            ))
        })
        .collect::<Result<_, sqlx::Error>>()?;
    sqlx::query(
        "INSERT INTO orders (id, customer_id, status, lane, currency, total, items, correlation_id, version, created_at,
             updated_at, deadline)
         SELECT value ->> 0, value ->> 1, 'pending', value ->> 2, value ->> 3, value ->> 4, value ->> 5, value ->> 6, 1,
             value ->> 7, value ->> 7, value ->> 8
         FROM json_each(?)",
    )
    .bind(to_json(&rows)?)
    .execute(tx.sqlite())
    .await?;
    Ok(())
}

pub async fn load(tx: &mut Tx, ids: &[Uuid]) -> Result<HashMap<Uuid, Order>, DbError> {
    let rows = sqlx::query("SELECT * FROM orders WHERE id IN (SELECT value FROM json_each(?))")
        .bind(to_json(&ids)?)
        .fetch_all(tx.sqlite())
        .await?;
    rows.iter().map(|r| order(r).map(|o| (o.id, o))).collect::<Result<_, _>>().map_err(DbError::from)
}

/// Writes orders that moved on, guarded by the version they had: the count of rows that were still as they were.
pub async fn update(tx: &mut Tx, changed: &[(u64, &Order)]) -> Result<u64, DbError> {
    type Row<'a> = (Uuid, u64, u64, &'a str, Option<&'a str>, Option<Uuid>);
    if changed.is_empty() {
        return Ok(0);
    }
    let rows: Vec<Row<'_>> = changed
        .iter()
        .map(|(was, o)| (o.id, *was, o.version, o.status.as_str(), o.reason.as_deref(), o.payment_id))
        .collect();
    let now = tx.now().as_millis();
    let done = sqlx::query(
        "UPDATE orders SET version = e.value ->> 2, status = e.value ->> 3, reason = e.value ->> 4,
             payment_id = e.value ->> 5, updated_at = ?1
         FROM json_each(?2) e WHERE orders.id = e.value ->> 0 AND version = e.value ->> 1",
    )
    .bind(now)
    .bind(to_json(&rows)?)
    .execute(tx.sqlite())
    .await?;
    Ok(done.rows_affected())
}

/// An entry of an order's timeline to be.
#[derive(Debug, serde::Serialize)]
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
    let now = tx.now().as_millis();
    sqlx::query(
        "INSERT INTO timeline (order_id, version, event, detail, event_id, at)
         SELECT value ->> 'order_id', value ->> 'version', value ->> 'event', value ->> 'detail', value ->> 'event_id', ?
         FROM json_each(?)",
    )
    .bind(now)
    .bind(to_json(&entries)?)
    .execute(tx.sqlite())
    .await?;
    Ok(())
}

pub async fn prices(tx: &mut Tx, products: &[&str]) -> Result<HashMap<String, Price>, DbError> {
    let rows =
        sqlx::query("SELECT id, price, currency FROM products WHERE id IN (SELECT value FROM json_each(?))")
            .bind(to_json(&products)?)
            .fetch_all(tx.sqlite())
            .await?;
    let read = |r: &SqliteRow| {
        let price = Price { amount: r.try_get("price")?, currency: r.try_get("currency")? };
        Ok::<_, sqlx::Error>((r.try_get("id")?, price))
    };
    Ok(rows.iter().map(read).collect::<Result<_, _>>()?)
}

/// Takes over products that are newer than our copy.
pub async fn save_products(tx: &mut Tx, products: &[&contracts::ProductChanged]) -> Result<(), DbError> {
    sqlx::query(
        "INSERT INTO products (id, name, price, currency, version)
         SELECT value ->> 'product_id', value ->> 'name', value ->> 'price', value ->> 'currency', value ->> 'version'
         FROM json_each(?) WHERE true
         ON CONFLICT (id) DO UPDATE SET name = excluded.name, price = excluded.price, currency = excluded.currency,
             version = excluded.version WHERE excluded.version > products.version",
    )
    .bind(to_json(&products)?)
    .execute(tx.sqlite())
    .await?;
    Ok(())
}

pub async fn find(db: &SqlitePool, id: Uuid) -> Result<Option<Order>, sqlx::Error> {
    let row =
        sqlx::query("SELECT * FROM orders WHERE id = ?").bind(id.to_string()).fetch_optional(db).await?;
    row.as_ref().map(order).transpose()
}

/// Orders below `before`, the newest first.
pub async fn list(
    db: &SqlitePool,
    customer: Option<&str>,
    status: Option<Status>,
    before: Option<Uuid>,
    limit: u32,
) -> Result<Vec<Order>, sqlx::Error> {
    // One statement per shape, so that each uses its index.
    let sql = match (customer.is_some(), status.is_some()) {
        (false, false) => "SELECT * FROM orders WHERE id < ?3 ORDER BY id DESC LIMIT ?4",
        (true, false) => "SELECT * FROM orders WHERE customer_id = ?1 AND id < ?3 ORDER BY id DESC LIMIT ?4",
        (false, true) => "SELECT * FROM orders WHERE status = ?2 AND id < ?3 ORDER BY id DESC LIMIT ?4",
        (true, true) => {
            "SELECT * FROM orders WHERE customer_id = ?1 AND status = ?2 AND id < ?3 ORDER BY id DESC LIMIT ?4"
        }
    };
    let rows = sqlx::query(sql)
        .bind(customer)
        .bind(status.map(Status::as_str))
        .bind(before.unwrap_or(Uuid::max()).to_string())
        .bind(limit)
        .fetch_all(db)
        .await?;
    rows.iter().map(order).collect()
}

/// An entry of an order's timeline.
#[derive(Debug)]
pub struct StoredEntry {
    pub version: u64,
    pub event: String,
    pub detail: Option<String>,
    pub event_id: Option<String>,
    pub at: Timestamp,
}

pub async fn timeline(db: &SqlitePool, id: Uuid) -> Result<Vec<StoredEntry>, sqlx::Error> {
    let rows = sqlx::query("SELECT * FROM timeline WHERE order_id = ? ORDER BY version")
        .bind(id.to_string())
        .fetch_all(db)
        .await?;
    rows.iter()
        .map(|r| {
            Ok(StoredEntry {
                version: u64::try_from(r.try_get::<i64, _>("version")?).unwrap_or(0),
                event: r.try_get("event")?,
                detail: r.try_get("detail")?,
                event_id: r.try_get("event_id")?,
                at: Timestamp::from_millis(r.try_get("at")?),
            })
        })
        .collect()
}
