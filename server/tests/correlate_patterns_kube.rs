//! Patterns that rest on what Kubernetes says, each with its look-alike; names that come late; labels.

use std::sync::Arc;

use crate::correlate_node::{
    MIB, MS, Machine, Node, Process, SECOND, SIGKILL, SIGTERM, findings_of, patterns_of, workload_of,
};
use tapio_server::findings::PatternSet;
use tapio_wire::event::EntityId;

const LIVENESS: &str = "Liveness probe failed: HTTP probe failed with statuscode: 503";
const TIMED_OUT: &str = "Liveness probe failed: command timed out: \"/bin/ready\" timed out after 1s";

fn web(node: &mut Node) -> EntityId {
    node.kube_container("Deployment/web", "shop/web-0", "c0")
}

#[test]
fn a_limit_kill_shows_kubernetes_names_and_an_agreeing_label() {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    node.limit_kill(web, 100, 100 * SECOND);
    node.container_ended(101 * SECOND, web, "OOMKilled", 137);
    node.observation(101 * SECOND, web, 0, 3);
    node.lethal(101 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].title.starts_with("shop/web-0/web exceeded"), "{}", found[0].title);
    let entity = found[0].entity.clone().expect("an entity");
    assert_eq!((&*entity.namespace, &*entity.pod, &*entity.container), ("shop", "web-0", "web"));
    assert_eq!((&*entity.workload, &*entity.image), ("Deployment/web", "shop/web:2"));
    let death = found[0].death.as_ref().expect("a certificate");
    assert_eq!((&*death.label, death.label_agrees), ("OOMKilled (exit code 137)", Some(true)));
    assert!(found[0].evidence.iter().any(|piece| piece.step == "observed" && piece.text.contains("32.0 MiB")));
}

#[test]
fn a_label_that_hides_a_memory_kill_contradicts() {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    node.limit_kill(web, 100, 100 * SECOND);
    node.container_ended(101 * SECOND, web, "Error", 137);
    node.lethal(101 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found[0].death.as_ref().and_then(|death| death.label_agrees), Some(false));
}

#[test]
fn a_name_that_comes_late_is_published_again() {
    let mut node = Node::new("n1");
    let bare = tapio_wire::entity_id(tapio_wire::event::EntityKind::Container, "c0");
    node.container("c0", "0123456789ab");
    node.exit(100 * SECOND, Process::init(bare, 100, "sh"), 1 << 8);
    node.lethal(100 * SECOND);
    web(&mut node);
    node.lethal(101 * SECOND);
    let machine = Machine::start(2);
    machine.deliver(&node.node, &node.frames[..1]);
    let before = machine.findings().remove(0);
    machine.deliver(&node.node, &node.frames[1..]);
    let after = machine.findings().remove(0);
    assert_eq!((before.revision, after.revision), (1, 2));
    assert_eq!(before.id, after.id);
    assert!(after.title.starts_with("shop/web-0/web died"), "{}", after.title);
}

#[test]
fn single_deaths_of_three_containers_are_no_loop() {
    let mut node = Node::new("n1");
    for (key, name) in [("c0", "web"), ("c1", "log"), ("c2", "proxy")] {
        let container = node.kube_container_named("Deployment/web", "shop/web-0", key, name);
        node.exit(100 * SECOND, Process::init(container, 100, "sh"), 1 << 8);
    }
    node.lethal(101 * SECOND);
    assert!(!patterns_of(&node).contains(&"crash-loop".to_owned()), "{:?}", patterns_of(&node));
}

#[test]
fn a_source_that_sees_only_cgroups_takes_no_name_away() {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    node.exit(100 * SECOND, Process::init(web, 100, "sh"), 1 << 8);
    node.lethal(100 * SECOND);
    node.container("c0", "0123456789ab");
    node.exit(200 * SECOND, Process::init(web, 101, "sh"), 1 << 8);
    node.lethal(200 * SECOND);
    for finding in findings_of(&node) {
        assert!(finding.title.starts_with("shop/web-0/web died"), "{}", finding.title);
    }
}

#[test]
fn a_failed_liveness_probe_is_why_it_was_killed() {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    let pod = node.kube_pod("Deployment/web", "shop/web-0");
    node.kube_event(98 * SECOND, pod, "Unhealthy", LIVENESS);
    node.stop(web, 100 * SECOND);
    assert_eq!(patterns_of(&node), ["liveness-probe-kill"]);
}

