//! What a network does to a stream between collector and server: it is cut in the middle of a frame, it is late, it is slow, it
//! loses acknowledgements. And an end that comes under load.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::lab::FedNode;
use tapio_perf::clock::wait_for;
use tapio_perf::processes::{Server, ServerOptions, http};
use tapio_wire::event::Source;
use tapio_wire::frame::{HEADER_BYTES, Header, MAGIC};

const EVENTS_PER_SECOND: f64 = 20_000.0;
/// What is passed on at once: less than a frame has.
const CHUNK_BYTES: usize = 4096;
const NO_LIMIT: u64 = u64::MAX;

/// What the network does now.
struct Weather {
    /// Bytes from the collector until the connection is cut.
    until_cut: AtomicU64,
    /// Each chunk from the collector is as late as this.
    delay_ms: AtomicU64,
    /// What the server says does not arrive.
    is_deaf: AtomicBool,
    /// A frame from this one on arrives damaged, however often it is sent; 0 for none.
    flipped_from: AtomicU64,
    /// Which one, and how often it was.
    flipped: Mutex<Option<(Header, u64)>>,
    cuts: AtomicU64,
    is_over: AtomicBool,
    connections: Mutex<Vec<TcpStream>>,
}

impl Weather {
    /// Whether a frame with this header is to arrive damaged: one from `flipped_from` on, and from then on always that one.
    fn flips(&self, header: &Header) -> bool {
        let from = self.flipped_from.load(Ordering::Relaxed);
        if from == 0 || header.seq < from || header.source_events[Source::Shm as usize] == 0 {
            return false;
        }
        let mut flipped = self.flipped.lock().expect("no panic");
        let (chosen, times) = flipped.get_or_insert((*header, 0));
        let is_chosen = (chosen.epoch, chosen.seq) == (header.epoch, header.seq);
        *times += u64::from(is_chosen);
        is_chosen
    }

