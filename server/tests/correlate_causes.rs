//! Causes that are easily blamed for what something else did.

use crate::correlate_node::{
    FullLimit, MIB, MS, Machine, Node, Process, SECOND, SIGKILL, SIGSEGV, SIGTERM, findings_of, patterns_of,
};
use crate::correlate_patterns_kube::dying;
use crate::correlate_truth::{first, member, runc};
use tapio_server::findings::PatternSet;
use tapio_wire::event::{EntityId, Role};
use tapio_wire::service::Finding;

const LIMIT: u64 = 64 * MIB;
const SIGSYS: u32 = 31;
const TIMED_OUT: &str = "Liveness probe failed: Get \"http://10.0.0.7:80/\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)";
const UNAVAILABLE: &str = "Liveness probe failed: HTTP probe failed with statuscode: 503";
const KILLING: &str = "Container web failed liveness probe, will be restarted";

fn web(node: &mut Node) -> EntityId {
    node.kube_container("Deployment/web", "shop/web-0", "c0")
}

fn of<'a>(found: &'a [Finding], pattern: &str) -> Option<&'a Finding> {
    found.iter().find(|finding| finding.pattern == pattern)
}

#[test]
fn a_childs_memory_kill_names_whose_limit_was_full() {
    for (cgroup, height, says) in [
        ("/web", 0, "raise the limit of 64.0 MiB above its peak"),
        ("/kubepods/pod01234567-89ab-cdef-0123-456789abcdef", 1, "the pod's limit of 64.0 MiB that was full"),
        ("/kubepods", 2, "a higher limit of the container helps nothing"),
    ] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let eater = member(web, 107, "eater");
        let full = FullLimit { cgroup, height, limit_bytes: LIMIT, usage_bytes: LIMIT, allocator_inside: 1 };
        node.oom_at(100 * SECOND, eater, full);
        node.exit(100 * SECOND + MS, eater, SIGKILL);
        node.lethal(110 * SECOND);
        let found = findings_of(&node);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].pattern, "silent-child-oom");
        let of_limits: Vec<&String> = found[0].advice.iter().filter(|line| line.contains("64.0 MiB")).collect();
        assert!(of_limits.len() == 1 && of_limits[0].contains(says), "{cgroup}: {of_limits:?}");
    }
}

#[test]
fn only_a_timeout_is_blamed_on_throttling_or_a_stall() {
    for (message, is_throttled, expected) in [
        (TIMED_OUT, true, "throttled-into-probe-failure"),
        (UNAVAILABLE, true, "liveness-probe-kill"),
        (TIMED_OUT, false, "reclaim-stall-probe-failure"),
        (UNAVAILABLE, false, "liveness-probe-kill"),
    ] {
        let mut node = Node::new("n1");
        let web = web(&mut node);
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        if !is_throttled {
            node.reclaim(90 * SECOND, web);
        }
        node.kube_event(98 * SECOND, pod, "Unhealthy", message);
        if is_throttled {
            node.throttling(100 * SECOND + MS, web, 600);
        }
        node.stop(web, 100 * SECOND);
        let found = findings_of(&node);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].pattern, expected, "{message}");
    }
}

#[test]
fn a_probe_kill_is_certain_only_where_kubelet_says_so() {
    for (is_said, certain) in [(true, true), (false, false)] {
        let mut node = Node::new("n1");
        let web = web(&mut node);
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        node.kube_event(98 * SECOND, pod, "Unhealthy", UNAVAILABLE);
        if is_said {
            node.kube_event(101 * SECOND, pod, "Killing", KILLING);
        }
        node.stop(web, 100 * SECOND);
        let found = findings_of(&node);
        assert_eq!(found[0].pattern, "liveness-probe-kill", "{found:#?}");
        assert_eq!(found[0].confidence >= 0.8, certain, "{}", found[0].confidence);
    }
}

