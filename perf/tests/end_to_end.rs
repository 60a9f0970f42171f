//! Real faults, seen by real probes, explained by a real server: the findings name what was done, to whom, and by whom.

use std::time::Duration;

use crate::lab::Need::{Bpf, Cgroups};
use crate::lab::{self, can_run, inject};
use serde_json::Value;
use tapio_perf::client::FindingWatch;
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions};
use tapio_wire::service::{Death, Finding};

/// How long a finding may take in these tests; its latency is measured elsewhere.
const FINDING_LIMIT: Duration = Duration::from_secs(15);

/// A server, a collector with probes, and what is published.
struct Node {
    watch: FindingWatch,
    collector: Collector,
    server: Server,
    // Released last: one test at a time has its probes in the kernel.
    _turn: lab::Alone,
}

impl Node {
    fn start() -> Self {
        let turn = lab::alone();
        let server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
        let collector = Collector::start(&CollectorOptions {
            node: "node-under-test".into(),
            server: server.address(),
            feed: Feed::Ebpf,
            ..CollectorOptions::default()
        })
        .unwrap_or_else(|error| panic!("{error}"));
        let watch = FindingWatch::start(&server.address()).expect("findings can be watched");
        Self { watch, collector, server, _turn: turn }
    }

    /// The finding that `wanted` accepts.
    fn finding(&mut self, what: &str, wanted: impl Fn(&Finding) -> bool) -> Finding {
        let found = self.watch.wait(FINDING_LIMIT, wanted);
        match found.expect("the stream of findings lasts") {
            Some(arrival) => arrival.finding,
            None => {
                let seen: Vec<String> = self.watch.seen().iter().map(brief).collect();
                panic!(
                    "no finding of {what}; seen:\n{}\ncollector:\n{}\nserver:\n{}",
                    seen.join("\n"),
                    self.collector.output(),
                    self.server.output()
                );
            }
        }
    }

    /// The finding of `pattern` about the death of an injection's victim.
    fn death(&mut self, pattern: &str, injection: &Value) -> (Finding, Death) {
        let pid = number(injection, "pid") as u32;
        let finding = self.finding(&format!("{pattern} of process {pid}"), |finding| {
            finding.pattern == pattern && finding.death.as_ref().is_some_and(|death| death.pid == pid)
        });
        assert_is_about(&finding, injection);
        let death = finding.death.clone().expect("it was looked for");
        (finding, death)
    }
}

fn brief(arrival: &tapio_perf::client::Arrival) -> String {
    let finding = &arrival.finding;
    format!("{} {:?} of {:?}: {}", finding.pattern, finding.death, finding.entity, finding.title)
}

fn number(injection: &Value, key: &str) -> u64 {
    injection[key].as_u64().unwrap_or_else(|| panic!("no {key} in {injection}"))
}

fn text<'a>(injection: &'a Value, key: &str) -> &'a str {
    injection[key].as_str().unwrap_or_else(|| panic!("no {key} in {injection}"))
}

/// The finding is about the injection's container, rests on evidence and says what to do.
fn assert_is_about(finding: &Finding, injection: &Value) {
    let entity = finding.entity.as_ref().expect("an entity");
    assert_eq!(entity.container_id, text(injection, "container_id"), "{finding:?}");
    assert_eq!(entity.pod_uid, text(injection, "pod_uid"), "{finding:?}");
    assert_eq!(entity.node, "node-under-test");
    assert!(!finding.evidence.is_empty(), "{finding:?}");
    for evidence in &finding.evidence {
        // node:epoch:seq:index
        assert_eq!(evidence.id.split(':').count(), 4, "{evidence:?}");
    }
    assert!(!finding.advice.is_empty() && !finding.title.is_empty(), "{finding:?}");
    assert_eq!(finding.loss.unwrap_or_default().events, 0, "{finding:?}");
}

#[test]
fn an_oom_kill_names_the_limit_that_was_hit() {
    if !can_run("an_oom_kill_names_the_limit_that_was_hit", &[Cgroups, Bpf]) {
        return;
    }
    let mut node = Node::start();
    let injection = inject(&["oom"]);
    let (finding, death) = node.death("memory-limit-kill", &injection);
    assert_eq!(death.signal, Some(9), "{death:?}");
    assert!(death.sender.as_ref().is_some_and(|sender| sender.kernel), "{death:?}");
    let limit = death.limit.as_ref().expect("a limit");
    assert_eq!(limit.limit_bytes, number(&injection, "limit_bytes"), "{limit:?}");
    assert!(limit.hit, "{limit:?}");
    assert!(limit.cgroup.contains(text(&injection, "container_id")), "{limit:?}");
    assert!(finding.evidence.iter().any(|evidence| evidence.kind == "oom"), "{finding:?}");
}

