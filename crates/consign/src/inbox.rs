//! Which events a consumer has dealt with: the guarantee that each takes effect once.

use sqlx::Row;

use crate::EventId;
use crate::db::{DbError, Tx};
use crate::outbox::to_json;

/// Claims events for a consumer in the transaction; the ids that were new, in one statement however many.
///
/// Ids are claimed in sorted order, so that concurrent batches cannot deadlock.
pub(crate) async fn claim(
    tx: &mut Tx,
    consumer: &str,
    mut ids: Vec<EventId>,
) -> Result<Vec<EventId>, DbError> {
    ids.sort_unstable();
    let now = tx.now().as_millis();
    tx.count_statement();
    let rows = sqlx::query(
        "INSERT INTO inbox (consumer, event_id, handled_at) SELECT ?, value, ? FROM json_each(?)
         WHERE true ON CONFLICT DO NOTHING RETURNING event_id",
    )
    .bind(consumer)
    .bind(now)
    .bind(to_json(&ids)?)
    .fetch_all(tx.sqlite())
    .await?;
    rows.iter()
        .map(|r| {
            let text: &str = r.try_get("event_id")?;
            text.parse().map_err(|e| DbError::Sql(sqlx::Error::Decode(Box::new(e))))
        })
        .collect()
}
