//! Whose connections a full table costs, and whose lookups get no answer: states of the workload that suffers.

use tapio_wire::event::{Detail, EntityId, Lane};
use tapio_wire::service::Finding;

use crate::correlate_node::{MS, Node, Process, SECOND, findings_of, only_state};

const SYN_RETRANSMITTED: u8 = 6;
const UNANSWERED: u8 = 255;
const SERVFAIL: u8 = 2;

fn web(node: &mut Node) -> EntityId {
    node.kube_container("Deployment/web", "shop/web-0", "c0")
}

fn shop(node: &mut Node) -> EntityId {
    node.kube_container("Deployment/shop", "shop/shop-0", "c1")
}

/// The node goes on, and nothing is wrong.
fn elapse(node: &mut Node, from: u64, until: u64) {
    let other = node.container("c9", "other");
    for at in (from..until).step_by(20) {
        node.exit(at * SECOND, Process::child(other, at as u32, "sh"), 0);
    }
    node.lethal(until * SECOND);
}

fn lookups_fail(node: &mut Node, at: u64, entity: EntityId, rcode: u8) {
    for step in 0..4 {
        let lookup = Detail::Dns { latency_ns: 0, name: u32::MAX, query_type: 1, rcode };
        node.push(at * SECOND + step * MS, entity, 0, lookup);
    }
    node.frame(Lane::Bulk, at * SECOND + SECOND);
}

fn patterns(found: &[Finding]) -> Vec<&str> {
    found.iter().map(|finding| &*finding.pattern).collect()
}

#[test]
fn workloads_without_answers_are_consequences_of_a_dropping_table() {
    let mut node = Node::new("n1");
    let (web, shop) = (web(&mut node), shop(&mut node));
    node.connects(60 * SECOND, web, 7, SYN_RETRANSMITTED);
    node.connects(62 * SECOND, shop, 8, SYN_RETRANSMITTED);
    assert!(findings_of(&node).is_empty(), "nothing says that the table is full");
    node.conntrack(70 * SECOND, 1000, 42, 7);
    node.lethal(71 * SECOND);
    node.connects(72 * SECOND, web, 7, SYN_RETRANSMITTED);
    let found = findings_of(&node);
    assert_eq!(patterns(&found), ["conntrack-full"], "{found:#?}");
    let of: Vec<_> =
        found[0].consequences.iter().map(|one| (&*one.pattern, &*one.entity.as_ref().unwrap().pod)).collect();
    assert_eq!(of, [("connections-lost", "web-0"), ("connections-lost", "shop-0")], "{found:#?}");
}

#[test]
fn no_answer_long_before_a_full_table_is_no_consequence() {
    let mut node = Node::new("n1");
    let web = web(&mut node);
    for at in (60..180).step_by(12) {
        node.connects(at * SECOND, web, 7, SYN_RETRANSMITTED);
    }
    node.conntrack(175 * SECOND, 1000, 42, 7);
    node.lethal(181 * SECOND);
    let found = findings_of(&node);
    assert!(found.iter().all(|one| one.consequences.is_empty()), "{found:#?}");
    let lost = found.iter().find(|one| one.pattern == "connections-lost");
    assert!(lost.is_some_and(|one| one.confidence < 0.8), "{found:#?}");
}

#[test]
fn failing_lookups_are_their_workloads_until_three_quiet_minutes() {
    for (rcode, says) in [(UNANSWERED, "unanswered"), (SERVFAIL, "SERVFAIL")] {
        let mut node = Node::new("n1");
        let web = web(&mut node);
        for at in [100, 130, 160] {
            lookups_fail(&mut node, at, web, rcode);
        }
        elapse(&mut node, 170, 320);
        let found = only_state(&node, "dns-lookups-fail");
        assert!(found.ongoing && found.title.contains(says) && found.title.contains("shop/web-0"), "{found:#?}");
        elapse(&mut node, 320, 420);
        let over = only_state(&node, "dns-lookups-fail");
        assert!(!over.ongoing && over.resolved_ns > 0, "{over:#?}");
    }
}

#[test]
fn unknown_names_and_the_nodes_lookups_trouble_no_workload() {
    const NXDOMAIN: u8 = 3;
    let mut node = Node::new("n1");
    let (web, host) = (web(&mut node), node.host("/user.slice"));
    lookups_fail(&mut node, 100, web, NXDOMAIN);
    lookups_fail(&mut node, 100, host, UNANSWERED);
    node.lethal(102 * SECOND);
    assert!(findings_of(&node).is_empty());
}
