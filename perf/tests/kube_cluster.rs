//! On a real Kubernetes node: what `kubectl apply -k deploy` brings, two servers with NATS. Each of them gets a part, from another
//! node's collector; both find the same, also when one of them or the log is lost.
//!
//! Runs only by `make test-kube`.

mod elsewhere;
mod services;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use elsewhere::{Elsewhere, NODE, await_leader};
use serde_json::{Value, json};
use tapio_perf::processes::{Collector, bin_dir, binary};

use crate::kube_node::installed::{COLLECTOR, NAMESPACE, NATS, Pod, SERVER, Tapio};
use crate::kube_node::release::Front;
use crate::kube_node::{
    Namespace, await_that, await_within, container, deployment, eater, has_node, kubectl, pod, setting,
};

const SERVERS: usize = 2;
/// A server counts as missing for 180 seconds after its last message, if no node ships to it any more. This allows for more.
const GIVEN_UP_LIMIT: Duration = Duration::from_secs(300);
/// Starts processes, opens connections that are refused, and has children killed: both lanes are busy.
const BUSY: &str =
    "while :; do busybox true; busybox nc -w 1 127.0.0.1 9 </dev/null; busybox sleep 9 & kill -9 $!; done";

#[test]
fn two_servers_with_a_part_each_find_the_same() {
    if !has_node("two_servers_with_a_part_each_find_the_same") {
        return;
    }
    let tapio = Tapio::install_all();
    for what in [NATS, SERVER, COLLECTOR] {
        tapio.rolled_out(what);
    }
    servers_are(&tapio, SERVERS);
    is_unchanged_when_applied_again(&tapio);
    only_tokens_are_let_in(&tapio);

    // The node's deaths go to one server, what the Kubernetes API says to the other.
    let elsewhere = Elsewhere::make();
    let (of_node, collector) = a_server_each(&tapio, |server| elsewhere.collector(server));

    let namespace = Namespace::make("cluster");
    let mut found = vec![probe_kill(&tapio, &namespace), bad_release(&tapio, &namespace)];

    let mut busy = container("busy", BUSY);
    busy["resources"] = json!({"limits": {"cpu": "300m"}});
    namespace.apply(vec![pod("load", "Always", busy)]);
    namespace.wait_running("pod/load");
    // The one that knows the deaths, and their archive with it.
    kubectl(&["-n", NAMESPACE, "delete", "pod", &of_node, "--wait=true"]).expect("deleted");
    tapio.rolled_out(SERVER);
    stand(&tapio, &found);
    found.push(kill(&tapio, &namespace, "after-a-server"));
    println!("after the deletion of {of_node}, under load: all stands, and more is found");

    // With its volume: what it knew is gone.
    for what in ["statefulset/tapio-nats", "persistentvolumeclaim/tapio-nats"] {
        kubectl(&["-n", NAMESPACE, "delete", what, "--cascade=foreground", "--wait=true"]).expect("deleted");
    }
    alone_are(&tapio, SERVERS);
    found.iter().for_each(|one| is_known(&tapio, SERVERS, |other| other["id"] == one["id"]));
    let of_it = starts_to_eat(&namespace, "without-a-log");
    // Only by the server that the node ships to.
    is_known(&tapio, 1, is_killed(&of_it));
    println!("without the log: both know {} findings, and one finds another", found.len());
    tapio.apply_again();
    tapio.rolled_out(NATS);
    alone_are(&tapio, 0);
    nothing_is_sent_again(&tapio);
    found.push(ends_alike(&tapio, &namespace, "without-a-log", &of_it));
    stand(&tapio, &found);
    println!("with a new log: {} findings, alike from both servers", found.len());

    // Meanwhile the node may have come to the second one's server, whose address goes with it.
    ends_well(collector);
    let (of_node, collector) = a_server_each(&tapio, |server| elsewhere.collector(server));
    found.push(kill_without_both(&tapio, &namespace, &of_node));
    nothing_is_sent_again(&tapio);
    stand(&tapio, &found);
    println!("after a server and NATS at once, under load: {} findings, alike from both servers", found.len());

    ends_well(collector);
    drop((namespace, elsewhere));
    tapio.uninstall();
}

/// Stops a collector, whose frames are all acknowledged then.
fn ends_well(mut collector: Collector) {
    let status = collector.stop().unwrap_or_else(|error| panic!("{error}"));
    assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", collector.output());
}

/// Makes the node ship to one server, and starts the second node's collector for the other; it is the one that is elected.
/// Gives the first server's name.
fn a_server_each(tapio: &Tapio, start: impl FnOnce(&Pod) -> Collector) -> (String, Collector) {
    let node = setting("TAPIO_TEST_NODE");
    // It may have begun when there was one server, and chooses anew among both.
    tapio.restart(COLLECTOR);
    let of_node = await_that("a server of the node", |seen| shipped_to(tapio, seen).remove(&node));
    let servers = tapio.pods("server");
    let other = servers.iter().find(|pod| pod.name != of_node).expect("another server");
    let collector = start(other);
    tapio.without_collectors(|| await_leader(&collector));
    let parts = await_that("a server for each node", |seen| {
        let parts = shipped_to(tapio, seen);
        (parts.get(&node) == Some(&of_node) && parts.get(NODE) == Some(&other.name)).then_some(parts)
    });
    println!("shipped to: {parts:?}");
    (of_node, collector)
}

