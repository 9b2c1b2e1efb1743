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
    pub currency: String,
    pub method: Option<String>,
    pub reference: Option<String>,
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
            amount: row.get("amount")?,
            refunding: row.get("refunding")?,
            refunded: row.get("refunded")?,
        },
        currency: row.get("currency")?,
        method: row.get("method")?,
        reference: row.get("reference")?,
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

/// Writes payments that were not there.
///
/// # Errors
/// [`DbError::Conflict`] if another replica has made one of them meanwhile.
pub async fn insert(tx: &mut Tx, payments: &[&Payment]) -> Result<(), DbError> {
    if payments.is_empty() {
        return Ok(());
    }
    let now = tx.now();
    let rows = payments.iter().map(|p| {
        (
            p.order_id,
            p.payment_id,
            p.state.status.as_str(),
            p.state.cancelled,
            p.state.amount,
            p.currency.as_str(),
            p.method.as_deref(),
            p.reason.as_deref(),
            p.lane.as_str(),
            p.correlation_id.as_str(),
            p.version,
            p.expires_at,
        )
    });
    let inserted = tx
        .query(
            "INSERT INTO payments (order_id, payment_id, status, cancelled, amount, currency, method, reason, lane,
                 correlation_id, version, expires_at, created_at, updated_at)
             SELECT order_id, payment_id, status, cancelled, amount, currency, method, reason, lane, correlation_id, version,
                 expires_at, $1, $1
             FROM {$2: order_id, payment_id, status, cancelled, amount, currency, method, reason, lane, correlation_id, version,
                 expires_at} WHERE true
             ON CONFLICT DO NOTHING",
        )
        .bind(now)
        .rows(rows)
        .execute()
        .await?;
    if inserted < payments.len() as u64 { Err(DbError::Conflict("a payment")) } else { Ok(()) }
}

/// Writes payments that changed.
///
/// # Errors
/// [`DbError::Conflict`] if another replica has changed one of them meanwhile.
pub async fn update(tx: &mut Tx, payments: &[&Payment]) -> Result<(), DbError> {
    if payments.is_empty() {
        return Ok(());
    }
    let now = tx.now();
    let rows = payments.iter().map(|p| {
        (
            p.order_id,
            p.state.status.as_str(),
            p.state.cancelled,
            p.state.refunding,
            p.state.refunded,
            p.reference.as_deref(),
            p.reason.as_deref(),
            p.version,
            p.expires_at,
        )
    });
    let updated = tx
        .query(
            "UPDATE payments SET status = r.new_status, cancelled = r.new_cancelled, refunding = r.new_refunding,
                 refunded = r.new_refunded, reference = r.new_reference, reason = r.new_reason, version = r.new_version,
                 expires_at = r.new_expires, updated_at = $1
             FROM {$2: id, new_status, new_cancelled, new_refunding, new_refunded, new_reference, new_reason, new_version,
                 new_expires}
             WHERE payments.order_id = r.id AND payments.version < r.new_version",
        )
        .bind(now)
        .rows(rows)
        .execute()
        .await?;
    if updated < payments.len() as u64 { Err(DbError::Conflict("a payment")) } else { Ok(()) }
}

