use std::os::unix::fs::PermissionsExt;

use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Detail, Event, Lane, Source};
use tapio_wire::frame::{Encoder, Stamp};
use tapio_wire::segment::RECORD_HEADER_BYTES;

use super::*;
use crate::settings::config::SPOOL_BYTES_MIN;

fn frame(epoch: u64, seq: u64, events: usize) -> Bytes {
    let event = Event { time_ns: 1, entity: 1, pid: 1, source: Source::Shm, body: Detail::RunQueue { wait_ns: seq } };
    let body = Body { events: vec![event; events], ..Body::default() };
    let sealed = Encoder::default().seal(&body, Lane::Bulk, Compression::None).expect("within the limits");
    let mut ledger = Ledger::default();
    ledger.account_mut(Source::Shm).shipped = seq * events as u64;
    sealed.stamp(&Stamp { node: 7, epoch, seq, boottime_ns: 1, realtime_ns: 1, is_final: false }, &ledger)
}

fn seqs(frames: &[Bytes]) -> Vec<u64> {
    frames.iter().map(|frame| Header::check(frame).expect("whole").0.seq).collect()
}

#[test]
fn appended_frames_are_read_in_order_after_a_restart() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, left) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    assert!(left.is_empty());
    spool.append(&(5..=8).map(|seq| frame(1, seq, 10)).collect::<Vec<_>>()).expect("written");
    spool.append(&[frame(1, 9, 10)]).expect("written");
    spool.append(&[frame(2, 1, 10)]).expect("written");
    assert_eq!(seqs(&spool.read(1, 5, 1).expect("read")), [5]);
    assert_eq!(seqs(&spool.read(1, 6, usize::MAX).expect("read")), [6, 7, 8, 9]);
    assert_eq!(seqs(&spool.read(1, 7, usize::MAX).expect("read")), [7, 8, 9], "also where it was read before");
    assert_eq!(spool.read(1, 10, usize::MAX).expect_err("no such frame").kind(), io::ErrorKind::InvalidData);
    drop(spool);
    let (mut spool, left) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    let epochs: Vec<_> = left.iter().map(|left| (left.epoch, left.first_seq, left.last_seq)).collect();
    assert_eq!(epochs, [(1, 5, 9), (2, 1, 1)]);
    assert_eq!(left[0].acked_events[Source::Shm as usize], 40);
    spool.acknowledged(1, 9, [0; SOURCES]);
    assert_eq!(seqs(&spool.read(2, 1, usize::MAX).expect("read")), [1]);
    spool.acknowledged(2, 1, [0; SOURCES]);
    assert_eq!((spool.bytes(), fs::read_dir(dir.path()).expect("a folder").count()), (0, 0));
}

#[test]
fn a_torn_tail_is_cut_to_the_last_whole_frame() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, _) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    spool.append(&[frame(1, 1, 2), frame(1, 2, 2)]).expect("written");
    let path = spool.path(1);
    let whole = fs::read(&path).expect("read");
    drop(spool);
    let second = SEGMENT_HEADER_BYTES + record_bytes(frame(1, 1, 2).len());
    for cut in second..whole.len() {
        fs::write(&path, &whole[..cut]).expect("written");
        let (_spool, left) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
        assert_eq!((left[0].first_seq, left[0].last_seq), (1, 1), "cut at {cut}");
        assert_eq!(fs::metadata(&path).expect("there").len(), second as u64);
    }
}

#[test]
fn a_folder_is_one_collectors_and_nobody_elses_to_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let dir = dir.path().join("spool");
    let (mut spool, _) = Spool::open(&dir, SPOOL_BYTES_MIN).expect("opened");
    spool.append(&[frame(1, 1, 2)]).expect("written");
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&spool.path(1))), (0o700, 0o600));
    let error = Spool::open(&dir, SPOOL_BYTES_MIN).err().expect("it is in use").to_string();
    assert!(error.contains("another collector"), "{error}");
    drop(spool);
    Spool::open(&dir, SPOOL_BYTES_MIN).expect("opened");
}

#[test]
fn a_write_larger_than_a_batch_is_whole() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, _) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    let frames: Vec<Bytes> = (1..=20).map(|seq| frame(1, seq, 10_000)).collect();
    assert!(frames.iter().map(Bytes::len).sum::<usize>() > 2 * SPOOL_BATCH_BYTES);
    spool.append(&frames).expect("written");
    drop(spool);
    let (mut spool, left) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    assert_eq!((left[0].first_seq, left[0].last_seq), (1, 20));
    assert_eq!(seqs(&spool.read(1, 1, usize::MAX).expect("read")), (1..=20).collect::<Vec<_>>());
}

