//! What is wrong with what lives: it has a beginning and an end.

use crate::correlate_node::{
    BOOTED, FullLimit, MIB, MS, Machine, Node, Process, SECOND, SIGKILL, SIGTERM, findings_of, only_state,
};
use tapio_wire::event::Point;

const SIGABRT: u32 = 6;
const WEB: [&str; 3] = ["Deployment/web", "shop/web-1", "c1"];

fn web(node: &mut Node) -> u64 {
    let [workload, pod, key] = WEB;
    node.kube_container(workload, pod, key)
}

fn pod(node: &mut Node) -> u64 {
    let [workload, pod, _] = WEB;
    node.kube_pod(workload, pod)
}

#[test]
fn troubles_of_what_lives_have_a_beginning_and_an_end() {
    for (what, place, expected, says) in [
        ("throttled", "", "throttled-now", "97 %"),
        ("pids-at-limit", "", "pids-at-limit", "97 of 100"),
        ("memory-high", "", "memory-high-stall", "memory.high"),
        ("blocked", "nfs_wait_bit_killable", "task-blocked", "nfs_wait_bit_killable"),
        ("unkillable", "", "task-blocked", "dd"),
        ("descriptors-at-limit", "", "descriptors-at-limit", "97 are"),
        ("connections-dropped", "", "connections-dropped", "97 packets"),
        ("stopped", "", "process-stopped", "SIGCONT"),
        ("disk-full", "/var/lib/kubelet", "disk-nearly-full", "/var/lib/kubelet"),
        ("inodes-full", "/", "disk-nearly-full", "inodes-full"),
        ("disk-filling", "/var/lib/kubelet", "disk-filling", "/var/lib/kubelet"),
        ("inodes-filling", "/", "disk-filling", "inodes-filling"),
    ] {
        let mut node = Node::new("n1");
        let entity = match expected {
            "disk-nearly-full" | "disk-filling" => node.itself(),
            _ => node.kube_container("Deployment/web", "shop/web-1", "c1"),
        };
        node.trouble(100 * SECOND, entity, what, place, false);
        node.trouble(160 * SECOND, entity, what, place, false);
        node.lethal(160 * SECOND);
        let found = only_state(&node, expected);
        assert!(found.ongoing && found.summary.contains(says), "{what}: {found:#?}");
        node.trouble(220 * SECOND, entity, what, place, true);
        node.lethal(220 * SECOND);
        assert!(!only_state(&node, expected).ongoing, "{what}");
    }
}

#[test]
fn a_trouble_that_its_node_reports_no_more_is_over() {
    let mut node = Node::new("n1");
    let (container, other) = (web(&mut node), node.container("c9", "other"));
    for minute in 0..3 {
        node.trouble((100 + 60 * minute) * SECOND, container, "pids-at-limit", "", false);
    }
    node.lethal(220 * SECOND);
    // The node goes on: its collector was restarted, and knows nothing of the trouble.
    let elapse = |node: &mut Node, from: u64, until: u64| {
        for at in (from..until).step_by(20) {
            node.exit(at * SECOND, Process::child(other, at as u32, "sh"), 0);
        }
        node.lethal(until * SECOND);
    };
    elapse(&mut node, 230, 700);
    assert!(only_state(&node, "pids-at-limit").ongoing, "ten minutes are not over");
    elapse(&mut node, 700, 1_000);
    let over = only_state(&node, "pids-at-limit");
    assert!(!over.ongoing && over.resolved_ns > over.ended_ns, "{over:#?}");
    // Once and for all.
    elapse(&mut node, 1_000, 2_000);
    let later = only_state(&node, "pids-at-limit");
    assert_eq!((later.revision, later.resolved_ns), (over.revision, over.resolved_ns));

    // What an earlier run found is over as well, when this one has no report of it.
    let earlier = {
        let mut node = Node::new("n1");
        let container = web(&mut node);
        node.trouble(100 * SECOND, container, "pids-at-limit", "", false);
        node.lethal(100 * SECOND);
        only_state(&node, "pids-at-limit")
    };
    let mut later = Node::new("n1");
    let other = later.container("c9", "other");
    for at in (300..1_100).step_by(50) {
        later.exit(at * SECOND, Process::child(other, at as u32, "sh"), 0);
        later.lethal(at * SECOND);
    }
    let machine = Machine::start(1);
    machine.store.restore(earlier.clone());
    machine.deliver(&later.node, &later.frames);
    let found = machine.findings();
    assert_eq!((found.len(), &found[0].id, found[0].ongoing), (1, &earlier.id, false), "{found:#?}");
}