#[test]
fn readiness_probes_and_deletions_are_no_liveness_kill() {
    for (message, is_deleting, expected) in
        [("Readiness probe failed: x", false, "stopped"), (LIVENESS, true, "pod-deleted")]
    {
        let mut node = Node::new("n1");
        let web = web(&mut node);
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        node.kube_event(98 * SECOND, pod, "Unhealthy", message);
        node.pod_state(99 * SECOND, pod, "", is_deleting);
        node.stop(web, 100 * SECOND);
        assert_eq!(patterns_of(&node), [expected], "{message}");
    }
}

#[test]
fn only_strong_throttling_explains_a_failed_probe() {
    for (throttled, expected) in
        [(600, "throttled-into-probe-failure"), (400, "liveness-probe-kill"), (30, "liveness-probe-kill")]
    {
        let mut node = Node::new("n1");
        let web = web(&mut node);
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        node.kube_event(98 * SECOND, pod, "Unhealthy", TIMED_OUT);
        // Long ago it was throttled for hours: a lifetime is no evidence.
        node.observation(100 * SECOND + MS, web, 1_000_000, 3);
        node.throttling(100 * SECOND + MS, web, throttled);
        node.stop(web, 100 * SECOND);
        assert_eq!(patterns_of(&node), [expected]);
    }
}

#[test]
fn only_a_containers_own_reclaim_stall_explains_its_probe() {
    for (is_own, expected) in [(true, "reclaim-stall-probe-failure"), (false, "liveness-probe-kill")] {
        let mut node = Node::new("n1");
        let web = web(&mut node);
        let other = node.kube_container("Deployment/db", "shop/db-0", "db");
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        node.reclaim(90 * SECOND, if is_own { web } else { other });
        node.kube_event(98 * SECOND, pod, "Unhealthy", TIMED_OUT);
        node.stop(web, 100 * SECOND);
        assert_eq!(patterns_of(&node), [expected]);
    }
}

/// A worker is killed for memory; minutes later the container ends otherwise.
fn labelled(signal: Option<u32>, status: u32) -> Node {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    let (init, worker) = (Process::init(web, 100, "nginx"), Process::child(web, 107, "worker"));
    let shim = node.shim();
    node.oom(100 * SECOND, worker, 64 * MIB, 64 * MIB);
    node.exit(100 * SECOND + MS, worker, SIGKILL);
    node.lethal(101 * SECOND);
    if let Some(signal) = signal {
        node.signal(200 * SECOND, init, signal, Some(shim));
    } else {
        node.oom(200 * SECOND, init, 64 * MIB, 64 * MIB);
    }
    node.exit(201 * SECOND, init, status);
    node.container_ended(202 * SECOND, web, "OOMKilled", if status == SIGKILL { 137 } else { 143 });
    node.lethal(202 * SECOND);
    node
}

#[test]
fn a_wrong_oomkilled_label_is_contradicted() {
    let found = findings_of(&labelled(Some(SIGTERM), 143 << 8));
    let patterns: Vec<_> = found.iter().map(|finding| &*finding.pattern).collect();
    assert_eq!(patterns, ["silent-child-oom", "false-oomkilled-label"]);
    let death = found[1].death.as_ref().expect("a certificate");
    assert_eq!((&*death.label, death.label_agrees), ("OOMKilled (exit code 143)", Some(false)));
    assert_eq!(death.sender.as_ref().map(|sender| &*sender.comm), Some("containerd-shim"));
}

#[test]
fn a_right_oomkilled_label_is_not() {
    assert_eq!(patterns_of(&labelled(None, SIGKILL)), ["silent-child-oom", "memory-limit-kill"]);
}

#[test]
fn an_eviction_absorbs_the_deaths_that_it_causes() {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    let pod = node.kube_pod("Deployment/web", "shop/web-0");
    node.stop(web, 100 * SECOND);
    node.pod_state(103 * SECOND, pod, "Evicted", false);
    node.lethal(103 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, "evicted");
    assert_eq!(found[0].consequences.len(), 1);
    assert_eq!(found[0].consequences[0].pattern, "stopped");
}

