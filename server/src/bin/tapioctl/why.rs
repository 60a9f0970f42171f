//! `tapioctl why pod/NAME`: what is wrong with something, or why it died, and everything that is known about it.
//!
//! What enters: a pod, a workload, a container, a unit, a node or a namespace. What leaves: its state now, the finding that tells
//! most, what changed before, the last events, other findings; also when nothing is wrong, and why nothing is known.

use clap::Args;
use serde_json::{Value, json};
use tapio_server::render;
use tapio_wire::service::{EntityRef, Event, Finding, ListEventsRequest, ListFindingsRequest};

use super::output::print;
use super::server::{Client, Failure, ServerAt, connect};
use super::{Printing, events, now_ns};

/// Events are looked for so much before a finding began and after it ended.
const BEFORE_NS: u64 = 5 * 60 * 1_000_000_000;
const AFTER_NS: u64 = 60 * 1_000_000_000;
/// Without a finding: how far back.
const LOOK_BACK_NS: u64 = 3600 * 1_000_000_000;
/// How far back its state is looked for, and what changed before a finding, or before now.
const STATE_BACK_NS: u64 = 24 * 3600 * 1_000_000_000;
const CHANGES_BEFORE_NS: u64 = 30 * 60 * 1_000_000_000;
/// Lines of each.
const STATES_MAX: usize = 20;
const CHANGES_MAX: usize = 10;
const READ_MAX: u32 = 2_000;
/// Findings that are looked at and shown at most, how many are asked for at once, and how often.
const FINDINGS_MAX: usize = 50;
const PAGE: u32 = 500;
const PAGES_MAX: usize = 20;
/// What people write who think of kubectl, and the kinds of the API.
const WORKLOADS: [(&str, &str); 13] = [
    ("deployment", "Deployment"),
    ("deployments", "Deployment"),
    ("deploy", "Deployment"),
    ("statefulset", "StatefulSet"),
    ("statefulsets", "StatefulSet"),
    ("sts", "StatefulSet"),
    ("daemonset", "DaemonSet"),
    ("daemonsets", "DaemonSet"),
    ("ds", "DaemonSet"),
    ("replicaset", "ReplicaSet"),
    ("rs", "ReplicaSet"),
    ("job", "Job"),
    ("jobs", "Job"),
];
/// What nothing is found for by itself.
const OTHER_KINDS: [&str; 5] = ["cronjob", "cj", "service", "svc", "ingress"];
const KNOWN: &str = "pod/NAME, deploy/NAME (or statefulset, daemonset, job), container/ID, unit/NAME, node/NAME or ns/NAME; pod and \
                     workload also as KIND/NAMESPACE/NAME";
/// What tells of a state.
const STATE_KINDS: [&str; 5] = ["pod_state", "container_state", "rollout", "unit_state", "node_condition"];
/// What may have changed.
const CHANGE_KINDS: [&str; 3] = ["rollout", "config_change", "node_condition"];
/// What tells about a death; the many bulk events do not.
const KINDS: [&str; 14] = [
    "exec",
    "exit",
    "oom",
    "signal",
    "signal_delivered",
    "pod_state",
    "container_state",
    "kube_event",
    "rollout",
    "config_change",
    "unit_state",
    "unit_job",
    "observation",
    "gap",
];

#[derive(Args)]
pub struct Arguments {
    /// pod/NAME, pod/NAMESPACE/NAME, pod/UID or the beginning of a uid; deploy/NAME, statefulset/NAME, daemonset/NAME, job/NAME;
    /// container/ID, unit/NAME, node/NAME, ns/NAME; or a pod's NAME
    subject: String,
    /// The pod's or workload's namespace
    #[arg(long, short, default_value = "", hide_default_value = true)]
    namespace: String,
    /// Last events to show
    #[arg(long, default_value_t = 20)]
    events: u32,
}

