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
pub const STATE_KINDS: [&str; 7] =
    ["rollout", "pod_state", "object_state", "container_state", "trouble", "unit_state", "node_condition"];
/// What may have changed.
pub const CHANGE_KINDS: [&str; 4] = ["rollout", "object_state", "config_change", "node_condition"];
/// What is reported again and again is no state any more when it was not for so long.
const REPEATED_NS: u64 = 15 * 60 * 1_000_000_000;

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

/// How a subject is.
#[derive(Debug, Default)]
pub struct States {
    /// At most [`STATES_MAX`], the whole before its parts.
    pub shown: Vec<Event>,
    /// How many more parts there are, those that are well first.
    pub left_out: usize,
}

/// Which part of the subject an event of a state is about; `None` where it is about none.
fn part_of(subject: &Subject, event: &Event, detail: &Value, now_ns: u64) -> Option<String> {
    let entity = event.entity.as_ref().map_or(0, |entity| entity.id);
    let pod = event.entity.as_ref().map_or("", |entity| entity.pod_uid.as_str());
    let is_recent = event.time_ns.saturating_add(REPEATED_NS) >= now_ns;
    let is_of_node = event.entity.as_ref().is_some_and(|entity| entity.kind == "node");
    let is_own = match event.kind.as_str() {
        "node_condition" => !subject.node.is_empty(),
        // Of a node only its own.
        "trouble" => subject.node.is_empty() != is_of_node,
        _ => subject.node.is_empty(),
    };
    let part = match event.kind.as_str() {
        // A container's run before the present one is no state; a new run of it is another entity.
        "container_state" if detail["is_last"] == true => return None,
        "container_state" => format!("{pod} {}", field(detail, "container")),
        "node_condition" => format!("{entity} {}", field(detail, "condition")),
        // Who changed it is a change, and no state.
        "object_state" if field(detail, "state") == "Changed" => return None,
        "object_state" => {
            format!("{entity} {} {} {}", field(detail, "object"), field(detail, "name"), field(detail, "state"))
        }
        "trouble" | "curve" if !is_recent => return None,
        "trouble" => format!("{entity} trouble {} {} {}", field(detail, "what"), field(detail, "place"), event.pid),
        "curve" => format!("{entity} curve {}", field(detail, "cgroup")),
        kind => format!("{entity} {kind}"),
    };
    is_own.then_some(part)
}

/// Whether an event of a state says that its part is as it should be.
fn is_well(event: &Event) -> bool {
    let detail = detail(event);
    match event.kind.as_str() {
        "container_state" => field(&detail, "state") == "running" || field(&detail, "reason") == "Completed",
        "pod_state" => detail["is_ready"] == true || field(&detail, "phase") == "Succeeded",
        "curve" => true,
        _ => false,
    }
}

/// The latest word on each part of the subject; what is gone is left out where other parts are there. Where there are too many, those
/// that are well are left out before the others.
pub fn latest(subject: &Subject, events: Vec<Event>, now_ns: u64) -> States {
    let mut known: Vec<(String, bool, Event)> = Vec::new();
    for event in events.into_iter().rev() {
        let detail = detail(&event);
        let Some(part) = part_of(subject, &event, &detail, now_ns) else { continue };
        if !known.iter().any(|(known, ..)| *known == part) {
            known.push((part, detail["is_gone"] == true || detail["is_over"] == true, event));
        }
    }
    // The end of a trouble, or of a condition, is no end of whom it was about.
    let is_passing = |event: &Event| matches!(event.kind.as_str(), "trouble" | "object_state");
    known.retain(|(_, is_gone, event)| !(*is_gone && is_passing(event)));
    if known.iter().any(|(_, is_gone, _)| !is_gone) {
        let gone: Vec<String> = known
            .iter()
            .filter(|(_, is_gone, _)| *is_gone)
            .filter_map(|(.., event)| event.entity.as_ref().map(|entity| entity.pod_uid.clone()))
            .collect();
        known.retain(|(_, is_gone, event)| {
            let pod = event.entity.as_ref().map_or("", |entity| entity.pod_uid.as_str());
            !is_gone && (pod.is_empty() || !gone.iter().any(|gone| gone == pod))
        });
    }
    let mut shown: Vec<Event> = known.into_iter().map(|(.., event)| event).collect();
    shown.sort_by_cached_key(is_well);
    let left_out = shown.len().saturating_sub(STATES_MAX);
    shown.truncate(STATES_MAX);
    // The whole before its parts.
    let rank = |event: &Event| STATE_KINDS.iter().position(|kind| *kind == event.kind).unwrap_or(STATE_KINDS.len());
    shown.sort_by_key(|event| (rank(event), event.entity.as_ref().map(|entity| entity.name.clone())));
    States { shown, left_out }
}