#[test]
fn frames_from_a_spool_end_no_ongoing_state() {
    let mut node = Node::new("n1");
    let container = web(&mut node);
    node.trouble(2_000 * SECOND, container, "pids-at-limit", "", false);
    node.lethal(2_000 * SECOND);
    // What an earlier run of the collector had left, of half an hour before.
    let other = node.container("c9", "other");
    node.exit(200 * SECOND, Process::child(other, 7, "sh"), 0);
    node.lethal(200 * SECOND);
    node.exit(2_040 * SECOND, Process::child(other, 8, "sh"), 0);
    node.lethal(2_040 * SECOND);
    let found = only_state(&node, "pids-at-limit");
    assert!(found.ongoing, "it was reported forty seconds ago: {found:#?}");
}

#[test]
fn two_full_disks_are_findings_of_their_own() {
    let mut node = Node::new("n1");
    let itself = node.itself();
    for at in [100, 160] {
        node.trouble(at * SECOND, itself, "disk-full", "/", false);
        node.trouble(at * SECOND, itself, "disk-full", "/var/log", false);
    }
    node.trouble(170 * SECOND, itself, "disk-full", "/", true);
    node.lethal(180 * SECOND);
    let mut found = findings_of(&node);
    found.sort_by(|a, b| a.title.cmp(&b.title));
    let states: Vec<_> = found.iter().map(|one| (one.title.contains("/var/log"), one.ongoing)).collect();
    assert_eq!(states, [(false, false), (true, true)], "{found:#?}");
}

#[test]
fn a_filling_disk_is_reported_until_it_is_full() {
    let mut node = Node::new("n1");
    let itself = node.itself();
    node.trouble(100 * SECOND, itself, "disk-filling", "/", false);
    node.trouble(100 * SECOND, itself, "disk-filling", "/var/log", false);
    node.trouble(200 * SECOND, itself, "disk-full", "/", false);
    node.trouble(230 * SECOND, itself, "disk-filling", "/", true);
    node.lethal(240 * SECOND);
    let mut found = findings_of(&node);
    found.sort_by(|a, b| a.title.cmp(&b.title));
    let states: Vec<_> = found
        .iter()
        .map(|one| (one.pattern.as_str(), one.severity.as_str(), one.title.contains("/var/log"), one.ongoing))
        .collect();
    assert_eq!(
        states,
        [
            ("disk-filling", "low", false, false),
            ("disk-nearly-full", "high", false, true),
            ("disk-filling", "low", true, true),
        ],
        "{found:#?}"
    );
}

#[test]
fn a_stuck_pod_is_reported_with_kubernetes_message_until_freed() {
    const UNREADY: &str = "containers with unready status: [web]";
    for (texts, expected, says) in [
        (["not-ready", UNREADY, "web"], "never-ready", "HTTP 503"),
        (["init-runs", "", "web"], "init-container-runs", "web"),
        (["terminating", "finalizers hold it: x.io/y", ""], "never-goes", "x.io/y"),
    ] {
        let mut node = Node::new("n1");
        let pod = pod(&mut node);
        if expected == "never-ready" {
            node.kube_event(90 * SECOND, pod, "Unhealthy", "Readiness probe failed: HTTP 503");
        }
        node.trouble_of(100 * SECOND, pod, texts, false);
        node.trouble_of(220 * SECOND, pod, texts, false);
        node.lethal(220 * SECOND);
        let found = only_state(&node, expected);
        assert!(found.ongoing && found.count == 1 && found.summary.contains(says), "{found:#?}");
        if expected == "never-goes" {
            node.pod_gone(300 * SECOND, pod);
        } else {
            node.trouble_of(300 * SECOND, pod, texts, true);
        }
        node.lethal(300 * SECOND);
        assert!(!only_state(&node, expected).ongoing, "{expected}");
    }
}

#[test]
fn a_silently_waiting_pod_is_reported_with_its_last_event() {
    const WAITS: &str = "kubelet has not started container web, and does not say what it waits for";
    for (what, place) in [("pending", WAITS), ("starting", "container web runs, and its startup probe has not passed")]
    {
        let mut node = Node::new("n1");
        let pod = pod(&mut node);
        node.said(80 * SECOND, pod, "Pod", "Scheduled", "assigned to n1");
        node.said(90 * SECOND, pod, "Pod", "Pulling", "Pulling image \"shop/web:2\"");
        node.trouble_of(300 * SECOND, pod, [what, place, "web"], false);
        node.lethal(300 * SECOND);
        let found = only_state(&node, "never-starts");
        assert!(found.ongoing && found.summary.contains(place), "{}", found.summary);
        assert!(found.summary.contains("Pulling image") && !found.summary.contains("assigned"), "{}", found.summary);
        node.trouble_of(400 * SECOND, pod, [what, place, "web"], true);
        node.lethal(400 * SECOND);
        assert!(!only_state(&node, "never-starts").ongoing);
    }
}

