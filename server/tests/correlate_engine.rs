//! What holds for every pattern: order, shards and replays do not matter, memory is bounded, files are checked.

use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Waker};
use std::time::Duration;

use crate::correlate_node::{MIB, MS, Machine, Node, Process, SECOND, SIGKILL, SIGSEGV, SIGTERM};
use tapio_server::correlate::clue::Clue;
use tapio_server::correlate::state::EntityTable;
use tapio_server::correlate::{BusClosed, ClueBus, CorrelateConfig, Correlator, Stopped, Topology};
use tapio_server::findings::PatternSet;
use tapio_wire::event::{Detail, Lane};
use tapio_wire::frame::Frame;
use tapio_wire::program::yaml::TextPosition;
use tapio_wire::service::Finding;

/// Deaths of every sort in many containers, their evidence spread over many frames.
fn mixed() -> Node {
    let mut node = Node::new("n1");
    let session = node.unit("session-1.scope");
    let containerd = node.unit("containerd.service");
    let shell = Process::of_node(session, 5, "bash");
    let shim = Process::of_node(containerd, 6, "containerd-shim");
    for turn in 0..40u32 {
        let at = u64::from(100 + turn) * SECOND;
        let pod = format!("shop/web-{}", turn % 4);
        let web = node.container_of(&pod, &format!("c{turn}"), "web");
        let process = Process::init(web, 1000 + turn, "app");
        match turn % 5 {
            0 => {
                node.reclaim(at, web);
                node.oom(at + 100 * MS, process, 64 * MIB, 64 * MIB);
                node.lethal(at + 100 * MS);
                node.signal(at + 101 * MS, process, SIGKILL, None);
                node.exit(at + 102 * MS, process, SIGKILL);
            }
            1 => {
                node.signal(at, process, SIGKILL, Some(shell));
                node.lethal(at + MS);
                node.exit(at + MS, process, SIGKILL);
            }
            2 => {
                node.signal(at, process, SIGTERM, Some(shim));
                node.lethal(at + MS);
                node.signal(at + 5 * SECOND, process, SIGKILL, Some(shim));
                node.exit(at + 5 * SECOND + MS, process, SIGKILL);
            }
            3 => {
                node.signal(at, process, SIGSEGV, None);
                node.exit(at + MS, process, SIGSEGV);
            }
            _ => node.exit(at, process, 3 << 8),
        }
        node.lethal(at + 6 * SECOND);
    }
    node
}

/// Findings without what depends on when and how often they were published.
fn essence(mut findings: Vec<Finding>) -> Vec<Finding> {
    for finding in &mut findings {
        finding.published_ns = 0;
        finding.revision = 0;
    }
    findings
}

fn run(shards: usize, node: &Node) -> Vec<Finding> {
    let machine = Machine::start(shards);
    machine.deliver(&node.node, &node.frames);
    essence(machine.findings())
}

#[test]
fn shards_do_not_change_what_is_found() {
    let node = mixed();
    let one = run(1, &node);
    assert!(one.len() > 12, "{}", one.len());
    for pattern in ["memory-limit-kill", "killed-from-outside", "ignored-sigterm", "crash-loop"] {
        assert!(one.iter().any(|finding| finding.pattern == pattern), "{pattern}");
    }
    for shards in [2, 3, 8] {
        for _ in 0..5 {
            assert_eq!(run(shards, &node), one, "{shards} shards");
        }
    }
}

#[test]
fn a_replay_finds_the_same_ids_and_nothing_twice() {
    let node = mixed();
    let machine = Machine::start(2);
    machine.deliver(&node.node, &node.frames);
    let first = machine.findings();
    drop(machine);
    let machine = Machine::start(1);
    machine.deliver(&node.node, &node.frames);
    assert_eq!(essence(machine.findings()), essence(first));
}

#[test]
fn late_evidence_updates_the_finding_in_place() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let process = Process::init(web, 100, "nginx");
    node.exit(100 * SECOND + 5 * MS, process, SIGKILL);
    node.lethal(101 * SECOND);
    node.oom(100 * SECOND, process, 64 * MIB, 64 * MIB);
    node.lethal(102 * SECOND);
    node.reclaim(99 * SECOND, web);
    let machine = Machine::start(1);
    let mut seen = Vec::new();
    for frame in &node.frames {
        machine.deliver(&node.node, &[Arc::clone(frame)]);
        let mut found = machine.findings();
        assert_eq!(found.len(), 1, "{found:#?}");
        seen.push(found.remove(0));
    }
    assert_eq!(
        seen.iter().map(|finding| finding.pattern.as_str()).collect::<Vec<_>>(),
        ["exited-with-error", "memory-limit-kill", "memory-limit-kill"]
    );
    assert_eq!(seen.iter().map(|finding| finding.revision).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(seen.iter().all(|finding| finding.id == seen[0].id));
    assert!(seen[2].confidence > seen[1].confidence);
}

