//! Stands between a server and NATS: delays, throttles, holds or cuts what passes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

const CHUNK_BYTES: usize = 16 << 10;

#[derive(Default)]
struct State {
    delay: Duration,
    /// 0: as fast as it goes.
    bytes_per_second: u64,
    /// Nothing passes and nothing is said, as between two halves of a network.
    is_held: bool,
    is_over: bool,
    connections: Vec<TcpStream>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }
}

/// A TCP proxy on loopback that holds, slows or cuts its connections.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Proxy {
    pub fn start(to_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let shared = Arc::new(Shared::default());
        let of_proxy = Arc::clone(&shared);
        let accepting = std::thread::spawn(move || {
            for client in listener.incoming() {
                if of_proxy.lock().is_over {
                    return;
                }
                let Ok(client) = client else { continue };
                let Ok(server) = TcpStream::connect(("127.0.0.1", to_port)) else { continue };
                let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
                of_proxy.lock().connections.extend([clone(&client), clone(&server)]);
                for (from, to) in [(clone(&client), clone(&server)), (server, client)] {
                    let shared = Arc::clone(&of_proxy);
                    std::thread::spawn(move || pass(from, to, &shared));
                }
            }
        });
        Self { port, shared, accepting: Some(accepting) }
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Each chunk waits for `delay`, in each direction, and takes its time.
    pub fn slow(&self, delay: Duration, bytes_per_second: u64) {
        let mut state = self.shared.lock();
        (state.delay, state.bytes_per_second) = (delay, bytes_per_second);
    }

    /// Lets nothing pass, or all of it again.
    pub fn hold(&self, is_held: bool) {
        self.shared.lock().is_held = is_held;
        self.shared.changed.notify_all();
    }

    /// Ends every connection.
    pub fn cut(&self) {
        for connection in self.shared.lock().connections.drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.hold(false);
        self.cut();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, shared: &Shared) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let rate = shared.lock().bytes_per_second;
        // Of a slow one, what passes in a tenth of a second.
        let at_once = if rate == 0 { CHUNK_BYTES } else { CHUNK_BYTES.min((rate / 10).max(1) as usize) };
        let Some(bytes) = from.read(&mut chunk[..at_once]).ok().filter(|bytes| *bytes > 0) else { break };
        let held = |state: &mut State| state.is_held && !state.is_over;
        let state = shared.changed.wait_while(shared.lock(), held).expect("no panic");
        let (delay, rate) = (state.delay, state.bytes_per_second);
        drop(state);
        let takes = if rate == 0 { Duration::ZERO } else { Duration::from_secs_f64(bytes as f64 / rate as f64) };
        if !(delay + takes).is_zero() {
            std::thread::sleep(delay + takes);
        }
        if to.write_all(&chunk[..bytes]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
