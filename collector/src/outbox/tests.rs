use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Detail, Event};
use tapio_wire::frame::{Encoder, Header};

use super::*;

fn frame(lane: Lane, events: usize) -> SealedFrame {
    let detail = match lane {
        Lane::Lethal => Detail::CgroupMade { path: 0 },
        Lane::Bulk => Detail::RunQueue { wait_ns: 1 },
    };
    let event = Event { time_ns: 1, entity: 1, pid: 1, source: Source::Shm, body: detail };
    let body = Body { events: vec![event; events], ..Body::default() };
    Encoder::default().seal(&body, lane, Compression::None).expect("within the limits")
}

fn outbox(limit: usize) -> Outbox {
    let (queues, _parker) = Queues::new(4);
    Outbox::new(7, 1, limit, &Links::new(queues))
}

fn seq(bytes: &Bytes) -> u64 {
    Header::check(bytes).expect("a whole frame").0.seq
}

#[test]
fn unacknowledged_frames_are_sent_again_in_order_after_a_restart() {
    let outbox = outbox(1 << 20);
    for _ in 0..3 {
        outbox.push(frame(Lane::Bulk, 10), FrameTimes::default());
    }
    let sent: Vec<u64> = std::iter::from_fn(|| outbox.next(u64::MAX)).map(|bytes| seq(&bytes)).collect();
    assert_eq!(sent, [1, 2, 3]);
    assert_eq!(outbox.acknowledge(1, 1).len(), 1);
    outbox.restart(1, 2);
    let again: Vec<u64> = std::iter::from_fn(|| outbox.next(u64::MAX)).map(|bytes| seq(&bytes)).collect();
    assert_eq!(again, [3]);
    outbox.acknowledge(1, 3);
    assert!(outbox.is_empty());
}

#[test]
fn credit_bounds_what_is_in_flight_and_acks_free_it() {
    let outbox = outbox(1 << 20);
    for _ in 0..3 {
        outbox.push(frame(Lane::Bulk, 10), FrameTimes::default());
    }
    let first = outbox.next(1).expect("one is always allowed");
    assert!(outbox.next(first.len() as u64).is_none());
    outbox.acknowledge(1, 1);
    assert!(outbox.next(1).is_some());
}

#[test]
fn a_lethal_frame_evicts_unsent_bulk_and_counts_it() {
    let one = frame(Lane::Bulk, 100).len();
    let outbox = outbox(2 * (one + FRAME_OVERHEAD_BYTES) + 200);
    outbox.push(frame(Lane::Bulk, 100), FrameTimes::default());
    outbox.push(frame(Lane::Bulk, 100), FrameTimes::default());
    assert_eq!(outbox.open_lanes(), OpenLanes::Lethal);
    outbox.push(frame(Lane::Lethal, 5), FrameTimes::default());
    let ledger = outbox.ledger();
    assert_eq!(ledger.account(Source::Shm).dropped_total(), 100);
    let lanes: Vec<u32> = std::iter::from_fn(|| outbox.next(u64::MAX))
        .map(|bytes| Header::check(&bytes).expect("whole").0.lethal_events)
        .collect();
    assert_eq!(lanes, [5, 0], "the lethal frame does not wait behind bulk");
    outbox.acknowledge(1, 2);
    assert_eq!(outbox.usage(), (0, 0));
}

#[test]
fn a_full_outbox_that_can_evict_nothing_takes_nothing() {
    let one = frame(Lane::Lethal, 100).len();
    let outbox = outbox(one);
    outbox.push(frame(Lane::Lethal, 100), FrameTimes::default());
    assert_eq!(outbox.open_lanes(), OpenLanes::None);
}

fn with_spool(limit: usize) -> (Outbox, crossbeam::sync::Parker) {
    let parker = crossbeam::sync::Parker::new();
    (outbox(limit).with_spool(parker.unparker().clone()), parker)
}

#[test]
fn frames_stamped_during_a_write_do_not_count_as_written() {
    let (outbox, _parker) = with_spool(1 << 20);
    outbox.push(frame(Lane::Bulk, 10), FrameTimes::default());
    outbox.next(u64::MAX).expect("sent");
    outbox.flush();
    let taken = outbox.take_for_spool(1 << 20);
    assert_eq!(taken.iter().map(seq).collect::<Vec<_>>(), [1]);
    outbox.push(frame(Lane::Lethal, 1), FrameTimes::default());
    assert_eq!(outbox.next(u64::MAX).as_ref().map(seq), Some(2), "the stream goes on meanwhile");
    outbox.spooled(true);
    let taken = outbox.take_for_spool(1 << 20);
    assert_eq!(taken.iter().map(seq).collect::<Vec<_>>(), [2]);
}

#[test]
fn a_disk_that_refuses_does_not_make_bulk_unsheddable() {
    let one = frame(Lane::Bulk, 100).len() + FRAME_OVERHEAD_BYTES;
    let (outbox, _parker) = with_spool(6 * one);
    for round in 0..6 {
        outbox.push(frame(Lane::Bulk, 100), FrameTimes::default());
        // The spool's bound leaves room; the disk does not.
        let is_tried = !outbox.take_for_spool(1 << 20).is_empty();
        assert_eq!(is_tried, round >= 2, "from half of the memory on");
        if is_tried {
            outbox.spooled(false);
        }
    }
    for _ in 0..5 {
        outbox.push(frame(Lane::Lethal, 100), FrameTimes::default());
    }
    let shed = outbox.ledger().account(Source::Shm).dropped_total();
    assert_eq!(shed, 300, "all but those that were stamped for the first try");
}

#[test]
fn an_older_epoch_is_outdone_until_a_frame_was_sent() {
    let outbox = outbox(1 << 20);
    assert!(outbox.outdo_epoch(41));
    assert_eq!(outbox.epoch(), 42);
    outbox.push(frame(Lane::Bulk, 1), FrameTimes::default());
    outbox.next(u64::MAX);
    assert!(!outbox.outdo_epoch(50));
}

#[test]
fn the_last_frame_of_a_finished_outbox_is_final() {
    let outbox = outbox(1 << 20);
    outbox.books.source(Source::Shm).set_emitted(20);
    outbox.push(frame(Lane::Bulk, 10), FrameTimes::default());
    outbox.finish_with(|| frame(Lane::Bulk, 10));
    let first = Header::check(&outbox.next(u64::MAX).expect("a frame")).expect("whole");
    let last = Header::check(&outbox.next(u64::MAX).expect("a frame")).expect("whole");
    assert!(!first.0.is_final && last.0.is_final);
    assert_eq!((first.1.account(Source::Shm).held(), last.1.account(Source::Shm).held()), (10, 0));
}
