//! A small ring of a local process costs its collector no more looks than a large one, since its writer wakes the
//! collector when it fills. Nothing is lost by that.

use std::fs;

use crate::lab::FedNode;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions};

const EVENTS_PER_SECOND: f64 = 2000.0;
const EVENTS: u64 = 4000;
/// A third of a second's records.
const RING_BYTES: usize = 64 << 10;

/// How often the thread that reads rings has slept.
fn naps(collector: u32) -> u64 {
    let threads =
        fs::read_dir(format!("/proc/{collector}/task")).expect("threads").filter_map(|entry| Some(entry.ok()?.path()));
    let name = |thread: &std::path::PathBuf| fs::read_to_string(thread.join("comm")).unwrap_or_default();
    let reader = threads.into_iter().find(|thread| name(thread).trim() == "shm").expect("a thread that reads rings");
    let status = fs::read_to_string(reader.join("status")).expect("its status");
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.expect("a count").trim().parse().expect("a number")
}

#[test]
fn a_small_ring_loses_nothing() {
    let _turn = crate::lab::alone();
    let server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let options =
        CollectorOptions { node: "small-ring".into(), server: server.address(), ..CollectorOptions::default() };
    let collector = Collector::start(&options).unwrap_or_else(|error| panic!("{error}"));
    let node = FedNode::feed_by(collector, EVENTS_PER_SECOND, RING_BYTES);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, EVENTS / 4);
    let (collector, before) = (node.collector.pid().expect("it runs"), archived);
    let napped = naps(collector);
    node.wait_for_progress(&server, &mut archived, EVENTS);
    let (napped, events) = (naps(collector) - napped, archived - before);
    // A ring of this size that its writer does not watch over is looked at every millisecond.
    assert!(napped < events / 10, "{napped} naps for {events} events");
    let (ledger, _) = node.finish(&server);
    assert_eq!((ledger.dropped, ledger.archived), (0, ledger.emitted), "{ledger}");
}
