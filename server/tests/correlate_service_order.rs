//! Services, their backends' deaths and their clients' troubles are joined in whatever order they are heard of.

use crate::correlate_node::{Machine, Node, Process, SECOND};
use crate::correlate_patterns_service::{lookups_of, refused_client};
use tapio_server::findings::PatternSet;
use tapio_wire::event::Lane;
use tapio_wire::service::Finding;

/// Every order of the places `0..len`.
fn orders(len: usize) -> Vec<Vec<usize>> {
    let Some(last) = len.checked_sub(1) else { return vec![Vec::new()] };
    let with_last = |order: Vec<usize>| {
        (0..=order.len()).map(move |place| {
            let mut longer = order.clone();
            longer.insert(place, last);
            longer
        })
    };
    orders(last).into_iter().flat_map(with_last).collect()
}

/// What is found, by pattern with the patterns of its consequences, for each order in which these nodes are heard.
fn found_in_each_order(nodes: &[Node]) -> Vec<(Vec<usize>, Vec<Finding>)> {
    let found = |order: Vec<usize>| {
        let machine = Machine::with(2, PatternSet::embedded().expect("valid"));
        for node in order.iter().map(|&place| &nodes[place]) {
            machine.deliver(&node.node, &node.frames);
            machine.settle();
        }
        (order, machine.findings())
    };
    orders(nodes.len()).into_iter().map(found).collect()
}

/// The node of the elected collector reports a Service with one backend.
fn service(name: &str, last: u8, port: u16, backend: (&str, &str), is_ready: bool) -> Node {
    let mut elected = Node::new("n3");
    let pod = elected.kube_pod(backend.0, backend.1);
    elected.service(50 * SECOND, name, last, port, pod, is_ready);
    elected.lethal(51 * SECOND);
    elected
}

#[test]
fn refusals_are_consequences_in_each_order() {
    let (mut node, mut clients) = (Node::new("n1"), Node::new("n2"));
    let db = node.kube_container("StatefulSet/db", "shop/db-0", "db");
    node.limit_kill(db, 300, 100 * SECOND);
    refused_client(&mut clients, 101 * SECOND, 7);
    // A headless Service has the same backend.
    let headless = service("shop/db-headless", 8, 5432, ("StatefulSet/db", "shop/db-0"), true);
    let normal = service("shop/db", 7, 5432, ("StatefulSet/db", "shop/db-0"), true);
    for (order, found) in found_in_each_order(&[node, clients, headless, normal]) {
        let patterns: Vec<&str> = found.iter().map(|finding| &*finding.pattern).collect();
        assert_eq!(patterns, ["memory-limit-kill"], "{order:?}");
        let of_clients: Vec<&str> = found[0].consequences.iter().map(|consequence| &*consequence.title).collect();
        assert_eq!(of_clients, ["shop/web-0/web is refused by service shop/db"], "{order:?}");
    }
}

#[test]
fn refusals_by_an_unready_service_are_explained_in_each_order() {
    let mut clients = Node::new("n2");
    refused_client(&mut clients, 60 * SECOND, 7);
    let unready = service("shop/db", 7, 5432, ("StatefulSet/db", "shop/db-0"), false);
    for (order, found) in found_in_each_order(&[clients, unready]) {
        let patterns: Vec<(&str, bool)> = found.iter().map(|finding| (&*finding.pattern, finding.possible)).collect();
        assert_eq!(patterns, [("upstream-refused", false)], "{order:?}");
    }
}

#[test]
fn dns_is_down_in_each_order() {
    let (mut node, mut clients) = (Node::new("n1"), Node::new("n2"));
    let dns = node.kube_container("Deployment/coredns", "kube-system/coredns-0", "dns");
    node.exit(60 * SECOND, Process::init(dns, 400, "coredns"), 2 << 8);
    node.lethal(61 * SECOND);
    for space in 0..3 {
        lookups_of(&mut clients, space);
    }
    clients.frame(Lane::Bulk, 66 * SECOND);
    let of_dns = service("kube-system/kube-dns", 10, 53, ("Deployment/coredns", "kube-system/coredns-0"), true);
    for (order, found) in found_in_each_order(&[node, clients, of_dns]) {
        let down = found.iter().filter(|finding| finding.pattern == "dns-is-down").count();
        assert_eq!(down, 1, "{order:?}: {found:#?}");
    }
}
