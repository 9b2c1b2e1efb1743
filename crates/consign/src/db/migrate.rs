//! Migrations: forward only, each applied once, in one transaction, under the database's write lock.

use sqlx::{Row, SqliteConnection};

use super::DbError;
use crate::Timestamp;

/// One step of a schema's history.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// Counts from 1.
    pub version: i64,
    /// What it does, in a few words.
    pub name: &'static str,
    /// The statements.
    pub sql: &'static str,
}

pub(super) const LIBRARY: &[Migration] =
    &[Migration { version: 1, name: "outbox, inbox, tasks, dead letters", sql: include_str!("library.sql") }];

pub(super) async fn run(
    conn: &mut SqliteConnection,
    set: &'static str,
    migrations: &'static [Migration],
    now: Timestamp,
) -> Result<(), DbError> {
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut *conn).await?;
    match apply(conn, set, migrations, now).await {
        Ok(()) => {
            sqlx::raw_sql("COMMIT").execute(conn).await?;
            Ok(())
        }
        Err(e) => {
            sqlx::raw_sql("ROLLBACK").execute(conn).await?;
            Err(e)
        }
    }
}

async fn apply(
    conn: &mut SqliteConnection,
    set: &'static str,
    migrations: &'static [Migration],
    now: Timestamp,
) -> Result<(), DbError> {
    sqlx::raw_sql(
        "CREATE TABLE IF NOT EXISTS migrations (
            migration_set TEXT NOT NULL, version INTEGER NOT NULL, name TEXT NOT NULL, sql TEXT NOT NULL,
            applied_at INTEGER NOT NULL, PRIMARY KEY (migration_set, version)) WITHOUT ROWID",
    )
    .execute(&mut *conn)
    .await?;
    let applied = sqlx::query("SELECT version, sql FROM migrations WHERE migration_set = ? ORDER BY version")
        .bind(set)
        .fetch_all(&mut *conn)
        .await?;
    for row in &applied {
        let version: i64 = row.try_get("version")?;
        match migrations.iter().find(|m| m.version == version) {
            None => return Err(DbError::NewerDatabase { set, version }),
            Some(m) if m.sql != row.try_get::<&str, _>("sql")? => {
                return Err(DbError::MigrationChanged { set, version });
            }
            Some(_) => {}
        }
    }
    for m in &migrations[applied.len().min(migrations.len())..] {
        sqlx::raw_sql(m.sql).execute(&mut *conn).await?;
        sqlx::query("INSERT INTO migrations VALUES (?,?,?,?,?)")
            .bind(set)
            .bind(m.version)
            .bind(m.name)
            .bind(m.sql)
            .bind(now.as_millis())
            .execute(&mut *conn)
            .await?;
    }
    Ok(())
}
