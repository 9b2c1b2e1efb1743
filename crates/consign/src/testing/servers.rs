//! Real servers for tests: private ones on free ports of the loopback, in directories of their own, gone when dropped.
//!
//! The programs are looked for under `target/tools`, where `cargo xtask test --install` puts them, and then on the `PATH`.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::RngExt;
use tempfile::TempDir;

use crate::broker::nats::NatsConfig;

/// The version developed against.
pub const NATS: &str = "2.15.1";
/// The oldest version supported.
pub const OLDEST_NATS: &str = "2.10.25";
/// A server that is not up by then never will be.
const START: Duration = Duration::from_secs(30);

/// A free port of the loopback, outside the range from which the system takes ports for connections. None is given twice: between that it is
/// looked at and that a server listens on it there is time for another test.
pub(super) fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let free = |port: &u16| !given.contains(port) && TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let port =
        std::iter::repeat_with(|| rand::rng().random_range(10_000..30_000)).find(free).expect("a port");
    given.insert(port);
    port
}

fn tools() -> PathBuf {
    let mut path = std::env::current_exe().expect("the path of this program");
    while path.file_name().is_some_and(|n| n != "target") {
        assert!(path.pop(), "tests run from target/…");
    }
    path.join("tools")
}

/// # Panics
/// If it is not installed.
fn nats_program(version: &str) -> PathBuf {
    let installed = tools().join(format!("nats-server-{version}"));
    if installed.exists() {
        return installed;
    }
    let found = Command::new("nats-server").arg("--version").output();
    let found = found.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    assert!(
        found.trim().ends_with(&format!("v{version}")),
        "nats-server {version} is needed; run `cargo xtask test --install` (on the PATH is: {found:?})"
    );
    "nats-server".into()
}

/// Ends a process and waits for it.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn signal(child: &Child, signal: &str) {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status();
    assert!(sent.is_ok_and(|s| s.success()), "kill {signal}");
}

/// A nats-server with JetStream on files.
#[derive(Debug)]
pub struct NatsServer {
    program: PathBuf,
    arguments: Vec<String>,
    dir: TempDir,
    port: u16,
    child: Child,
}

impl NatsServer {
    /// One server of this version, alone.
    ///
    /// # Panics
    /// If it is not installed or does not start.
    pub fn start(version: &str) -> Self {
        Self::start_with(version, "")
    }

    /// The same, with lines added to its configuration.
    ///
    /// # Panics
    /// As above.
    pub fn start_with(version: &str, configuration: &str) -> Self {
        let mut server = Self::spawned(version, configuration);
        server.wait();
        server
    }

    fn spawned(version: &str, configuration: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let port = free_port();
        let file = dir.path().join("nats.conf");
        let store = dir.path().join("store");
        let text = format!(
            "listen: \"127.0.0.1:{port}\"\nserver_name: \"test-{port}\"\njetstream {{ store_dir: \"{}\" }}\n{configuration}\n",
            store.display()
        );
        fs::write(&file, text).expect("a configuration");
        let arguments = vec!["-c".to_owned(), file.display().to_string()];
        let program = nats_program(version);
        let child = spawn(&program, &arguments, dir.path());
        Self { program, arguments, dir, port, child }
    }

    /// Three servers of one cluster, of which two make a quorum.
    ///
    /// # Panics
    /// As above.
    pub fn cluster(version: &str) -> Vec<Self> {
        let routes: Vec<u16> = (0..3).map(|_| free_port()).collect();
        let all: Vec<String> = routes.iter().map(|p| format!("\"nats://127.0.0.1:{p}\"")).collect();
        let cluster = |route: &u16| {
            format!("cluster {{ name: test, listen: \"127.0.0.1:{route}\", routes: [{}] }}", all.join(", "))
        };
        Self::together(version, &routes.iter().map(cluster).collect::<Vec<_>>())
    }

    /// Servers with these lines in their configurations, started before any is waited for.
    pub(super) fn together(version: &str, configurations: &[String]) -> Vec<Self> {
        let mut servers: Vec<Self> = configurations.iter().map(|c| Self::spawned(version, c)).collect();
        for server in &mut servers {
            server.wait();
        }
        servers
    }

