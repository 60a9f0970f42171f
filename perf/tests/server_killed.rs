//! A server that is killed under load loses nothing that it acknowledged, and the ledger closes exactly.
//!
//! FAULTS asks for 50 kills: `TAPIO_KILLS=50 cargo test -p tapio-perf --test perf server_killed`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::lab::FedNode;
use tapio_perf::client::Client;
use tapio_perf::clock::pause;
use tapio_perf::load::generator::Pace;
use tapio_perf::load::{self, LoadOptions};
use tapio_perf::processes::{Server, ServerOptions};
use tapio_wire::service::Finding;

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

/// What is found does not hang on when the server began to read, nor on what it had found before.
#[test]
fn a_server_started_again_has_the_same_findings() {
    let _turn = crate::lab::alone();
    let mut server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    load::run(&LoadOptions {
        server: Some(server.address()),
        nodes: 2,
        pace: Pace::PerSecond(1_000.0),
        clues: Some(60.0),
        duration: Duration::from_secs(8),
        entities: 20,
        ring_bytes: 8 << 20,
        seed: 1,
        ..LoadOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let before = settled_findings(&server);
    assert!(before.len() > 40 && before.values().any(|finding| finding.count > 2), "{} findings", before.len());
    for _ in 0..2 {
        server.kill();
        server.restart().unwrap_or_else(|error| panic!("{error}"));
        let after = settled_findings(&server);
        let lost: Vec<_> = before.iter().filter(|(id, finding)| after.get(*id) != Some(*finding)).collect();
        let new: Vec<_> = after.iter().filter(|(id, _)| !before.contains_key(*id)).collect();
        assert!(lost.is_empty() && new.is_empty(), "lost or changed {lost:#?}\nnew {new:#?}");
    }
    server.stop().expect("the server ends");
}

/// The findings by id, when nothing changes any more: a large one is published within two seconds of its last death.
fn settled_findings(server: &Server) -> BTreeMap<String, Finding> {
    let mut client = Client::connect(&server.address()).unwrap_or_else(|error| panic!("{error}"));
    let mut ask = || {
        let found = client.all_findings().unwrap_or_else(|error| panic!("{error}"));
        let plain = |finding: Finding| Finding { revision: 0, published_ns: 0, ..finding };
        found.into_iter().map(|finding| (finding.id.clone(), plain(finding))).collect::<BTreeMap<_, _>>()
    };
    let (mut last, mut since) = (ask(), Instant::now());
    while since.elapsed() < Duration::from_secs(3) {
        pause(Duration::from_millis(200)).unwrap_or_else(|error| panic!("{error}"));
        let now = ask();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    last
}
