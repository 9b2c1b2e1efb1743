//! Every database against the database conformance suite.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in tests, a panic is how a step fails")]

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use consign::db::PostgresConfig;
use consign::testing::database::{MIGRATIONS, Subject, run};
use consign::testing::servers::PostgresServer;
use consign::{Clock, Db};

struct Sqlite {
    dir: tempfile::TempDir,
    count: AtomicU32,
}

impl Subject for Sqlite {
    async fn fresh(&self) -> Db {
        let n = self.count.fetch_add(1, Ordering::Relaxed);
        Db::open(&self.dir.path().join(format!("{n}.db")), "test", MIGRATIONS, Clock::system()).await.unwrap()
    }
    async fn replica(&self, _: &Db) -> Option<Db> {
        None
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite() {
    run(&Sqlite { dir: tempfile::tempdir().unwrap(), count: AtomicU32::new(0) }).await;
}

struct Postgres {
    server: PostgresServer,
    /// The database behind each service name.
    urls: Mutex<HashMap<String, String>>,
}

impl Postgres {
    fn start() -> Self {
        Self { server: PostgresServer::start(), urls: Mutex::default() }
    }
}

fn config(url: &str) -> PostgresConfig {
    PostgresConfig { url: url.to_owned(), max_connections: 6, ..PostgresConfig::default() }
}

impl Subject for Postgres {
    async fn fresh(&self) -> Db {
        let name = format!("test{}", self.urls.lock().unwrap().len());
        let url = tokio::task::block_in_place(|| self.server.database(&name));
        self.urls.lock().unwrap().insert(name.clone(), url.clone());
        Db::open(config(&url), &name, MIGRATIONS, Clock::system()).await.unwrap()
    }
    async fn replica(&self, db: &Db) -> Option<Db> {
        let url = self.urls.lock().unwrap()[db.service()].clone();
        Some(Db::open(config(&url), db.service(), MIGRATIONS, Clock::system()).await.unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres() {
    run(&Postgres::start()).await;
}

/// A replica that freezes in the middle of a transaction holds its locks no longer than it may; the one that waits gets them, or gives up in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_replica_holds_nobody_up() {
    let subject = Postgres::start();
    let db = subject.fresh().await;
    let other = subject.replica(&db).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    tx.query("INSERT INTO counters (name, n) VALUES ('held', 1)").execute().await.unwrap();
    // It holds the row, and does nothing any more.
    let started = Instant::now();
    loop {
        let mut tx = other.begin().await.unwrap();
        let taken = tx.query("INSERT INTO counters (name, n) VALUES ('held', 2)").execute().await;
        if taken.is_ok() {
            tx.commit().await.unwrap();
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(25), "{taken:?}");
    }
    assert!(started.elapsed() > Duration::from_secs(4), "until then it was held");
    assert!(tx.commit().await.is_err(), "the frozen one finds that it lost");
    let n: i64 = other.query("SELECT n FROM counters").fetch_scalar().await.unwrap();
    assert_eq!(n, 2);
}

/// What was committed before a restart is there after it, and the pool finds its way back by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_server_is_survived() {
    let mut subject = Postgres::start();
    let db = subject.fresh().await;
    let mut tx = db.begin().await.unwrap();
    tx.query("INSERT INTO counters (name, n) VALUES ('kept', 1)").execute().await.unwrap();
    tx.commit().await.unwrap();
    tokio::task::block_in_place(|| subject.server.stop());
    assert!(db.ping().await.is_err());
    tokio::task::block_in_place(|| subject.server.start_again());
    let started = Instant::now();
    while db.ping().await.is_err() {
        assert!(started.elapsed() < Duration::from_secs(20), "the pool does not recover");
    }
    let n: i64 = db.query("SELECT n FROM counters").fetch_scalar().await.unwrap();
    assert_eq!(n, 1);
}
