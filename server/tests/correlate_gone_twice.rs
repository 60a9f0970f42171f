//! Pods of which two say why they are gone: one finding, and no certainty where there is none.

use tapio_wire::event::EntityId;
use tapio_wire::service::Finding;

use crate::correlate_node::{Node, SECOND, findings_of};

const SHUTDOWN: [&str; 2] = ["Terminated", "Pod was terminated in response to imminent node shutdown."];
const PREEMPTED: [&str; 2] = ["Preempting", "Preempted in order to admit critical pod"];
const SHORT: [&str; 2] = ["Evicted", "The node was low on resource: memory. "];
const BY_API: [&str; 2] = ["EvictionByEvictionAPI", "Eviction API: evicting"];
const BY_TAINT: [&str; 2] = ["DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"];
const BY_SCHEDULER: [&str; 2] = ["PreemptionByScheduler", "Preempted by pod pay/urgent on node n1"];

fn web(node: &mut Node, number: u32) -> EntityId {
    node.kube_pod("Deployment/web", &format!("shop/web-{number}"))
}

/// What is found, by pattern and confidence.
fn told(found: &[Finding]) -> Vec<(&str, f64)> {
    found.iter().map(|one| (&*one.pattern, one.confidence)).collect()
}

fn the_one(node: &Node, why: &str) -> Finding {
    let mut found = findings_of(node);
    assert_eq!(found.len(), 1, "{why}: {:?}", told(&found));
    found.remove(0)
}

#[test]
fn kubelets_word_during_a_deletion_leaves_both_in_doubt() {
    for asked in [BY_API, BY_TAINT, BY_SCHEDULER, ["", ""]] {
        for said in [SHUTDOWN, PREEMPTED, SHORT] {
            let mut node = Node::new("n1");
            let pod = web(&mut node, 1);
            node.pod_says(99 * SECOND, pod, asked, false);
            node.pod_says(100 * SECOND, pod, asked, true);
            node.pod_says(112 * SECOND, pod, said, true);
            node.pod_gone(115 * SECOND, pod);
            node.lethal(116 * SECOND);
            let found = the_one(&node, &format!("{asked:?}, {said:?}"));
            assert_eq!((&*found.pattern, found.count), ("ended-while-deleted", 1), "{found:#?}");
            assert!(found.confidence < 0.8, "{found:#?}");
            assert!(found.title.contains(said[1].trim()) && found.summary.contains(asked[0]), "{found:#?}");
        }
    }
}

#[test]
fn a_drained_pod_whose_node_shuts_down_is_one_finding() {
    let mut node = Node::new("n1");
    node.node_condition(90 * SECOND, "Schedulable", 0);
    let pods = [1, 2, 3].map(|number| web(&mut node, number));
    for pod in pods {
        node.pod_says(100 * SECOND, pod, BY_API, true);
    }
    node.pod_says(110 * SECOND, pods[2], SHUTDOWN, true);
    node.lethal(120 * SECOND);
    let mut found = findings_of(&node);
    found.sort_by(|a, b| a.pattern.cmp(&b.pattern));
    let counts: Vec<_> = found.iter().map(|one| (&*one.pattern, one.count)).collect();
    assert_eq!(counts, [("ended-while-deleted", 1), ("evicted-by-drain", 2)], "{found:#?}");
    assert!(found.iter().all(|one| one.confidence < 0.8), "{:?}", told(&found));
}

/// A node that was shut down is not ready, and its pods are deleted for that five minutes later.
#[test]
fn what_kubelet_ended_is_only_cleaned_up_later() {
    for (said, expected) in [(SHUTDOWN, "node-shutdown"), (PREEMPTED, "preempted-by-kubelet"), (SHORT, "evicted")] {
        let mut node = Node::new("n1");
        let pod = web(&mut node, 1);
        node.node_condition(90 * SECOND, "Schedulable", 0);
        node.pod_says(100 * SECOND, pod, said, false);
        node.said(399 * SECOND, pod, "Pod", "TaintManagerEviction", "Marking for deletion Pod shop/web-1");
        node.pod_says(400 * SECOND, pod, said, true);
        node.lethal(401 * SECOND);
        let found = the_one(&node, expected);
        assert_eq!(found.pattern, expected);
    }
}

