//! Which events a consumer has dealt with: the guarantee that each takes effect once.

use std::collections::HashSet;

use crate::EventId;
use crate::db::{Db, DbError, Tx};

/// Claims events for a consumer in the transaction; the ids that were new, in one statement however many.
///
/// Ids are claimed in sorted order, so that concurrent batches cannot deadlock. An event that another replica is claiming is waited for.
pub(crate) async fn claim(
    tx: &mut Tx,
    consumer: &str,
    mut ids: Vec<EventId>,
) -> Result<Vec<EventId>, DbError> {
    ids.sort_unstable();
    let now = tx.now();
    let claimed = tx
        .query(
            "INSERT INTO inbox (consumer, event_id, handled_at) SELECT $1, id, $2 FROM {$3: id}
             WHERE true ON CONFLICT DO NOTHING RETURNING event_id",
        )
        .bind(consumer)
        .bind(now)
        .rows(ids.into_iter().map(|id| (id,)))
        .fetch_all()
        .await?;
    claimed.iter().map(|row| row.get("event_id")).collect()
}

/// Which of these events have come to a consumer: dealt with, or failed and to be tried again.
pub(crate) async fn come(db: &Db, consumer: &str, ids: &[EventId]) -> Result<HashSet<EventId>, DbError> {
    if ids.is_empty() {
        return Ok(HashSet::new());
    }
    let rows = db
        .query(
            "SELECT event_id FROM inbox WHERE consumer = $1 AND event_id IN (SELECT id FROM {$2: id})
             UNION SELECT event_id FROM failures WHERE consumer = $1 AND event_id IN (SELECT id FROM {$2: id})",
        )
        .bind(consumer)
        .rows(ids.iter().map(|id| (*id,)))
        .fetch_all()
        .await?;
    rows.iter().map(|row| row.get("event_id")).collect()
}
