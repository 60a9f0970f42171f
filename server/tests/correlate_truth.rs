//! Deaths that are easily explained wrongly: each with what it must not be taken for.

use tapio_wire::event::Role;
use tapio_wire::service::Finding;

use crate::correlate_node::{
    FullLimit, MIB, MS, Node, Process, SECOND, SIGKILL, SIGSEGV, SIGTERM, findings_of, patterns_of,
};

const LIMIT: u64 = 64 * MIB;
pub const SIGABRT: u32 = 6;
const SIGBUS: u32 = 7;
pub const SIGHUP: u32 = 1;
pub const SIGUSR1: u32 = 10;

pub fn first(entity: u64, pid: u32, comm: &'static str) -> Process {
    // Its pid namespace is the node's, or its pod's.
    Process { role: Role::First, ..Process::of_node(entity, pid, comm) }
}

pub fn member(entity: u64, pid: u32, comm: &'static str) -> Process {
    Process { role: Role::Member, parent_pid: 100, ..Process::child(entity, pid, comm) }
}

pub fn runc(node: &mut Node) -> Process {
    let host = node.host("/");
    Process::of_node(host, 50, "runc")
}

pub fn only(node: &Node) -> Finding {
    let mut found = findings_of(node);
    assert_eq!(found.len(), 1, "{found:#?}");
    found.remove(0)
}

#[test]
fn an_end_after_a_childs_oom_kill_is_its_consequence() {
    for status in [0, 1 << 8, 137 << 8, SIGTERM] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let (init, eater) = (first(web, 100, "sh"), member(web, 107, "eater"));
        node.oom(100 * SECOND, eater, LIMIT, LIMIT);
        node.signal(100 * SECOND, eater, SIGKILL, None);
        node.exit(100 * SECOND + MS, eater, SIGKILL);
        node.lethal(100 * SECOND + MS);
        node.exit(101 * SECOND, init, status);
        node.lethal(102 * SECOND);
        let found = only(&node);
        assert_eq!(found.pattern, "child-oom-exit", "{status}");
        assert!(found.title.contains("eater") && found.confidence >= 0.9, "{}", found.title);
    }
}

#[test]
fn a_stop_or_late_end_is_no_oom_consequence() {
    for (after_s, is_stopped, expected) in
        [(2, true, "stopped"), (4, false, "child-oom-before-exit"), (20, false, "exited-with-error")]
    {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let (init, eater) = (first(web, 100, "sh"), member(web, 107, "eater"));
        node.oom(100 * SECOND, eater, LIMIT, LIMIT);
        node.exit(100 * SECOND + MS, eater, SIGKILL);
        let end = (100 + after_s) * SECOND;
        if is_stopped {
            let runc = runc(&mut node);
            node.signal(end - MS, init, SIGTERM, Some(runc));
        }
        node.exit(end, init, 143 << 8);
        node.lethal(end + SECOND);
        let found = findings_of(&node);
        let of_init = found.iter().find(|finding| finding.death.as_ref().is_some_and(|death| death.pid == 100));
        assert_eq!(of_init.expect("the container's death").pattern, expected);
    }
}

#[test]
fn a_sessions_memory_kill_does_not_explain_its_containers_end() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let shell = Process { role: Role::Session, ..Process::child(web, 300, "bash") };
    node.oom(100 * SECOND, shell, LIMIT, LIMIT);
    node.exit(100 * SECOND + MS, shell, SIGKILL);
    node.exit(103 * SECOND, first(web, 100, "app"), 3 << 8);
    node.lethal(104 * SECOND);
    let found = findings_of(&node);
    let patterns: Vec<_> = found.iter().map(|finding| (finding.pattern.as_str(), finding.count)).collect();
    assert_eq!(patterns, [("session-oom", 1), ("exited-with-error", 1)], "{found:#?}");
}

#[test]
fn the_runtime_starts_the_first_process_in_any_pid_namespace() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let app = first(web, 100, "app");
    node.oom(100 * SECOND, app, LIMIT, LIMIT);
    node.exit(100 * SECOND + MS, app, SIGKILL);
    // The init of an inner namespace dies again and again: bubblewrap, a browser's sandbox.
    for pid in 200..206 {
        let inner = Process { role: Role::Member, ..Process::init(web, pid, "bwrap") };
        node.exit(110 * SECOND + u64::from(pid), inner, 1 << 8);
    }
    node.lethal(120 * SECOND);
    assert_eq!(patterns_of(&node), ["memory-limit-kill"]);
}

