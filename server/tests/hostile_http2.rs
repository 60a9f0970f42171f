//! Peers that misuse HTTP/2 and TLS themselves: floods of resets, of header blocks that never end, of empty frames, and
//! handshakes that never go on. What must hold: memory stays bounded and everybody else is served.

mod archive_support;
mod programs;
mod whole_server;

use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use archive_support::Frames;
use tapio_wire::program::dial;
use tapio_wire::program::tls::{ClientFiles, ServerFiles, Watched};
use whole_server::*;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
/// What a flood may leave behind in this process.
const MEMORY_BYTES_MAX: u64 = 64 << 20;

/// A frame, RFC 9113, 4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The header block of a stream of frames, RFC 7541: indexed where the static table has it, otherwise literal.
fn ship_headers() -> Vec<u8> {
    // :method POST, :scheme http
    let mut block = vec![0x83, 0x86];
    let mut literal = |index: u8, name: &str, value: &str| {
        block.push(index);
        if index == 0 {
            block.push(name.len() as u8);
            block.extend(name.as_bytes());
        }
        block.push(value.len() as u8);
        block.extend(value.as_bytes());
    };
    literal(4, ":path", "/tapio.v1.Ingest/Ship");
    literal(1, ":authority", "tapio");
    literal(0, "content-type", "application/grpc");
    literal(0, "te", "trailers");
    block
}

/// A connection that has begun as it should. What the server says is read all the while, so that it never waits for that.
struct Hostile {
    stream: TcpStream,
    reader: JoinHandle<bool>,
}

impl Hostile {
    fn connect(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(LIMIT)).expect("set");
        stream.set_write_timeout(Some(LIMIT)).expect("set");
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("sent");
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).expect("sent");
        stream.write_all(&frame(SETTINGS, 1, 0, &[])).expect("sent");
        let reading = stream.try_clone().expect("a second descriptor");
        Self { stream, reader: std::thread::spawn(move || is_asked_to_go(reading)) }
    }

    /// Sends until all is sent or the server has had enough; how often it could.
    fn flood(&mut self, times: usize, mut part: impl FnMut(u32) -> Vec<u8>) -> usize {
        for index in 0..times {
            if let Err(error) = self.stream.write_all(&part(index as u32)) {
                assert!(
                    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset),
                    "neither taken nor refused: {error}"
                );
                return index;
            }
        }
        times
    }

    /// Ends the connection; whether the server had said that it goes.
    fn end(self) -> bool {
        // It may be closed already.
        let _ = self.stream.shutdown(Shutdown::Write);
        self.reader.join().expect("no panic")
    }
}

/// Reads frames to the end of a connection; whether GOAWAY was among them.
fn is_asked_to_go(stream: TcpStream) -> bool {
    let mut stream = BufReader::new(stream);
    let (mut head, mut asked) = ([0; 9], false);
    while stream.read_exact(&mut head).is_ok() {
        asked |= head[3] == GOAWAY;
        let length = u64::from(head[0]) << 16 | u64::from(head[1]) << 8 | u64::from(head[2]);
        if std::io::copy(&mut stream.by_ref().take(length), &mut std::io::sink()).is_err() {
            break;
        }
    }
    asked
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("pages") * 4096
}

