//! `tapioctl` against a real query service.

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Output, Stdio};
use std::sync::Arc;

use crate::correlate_node::{MIB, MS, Machine, Node, Process, SECOND, SIGKILL};
use crate::programs::tapioctl;
use serde_json::Value;
use tapio_server::query::{self, StatusSource};
use tapio_wire::service::{
    ArchiveStatus, EpochStatus, LossCount, NodeStatus, ShardStatus, SourceLedger, SourceOff, StatusResponse,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;

pub(crate) struct Fixed;
impl StatusSource for Fixed {
    fn status(&self) -> StatusResponse {
        StatusResponse {
            revision: "r1".into(),
            uptime_ns: 3 * SECOND,
            nodes: vec![NodeStatus {
                node: "n1".into(),
                node_id: 1,
                connected: true,
                off: vec![
                    SourceOff { source: "k8s".into(), reason: "no cluster\x1b[2J".into() },
                    SourceOff { source: "ebpf".into(), reason: "running without dns_query (refused)".into() },
                ],
                server: String::new(),
                epochs: vec![EpochStatus {
                    epoch: 255,
                    durable_seq: 9,
                    state: "open".into(),
                    sources: vec![SourceLedger {
                        source: "ebpf".into(),
                        emitted: 100,
                        archived: 90,
                        held: 3,
                        dropped: vec![LossCount { stage: "ring".into(), reason: "full".into(), events: 7 }],
                        ..SourceLedger::default()
                    }],
                    last_frame_ns: 1_700_000_000 * SECOND,
                }],
            }],
            archive: Some(ArchiveStatus { disk: "plain".into(), segments: 2, bytes: 3 * MIB, ..Default::default() }),
            shards: vec![ShardStatus { shard: 0, core: -1, events: 90, entities: 4, evicted: 0 }],
            ready: true,
            ..Default::default()
        }
    }
}

pub(crate) struct Server {
    pub(crate) address: String,
    pub(crate) machine: Machine,
    node: Node,
    pub(crate) runtime: tokio::runtime::Runtime,
}

fn killed(node: &mut Node, at: u64, pid: u32, comm: &'static str) {
    let web = node.container("web", "web\x1b[2J");
    let process = Process::init(web, pid, comm);
    node.oom(at, process, 64 * MIB, 64 * MIB);
    node.signal(at, process, SIGKILL, None);
    node.exit(at + 1_200_000, process, SIGKILL);
    node.lethal(at + 2 * MS);
}

pub(crate) fn serve() -> Server {
    let mut node = Node::new("n1");
    killed(&mut node, 100 * SECOND, 100, "nginx");
    serve_of(node)
}

/// A server that knows what a node reported.
pub(crate) fn serve_of(node: Node) -> Server {
    let machine = Machine::start(1);
    machine.deliver(&node.node, &node.frames);
    machine.settle();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let service = query::service(Arc::clone(&machine.store), Arc::new(Fixed));
    runtime.spawn(
        tonic::transport::Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)),
    );
    Server { address, machine, node, runtime }
}

pub(crate) fn output(server: &str, arguments: &[&str]) -> (Output, String) {
    let output = tapioctl(server, arguments).output().expect("tapioctl runs");
    let text = String::from_utf8(output.stdout.clone()).expect("UTF-8");
    (output, text)
}

#[test]
fn json_has_the_keys_that_programs_rely_on() {
    let server = serve();
    let (output, text) = output(&server.address, &["findings", "--json"]);
    assert!(output.status.success());
    let finding: Value = serde_json::from_str(text.trim_end()).expect("one object on one line");
    for key in [
        "id",
        "pattern",
        "title",
        "severity",
        "confidence",
        "entity",
        "started_at",
        "ended_at",
        "evidence",
        "loss",
        "advice",
        "death",
    ] {
        assert!(finding.get(key).is_some_and(|value| !value.is_null()), "{key}");
    }
    for key in ["exit_code", "signal", "sender", "limit", "label", "verdict"] {
        assert!(finding["death"].get(key).is_some(), "{key}");
    }
    assert_eq!(finding["pattern"], "memory-limit-kill");
    assert_eq!(finding["death"]["signal"], 9);
    assert_eq!(finding["death"]["exit_code"], Value::Null);
    assert_eq!(finding["death"]["limit"]["limit_bytes"], 64 * MIB);
    assert_eq!(finding["started_at"], "2023-11-14T22:15:00.000000000Z");
    assert_eq!(finding["ended_at"], "2023-11-14T22:15:00.001200000Z");
}

