//! Payment's SQL. Each function is one statement, however many rows.

use std::collections::HashMap;

use consign::{DbError, Lane, Timestamp, Tx, to_json};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqlitePool};
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

fn payment(row: &SqliteRow) -> Result<Payment, sqlx::Error> {
    fn decode(e: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
        sqlx::Error::Decode(Box::new(e))
    }
    let time = |column| row.try_get(column).map(Timestamp::from_millis);
    Ok(Payment {
        order_id: row.try_get::<&str, _>("order_id")?.parse().map_err(decode)?,
        payment_id: row.try_get::<&str, _>("payment_id")?.parse().map_err(decode)?,
        state: State {
            status: Status::parse(row.try_get("status")?)
                .ok_or_else(|| sqlx::Error::Decode("an unknown status of a payment".into()))?,
            cancelled: row.try_get::<i64, _>("cancelled")? != 0,
        },
        amount: row.try_get("amount")?,
        currency: row.try_get("currency")?,
        reason: row.try_get("reason")?,
        lane: row.try_get::<&str, _>("lane")?.parse().map_err(decode)?,
        correlation_id: row.try_get("correlation_id")?,
        version: u64::try_from(row.try_get::<i64, _>("version")?).unwrap_or(0),
        expires_at: time("expires_at")?,
        created_at: time("created_at")?,
        updated_at: time("updated_at")?,
    })
}

pub async fn load(tx: &mut Tx, orders: &[Uuid]) -> Result<HashMap<Uuid, Payment>, DbError> {
    let rows = sqlx::query("SELECT * FROM payments WHERE order_id IN (SELECT value FROM json_each(?))")
        .bind(to_json(&orders)?)
        .fetch_all(tx.sqlite())
        .await?;
    Ok(rows.iter().map(|r| payment(r).map(|p| (p.order_id, p))).collect::<Result<_, _>>()?)
}

/// Writes payments, new ones and changed ones.
pub async fn save(tx: &mut Tx, payments: &[&Payment]) -> Result<(), DbError> {
    if payments.is_empty() {
        return Ok(());
    }
    let rows: Vec<serde_json::Value> = payments
        .iter()
        .map(|p| {
            serde_json::json!([
                p.order_id,
                p.payment_id,
                p.state.status.as_str(),
                i32::from(p.state.cancelled),
                p.amount,
                p.currency,
                p.reason,
                p.lane.as_str(),
                p.correlation_id,
                p.version,
                p.expires_at.as_millis(),
                p.created_at.as_millis(),
                p.updated_at.as_millis()
            ])
        })
        .collect();
    sqlx::query(
        "INSERT INTO payments (order_id, payment_id, status, cancelled, amount, currency, reason, lane, correlation_id,
             version, expires_at, created_at, updated_at)
         SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5, value ->> 6, value ->> 7,
             value ->> 8, value ->> 9, value ->> 10, value ->> 11, value ->> 12
         FROM json_each(?) WHERE true
         ON CONFLICT (order_id) DO UPDATE SET status = excluded.status, cancelled = excluded.cancelled,
             reason = excluded.reason, version = excluded.version, updated_at = excluded.updated_at
         WHERE payments.version < excluded.version",
    )
    .bind(to_json(&rows)?)
    .execute(tx.sqlite())
    .await?;
    Ok(())
}

pub async fn find(db: &SqlitePool, order: Uuid) -> Result<Option<Payment>, sqlx::Error> {
    let row = sqlx::query("SELECT * FROM payments WHERE order_id = ?")
        .bind(order.to_string())
        .fetch_optional(db)
        .await?;
    row.as_ref().map(payment).transpose()
}

/// Payments below the order id `before`, the newest first.
pub async fn list(db: &SqlitePool, before: Option<Uuid>, limit: u32) -> Result<Vec<Payment>, sqlx::Error> {
    let rows = sqlx::query("SELECT * FROM payments WHERE order_id < ? ORDER BY order_id DESC LIMIT ?")
        .bind(before.unwrap_or(Uuid::max()).to_string())
        .bind(limit)
        .fetch_all(db)
        .await?;
    rows.iter().map(payment).collect()
}
