//! The archive at saturation against `fio`, on the same disk in the same run: same block size, one fdatasync a block.
//!
//! `cargo bench -p tapio-server --bench archive`; TAPIO_BENCH_DIR chooses the disk (default: the build's own directory), fio
//! must be installed for the ratio. Also: what the index costs an event.

use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tapio_server::archive::index::Summary;
use tapio_server::archive::{Append, Archive, ArchiveConfig, DiskChoice, Durable};
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Detail, Event, Lane, Source};
use tapio_wire::frame::{Encoder, Frame, Header, Stamp};
use tapio_wire::ledger::Ledger;

const NODE: u64 = 1;
const EVENTS: u64 = 4096;
/// Written by each measurement.
const BYTES: u64 = 1 << 30;
/// What waits for the writer: enough that every commit is a full one.
const COMMIT_BYTES: usize = 4 << 20;

#[derive(Default)]
struct Last {
    seq: Mutex<u64>,
    changed: Condvar,
}

impl Durable for Last {
    fn durable(&self, _epoch: u64, seq: u64) {
        *self.seq.lock().expect("no panic holds it") = seq;
        self.changed.notify_all();
    }
}

fn frame(seq: u64) -> Bytes {
    // Numbers without a pattern, so that the frame is as large as one of a real node.
    let mix = |index: u64| (seq * EVENTS + index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let events = (0..EVENTS).map(|index| Event {
        time_ns: seq * 1_000_000 + index,
        entity: 1 + mix(index) % 1000,
        pid: mix(index) as u32,
        source: Source::Ebpf,
        body: Detail::RunQueue { wait_ns: mix(index) >> 20 },
    });
    let body = Body { events: events.collect(), ..Body::default() };
    let stamp = Stamp {
        node: NODE,
        epoch: 1,
        seq,
        boottime_ns: seq * 1_000_000,
        realtime_ns: 1_700_000_000_000_000_000 + seq * 1_000_000,
        is_final: false,
    };
    // Bytes count here, not events: as rows the same events are fewer bytes, and the index would weigh more than the disk.
    let sealed = Encoder::default().seal(&body, Lane::Bulk, Compression::Lz4).expect("a small body fits");
    sealed.stamp(&stamp, &Ledger::default())
}

fn archive_rate(dir: &Path, disk: DiskChoice) -> f64 {
    let dir = tempfile::tempdir_in(dir).expect("a directory");
    let config = ArchiveConfig {
        disk,
        max_bytes: 8 << 30,
        commit_interval: Duration::ZERO,
        commit_bytes: COMMIT_BYTES,
        ..ArchiveConfig::new(dir.path())
    };
    let archive = Archive::open(config, Duration::ZERO, &mut |_, _| {}).expect("the archive opens");
    let first = frame(1);
    let count = BYTES / first.len() as u64;
    // Made before, so that only the archive is measured.
    let frames: Vec<_> = (1..=count)
        .map(|seq| {
            let bytes = frame(seq);
            let (header, _) = Header::check(&bytes).expect("as it was packed");
            let summary = Summary::of(&Frame::decode(&bytes).expect("as it was packed"));
            (bytes, header, Box::new(summary))
        })
        .collect();
    let last = Arc::new(Last::default());
    let appender = archive.appender();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let started = Instant::now();
    let mut written = 0;
    runtime.block_on(async {
        for (bytes, header, summary) in frames {
            written += bytes.len() as u64;
            let on_durable: Arc<dyn Durable> = Arc::<Last>::clone(&last);
            let append = Append { bytes, header, node_name: None, resumed: None, on_durable, summary: Some(summary) };
            appender.append(append).await.expect("the archive is open");
        }
    });
    let durable = last.seq.lock().expect("no panic holds it");
    drop(last.changed.wait_while(durable, |seq| *seq < count).expect("no panic holds it"));
    let rate = written as f64 / started.elapsed().as_secs_f64();
    let stats = archive.stats();
    println!(
        "archive ({}): {:.0} MB/s, {} commits of {:.1} MiB",
        stats.disk,
        rate / 1e6,
        stats.commits,
        written as f64 / stats.commits as f64 / f64::from(1 << 20)
    );
    rate
}

/// Sequential writes into preallocated blocks with a sync after each, as the archive does.
fn fio_rate(dir: &Path) -> Option<f64> {
    let dir = tempfile::tempdir_in(dir).expect("a directory");
    let output = Command::new("fio")
        .args(["--name=tapio", "--rw=write", "--ioengine=psync", "--fdatasync=1", "--fallocate=posix"])
        .args(["--output-format=json", "--end_fsync=0"])
        .arg(format!("--bs={COMMIT_BYTES}"))
        .arg(format!("--size={BYTES}"))
        .arg(format!("--directory={}", dir.path().display()))
        .output()
        .ok()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let rate = report["jobs"][0]["write"]["bw_bytes"].as_f64()?;
    println!("fio: {:.0} MB/s", rate / 1e6);
    Some(rate)
}

fn main() {
    let frames: Vec<_> = (1..=64).map(|seq| Frame::decode(&frame(seq)).expect("as it was packed")).collect();
    let started = Instant::now();
    const ROUNDS: u32 = 50;
    for _ in 0..ROUNDS {
        for frame in &frames {
            black_box(Summary::of(black_box(frame)));
        }
    }
    let events = f64::from(ROUNDS) * frames.len() as f64 * EVENTS as f64;
    println!("summary for the index: {:.1} ns an event", started.elapsed().as_nanos() as f64 / events);
    drop(frames);

    let dir = std::env::var_os("TAPIO_BENCH_DIR")
        .map_or_else(|| env!("CARGO_TARGET_TMPDIR").into(), std::path::PathBuf::from);
    let mut before = fio_rate(&dir);
    if before.is_none() {
        println!("fio is not installed: no ratio. Install it (apt-get install fio) and run this again.");
    }
    // Other work shares the disk: each measurement is compared with those of fio around it, several times.
    for _ in 0..3 {
        for disk in [DiskChoice::Plain, DiskChoice::Auto] {
            let rate = archive_rate(&dir, disk);
            let Some(fio) = before else { continue };
            let after = fio_rate(&dir).unwrap_or(fio);
            println!("  {:.0} % of fio", 100.0 * rate / f64::midpoint(fio, after));
            before = Some(after);
        }
    }
}
