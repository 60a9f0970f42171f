//! A node that is not ready, and what looks like it.

use crate::correlate_node::{BOOTED, Node, SECOND, findings_of, only_state};
use tapio_wire::service::Finding;

const SILENT: &str = "Kubelet stopped posting node status.";
const PLEG: &str = "PLEG is not healthy: pleg was last seen active 3m4s ago";
const NO_NETWORK: &str = "container runtime network not ready: cni plugin not initialized";

/// Kubernetes says why n1 is not ready: by its condition, which changes, and by what is reported while that lasts.
fn not_ready(leader: &mut Node, at: u64, message: &str) {
    let reason = if message == SILENT { "NodeStatusUnknown" } else { "KubeletNotReady" };
    let status = if message == SILENT { 2 } else { 0 };
    leader.condition_of(at * SECOND, "n1", ["Ready", reason, message], status);
    for at in [at + 180, at + 300] {
        leader.condition_of(at * SECOND, "n1", ["NotReady", reason, message], 1);
    }
}

fn texts(found: &Finding) -> (&str, &str, usize) {
    (&found.title, &found.summary, found.consequences.len())
}

#[test]
fn an_unready_node_is_reported_until_ready_or_gone() {
    let ends = [(["Ready", "KubeletReady", ""], 1), (["NotReady", "", ""], 0), (["Ready", "NodeDeleted", ""], 2)];
    for (message, reason) in [(SILENT, "NodeStatusUnknown"), (NO_NETWORK, "KubeletNotReady")] {
        for (end, status) in ends {
            let mut leader = Node::new("n2");
            not_ready(&mut leader, 100, message);
            let found = only_state(&leader, "node-not-ready");
            let (title, summary, _) = texts(&found);
            assert!(found.ongoing && title.starts_with("node n1 has not been ready for 60"), "{title}");
            assert!(summary.contains(reason) && summary.contains(message), "{summary}");
            assert!(!summary.contains("cordoned") && !summary.contains("started anew"), "{summary}");
            assert_eq!(found.started_ns, BOOTED + 220 * SECOND, "a minute before the first of them");
            leader.condition_of(500 * SECOND, "n1", end, status);
            assert!(!only_state(&leader, "node-not-ready").ongoing, "{end:?}");
        }
    }
}

#[test]
fn a_node_that_starts_or_is_deleted_is_not_reported() {
    let mut leader = Node::new("n2");
    // One that joins, or whose kubelet is restarted: not for long.
    leader.condition_of(100 * SECOND, "n1", ["Ready", "KubeletNotReady", NO_NETWORK], 0);
    leader.condition_of(130 * SECOND, "n1", ["Ready", "KubeletReady", ""], 1);
    leader.condition_of(200 * SECOND, "n1", ["Ready", "NodeDeleted", ""], 2);
    assert!(findings_of(&leader).is_empty());
}

#[test]
fn a_node_at_which_somebody_works_is_said_to_be() {
    let mut leader = Node::new("n2");
    leader.condition_of(90 * SECOND, "n1", ["Schedulable", "", ""], 0);
    not_ready(&mut leader, 100, SILENT);
    let id = tapio_wire::node_id("n1");
    leader.said_of(410 * SECOND, id, ["Node", "n1", "Rebooted", "Node n1 has been rebooted, boot id: 7"]);
    leader.lethal(410 * SECOND);
    let found = only_state(&leader, "node-not-ready");
    let (_, summary, _) = texts(&found);
    assert!(summary.contains("cordoned as well") && summary.contains("has been rebooted"), "{summary}");
}

#[test]
fn a_runtime_that_does_not_answer_says_it_better() {
    let mut leader = Node::new("n2");
    not_ready(&mut leader, 100, PLEG);
    let found = only_state(&leader, "runtime-hangs");
    assert!(found.ongoing && found.title.contains("node n1"), "{found:#?}");
    // Then kubelet falls silent as well.
    not_ready(&mut leader, 500, SILENT);
    let found = only_state(&leader, "runtime-hangs");
    assert!(found.ongoing && found.consequences.len() == 1, "{found:#?}");
    assert_eq!(found.consequences[0].pattern, "node-not-ready");
    // Nobody has spoken of the runtime for ten minutes, and the node is still not ready.
    for at in (920..1_600).step_by(120) {
        leader.condition_of(at * SECOND, "n1", ["NotReady", "NodeStatusUnknown", SILENT], 1);
    }
    let found = findings_of(&leader);
    let mut states: Vec<_> = found.iter().map(|one| (&*one.pattern, one.ongoing, one.consequences.len())).collect();
    states.sort_unstable();
    assert_eq!(states, [("node-not-ready", true, 0), ("runtime-hangs", false, 0)], "{found:#?}");
}

#[test]
fn a_failed_kubelet_explains_its_unready_node() {
    let mut node = Node::new("n1");
    let kubelet = node.unit("kubelet.service");
    node.unit_state(100 * SECOND, kubelet, "kubelet.service", "failed", "exit-code");
    node.lethal(100 * SECOND);
    not_ready(&mut node, 140, SILENT);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((&*found[0].pattern, texts(&found[0]).2), ("runtime-died", 1), "{found:#?}");
}
