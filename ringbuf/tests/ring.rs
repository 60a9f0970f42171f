//! What an honest writer and reader of a memfd ring do, in one process.
#![cfg(not(loom))]

use crate::napping;

use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use tapio_ringbuf::{CounterArray, Error, EventFd, Limits, Poller, Reader, Refusal, WakeupFlag, Writer};

// Each end is made in one thread and may be used in another.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Reader>();
    is_send::<Writer>();
    is_send::<Poller>();
    is_send::<EventFd>();
    is_send::<WakeupFlag>();
    is_send::<CounterArray>();
};

const DATA_BYTES: usize = 4096;

fn ring() -> (Writer, Reader) {
    let (writer, memfd, _) = Writer::create(DATA_BYTES, "test").unwrap();
    (writer, Reader::from_memfd(memfd, Limits::default()).unwrap())
}

fn duplicate(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().unwrap()
}

#[test]
fn records_of_every_length_arrive_unchanged_across_many_wraps() {
    let (mut writer, mut reader) = ring();
    for length in (0..1024).cycle().take(5000) {
        let record: Vec<u8> = (0..length).map(|index| (index * 7 + length) as u8).collect();
        assert!(writer.write(&record));
        let mut seen = 0;
        reader
            .drain(2, |bytes| {
                assert_eq!(bytes, record);
                seen += 1;
            })
            .unwrap();
        assert_eq!(seen, 1);
    }
    assert_eq!((writer.emitted(), writer.dropped(), writer.consumed(), reader.consumed()), (5000, 0, 5000, 5000));
}

#[test]
fn a_full_ring_drops_only_for_those_not_waiting() {
    let (mut writer, mut reader) = ring();
    // 56 and 8 are 64: exactly 64 records fit.
    for _ in 0..64 {
        assert!(writer.write(&[1; 56]));
    }
    assert_eq!(writer.room_bytes(), 0);
    assert!(!writer.try_write(&[2; 1]) && writer.try_reserve(0).is_none());
    assert_eq!((writer.emitted(), writer.dropped()), (64, 0));
    assert!(!writer.write(&[2; 56]) && writer.reserve(56).is_none());
    writer.count_dropped(3);
    let counters = reader.producer_counters().unwrap();
    assert_eq!((counters.emitted, counters.dropped), (69, 5));
    assert_eq!((writer.emitted(), writer.dropped()), (69, 5));

    let drained = reader.drain(3, |_| {}).unwrap();
    assert!(drained.more && drained.records == 3 && drained.bytes == 168);
    assert_eq!((writer.room_bytes(), reader.pending_bytes()), (192, DATA_BYTES - 192));
    assert_eq!(writer.write_batch([&[3; 56][..]; 5]), 3);
    assert_eq!(reader.drain(usize::MAX, |_| {}).unwrap().records, 64);
    assert_eq!(writer.emitted(), reader.consumed() + writer.dropped());
}

#[test]
fn a_record_that_can_never_fit_is_refused() {
    let (mut writer, _reader) = ring();
    assert!(!writer.write(&[0; DATA_BYTES]));
    let (mut large, _memfd, _) = Writer::create(1 << 16, "test").unwrap();
    assert!(large.try_write(&[0; 4096]));
    assert!(!large.try_write(&[0; 4097]));
}

#[test]
fn reservations_count_when_they_are_committed() {
    let (mut writer, mut reader) = ring();
    writer.reserve(8).unwrap().discard();
    let _ = writer.reserve(8).unwrap();
    assert!(reader.is_empty() && writer.emitted() == 0);
    let mut reservation = writer.reserve(5).unwrap();
    reservation.copy_from_slice(b"hello");
    assert_eq!(&*reservation, b"hello");
    reservation.commit();
    let mut seen = Vec::new();
    reader.drain(9, |record| seen.push(record.to_vec())).unwrap();
    assert_eq!(seen, [b"hello"]);
    assert_eq!(writer.emitted(), 1);
}

#[test]
fn a_batch_appears_at_once() {
    let (mut writer, mut reader) = ring();
    let records = [[1u8; 64], [2; 64], [3; 64]];
    let written = writer.write_batch(records.iter().map(|record| {
        assert!(reader.is_empty());
        &record[..]
    }));
    assert_eq!(written, 3);
    let mut seen = Vec::new();
    reader.drain(9, |record| seen.push(record[0])).unwrap();
    assert_eq!(seen, [1, 2, 3]);
    assert_eq!(writer.write_batch([]), 0);
}

