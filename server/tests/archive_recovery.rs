//! What the archive makes of a directory that a crash, a fault or another server left behind.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use crate::archive_support::*;
use bytes::Bytes;
use proptest::prelude::*;
use tapio_server::archive::{Archive, ArchiveConfig, ArchiveError, DiskChoice, DiskKind, lock_books};
use tapio_wire::segment::{RECORD_HEADER_BYTES, record_bytes};

/// A directory with one closed segment of some frames, and where each frame's record starts in it.
struct Prepared {
    dir: tempfile::TempDir,
    segment: Vec<u8>,
    name: std::ffi::OsString,
    frames: Vec<Bytes>,
    records: Vec<usize>,
}

fn prepare(count: u64) -> Prepared {
    let dir = tempfile::tempdir().unwrap();
    let archive = open(plain(dir.path()));
    let frames = append_each(&archive, &mut Frames::new("node-1", 1), count);
    archive.shutdown();
    let path = segments(dir.path()).pop().unwrap();
    let segment = fs::read(&path).unwrap();
    let records = frames.iter().map(|frame| find(&segment, frame) - RECORD_HEADER_BYTES).collect();
    Prepared { name: path.file_name().unwrap().to_owned(), dir, segment, frames, records }
}

impl Prepared {
    /// Opens a directory that has nothing but this segment with other content.
    fn reopen_with(&self, segment: &[u8]) -> (tempfile::TempDir, Archive, Vec<Vec<u8>>) {
        let dir = tempfile::tempdir_in(self.dir.path()).unwrap();
        fs::write(dir.path().join(&self.name), segment).unwrap();
        let (archive, frames) = open_and_replay(plain(dir.path()), ALL);
        (dir, archive, frames)
    }

    fn durable(&self, archive: &Archive) -> u64 {
        lock_books(archive.books()).durable_seq(tapio_wire::node_id("node-1"), 1)
    }
}

#[test]
fn books_names_and_frames_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let archive = open(plain(dir.path()));
    let sent = append_each(&archive, &mut Frames::new("node-1", 5), 20);
    let before = lock_books(archive.books()).clone();
    archive.shutdown();
    let (archive, replayed) = open_and_replay(plain(dir.path()), ALL);
    assert_eq!(*lock_books(archive.books()), before);
    assert_eq!(replayed, sent);
    let books = lock_books(archive.books());
    let node = tapio_wire::node_id("node-1");
    assert_eq!(books.durable_seq(node, 5), 20);
    assert_eq!(books.name(node).map(|name| &**name), Some("node-1"));
    assert_eq!(books.unexplained_total(), 0);
}

#[test]
fn a_restart_without_frames_leaves_one_segment() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..5 {
        open(plain(dir.path())).shutdown();
    }
    assert_eq!(segments(dir.path()).len(), 1);
}

#[test]
fn only_the_window_is_replayed_and_across_segments() {
    let dir = tempfile::tempdir().unwrap();
    let mut frames = Frames::new("node-1", 1);
    let mut sent = Vec::new();
    for _ in 0..4 {
        let archive = open(plain(dir.path()));
        sent.extend(append_each(&archive, &mut frames, 10));
        archive.shutdown();
    }
    // Frames are a second apart.
    let (_archive, replayed) = open_and_replay(plain(dir.path()), Duration::from_secs(24));
    assert_eq!(replayed, sent[15..]);
}

#[test]
fn a_wall_clock_that_is_behind_does_not_replay_everything() {
    let test = "a_wall_clock_that_is_behind_does_not_replay_everything";
    let Some(clock) = SteppedClock::in_own_process(module_path!(), test) else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut frames = Frames::new("node-1", 1);
    let mut sent = Vec::new();
    for _ in 0..4 {
        let archive = open(plain(dir.path()));
        sent.extend(append_each(&archive, &mut frames, 10));
        archive.shutdown();
    }
    clock.step(-30 * 365 * 86_400);
    let (_archive, replayed) = open_and_replay(plain(dir.path()), Duration::from_secs(24));
    assert_eq!(replayed, sent[15..]);
}

#[test]
fn a_torn_tail_is_cut_to_the_last_whole_record() {
    let prepared = prepare(3);
    let last = prepared.records[2];
    let whole = last + record_bytes(prepared.frames[2].len());
    for length in last..=prepared.segment.len() {
        let (dir, archive, replayed) = prepared.reopen_with(&prepared.segment[..length]);
        // Padding is not part of what a record needs.
        let complete = length >= last + RECORD_HEADER_BYTES + prepared.frames[2].len();
        let expected = if complete { 3 } else { 2 };
        assert_eq!(prepared.durable(&archive), expected, "torn at {length}");
        assert_eq!(replayed.len() as u64, expected, "torn at {length}");
        assert_eq!(archive.stats().totals.quarantined, 0, "torn at {length}");
        let kept = fs::metadata(dir.path().join(&prepared.name)).unwrap().len() as usize;
        assert!(kept <= length && (complete || kept == last), "{kept} kept of {length}");
        if length == whole {
            assert_eq!(kept, whole);
        }
        archive.shutdown();
    }
}