#[test]
fn a_person_reads_who_died_why_and_what_to_do() {
    let server = serve();
    let id = server.machine.findings()[0].id.clone();
    let (output, text) = output(&server.address, &["finding", &id[..8]]);
    assert!(output.status.success());
    println!("{text}");
    for part in [
        "exceeded its memory limit of 64.0 MiB",
        "What happened",
        "Causal chain",
        "└─ +0 ns      oom  ",
        "   └─ +1.2 ms    exit  ",
        "Death certificate",
        "nginx (pid 100)",
        "SIGKILL (signal 9)",
        "the kernel",
        "64.0 MiB of 64.0 MiB used in limited: the limit was reached",
        "No event was lost",
        "What to do",
        "  1. ",
    ] {
        assert!(text.contains(part), "{part:?} is missing");
    }
    assert!(!text.contains('\x1b'), "neither colours nor what a name smuggles in");
    let (_, coloured) = self::output(&server.address, &["finding", &id, "--color", "always"]);
    assert!(coloured.contains("\x1b[1mWhat happened\x1b[0m") && !coloured.contains("\x1b[2J"));
}

#[test]
fn kubernetes_names_labels_and_observations_are_shown() {
    let server = serve();
    let mut node = Node::new("n2");
    let db = node.kube_container("StatefulSet/db", "shop/db-0", "db");
    let pod = node.kube_pod("StatefulSet/db", "shop/db-0");
    node.service(50 * SECOND, "shop/db", 7, 5432, pod, true);
    node.lethal(51 * SECOND);
    let process = Process::init(db, 700, "postgres");
    node.oom(100 * SECOND, process, 64 * MIB, 64 * MIB);
    node.exit(100 * SECOND + MS, process, SIGKILL);
    node.container_ended(101 * SECOND, db, "Error", 137);
    node.observation(101 * SECOND, db, 0, 3);
    node.lethal(102 * SECOND);
    let client = node.kube_container("Deployment/web", "shop/web-0", "web");
    node.connects(103 * SECOND, client, 7, 2);
    server.machine.deliver(&node.node, &node.frames);
    let found = server.machine.findings();
    let id = &found.iter().find(|finding| finding.count == 1 && !finding.consequences.is_empty()).expect("found").id;
    let (_, text) = output(&server.address, &["finding", id]);
    println!("{text}");
    for part in [
        "shop/db-0/web exceeded its memory limit",
        "workload StatefulSet/db › pod shop/db-0 › container web › node n2",
        "image shop/web:2",
        "Kubernetes says Error (exit code 137): contradicts what happened",
        "observed",
        "memory 32.0 MiB of 64.0 MiB",
        "What it brought about",
        "shop/web-0/web is refused by service shop/db",
    ] {
        assert!(text.contains(part), "{part:?} is missing");
    }
    let (_, table) = output(&server.address, &["findings"]);
    println!("{table}");
    assert!(table.lines().next().is_some_and(|header| header.contains("POD")));
    assert!(table.contains(" shop/db-0 ") && table.contains(" - "), "{table}");
    let (_, json) = output(&server.address, &["finding", id, "--json"]);
    let finding: Value = serde_json::from_str(&json).expect("an object");
    for (key, value) in [("namespace", "shop"), ("pod", "db-0"), ("container", "web"), ("workload", "StatefulSet/db")] {
        assert_eq!(finding["entity"][key], value, "{key}");
    }
    assert_eq!(finding["death"]["label_agrees"], false);
    assert_eq!(finding["consequences"][0]["pattern"], "upstream-refused");
    assert_eq!((&finding["withdrawn"], &finding["possible"]), (&Value::Bool(false), &Value::Bool(false)));
}

#[test]
fn the_status_shows_the_equation() {
    let server = serve();
    let (_, text) = output(&server.address, &["status"]);
    println!("{text}");
    let row = text.lines().find(|line| line.contains("ring/full")).expect("the source's row");
    let cells: Vec<_> = row.split_whitespace().collect();
    assert_eq!(cells, ["n1", "ff", "ebpf", "100", "=", "90", "+", "7", "+", "3", "0", "ring/full", "7"]);
    assert!(text.contains("ready") && text.contains("The ledger closes"));
    for off in ["not watched: ebpf on n1: running without dns_query (refused)", "not watched: k8s on n1: no cluster"] {
        assert!(text.contains(off), "{off}");
    }
    assert!(!text.contains('\x1b'), "what a collector says cannot steer the terminal");
    let (_, json) = output(&server.address, &["status", "--json"]);
    let status: Value = serde_json::from_str(&json).expect("an object");
    assert_eq!(status["nodes"][0]["epochs"][0]["sources"][0]["dropped"][0]["events"], 7);
    assert_eq!(status["nodes"][0]["off"][0]["source"], "k8s");
}

