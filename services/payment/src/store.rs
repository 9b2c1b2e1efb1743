//! Payment's SQL. Each function is one statement, however many rows.

use std::collections::HashMap;

use consign::db::Row;
use consign::{Db, DbError, Lane, Timestamp, Tx};
use uuid::Uuid;

use crate::domain::{State, Status};

/// A payment as it is stored.
#[derive(Clone, Debug)]
pub struct Payment {
    pub order_id: Uuid,
    pub payment_id: Uuid,
    pub state: State,
    pub amount: i64,
    pub currency: String,
    pub reason: Option<String>,
    pub lane: Lane,
    pub correlation_id: String,
    pub version: u64,
    pub expires_at: Timestamp,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

fn payment(row: &Row) -> Result<Payment, DbError> {
    Ok(Payment {
        order_id: row.get("order_id")?,
        payment_id: row.get("payment_id")?,
        state: State {
            status: Status::parse(&row.get::<String>("status")?)
                .ok_or_else(|| sqlx::Error::Decode("an unknown status of a payment".into()))?,
            cancelled: row.get("cancelled")?,
        },
        amount: row.get("amount")?,
        currency: row.get("currency")?,
        reason: row.get("reason")?,
        lane: row.parse("lane")?,
        correlation_id: row.get("correlation_id")?,
        version: row.get("version")?,
        expires_at: row.get("expires_at")?,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

/// The payments of these orders. Until the transaction ends nobody else changes them.
pub async fn load(tx: &mut Tx, orders: &[Uuid]) -> Result<HashMap<Uuid, Payment>, DbError> {
    let rows = tx
        .query("SELECT * FROM payments WHERE order_id IN (SELECT i FROM {$1: i}) ORDER BY order_id {lock}")
        .rows(orders.iter().map(|id| (*id,)))
        .fetch_all()
        .await?;
    rows.iter().map(|r| payment(r).map(|p| (p.order_id, p))).collect()
}

/// Writes payments, new ones and changed ones.
///
/// # Errors
/// [`DbError::Conflict`] if another replica has made or changed one of them meanwhile.
pub async fn save(tx: &mut Tx, payments: &[&Payment]) -> Result<(), DbError> {
    if payments.is_empty() {
        return Ok(());
    }
    let rows = payments.iter().map(|p| {
        (
            p.order_id,
            p.payment_id,
            p.state.status.as_str(),
            p.state.cancelled,
            p.amount,
            p.currency.as_str(),
            p.reason.as_deref(),
            p.lane.as_str(),
            p.correlation_id.as_str(),
            p.version,
            p.expires_at,
            p.created_at,
            p.updated_at,
        )
    });
    let saved = tx
        .query(
            "INSERT INTO payments (order_id, payment_id, status, cancelled, amount, currency, reason, lane, correlation_id,
                 version, expires_at, created_at, updated_at)
             SELECT order_id, payment_id, status, cancelled, amount, currency, reason, lane, correlation_id, version,
                 expires_at, created_at, updated_at
             FROM {$1: order_id, payment_id, status, cancelled, amount, currency, reason, lane, correlation_id, version,
                 expires_at, created_at, updated_at} WHERE true
             ON CONFLICT (order_id) DO UPDATE SET status = excluded.status, cancelled = excluded.cancelled,
                 reason = excluded.reason, version = excluded.version, updated_at = excluded.updated_at
             WHERE payments.version < excluded.version AND payments.payment_id = excluded.payment_id",
        )
        .rows(rows)
        .execute()
        .await?;
    if saved < payments.len() as u64 { Err(DbError::Conflict("a payment")) } else { Ok(()) }
}

pub async fn find(db: &Db, order: Uuid) -> Result<Option<Payment>, DbError> {
    let row = db.query("SELECT * FROM payments WHERE order_id = $1").bind(order).fetch_optional().await?;
    row.as_ref().map(payment).transpose()
}

/// Payments below the order id `before`, the newest first.
pub async fn list(db: &Db, before: Option<Uuid>, limit: u32) -> Result<Vec<Payment>, DbError> {
    let rows = db
        .query("SELECT * FROM payments WHERE order_id < $1 ORDER BY order_id DESC LIMIT $2")
        .bind(before.unwrap_or(Uuid::max()))
        .bind(limit)
        .fetch_all()
        .await?;
    rows.iter().map(payment).collect()
}
