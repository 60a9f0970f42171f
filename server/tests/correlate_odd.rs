//! Situations that are common, and odd: what happens beside a death is easily taken for its cause.

use tapio_wire::event::{Detail, Lane, Role};
use tapio_wire::service::Finding;

use crate::correlate_node::{
    MIB, MS, Machine, Node, Process, SECOND, SIGKILL, SIGSEGV, SIGTERM, findings_of, patterns_of,
};

const UNAVAILABLE: &str = "Liveness probe failed: HTTP probe failed with statuscode: 503";
const KILLING: &str = "Container web failed liveness probe, will be restarted";
const LIMIT: u64 = 64 * MIB;

fn sorted(node: &Node) -> Vec<String> {
    let mut found = patterns_of(node);
    found.sort();
    found
}

fn certain(found: &[Finding]) -> Vec<&str> {
    found.iter().filter(|one| one.confidence >= 0.8).map(|one| &*one.pattern).collect()
}

#[test]
fn a_sidecars_shortage_is_not_its_neighbours_probe_failure() {
    const EMFILE: u32 = 24;
    const EAGAIN: u32 = 11;
    for (errno, own) in [(EMFILE, "descriptor-leak"), (EAGAIN, "pid-limit")] {
        for (name, expected) in [("web", vec![own]), ("sidecar", vec!["liveness-probe-kill"])] {
            let mut node = Node::new("n1");
            let web = node.kube_container("Deployment/web", "shop/web-0", "c0");
            let short = match name {
                "web" => web,
                name => node.kube_container_named("Deployment/web", "shop/web-0", "c1", name),
            };
            let pod = node.kube_pod("Deployment/web", "shop/web-0");
            node.syscall_error(90 * SECOND, short, errno);
            node.kube_event(98 * SECOND, pod, "Unhealthy", UNAVAILABLE);
            node.kube_event(101 * SECOND, pod, "Killing", KILLING);
            node.stop(web, 100 * SECOND);
            assert_eq!(patterns_of(&node), expected, "{errno} of {name}");
        }
    }
}

#[test]
fn an_oom_daemons_earlier_signal_is_no_later_kill() {
    for (by, signal, expected) in [
        (Some("bash"), SIGKILL, "killed-from-outside"),
        (None, SIGSEGV, "crashed"),
        (Some("earlyoom"), SIGKILL, "oom-daemon-kill"),
    ] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let (daemon, session) = (node.unit("earlyoom.service"), node.unit("session-3.scope"));
        let app = Process { role: Role::First, ..Process::of_node(web, 100, "app") };
        node.signal(100 * SECOND, app, SIGTERM, Some(Process::of_node(daemon, 50, "earlyoom")));
        let sender = by.map(|comm| Process::of_node(if comm == "bash" { session } else { daemon }, 55, comm));
        node.signal(140 * SECOND, app, signal, sender);
        node.exit(140 * SECOND + MS, app, signal);
        node.lethal(141 * SECOND);
        let found = findings_of(&node);
        assert_eq!(certain(&found), [expected], "{by:?} {signal}");
    }
}

#[test]
fn an_error_that_is_no_disks_fault_replaces_no_disk() {
    // EIO and ENODATA (a medium's fault); not supported, no space in a thin pool, reserved by another host, a lost path.
    for (error, is_failing) in [(-5, true), (-61, true), (-95, false), (-28, false), (-52, false), (-67, false)] {
        let mut node = Node::new("n1");
        let itself = node.itself();
        let io = Detail::BlockIo { latency_ns: MS, bytes: 4096, device: 8 << 20, error, operation: 1 };
        node.push(100 * SECOND, itself, 0, io);
        node.frame(Lane::Bulk, 101 * SECOND);
        assert_eq!(!patterns_of(&node).is_empty(), is_failing, "{error}");
    }
}

#[test]
fn a_sidecar_that_no_release_changed_is_not_its_fault() {
    for (before, is_bad) in [("shop/web:1,shop/proxy:1", true), ("shop/web:2,shop/proxy:1", false)] {
        let mut node = Node::new("n1");
        // What crashes runs `shop/web:2`.
        node.rollout_of(90 * SECOND, "Deployment/web", "shop", Some(before), "shop/web:2,shop/proxy:2");
        for replica in 0..3u32 {
            let web = node.kube_container("Deployment/web", &format!("shop/web-{replica}"), &format!("c{replica}"));
            node.exit((100 + u64::from(replica)) * SECOND, Process::init(web, 100 + replica, "app"), 1 << 8);
        }
        node.lethal(110 * SECOND);
        assert_eq!(patterns_of(&node).contains(&"bad-release".to_owned()), is_bad, "{before}");
    }
}