#[test]
fn a_known_reason_absorbs_the_silence_of_a_pod() {
    let silent = |reason: &str, until: u64| {
        let mut node = Node::new("n1");
        let pod = pod(&mut node);
        node.said(100 * SECOND, pod, "Pod", reason, "timed out waiting for the condition");
        node.lethal(100 * SECOND);
        for at in (300..until).step_by(120) {
            node.trouble_of(at * SECOND, pod, ["pending", "kubelet has not started container web", ""], false);
            node.lethal(at * SECOND);
        }
        let mut found = findings_of(&node);
        found.retain(|one| one.ongoing);
        found.into_iter().map(|one| (one.pattern, one.consequences.len())).collect::<Vec<_>>()
    };
    for (reason, pattern) in [("FailedMount", "volume-not-mounted"), ("FailedCreatePodSandBox", "sandbox-failed")] {
        assert_eq!(silent(reason, 600), [(pattern.to_owned(), 1)]);
        // Kubelet has said nothing of that for a quarter of an hour, and the pod still waits.
        assert_eq!(silent(reason, 1_800), [("never-starts".to_owned(), 0)]);
    }
}

#[test]
fn an_unready_pod_is_reported_with_its_recent_cpu() {
    for (cpu_milli, at, expected) in [(0, 100, true), (200, 100, true), (200, 10, false)] {
        let at = at * SECOND;
        let mut node = Node::new("n1");
        let (pod, web) = (pod(&mut node), web(&mut node));
        let point = Point { memory_kib: 1024, cpu_milli, ..Point::default() };
        node.curve_of(at, web, ("/web", 64 * MIB), vec![point; 20]);
        node.trouble_of(700 * SECOND, pod, ["not-ready", "containers with unready status: [web]", "web"], false);
        node.lethal(700 * SECOND);
        let found = only_state(&node, "never-ready");
        let says = found.summary.contains(&format!("used {cpu_milli} thousandths of a core"));
        assert_eq!(says, expected, "what was long ago is no news: {}", found.summary);
    }
}

#[test]
fn a_first_process_that_survives_aborts_is_reported_until_ended() {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    let init = Process { role: tapio_wire::event::Role::First, ..Process::init(web, 100, "app") };
    node.ignored(100 * SECOND, init, SIGABRT, init);
    node.lethal(100 * SECOND);
    assert!(findings_of(&node).is_empty(), "once, it may end of it");
    for at in 101..115 {
        node.ignored(at * SECOND, init, SIGABRT, init);
    }
    node.lethal(115 * SECOND);
    let found = only_state(&node, "fatal-signal-survived");
    assert!(found.ongoing && found.title.contains("SIGABRT"), "{found:#?}");
    node.exit(130 * SECOND, init, 139);
    node.lethal(130 * SECOND);
    let over = findings_of(&node).into_iter().find(|one| one.pattern == "fatal-signal-survived");
    assert!(!over.expect("it is listed").ongoing);
}

#[test]
fn signals_from_others_or_to_a_child_do_not_count() {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    let (init, child) = (Process::init(web, 100, "app"), Process::child(web, 110, "worker"));
    for at in (100..150).step_by(5) {
        node.ignored(at * SECOND, init, SIGABRT, child);
        node.ignored(at * SECOND, child, SIGABRT, child);
        node.ignored(at * SECOND, init, SIGTERM, init);
    }
    node.lethal(150 * SECOND);
    assert!(findings_of(&node).is_empty());
}

#[test]
fn a_hanging_runtime_is_reported_until_the_node_is_ready() {
    const PLEG: &str = "[container runtime is down, PLEG is not healthy: pleg was last seen active 3m4s ago]";
    let mut node = Node::new("n1");
    let runtime = node.unit("containerd.service");
    node.trouble_of(90 * SECOND, runtime, ["stopped", "", "containerd"], false);
    node.node_is_ready(100 * SECOND, PLEG);
    node.lethal(100 * SECOND);
    let of_it = |node: &Node| {
        let found = findings_of(node).into_iter().find(|one| one.pattern == "runtime-hangs");
        found.expect("it is reported")
    };
    let found = of_it(&node);
    assert!(found.ongoing && found.summary.contains("containerd (pid 4711)"), "{found:#?}");
    node.node_is_ready(200 * SECOND, "");
    node.lethal(200 * SECOND);
    assert!(!of_it(&node).ongoing);

    let mut node = Node::new("n1");
    node.node_is_ready(100 * SECOND, "kubelet stopped posting node status");
    node.lethal(100 * SECOND);
    assert!(findings_of(&node).iter().all(|one| one.pattern != "runtime-hangs"), "nobody speaks of the runtime");
}