    fn wait(&mut self) {
        let started = Instant::now();
        // The port answers before JetStream does; the log says when it is done.
        while !fs::read_to_string(self.log()).is_ok_and(|log| log.contains("Server is ready")) {
            if let Some(status) = self.child.try_wait().expect("a child") {
                panic!(
                    "nats-server ended with {status}: {}",
                    fs::read_to_string(self.log()).unwrap_or_default()
                );
            }
            assert!(started.elapsed() < START, "nats-server did not start in {START:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// A configuration that connects to it.
    pub fn config(&self) -> NatsConfig {
        NatsConfig { urls: vec![self.url()], connect_limit: Duration::from_secs(10), ..NatsConfig::default() }
    }

    /// Stops it where it is: nobody hears of it any more, and its connections stay open.
    pub fn freeze(&self) {
        signal(&self.child, "-STOP");
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        signal(&self.child, "-CONT");
    }

    /// kill -9.
    pub fn kill(&mut self) {
        end(&mut self.child);
    }

    /// Starts it again where it was.
    pub fn start_again(&mut self) {
        end(&mut self.child);
        let _ = fs::remove_file(self.log());
        self.child = spawn(&self.program, &self.arguments, self.dir.path());
        self.wait();
    }

    /// Deletes everything it stored; it must not run.
    ///
    /// # Panics
    /// If that cannot be done.
    pub fn delete_store(&mut self) {
        end(&mut self.child);
        fs::remove_dir_all(self.dir.path().join("store")).expect("a store to delete");
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn spawn(program: &Path, arguments: &[String], dir: &Path) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).expect("a log");
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a log"))
        .stderr(log)
        .spawn()
        .unwrap_or_else(|e| panic!("{}: {e}", program.display()))
}

/// A PostgreSQL server with nothing in it.
#[derive(Debug)]
pub struct PostgresServer {
    programs: PathBuf,
    settings: Vec<String>,
    dir: TempDir,
    port: u16,
    child: Child,
}

impl PostgresServer {
    /// Makes a cluster and starts it, as safe as production: `fsync` and `synchronous_commit` are on.
    ///
    /// # Panics
    /// If it is not installed or does not start.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same, with settings like `shared_preload_libraries=pg_stat_statements`.
    ///
    /// # Panics
    /// As above.
    pub fn start_with(settings: &[&str]) -> Self {
        let programs = postgres_programs();
        let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
        let dir = tempfile::tempdir().expect("a temporary directory");
        let data = dir.path().join("data");
        let port = free_port();
        // PostgreSQL refuses to run as root, so root hands over to the user that Debian's package makes.
        if let Some((uid, gid)) = unprivileged() {
            std::os::unix::fs::chown(dir.path(), Some(uid), Some(gid)).expect("a directory for postgres");
        }
        let made = as_postgres(&programs.join("initdb"))
            .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-sync", "--pgdata"])
            .arg(&data)
            .output()
            .expect("initdb");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let child = Self::spawn(&programs, dir.path(), port, &settings);
        let mut server = Self { programs, settings, dir, port, child };
        server.wait();
        server
    }

    fn spawn(programs: &Path, dir: &Path, port: u16, settings: &[String]) -> Child {
        let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).expect("a log");
        as_postgres(&programs.join("postgres"))
            .arg("-D")
            .arg(dir.join("data"))
            .args(["-p", &port.to_string()])
            .args([
                "-c",
                "listen_addresses=127.0.0.1",
                "-c",
                "unix_socket_directories=",
                "-c",
                "max_connections=200",
            ])
            .args(settings.iter().flat_map(|s| ["-c", s]))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("postgres")
    }

    fn wait(&mut self) {
        let started = Instant::now();
        loop {
            let asked = Command::new(self.programs.join("pg_isready"))
                .args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()])
                .status();
            if asked.is_ok_and(|s| s.success()) {
                return;
            }
            if let Some(status) = self.child.try_wait().expect("a child") {
                let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
                panic!("postgres ended with {status}: {log}");
            }
            assert!(started.elapsed() < START, "postgres did not start in {START:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// One of PostgreSQL's programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// The URL of a database, as its owner `user`; no password is asked for.
    pub fn url(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{database}", self.port)
    }

    /// Runs SQL as the superuser.
    ///
    /// # Panics
    /// If it fails.
    pub fn sql(&self, database: &str, sql: &str) {
        let done = Command::new(self.programs.join("psql"))
            .args(["-v", "ON_ERROR_STOP=1", "-q", "-d", &self.url("postgres", database), "-c", sql])
            .output()
            .expect("psql");
        assert!(done.status.success(), "psql: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// A database of its own, owned by a role of the same name; its URL.
    pub fn database(&self, name: &str) -> String {
        self.sql("postgres", &format!("CREATE ROLE \"{name}\" LOGIN"));
        self.sql("postgres", &format!("CREATE DATABASE \"{name}\" OWNER \"{name}\""));
        self.url(name, name)
    }

    /// Stops it at once, connections and all, as a crash would.
    pub fn stop(&mut self) {
        signal(&self.child, "-QUIT");
        let _ = self.child.wait();
    }

    /// Starts it again where it was.
    pub fn start_again(&mut self) {
        end(&mut self.child);
        let _ = fs::remove_file(self.dir.path().join("data/postmaster.pid"));
        self.child = Self::spawn(&self.programs, self.dir.path(), self.port, &self.settings);
        self.wait();
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        // Its children end with it when it is told; a kill would leave them.
        if matches!(self.child.try_wait(), Ok(None)) {
            signal(&self.child, "-QUIT");
        }
        let _ = self.child.wait();
    }
}

/// Where PostgreSQL's programs lie: on the PATH, or where Debian keeps them, the newest first.
fn postgres_programs() -> PathBuf {
    let on_path = std::env::var_os("PATH").and_then(|paths| {
        std::env::split_paths(&paths).find(|p| p.join("initdb").exists() && p.join("pg_isready").exists())
    });
    let debian = || {
        let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .filter_map(|e| Some(e.ok()?.path().join("bin")))
            .filter(|p| p.join("initdb").exists())
            .collect();
        found.sort();
        found.pop()
    };
    on_path.or_else(debian).expect("PostgreSQL is needed; run `cargo xtask test --install`")
}

/// User and group `postgres`, if we are root.
fn unprivileged() -> Option<(u32, u32)> {
    let id = |arguments: &[&str]| -> Option<u32> {
        let out = Command::new("id").args(arguments).output().ok()?;
        String::from_utf8_lossy(&out.stdout).trim().parse().ok()
    };
    if id(&["-u"])? != 0 {
        return None;
    }
    Some((id(&["-u", "postgres"])?, id(&["-g", "postgres"])?))
}

fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new(program);
    if let Some((uid, gid)) = unprivileged() {
        command.uid(uid).gid(gid);
    }
    command.current_dir("/");
    command
}