/// Both releases crash: before the new one, between, or after it.
#[test]
fn a_release_is_not_blamed_while_its_predecessor_crashes() {
    let asked = |node: &mut Node, process, at| {
        let shim = node.shim();
        node.signal(at, process, SIGTERM, Some(shim));
    };
    for (at_s, is_asked, expected) in [
        (99, false, "release-or-dependency"),
        (101, false, "release-or-dependency"),
        (130, false, "release-or-dependency"),
        (101, true, "bad-release"),
        // It had crashed before the release.
        (80, false, "release-or-dependency"),
    ] {
        let mut node = Node::new("n1");
        node.rollout_of(90 * SECOND, "Deployment/web", "shop", Some("shop/web:1"), "shop/web:2");
        let new = |replica: u64| ((99 + replica) * SECOND + MS, replica, "shop/web:2");
        let mut exits = vec![(at_s * SECOND, 0, "shop/web:1"), new(1), new(2), new(3)];
        exits.sort_unstable();
        for (at, replica, image) in exits {
            let pod = format!("shop/web-{replica}");
            let web = node.kube_container_of_image("Deployment/web", &pod, &pod, ["web", image]);
            let process = Process::init(web, 100 + replica as u32, "app");
            if is_asked && replica == 0 {
                asked(&mut node, process, at - 10 * MS);
            }
            node.exit(at, process, 1 << 8);
        }
        node.lethal(140 * SECOND);
        let found = findings_of(&node);
        let of_release: Vec<&str> = found.iter().map(|one| &*one.pattern).filter(|id| id.contains("release")).collect();
        assert_eq!(of_release, [expected], "{at_s} {is_asked}: {found:#?}");
        assert!(!certain(&found).contains(&"release-or-dependency"), "{found:#?}");
    }
}

/// A process of another node that was asked to stop has the number of one that crashes.
#[test]
fn a_pid_of_another_node_is_another_process() {
    let mut nodes = [Node::new("n1"), Node::new("n2")];
    let [crashing, stopping] = &mut nodes;
    crashing.rollout(90 * SECOND, "Deployment/web", "shop", Some("shop/web:1"));
    for replica in 0..3u32 {
        let at = (100 + u64::from(replica)) * SECOND;
        let pod = format!("shop/web-{replica}");
        let web = crashing.kube_container("Deployment/web", &pod, &pod);
        crashing.exit(at, Process::init(web, 100 + replica, "app"), 1 << 8);
        let pod = format!("shop/web-old-{replica}");
        let old = stopping.kube_container("Deployment/web", &pod, &pod);
        let (process, shim) = (Process::init(old, 100 + replica, "app"), stopping.shim());
        stopping.signal(at - 10 * MS, process, SIGTERM, Some(shim));
        stopping.exit(at, process, 0);
    }
    let machine = Machine::start(1);
    for node in &mut nodes {
        node.lethal(110 * SECOND);
        machine.deliver(&node.node, &node.frames);
        machine.settle();
    }
    let found: Vec<String> = machine.findings().into_iter().map(|one| one.pattern).collect();
    assert!(found.contains(&"bad-release".to_owned()), "{found:?}");
}

#[test]
fn two_containers_that_die_together_are_no_crash_loop() {
    let mut node = Node::new("n1");
    for turn in 0..2u64 {
        for (key, name, pid) in [("a", "web", 100), ("b", "sidecar", 200)] {
            let key = format!("{key}{turn}");
            let container = node.kube_container_named("Deployment/web", "shop/web-0", &key, name);
            let at = (100 + 20 * turn) * SECOND;
            node.exit(at, Process::init(container, pid + turn as u32, "app"), 1 << 8);
        }
    }
    node.lethal(130 * SECOND);
    assert!(!patterns_of(&node).contains(&"crash-loop".to_owned()), "each died twice");
}

#[test]
fn a_sidecar_killed_at_its_pods_end_was_only_slow() {
    let mut node = Node::new("n1");
    let sidecar = node.kube_container_named("Deployment/web", "shop/web-0", "c1", "proxy");
    let pod = node.kube_pod("Deployment/web", "shop/web-0");
    let (proxy, shim) = (Process::init(sidecar, 200, "envoy"), node.shim());
    node.pod_state(100 * SECOND, pod, "", true);
    // Kubelet stops sidecars last, with what is left of the grace period.
    node.signal(128 * SECOND, proxy, SIGTERM, Some(shim));
    node.signal(130 * SECOND, proxy, SIGKILL, Some(shim));
    node.exit(130 * SECOND + MS, proxy, SIGKILL);
    node.lethal(131 * SECOND);
    let found = findings_of(&node);
    assert_eq!(certain(&found), ["ignored-sigterm"], "{found:#?}");
    let advice =
        found.iter().flat_map(|one| &one.advice).any(|advice| advice.contains("terminationGracePeriodSeconds"));
    assert!(advice, "{found:#?}");
}