/// What is asked about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Subject {
    /// How it is called in a message: `pod web-0`.
    called: String,
    /// A pod: its name, NAMESPACE/NAME, its uid or the beginning of one.
    pod: String,
    /// `Deployment/web`
    workload: String,
    namespace: String,
    node: String,
    /// A container's id or the beginning of it, or a unit's name.
    entity: String,
}

/// What an argument and a namespace mean.
fn subject(argument: &str, namespace: &str) -> Result<Subject, Failure> {
    let workload = |kind: &str| WORKLOADS.iter().find(|(known, _)| *known == kind).map(|(_, kind)| *kind);
    let (kind, name) = match argument.split_once('/') {
        Some((
            kind @ ("pod" | "pods" | "po" | "container" | "containers" | "unit" | "units" | "node" | "nodes" | "ns"
            | "namespace" | "namespaces"),
            name,
        )) => (kind, name),
        Some((kind, name)) if workload(kind).is_some() => (kind, name),
        // NAMESPACE/NAME cannot be told from KIND/NAME but by the kinds that there are.
        Some((kind, _)) if OTHER_KINDS.contains(&kind) || argument.split('/').count() > 2 => {
            return Err(Failure::Usage(format!("\"{kind}/…\" is not understood: write {KNOWN}")));
        }
        _ => ("pod", argument),
    };
    if name.is_empty() || name.ends_with('/') || name.starts_with('/') {
        return Err(Failure::Usage(format!("\"{argument}\" has no name: write {kind}/NAME")));
    }
    if name.contains('/') && !namespace.is_empty() && !name.starts_with(&format!("{namespace}/")) {
        return Err(Failure::Usage(format!("\"{name}\" is not in the namespace {namespace}: leave one of them out")));
    }
    let mut subject = Subject { namespace: namespace.to_owned(), ..Subject::default() };
    let singular = match kind {
        "pod" | "pods" | "po" => "pod",
        "ns" | "namespace" | "namespaces" => "namespace",
        kind => workload(kind).unwrap_or(kind.trim_end_matches('s')),
    };
    match singular {
        "container" => subject.entity = name.split_once("://").map_or(name, |(_, id)| id).to_owned(),
        "unit" => subject.entity = name.to_owned(),
        "node" => subject.node = name.to_owned(),
        "namespace" => subject.namespace = name.to_owned(),
        "pod" => subject.pod = name.to_owned(),
        kind => {
            let (namespace, name) = name.split_once('/').unwrap_or((namespace, name));
            (subject.namespace, subject.workload) = (namespace.to_owned(), format!("{kind}/{name}"));
        }
    }
    subject.called = format!("{singular} {name}");
    Ok(subject)
}

/// Whether a finding is about what is asked; the server has narrowed pods and nodes already.
fn is_about(subject: &Subject, finding: &Finding) -> bool {
    let Some(entity) = &finding.entity else { return subject.entity.is_empty() };
    subject.entity.is_empty()
        || entity.name == subject.entity
        || (subject.entity.len() >= 6 && entity.container_id.starts_with(&subject.entity))
}

/// How much a finding tells of what is wrong with something: what goes on before what is over, a death that must not happen before an
/// end that may have been meant, whatever ended last; of equals the latest.
fn weight(finding: &Finding) -> (bool, bool, u64) {
    let is_severe = !matches!(finding.severity.as_str(), "" | "info" | "low");
    let tells = finding.death.is_some() || finding.ongoing;
    (tells && is_severe, tells || is_severe, finding.ended_ns)
}

/// The findings of the time before the newest of them, the one that tells most first; then the older ones, the newest first.
fn rank(findings: &mut [Finding]) {
    let newest_ns = findings.iter().map(|finding| finding.ended_ns).max().unwrap_or(0);
    let oldest_ns = newest_ns.saturating_sub(LOOK_BACK_NS);
    findings.sort_by_cached_key(|finding| {
        let is_recent = finding.ended_ns >= oldest_ns || finding.ongoing;
        let (is_severe, tells, ended_ns) = if is_recent { weight(finding) } else { (false, false, finding.ended_ns) };
        std::cmp::Reverse((is_recent, finding.ongoing && is_severe, is_severe, tells, ended_ns))
    });
}

