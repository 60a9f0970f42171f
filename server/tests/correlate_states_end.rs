//! States whose end nobody reports: the object was gone when somebody looked again, or the node with all that it reported.

use crate::correlate_node::{Machine, Node, SECOND, only_state, workload_of};
use tapio_wire::event::EntityId;
use tapio_wire::service::Finding;

const PULL: [&str; 3] = ["web", "ErrImagePull", "rpc error: code = NotFound"];
const DELETED: [&str; 3] = ["Ready", "NodeDeleted", ""];

/// How each state begins that only the object's own end used to end, and for how many minutes it may stay unreported.
type Begin = fn(&mut Node, u64, EntityId);
const STATES: [(&str, u64, Begin); 11] = [
    ("image-pull-failed", 10, |node, at, pod| node.waits(at, pod, PULL)),
    ("configuration-missing", 10, |node, at, pod| {
        node.waits(at, pod, ["web", "CreateContainerConfigError", "configmap \"settings\" not found"]);
    }),
    ("user-refused", 10, |node, at, pod| {
        node.waits(at, pod, ["web", "CreateContainerConfigError", "container has runAsNonRoot and image is root"]);
    }),
    ("container-not-created", 10, |node, at, pod| {
        node.waits(at, pod, ["web", "CreateContainerError", "device not found"]);
    }),
    ("start-failed", 10, |node, at, pod| node.container_ended(at, pod, "StartError", 128)),
    ("unschedulable", 10, |node, at, pod| {
        node.waits_for_a_node(at, pod, "Unschedulable", "0/3 nodes are available", false);
    }),
    ("scheduling-gated", 10, |node, at, pod| node.waits_for_a_node(at, pod, "SchedulingGated", "", false)),
    ("volume-not-mounted", 15, |node, at, pod| node.said(at, pod, "Pod", "FailedMount", "configmap \"x\" not found")),
    ("sandbox-failed", 15, |node, at, pod| node.said(at, pod, "Pod", "FailedCreatePodSandBox", "no addresses")),
    ("pods-refused", 40, |node, at, _| {
        node.said(at, workload_of("Deployment/web", "shop"), "ReplicaSet", "FailedCreate", "exceeded quota");
    }),
    ("runtime-hangs", 10, |node, at, _| node.node_is_ready(at, "PLEG is not healthy: 3m4s ago")),
];

#[test]
fn a_state_that_nobody_reports_any_more_is_over() {
    for (pattern, minutes, begin) in STATES {
        let mut node = Node::new("n1");
        let pod = node.kube_pod("Deployment/web", "shop/web-1");
        begin(&mut node, 100 * SECOND, pod);
        node.lethal(100 * SECOND);
        let quiet = 100 + minutes * 60;
        node.goes_on(120..quiet);
        assert!(only_state(&node, pattern).ongoing, "{pattern}: it may be reported again yet");
        // The pod was deleted while the collector was started anew.
        node.goes_on(quiet..quiet + 120);
        let over = only_state(&node, pattern);
        assert!(!over.ongoing && over.resolved_ns > over.ended_ns, "{pattern}: {over:#?}");
    }
}

#[test]
fn a_state_that_is_reported_again_goes_on() {
    for (pattern, minutes, begin) in STATES {
        let mut node = Node::new("n1");
        let pod = node.kube_pod("Deployment/web", "shop/web-1");
        for number in 0..5 {
            let at = 100 + number * (minutes - 1) * 60;
            begin(&mut node, at * SECOND, pod);
            node.lethal(at * SECOND);
            node.goes_on(at + 20..at + (minutes - 1) * 60);
        }
        let found = only_state(&node, pattern);
        assert!(found.ongoing, "{pattern}: {found:#?}");
    }
}

/// What the frames of two nodes lead to, as they came in time.
fn of_both(machine: &Machine, nodes: [&Node; 2]) -> Vec<Finding> {
    let mut frames: Vec<_> = nodes
        .iter()
        .flat_map(|node| node.frames.iter().map(|frame| (frame.header().boottime_ns, &node.node, frame)))
        .collect();
    frames.sort_by_key(|(at, _, _)| *at);
    for (_, node, frame) in frames {
        machine.deliver(node, std::slice::from_ref(frame));
    }
    machine.findings()
}

