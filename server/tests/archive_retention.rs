//! What the archive deletes, and what it never does: by size, by age, on disks that fail and by clocks that jump.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::archive_support::*;
use tapio_server::archive::{Archive, ArchiveConfig, ArchiveState};

const YEAR_S: i64 = 365 * 86_400;
const SEGMENT_BYTES: u64 = 64 << 10;

fn open_faulty(config: ArchiveConfig, disk: &FaultyDisk) -> Archive {
    Archive::open_on(config, disk.clone(), Duration::ZERO, &mut |_, _| {}).expect("the archive opens")
}

fn small(dir: &Path, max_bytes: u64) -> ArchiveConfig {
    ArchiveConfig { max_bytes, segment_bytes: SEGMENT_BYTES, ..plain(dir) }
}

/// Frames of which a few fill a segment.
fn large_frames() -> Frames {
    let mut frames = Frames::new("node-1", 1);
    frames.events = 4000;
    frames
}

/// Appends until the archive has had so many segments more. Returns those that are there then.
fn fill(archive: &Archive, dir: &Path, frames: &mut Frames, segments_more: u64) -> Vec<PathBuf> {
    let number = || segments(dir).pop().and_then(|newest| newest.file_stem()?.to_str()?.parse::<u64>().ok());
    let first = number().expect("the archive has a segment");
    while number().expect("the archive has a segment") < first + segments_more {
        append_each(archive, frames, 1);
    }
    segments(dir)
}

fn all_exist(paths: &[PathBuf]) -> bool {
    paths.iter().all(|path| path.exists())
}

fn bytes_on_disk(dir: &Path) -> u64 {
    segments(dir).iter().map(|path| std::fs::metadata(path).map_or(0, |metadata| metadata.len())).sum()
}

fn deleted(disk: &FaultyDisk) -> usize {
    let is_segment = |path: &Path| path.extension().is_some_and(|end| end == "segment");
    disk.log().iter().filter(|operation| matches!(operation, Operation::Unlink(path) if is_segment(path))).count()
}

#[test]
fn failed_syncs_cost_no_history() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = open_faulty(small(dir.path(), 1 << 20), &disk);
    let mut frames = large_frames();
    let history = fill(&archive, dir.path(), &mut frames, 6);
    frames.events = 10;
    let before = bytes_on_disk(dir.path());
    for _ in 0..30 {
        disk.set(|faults| faults.failing_batch_syncs = 1);
        append_each(&archive, &mut frames, 1);
    }
    assert_eq!(archive.stats().poisoned, 30);
    assert!(all_exist(&history[..6]), "{:?} of {history:?}", segments(dir.path()));
    // What is on the disk is what is counted, and it is small: the reserved rests were given back.
    assert_eq!(archive.stats().bytes, bytes_on_disk(dir.path()));
    assert!(bytes_on_disk(dir.path()) < before + 2 * SEGMENT_BYTES, "{before} before, {} now", archive.stats().bytes);
    archive.shutdown();
    let (_archive, replayed) = open_and_replay(small(dir.path(), 1 << 20), ALL);
    assert_eq!(replayed.len() as u64, frames.seq);
}

