//! What breaks across servers: a backend dies on one server's node, its clients suffer on another's, and a third hears of the Service.

use crate::cluster_support::*;
use crate::correlate_node::{Node, Process, SECOND};
use crate::correlate_patterns_service::{lookups_of, refused_client};
use tapio_wire::event::Lane;
use tapio_wire::service::Finding;

/// Delivers each of these to a server of its own, and returns what all of them found alike.
fn found_by_all(nodes: &[&Node], has_all: impl Fn(&[Finding]) -> bool) -> Option<Vec<Finding>> {
    let nats = Nats::start()?;
    let names = ["a", "b", "c"];
    let members: Vec<Member> = names.iter().map(|name| Member::start(&nats, name)).collect();
    settle(&members.iter().collect::<Vec<_>>());
    for (member, node) in members.iter().cycle().zip(nodes) {
        // Nobody says in which order the log hears of them.
        member.deliver(node);
    }
    for member in &members {
        member.findings_when(&has_all);
    }
    settle(&members.iter().collect::<Vec<_>>());
    let of_first = members[0].findings();
    for member in &members[1..] {
        assert_eq!(final_content(&member.findings()), final_content(&of_first));
    }
    Some(of_first)
}

#[test]
fn refusals_on_another_servers_node_are_consequences_of_the_death() {
    let (mut node, mut clients, mut elected) = (Node::new("n1"), Node::new("n2"), Node::new("n3"));
    let pod = elected.kube_pod("StatefulSet/db", "shop/db-0");
    elected.service(50 * SECOND, "shop/db", 7, 5432, pod, true);
    elected.lethal(51 * SECOND);
    let db = node.kube_container("StatefulSet/db", "shop/db-0", "db");
    node.limit_kill(db, 300, 100 * SECOND);
    refused_client(&mut clients, 101 * SECOND, 7);
    let is_whole = |found: &[Finding]| found.len() == 1 && found[0].consequences.len() == 1;
    let Some(found) = found_by_all(&[&elected, &node, &clients], is_whole) else { return };
    assert_eq!((&*found[0].pattern, found[0].possible), ("memory-limit-kill", false), "{found:#?}");
    assert_eq!(found[0].consequences[0].pattern, "upstream-refused");
    assert_eq!(found[0].consequences[0].title, "shop/web-0/web is refused by service shop/db");
}

#[test]
fn refusals_by_an_unready_service_of_another_server_are_explained() {
    let (mut clients, mut elected) = (Node::new("n2"), Node::new("n3"));
    let pod = elected.kube_pod("StatefulSet/db", "shop/db-0");
    elected.service(50 * SECOND, "shop/db", 7, 5432, pod, false);
    elected.lethal(51 * SECOND);
    refused_client(&mut clients, 60 * SECOND, 7);
    let Some(found) = found_by_all(&[&elected, &clients], |found| found.len() == 1) else { return };
    assert_eq!((&*found[0].pattern, found[0].possible), ("upstream-refused", false), "{found:#?}");
}

#[test]
fn dns_is_down_though_no_server_sees_three_namespaces() {
    let (mut node, mut elected) = (Node::new("n1"), Node::new("n3"));
    let pod = elected.kube_pod("Deployment/coredns", "kube-system/coredns-0");
    elected.service(50 * SECOND, "kube-system/kube-dns", 10, 53, pod, true);
    elected.lethal(51 * SECOND);
    let dns = node.kube_container("Deployment/coredns", "kube-system/coredns-0", "dns");
    node.exit(60 * SECOND, Process::init(dns, 400, "coredns"), 2 << 8);
    node.lethal(61 * SECOND);
    let clients: Vec<Node> = (0..3)
        .map(|space| {
            let mut node = Node::new(&format!("client{space}"));
            lookups_of(&mut node, space);
            node.frame(Lane::Bulk, 66 * SECOND);
            node
        })
        .collect();
    let nodes = [&elected, &node, &clients[0], &clients[1], &clients[2]];
    let is_down = |found: &[Finding]| found.iter().any(|one| one.pattern == "dns-is-down");
    let Some(found) = found_by_all(&nodes, is_down) else { return };
    let down: Vec<_> = found.iter().filter(|one| one.pattern == "dns-is-down").collect();
    assert_eq!((down.len(), down[0].possible), (1, false), "{found:#?}");
}