#[test]
fn the_bound_holds_and_is_made_of_whole_segments() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, _) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    let mut seq = 1;
    while spool.has_room(&[frame(1, seq, 10_000)]) {
        spool.append(&[frame(1, seq, 10_000)]).expect("written");
        seq += 1;
    }
    let on_disk = || {
        let entries = fs::read_dir(dir.path()).expect("a folder");
        entries.map(|entry| entry.expect("an entry").metadata().expect("its size").len()).sum::<u64>()
    };
    let notes = on_disk() - spool.bytes();
    assert!(notes < NOTES_BYTES as u64 && on_disk() <= SPOOL_BYTES_MIN && on_disk() > SPOOL_BYTES_MIN * 9 / 10);
    spool.acknowledged(1, seq / 2, [0; SOURCES]);
    assert!(on_disk() < SPOOL_BYTES_MIN * 3 / 4 && spool.has_room(&[frame(1, seq, 10_000)]));
}

/// Where the record of a frame begins in the first segment, when all frames before it are as long as this one.
fn record_of(seq: u64, frame: &Bytes) -> usize {
    SEGMENT_HEADER_BYTES + (seq as usize - 1) * record_bytes(frame.len())
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).expect("read");
    bytes[at] ^= 4;
    fs::write(path, bytes).expect("written");
}

#[test]
fn a_flipped_bit_costs_one_frame_also_after_a_restart() {
    for at in [4, RECORD_HEADER_BYTES + 30, RECORD_HEADER_BYTES + 300] {
        let dir = tempfile::tempdir().expect("a folder");
        let (mut spool, _) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
        spool.append(&(1..=8).map(|seq| frame(1, seq, 10)).collect::<Vec<_>>()).expect("written");
        flip(&spool.path(1), record_of(4, &frame(1, 4, 10)) + at);
        for _ in 0..2 {
            assert_eq!(seqs(&spool.read(1, 1, usize::MAX).expect("read")), [1, 2, 3], "byte {at}");
            assert_eq!(spool.read(1, 4, usize::MAX).expect_err("damaged").kind(), io::ErrorKind::InvalidData);
            let (header, ledger) = spool.next_whole(1, 4).expect("the one behind it");
            assert_eq!((header.seq, ledger.account(Source::Shm).shipped), (5, 50));
            assert_eq!(seqs(&spool.read(1, 5, usize::MAX).expect("read")), [5, 6, 7, 8]);
            drop(spool);
            let left;
            (spool, left) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
            assert_eq!((left[0].first_seq, left[0].last_seq), (1, 8));
        }
    }
}

/// A spool of three segments, and the first frames of the second and the third.
fn three_segments(dir: &Path) -> (Spool, u64, u64) {
    let (mut spool, _) = Spool::open(dir, SPOOL_BYTES_MIN).expect("opened");
    let mut seq = 1;
    while spool.segments.len() < 3 {
        spool.append(&[frame(1, seq, 10_000)]).expect("written");
        seq += 1;
    }
    let (second, third) = (spool.segments[1].first_seq, spool.segments[2].first_seq);
    (spool, second, third)
}

#[test]
fn a_segment_that_somebody_deleted_costs_what_was_in_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, second, third) = three_segments(dir.path());
    fs::remove_file(spool.path(2)).expect("deleted");
    for is_known in [true, false] {
        let frames = spool.read(1, 1, usize::MAX).expect("read");
        assert_eq!(seqs(&frames), (1..second).collect::<Vec<_>>());
        let error = spool.read(1, second, usize::MAX).expect_err("it is gone").kind();
        // After a restart nobody knows that there was a file.
        assert_eq!(error, if is_known { io::ErrorKind::NotFound } else { io::ErrorKind::InvalidData });
        assert_eq!(spool.next_whole(1, second).map(|(header, _)| header.seq), Some(third));
        assert_eq!(seqs(&spool.read(1, third, usize::MAX).expect("read")), [third]);
        drop(spool);
        (spool, _) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    }
}

