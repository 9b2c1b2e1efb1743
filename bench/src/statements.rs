//! Which statements the time in PostgreSQL goes into.

use std::process::Command;

use consign::testing::servers::PostgresServer;

/// What the server is started with, so that it counts.
pub const SETTINGS: &[&str] =
    &["shared_preload_libraries=pg_stat_statements", "pg_stat_statements.track_planning=on"];

/// So many are printed.
const TOP: usize = 12;

/// Counts from now on.
pub fn forget(postgres: &PostgresServer) {
    let sql = "CREATE EXTENSION IF NOT EXISTS pg_stat_statements; SELECT pg_stat_statements_reset()";
    tokio::task::block_in_place(|| postgres.sql("postgres", sql));
}

/// Prints those that took longest, all calls together.
pub fn print(postgres: &PostgresServer) {
    let sql = format!(
        "SELECT d.datname AS service, s.calls, s.rows, (s.total_exec_time + s.total_plan_time)::bigint AS ms,
           round((1000 * (s.total_exec_time + s.total_plan_time) / greatest(s.rows, 1))::numeric, 1) AS us_per_row,
           left(regexp_replace(s.query, '\\s+', ' ', 'g'), 90) AS statement
         FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid
         ORDER BY s.total_exec_time + s.total_plan_time DESC LIMIT {TOP}"
    );
    let printed = tokio::task::block_in_place(|| {
        Command::new(postgres.program("psql"))
            .args(["-d", &postgres.url("postgres", "postgres"), "-c", &sql])
            .output()
            .unwrap()
    });
    println!("{}", String::from_utf8_lossy(&printed.stdout));
}