#[test]
fn only_the_same_nodes_full_disk_explains_an_eviction() {
    for (is_own, expected) in [(true, "disk-full-eviction"), (false, "evicted")] {
        let mut node = Node::new("n1");
        let writer = node.kube_container("Deployment/log", "shop/log-0", "log");
        node.syscall_error(90 * SECOND, writer, 28);
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        if is_own {
            node.node_condition(95 * SECOND, "DiskPressure", 1);
        } else {
            node.node_condition(95 * SECOND, "DiskPressure", 0);
        }
        let message = "The node was low on resource: ephemeral-storage. Container web was using 9Gi. ";
        node.pod_says(100 * SECOND, pod, ["Evicted", message], false);
        node.lethal(101 * SECOND);
        let found = findings_of(&node);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].pattern, expected);
        assert_eq!(found[0].summary.contains("shop/log-0/web was refused space"), is_own, "{}", found[0].summary);
    }
}

#[test]
fn an_eviction_names_its_resource() {
    let low = |resource: &str| format!("The node was low on resource: {resource}. Container web was using 9Gi. ");
    let cases = [
        (low("ephemeral-storage"), "disk-full-eviction"),
        (low("inodes"), "disk-full-eviction"),
        ("The node had condition: [DiskPressure]. ".to_owned(), "disk-full-eviction"),
        (low("memory"), "evicted"),
        (low("pids"), "evicted"),
        ("Container web exceeded its local ephemeral storage limit \"1Gi\". ".to_owned(), "storage-limit-eviction"),
        (
            "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ".to_owned(),
            "storage-limit-eviction",
        ),
        ("Usage of EmptyDir volume \"cache\" exceeds the limit \"1Gi\". ".to_owned(), "storage-limit-eviction"),
    ];
    for (message, expected) in cases {
        let mut node = Node::new("n1");
        node.node_condition(95 * SECOND, "DiskPressure", 1);
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        node.pod_says(100 * SECOND, pod, ["Evicted", &message], false);
        node.lethal(101 * SECOND);
        let found = findings_of(&node);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].pattern, expected, "{message}");
        assert!(found[0].summary.contains(message.trim_end()), "{found:#?}");
        assert!(expected != "evicted" || found[0].title.contains(message.trim_end()), "{}", found[0].title);
    }
}

/// Three replicas die with code 1, `after_s` seconds after their start.
pub fn dying(node: &mut Node, after_s: u64) {
    for replica in 0..3u32 {
        let pod = format!("shop/web-{replica}");
        let web = node.kube_container("Deployment/web", &pod, &format!("c{replica}"));
        node.exit((1 + after_s) * SECOND + u64::from(replica), Process::init(web, 100 + replica, "app"), 1 << 8);
    }
    node.lethal((2 + after_s) * SECOND);
}

#[test]
fn a_release_that_crashes_is_bad_a_scaling_is_not() {
    for (before, expected) in [(Some("shop/web:1"), "bad-release"), (None, "exited-with-error")] {
        let mut node = Node::new("n1");
        node.rollout(90 * SECOND, "Deployment/web", "shop", before);
        dying(&mut node, 100);
        let found = findings_of(&node);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!((&*found[0].pattern, found[0].count), (expected, 3));
    }
}

#[test]
fn a_release_of_another_workload_explains_nothing() {
    let mut node = Node::new("n1");
    node.rollout(90 * SECOND, "Deployment/db", "shop", Some("shop/db:1"));
    dying(&mut node, 100);
    assert_eq!(patterns_of(&node), ["exited-with-error"]);
}

#[test]
fn only_an_own_recent_configuration_change_breaks_the_start() {
    for (user, after_s, expected) in [
        ("Deployment/web", 5, "bad-config"),
        ("Deployment/db", 5, "exited-with-error"),
        ("Deployment/web", 100, "exited-with-error"),
    ] {
        let mut node = Node::new("n1");
        node.config_change(2 * SECOND, vec![workload_of(user, "shop")]);
        dying(&mut node, after_s);
        let found = findings_of(&node);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].pattern, expected, "{user} {after_s}");
    }
}

#[test]
fn replicas_killed_alike_are_one_finding_with_a_count() {
    let mut node = Node::new("n1");
    for replica in 0..3u32 {
        let web = node.kube_container("Deployment/web", &format!("shop/web-{replica}"), &format!("c{replica}"));
        node.limit_kill(web, 100 + replica, u64::from(100 + replica) * SECOND);
    }
    let other = node.kube_container("Deployment/db", "shop/db-0", "db");
    node.limit_kill(other, 200, 110 * SECOND);
    let found = findings_of(&node);
    let counts: Vec<_> = found.iter().map(|finding| finding.count).collect();
    assert_eq!(counts, [3, 1], "{found:#?}");
    assert!(found[0].title.ends_with(", 3 times"), "{}", found[0].title);
}

