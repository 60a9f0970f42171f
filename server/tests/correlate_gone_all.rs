//! A pod ends once: whatever is said of it, by whom and in which order, one finding explains that end.

use std::collections::BTreeMap;

use tapio_wire::event::EntityId;
use tapio_wire::service::Finding;

use crate::correlate_node::{Machine, Node, SECOND, findings_of};

/// Patterns that say why a pod is gone.
const ENDS: [&str; 19] = [
    "deadline-exceeded",
    "deletion-claimed-later",
    "deletion-claimed-twice",
    "deleted-in-scale-down",
    "disk-full-eviction",
    "drained",
    "ended-by-controller",
    "ended-by-kubelet",
    "ended-while-deleted",
    "evicted",
    "evicted-by-api",
    "evicted-by-drain",
    "evicted-by-taint",
    "node-gone",
    "node-shutdown",
    "pod-deleted",
    "preempted",
    "preempted-by-kubelet",
    "storage-limit-eviction",
];

const MS: u64 = 1_000_000;
const SCALED: &str = "Scaled down replica set web-a to 1";

/// What somebody says, when in milliseconds, and how.
type Word = (&'static str, u64, fn(&mut Node, EntityId, u64));

fn said_of_pod(node: &mut Node, pod: EntityId, at: u64, reason: &str, message: &str) {
    node.said_of(at, pod, ["Pod", "web-1", reason, message]);
}

fn said_of_workload(node: &mut Node, at: u64, reason: &str, message: &str) {
    let workload = node.kube_workload("Deployment/web", "shop");
    node.said(at, workload, "Deployment", reason, message);
}

/// Of a deletion at 100 s: every one may be said, and none need be.
const WORDS: [Word; 14] = [
    ("cordon", 90_000, |node, _, at| node.node_condition(at, "Schedulable", 0)),
    ("rollout", 80_000, |node, _, at| node.rollout(at, "Deployment/web", "shop", Some("shop/web:1"))),
    ("scaled", 99_900, |node, _, at| said_of_workload(node, at, "ScalingReplicaSet", SCALED)),
    ("scaled later", 104_000, |node, _, at| said_of_workload(node, at, "ScalingReplicaSet", SCALED)),
    ("named", 100_200, |node, _, at| said_of_workload(node, at, "SuccessfulDelete", "Deleted pod: web-1")),
    ("other named", 100_300, |node, _, at| said_of_workload(node, at, "SuccessfulDelete", "Deleted pod: web-2")),
    ("preempted", 100_100, |node, pod, at| said_of_pod(node, pod, at, "Preempted", "Preempted by shop/urgent")),
    ("preempted later", 105_000, |node, pod, at| said_of_pod(node, pod, at, "Preempted", "Preempted by shop/urgent")),
    ("taint", 99_800, |node, pod, at| {
        said_of_pod(node, pod, at, "TaintManagerEviction", "Marking for deletion Pod shop/web-1");
    }),
    ("taint later", 106_000, |node, pod, at| {
        said_of_pod(node, pod, at, "TaintManagerEviction", "Marking for deletion Pod shop/web-1");
    }),
    ("by scheduler", 100_000, |node, pod, at| node.pod_says(at, pod, ["PreemptionByScheduler", "preempting"], true)),
    ("by taint", 100_000, |node, pod, at| node.pod_says(at, pod, ["DeletionByTaintManager", "deleting"], true)),
    ("by API", 100_000, |node, pod, at| node.pod_says(at, pod, ["EvictionByEvictionAPI", "evicting"], true)),
    ("kubelet", 112_000, |node, pod, at| {
        node.pod_says(at, pod, ["Terminated", "Pod was terminated in response to imminent node shutdown."], true);
    }),
];

/// What the API server itself says of the pod's deletion: that it was asked for, that the pod has ended, and that it is gone.
fn deletion(node: &mut Node, pod: EntityId, words: &[Word]) {
    let reason = reason_of(words);
    if !["by scheduler", "by taint", "by API"].iter().any(|name| has(words, name)) {
        node.pod_says(100_000 * MS, pod, ["", ""], true);
    }
    node.pod_is(120_000 * MS, pod, "Succeeded", [reason, ""], true);
    node.pod_is(125_000 * MS, pod, "Succeeded", [reason, ""], true);
}

/// The reason that stays on the object.
fn reason_of(words: &[Word]) -> &'static str {
    let reasons = [
        ("kubelet", "Terminated"),
        ("by scheduler", "PreemptionByScheduler"),
        ("by taint", "DeletionByTaintManager"),
        ("by API", "EvictionByEvictionAPI"),
    ];
    let known = reasons.into_iter().find(|(name, _)| words.iter().any(|word| word.0 == *name));
    known.map_or("", |(_, reason)| reason)
}

fn has(words: &[Word], name: &str) -> bool {
    words.iter().any(|word| word.0 == name)
}

/// What explains its end: the pattern, and whether it is certain.
fn ends(found: &[Finding]) -> Vec<(String, bool)> {
    let of_end = found.iter().filter(|one| ENDS.contains(&&*one.pattern) && !one.withdrawn);
    of_end.map(|one| (one.pattern.clone(), one.confidence >= 0.8)).collect()
}

