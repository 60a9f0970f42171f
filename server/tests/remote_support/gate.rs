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
    /// What would write is answered with 507, or cut off behind other requests; reading works.
    Full,
    /// Connections are cut after this many bytes from the client.
    Half(usize),
    /// Delay of each piece.
    Slow(Duration),
}

struct Shared {
    fault: Mutex<Fault>,
    /// Connections that a fault met.
    met: AtomicU64,
    /// Bytes to clients.
    sent_back: AtomicU64,
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
        let shared = Arc::new(Shared {
            fault: Mutex::new(fault),
            met: AtomicU64::new(0),
            sent_back: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
        });
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

    /// Bytes that went to clients.
    pub fn sent_back(&self) -> u64 {
        self.shared.sent_back.load(Ordering::Relaxed)
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

fn connection(client: TcpStream, to_port: u16, shared: &Arc<Shared>) {
    let fault = || *shared.fault.lock().expect("no panic");
    match fault() {
        Fault::Unreachable => {
            shared.met.fetch_add(1, Ordering::Relaxed);
            return;
        }
        Fault::Broken => return refuse(client, "500 Internal Server Error", shared),
        Fault::Full => {
            let mut begin = [0; 4];
            if client.peek(&mut begin).is_ok_and(|read| is_write(&begin[..read])) {
                return refuse(client, "507 Insufficient Storage", shared);
            }
        }
        _ => {}
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", to_port)) else { return };
    let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
    let (back_from, back_to) = (clone(&server), clone(&client));
    let shared_back = Arc::clone(shared);
    let back = std::thread::spawn(move || {
        pass(back_from, back_to, &mut |chunk| {
            shared_back.sent_back.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            true
        });
    });
    let mut passed = 0;
    let shared_there = Arc::clone(shared);
    pass(client, server, &mut |chunk| {
        let bytes = chunk.len();
        passed += bytes;
        match fault() {
            Fault::Full if is_write(chunk) => {
                shared_there.met.fetch_add(1, Ordering::Relaxed);
                false
            }
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

/// Whether a request begins here that would write.
fn is_write(begin: &[u8]) -> bool {
    begin.starts_with(b"PUT ") || begin.starts_with(b"POST")
}

/// Answers whatever is asked with an error.
fn refuse(mut client: TcpStream, status: &str, shared: &Shared) {
    shared.met.fetch_add(1, Ordering::Relaxed);
    let mut head = vec![0; CHUNK_BYTES];
    let _ = client.read(&mut head);
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let _ = client.write_all(answer.as_bytes());
    let _ = client.shutdown(Shutdown::Write);
    while client.read(&mut head).is_ok_and(|read| read > 0) {}
}

fn pass(mut from: TcpStream, mut to: TcpStream, may_pass: &mut dyn FnMut(&[u8]) -> bool) {
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Some(bytes) = from.read(&mut chunk).ok().filter(|bytes| *bytes > 0) {
        if !may_pass(&chunk[..bytes]) || to.write_all(&chunk[..bytes]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
