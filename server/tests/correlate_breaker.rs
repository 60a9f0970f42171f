//! Attempts to provoke a false cause: names that come back, steps of the clock, states that follow each other, debugging
//! containers.

use tapio_wire::event::EntityId;
use tapio_wire::service::Finding;

use crate::correlate_node::{Machine, Node, Process, SECOND, SIGKILL, SIGTERM, findings_of, only_state, patterns_of};

const HOUR: u64 = 3600 * SECOND;
const PULL: [&str; 3] = ["web", "ErrImagePull", "rpc error: code = NotFound"];
const CONFIG: [&str; 3] = ["web", "CreateContainerConfigError", "configmap \"settings\" not found"];
const USER: [&str; 3] = ["web", "CreateContainerConfigError", "container has runAsNonRoot and image will run as root"];
const CREATE: [&str; 3] = ["web", "CreateContainerError", "device not found"];
const MULTI_ATTACH: &str = "Multi-Attach error for volume \"pvc-1\"";

fn pod(node: &mut Node) -> EntityId {
    node.kube_pod("StatefulSet/db", "shop/db-0")
}

fn ongoing(found: &[Finding]) -> Vec<&str> {
    found.iter().filter(|finding| finding.ongoing).map(|finding| &*finding.pattern).collect()
}

#[test]
fn a_successor_by_name_may_lack_its_predecessors_volume() {
    for uid in ["first", "second"] {
        let mut node = Node::new("n1");
        let first = node.kube_pod_of("StatefulSet/db", "shop/db-0", "first");
        node.runs(100 * SECOND, first, "web");
        node.lethal(100 * SECOND);
        node.pod_gone(200 * SECOND, first);
        let now = node.kube_pod_of("StatefulSet/db", "shop/db-0", uid);
        node.said(210 * SECOND, now, "Pod", "FailedAttachVolume", MULTI_ATTACH);
        node.lethal(211 * SECOND);
        let is_found = patterns_of(&node).contains(&"volume-not-mounted".to_owned());
        assert_eq!(is_found, uid == "second", "one that ran had its volumes: {uid}");
    }
}

#[test]
fn a_successor_by_name_was_not_evicted_with_its_predecessor() {
    let mut node = Node::new("n1");
    let first = node.kube_pod_of("StatefulSet/db", "shop/db-0", "first");
    node.pod_state(100 * SECOND, first, "Evicted", false);
    node.pod_gone(110 * SECOND, first);
    let second = node.kube_pod_of("StatefulSet/db", "shop/db-0", "second");
    node.runs(120 * SECOND, second, "web");
    node.pod_state(200 * SECOND, second, "", true);
    node.lethal(201 * SECOND);
    let found = findings_of(&node);
    let of = |pattern: &str| found.iter().filter(|one| one.pattern == pattern).count();
    assert_eq!((of("evicted"), of("pod-deleted")), (1, 1), "{found:#?}");
}

#[test]
fn of_successive_states_only_the_present_one_goes_on() {
    let cases: [(&[[&str; 3]], &str); 5] = [
        (&[PULL, CONFIG], "configuration-missing"),
        (&[PULL, CREATE], "container-not-created"),
        (&[CONFIG, USER], "user-refused"),
        (&[CONFIG, CREATE], "container-not-created"),
        (&[USER, CREATE], "container-not-created"),
    ];
    for (said, expected) in cases {
        let mut node = Node::new("n1");
        let pod = pod(&mut node);
        for (turn, said) in said.iter().enumerate() {
            let at = (100 + 60 * turn as u64) * SECOND;
            node.waits(at, pod, *said);
            node.lethal(at);
        }
        assert_eq!(ongoing(&findings_of(&node)), [expected], "{said:?}");
        // Kubelet is asked again, and the first comes back.
        node.waits(300 * SECOND, pod, said[0]);
        node.lethal(300 * SECOND);
        assert!(ongoing(&findings_of(&node)).len() >= 2, "{said:?}: what is reported again goes on");
    }
    for (reason, message) in [("FailedAttachVolume", MULTI_ATTACH), ("FailedCreatePodSandBox", "no network")] {
        let mut node = Node::new("n1");
        let pod = pod(&mut node);
        node.said(100 * SECOND, pod, "Pod", reason, message);
        node.lethal(100 * SECOND);
        assert_eq!(ongoing(&findings_of(&node)).len(), 1);
        node.waits(160 * SECOND, pod, PULL);
        node.lethal(160 * SECOND);
        assert_eq!(ongoing(&findings_of(&node)), ["image-pull-failed"], "{reason}: images are pulled after that");
    }
}

#[test]
fn a_debugging_container_that_cannot_start_is_no_pod_trouble() {
    for said in [PULL, CONFIG, USER, CREATE] {
        let mut node = Node::new("n1");
        let pod = pod(&mut node);
        node.runs(90 * SECOND, pod, "web");
        node.ephemeral_waits(100 * SECOND, pod, ["debugger", said[1], said[2]]);
        node.lethal(100 * SECOND);
        assert_eq!(patterns_of(&node), [""; 0], "{said:?}");
    }
}

#[test]
fn a_container_that_ran_for_days_did_once_start() {
    let mut node = Node::new("n1");
    let pod = pod(&mut node);
    node.runs(10 * SECOND, pod, "web");
    node.waits(100 * SECOND, pod, PULL);
    node.lethal(100 * SECOND);
    let found = only_state(&node, "image-pull-failed");
    let verdict = found.death.as_ref().map_or("", |death| &death.verdict);
    assert!(!format!("{} {} {verdict}", found.title, found.summary).contains("never"), "{found:#?}");
}