const NEEDS_A_NOTICE: &str = "id: own
title: \"{entity} ended\"
summary: s
severity: low
priority: 1
window: 1m
scope: pod
anchor: exit
confidence: {base: 0.9}
steps:
  - name: notice
    clue: kube_event
    where: {reason: Unhealthy}
    may_be_lost: true
  - name: exit
    clue: exit
advice: []
";

#[test]
fn possibly_lost_evidence_makes_a_finding_possible() {
    for (is_reported, lost, expected) in [
        (false, 0, None),
        (false, 9, Some((true, "Possibly: shop/web-0/web ended"))),
        (true, 9, Some((false, "shop/web-0/web ended"))),
    ] {
        let mut node = Node::new("n1");
        let web = web(&mut node);
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        node.lethal(90 * SECOND);
        node.lose(lost);
        if is_reported {
            node.kube_event(98 * SECOND, pod, "Unhealthy", LIVENESS);
        }
        node.exit(100 * SECOND, Process::init(web, 100, "app"), 1 << 8);
        node.lethal(101 * SECOND);
        let machine = Machine::with(1, PatternSet::from_texts(&[("own.yaml", NEEDS_A_NOTICE)]).expect("valid"));
        machine.deliver(&node.node, &node.frames);
        let found = machine.findings();
        let first = found.first().map(|finding| (finding.possible, finding.title.as_str()));
        assert_eq!(first, expected, "{is_reported} {lost}");
        if lost > 0 {
            assert_eq!(found[0].loss.map(|loss| loss.events), Some(9));
            assert_eq!(found[0].confidence < 0.5, found[0].possible, "{}", found[0].confidence);
        }
    }
}

#[test]
fn a_descriptor_leak_needs_its_error_and_a_failed_probe() {
    const EMFILE: u32 = 24;
    const EAGAIN: u32 = 11;
    for (errno, is_unhealthy, expected) in [
        (EMFILE, true, Some("descriptor-leak")),
        (EMFILE, false, None),
        (EAGAIN, true, Some("pid-limit")),
        (EAGAIN, false, None),
    ] {
        let mut node = Node::new("n1");
        let web = web(&mut node);
        let pod = node.kube_pod("Deployment/web", "shop/web-0");
        node.syscall_error(90 * SECOND, web, errno);
        if is_unhealthy {
            node.kube_event(95 * SECOND, pod, "Unhealthy", "Readiness probe failed: x");
        }
        node.lethal(96 * SECOND);
        assert_eq!(patterns_of(&node), expected.into_iter().collect::<Vec<_>>(), "{errno} {is_unhealthy}");
    }
}

#[test]
fn a_backoff_belongs_to_the_crash_loop_that_it_follows() {
    let mut node = Node::new("n1");
    let pod = node.kube_pod("Deployment/web", "shop/web-0");
    for time in 0..3u64 {
        let web = node.kube_container("Deployment/web", "shop/web-0", &format!("run{time}"));
        node.exit((100 + 60 * time) * SECOND, Process::init(web, 100 + time as u32, "app"), 1 << 8);
        node.lethal((101 + 60 * time) * SECOND);
    }
    node.kube_event(230 * SECOND, pod, "BackOff", "back-off 40s restarting failed container");
    node.lethal(231 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, "crash-loop");
    assert!(found[0].evidence.iter().any(|piece| piece.step == "backoff"));
}

#[test]
fn events_of_another_node_join_by_the_clock_of_day() {
    // The one that watches Kubernetes for all was booted long before.
    let mut node = Node::new("n1");
    let web = web(&mut node);
    node.stop(web, 100 * SECOND);
    let mut leader = Node::new("leader");
    let pod = leader.kube_pod("Deployment/web", "shop/web-0");
    leader.kube_event(98 * SECOND, pod, "Unhealthy", LIVENESS);
    leader.lethal(99 * SECOND);
    for (first, second) in [(&node, &leader), (&leader, &node)] {
        let machine = Machine::start(1);
        for node in [first, second] {
            machine.deliver(&node.node, &node.frames.iter().map(Arc::clone).collect::<Vec<_>>());
            machine.settle();
        }
        let patterns: Vec<_> = machine.findings().into_iter().map(|finding| finding.pattern).collect();
        assert_eq!(patterns, ["liveness-probe-kill"]);
    }
}