#[test]
fn sandboxes_and_runtime_processes_are_no_deaths_of_a_container() {
    let mut node = Node::new("n1");
    let runc = runc(&mut node);
    let pause = node.container_of("pod1", "pause", "pause");
    let sandbox = Process { role: Role::Sandbox, ..Process::init(pause, 90, "pause") };
    node.signal(100 * SECOND, sandbox, SIGTERM, Some(runc));
    node.exit(100 * SECOND + MS, sandbox, SIGTERM);
    let web = node.container_of("pod1", "web", "web");
    let stage = Process { role: Role::Runtime, ..Process::init(web, 95, "runc:[2:INIT]") };
    node.exit(101 * SECOND, stage, 1 << 8);
    node.lethal(102 * SECOND);
    assert_eq!(patterns_of(&node), [""; 0]);
}

#[test]
fn a_full_limit_other_than_the_victims_is_named() {
    const POD: &str = "/kubepods/burstable/pod8f1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f";
    for (cgroup, height, pattern, words) in [
        ("/web", 0, "memory-limit-kill", "its memory limit"),
        (POD, 1, "pod-limit-kill", "its pod reached the pod's memory limit"),
        ("/kubepods/burstable", 2, "node-allocatable-kill", "all burstable pods of the node"),
        ("/kubepods.slice", 3, "node-allocatable-kill", "all pods of the node"),
        ("/system.slice", 1, "slice-limit-kill", "the slice system.slice"),
    ] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let app = first(web, 100, "app");
        let full = FullLimit { cgroup, height, limit_bytes: LIMIT, usage_bytes: LIMIT, allocator_inside: 1 };
        node.oom_at(100 * SECOND, app, full);
        node.exit(100 * SECOND + MS, app, SIGKILL);
        node.lethal(101 * SECOND);
        let found = only(&node);
        assert_eq!(found.pattern, pattern, "{cgroup}");
        let title = found.title.replace("exceeded", "reached");
        assert!(title.contains(words), "{title}");
    }
}

#[test]
fn a_near_limit_does_not_explain_a_shortage_elsewhere() {
    // The allocator is outside: a shortage of the node, or a limit that was lowered under its use. Below it, with room: the same,
    // unless the kernel said that it kills for this limit.
    for (allocator_inside, usage_bytes, expected) in [
        (2, LIMIT, "node-memory-exhausted"),
        (2, LIMIT + 2 * MIB, "memory-limit-kill"),
        (1, LIMIT / 2, "node-memory-exhausted"),
        (3, LIMIT / 2, "memory-limit-kill"),
    ] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let app = first(web, 100, "app");
        let full = FullLimit { cgroup: "/web", height: 0, limit_bytes: LIMIT, usage_bytes, allocator_inside };
        node.oom_at(100 * SECOND, app, full);
        node.exit(100 * SECOND + MS, app, SIGKILL);
        node.lethal(101 * SECOND);
        assert_eq!(only(&node).pattern, expected);
    }
}

#[test]
fn what_filled_a_limit_decides_the_advice() {
    for (mib, words, others) in [
        ([55, 2, 1], "leak", ["tmpfs", "age cache filled"]),
        ([8, 0, 50], "tmpfs", ["leak", "age cache filled"]),
        ([8, 50, 0], "age cache filled", ["leak", "tmpfs"]),
    ] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let app = first(web, 100, "app");
        node.oom(100 * SECOND, app, LIMIT, LIMIT);
        node.cgroup_use(100 * SECOND + MS, app, LIMIT, mib, "");
        node.exit(100 * SECOND + 2 * MS, app, SIGKILL);
        node.lethal(101 * SECOND);
        let advice = only(&node).advice.join("\n");
        assert!(advice.contains(words), "{advice}");
        assert!(others.iter().all(|other| !advice.contains(other)), "{advice}");
    }
}