#[test]
fn the_position_covers_handed_out_records_after_a_panic() {
    let (mut writer, mut reader) = ring();
    for number in 0..6u8 {
        assert!(writer.write(&[number]));
    }
    let drained = reader
        .drain_while(9, |record| if record == [1] { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        .unwrap();
    assert_eq!((drained.records, drained.more, writer.consumed()), (2, true, 2));
    let panicked = catch_unwind(AssertUnwindSafe(|| reader.drain(9, |record| assert_ne!(record, [3]))));
    assert!(panicked.is_err());
    assert_eq!((reader.consumed(), writer.consumed(), writer.room_bytes()), (4, 4, DATA_BYTES - 2 * 16));
    let mut rest = Vec::new();
    reader.drain(9, |record| rest.push(record[0])).unwrap();
    assert_eq!(rest, [4, 5]);
}

#[test]
fn the_next_reader_carries_on_where_the_last_one_stopped() {
    let (mut writer, memfd, _) = Writer::create(DATA_BYTES, "test").unwrap();
    let mut first = Reader::from_memfd(duplicate(&memfd), Limits::default()).unwrap();
    for number in 0..5u8 {
        assert!(writer.write(&[number]));
    }
    first.drain(2, |_| {}).unwrap();
    first.set_accounted_dropped(17);
    drop(first);
    let mut second = Reader::from_memfd(memfd, Limits::default()).unwrap();
    assert_eq!((second.consumed(), second.accounted_dropped()), (2, Some(17)));
    let mut seen = Vec::new();
    second.drain(9, |record| seen.push(record[0])).unwrap();
    assert_eq!(seen, [2, 3, 4]);
    assert_eq!(second.consumed(), 5);
}

#[test]
fn the_writer_wakes_only_readers_that_asked_and_once() {
    let (mut writer, memfd, eventfd) = Writer::create(DATA_BYTES, "test").unwrap();
    let mut reader = Reader::from_memfd(memfd, Limits::default()).unwrap();
    let eventfd = EventFd::from_peer(eventfd).unwrap();
    let mut poller = Poller::new().unwrap();
    poller.add_edge(eventfd.as_fd(), 3).unwrap();

    assert!(writer.write(b"unasked"));
    assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), []);

    for _ in 0..2 {
        reader.drain(9, |_| {}).unwrap();
        reader.set_need_wakeup(true);
        assert!(reader.is_empty());
        assert_eq!(writer.write_batch([&b"asked"[..]; 2]), 2);
        assert_eq!(poller.wait(Some(Duration::from_secs(10))).unwrap(), [3]);
        assert!(writer.write(b"answered already"));
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), []);
    }
    reader.set_need_wakeup(true);
    reader.set_need_wakeup(false);
    assert!(writer.write(b"withdrawn"));
    assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), []);
}

#[test]
fn a_napping_reader_is_woken_only_when_its_ring_fills() {
    let (mut writer, memfd, eventfd) = Writer::create(DATA_BYTES, "test").unwrap();
    let mut reader = Reader::from_memfd(memfd, Limits::default()).unwrap();
    assert!(reader.is_woken_when_filling());
    let eventfd = EventFd::from_peer(eventfd).unwrap();
    let mut poller = Poller::new().unwrap();
    poller.add_edge(eventfd.as_fd(), 3).unwrap();

    for _ in 0..20 {
        assert_eq!(writer.write_batch([&[1; 56][..]; 15]), 15);
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), [], "less than a quarter was unread");
        reader.drain(99, |_| {}).unwrap();
    }
    // From a position that is no multiple of an eighth.
    for _ in 0..20 {
        napping::fill_until_woken(&mut reader, &mut poller, || writer.write(&[1; 16]));
    }
    assert_eq!(writer.write_batch([&[1; 1000][..]; 3]), 3);
    assert_eq!(poller.wait(Some(Duration::from_secs(10))).unwrap(), [3], "a batch that fills most of it at once");
}

#[test]
fn a_cleared_eventfd_is_not_ready_and_tokens_differ() {
    let (first, second) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    let mut poller = Poller::new().unwrap();
    poller.add(first.as_fd(), 1).unwrap();
    poller.add(second.as_fd(), u64::MAX).unwrap();
    second.notify().unwrap();
    for _ in 0..2 {
        assert_eq!(poller.wait(None).unwrap(), [u64::MAX]);
    }
    second.clear().unwrap();
    second.clear().unwrap();
    assert_eq!(poller.wait(Some(Duration::from_millis(1))).unwrap(), []);
    first.notify().unwrap();
    poller.remove(first.as_fd()).unwrap();
    assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), []);
    assert!(matches!(poller.remove(first.as_fd()), Err(Error::System { .. })));
}

#[test]
fn only_an_eventfd_is_taken_for_one() {
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    assert!(matches!(EventFd::from_peer(reader), Err(Error::Refused(Refusal::NotEventFd))));
}

#[test]
fn sizes_that_no_ring_can_have_are_refused() {
    for data_bytes in [0, 1000, 2048, 12288, 1 << 31] {
        assert!(matches!(Writer::create(data_bytes, "test"), Err(Error::DataSize { .. })), "{data_bytes}");
    }
}

#[test]
fn an_urgent_record_wakes_a_reader_that_did_not_ask() {
    let (mut writer, memfd, eventfd) = Writer::create(DATA_BYTES, "test").unwrap();
    let mut reader = Reader::from_memfd(memfd, Limits::default()).unwrap();
    let mut poller = Poller::new().unwrap();
    let eventfd = EventFd::from_peer(eventfd).unwrap();
    poller.add_edge(eventfd.as_fd(), 7).unwrap();
    assert!(writer.write(b"can wait"));
    assert!(poller.wait(Some(Duration::ZERO)).unwrap().is_empty(), "nobody asked");
    assert!(writer.write(b"cannot wait"));
    writer.wake_reader();
    assert_eq!(poller.wait(Some(Duration::from_secs(10))).unwrap(), [7]);
    assert_eq!(reader.drain(8, |_| ()).unwrap().records, 2);
    assert!(poller.wait(Some(Duration::ZERO)).unwrap().is_empty(), "reported once");
}