#[test]
fn zeros_behind_the_records_are_the_end() {
    let prepared = prepare(3);
    let mut segment = prepared.segment.clone();
    segment.resize(segment.len() + 100_000, 0);
    let (dir, archive, replayed) = prepared.reopen_with(&segment);
    assert_eq!(replayed, prepared.frames);
    assert_eq!(archive.stats().totals.quarantined, 0);
    let kept = fs::metadata(dir.path().join(&prepared.name)).unwrap().len() as usize;
    assert_eq!(kept, prepared.segment.len());
}

#[test]
fn a_tail_of_garbage_is_quarantined() {
    let prepared = prepare(3);
    let mut segment = prepared.segment.clone();
    segment.extend_from_slice(&[0xa5; 5000]);
    let (dir, archive, replayed) = prepared.reopen_with(&segment);
    assert_eq!(replayed, prepared.frames);
    assert_eq!(archive.stats().totals.quarantined, 1);
    let kept: Vec<_> = fs::read_dir(dir.path().join("quarantine")).unwrap().collect();
    assert_eq!(kept.len(), 1);
    archive.shutdown();
    let (archive, _) = open_and_replay(plain(dir.path()), ALL);
    assert_eq!(archive.stats().totals.quarantined, 1, "counted once");
}

#[test]
fn a_lost_block_among_acknowledged_records_costs_just_those() {
    let prepared = prepare(20);
    let mut segment = prepared.segment.clone();
    segment[prepared.records[5]..prepared.records[8]].fill(0);
    let (_dir, archive, replayed) = prepared.reopen_with(&segment);
    let expected: Vec<_> = [&prepared.frames[..5], &prepared.frames[8..]].concat();
    assert_eq!(replayed, expected);
    assert_eq!(prepared.durable(&archive), 20);
    assert_eq!(archive.stats().totals.quarantined, 1);
    let books = lock_books(archive.books());
    assert_eq!(books.unexplained_total(), 3, "three events are missing, and the books say so");
}

#[test]
fn a_misdirected_block_is_not_taken_for_records() {
    let prepared = prepare(20);
    let mut segment = prepared.segment.clone();
    let (from, to) = (prepared.records[10], prepared.records[4]);
    let length = record_bytes(prepared.frames[10].len());
    segment.copy_within(from..from + length, to);
    let (_dir, archive, replayed) = prepared.reopen_with(&segment);
    let expected: Vec<_> = prepared
        .frames
        .iter()
        .enumerate()
        .filter(|&(index, _)| {
            let start = prepared.records[index];
            start + record_bytes(prepared.frames[index].len()) <= to || start >= to + length
        })
        .map(|(_, frame)| frame.clone())
        .collect();
    assert!(expected.len() >= 18);
    assert_eq!(replayed, expected);
    assert_eq!(archive.stats().totals.quarantined, 1);
}

#[test]
fn a_segment_of_another_number_is_quarantined() {
    let prepared = prepare(5);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(format!("{:020}.segment", 99)), &prepared.segment).unwrap();
    let (archive, replayed) = open_and_replay(plain(dir.path()), ALL);
    assert!(replayed.is_empty());
    assert_eq!(archive.stats().totals.quarantined, 1);
}

#[test]
fn a_hole_in_an_unacknowledged_batch_ends_the_sequence() {
    // Frames 2 to 4 are in one batch without a mark behind it, as a power cut leaves it.
    let prepared = prepare(1);
    let mut frames = Frames::new("node-1", 1);
    frames.next();
    let mut segment = prepared.segment.clone();
    let mut starts = Vec::new();
    for _ in 0..3 {
        starts.push(segment.len());
        let frame = frames.next();
        let offset = segment.len() as u64;
        let kind = tapio_wire::segment::SegmentRecordKind::Frame;
        tapio_wire::segment::append_record(&mut segment, 1, offset, kind, &frame);
    }
    assert_eq!(prepared.durable(&prepared.reopen_with(&segment).1), 4);
    let damaged = starts[1] + RECORD_HEADER_BYTES + 40;
    segment[damaged] ^= 1;
    let (dir, archive, replayed) = prepared.reopen_with(&segment);
    assert_eq!(prepared.durable(&archive), 2, "frame 4 must not be acknowledged without frame 3");
    assert_eq!(replayed.len(), 2);
    let kept = fs::metadata(dir.path().join(&prepared.name)).unwrap().len() as usize;
    assert_eq!(kept, starts[1]);
}