/// The cgroup was gone, or its memory given back, before it could be read.
#[test]
fn an_unread_limit_is_explained_by_the_victims_own_share() {
    for read in [None, Some([1, 0, 0]), Some([55, 2, 1])] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let app = first(web, 100, "app");
        node.oom(100 * SECOND, app, LIMIT, LIMIT);
        if let Some(mib) = read {
            node.cgroup_use(100 * SECOND + MS, app, LIMIT, mib, "");
        }
        node.exit(100 * SECOND + 2 * MS, app, SIGKILL);
        node.lethal(101 * SECOND);
        let found = only(&node);
        let advice = found.advice.join("\n");
        let is_in_time = read.is_some_and(|mib| mib[0] > 1);
        assert_eq!(advice.contains("victim's own share 56.0 MiB were anonymous memory"), !is_in_time, "{advice}");
        assert_eq!(advice.contains("Its own memory filled it"), is_in_time, "{advice}");
    }
}

#[test]
fn an_abort_and_a_fault_in_the_first_process_differ() {
    for (aborts, expected) in [(true, "aborted-as-init"), (false, "crashed")] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let app = Process { role: Role::First, ..Process::init(web, 100, "app") };
        if aborts {
            node.ignored(100 * SECOND, app, SIGABRT, app);
        }
        node.signal(100 * SECOND + MS, app, SIGSEGV, None);
        node.exit(100 * SECOND + 2 * MS, app, SIGSEGV);
        node.lethal(101 * SECOND);
        assert_eq!(only(&node).pattern, expected);
    }
}

#[test]
fn a_bus_error_names_the_mount_that_is_full() {
    for (mount, expected) in [("/dev/shm", "bus-error-full"), ("", "bus-error")] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let app = first(web, 100, "app");
        node.signal(100 * SECOND, app, SIGBUS, None);
        node.cgroup_use(100 * SECOND + MS, app, LIMIT, [1, 1, 1], mount);
        node.exit(100 * SECOND + 2 * MS, app, SIGBUS);
        node.lethal(101 * SECOND);
        let found = only(&node);
        assert_eq!(found.pattern, expected);
        assert!(found.title.contains(mount), "{}", found.title);
    }
}

#[test]
fn a_daemon_is_recognised_by_place_not_by_name() {
    for (unit, expected) in [("systemd-oomd.service", "oom-daemon-kill"), ("backup.service", "killed-from-outside")] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let app = first(web, 100, "app");
        let unit = node.unit(unit);
        node.signal(100 * SECOND, app, SIGKILL, Some(Process::of_node(unit, 60, "systemd-oomd")));
        node.exit(100 * SECOND + MS, app, SIGKILL);
        node.lethal(101 * SECOND);
        assert_eq!(only(&node).pattern, expected);
    }
}

#[test]
fn a_childs_crash_passed_on_by_its_parent_is_blamed() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let (init, worker) = (first(web, 100, "sh"), member(web, 107, "app"));
    node.signal(100 * SECOND, worker, SIGSEGV, None);
    node.exit(100 * SECOND + MS, worker, SIGSEGV);
    node.exit(100 * SECOND + 5 * MS, init, 139 << 8);
    node.lethal(101 * SECOND);
    let found = findings_of(&node);
    let of_init = found.iter().find(|finding| finding.death.as_ref().is_some_and(|death| death.pid == 100));
    assert_eq!(of_init.expect("the container's death").pattern, "child-crash-exit");
}

#[test]
fn a_different_exit_code_is_perhaps_the_crashs_consequence() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let (init, worker) = (first(web, 100, "sh"), member(web, 107, "app"));
    node.signal(100 * SECOND, worker, SIGSEGV, None);
    node.exit(100 * SECOND + MS, worker, SIGSEGV);
    node.exit(101 * SECOND, init, 1 << 8);
    node.lethal(102 * SECOND);
    let found = findings_of(&node);
    let of_init = found.iter().find(|finding| finding.death.as_ref().is_some_and(|death| death.pid == 100));
    let of_init = of_init.expect("the container's death");
    assert_eq!(of_init.pattern, "child-crash-before-exit");
    assert!(of_init.confidence < 0.8, "{of_init:#?}");
    assert!(found.iter().any(|finding| finding.pattern == "crashed"), "the crash stands for itself: {found:#?}");
}

