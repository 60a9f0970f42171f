//! What the archive promises while its disk fails.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::archive_support::*;
use bytes::Bytes;
use tapio_server::archive::{Archive, ArchiveConfig, ArchiveState, QUEUE_BYTES_MAX, lock_books};
use tapio_wire::frame::Header;

/// An archive on a disk with faults, and one node that sends frames to it.
struct Faulty {
    archive: Archive,
    disk: FaultyDisk,
    frames: Frames,
    receiver: Arc<Receiver>,
    config: ArchiveConfig,
    dir: tempfile::TempDir,
}

impl Faulty {
    /// Opens an archive on a disk that works until [`Faulty::set`].
    fn new() -> Self {
        Self::on(FaultyDisk::default(), |config| config)
    }

    /// Opens an archive on a disk that has these faults already.
    fn after(faults: impl FnOnce(&mut Faults)) -> Self {
        let disk = FaultyDisk::default();
        disk.set(faults);
        Self::on(disk, |config| config)
    }

    fn on(disk: FaultyDisk, configure: impl FnOnce(ArchiveConfig) -> ArchiveConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = configure(plain(dir.path()));
        let archive = Archive::open_on(config.clone(), disk.clone(), Duration::ZERO, &mut |_, _| {});
        Self {
            archive: archive.expect("the archive opens"),
            disk,
            frames: Frames::new("node-1", 1),
            receiver: Arc::default(),
            config,
            dir,
        }
    }

    fn set(&self, change: impl FnOnce(&mut Faults)) {
        self.disk.set(change);
    }

    /// Appends the next frame, and does not wait.
    fn send(&mut self) {
        append(&self.archive, self.frames.append(&self.receiver));
    }

    /// Appends the next frame, and waits until it is durable.
    fn send_durably(&mut self) {
        self.send();
        self.receiver.wait_for(self.frames.seq);
    }

    /// Appends a frame that was made before, and does not wait.
    fn send_again(&self, frame: &Bytes) {
        append(&self.archive, append_of(frame, &self.frames.name, &self.receiver));
    }

    /// Ends the archive, and opens it on a disk without faults. Returns the frames that were replayed.
    fn restart(&mut self) -> Vec<Vec<u8>> {
        self.archive.shutdown();
        let (archive, replayed) = open_and_replay(self.config.clone(), ALL);
        self.archive = archive;
        replayed
    }

    /// The newest segment.
    fn newest(&self) -> PathBuf {
        segments(self.dir.path()).pop().expect("a segment")
    }
}

#[test]
fn a_failed_sync_poisons_its_segment_acks_follow_the_rewrite() {
    let mut faulty = Faulty::new();
    faulty.send_durably();
    let new_name = faulty.newest().with_extension("segment.new");
    faulty.set(|faults| {
        faults.log.clear();
        faults.failing_syncs = 1;
    });
    faulty.send_durably();
    let log = faulty.disk.log();
    let of_poisoned = |operation: &&Operation| match operation {
        Operation::Sync(path) | Operation::Write(path, ..) => *path == new_name,
        _ => false,
    };
    let touched: Vec<_> = log.iter().filter(of_poisoned).collect();
    assert!(
        matches!(touched[..], [Operation::Write(..), Operation::Sync(_)]),
        "one write and the sync that failed, then never again: {touched:?}"
    );
    assert_eq!(faulty.archive.stats().poisoned, 1);
    assert_eq!(*faulty.archive.state().borrow(), ArchiveState::Ready);
    faulty.send_durably();
    // Frame 2 is in both segments.
    assert_eq!(faulty.restart().len(), 3);
    let books = lock_books(faulty.archive.books());
    assert_eq!((books.totals().frames, books.unexplained_total()), (3, 0));
}

#[test]
fn a_recovery_drops_frames_that_a_poisoned_segment_repeats() {
    let mut faulty = Faulty::new();
    faulty.send_durably();
    // The rest of the poisoned segment is not truncated, and holds frame 2.
    faulty.set(|faults| (faults.failing_syncs, faults.failing_truncates) = (1, u32::MAX));
    faulty.send_durably();
    faulty.archive.shutdown();
    let file = std::fs::File::options().write(true).open(faulty.newest()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"damage", 64 + 40).unwrap();
    faulty.restart();
    let books = lock_books(faulty.archive.books());
    assert_eq!((books.totals().frames, books.totals().duplicates), (2, 1));
    assert_eq!(books.unexplained_total(), 0);
}

