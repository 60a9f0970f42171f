//! Streams over a real gRPC server on the loopback: what is accepted, what is refused, and what is acknowledged when.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::archive_support::*;
use crate::whole_server::hello;
use bytes::Bytes;
use prometheus::Registry;
use tapio_server::archive::{Archive, QUEUE_BYTES_MAX, lock_books};
use tapio_server::ingest::{CREDIT_BYTES, CREDIT_BYTES_MIN, FrameSink, IngestMetrics, IngestService, settings};
use tapio_wire::event::{Lane, Source};
use tapio_wire::frame::{Frame, HEADER_BYTES, VERSION};
use tapio_wire::limits::REFUSED_FRAME_KEY;
use tapio_wire::service::ingest_client::IngestClient;
use tapio_wire::service::{Ack, Hello, ShipRequest, ShipResponse, Welcome, ship_request, ship_response};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Status, Streaming};

#[derive(Default)]
struct Recorder {
    frames: Mutex<Vec<(Arc<str>, Arc<Frame>)>>,
}

impl Recorder {
    fn seqs(&self) -> Vec<u64> {
        let frames = self.frames.lock().unwrap();
        frames.iter().map(|(_, frame)| frame.header().seq).collect()
    }
}

impl FrameSink for Recorder {
    async fn deliver(&self, node: &Arc<str>, frame: Arc<Frame>) {
        self.frames.lock().unwrap().push((Arc::clone(node), frame));
    }
}

struct Running {
    disk: FaultyDisk,
    archive: Archive,
    service: IngestService<Arc<Recorder>>,
    recorder: Arc<Recorder>,
    metrics: Arc<IngestMetrics>,
    address: std::net::SocketAddr,
    _dir: tempfile::TempDir,
}

async fn start() -> Running {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = Archive::open_on(plain(dir.path()), disk.clone(), Duration::ZERO, &mut |_, _| {}).unwrap();
    let metrics = Arc::new(IngestMetrics::register(&Registry::new()).unwrap());
    let recorder = Arc::new(Recorder::default());
    let service = IngestService::new(&archive, Arc::clone(&recorder), Arc::clone(&metrics));
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let server = settings(Server::builder(), 1000).add_service(service.server());
    tokio::spawn(server.serve_with_incoming(incoming));
    Running { disk, archive, service, recorder, metrics, address, _dir: dir }
}

struct Client {
    requests: mpsc::Sender<ShipRequest>,
    responses: Streaming<ShipResponse>,
}

impl Running {
    async fn connect(&self) -> Client {
        let endpoint = format!("http://{}", self.address);
        let mut client = IngestClient::connect(endpoint).await.unwrap();
        let (requests, receiver) = mpsc::channel(64);
        let responses = client.ship(ReceiverStream::new(receiver)).await.unwrap();
        Client { requests, responses: responses.into_inner() }
    }

    /// A stream that has been welcomed.
    async fn stream(&self, name: &str, epoch: u64) -> (Client, Welcome) {
        let mut client = self.connect().await;
        client.hello(hello(name, epoch)).await;
        let welcome = client.welcome().await;
        (client, welcome)
    }

    fn durable(&self, frames: &Frames) -> u64 {
        lock_books(self.archive.books()).durable_seq(frames.node(), frames.epoch)
    }
}

impl Client {
    async fn hello(&self, hello: Hello) {
        self.send(ship_request::Kind::Hello(hello)).await;
    }

    async fn frame(&self, bytes: impl Into<Bytes>) {
        self.send(ship_request::Kind::Frame(bytes.into())).await;
    }

    async fn send(&self, kind: ship_request::Kind) {
        // A stream that was refused meanwhile shows in its responses.
        let _ = self.requests.send(ShipRequest { kind: Some(kind) }).await;
    }

    async fn response(&mut self) -> Result<ship_response::Kind, Status> {
        match tokio::time::timeout(PATIENCE, self.responses.message()).await {
            Ok(Ok(Some(response))) => Ok(response.kind.expect("a kind")),
            Ok(Ok(None)) => Err(Status::ok("the stream ended")),
            Ok(Err(status)) => Err(status),
            Err(_) => panic!("no response within {PATIENCE:?}"),
        }
    }

    async fn welcome(&mut self) -> Welcome {
        match self.response().await {
            Ok(ship_response::Kind::Welcome(welcome)) => welcome,
            other => panic!("no welcome but {other:?}"),
        }
    }