#[test]
fn the_kernels_own_kill_is_named_or_possible() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let app = first(web, 100, "app");
    node.over_cpu_limit(100 * SECOND, app);
    node.exit(100 * SECOND + MS, app, SIGKILL);
    node.lethal(101 * SECOND);
    assert_eq!(only(&node).pattern, "cpu-limit-kill");

    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let app = first(web, 100, "app");
    node.signal(100 * SECOND, app, SIGKILL, None);
    node.exit(100 * SECOND + MS, app, SIGKILL);
    node.lethal(101 * SECOND);
    let found = only(&node);
    assert_eq!(found.pattern, "killed-by-kernel");
    assert!(found.confidence < 0.8, "{}", found.confidence);
}

#[test]
fn what_a_shell_could_not_find_is_reported() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    node.exit(2 * SECOND, first(web, 100, "sh"), 127 << 8);
    node.lethal(3 * SECOND);
    let found = only(&node);
    assert_eq!(found.pattern, "command-not-found");
}

#[test]
fn an_ended_init_takes_its_namespace_along() {
    let mut node = Node::new("n1");
    let pause = node.container_of("pod1", "pause", "pause");
    let web = node.container_of("pod1", "web", "web");
    let init = Process { role: Role::Sandbox, ..Process::init(pause, 90, "pause") };
    let app = first(web, 100, "app");
    node.exit(100 * SECOND, init, 0);
    node.signal(100 * SECOND + MS, app, SIGKILL, None);
    node.sent_while_running(90);
    node.exit(100 * SECOND + 2 * MS, app, SIGKILL);
    node.lethal(101 * SECOND);
    assert_eq!(only(&node).pattern, "pid-namespace-ended");
}

#[test]
fn deaths_of_a_pod_without_workload_are_one_counted_finding() {
    let mut node = Node::new("n1");
    for restart in 0..4u32 {
        let web = node.container_of("pod1", ["c1", "c2", "c3", "c4"][restart as usize], "web");
        let app = first(web, 100 + restart, "app");
        let at = (100 + 60 * u64::from(restart)) * SECOND;
        node.oom(at, app, LIMIT, LIMIT);
        node.exit(at + MS, app, SIGKILL);
        node.lethal(at + SECOND);
    }
    let found = only(&node);
    assert_eq!((&*found.pattern, found.count), ("memory-limit-kill", 4));
}

#[test]
fn a_shortages_second_victim_died_of_the_same_limit() {
    let killed = |first_at: u64| {
        let mut node = Node::new("n1");
        let web = node.container("c1", "0123456789ab");
        let (session, init) = (Process::child(web, 518, "eater"), Process::init(web, 509, "sh"));
        for (process, at, usage) in [(session, first_at, 32 * MIB), (init, 100 * SECOND, 4 * MIB)] {
            node.oom(at, process, 32 * MIB, usage);
            node.signal(at, process, SIGKILL, None);
            node.exit(at + MS, process, SIGKILL);
        }
        node.lethal(101 * SECOND);
        let found = findings_of(&node);
        let of_init = found.into_iter().find(|one| one.death.as_ref().is_some_and(|death| death.pid == 509));
        of_init.expect("it is found").pattern
    };
    assert_eq!(killed(100 * SECOND - 40 * MS), "second-limit-kill");
    assert_eq!(killed(40 * SECOND), "node-memory-exhausted", "the first one's memory was given back long ago");
}

#[test]
fn the_curve_before_a_memory_kill_shows_leak_or_spike() {
    let explained = |mib: Vec<u32>| {
        let mut node = Node::new("n1");
        let web = node.container("c1", "0123456789ab");
        let process = Process::init(web, 100, "java");
        node.oom(100 * SECOND, process, 100 * MIB, 100 * MIB);
        node.signal(100 * SECOND, process, SIGKILL, None);
        node.exit(100 * SECOND + MS, process, SIGKILL);
        node.curve(100 * SECOND + 2 * MS, web, 100 * MIB, mib);
        node.lethal(101 * SECOND);
        let found = findings_of(&node);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].pattern, "memory-limit-kill");
        (found[0].summary.clone(), found[0].advice.join(" "))
    };
    let (summary, advice) = explained((0..90).map(|at| 10 + at).collect());
    assert!(summary.contains("a leak") && advice.contains("Find the leak"), "{summary} {advice}");
    let (summary, advice) = explained([vec![20; 60], vec![99]].concat());
    assert!(summary.contains("a spike") && advice.contains("at once"), "{summary} {advice}");
    let (summary, _) = explained(vec![99; 3]);
    assert!(!summary.contains("leak") && !summary.contains("spike"), "{summary}");
}

