//! The equations of the books, with frames as a collector would send them.

use super::*;
use crate::archive::snapshot::{Note, decode, encode_books};
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Detail, Event, Lane};
use tapio_wire::frame::{Encoder, Stamp};

const NODE: u64 = 77;
const EBPF: usize = Source::Ebpf as usize;

/// Records a frame of `events` events and the given ledger.
fn record(books: &mut Books, epoch: u64, seq: u64, events: usize, is_final: bool, ledger: &Ledger) -> Recorded {
    record_of(books, NODE, epoch, seq, events, is_final, ledger)
}

fn record_of(
    books: &mut Books,
    node: u64,
    epoch: u64,
    seq: u64,
    events: usize,
    is_final: bool,
    ledger: &Ledger,
) -> Recorded {
    let event = Event { time_ns: seq, entity: 1, pid: 1, source: Source::Ebpf, body: Detail::RunQueue { wait_ns: 1 } };
    let body = Body { events: vec![event; events], ..Body::default() };
    let sealed = Encoder::default().seal(&body, Lane::Bulk, Compression::None).expect("it fits");
    let stamp = Stamp { node, epoch, seq, boottime_ns: seq, realtime_ns: seq, is_final };
    let bytes = sealed.stamp(&stamp, ledger);
    let (header, _) = Header::check(&bytes).expect("as encoded");
    books.record(&header, &bytes)
}

fn ledger(emitted: u64, shipped: u64, inherited: u64, dropped: u64) -> Ledger {
    let mut ledger = Ledger::default();
    let account = ledger.account_mut(Source::Ebpf);
    account.emitted = emitted;
    account.shipped = shipped;
    account.inherited = inherited;
    account.drop_events(Stage::Ring, Reason::Full, dropped);
    ledger
}

fn balance_of(books: &Books, epoch: u64) -> (EpochState, Balance) {
    let (state, mut balances) = books.balances(NODE, epoch).expect("the epoch is known");
    (state, std::mem::take(&mut balances[EBPF]))
}

fn killed(balance: &Balance) -> u64 {
    balance.dropped[Stage::Collector as usize][Reason::Killed as usize]
}

/// emitted = archived + dropped + held + unexplained
fn closes(balance: &Balance) -> bool {
    let dropped: u64 = balance.dropped.iter().flatten().sum();
    i128::from(balance.emitted)
        == i128::from(balance.archived)
            + i128::from(dropped)
            + i128::from(balance.held)
            + i128::from(balance.unexplained)
}

#[test]
fn an_open_epoch_holds_what_it_has_not_shipped() {
    let mut books = Books::default();
    record(&mut books, 1, 1, 10, false, &ledger(20, 10, 0, 3));
    let (state, balance) = balance_of(&books, 1);
    assert_eq!((state, balance.held, balance.unexplained), (EpochState::Open, 7, 0));
    assert!(closes(&balance));
}

#[test]
fn a_missing_frame_is_unexplained() {
    let mut books = Books::default();
    record(&mut books, 1, 1, 10, false, &ledger(10, 10, 0, 0));
    let recorded = record(&mut books, 1, 3, 10, false, &ledger(30, 30, 0, 0));
    assert_eq!(recorded, Recorded::New { missing: 1 });
    assert_eq!(balance_of(&books, 1).1.unexplained, 10);
    assert_eq!(books.unexplained_total(), 10);
    assert_eq!(books.epoch(NODE, 1).map(|epoch| epoch.missing_frames), Some(1));
}

#[test]
fn a_duplicate_counts_nothing() {
    let mut books = Books::default();
    record(&mut books, 1, 1, 10, false, &ledger(10, 10, 0, 0));
    let again = record(&mut books, 1, 1, 10, false, &ledger(10, 10, 0, 0));
    assert_eq!(again, Recorded::Duplicate);
    assert_eq!(balance_of(&books, 1).1.archived, 10);
    assert_eq!(books.totals().duplicates, 1);
}

#[test]
fn more_shipped_and_dropped_than_emitted_is_unexplained() {
    let mut books = Books::default();
    record(&mut books, 1, 1, 10, false, &ledger(8, 10, 0, 0));
    let (_, balance) = balance_of(&books, 1);
    assert_eq!((balance.held, balance.unexplained), (0, -2));
    assert!(closes(&balance));
}

#[test]
fn what_a_closed_epoch_still_holds_is_unexplained() {
    let mut books = Books::default();
    record(&mut books, 1, 1, 10, true, &ledger(14, 10, 0, 1));
    let (state, balance) = balance_of(&books, 1);
    assert_eq!((state, balance.held, balance.unexplained), (EpochState::Closed, 0, 3));
    assert!(closes(&balance));
}

#[test]
fn what_a_killed_epoch_held_is_dropped() {
    let mut books = Books::default();
    record(&mut books, 1, 1, 10, false, &ledger(15, 10, 0, 1));
    record(&mut books, 2, 1, 1, false, &ledger(1, 1, 0, 0));
    let (state, balance) = balance_of(&books, 1);
    assert_eq!(state, EpochState::Killed);
    assert_eq!((killed(&balance), balance.held, balance.unexplained), (4, 0, 0));
    assert!(closes(&balance));
    assert!(books.losses().contains(&(Source::Ebpf, Stage::Collector, Reason::Killed, 4)));
}