#[test]
fn a_node_that_another_collector_reports_is_named() {
    let mut leader = Node::new("n2");
    leader.condition_of(100 * SECOND, "n1", ["Ready", "KubeletNotReady", "PLEG is not healthy: 3m4s ago"], 0);
    let found = only_state(&leader, "runtime-hangs");
    assert!(found.title.starts_with("node n1:"), "{}", found.title);
    assert_eq!(found.entity.as_ref().map(|entity| &*entity.node), Some("n1"));

    // Nobody gives another node a false name.
    let mut liar = Node::new("n3");
    liar.condition_of(100 * SECOND, "n1", ["Ready", "", ""], 1);
    liar.calls(tapio_wire::node_id("n1"), "n4");
    liar.lethal(100 * SECOND);
    let machine = Machine::start(1);
    machine.deliver(&liar.node, &liar.frames);
    machine.deliver(&leader.node, &leader.frames);
    assert_eq!(machine.findings()[0].title, found.title);
}

#[test]
fn a_refused_resize_is_reported_until_done_or_given_up() {
    let mut node = Node::new("n1");
    let pod = pod(&mut node);
    node.resize(100 * SECOND, pod, "Infeasible", "Node didn't have enough capacity: cpu, requested: 64000", false);
    node.lethal(100 * SECOND);
    let found = only_state(&node, "resize-refused");
    assert!(found.ongoing && found.summary.contains("64000"), "{found:#?}");
    node.resize(200 * SECOND, pod, "", "", true);
    node.lethal(200 * SECOND);
    assert!(!only_state(&node, "resize-refused").ongoing);
}

#[test]
fn an_end_without_a_condition_ends_all_conditions() {
    let mut node = Node::new("n1");
    let pod = pod(&mut node);
    node.resize(100 * SECOND, pod, "Infeasible", "no room", false);
    node.pod_gone(200 * SECOND, pod);
    node.lethal(200 * SECOND);
    assert!(!only_state(&node, "resize-refused").ongoing);

    let mut node = Node::new("n1");
    let pod = node.kube_pod(WEB[0], WEB[1]);
    node.waits_for_a_node(100 * SECOND, pod, "Unschedulable", "0/1 nodes are available", false);
    // Its node's collector reported it before the elected one.
    node.runs(200 * SECOND, pod, "web");
    node.lethal(200 * SECOND);
    assert!(!only_state(&node, "unschedulable").ongoing);
}

#[test]
fn a_restart_for_a_resize_is_no_failure() {
    let mut node = Node::new("n1");
    let (web, runtime) = (web(&mut node), node.unit("containerd.service"));
    let (init, runc) = (Process::init(web, 100, "app"), Process::child(runtime, 90, "runc"));
    node.kube_event(100 * SECOND, web, "Killing", "Container web resize requires restart");
    node.ignored(101 * SECOND, init, SIGTERM, runc);
    node.signal(131 * SECOND, init, SIGKILL, Some(runc));
    node.exit(131 * SECOND + MS, init, SIGKILL);
    node.lethal(132 * SECOND);
    let found = only_state(&node, "restarted-for-resize");
    assert_eq!(found.severity, "info");
}

#[test]
fn containers_that_are_restarted_with_another_one_only_follow() {
    let mut node = Node::new("n1");
    let (pod, web, runtime) = (pod(&mut node), web(&mut node), node.unit("containerd.service"));
    let worker = node.kube_container_named(WEB[0], WEB[1], "c2", "worker");
    let (first, follows) = (Process::init(worker, 90, "worker"), Process::init(web, 100, "app"));
    let runc = Process::child(runtime, 80, "runc");
    node.exit(100 * SECOND, first, 42 << 8);
    node.signal(101 * SECOND, follows, SIGKILL, Some(runc));
    node.exit(101 * SECOND + MS, follows, SIGKILL);
    node.all_restart(103 * SECOND, pod);
    node.lethal(103 * SECOND);
    let mut found: Vec<_> = findings_of(&node).into_iter().map(|one| (one.pattern, one.severity)).collect();
    found.sort();
    let expected = [("exited-with-error", "low"), ("restarted-with-all", "info")];
    assert_eq!(found, expected.map(|(pattern, severity)| (pattern.to_owned(), severity.to_owned())));
}

