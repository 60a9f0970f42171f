use std::collections::BTreeMap;
use std::fs;

use tapio_wire::event::{Detail, Event};
use tapio_wire::frame::SealedFrame;

use super::*;
use crate::outbox::frame_times::FrameTimes;
use crate::outbox::links::Links;
use crate::outbox::queue::Queues;
use crate::settings::config::SPOOL_BYTES_MIN;

/// Makes a frame with this many events of one source.
fn frame(events: usize) -> SealedFrame {
    let event = Event { time_ns: 1, entity: 1, pid: 1, source: Source::Shm, body: Detail::RunQueue { wait_ns: 1 } };
    let body = Body { events: vec![event; events], ..Body::default() };
    Encoder::default().seal(&body, Lane::Bulk, Compression::None).expect("within the limits")
}

/// An outbox of epoch 1 and frames of 1, 2, 3 … events, of a source that has emitted 1,000 and dropped 10.
fn outbox(frames: usize) -> Outbox {
    let (queues, _parker) = Queues::new(4);
    let outbox = Outbox::new(7, 1, 1 << 20, &Links::new(queues));
    outbox.books.source(Source::Shm).set_emitted(1000);
    outbox.books.source(Source::Shm).set_dropped(Stage::Ring, Reason::Full, 10);
    for events in 1..=frames {
        outbox.push(frame(events), FrameTimes::default());
    }
    outbox
}

fn flip(bytes: &mut Bytes, at: usize) {
    let mut damaged = bytes.to_vec();
    damaged[at] ^= 1;
    *bytes = damaged.into();
}

/// What arrived, by epoch: the last sequence, how many events, and the last counters.
#[derive(Default)]
struct Arrived(BTreeMap<u64, (u64, u64, Ledger, bool)>);

impl Arrived {
    /// Takes all that an outbox sends, closing frames first, as far as it goes without `is_refused`.
    fn take(&mut self, outbox: &Outbox, is_refused: &dyn Fn(&Header) -> bool) {
        while let Some(closing) = outbox.closing() {
            self.take(&closing, is_refused);
            outbox.closing_delivered();
        }
        outbox.restart(outbox.epoch(), outbox.acknowledged().0);
        while let Some(bytes) = outbox.next(u64::MAX) {
            let (header, ledger) = Header::check(&bytes).expect("a whole frame");
            if is_refused(&header) {
                break;
            }
            let of_epoch = self.0.entry(header.epoch).or_default();
            assert_eq!(header.seq, of_epoch.0 + 1, "epoch {}", header.epoch);
            *of_epoch = (header.seq, of_epoch.1 + u64::from(header.events()), ledger, header.is_final);
            outbox.acknowledge(header.epoch, header.seq);
        }
    }

    /// Every epoch but the last is closed without a rest; returns what was dropped at the outbox, and the sums.
    fn settle(&self) -> (u64, u64, u64) {
        let (mut lost, mut archived, mut accounted) = (0, 0, 0);
        let last = self.0.keys().last();
        for (epoch, (_, events, ledger, is_final)) in &self.0 {
            let account = ledger.account(Source::Shm);
            assert_eq!(account.shipped, *events, "epoch {epoch}");
            assert_eq!(account.inherited, accounted, "epoch {epoch}");
            if Some(epoch) != last {
                assert!(*is_final && account.held() == 0, "epoch {epoch}: {account:?}");
            }
            lost += account.dropped[Stage::Outbox as usize][Reason::Malformed as usize];
            archived += events;
            accounted += account.shipped + account.dropped_total();
            assert_eq!(account.emitted, account.shipped + account.dropped_total() + account.held() as u64);
        }
        (lost, archived, accounted)
    }
}