#[test]
fn hundreds_of_ending_children_do_not_hide_their_inits_cause() {
    let mut node = Node::new("n1");
    let web = node.container("c1", "0123456789ab");
    let init = Process::init(web, 100, "postgres");
    node.oom(100 * SECOND, init, 32 * MIB, 32 * MIB);
    node.signal(100 * SECOND, init, SIGKILL, None);
    for number in 0..300 {
        let child = Process::child(web, 200 + number, "postgres");
        node.signal(100 * SECOND + MS, child, SIGKILL, None);
        node.exit(100 * SECOND + 2 * MS, child, SIGKILL);
    }
    node.exit(100 * SECOND + 3 * MS, init, SIGKILL);
    node.lethal(101 * SECOND);
    let of_init: Vec<_> =
        findings_of(&node).into_iter().filter(|one| one.death.as_ref().is_some_and(|death| death.pid == 100)).collect();
    assert_eq!(of_init.len(), 1, "{of_init:#?}");
    assert_eq!(of_init[0].pattern, "memory-limit-kill");
}

#[test]
fn an_oom_kill_does_not_explain_another_signals_exit_code() {
    for (signal, from_outside, expected) in [
        (SIGTERM, true, "child-killed-exit"),
        (SIGKILL, true, "child-killed-exit"),
        (SIGSEGV, false, "child-crash-exit"),
    ] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let session = node.unit("session-3.scope");
        let (init, eater, other) = (first(web, 100, "sh"), member(web, 107, "eater"), member(web, 108, "sleep"));
        node.oom(100 * SECOND, eater, LIMIT, LIMIT);
        node.signal(100 * SECOND, eater, SIGKILL, None);
        node.exit(100 * SECOND + MS, eater, SIGKILL);
        let sender = from_outside.then(|| Process::of_node(session, 55, "bash"));
        node.signal(101 * SECOND, other, signal, sender);
        node.exit(101 * SECOND + MS, other, signal);
        node.exit(101 * SECOND + 2 * MS, init, (128 + signal) << 8);
        node.lethal(102 * SECOND);
        let found = findings_of(&node);
        let of_init = found.iter().find(|finding| finding.death.as_ref().is_some_and(|death| death.pid == 100));
        assert_eq!(of_init.expect("the container's death").pattern, expected, "{signal}");
    }
}

/// A native sidecar is an init container that is always restarted: Kubernetes lists it among those that end before the others begin.
#[test]
fn a_sidecars_memory_kill_is_its_own() {
    let mut node = Node::new("n1");
    let cart = node.kube_container_named("Deployment/cart", "shop/cart-1", "c1", "web");
    let proxy = node.kube_container_named("Deployment/cart", "shop/cart-1", "c2", "proxy");
    let pod = node.kube_pod("Deployment/cart", "shop/cart-1");
    node.runs(10 * SECOND, pod, "web");
    for time in 0..3 {
        let at = (100 + 20 * time) * SECOND;
        let envoy = first(proxy, 200 + time as u32, "envoy");
        node.init_runs(at - 10 * SECOND, pod, "proxy");
        node.signal(at, envoy, SIGKILL, None);
        node.oom(at + MS, envoy, LIMIT, LIMIT);
        node.exit(at + 2 * MS, envoy, SIGKILL);
        node.init_ends(at + SECOND, pod, ["proxy", "OOMKilled"]);
    }
    node.lethal(200 * SECOND);
    let found = only(&node);
    assert_eq!((found.pattern.as_str(), found.count), ("memory-limit-kill", 3), "{found:#?}");
    let entity = found.entity.as_ref().expect("an entity");
    assert_eq!((&*entity.container, &*entity.pod), ("proxy", "cart-1"));
    assert!(found.title.contains("proxy") && found.confidence > 0.9, "{found:#?}");
    // The application's own end is another matter.
    node.exit(210 * SECOND, first(cart, 100, "cart"), 1 << 8);
    node.lethal(211 * SECOND);
    let found = findings_of(&node);
    let container = |one: &Finding| one.entity.as_ref().map(|entity| entity.container.clone()).unwrap_or_default();
    let mut told: Vec<_> = found.iter().map(|one| (container(one), one.pattern.as_str())).collect();
    told.sort();
    assert_eq!(told, [("proxy".into(), "memory-limit-kill"), ("web".into(), "exited-with-error")], "{found:#?}");
}