#[test]
fn a_deletion_heard_of_late_is_no_probe_kill() {
    // Kubelet may have killed the container before for its probe, and started it again.
    for killed_before in [false, true] {
        let mut node = Node::new("n1");
        let web = web(&mut node);
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        node.kube_event(20 * SECOND, pod, "Unhealthy", UNAVAILABLE);
        if killed_before {
            node.kube_event(20 * SECOND, pod, "Killing", KILLING);
        }
        node.stop(web, 100 * SECOND);
        // The collector that watches the cluster is slower than the kernel.
        node.pod_state(105 * SECOND, pod, "", true);
        node.lethal(106 * SECOND);
        let found = patterns_of(&node);
        assert!(!found.contains(&"liveness-probe-kill".to_owned()), "{killed_before}: {found:?}");
    }
}

/// Kubelet kills what its probe refuses; somebody deletes the pod while it takes its grace period, or right after.
#[test]
fn a_deletion_after_a_probe_kill_began_changes_nothing() {
    // Kubelet says at once why it kills.
    for deleted in [99, 109, 125, 131] {
        let mut node = Node::new("n1");
        let web = web(&mut node);
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        let (process, shim) = (Process::init(web, 100, "web"), node.shim());
        node.kube_event(98 * SECOND, pod, "Unhealthy", UNAVAILABLE);
        node.kube_event(98 * SECOND, pod, "Killing", KILLING);
        node.signal(98 * SECOND, process, SIGTERM, Some(shim));
        node.signal(128 * SECOND, process, SIGKILL, Some(shim));
        node.exit(128 * SECOND, process, SIGKILL);
        node.pod_state(deleted * SECOND, pod, "", true);
        node.lethal(132 * SECOND);
        let found = patterns_of(&node);
        assert!(found.contains(&"liveness-probe-kill".to_owned()), "deleted at {deleted} s: {found:?}");
        assert!(!found.contains(&"ignored-sigterm".to_owned()), "deleted at {deleted} s: {found:?}");
    }
}

/// The runtime asks a container to stop at `asked`, and its first process ends with code 1 at `ended`.
fn stops_with_an_error(node: &mut Node, entity: EntityId, pid: u32, asked: u64, ended: u64) {
    let (process, shim) = (Process::init(entity, pid, "npm"), node.shim());
    node.signal(asked, process, SIGTERM, Some(shim));
    node.exit(ended, process, 1 << 8);
}

#[test]
fn old_pods_stopped_with_an_error_are_no_bad_release() {
    let mut node = Node::new("n1");
    node.rollout(90 * SECOND, "Deployment/web", "shop", Some("shop/web:1"));
    for replica in 0..3u32 {
        let web = node.kube_container("Deployment/web", &format!("shop/web-{replica}"), &format!("c{replica}"));
        let asked = (100 + 10 * u64::from(replica)) * SECOND;
        stops_with_an_error(&mut node, web, 100 + replica, asked, asked + SECOND);
    }
    node.lethal(140 * SECOND);
    let found = patterns_of(&node);
    assert_eq!(found, ["stopped"], "asked to stop, it is not the release");
}

#[test]
fn an_asked_old_pod_does_not_count_for_a_release() {
    let mut node = Node::new("n1");
    node.rollout(90 * SECOND, "Deployment/web", "shop", Some("shop/web:1"));
    let old = node.kube_container("Deployment/web", "shop/web-0", "c0");
    stops_with_an_error(&mut node, old, 100, 99 * SECOND, 100 * SECOND);
    let new = node.kube_container("Deployment/web", "shop/web-1", "c1");
    node.exit(110 * SECOND, Process::init(new, 101, "npm"), 1 << 8);
    node.lethal(111 * SECOND);
    assert!(!patterns_of(&node).contains(&"bad-release".to_owned()));
}

#[test]
fn crashes_of_the_release_before_are_not_the_new_ones() {
    let mut node = Node::new("n1");
    // What the pods run is `shop/web:2`, which goes.
    node.rollout_of(90 * SECOND, "Deployment/web", "shop", Some("shop/web:2"), "shop/proxy:1,shop/web:3");
    dying(&mut node, 100);
    assert!(!patterns_of(&node).contains(&"bad-release".to_owned()));
}