/// Of what is reported again and again only the last report before it ended, or ended and began anew.
pub fn without_repeats(events: &mut Vec<Event>) {
    let mut later: Vec<(u64, String, bool)> = Vec::new();
    let mut keep: Vec<bool> = Vec::with_capacity(events.len());
    for event in events.iter().rev() {
        let detail = detail(event);
        let entity = event.entity.as_ref().map_or(0, |entity| entity.id);
        let of = |names: &[&str]| names.iter().map(|name| field(&detail, name)).collect::<Vec<_>>().join(" ");
        let (what, is_over) = match event.kind.as_str() {
            "trouble" => (format!("{} {}", of(&["what", "place"]), event.pid), detail["is_over"] == true),
            "curve" => (of(&["cgroup"]), false),
            "object_state" => (of(&["object", "name", "state", "reason", "message"]), detail["is_gone"] == true),
            _ => {
                keep.push(true);
                continue;
            }
        };
        let what = format!("{} {what}", event.kind);
        match later.iter_mut().find(|(id, known, _)| *id == entity && *known == what) {
            Some((.., later_is_over)) => {
                keep.push(*later_is_over != is_over);
                *later_is_over = is_over;
            }
            None => {
                keep.push(true);
                later.push((entity, what, is_over));
            }
        }
    }
    let mut keep = keep.into_iter().rev();
    events.retain(|_| keep.next().unwrap_or(true));
}

/// Whether an event is a change that concerns the subject, or what the finding about it names.
pub fn is_change(subject: &Subject, whose: &EntityRef, event: &Event) -> bool {
    let detail = detail(event);
    let namespace = if whose.namespace.is_empty() { &subject.namespace } else { &whose.namespace };
    let workload = if whose.workload.is_empty() { &subject.workload } else { &whose.workload };
    let is_here = !namespace.is_empty() && field(&detail, "namespace") == namespace;
    let of_workload =
        || workload.is_empty() || event.entity.as_ref().is_some_and(|entity| entity.workload == *workload);
    match event.kind.as_str() {
        "rollout" => is_here && !field(&detail, "images_before").is_empty() && of_workload(),
        // Who changed its specification; other states of objects are none of these.
        "object_state" => is_here && field(&detail, "state") == "Changed" && of_workload(),
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
            latest(&subject, events, 7).shown.iter().map(|event| event.time_ns).collect::<Vec<_>>()
        };
        assert_eq!(shown(events.clone()), [2, 3, 4]);
        assert_eq!(shown(vec![events[5].clone()]), [6]);
        let node = Subject { node: "n1".into(), ..Subject::default() };
        assert_eq!(latest(&node, events, 7).shown.len(), 1);
    }

    fn said(kind: &str, id: u64, detail: Value, time_ns: u64) -> Event {
        Event {
            kind: kind.into(),
            time_ns,
            entity: Some(EntityRef {
                id,
                pod_uid: format!("u{id}"),
                kind: "container".into(),
                name: format!("e{id}"),
                ..EntityRef::default()
            }),
            detail_json: detail.to_string(),
            ..Event::default()
        }
    }

    #[test]
    fn a_trouble_is_a_state_while_it_is_repeated() {
        let trouble = |time_ns, is_over| said("trouble", 1, json!({"what": "throttled", "is_over": is_over}), time_ns);
        let runs = said("container_state", 1, json!({"container": "web", "state": "running"}), 1);
        let pod = Subject { pod: "web".into(), ..Subject::default() };
        let kinds = |events: Vec<Event>, now_ns: u64| {
            latest(&pod, events, now_ns).shown.into_iter().map(|event| event.kind).collect::<Vec<_>>()
        };
        assert_eq!(kinds(vec![runs.clone(), trouble(2, false)], 3), ["container_state", "trouble"]);
        assert_eq!(kinds(vec![runs.clone(), trouble(2, false), trouble(3, true)], 3), ["container_state"]);
        assert_eq!(kinds(vec![runs.clone(), trouble(2, false)], 3 + REPEATED_NS), ["container_state"]);
        let waits = |is_gone| said("object_state", 1, json!({"state": "Waiting", "is_gone": is_gone}), 2);
        assert_eq!(kinds(vec![waits(false)], 3), ["object_state"]);
        assert_eq!(kinds(vec![runs.clone(), waits(true)], 3), ["container_state"], "the pod is still there");
        let changed = said("object_state", 1, json!({"state": "Changed"}), 2);
        assert_eq!(kinds(vec![runs, changed], 3), ["container_state"]);
        let node = Subject { node: "n1".into(), ..Subject::default() };
        assert!(latest(&node, vec![trouble(2, false)], 3).shown.is_empty(), "it is not the node's own");
    }

    #[test]
    fn parts_that_are_well_are_left_out_first() {
        let state = |id: u64, state: &str| said("container_state", id, json!({"container": "web", "state": state}), id);
        let mut events: Vec<Event> = (2..50).map(|id| state(id, "running")).collect();
        events.insert(0, state(1, "waiting"));
        let states = latest(&Subject { workload: "Deployment/web".into(), ..Subject::default() }, events, 50);
        assert_eq!((states.shown.len(), states.left_out), (STATES_MAX, 49 - STATES_MAX));
        assert!(states.shown.iter().any(|event| field(&detail(event), "state") == "waiting"));
    }

    #[test]
    fn a_repeated_trouble_is_one_event_between_its_ends() {
        let trouble =
            |time_ns, what: &str, is_over| said("trouble", 1, json!({"what": what, "is_over": is_over}), time_ns);
        let mut events = vec![
            trouble(1, "throttled", false),
            trouble(2, "throttled", false),
            trouble(3, "pids-at-limit", false),
            trouble(4, "throttled", true),
            said("exit", 1, json!({}), 5),
            said("exit", 1, json!({}), 6),
            trouble(7, "throttled", false),
            trouble(8, "throttled", false),
        ];
        without_repeats(&mut events);
        assert_eq!(events.iter().map(|event| event.time_ns).collect::<Vec<_>>(), [2, 3, 4, 5, 6, 8]);
    }
}