#[test]
fn a_frame_refused_again_and_again_is_lost_alone() {
    let outbox = outbox(4);
    let mut arrived = Arrived::default();
    let refuses = |header: &Header| header.epoch == 1 && header.events() == 2;
    arrived.take(&outbox, &refuses);
    let mut refusals = 0;
    loop {
        refusals += 1;
        let is_stuck = outbox.refused(true);
        outbox.disconnected();
        if is_stuck {
            break;
        }
        assert!(refusals < REFUSALS_MAX, "it is refused for ever");
        arrived.take(&outbox, &refuses);
    }
    assert_eq!(refusals, REFUSALS_MAX);
    outbox.give_up(Cause::Refused, "said the server".into());
    assert_eq!((outbox.epoch(), outbox.is_ending()), (2, false));
    arrived.take(&outbox, &refuses);
    assert_eq!(arrived.0[&1].0, 2, "the closing frame stands in the place of the lost one");
    assert_eq!(arrived.settle(), (2, 1 + 3 + 4, 10 + 2 + 1 + 3 + 4));
    // The process as a whole counts it too, and holds the rest.
    let account = *outbox.ledger().account(Source::Shm);
    assert_eq!((account.dropped_total(), account.held()), (12, 1000 - 10 - 2 - 8));
    outbox.push(frame(5), FrameTimes::default());
    arrived.take(&outbox, &refuses);
    assert_eq!(arrived.settle().1, 13);
    assert_eq!(outbox.ended.get().map(|(_, count)| count).collect::<Vec<_>>(), [0, 1, 0]);
}

#[test]
fn refusals_count_only_when_they_blame_one_frame() {
    let outbox = outbox(3);
    outbox.restart(1, 0);
    assert!((0..3).all(|_| outbox.next(u64::MAX).is_some()));
    assert!(!outbox.refused(true), "any of the three");
    for _ in 0..3 * REFUSALS_MAX {
        outbox.disconnected();
        outbox.restart(1, 0);
        assert!(outbox.next(u64::MAX).is_some() && outbox.next(u64::MAX).is_none(), "one by one");
        assert!(!outbox.refused(false), "the server may be at fault");
    }
    for _ in 1..REFUSALS_MAX {
        assert!(!outbox.refused(true));
    }
    // Progress restarts the count.
    outbox.acknowledge(1, 1);
    assert!(outbox.next(u64::MAX).is_some());
    assert!(!outbox.refused(true));
    assert_eq!(outbox.epoch(), 1);
}

#[test]
fn a_frame_damaged_in_memory_is_found_when_refused() {
    // In the clocks, and in the payload.
    for at in [32, 200] {
        let outbox = outbox(5);
        let mut arrived = Arrived::default();
        outbox.restart(1, 0);
        assert!((0..5).all(|_| outbox.next(u64::MAX).is_some()));
        for damaged in [1, 3] {
            flip(&mut outbox.state().sent[damaged].bytes, at);
        }
        outbox.refused(false);
        outbox.disconnected();
        for epoch in 1..=2 {
            arrived.take(&outbox, &|_| false);
            let damage = outbox.damage().expect("it was checked");
            assert!(!damage.is_empty());
            outbox.give_up(Cause::Damaged, damage);
            assert_eq!(outbox.epoch(), epoch + 1);
        }
        arrived.take(&outbox, &|_| false);
        assert_eq!(arrived.settle(), (2 + 4, 1 + 3 + 5, 10 + 15), "byte {at}");
    }
}

#[test]
fn the_last_frame_of_all_may_be_the_lost_one() {
    let outbox = outbox(1);
    outbox.books.source(Source::Shm).set_emitted(10 + 1 + 2);
    outbox.finish_with(|| frame(2));
    let mut arrived = Arrived::default();
    arrived.take(&outbox, &|header| header.is_final);
    outbox.give_up(Cause::Refused, String::new());
    arrived.take(&outbox, &|_| false);
    assert!(outbox.is_done());
    assert_eq!(arrived.settle(), (2, 1, 13));
    assert!(arrived.0.len() == 1 && arrived.0[&1].3, "nothing is left for another epoch");
}