fn servers_are(tapio: &Tapio, count: usize) {
    await_that(&format!("{count} servers"), |seen| {
        let pods = tapio.pods("server");
        *seen = pods.iter().map(|pod| format!("{} ", pod.name)).collect();
        (pods.len() == count).then_some(())
    });
}

/// A GitOps controller that applies again and again sees nothing to do.
fn is_unchanged_when_applied_again(tapio: &Tapio) {
    let budget = || {
        let path = "jsonpath={.metadata.resourceVersion} {.metadata.generation}";
        kubectl(&["-n", NAMESPACE, "get", "poddisruptionbudget", "tapio-server", "-o", path]).expect("a budget")
    };
    let before = budget();
    let said = tapio.apply_again();
    // kubectl sends the selector of policy/v1 each time, since its patch strategy is to replace it; the object stays as it was.
    let has_strategy = |line: &&String| line.starts_with("poddisruptionbudget.policy/") && budget() == before;
    let changed: Vec<_> = said.iter().filter(|line| !line.ends_with(" unchanged") && !has_strategy(line)).collect();
    assert!(said.len() > 20 && changed.is_empty(), "applied again: {changed:#?} of {said:#?}");
    println!("applied again: {} objects, unchanged", said.len());
}

/// Who reaches the port and brings no token is refused; `tapioctl` in a server's pod brings one.
fn only_tokens_are_let_in(tapio: &Tapio) {
    let server = tapio.pods("server").remove(0);
    let address = format!("{}:9090", server.address);
    let options = ["--server", &address, "findings"];
    let with = server.tapioctl(&options);
    assert!(with.is_ok(), "{with:?}");
    let program = binary("tapioctl", &bin_dir(None).expect("a folder")).expect("tapioctl is built");
    let output = Command::new(program).args(options).output().expect("tapioctl starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("the token is missing"), "without a token: {said}");
    println!("tapioctl without a token: {}", said.trim());
    let (status, _) = server.answer_from(9091, "/api/v1/findings").unwrap_or_else(|error| panic!("{error}"));
    assert_ne!(status, 200, "the API without a token");
}

/// The server that each connected node ships to, as any of them says for all.
fn shipped_to(tapio: &Tapio, seen: &mut String) -> BTreeMap<String, String> {
    let status = tapio.tapioctl_json(&["status"]).unwrap_or_else(|error| {
        *seen = error;
        Vec::new()
    });
    let nodes = status.iter().filter_map(|status| status["nodes"].as_array()).flatten();
    let connected = nodes.filter(|node| node["connected"] == true);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let parts: BTreeMap<_, _> = connected.map(|node| (text(&node["node"]), text(&node["server"]))).collect();
    if !parts.is_empty() {
        *seen = format!("{parts:?}");
    }
    parts
}

fn of_container(namespace: &Namespace, owner: &str, container: &str) -> impl Fn(&str) -> bool + use<> {
    let (start, end) = (format!("{}/{owner}", namespace.0), format!("/{container}"));
    move |name| name.starts_with(&start) && name.ends_with(&end)
}

/// Kubelet kills what its probe refuses. The kernel's signal goes to one server, kubelet's Event to the other.
fn probe_kill(tapio: &Tapio, namespace: &Namespace) -> Value {
    let mut probed = container("probed", "busybox sleep 600");
    probed["livenessProbe"] =
        json!({"exec": {"command": ["/bin/busybox", "false"]}, "periodSeconds": 1, "failureThreshold": 1});
    namespace.apply(vec![pod("stuck", "Always", probed)]);
    let of_it = of_container(namespace, "stuck", "probed");
    tapio.finding("liveness-probe-kill", &of_it);
    namespace.delete("pod", "stuck");
    let found = tapio.found_alike(SERVERS, "liveness-probe-kill", is_named(&of_it));
    assert_eq!(found["death"]["signal_name"], "SIGKILL", "{found}");
    assert_eq!(found["entity"]["pod"], "stuck", "{found}");
    println!("{} from both: {}", found["id"], found["title"]);
    found
}

/// Whether a finding is about an entity of such a name.
fn is_named(is_it: impl Fn(&str) -> bool) -> impl Fn(&Value) -> bool {
    move |one| one["entity"]["name"].as_str().is_some_and(&is_it)
}

/// A release whose pods crash. Their deaths go to one server, the rollout to the other.
fn bad_release(tapio: &Tapio, namespace: &Namespace) -> Value {
    let front = Front::running("busybox sleep 600", 5, 2, 1);
    namespace.apply(vec![front.object()]);
    front.replace(namespace, "exit 1");
    let name = format!("{}/front", namespace.0);
    tapio.finding("bad-release", |entity| entity.contains(&name));
    namespace.delete("deployment", "front");
    let found = tapio.found_alike(SERVERS, "bad-release", is_named(|entity| entity.contains(&name)));
    assert_eq!(found["entity"]["workload"], "Deployment/front", "{found}");
    println!("{} from both: {}", found["id"], found["title"]);
    found
}

fn kill(tapio: &Tapio, namespace: &Namespace, name: &str) -> Value {
    let of_it = starts_to_eat(namespace, name);
    tapio.finding("memory-limit-kill", &of_it);
    ends_alike(tapio, namespace, name, &of_it)
}

/// Starts a Deployment whose container exceeds its memory limit, and tells by its name whether an entity is that container.
fn starts_to_eat(namespace: &Namespace, name: &str) -> impl Fn(&str) -> bool + use<> {
    namespace.apply(vec![deployment(name, eater("eater"))]);
    of_container(namespace, name, "eater")
}

/// Whether a finding says that such a container was killed.
fn is_killed(of_it: impl Fn(&str) -> bool) -> impl Fn(&Value) -> bool {
    let is_its = is_named(of_it);
    move |one| one["pattern"] == "memory-limit-kill" && is_its(one)
}

/// Deletes the Deployment, and waits until all servers have the same finding of it.
fn ends_alike(tapio: &Tapio, namespace: &Namespace, name: &str, of_it: impl Fn(&str) -> bool) -> Value {
    namespace.delete("deployment", name);
    let found = tapio.found_alike(SERVERS, "memory-limit-kill", is_named(of_it));
    println!("{} from both: {}", found["id"], found["title"]);
    found
}

/// Deletes NATS's pod and that of the server which the node ships to at once, and has a container killed before they are back.
fn kill_without_both(tapio: &Tapio, namespace: &Namespace, of_node: &str) -> Value {
    kubectl(&["-n", NAMESPACE, "delete", "pod", of_node, "tapio-nats-0", "--wait=false"]).expect("deleted");
    let name = "without-both";
    let of_it = starts_to_eat(namespace, name);
    is_known(tapio, 1, is_killed(&of_it));
    for what in [NATS, SERVER] {
        tapio.rolled_out(what);
    }
    alone_are(tapio, 0);
    // Without NATS it could not say that it leaves.
    await_within(GIVEN_UP_LIMIT, "that the deleted server is not missed any more", |seen| {
        tapio.tapioctl_json(&["findings"]).map_err(|error| *seen = error).ok()
    });
    ends_alike(tapio, namespace, name, &of_it)
}

/// Every server still has what was found, by the same ids.
fn stand(tapio: &Tapio, found: &[Value]) {
    servers_are(tapio, SERVERS);
    for one in found {
        let (pattern, id) = (one["pattern"].as_str().expect("a pattern"), &one["id"]);
        // Which of several pods it names may change while it grows.
        let of_it = tapio.found_alike(SERVERS, pattern, |found| found["id"] == *id);
        assert_eq!(of_it["entity"]["workload"], one["entity"]["workload"], "{of_it}");
    }
}

/// Waits until a finding is known to so many servers at least, whatever they say is missing.
fn is_known(tapio: &Tapio, servers: usize, is_meant: impl Fn(&Value) -> bool) {
    await_that(&format!("a finding that {servers} servers know"), |seen| {
        let pods = tapio.pods("server");
        let knows = |pod: &&Pod| match pod.known_findings() {
            Ok(all) => all.iter().any(&is_meant),
            Err(error) => {
                *seen = error;
                false
            }
        };
        let count = pods.iter().filter(knows).count();
        (pods.len() == SERVERS && count >= servers).then_some(())
    });
}

/// Waits until the log has what it lacked. Before, it may have a later death and not the earlier one that counts it.
fn nothing_is_sent_again(tapio: &Tapio) {
    await_that("that the log lacks nothing", |seen| {
        let whole = "tapio_server_log_healing_seconds 0";
        let is_whole = |pod: &Pod| pod.get_from(9091, "/metrics").unwrap_or_default().lines().any(|line| line == whole);
        let pods = tapio.pods("server");
        *seen = pods.iter().filter(|pod| !is_whole(pod)).map(|pod| format!("{} ", pod.name)).collect();
        (pods.len() == SERVERS && seen.is_empty()).then_some(())
    });
}

/// Waits until this many servers continue without the log.
fn alone_are(tapio: &Tapio, count: usize) {
    let is_alone = |pod: &Pod| {
        let text = pod.get_from(9091, "/metrics").unwrap_or_default();
        text.lines().any(|line| line == "tapio_server_log_alone 1")
    };
    await_that(&format!("that {count} servers are without the log"), |seen| {
        let pods = tapio.pods("server");
        let alone = pods.iter().filter(|pod| is_alone(pod)).count();
        *seen = format!("{alone} of {}", pods.len());
        (pods.len() == SERVERS && alone == count).then_some(())
    });
}
