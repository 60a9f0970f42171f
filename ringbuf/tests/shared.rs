//! What several producers of one process do with a memfd ring.
#![cfg(not(loom))]

use crate::napping;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use tapio_ringbuf::{EventFd, Limits, Poller, RESERVATIONS_MAX, Reader, SharedWriter};

const _: () = {
    const fn is_shared<T: Clone + Send + Sync>() {}
    is_shared::<SharedWriter>();
};

const DATA_BYTES: usize = 4096;
const PRODUCERS: usize = 4;
const RECORDS: u64 = 50_000;

fn ring() -> (SharedWriter, Reader) {
    let (writer, memfd, _) = SharedWriter::create(DATA_BYTES, "test").unwrap();
    (writer, Reader::from_memfd(memfd, Limits::default()).unwrap())
}

/// The `number`-th record of a producer, of varying length and unlike any other.
fn fill(record: &mut [u8], producer: usize, number: u64) {
    let (first, rest) = record.split_at_mut(16);
    first[..8].copy_from_slice(&(producer as u64).to_ne_bytes());
    first[8..].copy_from_slice(&number.to_ne_bytes());
    rest.fill(producer as u8 ^ number as u8);
}

fn length(number: u64) -> usize {
    16 + (number % 90) as usize
}

/// Producer and number of a record, checked to be whole.
fn check(record: &[u8]) -> (usize, u64) {
    let word = |at: usize| u64::from_ne_bytes(*record[at..].first_chunk().unwrap());
    let (producer, number) = (word(0) as usize, word(8));
    assert_eq!(record.len(), length(number), "{producer}: {number}");
    assert!(record[16..].iter().all(|&byte| byte == producer as u8 ^ number as u8), "{producer}: {number}");
    (producer, number)
}

/// Runs all producers and reads until they have ended; each record is checked and its producer's order with it.
///
/// Returns the records read and skipped.
fn run(writer: &SharedWriter, reader: &mut Reader, produce: impl Fn(&SharedWriter, usize) + Sync) -> (u64, u64) {
    let mut next = [0; PRODUCERS];
    let (mut seen, mut discarded) = (0, 0);
    let have_ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let producers: Vec<_> = (0..PRODUCERS)
            .map(|producer| {
                let (writer, produce) = (writer.clone(), &produce);
                scope.spawn(move || produce(&writer, producer))
            })
            .collect();
        scope.spawn(|| {
            producers.into_iter().for_each(|producer| producer.join().unwrap());
            have_ended.store(true, Ordering::Release);
        });
        loop {
            let ended = have_ended.load(Ordering::Acquire);
            let drained = reader
                .drain(64, |record| {
                    let (producer, number) = check(record);
                    assert!(number >= next[producer], "{producer}: {number} after {}", next[producer]);
                    next[producer] = number + 1;
                    seen += 1;
                })
                .unwrap();
            discarded += drained.discarded as u64;
            if ended && reader.is_empty() {
                break;
            }
            if drained.records + drained.discarded == 0 {
                thread::yield_now();
            }
        }
    });
    (seen, discarded)
}

#[test]
fn records_of_many_threads_arrive_whole_and_in_order() {
    let (writer, mut reader) = ring();
    let (seen, discarded) = run(&writer, &mut reader, |writer, producer| {
        for number in 0..RECORDS {
            if let Some(mut record) = writer.reserve(length(number)) {
                fill(&mut record, producer, number);
                record.commit();
            }
        }
    });
    let counters = reader.producer_counters().unwrap();
    assert_eq!(discarded, 0);
    assert_eq!((counters.emitted, reader.consumed()), (PRODUCERS as u64 * RECORDS, seen));
    assert_eq!(counters.emitted, reader.consumed() + counters.dropped);
    assert_eq!((writer.emitted(), writer.dropped(), writer.consumed()), (counters.emitted, counters.dropped, seen));
    eprintln!("{seen} consumed, {} dropped", counters.dropped);
}

#[test]
fn threads_that_wait_for_room_lose_nothing() {
    let (writer, mut reader) = ring();
    let (seen, discarded) = run(&writer, &mut reader, |writer, producer| {
        for number in 0..RECORDS {
            let mut record = loop {
                match writer.try_reserve(length(number)) {
                    Some(record) => break record,
                    None => thread::yield_now(),
                }
            };
            fill(&mut record, producer, number);
            if number % 10 == 3 { record.discard() } else { record.commit() }
        }
    });
    let all = PRODUCERS as u64 * RECORDS;
    assert_eq!((seen, discarded), (all / 10 * 9, all / 10));
    assert_eq!((writer.emitted(), writer.dropped(), reader.consumed()), (seen, 0, seen));
}

#[test]
fn an_uncommitted_record_holds_back_those_behind_it() {
    let (writer, mut reader) = ring();
    let first = writer.reserve(8).unwrap();
    assert!(writer.write(b"second"));
    for _ in 0..3 {
        let drained = reader.drain(9, |_| unreachable!()).unwrap();
        assert!(drained.stalled && drained.records == 0 && !reader.is_empty());
    }
    first.discard();
    let mut seen = Vec::new();
    let drained = reader.drain(9, |record| seen.push(record.to_vec())).unwrap();
    assert_eq!((seen, drained.discarded, drained.stalled), (vec![b"second".to_vec()], 1, false));
    assert_eq!((writer.emitted(), writer.consumed()), (1, 1));
}