#[test]
fn an_ended_epochs_acknowledgement_does_not_count_for_the_next() {
    let outbox = outbox(3);
    outbox.restart(1, 0);
    assert!(outbox.next(u64::MAX).is_some());
    outbox.give_up(Cause::Refused, String::new());
    outbox.acknowledge(1, 3);
    outbox.restart(1, 3);
    assert_eq!(outbox.acknowledged().0, 0);
}

/// What the spool's thread does once.
fn turn(spool: &mut Spool, outbox: &Outbox) {
    outbox.end_when_due(Some(spool));
    let (epoch, seq, events) = outbox.standing();
    spool.acknowledged(epoch, seq, events);
    let frames = outbox.take_for_spool(spool.room_bytes());
    if !frames.is_empty() {
        spool.append(&frames).expect("written");
        outbox.spooled(true);
    }
    if let Some(from_seq) = outbox.wants_loaded() {
        match spool.read(outbox.epoch(), from_seq, 1) {
            Ok(frames) => outbox.loaded(frames),
            Err(error) => {
                let next = spool.next_whole(outbox.epoch(), from_seq);
                outbox.lost(from_seq, next, error.to_string());
            }
        }
    }
}

fn segment(dir: &std::path::Path) -> std::path::PathBuf {
    let mut files: Vec<_> = fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files.remove(0)
}

#[test]
fn a_damaged_frame_in_the_spool_is_lost_alone() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, _) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    let parker = crossbeam::sync::Parker::new();
    let outbox = outbox(6).with_spool(parker.unparker().clone());
    outbox.flush();
    turn(&mut spool, &outbox);
    let path = segment(dir.path());
    let mut bytes = fs::read(&path).expect("read");
    // The payload of the third frame, and that of the fifth, which ends at the sixth's record.
    let records: Vec<usize> =
        bytes.windows(4).enumerate().filter(|(_, four)| four == b"TPIO").map(|(at, _)| at).collect();
    let frames: Vec<usize> = records.into_iter().filter(|at| *at > 0).collect();
    assert_eq!(frames.len(), 6);
    for damaged in [2, 4] {
        bytes[frames[damaged] + 150] ^= 1;
    }
    fs::write(&path, bytes).expect("written");
    let mut arrived = Arrived::default();
    for round in 0..40 {
        arrived.take(&outbox, &|_| false);
        turn(&mut spool, &outbox);
        if round == 3 {
            outbox.push(frame(7), FrameTimes::default());
        }
    }
    assert_eq!(outbox.epoch(), 3);
    assert_eq!(arrived.settle(), (3 + 5, 1 + 2 + 4 + 6 + 7, 10 + 28));
    spool.forget_endings(&outbox.pending_closings());
    assert_eq!(spool.bytes(), 0);
}

#[test]
fn a_spool_with_a_damaged_end_closes_as_known() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut spool, _) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    let parker = crossbeam::sync::Parker::new();
    let first = outbox(3).with_spool(parker.unparker().clone());
    first.flush();
    turn(&mut spool, &first);
    drop(spool);
    let (mut spool, left) = Spool::open(dir.path(), SPOOL_BYTES_MIN).expect("opened");
    let (queues, _parker) = Queues::new(4);
    let links = Links::new(queues);
    let replay = Outbox::replay(&left[0], 9, 1 << 20, &links, parker.unparker().clone());
    let mut arrived = Arrived::default();
    replay.restart(1, 0);
    turn(&mut spool, &replay);
    fs::remove_file(segment(dir.path())).expect("deleted");
    for _ in 0..10 {
        arrived.take(&replay, &|_| false);
        turn(&mut spool, &replay);
    }
    assert!(replay.is_done());
    let (seq, events, ledger, is_final) = arrived.0[&1];
    let account = ledger.account(Source::Shm);
    assert_eq!((seq, events, is_final), (2, 1, false), "what it held is still the server's to declare");
    assert_eq!((account.shipped, account.held()), (1, 1000 - 10 - 6));
    assert_eq!(account.dropped[Stage::Outbox as usize][Reason::Malformed as usize], 5);
    assert_eq!(links.books.snapshot(&[0; SOURCES]), Ledger::default(), "not this run's loss");
}