#[test]
fn names_from_another_frame_describe_the_dead() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    node.frame(Lane::Bulk, 50 * SECOND);
    node.exit(100 * SECOND, Process::init(web, 100, "app"), 1 << 8);
    node.lethal(101 * SECOND);
    let found = run(2, &node);
    assert_eq!(found[0].entity.as_ref().map(|entity| entity.name.as_str()), Some("web"));
}

#[test]
fn entities_are_bounded_and_evictions_counted() {
    let mut node = Node::new("n1");
    for entity in 1..=5000u64 {
        node.push(entity, entity, 0, Detail::RunQueue { wait_ns: 1 });
    }
    node.frame(Lane::Bulk, SECOND);
    let patterns = PatternSet::embedded().expect("valid");
    let config = CorrelateConfig { shards: Some(2), entities_max: 1000, ..CorrelateConfig::default() };
    let machine = Machine::sized(&config, patterns);
    machine.deliver(&node.node, &node.frames);
    machine.settle();
    let status = machine.correlator.status();
    let entities: u64 = status.iter().map(|shard| shard.entities).sum();
    let evicted: u64 = status.iter().map(|shard| shard.evicted).sum();
    assert!(entities <= 1000, "{entities}");
    assert_eq!(entities + evicted, 5000);
    assert_eq!(machine.correlator.events_correlated(), 5000);
}

#[test]
fn quiet_entities_expire() {
    let mut node = Node::new("n1");
    node.push(1, 1, 0, Detail::RunQueue { wait_ns: 1 });
    let frame = node.frame(Lane::Bulk, SECOND);
    let detail = &frame.body().events[0].body;
    let mut table = EntityTable::new(100, Duration::from_secs(32));
    table.count((1, 1), 1, detail, frame.body());
    table.advance(Duration::from_secs(20));
    table.count((1, 2), 1, detail, frame.body());
    for second in 20..=40 {
        table.advance(Duration::from_secs(second));
    }
    assert_eq!(table.len(), 1, "only the one that was seen lately");
    table.advance(Duration::from_secs(100_000));
    assert!(table.is_empty());
    assert_eq!(table.evicted(), 0, "expiry is no eviction");
}

#[test]
fn after_stop_frames_are_refused_and_those_taken_are_finished() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    node.exit(100 * SECOND, Process::init(web, 100, "app"), 1 << 8);
    node.lethal(101 * SECOND);
    let mut machine = Machine::start(2);
    machine.deliver(&node.node, &node.frames);
    machine.correlator.stop();
    machine.finder.stop();
    assert_eq!(machine.store.len(), 1);
    let refused = machine.correlator.deliver_blocking(node.node.clone(), Arc::clone(&node.frames[0]));
    assert_eq!(refused, Err(Stopped));
}

const VALID: &str = "id: own
title: \"{entity}\"
summary: s
severity: low
priority: 1
window: 1m
scope: entity
anchor: exit
confidence: {base: 0.5}
steps:
  - name: before
    clue: oom
    optional: true
    same: {pid: exit.pid}
  - name: exit
    clue: exit
    where: {exit_code: {min: 3}}
advice: []
";

