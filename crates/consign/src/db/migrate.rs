//! Migrations: forward only, each applied once, in one transaction, under a lock.
//!
//! On PostgreSQL the previous version of a service goes on running while the next one migrates, and may start again after it. So a
//! migration may add, and must not take away or rename what the previous version uses; that comes one version later. And a version that finds
//! migrations it does not know runs all the same.

use sqlx::{AssertSqlSafe, PgConnection, PgPool, Row, SqliteConnection};

use super::DbError;
use super::sql::Bind;
use crate::Timestamp;

/// One step of a schema's history.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// Counts from 1.
    pub version: i64,
    /// What it does, in a few words.
    pub name: &'static str,
    /// The statements for SQLite.
    pub sqlite: &'static str,
    /// The statements for PostgreSQL.
    pub postgres: &'static str,
}

impl Migration {
    /// With statements that both databases understand.
    pub const fn new(version: i64, name: &'static str, sql: &'static str) -> Self {
        Self { version, name, sqlite: sql, postgres: sql }
    }
}

pub(super) const LIBRARY: &[Migration] = &[
    Migration {
        version: 1,
        name: "outbox, inbox, tasks, dead letters",
        sqlite: include_str!("library.sql"),
        postgres: include_str!("library.postgres.sql"),
    },
    Migration::new(2, "lanes, incarnations of streams", include_str!("library.2.sql")),
    Migration::new(3, "failures of tasks", include_str!("library.3.sql")),
    Migration {
        version: 4,
        name: "who reads which version of an event",
        sqlite: include_str!("library.4.sql"),
        postgres: include_str!("library.4.postgres.sql"),
    },
];

/// Serialises migrations of all replicas; any number would do.
const LOCK: i64 = 0x434f_4e53_4947_4e01;

pub(super) async fn sqlite(
    conn: &mut SqliteConnection,
    set: &'static str,
    migrations: &'static [Migration],
    now: Timestamp,
) -> Result<(), DbError> {
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut *conn).await?;
    match apply_sqlite(conn, set, migrations, now).await {
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

async fn apply_sqlite(
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
    let rows = sqlx::query("SELECT version, sql FROM migrations WHERE migration_set = ? ORDER BY version")
        .bind(set)
        .fetch_all(&mut *conn)
        .await?;
    let mut applied = Vec::with_capacity(rows.len());
    for row in &rows {
        applied.push((row.try_get("version")?, row.try_get::<String, _>("sql")?));
    }
    let unknown = check(set, migrations, &applied, |m| m.sqlite)?;
    if let Some(version) = unknown {
        // One process at a time, so nobody newer is running: this is a step back, which nothing here is made for.
        return Err(DbError::NewerDatabase { set, version });
    }
    for m in &migrations[applied.len().min(migrations.len())..] {
        sqlx::raw_sql(m.sqlite).execute(&mut *conn).await?;
        sqlx::query("INSERT INTO migrations VALUES (?,?,?,?,?)")
            .bind(set)
            .bind(m.version)
            .bind(m.name)
            .bind(m.sqlite)
            .bind(now.as_millis())
            .execute(&mut *conn)
            .await?;
    }
    Ok(())
}

pub(super) async fn postgres(
    pool: &PgPool,
    schema: Option<&'static str>,
    set: &'static str,
    migrations: &'static [Migration],
    now: Timestamp,
) -> Result<(), DbError> {
    let mut tx = pool.begin().await?;
    // Replicas that start together wait here; a migration may take longer than a statement of ours may.
    sqlx::raw_sql("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '60s'")
        .execute(&mut *tx)
        .await?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK).execute(&mut *tx).await?;
    if let Some(schema) = schema {
        // A name written in the program.
        let make = format!("CREATE SCHEMA IF NOT EXISTS {schema}");
        sqlx::raw_sql(AssertSqlSafe(make)).execute(&mut *tx).await?;
    }
    apply_postgres(&mut tx, set, migrations, now).await?;
    tx.commit().await?;
    Ok(())
}

async fn apply_postgres(
    conn: &mut PgConnection,
    set: &'static str,
    migrations: &'static [Migration],
    now: Timestamp,
) -> Result<(), DbError> {
    sqlx::raw_sql(
        "CREATE TABLE IF NOT EXISTS migrations (
            migration_set TEXT NOT NULL, version BIGINT NOT NULL, name TEXT NOT NULL, sql TEXT NOT NULL,
            applied_at TIMESTAMPTZ NOT NULL, PRIMARY KEY (migration_set, version))",
    )
    .execute(&mut *conn)
    .await?;
    let rows = sqlx::query("SELECT version, sql FROM migrations WHERE migration_set = $1 ORDER BY version")
        .bind(set)
        .fetch_all(&mut *conn)
        .await?;
    let mut applied = Vec::with_capacity(rows.len());
    for row in &rows {
        applied.push((row.try_get("version")?, row.try_get::<String, _>("sql")?));
    }
    if let Some(version) = check(set, migrations, &applied, |m| m.postgres)? {
        tracing::warn!(
            set,
            version,
            "the database was migrated by a newer version, which must allow this one to run beside it"
        );
    }
    for m in &migrations[applied.len().min(migrations.len())..] {
        // A lock that traffic holds is waited for only so long, since all traffic behind it waits too.
        sqlx::raw_sql("SET LOCAL lock_timeout = '5s'").execute(&mut *conn).await?;
        sqlx::raw_sql(m.postgres).execute(&mut *conn).await?;
        sqlx::query("INSERT INTO migrations VALUES ($1,$2,$3,$4,$5)")
            .bind(set)
            .bind(m.version)
            .bind(m.name)
            .bind(m.postgres)
            .bind(now.postgres())
            .execute(&mut *conn)
            .await?;
    }
    Ok(())
}

/// The first applied migration that is not known here, if there is one.
fn check(
    set: &'static str,
    migrations: &'static [Migration],
    applied: &[(i64, String)],
    text: fn(&Migration) -> &'static str,
) -> Result<Option<i64>, DbError> {
    let mut unknown = None;
    for (version, sql) in applied {
        match migrations.iter().find(|m| m.version == *version) {
            None => unknown = unknown.or(Some(*version)),
            Some(m) if text(m) != sql => return Err(DbError::MigrationChanged { set, version: *version }),
            Some(_) => {}
        }
    }
    Ok(unknown)
}