/// See the module.
pub async fn run(server: &ServerAt, printing: Printing, arguments: &Arguments) -> Result<(), Failure> {
    let subject = subject(&arguments.subject, &arguments.namespace)?;
    let mut client = connect(server, false).await?;
    let mut findings: Vec<Finding> = Vec::new();
    let mut page_token = String::new();
    for _ in 0..PAGES_MAX {
        let request = ListFindingsRequest {
            limit: PAGE,
            page_token,
            pod: subject.pod.clone(),
            workload: subject.workload.clone(),
            node: subject.node.clone(),
            namespace: subject.namespace.clone(),
            ..ListFindingsRequest::default()
        };
        let answer = client.list_findings(request).await;
        let page = answer.map_err(|status| Failure::of(server, &status))?.into_inner();
        findings.extend(page.findings.into_iter().filter(|finding| is_about(&subject, finding)));
        server.lacks(&page.incomplete)?;
        page_token = page.next_page_token;
        if page_token.is_empty() || findings.len() >= FINDINGS_MAX {
            break;
        }
    }
    findings.truncate(FINDINGS_MAX);
    rank(&mut findings);
    let others = findings.split_off(findings.len().min(1));
    let finding = findings.pop();
    let (since_ns, until_ns) = match &finding {
        Some(finding) => (finding.started_ns.saturating_sub(BEFORE_NS), finding.ended_ns + AFTER_NS),
        None => (now_ns().saturating_sub(LOOK_BACK_NS), 0),
    };
    let mut request =
        ListEventsRequest { since_ns, until_ns, limit: arguments.events.max(1), ..events_of(&subject, &KINDS) };
    let (mut last, mut unread) = read(&mut client, server, &request).await?;
    if finding.is_none() && last.is_empty() {
        // Nothing of a death in the last hour: what is there at all, of any kind and time, as `tapioctl events` shows it.
        request.since_ns = 0;
        request.kinds.clear();
        (last, unread) = read(&mut client, server, &request).await?;
    }
    last.sort_by_key(|event| event.time_ns);
    if finding.is_none() && last.is_empty() {
        return Err(Failure::Other(nothing_known(&mut client, server, &subject).await?));
    }
    let states = states(&mut client, server, &subject).await?;
    let changes = changes(&mut client, server, &subject, finding.as_ref(), &last).await?;
    let value = json!({
        "state": states.iter().map(render::event_value).collect::<Vec<_>>(),
        "changes": changes.iter().map(render::event_value).collect::<Vec<_>>(),
        "pod": subject.pod,
        "subject": subject.called,
        "finding": finding.as_ref().map(render::finding_value),
        "other_findings": others.iter().map(render::finding_value).collect::<Vec<_>>(),
        "last_events": last.iter().map(render::event_value).collect::<Vec<_>>(),
    });
    if let Some(text) = printing.format.one(&value) {
        return print(&text);
    }
    let answer = Answer { finding: finding.as_ref(), others: &others, last: &last, states: &states, changes: &changes };
    print(&text(printing, &subject, &answer, unread))
}

/// The newest events of these kinds about the subject.
fn events_of(subject: &Subject, kinds: &[&str]) -> ListEventsRequest {
    ListEventsRequest {
        namespace: subject.namespace.clone(),
        pod: subject.pod.clone(),
        workload: subject.workload.clone(),
        node: subject.node.clone(),
        entity: subject.entity.clone(),
        kinds: kinds.iter().map(|&kind| kind.to_owned()).collect(),
        limit: READ_MAX,
        newest: true,
        ..ListEventsRequest::default()
    }
}

