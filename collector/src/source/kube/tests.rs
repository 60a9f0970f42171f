//! What goes on is reported again, since its end may be missed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::claims::KnownClaims;
use super::nodes::Nodes;
use super::objects::{Node, Pod};
use super::pods::Pods;
use super::report::WatchReport;
use super::waiting::Waiting;
use super::watch::Follower;
use crate::intake::identity::directory::Directory;
use crate::settings::config::STUCK_AFTER;

const LONG_AGO: &str = "2026-01-01T00:00:00Z";

fn read<T: serde::de::DeserializeOwned>(object: Value) -> T {
    serde_json::from_value(object).expect("an object")
}

/// How many reports each of these moments brings, seconds after the object was seen.
fn looks<F: Follower>(follower: &mut F, kept: &mut F::Kept, at: &[u64]) -> Vec<usize> {
    let now = Instant::now();
    at.iter()
        .map(|seconds| {
            let mut reports: Vec<WatchReport> = Vec::new();
            follower.look(now + Duration::from_secs(*seconds), kept, &mut reports);
            reports.len()
        })
        .collect()
}

fn pod(phase: &str, state: Value, last: Value) -> Pod {
    read(json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "u1"},
        "spec": {"containers": [{"name": "web", "image": "web:1"}], "nodeName": "node1"},
        "status": {"phase": phase, "containerStatuses": [
            {"name": "web", "image": "web:1", "state": state, "lastState": last},
        ]},
    }))
}

fn pods() -> Pods {
    Pods::new(Arc::<Directory>::default(), false, STUCK_AFTER)
}

#[test]
fn what_keeps_a_container_from_running_is_reported_again() {
    let waiting = |reason: &str| json!({"waiting": {"reason": reason, "message": "what kubelet says"}});
    let ended = |reason: &str| json!({"terminated": {"reason": reason, "exitCode": 128, "finishedAt": LONG_AGO}});
    let cases = [
        ("Pending", waiting("ImagePullBackOff"), Value::Null, true),
        ("Pending", waiting("CreateContainerConfigError"), Value::Null, true),
        ("Running", waiting("CrashLoopBackOff"), ended("StartError"), true),
        ("Running", ended("StartError"), Value::Null, true),
        // On their way, running, or known by their ends.
        ("Pending", waiting("ContainerCreating"), Value::Null, false),
        ("Running", json!({"running": {"startedAt": LONG_AGO}}), ended("StartError"), false),
        ("Running", waiting("CrashLoopBackOff"), ended("Error"), false),
        ("Failed", ended("StartError"), Value::Null, false),
    ];
    for (phase, state, last, lasts) in cases {
        let (mut follower, mut reports) = (pods(), Vec::new());
        let mut kept = follower.seen(&pod(phase, state.clone(), last), None, true, &mut reports).expect("kept");
        let found = looks(&mut follower, &mut kept, &[60, 121, 130, 242]);
        assert_eq!(found, if lasts { [0, 1, 0, 1] } else { [0; 4] }, "{phase} {state}");
        let runs = pod("Running", json!({"running": {"startedAt": LONG_AGO}}), Value::Null);
        let mut kept = follower.seen(&runs, Some(kept), false, &mut reports).expect("kept");
        assert_eq!(looks(&mut follower, &mut kept, &[400]), [0]);
    }
}

#[test]
fn a_pod_that_no_node_takes_is_reported_again() {
    let said = |status: &str| {
        let condition = json!({"type": "PodScheduled", "status": status, "reason": "Unschedulable", "message": "0/1"});
        read::<Pod>(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u1"}, "status": {"conditions": [condition]},
        }))
    };
    for (status, expected) in [("False", [0, 1, 0, 1]), ("True", [0; 4])] {
        let (mut follower, mut reports) = (Waiting::new(false, STUCK_AFTER, KnownClaims::default()), Vec::new());
        let mut kept = follower.seen(&said(status), None, true, &mut reports).expect("kept");
        assert_eq!(looks(&mut follower, &mut kept, &[60, 121, 130, 242]), expected, "{status}");
    }
}