#[test]
fn pods_that_had_ended_are_neither_evicted_nor_drained() {
    for asked in [BY_API, BY_TAINT, BY_SCHEDULER, ["", ""]] {
        for phase in ["Succeeded", "Failed"] {
            let mut node = Node::new("n1");
            node.node_condition(40 * SECOND, "Schedulable", 0);
            for pod in [1, 2, 3].map(|number| web(&mut node, number)) {
                node.pod_is(50 * SECOND, pod, phase, ["", ""], false);
                node.pod_is(100 * SECOND, pod, phase, asked, true);
            }
            node.lethal(101 * SECOND);
            let found = findings_of(&node);
            assert!(found.is_empty(), "{asked:?}, {phase}: {:?}", told(&found));
        }
    }
}

/// A finalizer keeps what has run to its end, for longer than a pattern looks back.
#[test]
fn a_pod_that_ended_long_ago_was_not_evicted() {
    for asked in [BY_API, BY_TAINT, BY_SCHEDULER] {
        let mut node = Node::new("n1");
        let pod = web(&mut node, 1);
        node.pod_is(50 * SECOND, pod, "Succeeded", ["", ""], false);
        node.pod_is(2000 * SECOND, pod, "Succeeded", asked, true);
        node.lethal(2001 * SECOND);
        let found = findings_of(&node);
        assert!(found.iter().all(|one| one.confidence < 0.8), "{asked:?}: {:?}", told(&found));
    }
}

#[test]
fn a_late_condition_does_not_rename_a_persons_deletion() {
    for (late, pattern) in [(BY_API, "evicted-by-api"), (BY_TAINT, "evicted-by-taint"), (BY_SCHEDULER, "preempted")] {
        for (after, expected) in [(1, pattern), (10, "pod-deleted"), (30, "pod-deleted"), (59, "pod-deleted")] {
            let mut node = Node::new("n1");
            let pod = web(&mut node, 1);
            node.pod_says(100 * SECOND, pod, ["", ""], true);
            node.pod_says((100 + after) * SECOND, pod, late, true);
            node.lethal(170 * SECOND);
            let found = the_one(&node, &format!("{late:?} after {after} s"));
            assert_eq!(found.pattern, expected, "{late:?} after {after} s");
            assert!(expected != "pod-deleted" || found.confidence < 0.8);
        }
    }
    for (reason, message) in [
        ("TaintManagerEviction", "Marking for deletion Pod shop/web-1"),
        ("Preempted", "Preempted by pod pay/urgent on node n1"),
    ] {
        let mut node = Node::new("n1");
        let pod = web(&mut node, 1);
        node.pod_says(100 * SECOND, pod, ["", ""], true);
        node.said(120 * SECOND, pod, "Pod", reason, message);
        node.pod_gone(130 * SECOND, pod);
        node.lethal(131 * SECOND);
        let found = the_one(&node, reason);
        assert_eq!(found.pattern, "deletion-claimed-later", "{reason}");
        assert!(found.confidence < 0.8 && found.summary.contains(message), "{found:#?}");
    }
}

#[test]
fn only_evictions_after_the_cordon_count_as_drained() {
    // Three went before the cordon, two of which were still going after it.
    for after in [1, 2] {
        let mut node = Node::new("n1");
        for (number, at) in [(1, 60), (2, 70), (3, 80)] {
            let pod = web(&mut node, number);
            node.pod_says(at * SECOND, pod, BY_API, true);
            node.pod_is((at + 25) * SECOND, pod, "Failed", BY_API, true);
        }
        node.node_condition(90 * SECOND, "Schedulable", 0);
        for number in 0..after {
            let pod = web(&mut node, 10 + number);
            node.pod_says((110 + u64::from(number)) * SECOND, pod, BY_API, true);
        }
        node.lethal(200 * SECOND);
        let found = findings_of(&node);
        let drained: Vec<_> =
            found.iter().filter(|one| one.pattern == "evicted-by-drain").map(|one| one.count).collect();
        assert_eq!(drained, if after == 2 { vec![2] } else { vec![] }, "{found:#?}");
        let by_api: Vec<_> = found.iter().filter(|one| one.pattern == "evicted-by-api").map(|one| one.count).collect();
        assert_eq!(by_api.iter().sum::<u32>(), if after == 2 { 3 } else { 4 }, "{found:#?}");
    }
}

