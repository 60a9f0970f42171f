//! What is wrong with something, or why it died: which finding says most, its state now, what changed before.
//!
//! What enters: findings and events about a [`Subject`], however they were fetched. What leaves: the same in the order in which
//! people need them. `tapioctl why` and the page of a workload both ask here, so they say the same.

use serde_json::Value;
use tapio_wire::service::{EntityRef, Event, Finding};

/// How long after a finding's end events are searched.
pub const AFTER_NS: u64 = 60 * 1_000_000_000;
/// How far back events are searched without a finding.
pub const LOOK_BACK_NS: u64 = 3600 * 1_000_000_000;
/// How far back its state is looked for, and what changed before a finding, or before now.
pub const STATE_BACK_NS: u64 = 24 * 3600 * 1_000_000_000;
pub const CHANGES_BEFORE_NS: u64 = 30 * 60 * 1_000_000_000;
/// Lines of each.
pub const STATES_MAX: usize = 20;
pub const CHANGES_MAX: usize = 10;
/// Hexadecimal digits that may be a container's id.
pub const CONTAINER_ID_MIN: usize = 6;
/// Events that report a state.
pub const STATE_KINDS: [&str; 5] = ["pod_state", "container_state", "rollout", "unit_state", "node_condition"];
/// What may have changed.
pub const CHANGE_KINDS: [&str; 3] = ["rollout", "config_change", "node_condition"];

/// What is asked about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// How it is called in a message: `pod web-0`.
    pub called: String,
    /// A pod: its name, NAMESPACE/NAME, its uid or the beginning of one.
    pub pod: String,
    /// `Deployment/web`
    pub workload: String,
    pub namespace: String,
    pub node: String,
    /// A container's id or the beginning of it, a unit's name, or the path of a host group.
    pub entity: String,
    /// The entity is called so, and not only like that.
    pub is_exact: bool,
    /// True if it was written without a known kind.
    pub is_guessed: bool,
}

/// Whether a finding is about what is asked; the server has narrowed pods and nodes already.
pub fn is_about(subject: &Subject, finding: &Finding) -> bool {
    let Some(entity) = &finding.entity else { return subject.entity.is_empty() };
    subject.entity.is_empty()
        || entity.name == subject.entity
        || (subject.is_exact && entity.kind != "container" && entity.cgroup == subject.entity)
        || (!subject.is_exact
            && subject.entity.len() >= CONTAINER_ID_MIN
            && entity.container_id.starts_with(&subject.entity))
}

/// How much a finding says about what is wrong with something. What goes on comes before what is over. A death that must not
/// happen comes before an end that may have been meant. Of equals the latest comes first.
fn weight(finding: &Finding) -> (bool, bool, u64) {
    let is_severe = !matches!(finding.severity.as_str(), "" | "info" | "low");
    let explains = finding.death.is_some() || finding.ongoing;
    (explains && is_severe, explains || is_severe, finding.ended_ns)
}

/// The findings of the time before the newest of them, the one that explains most first; then the older ones, the newest first.
pub fn rank(findings: &mut [Finding]) {
    let newest_ns = findings.iter().map(|finding| finding.ended_ns).max().unwrap_or(0);
    let oldest_ns = newest_ns.saturating_sub(LOOK_BACK_NS);
    findings.sort_by_cached_key(|finding| {
        let is_recent = finding.ended_ns >= oldest_ns || finding.ongoing;
        let (is_severe, explains, ended_ns) =
            if is_recent { weight(finding) } else { (false, false, finding.ended_ns) };
        std::cmp::Reverse((is_recent, finding.ongoing && is_severe, is_severe, explains, ended_ns))
    });
}

/// A field of an event.
pub fn field<'a>(detail: &'a Value, name: &str) -> &'a str {
    detail.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// The fields of an event's kind.
pub fn detail(event: &Event) -> Value {
    serde_json::from_str(&event.detail_json).unwrap_or_default()
}

/// The latest word on each part of the subject; what is gone is left out where other parts are there.
pub fn latest(subject: &Subject, events: Vec<Event>) -> Vec<Event> {
    let mut latest: Vec<(String, bool, Event)> = Vec::new();
    for event in events.into_iter().rev() {
        let detail = detail(&event);
        let is_own = match event.kind.as_str() {
            "node_condition" => !subject.node.is_empty(),
            _ => subject.node.is_empty(),
        };
        let entity = event.entity.as_ref().map_or(0, |entity| entity.id);
        let pod = event.entity.as_ref().map_or("", |entity| entity.pod_uid.as_str());
        let part = match event.kind.as_str() {
            // A container's run before the present one is no state; a new run of it is another entity.
            "container_state" if detail["is_last"] == true => continue,
            "container_state" => format!("{pod} {}", field(&detail, "container")),
            "node_condition" => format!("{entity} {}", field(&detail, "condition")),
            kind => format!("{entity} {kind}"),
        };
        if is_own && !latest.iter().any(|(known, ..)| *known == part) {
            latest.push((part, detail["is_gone"] == true, event));
        }
    }
    if latest.iter().any(|(_, is_gone, _)| !is_gone) {
        let gone: Vec<String> = latest
            .iter()
            .filter(|(_, is_gone, _)| *is_gone)
            .filter_map(|(.., event)| event.entity.as_ref().map(|entity| entity.pod_uid.clone()))
            .collect();
        latest.retain(|(_, is_gone, event)| {
            let pod = event.entity.as_ref().map_or("", |entity| entity.pod_uid.as_str());
            !is_gone && (pod.is_empty() || !gone.iter().any(|gone| gone == pod))
        });
    }
    let mut latest: Vec<Event> = latest.into_iter().map(|(.., event)| event).take(STATES_MAX).collect();
    // The whole before its parts.
    let rank =
        |event: &Event| STATE_KINDS.iter().position(|kind| *kind == event.kind).map_or(9, |at| [1, 2, 0, 3, 4][at]);
    latest.sort_by_key(|event| (rank(event), event.entity.as_ref().map(|entity| entity.name.clone())));
    latest
}

/// Whether an event is a change that concerns the subject, or what the finding about it names.
pub fn is_change(subject: &Subject, whose: &EntityRef, event: &Event) -> bool {
    let detail = detail(event);
    let namespace = if whose.namespace.is_empty() { &subject.namespace } else { &whose.namespace };
    let workload = if whose.workload.is_empty() { &subject.workload } else { &whose.workload };
    let is_here = !namespace.is_empty() && field(&detail, "namespace") == namespace;
    match event.kind.as_str() {
        "rollout" => {
            let of_workload = event.entity.as_ref().is_some_and(|entity| entity.workload == *workload);
            let is_release = !field(&detail, "images_before").is_empty();
            is_here && is_release && (of_workload || workload.is_empty())
        }
        "config_change" => is_here && field(&detail, "change") != "made",
        _ => {
            let node = if subject.node.is_empty() { &whose.node } else { &subject.node };
            event.entity.as_ref().is_some_and(|entity| entity.name == *node || entity.node == *node)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
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
}