#[test]
fn a_deleted_segment_is_not_written_to_any_more() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, _) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    spool.append(&[frame(1, 1, 10)]).expect("written");
    fs::remove_file(spool.path(1)).expect("deleted");
    spool.append(&[frame(1, 2, 10)]).expect("written");
    assert_eq!(spool.next_whole(1, 1).map(|(header, _)| header.seq), Some(2));
}

#[test]
fn a_frame_damaged_in_memory_does_not_stop_the_spool() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, _) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    let mut damaged = frame(1, 2, 10).to_vec();
    damaged[200] ^= 1;
    spool.append(&[frame(1, 1, 10), damaged.into(), frame(1, 3, 10)]).expect("written");
    assert_eq!(seqs(&spool.read(1, 1, usize::MAX).expect("read")), [1]);
    assert_eq!(spool.next_whole(1, 2).map(|(header, _)| header.seq), Some(3));
}

#[test]
fn an_ended_epochs_rest_is_read_as_the_next_one() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, _) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    spool.append(&(1..=6).map(|seq| frame(1, seq, 10)).collect::<Vec<_>>()).expect("written");
    let end = |spool: &mut Spool, epoch: u64, from_seq: u64| {
        let (header, ledger) = spool.next_whole(epoch, from_seq).expect("a frame");
        let shift = Shift::before(&header, &ledger, epoch + 1);
        let closing = frame(epoch, from_seq - 1, 0);
        spool.end_epoch(epoch, Some(shift), Some(closing), 7).expect("written");
    };
    end(&mut spool, 1, 3);
    spool.append(&[frame(2, 5, 10)]).expect("written");
    end(&mut spool, 2, 3);
    spool.append(&[frame(3, 4, 10)]).expect("written");
    for _ in 0..2 {
        // 5 and 6 of the first epoch, 5 of the second, 4 of the third.
        let frames = spool.read(3, 1, usize::MAX).expect("read");
        assert_eq!(seqs(&frames), [1, 2, 3, 4]);
        let shipped = |frame: &Bytes| Header::check(frame).expect("whole").1.account(Source::Shm).shipped;
        assert_eq!(frames.iter().map(shipped).collect::<Vec<_>>(), [10, 20, 30, 40]);
        drop(spool);
        let left;
        (spool, left) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
        assert_eq!(left.len(), 1);
        assert_eq!((left[0].epoch, left[0].first_seq, left[0].last_seq), (3, 1, 4));
        assert_eq!(left[0].acked_events, [0; SOURCES]);
        let closed = left[0].closings.iter().map(|closing| Header::check(closing).expect("whole").0.epoch);
        assert_eq!(closed.collect::<Vec<_>>(), [1, 2]);
    }
    spool.forget_endings(&[]);
    assert_eq!(spool.endings.len(), 2, "the frames need them");
    spool.acknowledged(3, 4, [0; SOURCES]);
    spool.forget_endings(&[1]);
    assert_eq!(spool.endings.len(), 1, "a closing frame is to be sent");
    spool.forget_endings(&[]);
    assert_eq!((spool.bytes(), fs::read_dir(dir.path()).expect("a folder").count()), (0, 0));
}

#[test]
fn a_deleted_first_segment_does_not_count_as_acknowledged() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, second, third) = three_segments(dir.path());
    let mut acked = [0; SOURCES];
    acked[Source::Shm as usize] = (second - 1) * 10_000;
    spool.acknowledged(1, second - 1, acked);
    drop(spool);
    let (spool, left) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    assert_eq!((left[0].first_seq, left[0].acked_events), (second, acked));
    fs::remove_file(spool.path(2)).expect("deleted");
    drop(spool);
    let (mut spool, left) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    assert_eq!((left[0].first_seq, left[0].acked_events), (second, acked), "nobody acknowledged what is gone");
    assert!(spool.read(1, second, usize::MAX).is_err());
    assert_eq!(spool.next_whole(1, second).map(|(header, _)| header.seq), Some(third));
}

#[test]
fn the_first_frame_of_all_may_be_the_damaged_one() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, _) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    spool.append(&(5..=8).map(|seq| frame(1, seq, 10)).collect::<Vec<_>>()).expect("written");
    let path = spool.path(1);
    drop(spool);
    flip(&path, SEGMENT_HEADER_BYTES + RECORD_HEADER_BYTES + 300);
    let (_spool, left) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    assert_eq!((left[0].first_seq, left[0].last_seq, left[0].acked_events[Source::Shm as usize]), (5, 8, 40));
}
