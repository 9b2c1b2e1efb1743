//! Inventory's SQL. Each function is one statement, however many rows.

use std::collections::HashMap;

use consign::db::{Json, Row};
use consign::{Db, DbError, Timestamp, Tx};
use uuid::Uuid;

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

fn stock(row: &Row) -> Result<Stock, DbError> {
    Ok(Stock::stored(row.get("on_hand")?, row.get("reserved")?, row.get("sold")?))
}

fn product(row: &Row) -> Result<Product, DbError> {
    Ok(Product {
        id: row.get("id")?,
        name: row.get("name")?,
        price: row.get("price")?,
        currency: row.get("currency")?,
        version: row.get("version")?,
        stock: stock(row)?,
        updated_at: row.get("updated_at")?,
    })
}

pub async fn list(db: &Db, after: &str, limit: u32) -> Result<Vec<Product>, DbError> {
    let rows = db
        .query("SELECT * FROM products WHERE id > $1 ORDER BY id LIMIT $2")
        .bind(after)
        .bind(limit)
        .fetch_all()
        .await?;
    rows.iter().map(product).collect()
}

pub async fn find(db: &Db, id: &str) -> Result<Option<Product>, DbError> {
    let row = db.query("SELECT * FROM products WHERE id = $1").bind(id).fetch_optional().await?;
    row.as_ref().map(product).transpose()
}

/// A product, which nobody else changes until the transaction ends.
pub async fn find_in(tx: &mut Tx, id: &str) -> Result<Option<Product>, DbError> {
    let row = tx.query("SELECT * FROM products WHERE id = $1 {lock}").bind(id).fetch_optional().await?;
    row.as_ref().map(product).transpose()
}

/// Makes or changes a product; its version rises.
pub async fn put(tx: &mut Tx, id: &str, name: &str, price: i64, currency: &str) -> Result<Product, DbError> {
    let now = tx.now();
    let row = tx
        .query(
            "INSERT INTO products (id, name, price, currency, version, updated_at) VALUES ($1, $2, $3, $4, 1, $5)
             ON CONFLICT (id) DO UPDATE SET name = excluded.name, price = excluded.price, currency = excluded.currency,
                 version = products.version + 1, updated_at = excluded.updated_at
             RETURNING *",
        )
        .bind(id)
        .bind(name)
        .bind(price)
        .bind(currency)
        .bind(now)
        .fetch_one()
        .await?;
    product(&row)
}

/// Records a movement of stock that the domain has allowed.
pub async fn move_stock(tx: &mut Tx, id: &str, delta: i64, reason: &str) -> Result<Product, DbError> {
    let now = tx.now();
    let correlation_id = tx.cause().correlation_id.to_string();
    tx.query("INSERT INTO stock_movements (product_id, delta, reason, correlation_id, at) VALUES ($1, $2, $3, $4, $5)")
        .bind(id)
        .bind(delta)
        .bind(reason)
        .bind(correlation_id)
        .bind(now)
        .execute()
        .await?;
    let row = tx
        .query(
            "UPDATE products SET on_hand = on_hand + $1, received = received + $1, updated_at = $2 WHERE id = $3 RETURNING *",
        )
        .bind(delta)
        .bind(now)
        .bind(id)
        .fetch_one()
        .await?;
    product(&row)
}

/// The stock of these products, which nobody else changes until the transaction ends.
pub async fn shelf(tx: &mut Tx, products: &[&str]) -> Result<Shelf, DbError> {
    let rows = tx
        .query(
            "SELECT id, on_hand, reserved, sold FROM products WHERE id IN (SELECT i FROM {$1: i}) ORDER BY id {lock}",
        )
        .rows(products.iter().map(|id| (*id,)))
        .fetch_all()
        .await?;
    rows.iter().map(|r| Ok((r.get("id")?, stock(r)?))).collect()
}

/// Writes the stock that differs from `before`, as differences.
pub async fn save_shelf(tx: &mut Tx, before: &Shelf, after: &Shelf) -> Result<(), DbError> {
    let changes: Vec<(&str, i64, i64, i64, i64)> = after
        .iter()
        .filter_map(|(id, a)| {
            let b = before.get(id)?;
            (a != b).then(|| {
                let more = |f: fn(&Stock) -> i64| f(a) - f(b);
                (
                    id.as_str(),
                    more(Stock::on_hand),
                    more(Stock::reserved),
                    more(Stock::sold),
                    more(Stock::received),
                )
            })
        })
        .collect();
    if changes.is_empty() {
        return Ok(());
    }
    let now = tx.now();
    tx.query(
        "UPDATE products SET on_hand = on_hand + r.more_on_hand, reserved = reserved + r.more_reserved,
             sold = sold + r.more_sold, received = received + r.more_received, updated_at = $1
         FROM {$2: product_id, more_on_hand, more_reserved, more_sold, more_received} WHERE products.id = r.product_id",
    )
    .bind(now)
    .rows(changes)
    .execute()
    .await?;
    Ok(())
}

