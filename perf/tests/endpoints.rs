//! A collector with two servers: one of them is its own, the other stands in.

use std::time::{Duration, Instant};

use crate::lab::FedNode;
use rustix::process::Signal;
use serde_json::Value;
use tapio_perf::clock::wait_for;
use tapio_perf::load::ledger::NodeLedger;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions, http};

/// A dead peer is noticed within 20 s; the rest is this machine's.
const FAILOVER_LIMIT: Duration = Duration::from_secs(20);

fn present_server(collector: &Collector) -> String {
    let (_, body) = http::get(collector.port(), "/readyz").expect("it answers");
    let ready: Value = serde_json::from_str(&body).expect("JSON");
    if ready["connected"] == true { ready["server"].as_str().unwrap_or_default().to_owned() } else { String::new() }
}

fn wait_for_server(collector: &Collector, wanted: &Server, limit: Duration) {
    wait_for("the stream to the other server", limit, |seen| {
        *seen = present_server(collector);
        Ok((*seen == wanted.address()).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", collector.output()));
}

#[test]
fn a_collector_leaves_a_dead_server_and_loses_nothing() {
    let _turn = crate::lab::beside();
    let servers = [0, 1].map(|_| Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}")));
    let collector = Collector::start(&CollectorOptions {
        node: "two-servers".into(),
        server: format!("{}\", \"{}", servers[0].address(), servers[1].address()),
        extra_grpc: ", resolve_interval: 500ms".into(),
        ..CollectorOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let preferred = present_server(&collector);
    let mut node = FedNode::feed(collector, 2_000.0);
    let [first, second] = servers;
    let (mut own, other) = if preferred == first.address() { (first, second) } else { (second, first) };
    let mut archived = 0;
    node.wait_for_progress(&own, &mut archived, 1_000);

    own.process().expect("it runs").signal(Signal::STOP);
    let stopped = Instant::now();
    wait_for_server(&node.collector, &other, FAILOVER_LIMIT);
    println!("failed over after {:?}", stopped.elapsed());
    let mut archived_there = 0;
    node.wait_for_progress(&other, &mut archived_there, 1_000);

    own.process().expect("it runs").signal(Signal::CONT);
    wait_for_server(&node.collector, &own, FAILOVER_LIMIT);
    own.kill();
    wait_for_server(&node.collector, &other, FAILOVER_LIMIT);
    own.restart().unwrap_or_else(|error| panic!("{error}"));
    wait_for_server(&node.collector, &own, FAILOVER_LIMIT);
    archived = node.archived(&own);
    node.wait_for_progress(&own, &mut archived, 1_000);

    let emitted = node.stop_feeding();
    let name = node.collector.node().to_owned();
    let status = node.collector.stop().expect("it ends").expect("it ran");
    assert!(status.success(), "{}", node.collector.output());
    let ledgers = [&own, &other].map(|server| {
        let status = server.client().and_then(|mut client| client.status()).unwrap_or_else(|error| panic!("{error}"));
        NodeLedger::new(&name, 0, &status)
    });
    let archived: u64 = ledgers.iter().map(|ledger| ledger.archived).sum();
    let dropped: u64 = ledgers.iter().map(|ledger| ledger.dropped).max().unwrap_or(0);
    assert_eq!(dropped, 0, "{} {}", ledgers[0], ledgers[1]);
    for ledger in &ledgers {
        assert_eq!(ledger.server_unexplained, 0, "{ledger}");
    }
    // What a server had archived and could not acknowledge any more is with the other one too.
    assert!(archived >= emitted, "{emitted} emitted: {} {}", ledgers[0], ledgers[1]);
    assert!(archived < emitted + emitted / 4, "{emitted} emitted: {} {}", ledgers[0], ledgers[1]);
}