#[test]
fn a_silent_child_is_not_overlooked() {
    if !can_run("a_silent_child_is_not_overlooked", &[Cgroups, Bpf]) {
        return;
    }
    let mut node = Node::start();
    let injection = inject(&["silent-child-oom"]);
    let (_, death) = node.death("silent-child-oom", &injection);
    assert_eq!(death.signal, Some(9), "{death:?}");
    let limit = death.limit.as_ref().expect("a limit");
    assert_eq!(limit.limit_bytes, number(&injection, "limit_bytes"), "{limit:?}");
}

#[test]
fn a_segmentation_fault_gets_its_certificate() {
    if !can_run("a_segmentation_fault_gets_its_certificate", &[Cgroups, Bpf]) {
        return;
    }
    let mut node = Node::start();
    let injection = inject(&["segv"]);
    let pid = number(&injection, "pid") as u32;
    let finding = node.finding("the fault", |finding| {
        finding.death.as_ref().is_some_and(|death| death.pid == pid && death.signal == Some(11))
    });
    assert_is_about(&finding, &injection);
    let death = finding.death.clone().expect("it was looked for");
    assert_eq!(death.signal_name, "SIGSEGV");
    assert_eq!(finding.pattern, "crashed");
    assert!(death.sender.is_some_and(|sender| sender.kernel), "a fault is the kernel's signal");
}

#[test]
fn a_kill_from_outside_names_its_sender() {
    if !can_run("a_kill_from_outside_names_its_sender", &[Cgroups, Bpf]) {
        return;
    }
    let mut node = Node::start();
    let injection = inject(&["kill"]);
    let (_, death) = node.death("killed-from-outside", &injection);
    assert_eq!(death.signal, Some(9), "{death:?}");
    let sender = death.sender.as_ref().expect("a sender");
    assert_eq!(u64::from(sender.pid), number(&injection, "sender_pid"), "{death:?}");
    assert_eq!(sender.comm, "tapio-perf");
    assert!(!sender.kernel, "{death:?}");
}

#[test]
fn an_ignored_sigterm_is_distinguished_from_a_kill() {
    if !can_run("an_ignored_sigterm_is_distinguished_from_a_kill", &[Cgroups, Bpf]) {
        return;
    }
    let mut node = Node::start();
    let injection = inject(&["ignored-sigterm"]);
    let (_, death) = node.death("ignored-sigterm", &injection);
    assert_eq!(death.signal, Some(9), "{death:?}");
    let sender = death.sender.as_ref().expect("a sender");
    assert_eq!(u64::from(sender.pid), number(&injection, "sender_pid"), "{death:?}");
}

#[test]
fn a_crash_loop_shows_how_it_ends_each_time() {
    if !can_run("a_crash_loop_shows_how_it_ends_each_time", &[Cgroups, Bpf]) {
        return;
    }
    let mut node = Node::start();
    let injection = inject(&["exit"]);
    let pod = text(&injection, "pod_uid").to_owned();
    let finding = node.finding("the crash loop", |finding| {
        finding.pattern == "crash-loop" && finding.entity.as_ref().is_some_and(|entity| entity.pod_uid == pod)
    });
    let death = finding.death.expect("a death");
    assert_eq!((death.exit_code, death.signal), (Some(3), None));
    assert!(finding.count >= 3, "{} deaths", finding.count);
}

#[test]
fn the_ledger_closes_after_real_faults() {
    if !can_run("the_ledger_closes_after_real_faults", &[Cgroups, Bpf]) {
        return;
    }
    let mut node = Node::start();
    inject(&["exit", "--keep-time", "10ms"]);
    let status = node.collector.stop().expect("the collector ends");
    assert!(status.is_some_and(|status| status.success()), "{}", node.collector.output());
    let status = node.server.client().and_then(|mut client| client.status()).expect("a status");
    assert_eq!(status.unexplained_events, 0, "{status:?}");
    let sources = status.nodes.iter().flat_map(|node| &node.epochs);
    let sources: Vec<_> = sources.flat_map(|epoch| &epoch.sources).collect();
    assert!(sources.iter().any(|source| source.source == "ebpf" && source.archived > 0), "{sources:?}");
    for source in sources {
        let dropped: u64 = source.dropped.iter().map(|loss| loss.events).sum();
        assert_eq!(source.emitted, source.archived + dropped, "{source:?}");
        assert_eq!((source.held, source.unexplained), (0, 0), "{source:?}");
    }
}
