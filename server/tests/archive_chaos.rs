//! The archive against any sequence of faults of its disk: whatever happens, what was acknowledged is there.

use std::sync::Arc;
use std::time::Duration;

use crate::archive_support::*;
use bytes::Bytes;
use proptest::prelude::*;
use tapio_server::archive::{Archive, ArchiveConfig, lock_books};
use tapio_wire::frame::Header;

#[derive(Clone, Debug)]
enum Step {
    /// Appends frames of events, and says whether the acknowledgement is awaited.
    Append {
        frames: u8,
        events: u16,
        waits: bool,
    },
    FailSyncs(u8),
    FailBatchSyncs(u8),
    FailTruncates(u8),
    FailUnlinks(u8),
    FailDirectorySyncs(u8),
    FailRenames(u8),
    /// The disk is full, and is freed after this many milliseconds.
    Full(u8),
    /// Maximum bytes of a write; 0 for all.
    ShortWrites(u16),
    SlowSyncs(u8),
    /// The machine is gone after so many operations, in the midst of appends, and comes back; with all that was written or not.
    Crash {
        operations: u8,
        keeps_writes: bool,
    },
    /// The server ends well and comes back.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u8..6, 1u16..3000, any::<bool>())
            .prop_map(|(frames, events, waits)| Step::Append { frames, events, waits }),
        2 => (1u8..4).prop_map(Step::FailSyncs),
        2 => (1u8..4).prop_map(Step::FailBatchSyncs),
        1 => (1u8..4).prop_map(Step::FailTruncates),
        1 => (1u8..4).prop_map(Step::FailUnlinks),
        1 => (1u8..4).prop_map(Step::FailDirectorySyncs),
        1 => (1u8..4).prop_map(Step::FailRenames),
        1 => (0u8..30).prop_map(Step::Full),
        2 => prop_oneof![Just(0u16), 1u16..5000].prop_map(Step::ShortWrites),
        1 => (0u8..5).prop_map(Step::SlowSyncs),
        2 => (0u8..40, any::<bool>())
            .prop_map(|(operations, keeps_writes)| Step::Crash { operations, keeps_writes }),
        1 => Just(Step::Restart),
    ]
}

/// An archive, what was sent to it, and who hears of it.
struct Run {
    dir: tempfile::TempDir,
    disk: FaultyDisk,
    archive: Archive,
    frames: Frames,
    sent: Vec<Bytes>,
    receiver: Arc<Receiver>,
}

impl Run {
    fn config(dir: &std::path::Path) -> ArchiveConfig {
        ArchiveConfig { segment_bytes: 64 << 10, ..plain(dir) }
    }

    fn start() -> Self {
        let (dir, disk) = (tempfile::tempdir().unwrap(), FaultyDisk::default());
        let archive = Archive::open_on(Self::config(dir.path()), disk.clone(), Duration::ZERO, &mut |_, _| {}).unwrap();
        let frames = Frames::new("node-1", 1);
        Self { dir, disk, archive, frames, sent: Vec::new(), receiver: Arc::default() }
    }

    fn append(&mut self, count: u8, events: u16) {
        self.frames.events = events.into();
        for _ in 0..count {
            let bytes = self.frames.next();
            append(&self.archive, append_of(&bytes, &self.frames.name, &self.receiver));
            self.sent.push(bytes);
        }
    }

    /// Opens what is on the disk, checks it against what was sent and acknowledged, and sends again what is missing.
    fn reopen(&mut self) {
        self.archive.shutdown();
        let acknowledged = self.receiver.seq();
        self.disk = FaultyDisk::default();
        let mut replayed = Vec::new();
        let mut replay = |_: &Header, bytes: &[u8]| replayed.push(Bytes::copy_from_slice(bytes));
        self.archive = Archive::open_on(Self::config(self.dir.path()), self.disk.clone(), ALL, &mut replay).unwrap();
        let durable = {
            let books = lock_books(self.archive.books());
            assert_eq!(books.unexplained_total(), 0);
            books.durable_seq(self.frames.node(), 1)
        };
        assert!(durable >= acknowledged, "{acknowledged} were acknowledged, {durable} are there");
        assert!(
            replayed == self.sent[..durable as usize],
            "{} frames were replayed, not each of the {durable} durable ones once, as it was sent",
            replayed.len()
        );
        for bytes in &self.sent[durable as usize..] {
            append(&self.archive, append_of(bytes, &self.frames.name, &self.receiver));
        }
    }

    fn take(&mut self, step: &Step) {
        let disk = self.disk.clone();
        match *step {
            Step::Append { frames, events, waits } => {
                self.append(frames, events);
                if waits {
                    self.receiver.wait_for(self.frames.seq);
                }
            }
            Step::FailSyncs(count) => disk.set(|faults| faults.failing_syncs = count.into()),
            Step::FailBatchSyncs(count) => disk.set(|faults| faults.failing_batch_syncs = count.into()),
            Step::FailTruncates(count) => disk.set(|faults| faults.failing_truncates = count.into()),
            Step::FailUnlinks(count) => disk.set(|faults| faults.failing_unlinks = count.into()),
            Step::FailDirectorySyncs(count) => disk.set(|faults| faults.failing_dir_syncs = count.into()),
            Step::FailRenames(count) => disk.set(|faults| faults.failing_renames = count.into()),
            Step::Full(milliseconds) => {
                disk.set(|faults| faults.full = true);
                self.append(1, 100);
                std::thread::sleep(Duration::from_millis(milliseconds.into()));
                disk.set(|faults| faults.full = false);
            }
            Step::ShortWrites(bytes) => disk.set(|faults| faults.write_bytes_max = bytes.into()),
            Step::SlowSyncs(milliseconds) => {
                disk.set(|faults| faults.sync_delay = Duration::from_millis(milliseconds.into()));
            }
            Step::Crash { operations, keeps_writes } => {
                disk.set(|faults| {
                    faults.crash_after = Some(operations.into());
                    faults.keeps_writes = keeps_writes;
                });
                self.append(3, 2000);
                let (receiver, last) = (Arc::clone(&self.receiver), self.frames.seq);
                wait_until("the frames are durable or the machine gone", || {
                    receiver.seq() == last || disk.has_crashed()
                });
                self.reopen();
            }
            Step::Restart => self.reopen(),
        }
    }
}

#[test]
fn acknowledged_frames_survive_any_disk_fault_exactly_once() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 40,
        failure_persistence: None,
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    });
    runner
        .run(&prop::collection::vec(step(), 1..14), |steps| {
            let mut run = Run::start();
            for step in &steps {
                run.take(step);
            }
            run.disk.set(|faults| *faults = Faults::default());
            run.append(1, 10);
            run.receiver.wait_for(run.frames.seq);
            run.reopen();
            prop_assert_eq!(lock_books(run.archive.books()).durable_seq(run.frames.node(), 1), run.frames.seq);
            // Whatever a crash or a failed write leaves is not taken for loss.
            prop_assert_eq!(gaps(run.dir.path()), []);
            Ok(())
        })
        .unwrap();
}