#[test]
fn a_cordon_reported_again_keeps_what_followed_it() {
    let mut node = Node::new("n1");
    node.node_condition(90 * SECOND, "Schedulable", 0);
    for (number, at) in [(1, 100), (2, 110), (3, 130)] {
        // Another collector begins to watch, and reports what there is.
        if number == 3 {
            node.node_condition(120 * SECOND, "Schedulable", 0);
        }
        let pod = web(&mut node, number);
        node.pod_says(at * SECOND, pod, BY_API, true);
    }
    node.lethal(140 * SECOND);
    let found = the_one(&node, "one drain");
    assert_eq!((&*found.pattern, found.count), ("evicted-by-drain", 3), "{found:#?}");
}

#[test]
fn deletions_before_a_cordon_are_no_drain() {
    let mut node = Node::new("n1");
    for (number, at) in [(1, 60), (2, 110)] {
        let pod = web(&mut node, number);
        node.pod_says(at * SECOND, pod, ["", ""], true);
        node.pod_is((at + 40) * SECOND, pod, "Failed", ["", ""], true);
    }
    node.node_condition(90 * SECOND, "Schedulable", 0);
    node.lethal(200 * SECOND);
    let mut found = findings_of(&node);
    found.sort_by(|a, b| a.pattern.cmp(&b.pattern));
    let counts: Vec<_> = found.iter().map(|one| (&*one.pattern, one.count)).collect();
    assert_eq!(counts, [("drained", 1), ("pod-deleted", 1)], "{found:#?}");
}

#[test]
fn autoscaler_evictions_from_a_cordoned_node_are_no_drain() {
    for said in [
        "Pod was evicted by VPA Updater to apply resource recommendation.",
        "pod evicted from n1 node by sigs.k8s.io/descheduler",
    ] {
        let mut node = Node::new("n1");
        node.node_condition(90 * SECOND, "Schedulable", 0);
        for number in 1..=3 {
            let (pod, at) = (web(&mut node, number), (100 + u64::from(number)) * SECOND);
            node.pod_says(at, pod, BY_API, true);
            node.said(at + SECOND, pod, "Pod", "EvictedByVPA", said);
        }
        node.lethal(110 * SECOND);
        let found = findings_of(&node);
        assert!(!found.is_empty() && found.iter().all(|one| one.pattern == "evicted-by-api"), "{:?}", told(&found));
        assert!(found[0].summary.contains(said), "{}", found[0].summary);
    }
}

#[test]
fn a_full_stop_after_kubelets_own_is_left_out() {
    for said in [SHUTDOWN, SHORT, ["TerminationByKubelet", "Why it was. "], ["DeadlineExceeded", "Too long."]] {
        let mut node = Node::new("n1");
        let pod = web(&mut node, 1);
        node.pod_says(100 * SECOND, pod, said, false);
        node.lethal(101 * SECOND);
        let found = the_one(&node, said[0]);
        let verdict = found.death.as_ref().map_or("", |death| &*death.verdict);
        for text in [&*found.title, &*found.summary, verdict] {
            assert!(!text.contains("..") && !text.contains(". ."), "{text}");
        }
        assert!(found.summary.contains(said[1].trim()), "{}", found.summary);
    }
}

#[test]
fn kubelets_exact_word_replaces_its_general_one() {
    let mut node = Node::new("n1");
    let pod = web(&mut node, 1);
    node.pod_says(100 * SECOND, pod, ["TerminationByKubelet", SHORT[1]], false);
    node.pod_says(101 * SECOND, pod, SHORT, false);
    node.lethal(102 * SECOND);
    assert_eq!(the_one(&node, "evicted").pattern, "evicted");
}

#[test]
fn a_pod_whose_node_is_gone_goes_with_it() {
    let collected = ["DeletionByPodGC", "PodGC: node no longer exists"];
    for (before, expected) in [(["", ""], "node-gone"), (BY_TAINT, "evicted-by-taint")] {
        let mut node = Node::new("n1");
        let (pod, was_asked) = (web(&mut node, 1), !before[0].is_empty());
        if was_asked {
            node.pod_says(50 * SECOND, pod, before, true);
        }
        // The garbage collector says that it failed, and deletes it then.
        node.pod_is(100 * SECOND, pod, "Failed", collected, was_asked);
        node.pod_is(101 * SECOND, pod, "Failed", collected, true);
        node.lethal(102 * SECOND);
        assert_eq!(the_one(&node, expected).pattern, expected);
    }
}