#[test]
fn a_child_that_dies_during_a_stop_is_no_cause() {
    for kills in [false, true] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let (init, child) = (first(web, 100, "sh"), member(web, 107, "worker"));
        let runc = runc(&mut node);
        node.signal(85 * SECOND, init, SIGTERM, Some(runc));
        if kills {
            node.oom(100 * SECOND, child, LIMIT, LIMIT);
            node.exit(100 * SECOND + MS, child, SIGKILL);
            node.exit(101 * SECOND, init, 137 << 8);
        } else {
            node.exit(100 * SECOND, child, SIGSEGV);
            node.exit(101 * SECOND, init, 139 << 8);
        }
        node.lethal(102 * SECOND);
        let found = findings_of(&node);
        let of_init = found.iter().find(|finding| finding.death.as_ref().is_some_and(|death| death.pid == 100));
        assert_eq!(of_init.map(|finding| &*finding.pattern), Some("stopped"), "{found:#?}");
    }
}

#[test]
fn a_crash_loop_counts_no_stopped_or_explained_deaths() {
    for is_stopped in [true, false] {
        let mut node = Node::new("n1");
        let web = web(&mut node);
        for (turn, pid) in (0..3u64).zip(100..) {
            let at = (100 + 60 * turn) * SECOND;
            let init = Process::init(web, pid, "app");
            if turn == 2 {
                node.exit(at, init, 1 << 8);
            } else if is_stopped {
                stops_with_an_error(&mut node, web, pid, at - SECOND, at);
            } else {
                let eater = Process { parent_pid: pid, ..Process::child(web, 1000 + pid, "eater") };
                node.oom(at - 10 * MS, eater, LIMIT, LIMIT);
                node.exit(at - 5 * MS, eater, SIGKILL);
                node.exit(at, init, 1 << 8);
            }
            node.lethal(at + SECOND);
        }
        let found = findings_of(&node);
        assert!(of(&found, "crash-loop").is_none(), "{found:#?}");
        let last = found.iter().find(|finding| finding.death.as_ref().is_some_and(|death| death.pid == 102));
        assert_eq!(last.map(|finding| &*finding.pattern), Some("exited-with-error"), "{found:#?}");
    }
}

#[test]
fn a_forbidden_system_call_is_no_fault_of_memory() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let app = first(web, 100, "app");
    node.signal(100 * SECOND, app, SIGSYS, None);
    node.exit(100 * SECOND + MS, app, SIGSYS);
    node.lethal(101 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, "forbidden-system-call");
}

#[test]
fn a_sigsys_that_somebody_sends_is_no_seccomp_filter() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let (app, other) = (first(web, 100, "app"), member(web, 107, "helper"));
    node.signal(100 * SECOND, app, SIGSYS, Some(other));
    node.exit(100 * SECOND + MS, app, SIGSYS);
    node.lethal(101 * SECOND);
    assert!(!patterns_of(&node).contains(&"forbidden-system-call".to_owned()));
}