/// The reservations of these orders, with their lines. Until the transaction ends nobody else changes them.
pub async fn reservations(
    tx: &mut Tx,
    orders: &[Uuid],
) -> Result<HashMap<Uuid, (Reservation, Lines)>, DbError> {
    let rows = tx
        .query(
            "SELECT order_id, status, lines FROM reservations WHERE order_id IN (SELECT i FROM {$1: i}) ORDER BY order_id {lock}",
        )
        .rows(orders.iter().map(|id| (*id,)))
        .fetch_all()
        .await?;
    rows.iter()
        .map(|r| {
            let status = Reservation::parse(&r.get::<String>("status")?)
                .ok_or_else(|| sqlx::Error::Decode("an unknown status of a reservation".into()))?;
            Ok((r.get("order_id")?, (status, r.get::<Json<Lines>>("lines")?.0)))
        })
        .collect()
}

/// A reservation to be written.
#[derive(Debug)]
pub struct ReservationRow {
    pub order_id: Uuid,
    pub status: Reservation,
    pub lines: Lines,
    pub correlation_id: String,
    pub expires_at: Option<Timestamp>,
}

/// Reservations that were not there yet.
///
/// # Errors
/// [`DbError::Conflict`] if another replica has made one of them meanwhile.
pub async fn insert_reservations(tx: &mut Tx, rows: &[ReservationRow]) -> Result<(), DbError> {
    if rows.is_empty() {
        return Ok(());
    }
    let now = tx.now();
    let inserted = tx
        .query(
            "INSERT INTO reservations (order_id, status, lines, correlation_id, expires_at, created_at, updated_at)
             SELECT order_id, status, lines, correlation_id, expires_at, $1, $1
             FROM {$2: order_id, status, lines, correlation_id, expires_at} WHERE true ON CONFLICT DO NOTHING",
        )
        .bind(now)
        .rows(rows.iter().map(|r| {
            (r.order_id, r.status.as_str(), Json(r.lines.clone()), r.correlation_id.as_str(), r.expires_at)
        }))
        .execute()
        .await?;
    if inserted < rows.len() as u64 { Err(DbError::Conflict("a reservation")) } else { Ok(()) }
}

/// Reservations that were loaded, and changed.
pub async fn update_reservations(tx: &mut Tx, changed: &[(Uuid, Reservation)]) -> Result<(), DbError> {
    if changed.is_empty() {
        return Ok(());
    }
    let now = tx.now();
    tx.query(
        "UPDATE reservations SET status = r.new_status, updated_at = $1 FROM {$2: id, new_status} WHERE order_id = r.id",
    )
    .bind(now)
    .rows(changed.iter().map(|(id, status)| (*id, status.as_str())))
    .execute()
    .await?;
    Ok(())
}

/// Reservations that last longer than was said.
pub async fn extend(tx: &mut Tx, later: &[(Uuid, Timestamp)]) -> Result<(), DbError> {
    if later.is_empty() {
        return Ok(());
    }
    let now = tx.now();
    tx.query(
        "UPDATE reservations SET expires_at = r.until, updated_at = $1 FROM {$2: id, until}
         WHERE order_id = r.id AND status = 'reserved' AND expires_at < r.until",
    )
    .bind(now)
    .rows(later.iter().copied())
    .execute()
    .await?;
    Ok(())
}

/// What has come back of these orders, by refund. Their reservations are to be loaded first: those are what is locked.
pub async fn returned(tx: &mut Tx, orders: &[Uuid]) -> Result<HashMap<Uuid, HashMap<Uuid, Lines>>, DbError> {
    if orders.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = tx
        .query("SELECT order_id, refund_id, lines FROM returns WHERE order_id IN (SELECT i FROM {$1: i})")
        .rows(orders.iter().map(|id| (*id,)))
        .fetch_all()
        .await?;
    let mut returned: HashMap<Uuid, HashMap<Uuid, Lines>> = HashMap::new();
    for row in &rows {
        let lines = row.get::<Json<Lines>>("lines")?.0;
        returned.entry(row.get("order_id")?).or_default().insert(row.get("refund_id")?, lines);
    }
    Ok(returned)
}

/// What comes back: the refund, its order, the pieces, and whether they go to the shelf.
pub async fn insert_returns(tx: &mut Tx, returns: &[(Uuid, Uuid, Lines, bool)]) -> Result<(), DbError> {
    if returns.is_empty() {
        return Ok(());
    }
    let now = tx.now();
    tx.query(
        "INSERT INTO returns (refund_id, order_id, lines, restocked, at)
         SELECT refund_id, order_id, lines, restocked, $1 FROM {$2: refund_id, order_id, lines, restocked}",
    )
    .bind(now)
    .rows(
        returns
            .iter()
            .map(|(refund, order, lines, restock)| (*refund, *order, Json(lines.clone()), *restock)),
    )
    .execute()
    .await?;
    Ok(())
}

/// Stock that was received or written off.
#[derive(Debug)]
pub struct Movement {
    pub product_id: String,
    pub delta: i64,
    pub reason: String,
    pub correlation_id: String,
}

/// Records movements; the stock itself is written by [`save_shelf`].
pub async fn insert_movements(tx: &mut Tx, movements: &[Movement]) -> Result<(), DbError> {
    if movements.is_empty() {
        return Ok(());
    }
    let now = tx.now();
    tx.query(
        "INSERT INTO stock_movements (product_id, delta, reason, correlation_id, at)
         SELECT product_id, delta, reason, correlation_id, $1 FROM {$2: product_id, delta, reason, correlation_id}",
    )
    .bind(now)
    .rows(movements.iter().map(|m| (m.product_id.as_str(), m.delta, m.reason.as_str(), m.correlation_id.as_str())))
    .execute()
    .await?;
    Ok(())
}