#[test]
fn a_damaged_snapshot_sends_recovery_one_segment_further_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut frames = Frames::new("node-1", 1);
    for _ in 0..3 {
        let archive = open(plain(dir.path()));
        append_each(&archive, &mut frames, 4);
        archive.shutdown();
    }
    let newest = segments(dir.path()).pop().unwrap();
    let file = fs::File::options().write(true).open(newest).unwrap();
    file.write_all_at(b"damage", 64 + 40).unwrap();
    let (archive, replayed) = open_and_replay(plain(dir.path()), ALL);
    let books = lock_books(archive.books());
    assert_eq!(books.durable_seq(frames.node(), 1), 12);
    assert_eq!(books.unexplained_total(), 0);
    assert_eq!(replayed.len(), 12);
    assert_eq!(books.totals().quarantined, 1);
}

#[test]
fn leftovers_of_an_interrupted_creation_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let leftover = dir.path().join(format!("{:020}.segment.new", 4));
    fs::write(&leftover, b"half").unwrap();
    let archive = open(plain(dir.path()));
    assert!(!leftover.exists());
    append_each(&archive, &mut Frames::new("node-1", 1), 1);
}

#[test]
fn a_second_server_is_refused_by_name_of_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(plain(dir.path()));
    let second = Archive::open(plain(dir.path()), Duration::ZERO, &mut |_, _| {});
    let Err(error @ ArchiveError::Locked { .. }) = second else {
        panic!("the second server was not refused");
    };
    let text = error.to_string();
    assert!(text.contains(&dir.path().display().to_string()), "{text}");
    assert!(text.contains(&std::process::id().to_string()), "{text}");
    first.shutdown();
    open(plain(dir.path()));
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let below = file.path().join("archive");
    let result = Archive::open(plain(&below), Duration::ZERO, &mut |_, _| {});
    let Err(error @ ArchiveError::Directory { .. }) = result else {
        panic!("the directory was not refused");
    };
    assert!(error.to_string().contains(&below.display().to_string()));
}

#[test]
fn retention_deletes_the_oldest_segments() {
    let dir = tempfile::tempdir().unwrap();
    let config = ArchiveConfig { max_bytes: 512 << 10, segment_bytes: 64 << 10, ..plain(dir.path()) };
    let archive = open(config.clone());
    let mut frames = Frames::new("node-1", 1);
    frames.events = 2000;
    let sent = append_each(&archive, &mut frames, 300);
    let stats = archive.stats();
    assert!(stats.bytes <= 512 << 10, "{stats:?}");
    assert!(stats.segments > 2, "{stats:?}");
    assert_eq!(stats.totals.frames, 300);
    archive.shutdown();
    let size: u64 = segments(dir.path()).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert!(size <= 512 << 10);
    let (archive, replayed) = open_and_replay(config, ALL);
    assert!(!replayed.is_empty() && replayed.len() < 300);
    assert_eq!(replayed, sent[sent.len() - replayed.len()..], "the newest are kept");
    assert_eq!(lock_books(archive.books()).durable_seq(frames.node(), 1), 300);
}

#[test]
fn io_uring_and_plain_writes_make_the_same_segments() {
    let write = |disk: DiskChoice, dir: &Path| {
        let config = ArchiveConfig { disk, ..plain(dir) };
        let archive = Archive::open(config, Duration::ZERO, &mut |_, _| {})?;
        let mut frames = Frames::new("node-1", 1);
        frames.events = 1000;
        append_each(&archive, &mut frames, 60);
        let kind = archive.stats().disk;
        archive.shutdown();
        let segments: Vec<_> = segments(dir).iter().map(|path| fs::read(path).unwrap()).collect();
        Ok::<_, ArchiveError>((kind, segments))
    };
    let (by_ring, by_plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    match write(DiskChoice::Uring, by_ring.path()) {
        Ok((kind, segments)) => {
            assert_eq!(kind, DiskKind::Uring);
            assert!(segments.len() > 1, "more than one segment is compared");
            let (kind, plain_segments) = write(DiskChoice::Plain, by_plain.path()).unwrap();
            assert_eq!(kind, DiskKind::Plain);
            assert!(segments == plain_segments);
        }
        Err(ArchiveError::Uring { .. }) => {
            skip("io_uring_and_plain_writes_make_the_same_segments", "a kernel that allows io_uring")
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn any_flipped_bit_costs_at_most_its_own_record() {
    let prepared = prepare(12);
    let bits = prepared.segment.len() * 8;
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&(0..bits), |bit| {
            let mut segment = prepared.segment.clone();
            segment[bit / 8] ^= 1 << (bit % 8);
            let (_dir, archive, replayed) = prepared.reopen_with(&segment);
            let hit =
                prepared.records.iter().zip(&prepared.frames).position(|(&start, frame)| {
                    (start..start + RECORD_HEADER_BYTES + frame.len()).contains(&(bit / 8))
                });
            let expected: Vec<_> = prepared
                .frames
                .iter()
                .enumerate()
                .filter(|&(index, _)| Some(index) != hit)
                .map(|(_, frame)| frame.clone())
                .collect();
            prop_assert_eq!(replayed, expected);
            if hit.is_some() {
                prop_assert_eq!(archive.stats().totals.quarantined, 1);
            }
            Ok(())
        })
        .unwrap();
}