#[test]
fn a_producer_that_panics_gives_its_record_up() {
    let (writer, mut reader) = ring();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _record = writer.reserve(8).unwrap();
        panic!("in the middle of a record");
    }));
    assert!(panicked.is_err());
    assert!(writer.write(b"next"));
    let drained = reader.drain(9, |record| assert_eq!(record, b"next")).unwrap();
    assert_eq!((drained.records, drained.discarded, writer.emitted()), (1, 1, 1));
}

#[test]
fn full_rings_and_too_many_reservations_count_as_drops() {
    let (writer, mut reader) = ring();
    for _ in 0..64 {
        assert!(writer.write(&[1; 56]));
    }
    assert!(!writer.try_write(&[]) && writer.emitted() == 64);
    assert!(!writer.write(&[]) && writer.reserve(0).is_none());
    assert_eq!((writer.emitted(), writer.dropped()), (66, 2));
    assert_eq!(reader.drain(usize::MAX, |_| {}).unwrap().records, 64);

    let reservations: Vec<_> = (0..RESERVATIONS_MAX).map(|_| writer.reserve(8).unwrap()).collect();
    assert!(writer.reserve(8).is_none());
    drop(reservations);
    assert!(writer.write(&[2; 8]));
    assert_eq!(reader.drain(usize::MAX, |_| {}).unwrap().discarded, RESERVATIONS_MAX);
    assert_eq!((writer.emitted(), writer.dropped(), reader.consumed()), (68, 3, 65));
    assert!(!writer.try_write(&[0; 4097]));
}

#[test]
fn a_lying_reader_gets_no_unfinished_bytes() {
    let (writer, memfd, _) = SharedWriter::create(DATA_BYTES, "test").unwrap();
    let peer = File::from(OwnedFd::try_clone(&memfd).unwrap());
    let mut held = writer.reserve(1016).unwrap();
    held.fill(7);
    for round in 1..4u64 {
        assert!(writer.write(&[1; 1016]));
        peer.write_all_at(&(1024 * (round + 1)).to_ne_bytes(), 0).unwrap();
    }
    // By the position that the reader stored, the whole ring is free.
    assert!(!writer.try_write(&[1; 8]));
    assert!(held.iter().all(|&byte| byte == 7));
    held.commit();
    assert!(writer.try_write(&[1; 8]));
    peer.write_all_at(&u64::MAX.to_ne_bytes(), 0).unwrap();
    assert!((0..5).any(|_| !writer.try_write(&[1; 1016])), "a position that makes no sense leaves no room");
}

#[test]
fn a_commit_wakes_the_reader_that_asked() {
    let (writer, memfd, eventfd) = SharedWriter::create(DATA_BYTES, "test").unwrap();
    let reader = Reader::from_memfd(memfd, Limits::default()).unwrap();
    let eventfd = EventFd::from_peer(eventfd).unwrap();
    let mut poller = Poller::new().unwrap();
    poller.add_edge(std::os::fd::AsFd::as_fd(&eventfd), 3).unwrap();
    let reservation = writer.reserve(8).unwrap();
    reader.set_need_wakeup(true);
    assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), []);
    reservation.commit();
    assert_eq!(poller.wait(Some(Duration::from_secs(10))).unwrap(), [3]);
    assert!(writer.write(b"answered already"));
    assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), []);
}

#[test]
fn a_commit_into_a_full_ring_wakes_a_napping_reader() {
    let (writer, memfd, eventfd) = SharedWriter::create(DATA_BYTES, "test").unwrap();
    let mut reader = Reader::from_memfd(memfd, Limits::default()).unwrap();
    assert!(reader.is_woken_when_filling());
    let eventfd = EventFd::from_peer(eventfd).unwrap();
    let mut poller = Poller::new().unwrap();
    poller.add_edge(std::os::fd::AsFd::as_fd(&eventfd), 3).unwrap();
    for _ in 0..20 {
        napping::fill_until_woken(&mut reader, &mut poller, || writer.write(&[1; 16]));
    }
    reader.drain(999, |_| {}).unwrap();
    assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), [], "a look is no reason to be woken");
}

#[test]
fn records_are_shown_ahead_once_and_in_order() {
    const SOME: u64 = 500;
    #[derive(Default)]
    struct Taker {
        ahead: std::cell::RefCell<Vec<u64>>,
        taken: Vec<u64>,
    }
    let (writer, memfd, _) = SharedWriter::create(1 << 20, "test").unwrap();
    let mut reader = Reader::from_memfd(memfd, Limits::default()).unwrap();
    for number in 0..SOME {
        let mut reservation = writer.reserve(length(number)).unwrap();
        fill(&mut reservation, 0, number);
        if number % 7 == 0 {
            reservation.discard();
        } else {
            reservation.commit();
        }
    }
    let mut taker = Taker::default();
    let mut drain = |most: usize| {
        let show = |taker: &Taker, record: &[u8]| taker.ahead.borrow_mut().push(check(record).1);
        let take = |taker: &mut Taker, record: &[u8]| {
            let (_, number) = check(record);
            taker.taken.push(number);
            assert_eq!(taker.ahead.borrow()[taker.taken.len() - 1], number, "shown before");
        };
        let drained = reader.drain_ahead(most, &mut taker, show, take).unwrap();
        assert_eq!(taker.ahead.borrow().len(), taker.taken.len());
        drained.records + drained.discarded
    };
    assert_eq!(drain(10), 10);
    assert_eq!(drain(usize::MAX) as u64, SOME - 10);
    let committed: Vec<u64> = (0..SOME).filter(|number| number % 7 != 0).collect();
    assert_eq!(taker.taken, committed);
}