/// Money to be given back, as it is stored.
#[derive(Clone, Debug)]
pub struct Refund {
    pub refund_id: Uuid,
    pub order_id: Uuid,
    pub amount: i64,
    pub status: String,
    pub reason: Option<String>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

fn refund(row: &Row) -> Result<Refund, DbError> {
    Ok(Refund {
        refund_id: row.get("refund_id")?,
        order_id: row.get("order_id")?,
        amount: row.get("amount")?,
        status: row.get("status")?,
        reason: row.get("reason")?,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

/// Refunds by id. Their payments are to be loaded first: those are what is locked.
pub async fn load_refunds(tx: &mut Tx, ids: &[Uuid]) -> Result<HashMap<Uuid, Refund>, DbError> {
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = tx
        .query("SELECT * FROM refunds WHERE refund_id IN (SELECT i FROM {$1: i})")
        .rows(ids.iter().map(|id| (*id,)))
        .fetch_all()
        .await?;
    rows.iter().map(|r| refund(r).map(|r| (r.refund_id, r))).collect()
}

pub async fn save_refunds(tx: &mut Tx, refunds: &[&Refund]) -> Result<(), DbError> {
    if refunds.is_empty() {
        return Ok(());
    }
    let now = tx.now();
    let rows =
        refunds.iter().map(|r| (r.refund_id, r.order_id, r.amount, r.status.as_str(), r.reason.as_deref()));
    tx.query(
        "INSERT INTO refunds (refund_id, order_id, amount, status, reason, created_at, updated_at)
         SELECT refund_id, order_id, amount, status, reason, $1, $1 FROM {$2: refund_id, order_id, amount, status, reason} WHERE true
         ON CONFLICT (refund_id) DO UPDATE SET status = excluded.status, updated_at = excluded.updated_at",
    )
    .bind(now)
    .rows(rows)
    .execute()
    .await?;
    Ok(())
}

pub async fn find(db: &Db, order: Uuid) -> Result<Option<Payment>, DbError> {
    let row = db.query("SELECT * FROM payments WHERE order_id = $1").bind(order).fetch_optional().await?;
    row.as_ref().map(payment).transpose()
}

/// The refunds of these orders, the oldest first.
pub async fn refunds_of(db: &Db, orders: &[Uuid]) -> Result<Vec<Refund>, DbError> {
    let rows = db
        .query(
            "SELECT * FROM refunds WHERE order_id IN (SELECT i FROM {$1: i}) ORDER BY created_at, refund_id",
        )
        .rows(orders.iter().map(|id| (*id,)))
        .fetch_all()
        .await?;
    rows.iter().map(refund).collect()
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

/// A charge or a refund that does not come to an end.
#[derive(Clone, Debug)]
pub struct Stuck {
    /// `charge` or `refund`.
    pub what: String,
    pub order_id: Uuid,
    pub payment_id: Uuid,
    pub refund_id: Option<Uuid>,
    pub amount: i64,
    pub currency: String,
    pub since: Timestamp,
    pub escalated_at: Option<Timestamp>,
}

/// What has been under way since before `before`, the oldest first.
pub async fn stuck(db: &Db, before: Timestamp, limit: u32) -> Result<Vec<Stuck>, DbError> {
    let rows = db
        .query(
            "SELECT * FROM (
               SELECT 'charge' AS what, order_id, payment_id, NULL AS refund_id, amount, currency, created_at AS since, escalated_at
               FROM payments WHERE status = 'pending' AND created_at < $1
               UNION ALL
               SELECT 'refund', r.order_id, p.payment_id, r.refund_id, r.amount, p.currency, r.created_at, r.escalated_at
               FROM refunds r JOIN payments p ON p.order_id = r.order_id WHERE r.status = 'pending' AND r.created_at < $1
             ) AS both_kinds ORDER BY since LIMIT $2",
        )
        .bind(before)
        .bind(limit)
        .fetch_all()
        .await?;
    rows.iter()
        .map(|r| {
            Ok(Stuck {
                what: r.get("what")?,
                order_id: r.get("order_id")?,
                payment_id: r.get("payment_id")?,
                refund_id: r.get("refund_id")?,
                amount: r.get("amount")?,
                currency: r.get("currency")?,
                since: r.get("since")?,
                escalated_at: r.get("escalated_at")?,
            })
        })
        .collect()
}

/// How many have been under way since before `before`.
pub async fn count_stuck(db: &Db, before: Timestamp) -> Result<u64, DbError> {
    db.query(
        "SELECT (SELECT COUNT(*) FROM payments WHERE status = 'pending' AND created_at < $1)
              + (SELECT COUNT(*) FROM refunds WHERE status = 'pending' AND created_at < $1) AS n",
    )
    .bind(before)
    .fetch_scalar()
    .await
}

/// Marks those as escalated that have been under way since before `before` and were not: the orders of charges, and of refunds. Each is
/// returned once, to one replica.
pub async fn escalate(tx: &mut Tx, before: Timestamp) -> Result<(Vec<Uuid>, Vec<Uuid>), DbError> {
    let now = tx.now();
    let charges = tx
        .query(
            "UPDATE payments SET escalated_at = $1 WHERE order_id IN (SELECT order_id FROM payments
               WHERE status = 'pending' AND created_at < $2 AND escalated_at IS NULL ORDER BY created_at LIMIT 1000 {skip})
             RETURNING order_id",
        )
        .bind(now)
        .bind(before)
        .fetch_all()
        .await?;
    let refunds = tx
        .query(
            "UPDATE refunds SET escalated_at = $1 WHERE refund_id IN (SELECT refund_id FROM refunds
               WHERE status = 'pending' AND created_at < $2 AND escalated_at IS NULL ORDER BY created_at LIMIT 1000 {skip})
             RETURNING order_id",
        )
        .bind(now)
        .bind(before)
        .fetch_all()
        .await?;
    let ids = |rows: Vec<Row>| rows.iter().map(|r| r.get("order_id")).collect::<Result<Vec<Uuid>, _>>();
    Ok((ids(charges)?, ids(refunds)?))
}

/// Records a callback; `false` if it was known.
pub async fn record_callback(
    tx: &mut Tx,
    id: &str,
    kind: &str,
    reference: Option<&str>,
) -> Result<bool, DbError> {
    let now = tx.now();
    let inserted = tx
        .query("INSERT INTO callbacks (id, kind, reference, received_at) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING")
        .bind(id)
        .bind(kind)
        .bind(reference)
        .bind(now)
        .execute()
        .await?;
    Ok(inserted > 0)
}

/// The payment with this reference of the gateway's, or with this id.
pub async fn find_by_reference(tx: &mut Tx, reference: &str) -> Result<Option<Payment>, DbError> {
    let row =
        tx.query("SELECT * FROM payments WHERE reference = $1").bind(reference).fetch_optional().await?;
    if row.is_some() {
        return row.as_ref().map(payment).transpose();
    }
    let Ok(id) = reference.parse::<Uuid>() else { return Ok(None) };
    let row = tx.query("SELECT * FROM payments WHERE payment_id = $1").bind(id).fetch_optional().await?;
    row.as_ref().map(payment).transpose()
}

/// The refunds of an order that are under way.
pub async fn pending_refunds(tx: &mut Tx, order: Uuid) -> Result<Vec<Uuid>, DbError> {
    let rows = tx
        .query("SELECT refund_id FROM refunds WHERE order_id = $1 AND status = 'pending' ORDER BY refund_id")
        .bind(order)
        .fetch_all()
        .await?;
    rows.iter().map(|r| r.get("refund_id")).collect()
}