#[test]
fn a_pod_no_scheduler_looks_at_is_reported_meanwhile() {
    let pod = |created: &str, conditions: Value| {
        read::<Pod>(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u1", "creationTimestamp": created},
            "spec": {"schedulerName": "my-scheduler"}, "status": {"conditions": conditions},
        }))
    };
    let mut follower = Waiting::new(false, STUCK_AFTER, KnownClaims::default());
    let mut see = |pod: &Pod, kept| {
        let mut reports = Vec::new();
        let kept = follower.seen(pod, kept, false, &mut reports).expect("kept");
        (kept, reports.len())
    };
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    assert_eq!(see(&pod(&now, json!([])), None).1, 0, "it was made just now");
    let (mut kept, begun) = see(&pod(LONG_AGO, json!([])), None);
    assert_eq!(begun, 1);
    let mut other = Waiting::new(false, STUCK_AFTER, KnownClaims::default());
    assert_eq!(looks(&mut other, &mut kept, &[60, 121, 130, 242]), [0, 1, 0, 1]);
    let said = json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1"}]);
    let (_, over) = see(&pod(LONG_AGO, said), Some(kept));
    assert_eq!(over, 2, "the scheduler's word, and that it has spoken");
    let (kept, _) = see(&pod(LONG_AGO, json!([])), None);
    let mut reports = Vec::new();
    other.gone(kept, &mut reports);
    assert_eq!(reports.len(), 1, "it has a node, or is gone");
}

#[test]
fn an_unbound_claim_is_reported_with_its_waiting_pod() {
    let condition = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1"});
    let pod: Pod = read(json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "u1"},
        "spec": {"volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]},
        "status": {"conditions": [condition]},
    }));
    let claims = KnownClaims::default();
    let (mut follower, mut reports) = (Waiting::new(false, STUCK_AFTER, claims.clone()), Vec::new());
    let mut kept = follower.seen(&pod, None, true, &mut reports).expect("kept");
    assert_eq!(reports.len(), 1, "nothing is known of the claim");
    claims.seen("shop", "data", "Pending");
    assert_eq!(looks(&mut follower, &mut kept, &[15, 30]), [1, 0], "at once, and once");
    assert_eq!(looks(&mut follower, &mut kept, &[130]), [2], "both again");
    claims.seen("shop", "data", "Bound");
    assert_eq!(looks(&mut follower, &mut kept, &[140, 260]), [0, 1], "it waits for something else");
}

#[test]
fn a_node_unready_for_long_is_reported_until_ready() {
    let node = |status: &str, since: &str| {
        read::<Node>(json!({
            "metadata": {"name": "node1"},
            "status": {"conditions": [
                {"type": "Ready", "status": status, "reason": "KubeletNotReady", "lastTransitionTime": since},
            ]},
        }))
    };
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    let mut follower = Nodes::new(Arc::default(), STUCK_AFTER);
    let mut see = |node: &Node, kept| {
        let mut reports = Vec::new();
        let kept = follower.seen(node, kept, false, &mut reports).expect("kept");
        (kept, reports.len())
    };
    // With Ready and Schedulable.
    let (kept, begun) = see(&node("False", &now), None);
    assert_eq!(begun, 2, "a node that starts or is started anew is not ready for a while");
    let (kept, begun) = see(&node("True", &now), Some(kept));
    assert_eq!(begun, 1, "and it was never told to be");
    let (kept, begun) = see(&node("Unknown", LONG_AGO), Some(kept));
    assert_eq!(begun, 2);
    let (mut kept, again) = see(&node("Unknown", LONG_AGO), Some(kept));
    assert_eq!(again, 0);
    let mut other = Nodes::new(Arc::default(), STUCK_AFTER);
    assert_eq!(looks(&mut other, &mut kept, &[60, 121, 130, 242]), [0, 1, 0, 1]);
    let (mut kept, over) = see(&node("True", &now), Some(kept));
    assert_eq!(over, 2, "Ready, and that it is not NotReady any more");
    assert_eq!(looks(&mut other, &mut kept, &[400]), [0]);
}

/// A drain may begin hours after the cordon.
#[test]
fn a_cordoned_node_is_reported_again_until_uncordoned() {
    let node = |is_cordoned: bool| {
        read::<Node>(json!({"metadata": {"name": "node1"}, "spec": {"unschedulable": is_cordoned}, "status": {}}))
    };
    let (mut follower, mut reports) = (Nodes::new(Arc::default(), STUCK_AFTER), Vec::new());
    let kept = follower.seen(&node(true), None, true, &mut reports).expect("kept");
    // Kubelet's heartbeat puts nothing off.
    let mut kept = follower.seen(&node(true), Some(kept), false, &mut reports).expect("kept");
    assert_eq!(reports.len(), 1);
    let mut other = Nodes::new(Arc::default(), STUCK_AFTER);
    assert_eq!(looks(&mut other, &mut kept, &[300, 601, 610, 1202]), [0, 1, 0, 1]);
    let mut kept = follower.seen(&node(false), Some(kept), false, &mut reports).expect("kept");
    assert_eq!((reports.len(), looks(&mut other, &mut kept, &[3000])), (2, vec![0]));
}
