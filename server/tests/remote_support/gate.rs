//! Stands before an object store: lets requests through, or does to them what networks and overloaded services do.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const CHUNK_BYTES: usize = 16 << 10;

/// What happens to connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Connections are closed at once.
    Unreachable,
    /// Every request is answered with 500.
    Broken,
    /// Connections are cut after this many bytes from the client.
    Half(usize),
    /// Delay of each piece.
    Slow(Duration),
}

struct Shared {
    fault: Mutex<Fault>,
    /// Connections that a fault met.
    met: AtomicU64,
    is_over: AtomicBool,
}

/// A TCP proxy on loopback.
pub struct Gate {
    pub port: u16,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Gate {
    pub fn start(to_port: u16, fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let shared =
            Arc::new(Shared { fault: Mutex::new(fault), met: AtomicU64::new(0), is_over: AtomicBool::new(false) });
        let of_gate = Arc::clone(&shared);
        let accepting = std::thread::spawn(move || {
            for client in listener.incoming() {
                if of_gate.is_over.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = client else { continue };
                let shared = Arc::clone(&of_gate);
                std::thread::spawn(move || connection(client, to_port, &shared));
            }
        });
        Self { port, shared, accepting: Some(accepting) }
    }

    pub fn set(&self, fault: Fault) {
        *self.shared.fault.lock().expect("no panic") = fault;
    }

    /// How many connections met a fault.
    pub fn met(&self) -> u64 {
        self.shared.met.load(Ordering::Relaxed)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn connection(mut client: TcpStream, to_port: u16, shared: &Arc<Shared>) {
    let fault = || *shared.fault.lock().expect("no panic");
    match fault() {
        Fault::Unreachable => {
            shared.met.fetch_add(1, Ordering::Relaxed);
            return;
        }
        Fault::Broken => {
            shared.met.fetch_add(1, Ordering::Relaxed);
            let mut head = vec![0; CHUNK_BYTES];
            let _ = client.read(&mut head);
            let answer = "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = client.write_all(answer.as_bytes());
            let _ = client.shutdown(Shutdown::Write);
            while client.read(&mut head).is_ok_and(|read| read > 0) {}
            return;
        }
        _ => {}
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", to_port)) else { return };
    let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
    let (back_from, back_to) = (clone(&server), clone(&client));
    let back = std::thread::spawn(move || pass(back_from, back_to, &mut |_| true));
    let mut passed = 0;
    let shared_there = Arc::clone(shared);
    pass(client, server, &mut |bytes| {
        passed += bytes;
        match fault() {
            Fault::Half(limit) if passed > limit => {
                shared_there.met.fetch_add(1, Ordering::Relaxed);
                false
            }
            Fault::Slow(pause) => {
                shared_there.met.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(pause);
                true
            }
            Fault::Unreachable | Fault::Broken => false,
            _ => true,
        }
    });
    let _ = back.join();
}

fn pass(mut from: TcpStream, mut to: TcpStream, may_pass: &mut dyn FnMut(usize) -> bool) {
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Some(bytes) = from.read(&mut chunk).ok().filter(|bytes| *bytes > 0) {
        if !may_pass(bytes) || to.write_all(&chunk[..bytes]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
