//! What the archive promises while its disk fails.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::archive_support::*;
use tapio_server::archive::{Archive, ArchiveConfig, ArchiveState, QUEUE_BYTES_MAX, lock_books};
use tapio_wire::frame::Header;

fn open_faulty(config: ArchiveConfig, disk: &FaultyDisk) -> Archive {
    Archive::open_on(config, disk.clone(), Duration::ZERO, &mut |_, _| {}).expect("the archive opens")
}

#[test]
fn a_failed_sync_poisons_its_segment_acks_follow_the_rewrite() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = open_faulty(plain(dir.path()), &disk);
    let mut frames = Frames::new("node-1", 1);
    let receiver = Arc::new(Receiver::default());
    append(&archive, frames.append(&receiver));
    receiver.wait_for(1);
    let poisoned = segments(dir.path()).pop().unwrap();
    let new_name = poisoned.with_extension("segment.new");
    disk.set(|faults| {
        faults.log.clear();
        faults.failing_syncs = 1;
    });
    append(&archive, frames.append(&receiver));
    receiver.wait_for(2);
    let log = disk.log();
    let of_poisoned = |operation: &&Operation| match operation {
        Operation::Sync(path) | Operation::Write(path, ..) => *path == new_name,
        _ => false,
    };
    let touched: Vec<_> = log.iter().filter(of_poisoned).collect();
    assert!(
        matches!(touched[..], [Operation::Write(..), Operation::Sync(_)]),
        "one write and the sync that failed, then never again: {touched:?}"
    );
    assert_eq!(archive.stats().poisoned, 1);
    assert_eq!(*archive.state().borrow(), ArchiveState::Ready);
    append(&archive, frames.append(&receiver));
    receiver.wait_for(3);
    archive.shutdown();
    // Frame 2 is in both segments.
    let (archive, replayed) = open_and_replay(plain(dir.path()), ALL);
    assert_eq!(replayed.len(), 3);
    let books = lock_books(archive.books());
    assert_eq!((books.totals().frames, books.unexplained_total()), (3, 0));
}

#[test]
fn a_recovery_drops_frames_that_a_poisoned_segment_repeats() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = open_faulty(plain(dir.path()), &disk);
    let mut frames = Frames::new("node-1", 1);
    let receiver = Arc::new(Receiver::default());
    append(&archive, frames.append(&receiver));
    receiver.wait_for(1);
    // The rest of the poisoned segment is not given back, and holds frame 2.
    disk.set(|faults| (faults.failing_syncs, faults.failing_truncates) = (1, u32::MAX));
    append(&archive, frames.append(&receiver));
    receiver.wait_for(2);
    archive.shutdown();
    let newest = segments(dir.path()).pop().unwrap();
    let file = std::fs::File::options().write(true).open(newest).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"damage", 64 + 40).unwrap();
    let archive = open(plain(dir.path()));
    let books = lock_books(archive.books());
    assert_eq!((books.totals().frames, books.totals().duplicates), (2, 1));
    assert_eq!(books.unexplained_total(), 0);
}

#[test]
fn a_counted_frame_of_a_poisoned_segment_is_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = open_faulty(plain(dir.path()), &disk);
    let mut frames = Frames::new("node-1", 1);
    let receiver = Arc::new(Receiver::default());
    let frame = frames.next();
    // Its write, the sync that fails, and the truncation that fails too. Then the next segment: created, written, synced,
    // renamed, its directory synced. The machine is gone before the frame is written there, and before the poisoned segment is
    // deleted, which turns out to hold it.
    disk.set(|faults| {
        (faults.failing_syncs, faults.failing_truncates) = (1, 1);
        (faults.crash_after, faults.keeps_writes) = (Some(8), true);
    });
    append(&archive, append_of(&frame, &frames.name, &receiver));
    wait_until("the machine is gone", || disk.has_crashed());
    archive.shutdown();
    assert_eq!((segments(dir.path()).len(), receiver.seq()), (2, 0));
    let (archive, replayed) = open_and_replay(plain(dir.path()), ALL);
    assert_eq!(lock_books(archive.books()).durable_seq(frames.node(), 1), 0);
    assert!(replayed.is_empty(), "its collector sends it again");
    append(&archive, append_of(&frame, &frames.name, &receiver));
    receiver.wait_for(1);
    archive.shutdown();
    let (archive, replayed) = open_and_replay(plain(dir.path()), ALL);
    assert_eq!(replayed, [frame], "once, of two copies");
    let books = lock_books(archive.books());
    assert_eq!((books.totals().frames, books.unexplained_total()), (1, 0));
}

