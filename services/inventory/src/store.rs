//! Inventory's SQL. Each function is one statement, however many rows.

use std::collections::HashMap;

use consign::{DbError, Timestamp, Tx, to_json};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqlitePool};

use crate::domain::{Lines, Reservation, Shelf, Stock};

/// A product as it is stored.
#[derive(Clone, Debug)]
pub struct Product {
    pub id: String,
    pub name: String,
    pub price: i64,
    pub currency: String,
    pub version: u64,
    pub stock: Stock,
    pub updated_at: Timestamp,
}

fn product(row: &SqliteRow) -> Result<Product, sqlx::Error> {
    Ok(Product {
        id: row.try_get("id")?,
        name: row.try_get("name")?,
        price: row.try_get("price")?,
        currency: row.try_get("currency")?,
        version: u64::try_from(row.try_get::<i64, _>("version")?).unwrap_or(0),
        stock: Stock::stored(row.try_get("on_hand")?, row.try_get("reserved")?, row.try_get("sold")?),
        updated_at: Timestamp::from_millis(row.try_get("updated_at")?),
    })
}

pub async fn list(db: &SqlitePool, after: &str, limit: u32) -> Result<Vec<Product>, sqlx::Error> {
    let rows = sqlx::query("SELECT * FROM products WHERE id > ? ORDER BY id LIMIT ?")
        .bind(after)
        .bind(limit)
        .fetch_all(db)
        .await?;
    rows.iter().map(product).collect()
}

pub async fn find(db: &SqlitePool, id: &str) -> Result<Option<Product>, sqlx::Error> {
    let row = sqlx::query("SELECT * FROM products WHERE id = ?").bind(id).fetch_optional(db).await?;
    row.as_ref().map(product).transpose()
}

pub async fn find_in(tx: &mut Tx, id: &str) -> Result<Option<Product>, DbError> {
    let row = sqlx::query("SELECT * FROM products WHERE id = ?").bind(id).fetch_optional(tx.sqlite()).await?;
    Ok(row.as_ref().map(product).transpose()?)
}

/// Makes or changes a product; its version rises.
pub async fn put(tx: &mut Tx, id: &str, name: &str, price: i64, currency: &str) -> Result<Product, DbError> {
    let now = tx.now().as_millis();
    let row = sqlx::query(
        "INSERT INTO products (id, name, price, currency, version, updated_at) VALUES (?,?,?,?,1,?)
         ON CONFLICT (id) DO UPDATE SET name = excluded.name, price = excluded.price, currency = excluded.currency,
             version = version + 1, updated_at = excluded.updated_at
         RETURNING *",
    )
    .bind(id)
    .bind(name)
    .bind(price)
    .bind(currency)
    .bind(now)
    .fetch_one(tx.sqlite())
    .await?;
    Ok(product(&row)?)
}

/// Records a movement of stock that the domain has allowed.
pub async fn move_stock(tx: &mut Tx, id: &str, delta: i64, reason: &str) -> Result<Product, DbError> {
    let now = tx.now().as_millis();
    let correlation_id = tx.cause().correlation_id.to_string();
    sqlx::query(
        "INSERT INTO stock_movements (product_id, delta, reason, correlation_id, at) VALUES (?,?,?,?,?)",
    )
    .bind(id)
    .bind(delta)
    .bind(reason)
    .bind(correlation_id)
    .bind(now)
    .execute(tx.sqlite())
    .await?;
    let row = sqlx::query(
        "UPDATE products SET on_hand = on_hand + ?1, received = received + ?1, updated_at = ?2 WHERE id = ?3 RETURNING *",
    )
    .bind(delta)
    .bind(now)
    .bind(id)
    .fetch_one(tx.sqlite())
    .await?;
    Ok(product(&row)?)
}

/// The stock of these products.
pub async fn shelf(tx: &mut Tx, products: &[&str]) -> Result<Shelf, DbError> {
    let rows = sqlx::query(
        "SELECT id, on_hand, reserved, sold FROM products WHERE id IN (SELECT value FROM json_each(?))",
    )
    .bind(to_json(&products)?)
    .fetch_all(tx.sqlite())
    .await?;
    let stock = |r: &SqliteRow| {
        let stock = Stock::stored(r.try_get("on_hand")?, r.try_get("reserved")?, r.try_get("sold")?);
        Ok::<_, sqlx::Error>((r.try_get("id")?, stock))
    };
    Ok(rows.iter().map(stock).collect::<Result<_, _>>()?)
}

/// Writes the stock that differs from `before`, as differences: a concurrent change is added to, not overwritten.
pub async fn save_shelf(tx: &mut Tx, before: &Shelf, after: &Shelf) -> Result<(), DbError> {
    let changes: Vec<(&str, i64, i64, i64)> = after
        .iter()
        .filter_map(|(id, a)| {
            let b = before.get(id)?;
            (a != b).then(|| {
                (id.as_str(), a.on_hand() - b.on_hand(), a.reserved() - b.reserved(), a.sold() - b.sold())
            })
        })
        .collect();
    if changes.is_empty() {
        return Ok(());
    }
    let now = tx.now().as_millis();
    sqlx::query(
        "UPDATE products SET on_hand = on_hand + (e.value ->> 1), reserved = reserved + (e.value ->> 2),
             sold = sold + (e.value ->> 3), updated_at = ?1
         FROM json_each(?2) e WHERE products.id = e.value ->> 0",
    )
    .bind(now)
    .bind(to_json(&changes)?)
    .execute(tx.sqlite())
    .await?;
    Ok(())
}

/// The reservations of these orders, with their lines.
pub async fn reservations(
    tx: &mut Tx,
    orders: &[String],
) -> Result<HashMap<String, (Reservation, Lines)>, DbError> {
    let rows = sqlx::query(
        "SELECT order_id, status, lines FROM reservations WHERE order_id IN (SELECT value FROM json_each(?))",
    )
    .bind(to_json(&orders)?)
    .fetch_all(tx.sqlite())
    .await?;
    let read = |r: &SqliteRow| {
        let status = Reservation::parse(r.try_get("status")?)
            .ok_or_else(|| sqlx::Error::Decode("an unknown status of a reservation".into()))?;
        let lines =
            serde_json::from_str(r.try_get("lines")?).map_err(|e| sqlx::Error::Decode(Box::new(e)))?;
        Ok::<_, sqlx::Error>((r.try_get("order_id")?, (status, lines)))
    };
    Ok(rows.iter().map(read).collect::<Result<_, _>>()?)
}

/// A reservation to be written.
#[derive(Debug, serde::Serialize)]
pub struct ReservationRow {
    pub order_id: String,
    pub status: &'static str,
    pub lines: String,
    pub correlation_id: String,
    pub expires_at: Option<i64>,
}

pub async fn save_reservations(tx: &mut Tx, rows: &[ReservationRow]) -> Result<(), DbError> {
    if rows.is_empty() {
        return Ok(());
    }
    let now = tx.now().as_millis();
    sqlx::query(
        "INSERT INTO reservations (order_id, status, lines, correlation_id, expires_at, created_at, updated_at)
         SELECT value ->> 'order_id', value ->> 'status', value ->> 'lines', value ->> 'correlation_id',
             value ->> 'expires_at', ?1, ?1
         FROM json_each(?2) WHERE true
         ON CONFLICT (order_id) DO UPDATE SET status = excluded.status, updated_at = excluded.updated_at",
    )
    .bind(now)
    .bind(to_json(&rows)?)
    .execute(tx.sqlite())
    .await?;
    Ok(())
}
