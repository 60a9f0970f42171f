//! Streams that the server asks to move on, over the real binaries: nothing is lost, nothing comes twice.

use std::time::Duration;

use crate::lab::{FedNode, metric};
use tapio_perf::clock::wait_for;
use tapio_perf::processes::{Server, ServerOptions};

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_collector_moves_and_packs_as_the_server_asks() {
    let _turn = crate::lab::beside();
    let options = ServerOptions {
        extra_server: ", max_connection_age: 1s, max_batch_size: 50".into(),
        ..ServerOptions::default()
    };
    let server = Server::start(&options).unwrap_or_else(|error| panic!("{error}"));
    let node = FedNode::start("mover", &server.address(), 20_000.0);
    let port = node.collector.port();
    wait_for("three moves", LIMIT, |seen| {
        let streams = metric(port, "tapio_collector_streams_total");
        *seen = format!("{streams} streams");
        Ok((streams >= 4.0).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", node.collector.output()));
    assert!(metric(server.http_port(), "tapio_server_ingest_moved_on_total") >= 3.0);
    assert_eq!(metric(port, "tapio_collector_stream_failures_total"), 0.0, "{}", node.collector.output());
    let (ledger, _) = node.finish(&server);
    assert!(ledger.closes(), "{ledger}");
    let of = |name: &str| metric(server.http_port(), name);
    assert_eq!(of("tapio_server_ingest_duplicates_total"), 0.0, "what was in flight was waited for");
    assert_eq!(of("tapio_ledger_unexplained_events"), 0.0);
    let mean = of("tapio_server_ingest_events_total") / of("tapio_server_ingest_frames_total");
    // The first ones were packed before the server had said so.
    assert!(mean <= 55.0, "{mean} events a frame");
}