#[test]
fn a_failing_disk_shows_and_nothing_is_acknowledged_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = open_faulty(plain(dir.path()), &disk);
    let mut frames = Frames::new("node-1", 1);
    let receiver = Arc::new(Receiver::default());
    disk.set(|faults| faults.failing_syncs = u32::MAX);
    append(&archive, frames.append(&receiver));
    let reason = wait_not_ready(&archive);
    assert!(reason.contains(&dir.path().display().to_string()), "{reason}");
    assert_eq!(receiver.seq(), 0);
    disk.set(|faults| faults.failing_syncs = 0);
    receiver.wait_for(1);
    wait_ready(&archive);
}

#[test]
fn a_full_disk_stops_acknowledgements_until_it_is_freed() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = open_faulty(plain(dir.path()), &disk);
    let mut frames = Frames::new("node-1", 1);
    let receiver = Arc::new(Receiver::default());
    append(&archive, frames.append(&receiver));
    receiver.wait_for(1);
    disk.set(|faults| faults.full = true);
    for _ in 0..10 {
        append(&archive, frames.append(&receiver));
    }
    let reason = wait_not_ready(&archive);
    assert!(reason.contains("full"), "{reason}");
    assert_eq!(receiver.seq(), 1);
    disk.set(|faults| faults.full = false);
    receiver.wait_for(11);
    wait_ready(&archive);
    archive.shutdown();
    let (_archive, replayed) = open_and_replay(plain(dir.path()), ALL);
    assert_eq!(replayed.len(), 11);
}

#[test]
fn a_server_starts_on_a_full_disk_and_waits() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    disk.set(|faults| faults.full = true);
    let archive = open_faulty(plain(dir.path()), &disk);
    wait_not_ready(&archive);
    disk.set(|faults| faults.full = false);
    wait_ready(&archive);
    append_each(&archive, &mut Frames::new("node-1", 1), 1);
}

#[test]
fn a_shutdown_on_a_failing_disk_ends() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = open_faulty(plain(dir.path()), &disk);
    let receiver = Arc::new(Receiver::default());
    disk.set(|faults| faults.full = true);
    append(&archive, Frames::new("node-1", 1).append(&receiver));
    wait_not_ready(&archive);
    archive.shutdown();
    assert_eq!(receiver.seq(), 0);
}

#[test]
fn short_writes_are_continued() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    disk.set(|faults| faults.write_bytes_max = 7);
    let archive = open_faulty(plain(dir.path()), &disk);
    let sent = append_each(&archive, &mut Frames::new("node-1", 1), 5);
    archive.shutdown();
    let (archive, replayed) = open_and_replay(plain(dir.path()), ALL);
    assert_eq!(replayed, sent);
    assert_eq!(archive.stats().totals.quarantined, 0);
}

#[test]
fn a_failed_rename_or_directory_sync_leaves_a_usable_directory() {
    for dir_syncs in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let disk = FaultyDisk::default();
        let archive = open_faulty(plain(dir.path()), &disk);
        let mut frames = Frames::new("node-1", 1);
        frames.events = 5000;
        disk.set(|faults| {
            if dir_syncs {
                faults.failing_dir_syncs = 3;
            } else {
                faults.failing_renames = 3;
            }
        });
        // More than a segment, so that the next ones are created meanwhile.
        let sent = append_each(&archive, &mut frames, 40);
        assert!(disk.log().iter().filter(|op| matches!(op, Operation::Rename(_))).count() > 4);
        archive.shutdown();
        let (_archive, replayed) = open_and_replay(plain(dir.path()), ALL);
        assert_eq!(replayed, sent);
    }
}

