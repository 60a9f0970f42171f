//! Patterns that rest on what Kubernetes says of Services: refusals, packets that vanish, DNS, and what absorbs them.

use crate::correlate_node::{MS, Machine, Node, Process, SECOND, findings_of, patterns_of};
use tapio_server::correlate::CorrelateConfig;
use tapio_server::findings::{FinderConfig, PatternSet};
use tapio_wire::event::{Detail, EntityId, Lane};

const REFUSED: u8 = 2;
const SYN_RETRANSMITTED: u8 = 6;

/// A backend of shop/db, and a client that is refused.
pub fn refused_client(node: &mut Node, at: u64, last: u8) -> EntityId {
    let client = node.kube_container("Deployment/web", "shop/web-0", "c0");
    node.connects(at, client, last, REFUSED);
    client
}

fn database(node: &mut Node, is_ready: bool) -> EntityId {
    let db = node.kube_container("StatefulSet/db", "shop/db-0", "db");
    let pod = node.kube_pod("StatefulSet/db", "shop/db-0");
    node.service(50 * SECOND, "shop/db", 7, 5432, pod, is_ready);
    node.lethal(51 * SECOND);
    db
}

#[test]
fn refusals_by_a_service_without_backends_come_from_upstream() {
    let mut node = Node::new("n1");
    database(&mut node, false);
    refused_client(&mut node, 60 * SECOND, 7);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].title, "shop/web-0/web is refused by service shop/db");
}

#[test]
fn refusals_by_healthy_or_other_services_are_no_cause() {
    for (is_ready, last) in [(true, 7), (false, 9)] {
        let mut node = Node::new("n1");
        database(&mut node, is_ready);
        refused_client(&mut node, 60 * SECOND, last);
        assert!(patterns_of(&node).is_empty(), "{is_ready} {last}");
    }
}

fn database_dies_and_web_is_refused() -> Node {
    let mut node = Node::new("n1");
    let db = database(&mut node, true);
    node.limit_kill(db, 300, 100 * SECOND);
    refused_client(&mut node, 101 * SECOND, 7);
    node
}

#[test]
fn a_memory_kill_absorbs_clients_refusals_and_notifies_watchers() {
    let mut node = database_dies_and_web_is_refused();
    let refusals = node.frames.pop().expect("the refusals");
    let machine = Machine::start(1);
    let (mut changes, _) = machine.store.watch();
    // The refusals are seen first, when only the Service's state explains them.
    let mut unready = Node::new("n2");
    database(&mut unready, false);
    machine.deliver(&unready.node, &unready.frames);
    let deaths = node.frames.split_off(1);
    machine.deliver(&node.node, &node.frames);
    machine.deliver(&node.node, &[refusals]);
    machine.settle();
    machine.deliver(&node.node, &deaths);
    let found = machine.findings();
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, "memory-limit-kill");
    assert_eq!(found[0].consequences.len(), 1);
    assert_eq!(found[0].consequences[0].title, "shop/web-0/web is refused by service shop/db");
    let mut last_of_refusal = None;
    while let Ok(change) = changes.try_recv() {
        if change.pattern == "upstream-refused" {
            last_of_refusal = Some(change);
        }
    }
    let last = last_of_refusal.expect("the refusals were published at first");
    assert!(last.withdrawn && last.superseded_by == found[0].id, "{last:#?}");
    assert_eq!(machine.store.get(&last.id).expect("an alias").id, found[0].id);
}

#[test]
fn a_chain_is_no_longer_than_the_configured_depth() {
    let node = database_dies_and_web_is_refused();
    for (depth, findings) in [(1, 2), (2, 1)] {
        let patterns = PatternSet::embedded().expect("valid");
        let config = CorrelateConfig { shards: Some(1), wanted: patterns.kinds(), ..CorrelateConfig::default() };
        let finder = FinderConfig { correlation_depth_max: depth, ..FinderConfig::default() };
        let machine = Machine::chained(&config, patterns, finder);
        machine.deliver(&node.node, &node.frames);
        assert_eq!(machine.findings().len(), findings, "depth {depth}");
    }
}

#[test]
fn packets_vanish_when_nobody_answers_and_nobody_refuses() {
    let mut node = Node::new("n1");
    database(&mut node, true);
    let client = node.kube_container("Deployment/web", "shop/web-0", "c0");
    node.connects(60 * SECOND, client, 7, SYN_RETRANSMITTED);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, "packets-vanish");
    assert!(!found[0].possible);
}

#[test]
fn packets_to_unready_or_refusing_backends_do_not_vanish() {
    for (is_ready, also) in [(false, SYN_RETRANSMITTED), (true, REFUSED)] {
        let mut node = Node::new("n1");
        database(&mut node, is_ready);
        let client = node.kube_container("Deployment/web", "shop/web-0", "c0");
        node.connects(60 * SECOND, client, 7, also);
        node.connects(65 * SECOND, client, 7, SYN_RETRANSMITTED);
        assert!(!patterns_of(&node).contains(&"packets-vanish".to_owned()));
    }
}

/// Lookups of a client in one of several namespaces get no answer, 65 s after the boot.
pub fn lookups_of(node: &mut Node, space: u32) {
    let client = node.kube_container("Deployment/web", &format!("space{space}/web-0"), &format!("s{space}"));
    for step in 0..4 {
        let lookup = Detail::Dns { latency_ns: 0, name: u32::MAX, query_type: 1, rcode: 255 };
        node.push(65 * SECOND + step * MS, client, 0, lookup);
    }
}

/// Lookups of clients in `namespaces` namespaces fail; CoreDNS was killed before when `dies`.
fn lookups_fail(namespaces: u32, dies: bool) -> Node {
    let mut node = Node::new("n1");
    let dns = node.kube_container("Deployment/coredns", "kube-system/coredns-0", "dns");
    let pod = node.kube_pod("Deployment/coredns", "kube-system/coredns-0");
    node.service(50 * SECOND, "kube-system/kube-dns", 10, 53, pod, true);
    node.lethal(51 * SECOND);
    if dies {
        node.exit(60 * SECOND, Process::init(dns, 400, "coredns"), 2 << 8);
        node.lethal(61 * SECOND);
    }
    for space in 0..namespaces {
        lookups_of(&mut node, space);
    }
    node.frame(Lane::Bulk, 66 * SECOND);
    node
}

#[test]
fn dns_is_down_when_it_died_and_three_namespaces_notice() {
    let found = patterns_of(&lookups_fail(3, true));
    assert!(found.contains(&"dns-is-down".to_owned()), "{found:?}");
}

#[test]
fn lookups_failing_in_one_namespace_are_not_dns_down() {
    for (namespaces, dies) in [(2, true), (3, false)] {
        let found = patterns_of(&lookups_fail(namespaces, dies));
        assert!(!found.contains(&"dns-is-down".to_owned()), "{found:?}");
    }
}