#[test]
fn a_killed_epochs_loss_is_exact_if_its_rings_survived() {
    let mut books = Books::default();
    // 100 were consumed before; this epoch shipped 10, dropped 1 and held 4 when its last frame left. Its successor
    // finds 118 consumed: 7 were lost.
    record(&mut books, 1, 1, 10, false, &ledger(15, 10, 100, 1));
    record(&mut books, 2, 1, 1, false, &ledger(1, 1, 118, 0));
    let (_, balance) = balance_of(&books, 1);
    assert_eq!((killed(&balance), balance.emitted, balance.unexplained), (7, 18, 0));
    assert!(closes(&balance));
    assert_eq!(books.unexplained_total(), 0);
}

#[test]
fn a_killed_epoch_whose_ring_is_gone_lost_all_held() {
    let mut books = Books::default();
    record(&mut books, 1, 1, 10, false, &ledger(15, 10, 100, 1));
    record(&mut books, 2, 1, 1, false, &ledger(1, 1, 105, 0));
    let (_, balance) = balance_of(&books, 1);
    assert_eq!((killed(&balance), balance.unexplained), (4, 0));
    assert!(closes(&balance));
}

#[test]
fn an_epoch_that_never_saw_the_rings_is_looked_past() {
    let mut books = Books::default();
    record(&mut books, 1, 1, 10, false, &ledger(15, 10, 100, 1));
    record(&mut books, 2, 1, 0, false, &ledger(0, 0, 0, 0));
    record(&mut books, 3, 1, 1, false, &ledger(1, 1, 118, 0));
    assert_eq!(killed(&balance_of(&books, 1).1), 7);
    let (_, between) = balance_of(&books, 2);
    assert_eq!((killed(&between), between.emitted, between.unexplained), (0, 0, 0));
    assert_eq!(books.unexplained_total(), 0);
}

#[test]
fn counters_at_their_limits_overflow_nothing() {
    let mut books = Books::default();
    let mut hostile = ledger(u64::MAX, u64::MAX, u64::MAX, u64::MAX);
    hostile.account_mut(Source::Ebpf).drop_events(Stage::Queue, Reason::Full, u64::MAX);
    record(&mut books, 1, 1, 1, false, &hostile);
    record(&mut books, 2, 1, 1, false, &hostile);
    record(&mut books, 3, u64::MAX, 1, true, &hostile);
    let _ = books.unexplained_total();
    let _ = books.losses();
    assert_eq!(books.status(|_| true)[0].epochs.len(), 3);
}

#[test]
fn epochs_beyond_the_bound_keep_counting_in_the_totals() {
    let mut books = Books::default();
    for epoch in 1..=20 {
        record(&mut books, epoch, 1, 10, false, &ledger(15, 10, 0, 1));
    }
    assert_eq!(books.nodes().next().map(|(_, node)| node.epochs.len()), Some(EPOCHS_MAX));
    // All but the last were killed with 4 held.
    let losses = books.losses();
    assert!(losses.contains(&(Source::Ebpf, Stage::Collector, Reason::Killed, 19 * 4)));
    assert!(losses.contains(&(Source::Ebpf, Stage::Ring, Reason::Full, 20)));
    assert_eq!(books.totals().events, 200);
    // 13 to 20 are listed; what came before them did count.
    for (epoch, seq, counts) in [(20, 1, true), (20, 2, false), (13, 1, true), (12, 9, true), (21, 1, false)] {
        assert_eq!(books.counts(NODE, epoch, seq), counts, "frame {seq} of epoch {epoch}");
    }
    assert!(!books.counts(NODE + 1, 1, 1));
}

#[test]
fn nodes_beyond_the_bound_make_room() {
    let mut books = Books::default();
    record(&mut books, 1, 1, 1, false, &ledger(1, 1, 0, 0));
    let template = books.nodes[&NODE].clone();
    for node in 0..NODES_MAX as u64 - 1 {
        let mut books_of_node = template.clone();
        books_of_node.epochs[0].realtime_ns = 10 + node;
        books.nodes.insert(1000 + node, books_of_node);
    }
    assert_eq!(books.nodes.len(), NODES_MAX);
    record_of(&mut books, 5, 1, 9, 1, false, &ledger(1, 1, 0, 0));
    assert_eq!(books.nodes.len(), NODES_MAX - NODES_EVICTED + 1);
    assert_eq!(books.newest_epoch(NODE), None, "the most silent node goes first");
    assert_eq!(books.newest_epoch(5), Some(1));
}

#[test]
fn a_snapshot_reads_back_as_the_same_books() {
    let mut books = Books::default();
    for epoch in 1..=12 {
        record(&mut books, epoch, 1, 10, epoch % 3 == 0, &ledger(15, 10, epoch, 1));
    }
    record_of(&mut books, 5, 1, 1, 2, true, &ledger(2, 2, 0, 0));
    books.learn_name(5, &"node-5".into());
    books.count_quarantined(2);
    let mut bytes = Vec::new();
    encode_books(&books, &mut bytes);
    let Some(Note::Books(read)) = decode(&bytes) else {
        panic!("the snapshot is not read");
    };
    assert_eq!(*read, books);
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert_eq!(decode(&damaged), None, "damage at {at}");
        assert_eq!(decode(&bytes[..at]), (at == 0).then_some(Note::Mark), "cut at {at}");
    }
}