#[test]
fn after_an_election_another_collectors_reports_count() {
    let (mut first, mut second) = (Node::new("n1"), Node::new("n2"));
    let unscheduled = |node: &mut Node, at: u64| {
        let pod = node.kube_pod("Deployment/web", "shop/web-1");
        node.waits_for_a_node(at * SECOND, pod, "Unschedulable", "0/3 nodes are available", false);
        node.lethal(at * SECOND);
    };
    unscheduled(&mut first, 100);
    first.goes_on(120..1_000);
    for at in (200..1_000).step_by(120) {
        unscheduled(&mut second, at);
    }
    let found = of_both(&Machine::start(1), [&first, &second]);
    assert!(found.len() == 1 && found[0].ongoing, "{found:#?}");
    // And when that one reports it no more.
    second.goes_on(1_000..1_800);
    let found = of_both(&Machine::start(1), [&first, &second]);
    assert!(found.len() == 1 && !found[0].ongoing, "{found:#?}");
}

#[test]
fn what_a_deleted_node_had_reported_is_over() {
    let begun = |name: &str, pod: &str| {
        let mut node = Node::new(name);
        let itself = node.itself();
        let pod = node.kube_pod("Deployment/web", pod);
        node.trouble(100 * SECOND, itself, "disk-full", "/", false);
        node.waits(100 * SECOND, pod, PULL);
        node.lethal(100 * SECOND);
        node
    };
    let (gone, mut leader) = (begun("n1", "shop/web-1"), begun("n2", "blog/web-1"));
    assert_eq!(of_both(&Machine::start(1), [&gone, &leader]).iter().filter(|found| found.ongoing).count(), 4);
    leader.condition_of(200 * SECOND, "n1", DELETED, 2);
    let states = |found: &[Finding]| {
        let of = |node: &str| {
            let is_of = |one: &&Finding| one.entity.as_ref().is_some_and(|entity| entity.node == node);
            found.iter().filter(is_of).map(|one| one.ongoing).collect::<Vec<_>>()
        };
        (of("n1"), of("n2"))
    };
    let expected = (vec![false, false], vec![true, true]);
    let found = of_both(&Machine::start(1), [&gone, &leader]);
    assert_eq!(states(&found), expected, "{found:#?}");

    // What an earlier run of the server had found of it.
    let machine = Machine::start(1);
    of_both(&Machine::start(1), [&gone, &begun("n2", "blog/web-1")])
        .into_iter()
        .for_each(|found| machine.store.restore(found));
    machine.deliver(&leader.node, &leader.frames[1..]);
    let found = machine.findings();
    assert_eq!(states(&found), expected, "{found:#?}");
}

#[test]
fn a_recreated_node_keeps_what_it_reports_since() {
    let (mut node, mut leader) = (Node::new("n1"), Node::new("n2"));
    let itself = node.itself();
    for at in [100, 300] {
        node.trouble(at * SECOND, itself, "disk-full", "/", false);
        node.lethal(at * SECOND);
    }
    leader.condition_of(200 * SECOND, "n1", DELETED, 2);
    let found = of_both(&Machine::start(1), [&node, &leader]);
    assert!(found.len() == 1 && found[0].ongoing, "{found:#?}");
    // Its report may be there first.
    let machine = Machine::start(1);
    machine.deliver(&node.node, &node.frames);
    machine.deliver(&leader.node, &leader.frames);
    let found = machine.findings();
    assert!(found.len() == 1 && found[0].ongoing, "{found:#?}");
}

#[test]
fn a_kubelet_that_has_just_been_started_blames_no_runtime() {
    let mut node = Node::new("n1");
    node.node_is_ready(100 * SECOND, "[container runtime status check may not have completed yet]");
    node.node_is_ready(110 * SECOND, "");
    node.lethal(110 * SECOND);
    assert!(crate::correlate_node::findings_of(&node).is_empty());
}