#[test]
fn a_probe_kill_after_a_childs_memory_kill_is_both() {
    let mut node = Node::new("n1");
    let web = node.kube_container("Deployment/web", "shop/web-0", "c0");
    let pod = node.kube_pod("Deployment/web", "shop/web-0");
    let worker = Process { role: Role::Member, parent_pid: 100, ..Process::child(web, 107, "worker") };
    node.oom(60 * SECOND, worker, LIMIT, LIMIT);
    node.signal(60 * SECOND, worker, SIGKILL, None);
    node.exit(60 * SECOND + MS, worker, SIGKILL);
    node.lethal(61 * SECOND);
    // The first process waits for its worker, and answers nobody.
    node.kube_event(98 * SECOND, pod, "Unhealthy", UNAVAILABLE);
    node.kube_event(101 * SECOND, pod, "Killing", KILLING);
    node.stop(web, 100 * SECOND);
    assert_eq!(sorted(&node), ["liveness-probe-kill", "silent-child-oom"]);
}

#[test]
fn a_memory_kill_while_kubelet_stops_it_is_the_kernels() {
    let mut node = Node::new("n1");
    let web = node.kube_container("Deployment/web", "shop/web-0", "c0");
    let pod = node.kube_pod("Deployment/web", "shop/web-0");
    let (app, shim) = (Process::init(web, 100, "app"), node.shim());
    node.kube_event(98 * SECOND, pod, "Unhealthy", UNAVAILABLE);
    node.kube_event(99 * SECOND, pod, "Killing", KILLING);
    node.signal(100 * SECOND, app, SIGTERM, Some(shim));
    node.oom(104 * SECOND, app, LIMIT, LIMIT);
    node.signal(104 * SECOND, app, SIGKILL, None);
    node.exit(104 * SECOND + MS, app, SIGKILL);
    node.lethal(105 * SECOND);
    assert_eq!(patterns_of(&node), ["memory-limit-kill"]);
}

#[test]
fn kubelet_that_is_started_anew_has_not_failed() {
    for (sub_state, result, expected) in [("dead", "success", false), ("auto-restart", "exit-code", true)] {
        let mut node = Node::new("n1");
        let kubelet = node.unit("kubelet.service");
        let systemd = node.unit("init.scope");
        let process = Process::of_node(kubelet, 900, "kubelet");
        node.signal(100 * SECOND, process, SIGTERM, Some(Process::of_node(systemd, 1, "systemd")));
        node.exit(101 * SECOND, process, if expected { 1 << 8 } else { 0 });
        node.unit_state(101 * SECOND, kubelet, "kubelet.service", sub_state, result);
        node.node_condition(140 * SECOND, "Ready", 2);
        node.lethal(150 * SECOND);
        let found = findings_of(&node);
        assert_eq!(certain(&found).contains(&"runtime-died"), expected, "{found:#?}");
        assert!(expected || certain(&found).is_empty(), "{found:#?}");
    }
}

/// The clock of the node that watches Kubernetes is set otherwise than that of the pod's node.
#[test]
fn clocks_that_differ_blame_nobody() {
    for ahead_s in [-600i64, -30, 30, 600] {
        let mut watcher = Node::new("k1");
        watcher.booted_ns = watcher.booted_ns.saturating_add_signed(ahead_s * SECOND as i64);
        let pod = watcher.kube_pod("Deployment/web", "shop/web-0");
        watcher.pod_state(1000 * SECOND, pod, "", true);
        watcher.pod_gone(1003 * SECOND, pod);
        watcher.lethal(1004 * SECOND);
        let mut node = Node::new("n1");
        let web = node.kube_container("Deployment/web", "shop/web-0", "c0");
        node.stop(web, 1001 * SECOND);
        let machine = Machine::start(1);
        machine.deliver(&watcher.node, &watcher.frames);
        machine.deliver(&node.node, &node.frames);
        let found = machine.findings();
        let patterns: Vec<&str> = found.iter().map(|one| &*one.pattern).collect();
        assert!(patterns.contains(&"pod-deleted"), "{ahead_s}: {patterns:?}");
        assert!(found.iter().all(|one| ["pod-deleted", "stopped"].contains(&&*one.pattern)), "{ahead_s}: {patterns:?}");
    }
}
