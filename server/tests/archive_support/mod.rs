//! What the tests of archive and ingest share: frames, a receiver that can be waited for, a disk with faults.

#![allow(dead_code, unused_imports, reason = "each test binary uses its part of this")]

mod faulty_disk;
mod small_disk;
mod stepped_clock;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tapio_server::archive::damage::{self, Damage};
use tapio_server::archive::index::Summary;
use tapio_server::archive::reader::Reader;
use tapio_server::archive::{Append, Archive, ArchiveConfig, ArchiveState, DiskChoice, Durable};
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Detail, Event, Lane, Source};
use tapio_wire::frame::{Encoder, Frame, Header, Stamp};
use tapio_wire::ledger::Ledger;

pub use faulty_disk::{Faults, FaultyDisk, Operation};
pub use small_disk::SmallDisk;
pub use stepped_clock::SteppedClock;

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Frames of one epoch, one after another.
pub struct Frames {
    pub name: Arc<str>,
    pub epoch: u64,
    pub seq: u64,
    pub events: usize,
    /// What every event is about.
    pub entity: u64,
    pub lane: Lane,
    pub realtime_ns: u64,
    pub ledger: Ledger,
    encoder: Encoder,
}

impl Frames {
    pub fn new(name: &str, epoch: u64) -> Self {
        Self {
            name: name.into(),
            epoch,
            seq: 0,
            events: 1,
            entity: 7,
            lane: Lane::Bulk,
            realtime_ns: 1_700_000_000_000_000_000,
            ledger: Ledger::default(),
            encoder: Encoder::default(),
        }
    }

    pub fn node(&self) -> u64 {
        tapio_wire::node_id(&self.name)
    }

    pub fn body(&self) -> Body {
        let events = (0..self.events as u64)
            .map(|index| Event {
                time_ns: self.seq.wrapping_mul(1000) + index,
                entity: self.entity,
                pid: 1,
                source: Source::Ebpf,
                body: Detail::RunQueue { wait_ns: index },
            })
            .collect();
        Body { events, ..Body::default() }
    }

    /// The next frame; its ledger says that everything was shipped.
    pub fn next(&mut self) -> Bytes {
        self.finish(false)
    }

    pub fn finish(&mut self, is_final: bool) -> Bytes {
        self.seq += 1;
        self.realtime_ns += 1_000_000_000;
        let account = self.ledger.account_mut(Source::Ebpf);
        account.emitted += self.events as u64;
        account.shipped += self.events as u64;
        let body = self.body();
        let sealed = self.encoder.seal(&body, self.lane, Compression::Lz4).expect("a small body fits");
        sealed.stamp(
            &Stamp {
                node: self.node(),
                epoch: self.epoch,
                seq: self.seq,
                boottime_ns: self.seq,
                realtime_ns: self.realtime_ns,
                is_final,
            },
            &self.ledger,
        )
    }

    pub fn append(&mut self, receiver: &Arc<Receiver>) -> Append {
        let bytes = self.next();
        append_of(&bytes, &self.name, receiver)
    }
}

pub fn append_of(bytes: &Bytes, name: &Arc<str>, receiver: &Arc<Receiver>) -> Append {
    let (header, _) = Header::check(bytes).expect("a frame as the encoder made it");
    Append {
        bytes: bytes.clone(),
        header,
        node_name: Some(Arc::clone(name)),
        resumed: None,
        on_durable: Arc::<Receiver>::clone(receiver),
        summary: Some(Box::new(Summary::of(&Frame::decode(bytes).expect("a frame as it was packed")))),
    }
}

/// Remembers the last durable sequence.
#[derive(Default)]
pub struct Receiver {
    seq: Mutex<u64>,
    changed: Condvar,
}

impl Receiver {
    pub fn seq(&self) -> u64 {
        *self.seq.lock().unwrap()
    }

    pub fn wait_for(&self, seq: u64) {
        let guard = self.seq.lock().unwrap();
        let (guard, timeout) = self.changed.wait_timeout_while(guard, PATIENCE, |durable| *durable < seq).unwrap();
        assert!(!timeout.timed_out(), "only {} of {seq} became durable", *guard);
    }
}

impl Durable for Receiver {
    fn durable(&self, _epoch: u64, seq: u64) {
        let mut durable = self.seq.lock().unwrap();
        *durable = seq.max(*durable);
        self.changed.notify_all();
    }
}

/// Waits until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn wait_not_ready(archive: &Archive) -> String {
    let mut reason = String::new();
    wait_until("the archive reports that it is not ready", || match &*archive.state().borrow() {
        ArchiveState::Ready => false,
        ArchiveState::NotReady(text) => {
            reason.clone_from(text);
            true
        }
    });
    reason
}

pub fn wait_ready(archive: &Archive) {
    wait_until("the archive is ready", || *archive.state().borrow() == ArchiveState::Ready);
}

pub fn plain(dir: &Path) -> ArchiveConfig {
    ArchiveConfig {
        disk: DiskChoice::Plain,
        segment_bytes: 256 << 10,
        commit_interval: Duration::ZERO,
        ..ArchiveConfig::new(dir)
    }
}

pub fn open(config: ArchiveConfig) -> Archive {
    Archive::open(config, Duration::ZERO, &mut |_, _| {}).expect("the archive opens")
}

/// Opens, and returns the frames that were replayed.
pub fn open_and_replay(config: ArchiveConfig, window: Duration) -> (Archive, Vec<Vec<u8>>) {
    let mut frames = Vec::new();
    let archive =
        Archive::open(config, window, &mut |_, bytes| frames.push(bytes.to_vec())).expect("the archive opens");
    (archive, frames)
}

/// A window that nothing falls out of.
pub const ALL: Duration = Duration::from_secs(1 << 32);

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

pub fn append(archive: &Archive, append: Append) {
    block_on(archive.appender().append(append)).expect("the archive is open");
}

/// Appends frames one by one, each after the one before is durable.
pub fn append_each(archive: &Archive, frames: &mut Frames, count: u64) -> Vec<Bytes> {
    let receiver = Arc::new(Receiver::default());
    (0..count)
        .map(|_| {
            let bytes = frames.next();
            append(archive, append_of(&bytes, &frames.name, &receiver));
            receiver.wait_for(frames.seq);
            bytes
        })
        .collect()
}

/// Runs the server's command, and returns its standard output as text.
pub fn server(arguments: &[&str]) -> (Output, String) {
    let output = crate::programs::server(arguments).output().expect("it runs");
    let text = String::from_utf8(output.stdout.clone()).expect("UTF-8");
    (output, text)
}

/// What the snapshots of a directory count and its segments lack.
pub fn gaps(dir: &Path) -> Vec<Damage> {
    damage::gaps(&Reader::new(dir).segments().expect("segments")).expect("readable")
}

/// The segments of a directory, oldest first.
pub fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(dir)
        .expect("the directory exists")
        .map(|entry| entry.expect("it can be listed").path())
        .filter(|path| path.extension().is_some_and(|end| end == "segment"))
        .collect();
    paths.sort();
    paths
}

/// Where `needle` lies in `haystack`.
pub fn find(haystack: &[u8], needle: &[u8]) -> usize {
    haystack.windows(needle.len()).position(|window| window == needle).expect("the frame is in the segment")
}

/// Reports that a test cannot run here; fails instead where everything must run.
pub fn skip(test: &str, needs: &str) {
    assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "{test} needs {needs}");
    eprintln!("SKIP {test}: needs {needs}");
}
