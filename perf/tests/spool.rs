//! A collector with a spool outlives its server, and what it spooled outlives the collector.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::lab::FedNode;
use tapio_perf::clock::wait_for;
use tapio_perf::load::ledger::NodeLedger;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions, http};

pub const LIMIT: Duration = Duration::from_secs(60);
pub const MIB: u64 = 1 << 20;

pub fn options(name: &str, server: &Server, dir: &Path, max_bytes: u64) -> CollectorOptions {
    CollectorOptions {
        node: name.into(),
        server: server.address(),
        // Without compression the spool fills within seconds.
        extra_grpc: format!(", compression: none, spool: {{dir: {}, max_bytes: {max_bytes}}}", dir.display()),
        ..CollectorOptions::default()
    }
}

pub fn start(options: &CollectorOptions) -> Collector {
    let collector = Collector::prepare(options).expect("prepared");
    // A small memory, so that the outbox runs short early.
    let text = fs::read_to_string(collector.config_path()).expect("readable");
    fs::write(collector.config_path(), text.replace("max_memory_mb: 256", "max_memory_mb: 48")).expect("written");
    let mut collector = collector;
    collector.restart().unwrap_or_else(|error| panic!("{error}"));
    collector
}

pub fn on_disk(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).expect("a folder").filter_map(|entry| entry.ok()?.metadata().ok());
    entries.map(|metadata| metadata.len()).sum()
}

pub fn wait_for_spool(node: &FedNode, dir: &Path, bytes: u64) {
    wait_for("the spool to grow", LIMIT, |seen| {
        let now = on_disk(dir);
        *seen = format!("{now} bytes");
        Ok((now >= bytes).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", node.collector.output()));
}

fn ledger(server: &Server, name: &str, emitted: u64) -> NodeLedger {
    let status = server.client().and_then(|mut client| client.status()).unwrap_or_else(|error| panic!("{error}"));
    NodeLedger::new(name, emitted, &status)
}

#[test]
fn a_killed_collectors_spool_arrives_first() {
    let _turn = crate::lab::beside();
    let dir = tempfile::tempdir().expect("a folder");
    let mut server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let name = "spool-killed";
    let mut node = FedNode::feed(start(&options(name, &server, dir.path(), 512 * MIB)), 60_000.0);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 10_000);
    server.kill();
    wait_for_spool(&node, dir.path(), 16 * MIB);
    // It cannot be ready without a server, but it collects.
    node.collector.kill();
    let spooled = on_disk(dir.path());
    server.restart().unwrap_or_else(|error| panic!("{error}"));
    archived = node.archived(&server);
    node.collector.restart().unwrap_or_else(|error| panic!("{error}"));
    node.publish();
    // At 100 bytes an event and less, this much was on disk.
    node.wait_for_progress(&server, &mut archived, spooled / 110);
    let (ledger, mut states) = node.finish(&server);
    states.sort();
    assert_eq!(states, ["closed", "killed"], "{ledger}");
    let losses: Vec<_> = ledger.losses.keys().collect();
    assert!(losses.iter().all(|loss| *loss == "collector/killed" || *loss == "ring/full"), "{ledger}");
    assert_eq!(on_disk(dir.path()), 0, "all of it is acknowledged");
}

#[test]
fn a_stopped_collector_leaves_the_rest_in_the_spool() {
    let _turn = crate::lab::beside();
    let dir = tempfile::tempdir().expect("a folder");
    let mut server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let name = "spool-ended";
    let mut node = FedNode::feed(start(&options(name, &server, dir.path(), 512 * MIB)), 20_000.0);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 10_000);
    server.kill();
    wait_for_spool(&node, dir.path(), 8 * MIB);
    let emitted = node.stop_feeding();
    let start = Instant::now();
    let status = node.collector.stop().expect("it ends").expect("it ran");
    assert!(status.success() && start.elapsed() < Duration::from_secs(25), "{status}: {}", node.collector.output());
    server.restart().unwrap_or_else(|error| panic!("{error}"));
    node.collector.restart().unwrap_or_else(|error| panic!("{error}"));
    wait_for("the ledger's closing", LIMIT, |seen| {
        let ledger = ledger(&server, name, emitted);
        *seen = ledger.to_string();
        Ok((ledger.closes() && ledger.dropped == 0).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", node.collector.output()));
    wait_for("the spool to be empty", LIMIT, |_| Ok((on_disk(dir.path()) == 0).then_some(())))
        .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_full_spool_and_memory_keep_their_bounds() {
    let _turn = crate::lab::beside();
    let dir = tempfile::tempdir().expect("a folder");
    let mut server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let name = "spool-full";
    let bound = 32 * MIB;
    let node = FedNode::feed(start(&options(name, &server, dir.path(), bound)), 150_000.0);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 10_000);
    server.kill();
    // Losses in the ring are what shedding bulk looks like when spool and memory are full.
    wait_for("bulk to be shed", LIMIT, |seen| {
        let (_, text) = http::get(node.collector.port(), "/metrics")?;
        let shed: f64 = text
            .lines()
            .filter(|line| line.starts_with("tapio_collector_events_dropped_total{"))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum();
        assert!(on_disk(dir.path()) <= bound);
        *seen = format!("{shed} events shed, {} bytes on disk", on_disk(dir.path()));
        Ok((shed > 1000.0).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", node.collector.output()));
    let resident = node.collector.usage().expect("it runs").rss_bytes;
    assert!(resident <= 48 * MIB, "{resident} bytes resident");
    assert!(on_disk(dir.path()) > bound * 3 / 4);
    server.restart().unwrap_or_else(|error| panic!("{error}"));
    let mut archived = node.archived(&server);
    node.wait_for_progress(&server, &mut archived, 200_000);
    let (ledger, _) = node.finish(&server);
    assert!(ledger.dropped > 0 && !ledger.losses.contains_key("collector/killed"), "{ledger}");
}