/// Others ship meanwhile: one more frame of a node.
async fn others_are_served(server: &Whole, stream: &mut Stream, frames: &mut Frames) {
    stream.frame(frames.next()).await;
    stream.acknowledged(frames.seq).await;
    let mut new = Stream::open(server.channel().await, "", hello(&format!("new-{}", frames.seq), 1)).await.unwrap();
    new.welcome().await.expect("new ones get in");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_http2_frames_are_cut_and_others_are_served() {
    let server = Whole::start(|_| {}).await;
    let address = server.pipeline.grpc_address;
    let mut stream = Stream::open(server.channel().await, "", hello("good", 1)).await.unwrap();
    stream.welcome().await.unwrap();
    let mut frames = Frames::new("good", 1);
    others_are_served(&server, &mut stream, &mut frames).await;
    let before = resident();

    // Streams that are opened and reset at once.
    let resets = tokio::task::spawn_blocking(move || {
        let mut hostile = Hostile::connect(address);
        let sent = hostile.flood(50_000, |index| {
            let stream = index * 2 + 1;
            let mut bytes = frame(HEADERS, END_HEADERS, stream, &ship_headers());
            bytes.extend(frame(RESET, 0, stream, &8u32.to_be_bytes()));
            bytes
        });
        (sent, hostile.end())
    });
    others_are_served(&server, &mut stream, &mut frames).await;
    let (sent, asked) = resets.await.unwrap();
    eprintln!("resets: {sent} of 50,000 sent, asked to go: {asked}");
    assert!(asked || sent == 50_000, "after {sent} resets it was neither asked to go nor served");
    server.until_metric("tapio_server_ingest_streams", &[], |streams| streams <= 3.0).await;

    // A header block that does not end.
    let block = tokio::task::spawn_blocking(move || {
        let mut hostile = Hostile::connect(address);
        hostile.stream.write_all(&frame(HEADERS, 0, 1, &ship_headers())).expect("sent");
        let part = [0x00, 0x01, b'a', 0x01, b'b'].repeat(3000);
        let sent = hostile.flood(20_000, |_| frame(CONTINUATION, 0, 1, &part));
        (sent, hostile.end())
    });
    others_are_served(&server, &mut stream, &mut frames).await;
    let (sent, asked) = block.await.unwrap();
    eprintln!("continuations of 15 kB: {sent} sent, asked to go: {asked}");
    assert!(sent < 20_000, "300 MB of one header block were taken");

    // Frames of data without data.
    let empty = tokio::task::spawn_blocking(move || {
        let mut hostile = Hostile::connect(address);
        hostile.stream.write_all(&frame(HEADERS, END_HEADERS, 1, &ship_headers())).expect("sent");
        let part = frame(DATA, 0, 1, &[]).repeat(1000);
        let sent = hostile.flood(2_000, |_| part.clone());
        (sent, hostile.end())
    });
    others_are_served(&server, &mut stream, &mut frames).await;
    let (sent, asked) = empty.await.unwrap();
    eprintln!("empty data: {sent},000 of 2,000,000 sent, asked to go: {asked}");
    assert!(asked || sent == 2_000, "after {sent} thousand it was neither asked to go nor served");

    others_are_served(&server, &mut stream, &mut frames).await;
    let grown = resident().saturating_sub(before);
    eprintln!("{} KiB more resident", grown >> 10);
    assert!(grown < MEMORY_BYTES_MAX, "{grown} bytes more");
    server.until_metric("tapio_server_ingest_streams", &[], |streams| streams <= 3.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_do_not_go_on_keep_nobody_else_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["tapio-server".into()]).unwrap();
    std::fs::write(path("server.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    std::fs::write(path("server.key"), key.serialize_pem()).unwrap();
    let server = Whole::start(|config| {
        config.server.tls_enabled = true;
        config.server.tls = ServerFiles { cert: path("server.pem"), key: path("server.key"), client_ca: None };
    })
    .await;
    let address = server.pipeline.grpc_address;
    // More than there are places for handshakes; half of them begin and stop.
    let slow: Vec<TcpStream> = (0..300)
        .map(|index| {
            let mut stream = TcpStream::connect(address).expect("it listens");
            if index % 2 == 0 {
                stream.write_all(&[0x16, 0x03, 0x01, 0x02]).expect("sent");
            }
            stream
        })
        .collect();
    let files =
        ClientFiles { ca: path("server.pem"), server_name: Some("tapio-server".into()), ..ClientFiles::default() };
    let files = Arc::new(Watched::load(files).unwrap());
    let endpoint = dial::endpoint("tapio-server", address.port(), true).unwrap();
    let dialled = tokio::time::timeout(Duration::from_secs(9), dial::dial(&endpoint, address, Some(&files))).await;
    let channel = dialled.expect("before the slow ones' time is over").expect("it gets in");
    let mut stream = Stream::open(channel, "", hello("good", 1)).await.unwrap();
    stream.welcome().await.expect("served");
    let given_up = server.metric("tapio_server_tls_handshakes_total", &["result=\"given_up\""]);
    assert!(given_up >= 1.0, "{given_up}");
    drop(slow);
}