#[test]
fn exit_codes_are_as_documented() {
    let server = serve();
    let code = |server: &str, arguments: &[&str]| output(server, arguments).0.status.code();
    assert_eq!(code(&server.address, &["findings", "--since", "10m"]), Some(0));
    assert_eq!(code(&server.address, &["finding", "nope"]), Some(1));
    assert_eq!(code(&server.address, &["findings", "--since", "whenever"]), Some(2));
    assert_eq!(code(&server.address, &["frobnicate"]), Some(2));
    assert_eq!(code("127.0.0.1:1", &["status"]), Some(3));
}

/// A tapioctl that watches findings, and its lines.
fn watching(servers: &str) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut child = tapioctl(servers, &["findings", "--watch", "--json", "--since", "2000-01-01"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("tapioctl runs");
    let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    (child, lines)
}

/// Reads the pid whose death a line is about.
fn pid_of(line: Option<std::io::Result<String>>) -> Value {
    let line = line.expect("a line").expect("readable");
    serde_json::from_str::<Value>(&line).expect("an object")["death"]["pid"].clone()
}

#[test]
fn a_watch_continues_at_the_next_server_without_repeats() {
    let (first, mut second) = (serve(), serve());
    let servers = format!("{},{}", first.address, second.address);
    let (mut child, mut lines) = watching(&servers);
    let mut pid = || pid_of(lines.next());
    assert_eq!(pid(), 100);
    drop(first);
    killed(&mut second.node, 200 * SECOND, 200, "nginx");
    second.machine.deliver(&second.node.node, &second.node.frames[1..]);
    assert_eq!(pid(), 200, "the second server has the first finding too: it is not printed again");
    drop(lines);
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
}

#[test]
fn a_watcher_gets_old_and_new_findings_and_may_leave() {
    let mut server = serve();
    let (mut child, mut lines) = watching(&server.address);
    let mut pid = || pid_of(lines.next());
    assert_eq!(pid(), 100);
    killed(&mut server.node, 200 * SECOND, 200, "nginx");
    server.machine.deliver(&server.node.node, &server.node.frames[1..]);
    assert_eq!(pid(), 200);
    // Nothing more happens: it must not need another finding to notice. Other tests' children may hold the pipe for a moment
    // between fork and exec, in which a write into it succeeds.
    drop(lines);
    assert_eq!(child.wait().expect("it ends").code(), Some(0), "a closed pipe is no error");
}

#[test]
fn lists_and_objects_come_in_the_formats_that_kubectl_knows() {
    let server = serve();
    let (_, yaml) = output(&server.address, &["findings", "-o", "yaml"]);
    let value: Value = serde_saphyr::from_str(yaml.trim_start_matches("---\n")).expect("YAML");
    let (_, json) = output(&server.address, &["findings", "-o", "json"]);
    assert_eq!(value, serde_json::from_str::<Value>(json.trim_end()).expect("one object"));
    let (_, wide) = output(&server.address, &["findings", "--output", "wide"]);
    assert!(wide.starts_with("NODE ") && wide.lines().nth(1).is_some_and(|row| row.starts_with("n1 ")), "{wide}");
    assert!(!wide.contains('\x1b'));
    let (_, none) = output(&server.address, &["findings", "--severity", "critical", "--pattern", "crash-loop"]);
    assert_eq!(none, "No findings.\n");
}

#[test]
fn the_ledger_is_a_row_for_each_source() {
    let server = serve();
    let (_, text) = output(&server.address, &["ledger"]);
    assert!(text.starts_with("Ledger") && text.contains("n1") && text.contains("ring/full 7"), "{text}");
    let (_, json) = output(&server.address, &["ledger", "-o", "json", "--node", "n1"]);
    let row: Value = serde_json::from_str(json.trim_end()).expect("one row");
    assert_eq!((&row["node"], &row["emitted"], &row["epoch"]), (&"n1".into(), &100.into(), &"ff".into()));
    let (failed, _) = output(&server.address, &["ledger", "--node", "n2"]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&failed.stderr).contains("known are: n1"));
}

