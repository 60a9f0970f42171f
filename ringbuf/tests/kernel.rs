//! The reader against the kernel's own ring buffer. Needs CAP_BPF; says so where it is missing, and fails there under
//! TAPIO_REQUIRE=all.
#![cfg(not(loom))]

#[allow(dead_code, reason = "shared with the bench, which uses another part of it")]
use std::os::fd::AsFd;
use std::time::Duration;

use crate::bpf;
use crate::bpf::{FORCE_WAKEUP, NO_WAKEUP, Program, Then};
use tapio_ringbuf::{Corruption, CounterArray, Error, Poller, Reader, WakeupFlag};

const DATA_BYTES: usize = 16 << 10;
const RECORD_BYTES_MAX: usize = 300;

#[test]
fn submitted_records_arrive_in_order_without_discarded_ones() {
    if !bpf::available() {
        return;
    }
    let map = bpf::ring(DATA_BYTES).unwrap();
    let submit = |bytes, value| Program::load(map.as_fd(), bytes, value, Then::Submit, NO_WAKEUP).unwrap();
    let (first, second) = (submit(13, 7), submit(300, 9));
    let discard = Program::load(map.as_fd(), 24, 8, Then::Discard, NO_WAKEUP).unwrap();
    let mut reader = Reader::from_bpf_map(map.as_fd(), DATA_BYTES, RECORD_BYTES_MAX).unwrap();
    // Enough turns for the records to wrap many times, at ever other offsets.
    for turn in 0..200 {
        assert!(first.run(1).unwrap() && discard.run(2).unwrap() && second.run(1).unwrap());
        assert_eq!(reader.pending_bytes(), 24 + 2 * 32 + 312);
        let mut records = Vec::new();
        let drained = reader.drain(100, |record| records.push((record.len(), record[0]))).unwrap();
        assert_eq!(records, [(13, 7), (300, 9)], "turn {turn}");
        assert_eq!((drained.records, drained.discarded, drained.bytes), (2, 2, 313));
        assert!(reader.is_empty() && !drained.more && !drained.stalled);
    }
    assert_eq!(reader.consumed(), 400);
    assert_eq!(reader.producer_counters(), None);
}

#[test]
fn a_record_longer_than_the_mapping_is_not_handed_out() {
    if !bpf::available() {
        return;
    }
    let map = bpf::ring(DATA_BYTES).unwrap();
    let submit = |bytes| Program::load(map.as_fd(), bytes, 1, Then::Submit, NO_WAKEUP).unwrap();
    let mut reader = Reader::from_bpf_map(map.as_fd(), DATA_BYTES, RECORD_BYTES_MAX).unwrap();
    submit(RECORD_BYTES_MAX as u32).run(1).unwrap();
    submit(8192).run(1).unwrap();
    let mut lengths = Vec::new();
    let drained = reader.drain(10, |record| lengths.push(record.len()));
    assert!(matches!(drained, Err(Error::Corrupt { what: Corruption::OverLimit, .. })), "{drained:?}");
    assert_eq!(lengths, [300]);
}

#[test]
fn a_full_ring_takes_records_again_once_they_are_drained() {
    if !bpf::available() {
        return;
    }
    let map = bpf::ring(DATA_BYTES).unwrap();
    let program = Program::load(map.as_fd(), 56, 1, Then::Submit, NO_WAKEUP).unwrap();
    let mut reader = Reader::from_bpf_map(map.as_fd(), DATA_BYTES, RECORD_BYTES_MAX).unwrap();
    assert!(!program.run(300).unwrap(), "300 records of 64 bytes do not fit");
    // The kernel leaves one byte of the ring unused, so the 256th record does not fit either.
    let drained = reader.drain(10, |_| {}).unwrap();
    assert_eq!((drained.records, drained.more), (10, true));
    assert!(program.run(10).unwrap(), "ten records' room was given back");
    assert!(!program.run(1).unwrap());
    assert_eq!(reader.drain(usize::MAX, |_| {}).unwrap().records, 255);
}

#[test]
fn a_forced_wakeup_ends_the_wait() {
    if !bpf::available() {
        return;
    }
    let map = bpf::ring(DATA_BYTES).unwrap();
    let loud = Program::load(map.as_fd(), 8, 1, Then::Submit, FORCE_WAKEUP).unwrap();
    let mut reader = Reader::from_bpf_map(map.as_fd(), DATA_BYTES, RECORD_BYTES_MAX).unwrap();
    let mut poller = Poller::new().unwrap();
    poller.add(map.as_fd(), 5).unwrap();
    assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), []);
    loud.run(1).unwrap();
    assert_eq!(poller.wait(Some(Duration::from_secs(10))).unwrap(), [5]);
    reader.drain(1, |_| {}).unwrap();
    assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), []);
    poller.remove(map.as_fd()).unwrap();
}

#[test]
fn a_map_of_another_size_or_kind_is_an_error() {
    if !bpf::available() {
        return;
    }
    let ring = bpf::ring(DATA_BYTES).unwrap();
    assert!(matches!(Reader::from_bpf_map(ring.as_fd(), 2 * DATA_BYTES, RECORD_BYTES_MAX), Err(Error::System { .. })));
    assert!(matches!(Reader::from_bpf_map(ring.as_fd(), 5000, RECORD_BYTES_MAX), Err(Error::DataSize { .. })));
    let array = bpf::array(4).unwrap();
    assert!(matches!(Reader::from_bpf_map(array.as_fd(), DATA_BYTES, RECORD_BYTES_MAX), Err(Error::System { .. })));
    assert!(matches!(CounterArray::map(array.as_fd(), 4096), Err(Error::System { .. })));
    assert!(matches!(WakeupFlag::map_at(array.as_fd(), 2), Err(Error::System { .. })));
}

#[test]
fn counters_and_the_wakeup_flag_share_memory_with_the_kernel() {
    if !bpf::available() {
        return;
    }
    let map = bpf::array(600).unwrap();
    let counters = CounterArray::map(map.as_fd(), 600).unwrap();
    for index in [0, 1, 599] {
        bpf::update(map.as_fd(), index, u64::MAX - u64::from(index)).unwrap();
        assert_eq!(counters.get(index as usize), u64::MAX - u64::from(index));
    }
    assert_eq!(counters.len(), 600);
    let flag = WakeupFlag::map_at(map.as_fd(), 16).unwrap();
    flag.set(true);
    assert_eq!(bpf::lookup(map.as_fd(), 2).unwrap().to_ne_bytes(), [1, 0, 0, 0, 0, 0, 0, 0]);
    flag.set(false);
    assert_eq!(bpf::lookup(map.as_fd(), 2).unwrap(), 0);
}