#[test]
fn a_wrong_pattern_is_reported_with_file_and_line() {
    PatternSet::from_texts(&[("own.yaml", VALID)]).expect("the base is valid");
    for (from, to, line, reason) in [
        ("severity: low", "severity: awful", 4, "awful"),
        ("priority: 1", "priority: 1\ncolour: red", 6, "colour"),
        ("window: 1m", "window: soon", 6, "not a duration"),
        ("anchor: exit", "anchor: death", 8, "no step"),
        ("clue: oom", "clue: boom", 12, "no clue is called boom"),
        ("clue: oom", "signal: oom", 12, "write `clue: oom`"),
        ("advice: []", "ends: [{signal: exit}]\nadvice: []", 18, "write `clue: exit`"),
        ("pid: exit.pid", "pid: exit.color", 14, "has no color"),
        ("pid: exit.pid", "pid: gone.pid", 14, "no step called gone"),
        ("min: 3", "most: 3", 17, "most"),
        ("min: 3", "min: 3, max: 1", 17, "above its maximum"),
        ("exit_code: {min: 3}", "exit_code: many", 17, "cannot be many"),
        ("exit_code: {min: 3}", "exit_color: 3", 17, "has no exit_color"),
        ("summary: s", "summary: \"{before.pid}\"", 3, "may be missing"),
        ("summary: s", "summary: \"{exit.\"", 3, "without"),
        ("summary: s", "summary: \"[[[[\"", 3, "without"),
        ("summary: s", "summary: \"[[a [[b]] c]]\"", 3, "do not pair"),
        ("summary: s", "summary: \"a ]] [[b]]\"", 3, "do not pair"),
        ("scope: entity", "scope: cluster", 7, "cluster"),
        ("advice: []", "one_of: [exit]\nadvice: []", 18, "no optional step"),
        ("advice: []", "absorbs: {own: pod}\nadvice: []", 18, "another pattern"),
        ("exit_code: {min: 3}", "exit_code: {starts: x}", 17, "no text"),
        ("clue: exit", "clue: exit\n    count: {min: 2, distinct: colour}", 17, "has no colour"),
        ("clue: exit", "clue: exit\n    may_be_lost: true", 15, "may be lost"),
        ("clue: exit", "clue: exit\n    may_be_anchor: true", 15, "may be the anchor as well"),
        ("{base: 0.5}", "{base: 1.5}", 9, "between 0 and 1"),
        ("exit_code: {min: 3}", "entity_kind: contaner", 17, "never contaner: it is one of container, host"),
        ("exit_code: {min: 3}", "process_role: {not: [first, secnd]}", 17, "never secnd"),
        ("exit_code: {min: 3}", "entity_kind: {starts: 5}", 17, "starts with 5"),
        ("summary: s", "summary: 5", 3, "`5` is no text"),
        ("{base: 0.5}", "{base: 0.5, minus: {exit: 0.1}}", 9, "no optional step"),
        ("summary: s", "summary: \"s [[abc]]\"", 3, "`[[abc]]` has no place"),
        ("clue: oom", "clue: oom\n    slack: 61s", 11, "`slack` is longer than `window`"),
        ("clue: exit", "clue: exit\n    within: 2h", 15, "write at most 60"),
        ("clue: exit", "clue: exit\n    after_at_least: 2m", 15, "`after_at_least` is longer than `window`"),
        ("clue: exit", "clue: exit\n    within: 2s\n    after_at_least: 3s", 15, "nothing is both"),
        ("clue: exit", "clue: exit\n    count: {min: 2, after: before}", 17, "a required step before it"),
        ("id: own", &format!("id: {}", "a".repeat(64)), 1, "has 64 letters: write at most 63"),
    ] {
        let text = VALID.replace(from, to);
        let error = PatternSet::from_texts(&[("own.yaml", &text)]).expect_err(to);
        assert_eq!((error.file.as_str(), error.place.line), ("own.yaml", line), "{error}");
        assert!(error.reason.contains(reason), "{error}");
        assert!(error.to_string().starts_with(&format!("own.yaml:{line}:{}: ", error.place.column)), "{error}");
    }
}

/// Neither a check nor a start may wait for whoever writes to it.
#[test]
fn a_named_pipe_is_no_pattern_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("own.yaml");
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).expect("a pipe");
    let error = PatternSet::load(Some(directory.path())).expect_err("it is no file");
    assert!(error.to_string().contains("own.yaml: it is no regular file"), "{error}");
}