#[test]
fn nothing_is_deleted_while_writes_fail() {
    for fails in [
        |faults: &mut Faults| faults.failing_batch_syncs = u32::MAX,
        |faults: &mut Faults| faults.failing_syncs = u32::MAX,
        |faults: &mut Faults| faults.full = true,
    ] {
        let dir = tempfile::tempdir().unwrap();
        let disk = FaultyDisk::default();
        let config = small(dir.path(), 512 << 10);
        let archive = open_faulty(config, &disk);
        let mut frames = large_frames();
        // As much as may be there, and more.
        fill(&archive, dir.path(), &mut frames, 12);
        assert!(deleted(&disk) > 0);
        let history = segments(dir.path());
        disk.set(|faults| {
            faults.log.clear();
            fails(faults);
        });
        let receiver = Arc::new(Receiver::default());
        let acknowledged = frames.seq;
        for _ in 0..40 {
            append(&archive, frames.append(&receiver));
        }
        wait_not_ready(&archive);
        let attempts = || disk.log().iter().filter(|operation| matches!(operation, Operation::Create(_))).count();
        wait_until("it has tried several times", || attempts() >= 6);
        assert!(all_exist(&history), "{:?} of {history:?}", segments(dir.path()));
        assert!(bytes_on_disk(dir.path()) <= (512 << 10) + 2 * (SEGMENT_BYTES + 4096));
        disk.set(|faults| *faults = Faults::default());
        receiver.wait_for(frames.seq);
        // Once it can write it keeps to its size again.
        append_each(&archive, &mut frames, 1);
        assert!(archive.stats().bytes <= 512 << 10, "{:?}", archive.stats());
        assert!(!history[0].exists());
        assert_eq!(*archive.state().borrow(), ArchiveState::Ready);
        archive.shutdown();
        let (_archive, replayed) = open_and_replay(small(dir.path(), 512 << 10), ALL);
        let seqs: Vec<u64> =
            replayed.iter().map(|bytes| tapio_wire::frame::Header::peek(bytes).unwrap().0.seq).collect();
        assert!(seqs.windows(2).all(|pair| pair[1] == pair[0] + 1), "{seqs:?}");
        assert_eq!(seqs.last(), Some(&frames.seq));
        assert!(acknowledged < frames.seq);
    }
}

#[test]
fn preallocated_space_that_cannot_be_freed_is_freed_later() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = open_faulty(small(dir.path(), 1 << 20), &disk);
    let mut frames = Frames::new("node-1", 1);
    append_each(&archive, &mut frames, 1);
    let poisoned = segments(dir.path()).pop().unwrap();
    disk.set(|faults| (faults.failing_batch_syncs, faults.failing_truncates) = (1, 1));
    append_each(&archive, &mut frames, 3);
    assert!(std::fs::metadata(&poisoned).unwrap().len() < SEGMENT_BYTES);
    assert_eq!(archive.stats().poisoned, 1);
}

#[test]
fn a_segment_that_cannot_be_deleted_counts_and_is_retried() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = open_faulty(small(dir.path(), 512 << 10), &disk);
    disk.set(|faults| faults.failing_unlinks = 2);
    let mut frames = large_frames();
    let first = segments(dir.path()).pop().unwrap();
    fill(&archive, dir.path(), &mut frames, 12);
    append_each(&archive, &mut frames, 1);
    assert!(!first.exists());
    assert!(bytes_on_disk(dir.path()) <= 512 << 10);
    archive.shutdown();
}

#[test]
fn an_archive_that_fills_its_volume_goes_on() {
    let Some(disk) = SmallDisk::new(16) else {
        return skip("an_archive_that_fills_its_volume_goes_on", "root, mkfs.ext4 and a loop device");
    };
    let free = rustix::fs::statvfs(disk.path()).map(|stat| stat.f_bavail * stat.f_bsize).unwrap();
    // There is no room for a segment more.
    let config = ArchiveConfig {
        max_bytes: free - (512 << 10),
        segment_bytes: 1 << 20,
        ..ArchiveConfig::new(disk.path().join("archive"))
    };
    let archive = open(config.clone());
    let mut frames = large_frames();
    frames.events = 40_000;
    let mut written = 0;
    while written < 2 * free {
        written += append_each(&archive, &mut frames, 1)[0].len() as u64;
    }
    let stats = archive.stats();
    assert!(stats.bytes <= config.max_bytes && stats.bytes > config.max_bytes / 2, "{stats:?} of {}", config.max_bytes);
    archive.shutdown();
    // A size that is lowered is kept to at once, even though the disk is full.
    let ballast = std::fs::File::create(disk.path().join("ballast")).unwrap();
    let mut bytes = 1 << 20;
    while bytes >= 4096 {
        if std::io::Write::write_all(&mut &ballast, &vec![1; bytes]).is_err() {
            bytes /= 2;
        }
    }
    let archive = open(ArchiveConfig { max_bytes: config.max_bytes / 2, ..config });
    append_each(&archive, &mut frames, 1);
}