/// The words by one watcher, in the order of their times.
fn told(words: &[Word]) -> Vec<(String, bool)> {
    let mut node = Node::new("n1");
    let pod = node.kube_pod("Deployment/web", "shop/web-1");
    for (_, at, say) in words {
        say(&mut node, pod, at * MS);
    }
    deletion(&mut node, pod, words);
    node.lethal(200 * SECOND);
    ends(&findings_of(&node))
}

/// Conditions exclude each other: the API has one reason.
fn is_possible(words: &[Word]) -> bool {
    let of_condition = ["by scheduler", "by taint", "by API"];
    words.iter().filter(|word| of_condition.contains(&word.0)).count() <= 1
}

fn groups() -> Vec<Vec<Word>> {
    let mut groups: Vec<Vec<Word>> = vec![Vec::new()];
    for (index, first) in WORDS.iter().enumerate() {
        groups.push(vec![*first]);
        for (other, second) in WORDS.iter().enumerate().skip(index + 1) {
            groups.push(vec![*first, *second]);
            groups.extend(WORDS[other + 1..].iter().map(|third| vec![*first, *second, *third]));
        }
    }
    groups.retain(|words| is_possible(words));
    groups
}

#[test]
fn whatever_is_said_one_finding_explains_a_pods_end() {
    let mut wrong = BTreeMap::new();
    for words in groups() {
        let names: Vec<&str> = words.iter().map(|word| word.0).collect();
        let found = told(&words);
        let certain = match &found[..] {
            [(pattern, is_certain)] => is_certain.then_some(&**pattern),
            _ => {
                wrong.insert(names, found);
                continue;
            }
        };
        let of_condition = ["by scheduler", "by taint", "by API"];
        let has_condition = words.iter().any(|word| of_condition.contains(&word.0));
        let by_event = |one: &str, other: &str| has(&words, one) && !has(&words, other) && !has_condition;
        // Who may be named with certainty.
        let is_due = match certain {
            None => true,
            // Where two say that they did it, and the pod's conditions do not say who, nobody is.
            Some("preempted") => by_event("preempted", "taint") || has(&words, "by scheduler"),
            Some("evicted-by-taint") => by_event("taint", "preempted") || has(&words, "by taint"),
            Some("evicted-by-api") => has(&words, "by API"),
            Some("ended-by-controller") => has(&words, "named"),
            Some(_) => false,
        };
        if !is_due {
            wrong.insert(names, found);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The words of several watchers, whose frames arrive in any order.
#[test]
fn the_order_of_words_about_an_end_does_not_matter() {
    let words = |names: &[&str]| -> Vec<Word> { WORDS.into_iter().filter(|word| names.contains(&word.0)).collect() };
    for (names, expected) in [
        (&["cordon", "scaled", "named"][..], ("ended-by-controller", true)),
        (&["cordon", "scaled later", "other named"], ("deleted-in-scale-down", false)),
        (&["cordon", "preempted later", "scaled"], ("deletion-claimed-later", false)),
        (&["cordon", "preempted", "named"], ("preempted", true)),
        (&["cordon", "by API", "taint later"], ("evicted-by-api", true)),
        (&["preempted", "taint", "scaled"], ("deletion-claimed-twice", false)),
        (&["taint", "preempted later", "cordon"], ("evicted-by-taint", true)),
        (&["by taint", "kubelet", "scaled"], ("ended-while-deleted", false)),
        (&["cordon", "kubelet", "preempted later"], ("ended-while-deleted", false)),
        // It is another node that was cordoned.
        (&["cordon", "rollout"], ("pod-deleted", false)),
    ] {
        let words = words(names);
        let mut nodes = Vec::new();
        for (index, (_, at, say)) in words.iter().enumerate() {
            let mut node = Node::new(&format!("k{index}"));
            let pod = node.kube_pod("Deployment/web", "shop/web-1");
            say(&mut node, pod, at * MS);
            node.lethal(at * MS);
            nodes.push(node);
        }
        let mut node = Node::new("n1");
        let pod = node.kube_pod("Deployment/web", "shop/web-1");
        deletion(&mut node, pod, &words);
        node.lethal(200 * SECOND);
        nodes.push(node);
        for order in orders(nodes.len()) {
            let machine = Machine::start(1);
            for place in &order {
                machine.deliver(&nodes[*place].node, &nodes[*place].frames);
                machine.settle();
            }
            let found = ends(&machine.findings());
            assert_eq!(found, [(expected.0.to_owned(), expected.1)], "{names:?} in the order {order:?}");
        }
    }
}

/// Every order of so many.
fn orders(many: usize) -> Vec<Vec<usize>> {
    let mut orders = vec![Vec::new()];
    for next in 0..many {
        let places =
            |order: Vec<usize>| (0..=order.len()).map(move |at| [&order[..at], &[next], &order[at..]].concat());
        orders = orders.into_iter().flat_map(places).collect();
    }
    orders
}