#[test]
fn an_operators_pattern_replaces_the_embedded_one_and_runs() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("exited.yaml");
    let text = VALID.replace("id: own", "id: exited-with-error").replace("priority: 1", "priority: 999");
    std::fs::write(&file, &text).expect("it can be written");
    let patterns = PatternSet::load(Some(directory.path())).expect("it is valid");
    assert_eq!(patterns.patterns()[0].id, "exited-with-error");
    let own: Vec<_> = patterns.own().iter().map(|own| (own.id.as_str(), own.is_built_in)).collect();
    assert_eq!(own, [("exited-with-error", true)]);
    let mut node = Node::new("n1");
    let host = node.host("/");
    node.exit(SECOND, Process::of_node(host, 9, "x"), 2 << 8);
    node.exit(SECOND, Process::of_node(host, 10, "x"), 3 << 8);
    node.lethal(2 * SECOND);
    let machine = Machine::with(1, patterns);
    machine.deliver(&node.node, &node.frames);
    let found = machine.findings();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].death.as_ref().and_then(|death| death.exit_code), Some(3));
    std::fs::write(directory.path().join("zz.yaml"), &text).expect("it can be written");
    let error = PatternSet::load(Some(directory.path())).expect_err("two files, one id");
    assert!(error.file.ends_with("zz.yaml") && error.place == TextPosition { line: 1, column: 5 }, "{error}");
    let absorbing = VALID.replace("advice: []", "absorbs: {crash-lop: pod}\nadvice: []");
    std::fs::write(directory.path().join("zz.yaml"), absorbing).expect("it can be written");
    let error = PatternSet::load(Some(directory.path())).expect_err("no such pattern").to_string();
    assert!(error.contains("zz.yaml") && error.contains("crash-lop"), "{error}");
}

/// Lets nothing through until it is opened.
#[derive(Default)]
struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl ClueBus for Gate {
    fn publish(&self, _: Clue) -> Result<(), BusClosed> {
        let closed = self.is_open.lock().unwrap();
        drop(self.opened.wait_while(closed, |is_open| !*is_open).unwrap());
        Ok(())
    }
}

#[test]
fn a_node_that_floods_holds_back_itself_and_not_others() {
    let (mut loud, mut calm) = (Node::new("loud"), Node::new("calm"));
    for (node, deaths) in [(&mut loud, 100), (&mut calm, 1)] {
        let web = node.container("web", "web");
        (0..deaths).for_each(|turn| node.limit_kill(web, 100 + turn, (100 + u64::from(turn)) * SECOND));
    }
    let gate = Arc::new(Gate::default());
    let config = CorrelateConfig { shards: Some(1), frames_in_flight: 64, ..CorrelateConfig::default() };
    let bus: Arc<dyn ClueBus> = Arc::<Gate>::clone(&gate);
    let correlator = Correlator::start(&config, Arc::new(Topology::new(1000)), Arc::default(), bus).unwrap();
    let is_taken = |node: &Node, frame: &Arc<Frame>| {
        let mut delivery = pin!(correlator.deliver(node.node.clone(), Arc::clone(frame)));
        delivery.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    };
    let taken = loud.frames.iter().take_while(|frame| is_taken(&loud, frame)).count();
    assert!((1..64).contains(&taken), "{taken} of 100 frames");
    assert!(is_taken(&calm, &calm.frames[0]));
    *gate.is_open.lock().unwrap() = true;
    gate.opened.notify_all();
    correlator.drained_blocking().unwrap();
    assert!(is_taken(&loud, &loud.frames[taken]));
}

#[test]
fn a_runtime_thread_delivers_beyond_tokios_cooperative_budget() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    (0..500).for_each(|turn| node.limit_kill(web, 100 + turn, (100 + u64::from(turn)) * SECOND));
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let machine = Machine::with(1, PatternSet::embedded().unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async { machine.deliver(&node.node, &node.frames) });
        done.send(()).unwrap();
    });
    is_done.recv_timeout(Duration::from_secs(30)).expect("it waits for a wake that does not come");
}

#[test]
fn names_of_pattern_files_are_printed_without_control_characters() {
    let directory = tempfile::tempdir().expect("a directory");
    let own = VALID.replace("id: own", "id: exited-with-error");
    let check = |text: &str| {
        std::fs::write(directory.path().join("a\x1b[31m\nb.yaml"), text).expect("it can be written");
        let output = crate::programs::server(&["check", "--patterns"]).arg(directory.path()).output().expect("it runs");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).expect("text"))
    };
    for (text, code, line) in [(own.as_str(), 0, "replaces the built-in"), ("id: [", 2, "tapio-server: ")] {
        let (status, said) = check(text);
        assert_eq!(status, Some(code), "{said}");
        let named: Vec<_> = said.lines().filter(|one| one.contains(line)).collect();
        assert!(named.len() == 1 && named[0].contains("a\u{fffd}[31m\u{fffd}b.yaml"), "{said:?}");
        assert!(!said.contains('\x1b'), "{said:?}");
    }
}
