//! What is listed first, and which state is shown.

use tapio_wire::service::Death;

use super::*;

fn finding(id: &str, severity: &str, ended_s: u64, is_death: bool) -> Finding {
    Finding {
        id: id.into(),
        severity: severity.into(),
        ended_ns: ended_s * 1_000_000_000,
        death: is_death.then(Death::default),
        ..Finding::default()
    }
}

#[test]
fn real_deaths_precede_later_ends_recent_findings_older_ones() {
    let mut findings = [
        finding("stopped", "info", 90_007, true),
        finding("oom", "high", 90_000, true),
        finding("earlier", "critical", 89_000, true),
        finding("refused", "high", 90_006, false),
        finding("yesterday", "critical", 5_000, true),
    ];
    rank(&mut findings);
    let order: Vec<_> = findings.iter().map(|finding| finding.id.as_str()).collect();
    assert_eq!(order, ["oom", "earlier", "stopped", "refused", "yesterday"]);
    let mut none: [Finding; 0] = [];
    rank(&mut none);
}

#[test]
fn what_goes_on_is_listed_before_a_later_death() {
    let ongoing = Finding { ongoing: true, ..finding("unschedulable", "high", 10, false) };
    let mut findings = [finding("oom", "critical", 90_000, true), ongoing];
    rank(&mut findings);
    assert_eq!(findings[0].id, "unschedulable");
}

#[test]
fn the_state_is_the_latest_of_each_part_that_lives() {
    let event = |kind: &str, id: u64, uid: &str, detail: Value, time_ns: u64| Event {
        kind: kind.into(),
        time_ns,
        entity: Some(EntityRef { id, pod_uid: uid.into(), name: format!("e{id}"), ..EntityRef::default() }),
        detail_json: detail.to_string(),
        ..Event::default()
    };
    let events = vec![
        event("pod_state", 1, "u1", json!({"phase": "Pending"}), 1),
        event("rollout", 9, "", json!({"desired": 2}), 2),
        event("pod_state", 1, "u1", json!({"phase": "Running"}), 3),
        event("container_state", 5, "u1", json!({"container": "web", "state": "running"}), 4),
        event("container_state", 4, "u1", json!({"container": "web", "is_last": true}), 5),
        event("pod_state", 2, "u2", json!({"is_gone": true}), 6),
        event("node_condition", 7, "", json!({"condition": "Ready"}), 7),
    ];
    let shown = |events: Vec<Event>| {
        let subject = Subject { workload: "Deployment/web".into(), ..Subject::default() };
        latest(&subject, events).iter().map(|event| event.time_ns).collect::<Vec<_>>()
    };
    assert_eq!(shown(events.clone()), [2, 3, 4]);
    assert_eq!(shown(vec![events[5].clone()]), [6]);
    let node = Subject { node: "n1".into(), ..Subject::default() };
    assert_eq!(latest(&node, events).len(), 1);
}

#[test]
fn a_node_that_is_only_connected_is_named_as_connected() {
    let node = |name: &str, connected: bool, has_sent: bool| NodeStatus {
        node: name.into(),
        connected,
        epochs: if has_sent { vec![tapio_wire::service::EpochStatus::default()] } else { Vec::new() },
        ..NodeStatus::default()
    };
    assert!(known_nodes(&[]).contains("no collector has connected"));
    assert_eq!(known_nodes(&[node("n1", false, true)]), "events have come from n1");
    let both = known_nodes(&[node("n1", true, true), node("n2", true, false)]);
    assert!(both.contains("come from n1; connected, with 0 events sent so far: n2 ("), "{both}");
}