#[test]
fn the_registrys_answer_is_reported_instead_of_a_bare_error() {
    let mut node = Node::new("n1");
    let pod = pod(&mut node);
    // As kubelet reports it.
    for (at, message) in [
        (90, "Failed to pull image \"shop/web:2\": 401 Unauthorized"),
        (91, "Error: ErrImagePull"),
        (99, "Error: ImagePullBackOff"),
    ] {
        node.kube_event(at * SECOND, pod, "Failed", message);
    }
    node.waits(100 * SECOND, pod, ["web", "ImagePullBackOff", "Back-off pulling image"]);
    node.lethal(100 * SECOND);
    let found = only_state(&node, "image-pull-failed");
    assert!(found.summary.contains("401 Unauthorized"), "{}", found.summary);
}

#[test]
fn setting_a_clock_neither_ends_nor_keeps_a_state() {
    for step in [-(HOUR as i64), HOUR as i64] {
        let mut node = Node::new("n1");
        let pod = pod(&mut node);
        node.waits(100 * SECOND, pod, PULL);
        node.lethal(100 * SECOND);
        node.booted_ns = node.booted_ns.strict_add_signed(step);
        node.runs(200 * SECOND, pod, "web");
        node.lethal(200 * SECOND);
        assert!(!only_state(&node, "image-pull-failed").ongoing, "it runs: {step}");
        node.waits(300 * SECOND, pod, PULL);
        node.lethal(300 * SECOND);
        assert!(ongoing(&findings_of(&node)) == ["image-pull-failed"], "it waits again: {step}");
    }
}

#[test]
fn an_unreported_trouble_ends_at_any_clock_may_return() {
    for step in [-(HOUR as i64), HOUR as i64] {
        let mut node = Node::new("n1");
        let web = node.kube_container("Deployment/web", "shop/web-1", "c1");
        let other = node.container("c9", "other");
        node.trouble(100 * SECOND, web, "pids-at-limit", "", false);
        node.lethal(100 * SECOND);
        node.booted_ns = node.booted_ns.strict_add_signed(step);
        for at in (120..800).step_by(20) {
            node.exit(at * SECOND, Process::child(other, at as u32, "sh"), 0);
            node.lethal(at * SECOND);
        }
        let machine = Machine::start(1);
        machine.deliver(&node.node, &node.frames);
        assert_eq!(ongoing(&machine.findings()), [""; 0], "{step}");
        let sent = node.frames.len();
        node.trouble(820 * SECOND, web, "pids-at-limit", "", false);
        node.lethal(820 * SECOND);
        machine.deliver(&node.node, &node.frames[sent..]);
        assert_eq!(ongoing(&machine.findings()), ["pids-at-limit"], "{step}");
    }
}

#[test]
fn a_retried_job_that_succeeds_is_no_failure_or_loop() {
    let mut node = Node::new("n1");
    for turn in 0..4u32 {
        let name = format!("shop/import-{turn}");
        let container = node.kube_container("Job/import", &name, &format!("run{turn}"));
        let at = (100 + 60 * u64::from(turn)) * SECOND;
        node.exit(at, Process::init(container, 100 + turn, "import"), if turn < 3 { 1 << 8 } else { 0 });
        node.lethal(at + SECOND);
    }
    let found = findings_of(&node);
    assert!(found.iter().all(|one| one.pattern == "exited-with-error" && one.severity == "low"), "{found:#?}");
}

#[test]
fn equal_troubles_of_two_containers_end_separately() {
    let mut node = Node::new("n1");
    let [web, proxy] = ["web", "proxy"]
        .map(|name| node.kube_container_named("Deployment/web", "shop/web-1", &format!("c-{name}"), name));
    for entity in [web, proxy] {
        node.trouble(100 * SECOND, entity, "descriptors-at-limit", "", false);
    }
    node.exit(130 * SECOND, Process::init(web, 4711, "dd"), SIGKILL);
    node.lethal(131 * SECOND);
    let found = findings_of(&node);
    let mut states: Vec<_> = found
        .iter()
        .filter(|one| one.pattern == "descriptors-at-limit")
        .map(|one| (one.entity.as_ref().map_or("", |entity| &entity.container), one.ongoing))
        .collect();
    states.sort_unstable();
    assert_eq!(states, [("proxy", true), ("web", false)], "{found:#?}");
}

#[test]
fn an_old_probe_failure_or_a_predecessors_killed_nobody() {
    for (uid, at) in [("first", 98), ("second", 98 - 90)] {
        let mut node = Node::new("n1");
        let pod = node.kube_pod_of("StatefulSet/db", "shop/db-0", uid);
        node.kube_event(at * SECOND, pod, "Unhealthy", "Liveness probe failed: timeout");
        let second = node.kube_pod_of("StatefulSet/db", "shop/db-0", "second");
        let container = node.container_of_pod(second, "db", "c2");
        let unit = node.unit("containerd.service");
        let (target, shim) = (Process::init(container, 100, "db"), Process::of_node(unit, 55, "containerd-shim"));
        node.pod_state(99 * SECOND, second, "", true);
        node.signal(100 * SECOND, target, SIGTERM, Some(shim));
        node.exit(101 * SECOND, target, SIGTERM);
        node.lethal(102 * SECOND);
        let wrong = patterns_of(&node).into_iter().find(|pattern| pattern.contains("probe"));
        assert_eq!(wrong, None, "{uid}");
    }
}