#[test]
fn a_counted_frame_of_a_poisoned_segment_is_replayed() {
    let mut faulty = Faulty::new();
    let frame = faulty.frames.next();
    // Its write, the sync that fails, and the truncation that fails too. Then the next segment: created, written, synced,
    // renamed, its directory synced. The machine is gone before the frame is written there, and before the poisoned segment is
    // deleted, which turns out to hold it.
    faulty.set(|faults| {
        (faults.failing_syncs, faults.failing_truncates) = (1, 1);
        (faults.crash_after, faults.keeps_writes) = (Some(8), true);
    });
    faulty.send_again(&frame);
    wait_until("the machine is gone", || faulty.disk.has_crashed());
    faulty.archive.shutdown();
    assert_eq!((segments(faulty.dir.path()).len(), faulty.receiver.seq()), (2, 0));
    assert!(faulty.restart().is_empty(), "its collector sends it again");
    assert_eq!(lock_books(faulty.archive.books()).durable_seq(faulty.frames.node(), 1), 0);
    faulty.send_again(&frame);
    faulty.receiver.wait_for(1);
    assert_eq!(faulty.restart(), [frame], "once, of two copies");
    let books = lock_books(faulty.archive.books());
    assert_eq!((books.totals().frames, books.unexplained_total()), (1, 0));
}

#[test]
fn a_failing_disk_shows_and_nothing_is_acknowledged_meanwhile() {
    let mut faulty = Faulty::new();
    faulty.set(|faults| faults.failing_syncs = u32::MAX);
    faulty.send();
    let reason = wait_not_ready(&faulty.archive);
    assert!(reason.contains(&faulty.dir.path().display().to_string()), "{reason}");
    assert_eq!(faulty.receiver.seq(), 0);
    faulty.set(|faults| faults.failing_syncs = 0);
    faulty.receiver.wait_for(1);
    wait_ready(&faulty.archive);
}

#[test]
fn a_full_disk_stops_acknowledgements_until_it_is_freed() {
    let mut faulty = Faulty::new();
    faulty.send_durably();
    faulty.set(|faults| faults.full = true);
    for _ in 0..10 {
        faulty.send();
    }
    let reason = wait_not_ready(&faulty.archive);
    assert!(reason.contains("full"), "{reason}");
    assert_eq!(faulty.receiver.seq(), 1);
    faulty.set(|faults| faults.full = false);
    faulty.receiver.wait_for(11);
    wait_ready(&faulty.archive);
    assert_eq!(faulty.restart().len(), 11);
}

#[test]
fn a_server_starts_on_a_full_disk_and_waits() {
    let mut faulty = Faulty::after(|faults| faults.full = true);
    wait_not_ready(&faulty.archive);
    faulty.set(|faults| faults.full = false);
    wait_ready(&faulty.archive);
    faulty.send_durably();
}

#[test]
fn a_shutdown_on_a_failing_disk_ends() {
    let mut faulty = Faulty::new();
    faulty.set(|faults| faults.full = true);
    faulty.send();
    wait_not_ready(&faulty.archive);
    faulty.archive.shutdown();
    assert_eq!(faulty.receiver.seq(), 0);
}

#[test]
fn short_writes_are_continued() {
    let mut faulty = Faulty::after(|faults| faults.write_bytes_max = 7);
    let sent = append_each(&faulty.archive, &mut faulty.frames, 5);
    assert_eq!(faulty.restart(), sent);
    assert_eq!(faulty.archive.stats().totals.quarantined, 0);
}

#[test]
fn a_failed_rename_or_directory_sync_leaves_a_usable_directory() {
    for dir_syncs in [false, true] {
        let mut faulty = Faulty::new();
        faulty.frames.events = 5000;
        faulty.set(|faults| {
            if dir_syncs {
                faults.failing_dir_syncs = 3;
            } else {
                faults.failing_renames = 3;
            }
        });
        // More than a segment, so that the next ones are created meanwhile.
        let sent = append_each(&faulty.archive, &mut faulty.frames, 40);
        assert!(faulty.disk.log().iter().filter(|op| matches!(op, Operation::Rename(_))).count() > 4);
        assert_eq!(faulty.restart(), sent);
    }
}

#[test]
fn a_slow_disk_groups_frames_into_commits() {
    let mut faulty = Faulty::new();
    faulty.set(|faults| faults.sync_delay = Duration::from_millis(30));
    for _ in 0..200 {
        faulty.send();
    }
    faulty.receiver.wait_for(200);
    assert!(faulty.archive.stats().commits < 20, "{:?}", faulty.archive.stats());
}