#[test]
fn a_slow_disk_groups_frames_into_commits() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = open_faulty(plain(dir.path()), &disk);
    disk.set(|faults| faults.sync_delay = Duration::from_millis(30));
    let mut frames = Frames::new("node-1", 1);
    let receiver = Arc::new(Receiver::default());
    for _ in 0..200 {
        append(&archive, frames.append(&receiver));
    }
    receiver.wait_for(200);
    assert!(archive.stats().commits < 20, "{:?}", archive.stats());
}

#[test]
fn memory_stays_bounded_while_the_disk_stands_still() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = open_faulty(plain(dir.path()), &disk);
    disk.set(|faults| faults.full = true);
    let mut frames = Frames::new("node-1", 1);
    frames.events = 60_000;
    let receiver = Arc::new(Receiver::default());
    let appender = archive.appender();
    let stuck = block_on(async {
        for sent in 0..10_000 {
            let append = appender.append(frames.append(&receiver));
            if tokio::time::timeout(Duration::from_millis(300), append).await.is_err() {
                return sent;
            }
        }
        0
    });
    assert!(stuck > 0, "the queue took everything");
    assert!(archive.stats().backlog_bytes <= QUEUE_BYTES_MAX as u64);
    disk.set(|faults| faults.full = false);
    receiver.wait_for(stuck);
}

#[test]
fn an_idle_archive_commits_at_once_a_busy_one_seldom() {
    let dir = tempfile::tempdir().unwrap();
    let config = ArchiveConfig { commit_interval: Duration::from_secs(1), ..plain(dir.path()) };
    let archive = open(config);
    let receiver = Arc::new(Receiver::default());
    let mut frames = Frames::new("node-1", 1);
    let started = Instant::now();
    append(&archive, frames.append(&receiver));
    receiver.wait_for(1);
    assert!(started.elapsed() < Duration::from_secs(1), "the first commit did not wait");
    for _ in 0..50 {
        append(&archive, frames.append(&receiver));
    }
    receiver.wait_for(51);
    assert!(archive.stats().commits <= 3, "{:?}", archive.stats());
}

#[test]
fn a_shutdown_commits_what_is_queued_and_refuses_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let archive = open(ArchiveConfig { commit_interval: Duration::from_millis(200), ..plain(dir.path()) });
    let mut frames = Frames::new("node-1", 1);
    let receiver = Arc::new(Receiver::default());
    for _ in 0..50 {
        append(&archive, frames.append(&receiver));
    }
    let appender = archive.appender();
    archive.shutdown();
    assert_eq!(receiver.seq(), 50);
    assert!(block_on(appender.append(frames.append(&receiver))).is_err());
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
        let dir = tempfile::tempdir().unwrap();
        let disk = FaultyDisk::default();
        disk.set(|faults| faults.crash_after = Some(operations));
        let config = ArchiveConfig { max_bytes: 1 << 20, ..plain(dir.path()) };
        let archive = open_faulty(config.clone(), &disk);
        let mut frames = Frames::new("node-1", 1);
        frames.events = 5000;
        let receiver = Arc::new(Receiver::default());
        for _ in 0..60 {
            append(&archive, frames.append(&receiver));
            wait_until("the frame is durable or the machine gone", || {
                receiver.seq() == frames.seq || disk.has_crashed()
            });
            if disk.has_crashed() {
                crashes += 1;
                break;
            }
        }
        let acknowledged = receiver.seq();
        archive.shutdown();
        drop(archive);
        let (archive, replayed) = open_and_replay(config, ALL);
        let durable = lock_books(archive.books()).durable_seq(frames.node(), 1);
        assert!(durable >= acknowledged, "{operations}: {durable} of {acknowledged}");
        // The last frames are there, without a hole; retention may have deleted the first.
        let seqs: Vec<u64> = replayed.iter().map(|bytes| Header::peek(bytes).unwrap().0.seq).collect();
        assert!(seqs.windows(2).all(|pair| pair[1] == pair[0] + 1), "{operations}: {seqs:?}");
        assert!(acknowledged == 0 || seqs.last().is_some_and(|&last| last >= acknowledged), "{operations}: {seqs:?}");
    }
    assert!(crashes > 100, "{crashes}");
}