/// Why nothing is known of it, as far as that is known.
async fn nothing_known(client: &mut Client, server: &ServerAt, subject: &Subject) -> Result<String, Failure> {
    let status = super::server::status(client, server).await?;
    let mut nodes: Vec<_> = status.nodes.iter().map(|node| node.node.as_str()).collect();
    nodes.sort_unstable();
    let nodes = match nodes.len() {
        0 => "no collector has sent anything to this server yet".to_owned(),
        count if count > STATES_MAX => format!("{count} nodes have sent events to this server"),
        _ => format!("events have come from {}", nodes.join(", ")),
    };
    let place =
        if subject.namespace.is_empty() || subject.called.contains('/') || subject.called.starts_with("namespace") {
            String::new()
        } else {
            format!(" in {}", subject.namespace)
        };
    Ok(format!(
        "nothing is known of {}{place}: no finding, and no event in the archive; {nodes}. `tapioctl findings -o wide` lists what was \
         found, with names",
        subject.called
    ))
}

/// A field of an event.
fn field<'a>(detail: &'a Value, name: &str) -> &'a str {
    detail.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn detail(event: &Event) -> Value {
    serde_json::from_str(&event.detail_json).unwrap_or_default()
}

/// The latest word on each part of the subject; what is gone is left out where other parts are there.
fn latest(subject: &Subject, events: Vec<Event>) -> Vec<Event> {
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

async fn states(client: &mut Client, server: &ServerAt, subject: &Subject) -> Result<Vec<Event>, Failure> {
    let request =
        ListEventsRequest { since_ns: now_ns().saturating_sub(STATE_BACK_NS), ..events_of(subject, &STATE_KINDS) };
    Ok(latest(subject, read(client, server, &request).await?.0))
}

/// Releases of its workload, changes of configuration in its namespace and of its node's conditions, before a finding began or before
/// now.
async fn changes(
    client: &mut Client,
    server: &ServerAt,
    subject: &Subject,
    finding: Option<&Finding>,
    last: &[Event],
) -> Result<Vec<Event>, Failure> {
    let until_ns = finding.map_or_else(now_ns, |finding| finding.started_ns.saturating_add(AFTER_NS));
    let request = ListEventsRequest {
        since_ns: until_ns.saturating_sub(CHANGES_BEFORE_NS + AFTER_NS),
        until_ns,
        kinds: CHANGE_KINDS.iter().map(|&kind| kind.to_owned()).collect(),
        limit: READ_MAX,
        newest: true,
        ..ListEventsRequest::default()
    };
    let of_finding = finding.and_then(|finding| finding.entity.clone());
    let of_event = || last.iter().filter_map(|event| event.entity.clone()).next_back();
    let whose = of_finding.or_else(of_event).unwrap_or_default();
    let mut changes = read(client, server, &request).await?.0;
    changes.retain(|event| is_change(subject, &whose, event));
    changes.drain(..changes.len().saturating_sub(CHANGES_MAX));
    Ok(changes)
}

/// Whether an event is a change that concerns the subject, or what the finding about it names.
fn is_change(subject: &Subject, whose: &EntityRef, event: &Event) -> bool {
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

/// Events, and why there are none.
async fn read(
    client: &mut Client,
    server: &ServerAt,
    request: &ListEventsRequest,
) -> Result<(Vec<Event>, Option<String>), Failure> {
    let mut last = Vec::new();
    let outcome = events::each(client, server, request.clone(), &mut |event| {
        last.push(event.clone());
        Ok(())
    })
    .await;
    match outcome {
        Ok(()) => Ok((last, None)),
        Err(Failure::Other(reason)) => Ok((last, Some(reason))),
        Err(failure) => Err(failure),
    }
}

/// What is told.
struct Answer<'a> {
    finding: Option<&'a Finding>,
    others: &'a [Finding],
    last: &'a [Event],
    states: &'a [Event],
    changes: &'a [Event],
}

fn text(printing: Printing, subject: &Subject, answer: &Answer<'_>, unread: Option<String>) -> String {
    let style = printing.style;
    let mut out = match answer.finding {
        Some(finding) => render::finding(style, finding),
        None => format!(
            "Nothing was found to be wrong with {}, and no death of it was seen.\n",
            render::clean(&subject.called)
        ),
    };
    let rows = |out: &mut String, title: &str, events: &[Event]| {
        if !events.is_empty() {
            out.push_str(&format!("\n{title}\n"));
            events.iter().for_each(|event| out.push_str(&render::event_row(style, event)));
        }
    };
    rows(&mut out, "State now, as it was told last", answer.states);
    rows(&mut out, "What changed before", answer.changes);
    out.push_str("\nLast events\n");
    for event in answer.last {
        out.push_str(&render::event_row(style, event));
    }
    if let Some(unread) = unread {
        out.push_str(&format!("  none: {}\n", render::clean(&unread)));
    }
    if !answer.others.is_empty() {
        out.push_str("\nOther findings\n");
        out.push_str(&render::list_header(style));
        answer.others.iter().for_each(|finding| out.push_str(&render::list_row(style, finding)));
    }
    out.push_str("\nTapio reads what containers write only where `collector.log_lines` says so: `kubectl logs --previous` has all of it.\n");
    out
}

#[cfg(test)]
mod tests {
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
    fn a_real_death_goes_before_an_end_that_came_later_and_the_last_hour_before_what_is_older() {
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
    fn pods_containers_units_and_nodes_are_understood_and_other_kinds_are_refused() {
        let of = |text: &str| subject(text, "").expect("understood");
        for (text, pod) in [
            ("web-0", "web-0"),
            ("pod/web-0", "web-0"),
            ("pods/shop/web-0", "shop/web-0"),
            ("shop/web-0", "shop/web-0"),
        ] {
            assert_eq!(of(text).pod, pod, "{text}");
        }
        assert_eq!(of("container/containerd://dc31f2ad9b24").entity, "dc31f2ad9b24");
        assert_eq!((of("unit/bad.service").entity.as_str(), of("node/n1").node.as_str()), ("bad.service", "n1"));
        let web = of("deploy/shop/web");
        assert_eq!((web.workload.as_str(), web.namespace.as_str()), ("Deployment/web", "shop"));
        assert_eq!(of("job/import").workload, "Job/import");
        assert_eq!(of("ns/shop").namespace, "shop");
        for text in ["service/web", "cronjob/x", "pod/", "deploy/", "ns/", "a/b/c", "deploy/shop/"] {
            assert!(matches!(subject(text, ""), Err(Failure::Usage(_))), "{text}");
        }
        assert!(matches!(subject("pod/shop/web-0", "other"), Err(Failure::Usage(_))));
    }

    #[test]
    fn what_goes_on_is_told_before_a_death_that_came_later() {
        let ongoing = Finding { ongoing: true, ..finding("unschedulable", "high", 10, false) };
        let mut findings = [finding("oom", "critical", 90_000, true), ongoing];
        rank(&mut findings);
        assert_eq!(findings[0].id, "unschedulable");
    }

    #[test]
    fn the_state_is_the_latest_word_on_each_part_and_of_what_is_gone_only_where_nothing_is_left() {
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
    fn a_container_is_meant_by_the_beginning_of_its_id_and_a_unit_by_its_name() {
        let entity = |name: &str, container_id: &str| Finding {
            entity: Some(EntityRef { name: name.into(), container_id: container_id.into(), ..EntityRef::default() }),
            ..Finding::default()
        };
        let of = |text: &str| subject(text, "").expect("understood");
        assert!(is_about(&of("container/dc31f2ad"), &entity("shop/web/x", "dc31f2ad9b24")));
        assert!(!is_about(&of("container/dc31f2ad"), &entity("shop/web/x", "ac31f2ad9b24")));
        assert!(is_about(&of("unit/bad.service"), &entity("bad.service", "")));
        assert!(!is_about(&of("unit/bad.service"), &entity("worse-bad.service", "")));
    }
}
