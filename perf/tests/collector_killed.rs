//! A collector that is killed under load loses what it held; how much, is known exactly once the next one has taken over.

use crate::lab::FedNode;
use tapio_perf::processes::{Server, ServerOptions};

const KILLS: usize = 4;
const EVENTS_PER_SECOND: f64 = 20_000.0;

#[test]
fn the_ledger_closes_over_collectors_that_are_killed() {
    let _turn = crate::lab::beside();
    let server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let mut node = FedNode::start("kill-collector", &server.address(), EVENTS_PER_SECOND);
    let mut archived = 0;
    for _ in 0..KILLS {
        node.wait_for_progress(&server, &mut archived, 5_000);
        node.replace_collector();
    }
    node.wait_for_progress(&server, &mut archived, 5_000);
    // `finish` insists on emitted = archived + dropped, by the generator's own count.
    let (ledger, mut states) = node.finish(&server);
    for loss in ledger.losses.keys() {
        assert_eq!(loss, "collector/killed", "{ledger}");
    }
    states.sort();
    let mut expected = vec!["killed"; KILLS];
    expected.insert(0, "closed");
    assert_eq!(states, expected, "{ledger}");
}
