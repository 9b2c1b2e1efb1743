//! A cluster whose nodes can be cut off from each other while their clients still reach them: the network between machines fails, and
//! nobody is told.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::servers::{NatsServer, free_port};

/// How soon a cut takes effect.
const TICK: Duration = Duration::from_millis(20);

/// The links between the nodes of a cluster. Dropped, they end.
#[derive(Debug)]
pub struct Links {
    /// By the node that connects and the one it connects to.
    cut: Vec<Vec<Arc<AtomicBool>>>,
    over: Arc<AtomicBool>,
}

impl Links {
    /// Three servers of one cluster, and the links between them.
    ///
    /// # Panics
    /// If they do not start.
    pub fn cluster(version: &str) -> (Vec<NatsServer>, Self) {
        let listens: Vec<u16> = (0..3).map(|_| free_port()).collect();
        let over = Arc::new(AtomicBool::new(false));
        let mut cut = Vec::new();
        let mut configurations = Vec::new();
        for from in 0..3 {
            let (mut switches, mut routes) = (Vec::new(), Vec::new());
            for (to, listen) in listens.iter().enumerate() {
                let switch = Arc::new(AtomicBool::new(false));
                if to != from {
                    let port = link(*listen, Arc::clone(&switch), Arc::clone(&over));
                    routes.push(format!("\"nats://127.0.0.1:{port}\""));
                }
                switches.push(switch);
            }
            cut.push(switches);
            // What is told to others leads nowhere, so that they use the links and nothing else.
            configurations.push(format!(
                "cluster {{ name: test, listen: \"127.0.0.1:{}\", advertise: \"127.0.0.1:1\", routes: [{}] }}",
                listens[from],
                routes.join(", ")
            ));
        }
        (NatsServer::together(version, &configurations), Self { cut, over })
    }

    fn set(&self, node: usize, cut: bool) {
        for (from, switches) in self.cut.iter().enumerate() {
            for (to, switch) in switches.iter().enumerate() {
                if from == node || to == node {
                    switch.store(cut, Ordering::SeqCst);
                }
            }
        }
    }

    /// Nothing passes between this node and the others any more; connections stay, silent.
    pub fn cut(&self, node: usize) {
        self.set(node, true);
    }

    /// All passes again, what waited first.
    pub fn heal(&self, node: usize) {
        self.set(node, false);
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

/// Listens, and passes on to a port of the loopback what is not cut; where it listens.
fn link(to: u16, cut: Arc<AtomicBool>, over: Arc<AtomicBool>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    listener.set_nonblocking(true).expect("a listener");
    std::thread::spawn(move || {
        while !over.load(Ordering::SeqCst) {
            let Ok((near, _)) = listener.accept() else {
                std::thread::sleep(TICK);
                continue;
            };
            // Whoever is refused tries again.
            let Ok(far) = TcpStream::connect(("127.0.0.1", to)) else { continue };
            for (from, to) in [(&near, &far), (&far, &near)] {
                let (from, to) = (from.try_clone().expect("a socket"), to.try_clone().expect("a socket"));
                let (cut, over) = (Arc::clone(&cut), Arc::clone(&over));
                std::thread::spawn(move || pump(from, to, &cut, &over));
            }
        }
    });
    port
}

fn pump(mut from: TcpStream, mut to: TcpStream, cut: &AtomicBool, over: &AtomicBool) {
    from.set_nonblocking(false).expect("a socket");
    from.set_read_timeout(Some(TICK)).expect("a socket");
    let mut buffer = vec![0; 64 * 1024];
    while !over.load(Ordering::SeqCst) {
        if cut.load(Ordering::SeqCst) {
            std::thread::sleep(TICK);
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) if to.write_all(&buffer[..n]).is_ok() => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            _ => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
