use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Lane};
use tapio_wire::frame::{Encoder, Frame, Stamp};
use tapio_wire::ledger::Ledger;

use super::*;
use crate::cluster::coverage::Coverage;
use crate::correlate::batch::{Covered, Point};
use crate::correlate::{ClueBus, Dropped, FrameBegun, NodeClock, NodeRef};

fn point(seq: u64) -> Point {
    Point { seq, boottime_ns: seq, realtime_ns: seq, dropped: Dropped { events: 0, bulk: 0 } }
}

/// A frame without events goes to the shards.
fn begin(outgoing: &Outgoing, node: &NodeRef, seq: u64) {
    let sealed = Encoder::default().seal(&Body::default(), Lane::Bulk, Compression::Lz4).expect("an empty body fits");
    let stamp = Stamp { node: node.id, epoch: 7, seq, is_final: false, realtime_ns: seq, boottime_ns: seq };
    let frame = Frame::decode(&sealed.stamp(&stamp, &Ledger::default())).expect("a frame");
    outgoing.began(&FrameBegun { node, frame: &frame, described: Vec::new(), lost: None });
}

#[test]
fn the_reach_of_frames_is_sent_after_their_entries() {
    let node = NodeRef::named("n");
    let entries_of = |seq| {
        let clock = NodeClock { node: node.clone(), epoch: 1, boottime_ns: seq, realtime_ns: seq };
        let covered = Covered { node: node.clone(), epoch: 1, from: point(seq), to: point(seq), is_final: false };
        vec![Entry::Clock(clock), Entry::Covered(covered)]
    };
    let (finder, _messages) = InProcessBus::bounded(1);
    let (outgoing, link) = (Arc::new(Outgoing::new(10)), Arc::default());
    let (config, keep) = (ClusterSection::default(), Duration::from_secs(60));
    let mut publisher = Publisher::new(&config, keep, String::new(), outgoing, finder, link);
    (1..=3).for_each(|seq| publisher.say(entries_of(seq)));
    drop(publisher.take_off(None));
    let kind = |waiting: &Waiting| match Batch::decode(&waiting.payload).expect("as it was written").entries[..] {
        [Entry::Covered(_)] => ("reach", waiting.closes),
        [Entry::Clock(_)] => ("clock", waiting.closes),
        _ => ("mixed", waiting.closes),
    };
    let order: Vec<_> = publisher.waiting.iter().map(kind).collect();
    let (clock, reach) = (("clock", false), ("reach", true));
    assert_eq!(order, [clock, clock, clock, reach, reach, reach]);
}

/// The frames that entries speak of, from and to.
fn reach(entries: &[Entry]) -> Vec<(u64, u64)> {
    let of = |entry: &Entry| match entry {
        Entry::Covered(covered) => Some((covered.from.seq, covered.to.seq)),
        _ => None,
    };
    entries.iter().filter_map(of).collect()
}

/// Another server has its earlier frames, and may have said nothing of them yet.
#[test]
fn from_where_a_stream_is_seen_is_said_first() {
    let (finder, _messages) = InProcessBus::bounded(1);
    let (outgoing, link) = (Arc::new(Outgoing::new(10)), Arc::default());
    let (config, keep) = (ClusterSection::default(), Duration::from_secs(60));
    let mut publisher = Publisher::new(&config, keep, String::new(), Arc::clone(&outgoing), finder, link);
    let node = NodeRef::named("n");
    begin(&outgoing, &node, 5);
    begin(&outgoing, &node, 6);
    publisher.gather();
    let messages: Vec<_> = publisher.waiting.iter().map(|waiting| (&waiting.payload, waiting.closes)).collect();
    let [(payload, false)] = messages[..] else { panic!("{messages:?}") };
    assert_eq!(reach(&Batch::decode(payload).expect("as it was written").entries), [(5, 4)]);
}

/// The log has taken the clues of a frame, and is another one when the frame is through the shards.
#[test]
fn after_a_loss_no_earlier_frame_counts_as_published() {
    let (finder, _messages) = InProcessBus::bounded(1);
    let (outgoing, link) = (Arc::new(Outgoing::new(10)), Arc::<Link>::default());
    let (config, keep) = (ClusterSection::default(), Duration::from_secs(60));
    let mut publisher = Publisher::new(&config, keep, String::new(), Arc::clone(&outgoing), finder, Arc::clone(&link));
    let node = NodeRef::named("n");
    (1..=3).for_each(|seq| begin(&outgoing, &node, seq));
    outgoing.done(node.id, 7, 1);
    outgoing.flush();
    publisher.gather();
    assert_eq!(publisher.waiting.iter().filter(|waiting| waiting.closes).count(), 1);
    // One waits for a message, one is in the shards.
    outgoing.done(node.id, 7, 2);
    publisher.forget_log();
    assert!(publisher.waiting.iter().all(|waiting| !waiting.closes), "it was about the log that was");
    assert!(link.is_healing() && !link.is_caught_up());
    begin(&outgoing, &node, 4);
    for seq in 3..=4 {
        outgoing.done(node.id, 7, seq);
    }
    outgoing.flush();
    assert_eq!(reach(&outgoing.take()), [(4, 3), (4, 4)], "from the fourth on, and the fourth");
    // The archive owes the others, up to the last one that was under way.
    let mut known = Coverage::default();
    let upto = |seq| Covered { node: node.clone(), epoch: 7, from: point(1), to: point(seq), is_final: false };
    known.take("a", &upto(2));
    assert!(outgoing.owes(&known));
    known.take("a", &upto(3));
    assert!(!outgoing.owes(&known));
}
