//! The services' PostgreSQL databases as SQLite files, so that `consign verify` has one set of rules for both.

use std::path::Path;

use clap::Args;
use consign::handler::BoxError;
use consign::{Clock, DbError};
use futures_util::TryStreamExt;
use sqlx::postgres::PgRow;
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions};
use sqlx::{Arguments, AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row, SqliteConnection};

/// Where the databases are, when they are not files in the data directory.
#[derive(Clone, Debug, Default, Args)]
pub struct Databases {
    /// PostgreSQL URL of the order service's database. All three are given, or none.
    #[arg(long, env = "CONSIGN_ORDER_DB", hide_env_values = true, requires_all = ["inventory_db", "payment_db"])]
    pub order_db: Option<String>,
    /// Of the inventory service's.
    #[arg(long, env = "CONSIGN_INVENTORY_DB", hide_env_values = true, requires = "order_db")]
    pub inventory_db: Option<String>,
    /// Of the payment service's, which holds the simulated gateway's ledger too.
    #[arg(long, env = "CONSIGN_PAYMENT_DB", hide_env_values = true, requires = "order_db")]
    pub payment_db: Option<String>,
}

const LIBRARY: [&str; 4] = ["dead_letters", "inbox", "outbox", "outbox_pending"];

impl Databases {
    /// The three URLs, if they were given.
    pub fn urls(&self) -> Option<[&str; 3]> {
        Some([self.order_db.as_deref()?, self.inventory_db.as_deref()?, self.payment_db.as_deref()?])
    }
}

/// Copies what the rules look at into `dir`, as it was at one moment in each database: order's first, so that what the later ones have to
/// show for an earlier one's state is there already.
pub async fn take(urls: [&str; 3], dir: &Path) -> Result<(), BoxError> {
    let mut sources = Vec::with_capacity(urls.len());
    for url in urls {
        let mut conn =
            PgConnection::connect(url).await.map_err(|e| format!("a database cannot be reached: {e}"))?;
        sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").execute(&mut conn).await?;
        // The moment is that of the first statement.
        sqlx::query("SELECT 1 FROM inbox LIMIT 1").execute(&mut conn).await?;
        sources.push(conn);
    }
    let clock = Clock::system();
    let mut files = ["order.db", "inventory.db", "payment.db", "gateway.db"].map(|f| dir.join(f)).to_vec();
    // Only the simulated gateway keeps its books here.
    let ledger: bool = sqlx::query_scalar("SELECT to_regclass('gateway.charges') IS NOT NULL")
        .fetch_one(&mut sources[2])
        .await?;
    if !ledger {
        files.pop();
    }
    let made = async {
        // The services themselves make the tables, as they would for their own files.
        order::open(&files[0], clock.clone()).await?.close().await;
        inventory::open(&files[1], clock.clone()).await?.close().await;
        payment::open(&files[2], clock.clone()).await?.close().await;
        if let Some(file) = files.get(3) {
            payment::gateway::SimulatedGateway::open(file, payment::gateway::Knobs::default(), clock)
                .await?
                .close()
                .await;
        }
        Ok::<_, DbError>(())
    };
    made.await?;
    let tables: [(usize, &str, &[&str]); 4] = [
        (0, "public", &["orders", "timeline", "refunds"]),
        (1, "public", &["products", "stock_movements", "reservations", "returns"]),
        (2, "public", &["payments", "refunds"]),
        (2, "gateway", &["charges", "refunds"]),
    ];
    for ((source, schema, own), file) in tables.into_iter().zip(&files) {
        let mut target =
            SqliteConnectOptions::new().filename(file).disable_statement_logging().connect().await?;
        sqlx::raw_sql("PRAGMA synchronous = OFF; BEGIN").execute(&mut target).await?;
        let library: &[&str] = if schema == "public" { &LIBRARY } else { &[] };
        for table in own.iter().chain(library) {
            copy(&mut sources[source], schema, table, &mut target).await?;
        }
        sqlx::raw_sql("COMMIT").execute(&mut target).await?;
        target.close().await?;
    }
    for source in sources {
        source.close().await?;
    }
    Ok(())
}

/// One table: times become milliseconds, flags numbers, all that is not a number text.
async fn copy(
    source: &mut PgConnection,
    schema: &str,
    table: &str,
    target: &mut SqliteConnection,
) -> Result<(), BoxError> {
    let columns = sqlx::query(
        "SELECT column_name::text AS name, data_type::text AS kind FROM information_schema.columns
         WHERE table_schema = $1 AND table_name = $2 ORDER BY ordinal_position",
    )
    .bind(schema)
    .bind(table)
    .fetch_all(&mut *source)
    .await?;
    if columns.is_empty() {
        return Err(
            format!("there is no table {schema}.{table}; is this the database of that service?").into()
        );
    }
    let (mut names, mut values, mut numeric) = (Vec::new(), Vec::new(), Vec::new());
    for column in &columns {
        let (name, kind): (&str, &str) = (column.try_get("name")?, column.try_get("kind")?);
        let (value, number) = match kind {
            "timestamp with time zone" => (format!("(EXTRACT(EPOCH FROM {name}) * 1000)::bigint"), true),
            "boolean" => (format!("{name}::int::bigint"), true),
            "bigint" => (name.to_owned(), true),
            // Nothing looks at payloads.
            "bytea" => ("''::text".to_owned(), false),
            _ => (format!("{name}::text"), false),
        };
        names.push(name.to_owned());
        values.push(value);
        numeric.push(number);
    }
    // Names from the catalogue of our own tables.
    let select = format!("SELECT {} FROM {schema}.{table}", values.join(", "));
    let places = vec!["?"; names.len()].join(", ");
    let insert = format!("INSERT INTO {table} ({}) VALUES ({places})", names.join(", "));
    let mut rows = sqlx::query(AssertSqlSafe(select)).fetch(source);
    while let Some(row) = rows.try_next().await? {
        let arguments = arguments(&row, &numeric)?;
        sqlx::query_with(AssertSqlSafe(insert.as_str()), arguments).execute(&mut *target).await?;
    }
    Ok(())
}

fn arguments(row: &PgRow, numeric: &[bool]) -> Result<SqliteArguments, BoxError> {
    let mut arguments = SqliteArguments::default();
    for (i, number) in numeric.iter().enumerate() {
        if *number {
            arguments.add(row.try_get::<Option<i64>, _>(i)?)?;
        } else {
            arguments.add(row.try_get::<Option<String>, _>(i)?)?;
        }
    }
    Ok(arguments)
}
