//! What is done to a node, and what is wrong with it: a drain, a taint, and a kubelet or runtime that hangs.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{CALM, await_one};
use crate::kube_archive::Archive;
use crate::kube_node::beside::Beside;
use crate::kube_node::findings::{findings, print};
use crate::kube_node::{Namespace, await_that, container, has_node, kubectl, pod, setting};

const TAINT: &str = "tapio.test/away";

/// The node under test. Dropping makes it as it was.
struct Node(String);

impl Node {
    fn kubectl(&self, command: &str, more: &[&str]) {
        kubectl(&[&[command, &*self.0][..], more].concat()).unwrap_or_else(|error| panic!("{error}"));
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = kubectl(&["uncordon", &self.0]) {
            eprintln!("{} stays cordoned: {error}", self.0);
        }
        // Fails where there is none.
        let _ = kubectl(&["taint", "node", &self.0, &format!("{TAINT}-")]);
    }
}

/// A process of the node that does not run until this is dropped.
struct Halted(Pid);

impl Halted {
    /// One that `up.sh` started.
    fn halt(name: &str) -> Self {
        let path = format!("{}/{name}.pid", setting("TAPIO_TEST_RUN"));
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let pid = Pid::from_raw(text.trim().parse().expect("a pid")).expect("a pid");
        let comm = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).expect("it runs");
        assert_eq!(comm.trim(), name);
        kill_process(pid, Signal::STOP).expect("halted");
        Self(pid)
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).expect("it goes on");
    }
}

/// Waits for a finding of a pattern about the node, or several of its pods.
fn await_of_node(server: &str, pattern: &str, is_it: impl Fn(&Value) -> bool) {
    let found = await_that(&format!("{pattern} of the node"), |seen| {
        let of_it: Vec<_> = findings(server).into_iter().filter(|one| one["pattern"] == pattern).collect();
        *seen = of_it.iter().map(|one| format!("\n{} {} {}", one["ongoing"], one["count"], one["title"])).collect();
        assert!(of_it.len() <= 1, "{seen}");
        of_it.into_iter().find(&is_it)
    });
    print(server, &found);
}

fn is_cordoned(tapio: &Beside, is_it: bool) {
    let expected = ["node_condition", "Schedulable", if is_it { "status=0" } else { "status=1" }];
    await_that("that the node's cordon is archived", |seen| {
        let archive = Archive::read(tapio.server.archive_dir());
        let texts = archive.texts(|_| true);
        let last = texts.iter().rfind(|text| text.contains("Schedulable"));
        *seen = format!("{last:?}");
        last.filter(|text| expected.iter().all(|part| text.contains(part))).map(|_| ())
    });
}

#[test]
fn drains_and_taints_of_a_node_are_found() {
    if !has_node("drains_and_taints_of_a_node_are_found") {
        return;
    }
    let tapio = Beside::start();
    let address = tapio.server.address();
    let namespace = Namespace::make("node");
    let ns = &namespace.0;
    let node = Node(setting("TAPIO_TEST_NODE"));
    let mut pods =
        ["left-1", "left-2", "asked", "stays", "tainted"].map(|name| pod(name, "Always", container("web", CALM)));
    let stays = pods.iter_mut().filter(|pod| pod["metadata"]["name"] != "tainted");
    stays.for_each(|pod| pod["spec"]["tolerations"] = json!([{"operator": "Exists"}]));
    namespace.apply(pods.to_vec());
    for name in ["left-1", "left-2", "asked", "stays", "tainted"] {
        namespace.wait_running(&format!("pod/{name}"));
    }

    node.kubectl("cordon", &[]);
    is_cordoned(&tapio, true);
    namespace.evict_with_condition("left-1");
    namespace.evict_with_condition("left-2");
    await_of_node(&address, "evicted-by-drain", |one| one["count"] == 2);
    // By an API server that says no more of an eviction than of any deletion.
    namespace.evict("asked");
    await_of_node(&address, "drained", |one| one["count"] == 1);
    // What is deleted when it takes pods again is deleted for another reason.
    node.kubectl("uncordon", &[]);
    is_cordoned(&tapio, false);
    kubectl(&["-n", ns, "delete", "pod", "stays", "--wait=true"]).expect("deleted");
    await_one(&address, ns, "stays", "pod-deleted", "");
    await_of_node(&address, "drained", |one| one["count"] == 1);

    kubectl(&["taint", "node", &node.0, &format!("{TAINT}=:NoExecute")]).expect("tainted");
    await_one(&address, ns, "tainted", "evicted-by-taint", "");

    drop((namespace, node));
    tapio.stop();
}

#[test]
fn a_kubelet_and_a_runtime_that_hang_are_found() {
    let name = "a_kubelet_and_a_runtime_that_hang_are_found";
    if !has_node(name) {
        return;
    }
    if std::env::var("TAPIO_TEST_RUN").is_err() {
        eprintln!("SKIP {name}: halts kubelet, so it needs a node of its own");
        return;
    }
    let tapio = Beside::start_with(", stuck_after: 5s");
    let address = tapio.server.address();
    for (program, pattern) in [("kubelet", "node-not-ready"), ("containerd", "runtime-hangs")] {
        let halted = Halted::halt(program);
        await_of_node(&address, pattern, |one| one["ongoing"] == true);
        drop(halted);
        await_of_node(&address, pattern, |one| one["ongoing"] == false && one["resolved_at"].is_string());
    }
    tapio.stop();
}