#[test]
fn a_liveness_kill_says_whether_the_container_was_busy() {
    for (cpu_milli, throttled, says) in [(1, 0, "or hung"), (100, 80, "80 % of its periods"), (400, 0, "")] {
        let mut node = Node::new("n1");
        let (web, runtime) = (web(&mut node), node.unit("containerd.service"));
        let (init, runc) = (Process::init(web, 100, "app"), Process::child(runtime, 90, "runc"));
        node.kube_event(99 * SECOND, web, "Unhealthy", "Liveness probe failed: timeout");
        node.signal(100 * SECOND, init, SIGTERM, Some(runc));
        node.exit(100 * SECOND + MS, init, SIGTERM);
        let point = Point { memory_kib: 1024, cpu_milli, throttled, ..Point::default() };
        node.curve_of(101 * SECOND, web, ("/web", 64 * MIB), vec![point; 20]);
        node.lethal(101 * SECOND);
        let found = only_state(&node, "liveness-probe-kill");
        assert_eq!(found.summary.contains("in the minute before"), !says.is_empty(), "{}", found.summary);
        assert!(found.summary.contains(says), "{}", found.summary);
    }
}

#[test]
fn the_last_lines_of_a_container_stand_with_its_death() {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    let init = Process::init(web, 100, "app");
    node.exit(100 * SECOND, init, 1 << 8);
    node.log_lines(100 * SECOND + 600 * MS, init, &["no such table: carts", "giving up"]);
    node.lethal(101 * SECOND);
    let found = only_state(&node, "exited-with-error");
    let lines = found.evidence.iter().find(|piece| piece.kind == "log_lines").expect("it is evidence");
    assert!(lines.text.contains("no such table: carts | giving up"), "{}", lines.text);
}

#[test]
fn the_pods_curve_uses_the_pods_limit_containers_their_own() {
    const POD: &str = "/kubepods/burstable/pod8f1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f";
    let leak = |mib: std::ops::Range<u32>| {
        mib.map(|mib| Point { memory_kib: mib << 10, cpu_milli: 9, ..Point::default() }).collect::<Vec<_>>()
    };
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let app = Process::init(web, 100, "app");
    let full =
        FullLimit { cgroup: POD, height: 1, limit_bytes: 200 * MIB, usage_bytes: 200 * MIB, allocator_inside: 1 };
    node.oom_at(100 * SECOND, app, full);
    node.exit(100 * SECOND + MS, app, SIGKILL);
    node.curve_of(101 * SECOND, web, ("/kubepods/burstable/x/web", u64::MAX), leak(10..20));
    node.curve_of(101 * SECOND, web, (POD, 200 * MIB), leak(10..190));
    node.lethal(101 * SECOND);
    let found = only_state(&node, "pod-limit-kill");
    assert!(found.summary.contains("The pod's memory had grown steadily"), "{}", found.summary);
}

#[test]
fn what_is_wrong_with_a_container_ends_with_its_death() {
    for what in ["stopped", "throttled", "pids-at-limit", "descriptors-at-limit", "memory-high"] {
        let mut node = Node::new("n1");
        let container = web(&mut node);
        node.trouble(100 * SECOND, container, what, "", false);
        node.lethal(100 * SECOND);
        let going = findings_of(&node).into_iter().find(|finding| finding.ongoing).expect("it goes on");
        assert_eq!(going.started_ns, BOOTED + 40 * SECOND, "{what}: a minute before it was reported");
        let first = Process::init(container, 4711, "dd");
        node.exit(130 * SECOND, first, SIGKILL);
        node.lethal(130 * SECOND);
        let over =
            findings_of(&node).into_iter().find(|finding| finding.pattern == going.pattern).expect("it is reported");
        let lasted_ns = over.resolved_ns - over.started_ns;
        assert_eq!((over.ongoing, lasted_ns), (false, 90 * SECOND), "{what}");
        assert!(what == "pids-at-limit" || over.summary.contains("for 90.0 s"), "{what}: {}", over.summary);
        let of_pid = ["kill -CONT", "/proc/4711"];
        assert!(!over.advice.iter().any(|advice| of_pid.iter().any(|part| advice.contains(part))), "{:?}", over.advice);
        if what == "stopped" {
            assert!(going.advice[0].contains("kill -CONT 4711"), "{:?}", going.advice);
            assert!(going.summary.contains("SIGCONT") && !over.summary.contains("SIGCONT"), "{}", over.summary);
        }
    }
}