#[test]
fn memory_stays_bounded_while_the_disk_stands_still() {
    let mut faulty = Faulty::new();
    faulty.set(|faults| faults.full = true);
    faulty.frames.events = 60_000;
    let appender = faulty.archive.appender();
    let stuck = block_on(async {
        for sent in 0..10_000 {
            let append = appender.append(faulty.frames.append(&faulty.receiver));
            if tokio::time::timeout(Duration::from_millis(300), append).await.is_err() {
                return sent;
            }
        }
        0
    });
    assert!(stuck > 0, "the queue took everything");
    assert!(faulty.archive.stats().backlog_bytes <= QUEUE_BYTES_MAX as u64);
    faulty.set(|faults| faults.full = false);
    faulty.receiver.wait_for(stuck);
}

#[test]
fn an_idle_archive_commits_at_once_a_busy_one_seldom() {
    let mut faulty =
        Faulty::on(FaultyDisk::default(), |config| ArchiveConfig { commit_interval: Duration::from_secs(1), ..config });
    let started = Instant::now();
    faulty.send_durably();
    assert!(started.elapsed() < Duration::from_secs(1), "the first commit did not wait");
    for _ in 0..50 {
        faulty.send();
    }
    faulty.receiver.wait_for(51);
    assert!(faulty.archive.stats().commits <= 3, "{:?}", faulty.archive.stats());
}

#[test]
fn a_shutdown_commits_what_is_queued_and_refuses_the_rest() {
    let mut faulty = Faulty::on(FaultyDisk::default(), |config| ArchiveConfig {
        commit_interval: Duration::from_millis(200),
        ..config
    });
    for _ in 0..50 {
        faulty.send();
    }
    let appender = faulty.archive.appender();
    faulty.archive.shutdown();
    assert_eq!(faulty.receiver.seq(), 50);
    assert!(block_on(appender.append(faulty.frames.append(&faulty.receiver))).is_err());
}

#[test]
fn a_real_full_disk_stops_acknowledgements_and_loses_nothing() {
    let Some(disk) = SmallDisk::new(16) else {
        return skip("a_real_full_disk_stops_acknowledgements_and_loses_nothing", "root, mkfs.ext4 and a loop device");
    };
    let dir = disk.path().join("archive");
    let ballast = disk.path().join("ballast");
    let config = ArchiveConfig { max_bytes: 1 << 30, segment_bytes: 1 << 20, ..ArchiveConfig::new(&dir) };
    let archive = open(config.clone());
    std::fs::write(&ballast, vec![1; 8 << 20]).unwrap();
    let mut frames = Frames::new("node-1", 1);
    frames.events = 20_000;
    let receiver = Arc::new(Receiver::default());
    let mut sent = Vec::new();
    // One at a time: what was sent must fit once the ballast is gone.
    let is_ready = || *archive.state().borrow() == ArchiveState::Ready;
    while is_ready() {
        let bytes = frames.next();
        append(&archive, append_of(&bytes, &frames.name, &receiver));
        sent.push(bytes);
        wait_until("the frame is durable or the disk full", || receiver.seq() == frames.seq || !is_ready());
    }
    let acknowledged = receiver.seq();
    assert!(acknowledged < frames.seq);
    std::fs::remove_file(&ballast).unwrap();
    receiver.wait_for(frames.seq);
    archive.shutdown();
    let (archive, replayed) = open_and_replay(config, ALL);
    assert_eq!(replayed, sent);
    drop(archive);
}

/// FAULTS 10: the machine goes away after every single operation of rotations and deletions.
#[test]
fn no_crash_in_rotation_or_deletion_loses_acknowledged_frames() {
    let mut crashes = 0;
    for operations in 0..160 {
        let disk = FaultyDisk::default();
        disk.set(|faults| faults.crash_after = Some(operations));
        let mut faulty = Faulty::on(disk, |config| ArchiveConfig { max_bytes: 1 << 20, ..config });
        faulty.frames.events = 5000;
        for _ in 0..60 {
            faulty.send();
            wait_until("the frame is durable or the machine gone", || {
                faulty.receiver.seq() == faulty.frames.seq || faulty.disk.has_crashed()
            });
            if faulty.disk.has_crashed() {
                crashes += 1;
                break;
            }
        }
        let acknowledged = faulty.receiver.seq();
        let replayed = faulty.restart();
        let durable = lock_books(faulty.archive.books()).durable_seq(faulty.frames.node(), 1);
        assert!(durable >= acknowledged, "{operations}: {durable} of {acknowledged}");
        // The last frames are there, without a hole; retention may have deleted the first.
        let seqs: Vec<u64> = replayed.iter().map(|bytes| Header::peek(bytes).unwrap().0.seq).collect();
        assert!(seqs.windows(2).all(|pair| pair[1] == pair[0] + 1), "{operations}: {seqs:?}");
        assert!(acknowledged == 0 || seqs.last().is_some_and(|&last| last >= acknowledged), "{operations}: {seqs:?}");
    }
    assert!(crashes > 100, "{crashes}");
}