/// What is found when kubelet's words come at every possible moment: by id, pattern and count.
#[test]
fn a_group_of_probe_kills_ignores_the_order() {
    // The node sees both deaths; the first was a probe's kill, the second the pod's deletion.
    let mut kernel = Node::new("n1");
    let web = web(&mut kernel);
    let shim = kernel.shim();
    for (turn, pid) in (0..2u64).zip(100..) {
        let at = (100 + 20 * turn) * SECOND;
        let init = Process::init(web, pid, "app");
        kernel.signal(at, init, SIGTERM, Some(shim));
        kernel.signal(at + 2 * SECOND, init, SIGKILL, Some(shim));
        kernel.exit(at + 2 * SECOND + MS, init, SIGKILL);
        kernel.lethal(at + 3 * SECOND);
    }
    let said = |name: &str, at: u64, what: &dyn Fn(&mut Node, EntityId, u64)| {
        let mut node = Node::new(name);
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        what(&mut node, pod, at);
        node.lethal(at);
        node
    };
    let unhealthy = said("k1", 99 * SECOND, &|node, pod, at| node.kube_event(at, pod, "Unhealthy", UNAVAILABLE));
    let killing = said("k2", 100 * SECOND, &|node, pod, at| node.kube_event(at, pod, "Killing", KILLING));
    let deleting = said("k3", 119 * SECOND, &|node, pod, at| node.pod_state(at, pod, "", true));
    let mut all: Option<Vec<(String, String, u32)>> = None;
    // Two frames of the node, in their order, and three others before, between and after them.
    let words = [&unhealthy, &killing, &deleting];
    for places in 0..27usize {
        let place = |word: usize| places / 3usize.pow(word as u32) % 3;
        let machine = Machine::with(1, PatternSet::embedded().expect("valid"));
        for turn in 0..3 {
            for (_, node) in words.iter().enumerate().filter(|(word, _)| place(*word) == turn) {
                machine.deliver(&node.node, &node.frames);
                machine.settle();
            }
            if let Some(frame) = kernel.frames.get(turn) {
                machine.deliver(&kernel.node, std::slice::from_ref(frame));
                machine.settle();
            }
        }
        let mut found: Vec<(String, String, u32)> =
            machine.findings().into_iter().map(|finding| (finding.id, finding.pattern, finding.count)).collect();
        found.sort();
        let expected = all.get_or_insert_with(|| found.clone());
        assert_eq!(found, *expected, "{places}");
    }
    let patterns: Vec<String> = all.into_iter().flatten().map(|(_, pattern, _)| pattern).collect();
    assert!(patterns.contains(&"liveness-probe-kill".to_owned()), "{patterns:?}");
}

#[test]
fn an_application_called_pause_is_no_sandbox() {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    node.exit(100 * SECOND, Process { role: Role::Sandbox, ..Process::init(web, 100, "pause") }, 1 << 8);
    node.lethal(101 * SECOND);
    assert_eq!(patterns_of(&node), ["exited-with-error"]);
}

#[test]
fn a_release_that_went_well_for_long_is_not_bad() {
    for (lasted_s, is_bad) in [(20, true), (1_500, false)] {
        let mut node = Node::new("n1");
        node.rollout(90 * SECOND, "Deployment/web", "shop", Some("shop/web:1"));
        dying(&mut node, 100 + lasted_s);
        assert_eq!(patterns_of(&node).contains(&"bad-release".to_owned()), is_bad, "{lasted_s}");
    }
}

/// A pod's history keeps so many clues that a long loop is not all in it.
#[test]
fn what_is_forgotten_changes_no_explanation() {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    let shim = node.shim();
    for (turn, pid) in (0..150u64).zip(100..) {
        let at = (100 + 4 * turn) * SECOND;
        let init = Process::init(web, pid, "app");
        // Every third was asked to end.
        if turn % 3 == 0 {
            node.signal(at - SECOND, init, SIGTERM, Some(shim));
        }
        node.exit(at, init, 1 << 8);
        node.lethal(at + MS);
    }
    let machine = Machine::with(1, PatternSet::embedded().expect("valid"));
    machine.deliver(&node.node, &node.frames);
    let found = |machine: &Machine| -> Vec<(String, String, u32)> {
        let mut found: Vec<_> =
            machine.findings().into_iter().map(|finding| (finding.id, finding.pattern, finding.count)).collect();
        found.sort();
        found
    };
    let before = found(&machine);
    assert!(before.iter().any(|(_, pattern, count)| pattern == "crash-loop" && *count == 100), "{before:?}");
    // Kubernetes tells the container's name anew: all its clues are looked at again.
    let sent = node.frames.len();
    node.kube_container_named("Deployment/web", "shop/web-0", "c0", "renamed");
    node.exit(800 * SECOND, Process::child(web, 2_000, "helper"), 0);
    node.lethal(801 * SECOND);
    machine.deliver(&node.node, &node.frames[sent..]);
    machine.settle();
    assert_eq!(found(&machine), before);
}