#[test]
fn why_explains_the_last_death_of_a_pod() {
    let mut server = serve();
    let web = server.node.container_of("shop/web-1", "key", "shop/web-1/nginx");
    let process = Process::init(web, 300, "nginx");
    server.node.oom(400 * SECOND, process, 64 * MIB, 64 * MIB);
    server.node.signal(400 * SECOND, process, SIGKILL, None);
    server.node.exit(400 * SECOND + MS, process, SIGKILL);
    server.node.lethal(400 * SECOND + 2 * MS);
    server.machine.deliver(&server.node.node, &server.node.frames[1..]);
    server.machine.settle();
    for pod in [
        &["pod/web-1", "-n", "shop"][..],
        &["web-1"],
        &["pod/web-1"],
        &["pod/shop/web-1"],
        &["shop/web-1"],
        &["node/n1"],
        &["ns/shop"],
    ] {
        let (run, text) = output(&server.address, &[&["why"], pod].concat());
        assert_eq!(run.status.code(), Some(0), "{}", String::from_utf8_lossy(&run.stderr));
        assert!(
            text.contains("Death certificate") && text.contains("pid 300") && text.contains("Last events"),
            "{text}"
        );
    }
    let (run, _) = output(&server.address, &["why", "pod/nobody"]);
    assert_eq!(run.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&run.stderr).contains("nothing is known of pod nobody"));
    assert_eq!(output(&server.address, &["why", "service/web"]).0.status.code(), Some(2));
}

#[test]
fn top_measures_once_and_completions_are_scripts() {
    let server = serve();
    let (run, text) = output(&server.address, &["top", "--once", "--interval", "100ms"]);
    assert!(run.status.success());
    let row: Vec<_> = text.lines().find(|line| line.contains("n1")).expect("the node").split_whitespace().collect();
    assert_eq!(row, ["0.0", "90", "n1"], "{text}");
    for shell in ["bash", "zsh", "fish"] {
        let (_, script) = output(&server.address, &["completions", shell]);
        assert!(script.contains("COMPLETE") && script.contains("tapioctl"), "{shell}: {script}");
    }
    let (run, _) = output(&server.address, &["events"]);
    assert_eq!(run.status.code(), Some(1), "this server has no archive");
}

/// Keys of a value with their paths, `[]` for what is in a list; an entity's once, as `entity.…`.
fn paths(prefix: &str, value: &Value, seen: &mut std::collections::BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                seen.insert(path.clone());
                paths(if key == "entity" { "entity" } else { &path }, value, seen);
            }
        }
        Value::Array(values) => {
            let path = format!("{prefix}[]");
            seen.remove(prefix);
            seen.insert(path.clone());
            values.iter().for_each(|value| paths(&path, value, seen));
        }
        _ => {}
    }
}

#[test]
fn the_reference_of_findings_has_every_key_and_no_other() {
    use tapio_wire::service::{Consequence, Death, EntityRef, Evidence, Finding, Limit, Sender, Silence};
    let entity = Some(EntityRef::default());
    let sender = Some(Sender { entity: entity.clone(), ..Sender::default() });
    let finding = Finding {
        entity: entity.clone(),
        evidence: vec![Evidence { entity: entity.clone(), ..Evidence::default() }],
        advice: vec![String::new()],
        silence: Some(Silence::default()),
        death: Some(Death { sender, limit: Some(Limit::default()), ..Death::default() }),
        consequences: vec![Consequence { entity, ..Consequence::default() }],
        ..Finding::default()
    };
    let mut written = std::collections::BTreeSet::new();
    paths("", &tapio_server::render::finding_value(&finding), &mut written);
    written.remove("loss");
    let lines = include_str!("../../docs/findings.md").lines();
    let first_cells = lines.filter_map(|line| line.strip_prefix("| `")?.split_once(" |")).map(|(cell, _)| cell);
    let keys = first_cells.flat_map(|cell| cell.split(", ")).map(|key| key.trim_matches('`').to_owned());
    assert_eq!(keys.collect::<std::collections::BTreeSet<String>>(), written);
}

#[test]
fn top_writes_no_escape_codes_where_no_terminal_is() {
    let server = serve();
    let mut top = tapioctl(&server.address, &["top", "--interval", "100ms"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("tapioctl runs");
    let mut lines = BufReader::new(top.stdout.take().expect("its output")).lines();
    let first = lines.next().expect("a line").expect("text");
    top.kill().expect("it runs");
    top.wait().expect("it ends");
    assert_eq!(first, "1 node · 0 findings · 0 events unexplained");
}