#[test]
fn a_forward_step_of_the_wall_clock_deletes_nothing() {
    let test = "a_forward_step_of_the_wall_clock_deletes_nothing";
    let Some(clock) = SteppedClock::in_own_process(module_path!(), test) else { return };
    let dir = tempfile::tempdir().unwrap();
    let config = ArchiveConfig { max_age: Duration::from_secs(3600), ..small(dir.path(), 1 << 30) };
    let archive = open(config.clone());
    let mut frames = large_frames();
    fill(&archive, dir.path(), &mut frames, 4);
    clock.step(YEAR_S);
    let there = fill(&archive, dir.path(), &mut frames, 4);
    assert_eq!(there.len(), 9, "{there:?}");
    archive.shutdown();
    // Some were closed before the step and some after it.
    let archive = open(config.clone());
    let there = fill(&archive, dir.path(), &mut frames, 2);
    assert_eq!(there.len(), 12, "{there:?}");
    archive.shutdown();
    clock.step(YEAR_S);
    let archive = open(config);
    let there = fill(&archive, dir.path(), &mut frames, 2);
    assert_eq!(there.len(), 15, "{there:?}");
}

#[test]
fn a_backward_step_of_the_wall_clock_keeps_nothing_longer() {
    let test = "a_backward_step_of_the_wall_clock_keeps_nothing_longer";
    let Some(clock) = SteppedClock::in_own_process(module_path!(), test) else { return };
    let dir = tempfile::tempdir().unwrap();
    let archive = open(ArchiveConfig { max_age: Duration::from_secs(5), ..small(dir.path(), 1 << 30) });
    let first = segments(dir.path()).pop().unwrap();
    fill(&archive, dir.path(), &mut large_frames(), 1);
    clock.step(-YEAR_S);
    wait_until("the closed segment is deleted", || !first.exists());
}

#[test]
fn times_of_files_are_no_ages() {
    let dir = tempfile::tempdir().unwrap();
    let config = small(dir.path(), 1 << 30);
    let archive = open(config.clone());
    let mut frames = large_frames();
    let history = fill(&archive, dir.path(), &mut frames, 3);
    archive.shutdown();
    for path in &history {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(YEAR_S as u64)).unwrap();
    }
    let archive = open(config);
    fill(&archive, dir.path(), &mut frames, 2);
    assert!(all_exist(&history), "{:?} of {history:?}", segments(dir.path()));
}

#[test]
fn what_is_too_old_goes_across_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let config = ArchiveConfig { max_age: Duration::from_secs(1), ..small(dir.path(), 1 << 30) };
    let mut frames = Frames::new("node-1", 1);
    let archive = open(config.clone());
    append_each(&archive, &mut frames, 3);
    archive.shutdown();
    let first = segments(dir.path()).pop().unwrap();
    // Runs that are each too short for it.
    wait_until("it is deleted", || {
        let archive = open(config.clone());
        append_each(&archive, &mut frames, 1);
        archive.shutdown();
        !first.exists()
    });
}

#[test]
fn what_is_too_old_goes_while_frames_trickle_in() {
    let dir = tempfile::tempdir().unwrap();
    let config = ArchiveConfig { max_age: Duration::from_secs(1), segment_bytes: 64 << 20, ..plain(dir.path()) };
    let mut frames = Frames::new("node-1", 1);
    // The archive is never idle, and its segment does not fill up.
    let archive = open(config);
    append_each(&archive, &mut frames, 1);
    let active = segments(dir.path()).pop().unwrap();
    wait_until("the segment is closed and deleted", || {
        append_each(&archive, &mut frames, 1);
        !active.exists()
    });
}
