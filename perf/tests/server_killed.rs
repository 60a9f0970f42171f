//! A server that is killed under load loses nothing that it acknowledged, and the ledger closes exactly.
//!
//! FAULTS asks for 50 kills: `TAPIO_KILLS=50 cargo test -p tapio-perf --test perf server_killed`.

use crate::lab::FedNode;
use tapio_perf::processes::{Server, ServerOptions};

/// Unless `TAPIO_KILLS` says otherwise.
const KILLS: u64 = 6;
const EVENTS_PER_SECOND: f64 = 20_000.0;

#[test]
fn the_ledger_closes_over_repeated_server_kills() {
    let _turn = crate::lab::alone();
    let kills = std::env::var("TAPIO_KILLS").map_or(KILLS, |kills| kills.parse().expect("TAPIO_KILLS is a number"));
    let mut server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let node = FedNode::start("kill-server", &server.address(), EVENTS_PER_SECOND);
    let mut archived = 0;
    for _ in 0..kills {
        // At another point of the group commit each time: the condition is in events, the clock is not.
        node.wait_for_progress(&server, &mut archived, 5_000);
        server.kill();
        server.restart().unwrap_or_else(|error| panic!("{error}"));
        let after = node.archived(&server);
        assert!(after >= archived, "{archived} events were durable, {after} are left");
    }
    node.wait_for_progress(&server, &mut archived, 5_000);
    let (ledger, states) = node.finish(&server);
    assert!(ledger.archived > kills * 5_000, "{ledger}");
    assert_eq!(ledger.dropped, 0, "short outages fit into ring and outbox: {ledger}");
    assert_eq!(states, ["closed"], "one run of one collector");
    eprintln!("{kills} kills: {ledger}");
    let status = server.stop().expect("the server ends");
    assert!(status.is_some_and(|status| status.success()), "{}", server.output());
}
