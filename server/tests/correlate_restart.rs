//! Series of deaths that go on over a restart of the server, and began before what is replayed then.

use tapio_wire::service::Finding;

use crate::correlate_node::{MS, Machine, Node, Process, SECOND};

/// What tells one finding from another, and how far it reaches.
fn gist(found: &[Finding]) -> Vec<(String, String, u32, u64, u64, String)> {
    let of = |finding: &Finding| {
        let Finding { id, pattern, count, started_ns, ended_ns, title, .. } = finding.clone();
        (id, pattern, count, started_ns, ended_ns, title)
    };
    let mut gist: Vec<_> = found.iter().map(of).collect();
    gist.sort();
    gist
}

/// A server runs until frame `at`, and another one goes on. That has the findings, and replays from frame `from` on.
fn assert_goes_on(node: &Node, from: usize, at: usize) {
    assert_goes_on_with(node, from, at, |_| true);
}

/// The same, where it has only some of the findings.
fn assert_goes_on_with(node: &Node, from: usize, at: usize, has: impl Fn(&Finding) -> bool) {
    let machine = Machine::start(1);
    machine.deliver(&node.node, &node.frames[..at]);
    let before = machine.findings();
    let again = Machine::start(1);
    before.iter().filter(|finding| has(finding)).for_each(|finding| again.store.restore(finding.clone()));
    again.store.set_replaying(true);
    again.losses.set_replaying(true);
    again.deliver(&node.node, &node.frames[from..at]);
    again.settle();
    again.losses.set_replaying(false);
    again.finder.bus().end_replay().expect("the finder runs");
    assert_eq!(gist(&again.findings()), gist(&before), "replayed from {from} to {at}");
    again.deliver(&node.node, &node.frames[at..]);
    machine.deliver(&node.node, &node.frames[at..]);
    assert_eq!(gist(&again.findings()), gist(&machine.findings()), "replayed from {from} to {at}");
}

#[test]
fn a_crash_loop_goes_on_over_a_restart() {
    let mut node = Node::new("n1");
    for time in 0..40 {
        let web = node.container_of("shop/web-1", &format!("web{time}"), "web-1/web");
        let at = (100 + 60 * time) * SECOND;
        node.exit(at, Process::init(web, 100 + time as u32, "app"), 1 << 8);
        node.lethal(at + MS);
    }
    for (from, at) in [(0, 12), (4, 12), (15, 30), (25, 39), (38, 40)] {
        assert_goes_on(&node, from, at);
    }
}

#[test]
fn loops_of_two_containers_go_on_each_by_itself() {
    let mut node = Node::new("n1");
    for time in 0..40 {
        for (place, name) in ["web", "log"].into_iter().enumerate() {
            let id = format!("{name}{time}");
            let container = node.container_of("shop/web-1", &id, &format!("web-1/{name}"));
            let at = (100 + 60 * time + 20 * place as u64) * SECOND;
            node.exit(at, Process::init(container, (100 + 2 * time as usize + place) as u32, name), 1 << 8);
            node.lethal(at + MS);
        }
    }
    for (from, at) in [(0, 24), (30, 60), (50, 78)] {
        assert_goes_on(&node, from, at);
    }
}

#[test]
fn a_loop_beside_one_that_goes_on_is_found_again() {
    let mut node = Node::new("n1");
    let mut crash = |pod: u64, time: u64| {
        let id = format!("{pod}-{time}");
        let container = node.kube_container("Deployment/web", &format!("shop/web-{pod}"), &id);
        let at = (100 + 60 * time + 20 * pod) * SECOND;
        node.exit(at, Process::init(container, (100 + 2 * time + pod) as u32, "app"), 1 << 8);
        node.lethal(at + MS);
        node.frames.len()
    };
    let frames: Vec<usize> = (0..40)
        .map(|time| {
            let other = if (22..27).contains(&time) { crash(1, time) } else { 0 };
            crash(0, time).max(other)
        })
        .collect();
    // Its finding was not in the journal yet.
    assert_goes_on_with(&node, frames[18], frames[31], |finding| finding.count > 5);
}

#[test]
fn deaths_alike_go_on_over_a_restart() {
    let mut node = Node::new("n1");
    for time in 0..60 {
        let pod = format!("shop/web-{time}");
        let web = node.kube_container("Deployment/web", &pod, &format!("c{time}"));
        node.limit_kill(web, 100 + time as u32, (100 + 240 * time) * SECOND);
    }
    let frames = node.frames.len();
    assert!(frames >= 60, "a frame for each death at least");
    for (from, at) in [(0, 1), (1, 2), (1, 3), (1, 10), (2, 4), (4, 8), (3, 5)] {
        assert_goes_on(&node, from * frames / 10, at * frames / 10);
    }
}
