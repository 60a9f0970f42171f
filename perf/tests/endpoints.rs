//! A collector with two servers: one of them is its own, the other stands in.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::lab::Need::{Bpf, Cgroups};
use crate::lab::{self, FedNode, PERF};
use rustix::process::Signal;
use serde_json::Value;
use tapio_perf::client::FindingWatch;
use tapio_perf::clock::wait_for;
use tapio_perf::inject::container::{Pod, Running, Sender};
use tapio_perf::inject::victim::{Act, Role};
use tapio_perf::load::ledger::NodeLedger;
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions, http};
use tapio_perf::random::Random;

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

fn start_server() -> Server {
    Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// A collector with the two servers as its own.
fn collector_of(servers: &[Server; 2], options: CollectorOptions) -> Collector {
    Collector::start(&CollectorOptions {
        server: format!("{}\", \"{}", servers[0].address(), servers[1].address()),
        extra_grpc: ", resolve_interval: 500ms".into(),
        ..options
    })
    .unwrap_or_else(|error| panic!("{error}"))
}

/// The server that the collector ships to, and the other one.
fn by_preference([first, second]: [Server; 2], collector: &Collector) -> (Server, Server) {
    if present_server(collector) == first.address() { (first, second) } else { (second, first) }
}

#[test]
fn a_collector_leaves_a_dead_server_and_loses_nothing() {
    let _turn = lab::beside();
    let servers = [0, 1].map(|_| start_server());
    let collector = collector_of(&servers, CollectorOptions { node: "two-servers".into(), ..Default::default() });
    let (mut own, other) = by_preference(servers, &collector);
    let mut node = FedNode::feed(collector, 2_000.0);
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

/// The first server knew the container, the second one gets only its death. Its cgroup is gone when that stream begins.
#[test]
fn the_next_server_names_who_died_meanwhile() {
    if !lab::can_run("the_next_server_names_who_died_meanwhile", &[Cgroups, Bpf]) {
        return;
    }
    let _turn = lab::alone();
    let servers = [0, 1].map(|_| start_server());
    let options = CollectorOptions { node: "two-servers".into(), feed: Feed::Ebpf, ..Default::default() };
    let collector = collector_of(&servers, options);
    let (mut own, other) = by_preference(servers, &collector);
    let mut watch = FindingWatch::start(&other.address()).expect("findings can be watched");

    let mut random = Random::new(u64::from(std::process::id()));
    let pod = Pod::create(&mut random, None).unwrap_or_else(|error| panic!("{error}"));
    let container = pod.container(&mut random).unwrap_or_else(|error| panic!("{error}"));
    let name = container.name().clone();
    let act = Act { role: Role::Wait, limit_bytes: 0, program: None };
    let running = Running::start(Path::new(PERF), &container, &act).unwrap_or_else(|error| panic!("{error}"));
    wait_for("the container's events at its first server", FAILOVER_LIMIT, |seen| {
        let mut command = Command::new(lab::program("tapioctl"));
        command.args(["--server", &own.address(), "events", "--pod", &name.pod_uid, "--json"]);
        let output = command.output().expect("tapioctl starts");
        *seen = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((!output.stdout.is_empty()).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", collector.output()));

    own.process().expect("it runs").signal(Signal::STOP);
    let sender = Sender::start(Path::new(PERF), running.init_pid(), Signal::KILL).expect("it sends");
    drop(running);
    drop((sender, container, pod));
    own.kill();
    wait_for_server(&collector, &other, FAILOVER_LIMIT);
    let is_of_it = |finding: &tapio_wire::service::Finding| {
        finding.entity.as_ref().is_some_and(|entity| entity.container_id == name.container_id)
    };
    let found = watch.wait(FAILOVER_LIMIT, is_of_it).expect("the stream of findings lasts");
    let seen: Vec<String> = watch.seen().iter().map(|arrival| arrival.finding.title.clone()).collect();
    let finding = found.unwrap_or_else(|| panic!("not found; seen: {seen:?}\n{}", collector.output())).finding;
    assert_eq!(finding.death.as_ref().and_then(|death| death.signal), Some(9), "{finding:?}");
}