    /// Reads acknowledgements until one reaches `seq`.
    async fn acknowledged(&mut self, seq: u64) -> Ack {
        loop {
            match self.response().await {
                Ok(ship_response::Kind::Ack(ack)) if ack.durable_seq >= seq => return ack,
                Ok(_) => {}
                Err(status) => panic!("no acknowledgement but {status}"),
            }
        }
    }

    /// Reads until the server ends the stream.
    async fn end(mut self) -> Status {
        loop {
            if let Err(status) = self.response().await {
                return status;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_are_archived_delivered_and_then_acknowledged() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 3);
    frames.events = 10;
    let (mut client, welcome) = server.stream("node-1", 3).await;
    assert_eq!((welcome.durable_seq, welcome.credit_bytes, welcome.version), (0, CREDIT_BYTES, u32::from(VERSION)));
    for _ in 0..50 {
        client.frame(frames.next()).await;
    }
    frames.lane = Lane::Lethal;
    client.frame(frames.next()).await;
    let ack = client.acknowledged(51).await;
    assert_eq!(ack.durable_seq, 51);
    assert_eq!(server.durable(&frames), 51);
    assert_eq!(server.recorder.seqs(), (1..=51).collect::<Vec<_>>());
    assert_eq!(&*server.recorder.frames.lock().unwrap()[0].0, "node-1");
    assert_eq!(server.metrics.events(Source::Ebpf, Lane::Bulk), 500);
    assert_eq!(server.metrics.events(Source::Ebpf, Lane::Lethal), 10);
    assert!(server.service.is_connected(frames.node()));
    let books = lock_books(server.archive.books());
    assert_eq!(books.unexplained_total(), 0);
    assert_eq!(books.name(frames.node()).map(|name| &**name), Some("node-1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acks_wait_for_durability_and_credit_shrinks_meanwhile() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (mut client, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.full = true);
    client.frame(frames.next()).await;
    // The acknowledgement that announces less credit.
    let Ok(ship_response::Kind::Ack(ack)) = client.response().await else {
        panic!("no acknowledgement");
    };
    assert_eq!((ack.durable_seq, ack.credit_bytes), (0, CREDIT_BYTES_MIN));
    assert_eq!(server.recorder.seqs(), [1], "correlation does not wait for the disk");
    server.disk.set(|faults| faults.full = false);
    client.acknowledged(1).await;
}

/// FAULTS 9.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_disk_shrinks_credit_and_its_queue_is_bounded() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    frames.events = 60_000;
    let (mut client, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.sync_delay = Duration::from_millis(300));
    let (mut least, mut most) = (CREDIT_BYTES, 0);
    for _ in 0..60 {
        client.frame(frames.next()).await;
        most = most.max(server.archive.stats().backlog_bytes);
    }
    loop {
        let Ok(ship_response::Kind::Ack(ack)) = client.response().await else { panic!("no acknowledgement") };
        least = least.min(ack.credit_bytes);
        most = most.max(server.archive.stats().backlog_bytes);
        if ack.durable_seq == frames.seq {
            break;
        }
    }
    assert!((CREDIT_BYTES_MIN..CREDIT_BYTES).contains(&least), "{least}");
    assert!(most > 0 && most <= QUEUE_BYTES_MAX as u64, "{most}");
    server.disk.set(|faults| faults.sync_delay = Duration::ZERO);
    wait_until("nothing waits any more", || server.archive.stats().backlog_bytes == 0);
    let (_other, welcome) = server.stream("node-2", 1).await;
    assert_eq!(welcome.credit_bytes, CREDIT_BYTES, "it grows again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_closed_stream_is_acknowledged_to_its_end() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (client, _) = server.stream("node-1", 1).await;
    for _ in 0..20 {
        client.frame(frames.next()).await;
    }
    let Client { requests, mut responses } = client;
    drop(requests);
    let mut last = 0;
    while let Some(response) = responses.message().await.unwrap() {
        if let Some(ship_response::Kind::Ack(ack)) = response.kind {
            last = ack.durable_seq;
        }
    }
    assert_eq!(last, 20);
    wait_until("the node is disconnected", || !server.service.is_connected(frames.node()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_duplicate_is_dropped_and_acknowledged_again() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (first, second) = (frames.next(), frames.next());
    let (mut client, _) = server.stream("node-1", 1).await;
    client.frame(first.clone()).await;
    client.frame(second.clone()).await;
    client.acknowledged(2).await;
    client.frame(second).await;
    client.acknowledged(2).await;
    drop(client);
    // The acknowledgement was lost: a new stream sends everything again.
    let (mut client, welcome) = server.stream("node-1", 1).await;
    assert_eq!(welcome.durable_seq, 2);
    client.frame(first).await;
    client.acknowledged(2).await;
    assert_eq!(server.metrics.duplicates(), 2);
    assert_eq!(server.recorder.seqs(), [1, 2]);
    assert_eq!(lock_books(server.archive.books()).totals().frames, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nodes_later_stream_continues_where_the_earlier_was() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (first, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.full = true);
    first.frame(frames.next()).await;
    wait_until("the frame is accepted", || server.recorder.seqs() == [1]);
    let (mut second, welcome) = server.stream("node-1", 1).await;
    assert_eq!(welcome.durable_seq, 0);
    assert_eq!(first.end().await.code(), Code::Aborted);
    second.frame(frames.next()).await;
    server.disk.set(|faults| faults.full = false);
    // The first stream's frame is acknowledged to the second.
    second.acknowledged(2).await;
    assert_eq!(server.recorder.seqs(), [1, 2]);
    assert!(server.service.is_connected(frames.node()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takeover_works_while_the_earlier_stream_waits_for_room() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    frames.events = 60_000;
    let (client, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.full = true);
    while let Ok(()) = tokio::time::timeout(Duration::from_millis(500), client.frame(frames.next())).await {}
    let backlog = server.archive.stats().backlog_bytes;
    assert!(backlog > QUEUE_BYTES_MAX as u64 / 2, "{backlog} wait");
    let accepted = server.recorder.seqs().len() as u64;
    let (mut second, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.full = false);
    let mut again = Frames::new("node-1", 1);
    again.events = 60_000;
    for _ in 0..=accepted {
        second.frame(again.next()).await;
    }
    second.acknowledged(accepted + 1).await;
    let seqs = server.recorder.seqs();
    assert!(seqs.is_sorted() && seqs.windows(2).all(|pair| pair[0] < pair[1]), "{seqs:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hellos_that_do_not_hold_are_refused() {
    let server = start().await;
    let long = "n".repeat(254);
    let cases = [
        (hello("", 1), Code::InvalidArgument, "node_name"),
        (hello(&long, 1), Code::InvalidArgument, "node_name"),
        (hello("a\nb", 1), Code::InvalidArgument, "node_name"),
        (Hello { node_id: 1, ..hello("node-1", 1) }, Code::FailedPrecondition, "node_id"),
        (Hello { version: 0, ..hello("node-1", 1) }, Code::FailedPrecondition, "hello_version"),
        (Hello { version: u32::from(VERSION) + 1, ..hello("node-1", 1) }, Code::FailedPrecondition, "hello_version"),
    ];
    for (hello, code, reason) in cases {
        let before = server.metrics.refused(reason);
        let client = server.connect().await;
        client.hello(hello).await;
        let status = client.end().await;
        assert_eq!(status.code(), code, "{status}");
        assert_eq!(server.metrics.refused(reason), before + 1, "{reason}");
    }
    let client = server.connect().await;
    client.frame(Frames::new("node-1", 1).next()).await;
    let status = client.end().await;
    assert_eq!((status.code(), blamed_for(&status)), (Code::InvalidArgument, None));
    assert_eq!(server.metrics.refused("no_hello"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_epoch_is_refused_a_newer_starts_anew() {
    let server = start().await;
    let mut newer = Frames::new("node-1", 9);
    let (mut client, _) = server.stream("node-1", 9).await;
    client.frame(newer.next()).await;
    client.acknowledged(1).await;
    let old = server.connect().await;
    old.hello(hello("node-1", 8)).await;
    let status = old.end().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(server.metrics.refused("old_epoch"), 1);
    assert!(server.service.is_connected(newer.node()), "the newer one stays");
    let (mut client, welcome) = server.stream("node-1", 10).await;
    assert_eq!(welcome.durable_seq, 0);
    client.frame(Frames::new("node-1", 10).next()).await;
    client.acknowledged(1).await;
}

/// Sends one good frame, then `bytes`; returns how the stream ended.
async fn ended_by(server: &Running, name: &str, bytes: impl FnOnce(&mut Frames) -> Bytes) -> Status {
    let mut frames = Frames::new(name, 1);
    let (mut client, _) = server.stream(name, 1).await;
    client.frame(frames.next()).await;
    client.acknowledged(1).await;
    client.frame(bytes(&mut frames)).await;
    client.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_out_of_place_are_refused_and_counted() {
    type Bad = fn(&mut Frames) -> Bytes;
    let cases: [(&str, Code, &str, Bad); 6] = [
        ("a", Code::PermissionDenied, "foreign_node", |_| Frames::new("other", 1).next()),
        ("b", Code::PermissionDenied, "foreign_epoch", |_| Frames::new("b", 2).next()),
        ("c", Code::InvalidArgument, "sequence_gap", |frames| {
            frames.seq += 1;
            frames.next()
        }),
        ("d", Code::InvalidArgument, "sequence_gap", |frames| {
            frames.seq = u64::MAX - 1;
            frames.next()
        }),
        ("e", Code::InvalidArgument, "sequence_zero", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[24..32].fill(0);
            fix_header(bytes)
        }),
        ("f", Code::InvalidArgument, "contradiction", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[52] += 1;
            bytes[80] += 1;
            fix_header(bytes)
        }),
    ];
    let server = start().await;
    for (name, code, reason, bad) in cases {
        let before = server.metrics.refused(reason);
        let status = ended_by(&server, name, bad).await;
        assert_eq!(status.code(), code, "{reason}: {status}");
        assert_eq!(server.metrics.refused(reason), before + 1, "{reason}");
        // A frame of another node or epoch is on the wrong stream: it is sound by itself.
        let blamed = (code == Code::InvalidArgument).then_some(reason);
        assert_eq!(blamed_for(&status), blamed, "{status}");
    }
    assert_eq!(lock_books(server.archive.books()).totals().frames, 6, "the good ones alone");
}

/// What a status says is wrong with the frame itself.
fn blamed_for(status: &Status) -> Option<&str> {
    status.metadata().get(REFUSED_FRAME_KEY).and_then(|reason| reason.to_str().ok())
}

/// Makes a changed header match its checksum again.
fn fix_header(mut bytes: Vec<u8>) -> Bytes {
    let payload = u32::from_le_bytes(bytes[60..64].try_into().unwrap()) as usize;
    let crc = crc32c::crc32c(&bytes[HEADER_BYTES..HEADER_BYTES + payload]);
    bytes[64..68].copy_from_slice(&crc.to_le_bytes());
    bytes[68..72].fill(0);
    let crc = crc32c::crc32c(&bytes[..HEADER_BYTES]);
    let crc = crc32c::crc32c_append(crc, &bytes[HEADER_BYTES + payload..]);
    bytes[68..72].copy_from_slice(&crc.to_le_bytes());
    bytes.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_bytes_are_refused_before_they_are_archived() {
    type Bad = fn(&mut Frames) -> Bytes;
    let cases: [(&str, &str, Bad); 7] = [
        ("a", "magic", |_| vec![0x5a; 4096].into()),
        ("b", "truncated", |_| Bytes::new()),
        ("c", "truncated", |frames| frames.next().slice(..HEADER_BYTES)),
        ("d", "header_checksum", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[32] ^= 1;
            bytes.into()
        }),
        ("e", "payload_checksum", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[HEADER_BYTES] ^= 1;
            bytes.into()
        }),
        // It declares a body of 4 GiB.
        ("f", "declared_size", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[56..60].fill(0xff);
            fix_header(bytes)
        }),
        // A payload that is none of its compression, with checksums that are right.
        ("g", "compression", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[HEADER_BYTES..HEADER_BYTES + 8].fill(0xff);
            fix_header(bytes)
        }),
    ];
    let server = start().await;
    for (name, reason, bad) in cases {
        let before = server.metrics.refused(reason);
        let status = ended_by(&server, name, bad).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{reason}: {status}");
        assert_eq!(server.metrics.refused(reason), before + 1, "{reason}: {status}");
        assert_eq!(blamed_for(&status), Some(reason), "{status}");
    }
    assert_eq!(lock_books(server.archive.books()).totals().frames, 7, "the good ones alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_with_any_byte_changed_never_harms_the_server() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    frames.events = 3;
    let good = frames.next();
    for at in (0..good.len()).step_by(3) {
        let mut bytes = good.to_vec();
        bytes[at] ^= 0x41;
        // With right checksums the change reaches the deeper checks.
        let bytes = if at < 60 || (64..72).contains(&at) { bytes.into() } else { fix_header_if(bytes) };
        let name = format!("node-{at}");
        let (client, _) = server.stream(&name, 1).await;
        client.frame(bytes).await;
        let status = client.end().await;
        assert_ne!(status.code(), Code::Ok, "byte {at}");
    }
    let (mut client, _) = server.stream("node-1", 1).await;
    client.frame(good).await;
    client.acknowledged(1).await;
}

fn fix_header_if(bytes: Vec<u8>) -> Bytes {
    let payload = u32::from_le_bytes(bytes[60..64].try_into().unwrap()) as usize;
    if HEADER_BYTES + payload <= bytes.len() { fix_header(bytes) } else { bytes.into() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_beyond_the_limit_is_refused() {
    let server = start().await;
    let (client, _) = server.stream("node-1", 1).await;
    client.frame(vec![0; 5 << 20]).await;
    assert_eq!(client.end().await.code(), Code::OutOfRange);
    assert_eq!(server.metrics.refused("message"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_server_resumes_after_the_last_durable_frame() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (mut client, _) = server.stream("node-1", 1).await;
    for _ in 0..5 {
        client.frame(frames.next()).await;
    }
    client.acknowledged(5).await;
    let Running { archive, _dir: dir, .. } = server;
    archive.shutdown();
    let archive = open(plain(dir.path()));
    let metrics = Arc::new(IngestMetrics::register(&Registry::new()).unwrap());
    let recorder = Arc::new(Recorder::default());
    let service = IngestService::new(&archive, Arc::clone(&recorder), Arc::clone(&metrics));
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    tokio::spawn(Server::builder().add_service(service.server()).serve_with_incoming(incoming));
    let server = Running { disk: FaultyDisk::default(), archive, service, recorder, metrics, address, _dir: dir };
    let (mut client, welcome) = server.stream("node-1", 1).await;
    assert_eq!(welcome.durable_seq, 5);
    client.frame(frames.next()).await;
    client.acknowledged(6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_acknowledges_what_was_accepted_and_ends_every_stream() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (mut client, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.sync_delay = Duration::from_millis(100));
    for _ in 0..3 {
        client.frame(frames.next()).await;
    }
    wait_until("the frames are accepted", || server.recorder.seqs().len() == 3);
    let drain = tokio::time::timeout(PATIENCE, server.service.drain());
    let read = async {
        client.acknowledged(3).await;
        client.end().await
    };
    let (drained, status) = tokio::join!(drain, read);
    drained.expect("it drains");
    assert_eq!(status.code(), Code::Unavailable);
    server.archive.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_epoch_goes_on_behind_what_another_server_acknowledged() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    frames.events = 10;
    for _ in 0..7 {
        frames.next();
    }
    let mut client = server.connect().await;
    let acked_events = vec![70];
    client.hello(Hello { acked_seq: 7, acked_events, ..hello("node-1", 1) }).await;
    assert_eq!(client.welcome().await.durable_seq, 7);
    for _ in 0..3 {
        client.frame(frames.next()).await;
    }
    client.acknowledged(10).await;
    let before = lock_books(server.archive.books()).clone();
    assert_eq!(before.totals().events, 30);
    assert_eq!(before.unexplained_total(), 0);
    let (_, balances) = before.balances(frames.node(), 1).unwrap();
    assert_eq!((balances[0].emitted, balances[0].archived), (30, 30));
    let epoch = before.epoch(frames.node(), 1).unwrap();
    assert_eq!((epoch.missing_frames, epoch.elsewhere[0]), (0, 70));
    // A recovery that has only frames and notes to go by comes to the same.
    let Running { archive, _dir: dir, .. } = server;
    archive.shutdown();
    let segment = segments(dir.path()).pop().unwrap();
    let file = std::fs::File::options().write(true).open(segment).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"damage", 64 + 40).unwrap();
    let archive = open(plain(dir.path()));
    let books = lock_books(archive.books());
    assert_eq!(books.epoch(frames.node(), 1), before.epoch(frames.node(), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_of_the_highest_sequence_harms_nobody_else() {
    let server = start().await;
    let mut client = server.connect().await;
    client.hello(Hello { acked_seq: u64::MAX, acked_events: vec![u64::MAX; 100], ..hello("node-1", 1) }).await;
    client.welcome().await;
    client.frame(Frames::new("node-1", 1).next()).await;
    client.acknowledged(u64::MAX).await;
    assert_eq!(server.metrics.duplicates(), 1);
    let (mut other, _) = server.stream("node-2", 1).await;
    other.frame(Frames::new("node-2", 1).next()).await;
    other.acknowledged(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_frames_is_listed_by_its_hello() {
    let server = start().await;
    let (client, _) = server.stream("silent", 5).await;
    let silent = || {
        let mut nodes = Vec::new();
        server.service.add_connected(&mut nodes);
        // One that is listed already is not listed twice.
        server.service.add_connected(&mut nodes);
        nodes
    };
    let listed = silent();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!((listed[0].node.as_str(), listed[0].connected, listed[0].epochs.len()), ("silent", true, 0));
    drop(client);
    wait_until("it is not listed any more", || silent().is_empty());
}