    fn cut(&self) {
        self.cuts.fetch_add(1, Ordering::Relaxed);
        for connection in self.connections.lock().expect("no panic").drain(..) {
            // Fails when the other side was first.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Whether these bytes may pass.
    fn lets_pass(&self, bytes: u64) -> bool {
        let take = |left: u64| Some(if left == NO_LIMIT { left } else { left.saturating_sub(bytes) });
        let before = self.until_cut.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        if before.is_ok_and(|before| before <= bytes) {
            self.until_cut.store(NO_LIMIT, Ordering::Relaxed);
            self.cut();
            return false;
        }
        true
    }
}

/// Stands between a collector and the server.
struct Proxy {
    address: SocketAddr,
    weather: Arc<Weather>,
    accepting: Option<JoinHandle<()>>,
}

impl Proxy {
    fn start(server: &Server) -> Self {
        let server: SocketAddr = server.address().parse().expect("an address");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it is bound");
        let weather = Arc::new(Weather {
            until_cut: AtomicU64::new(NO_LIMIT),
            delay_ms: AtomicU64::new(0),
            is_deaf: AtomicBool::new(false),
            flipped_from: AtomicU64::new(0),
            flipped: Mutex::default(),
            cuts: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        let of_proxy = Arc::clone(&weather);
        let accepting = std::thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { continue };
                if of_proxy.is_over.load(Ordering::Acquire) {
                    return;
                }
                let Ok(server) = TcpStream::connect(server) else { continue };
                let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
                of_proxy.connections.lock().expect("no panic").extend([clone(&client), clone(&server)]);
                let (up, down) = ((clone(&client), clone(&server)), (server, client));
                let weather = Arc::clone(&of_proxy);
                std::thread::spawn(move || pass(up.0, up.1, &weather, true));
                let weather = Arc::clone(&of_proxy);
                std::thread::spawn(move || pass(down.0, down.1, &weather, false));
            }
        });
        Self { address, weather, accepting: Some(accepting) }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.weather.is_over.store(true, Ordering::Release);
        self.weather.cut();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

/// Damages a frame on its way, wherever the chunks cut it.
#[derive(Default)]
struct Flipper {
    /// The end of the chunk before: a header may have begun in it.
    tail: Vec<u8>,
    /// Where in the next chunk the payload begins that is to be damaged.
    pending: Option<usize>,
}

impl Flipper {
    fn pass(&mut self, chunk: &mut [u8], weather: &Weather) {
        let mut bytes = std::mem::take(&mut self.tail);
        let before = bytes.len();
        bytes.extend_from_slice(chunk);
        if let Some(at) = self.pending.take() {
            chunk[at] ^= 1;
        }
        for at in 0..(bytes.len() + 1).saturating_sub(HEADER_BYTES) {
            if bytes[at..at + 4] == MAGIC
                && let Ok((header, _)) = Header::peek(&bytes[at..])
                && weather.flips(&header)
            {
                match chunk.get_mut(at + HEADER_BYTES - before) {
                    Some(byte) => *byte ^= 1,
                    // The header ends with the chunk.
                    None => self.pending = Some(0),
                }
            }
        }
        self.tail = bytes.split_off(bytes.len().saturating_sub(HEADER_BYTES - 1));
    }
}

/// Passes on until either side ends.
fn pass(mut from: TcpStream, mut to: TcpStream, weather: &Weather, is_up: bool) {
    let mut chunk = [0; CHUNK_BYTES];
    let mut flipper = Flipper::default();
    loop {
        let bytes = match from.read(&mut chunk) {
            Ok(0) => break,
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        if is_up {
            // This is the fault itself, not a wait for something.
            std::thread::sleep(Duration::from_millis(weather.delay_ms.load(Ordering::Relaxed)));
            if !weather.lets_pass(bytes as u64) {
                break;
            }
            flipper.pass(&mut chunk[..bytes], weather);
        } else if weather.is_deaf.load(Ordering::Relaxed) {
            continue;
        }
        if to.write_all(&chunk[..bytes]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

fn start_server() -> Server {
    Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn a_stream_cut_within_frames_loses_nothing() {
    let _turn = crate::lab::beside();
    let server = start_server();
    let proxy = Proxy::start(&server);
    let node = FedNode::start("cut", &proxy.address.to_string(), EVENTS_PER_SECOND);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 2_000);
    // Each time at another place in a frame.
    for bytes in [1, 7_919, 20_011, 40_009, 60_013] {
        let before = proxy.weather.cuts.load(Ordering::Relaxed);
        proxy.weather.until_cut.store(bytes, Ordering::Relaxed);
        let deadline = Instant::now() + Duration::from_secs(20);
        while proxy.weather.cuts.load(Ordering::Relaxed) == before {
            assert!(Instant::now() < deadline, "{bytes} bytes never passed\n{}", node.collector.output());
            std::thread::sleep(Duration::from_millis(2));
        }
        archived = node.archived(&server);
        node.wait_for_progress(&server, &mut archived, 2_000);
    }
    // 4 KiB in 3 ms: 1.3 MB/s, and late.
    proxy.weather.delay_ms.store(3, Ordering::Relaxed);
    node.wait_for_progress(&server, &mut archived, 10_000);
    proxy.weather.delay_ms.store(0, Ordering::Relaxed);
    let (ledger, states) = node.finish(&server);
    assert_eq!(ledger.dropped, 0, "ring and outbox outlast this: {ledger}");
    assert_eq!(states, ["closed"]);
}

#[test]
fn lost_acknowledgements_bring_no_event_twice() {
    let _turn = crate::lab::beside();
    let server = start_server();
    let proxy = Proxy::start(&server);
    let node = FedNode::start("deaf", &proxy.address.to_string(), EVENTS_PER_SECOND);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 2_000);
    for _ in 0..5 {
        proxy.weather.is_deaf.store(true, Ordering::Relaxed);
        archived = node.archived(&server);
        // Committed, and the collector does not hear of it.
        node.wait_for_progress(&server, &mut archived, 3_000);
        proxy.weather.cut();
        proxy.weather.is_deaf.store(false, Ordering::Relaxed);
        node.wait_for_progress(&server, &mut archived, 3_000);
    }
    // It closes only when archived and dropped are exactly what was emitted: an event twice would be one too many.
    let (ledger, states) = node.finish(&server);
    assert_eq!(ledger.dropped, 0, "{ledger}");
    assert_eq!(states, ["closed"]);
}

#[test]
fn a_frame_that_always_arrives_damaged_is_lost_alone() {
    let _turn = crate::lab::beside();
    let server = start_server();
    let proxy = Proxy::start(&server);
    let mut node = FedNode::start("flipped", &proxy.address.to_string(), EVENTS_PER_SECOND);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 2_000);
    // Any of those that are to come.
    proxy.weather.flipped_from.store(2, Ordering::Relaxed);
    wait_for("the epoch to end", Duration::from_secs(60), |seen| {
        let (_, text) = http::get(node.collector.port(), "/metrics")?;
        let ended =
            text.lines().find(|line| line.starts_with("tapio_collector_epochs_ended_total{reason=\"refused\"}"));
        *seen = format!("{ended:?}, {:?}", *proxy.weather.flipped.lock().expect("no panic"));
        Ok(ended.is_some_and(|line| line.ends_with(" 1")).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", node.collector.output()));
    archived = node.archived(&server);
    node.wait_for_progress(&server, &mut archived, 10_000);
    node.collector.check_running().unwrap_or_else(|error| panic!("{error}"));
    let (header, times) = proxy.weather.flipped.lock().expect("no panic").expect("it was flipped");
    assert!(times >= 5, "{times} times");
    let (ledger, states) = node.finish(&server);
    let lost: Vec<_> = ledger.losses.iter().collect();
    let events = u64::from(header.source_events[Source::Shm as usize]);
    assert_eq!(lost, [(&"outbox/malformed".to_owned(), &events)], "{ledger}");
    assert_eq!(states, ["closed", "closed"]);
}

#[test]
fn a_collector_stopped_under_load_hands_everything_over() {
    let _turn = crate::lab::alone();
    let server = start_server();
    let mut node = FedNode::start("asked-to-end", &server.address(), 100_000.0);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 50_000);
    let start = Instant::now();
    let status = node.collector.stop().expect("it ends").expect("it ran");
    assert!(status.success(), "{status}: {}", node.collector.output());
    assert!(start.elapsed() < Duration::from_secs(25), "{:?}", start.elapsed());
    node.collector.restart().unwrap_or_else(|error| panic!("{error}"));
    node.publish();
    node.wait_for_progress(&server, &mut archived, 50_000);
    let (ledger, states) = node.finish(&server);
    assert!(!ledger.losses.contains_key("collector/killed"), "{ledger}");
    assert_eq!(states, ["closed", "closed"], "{ledger}");
}
