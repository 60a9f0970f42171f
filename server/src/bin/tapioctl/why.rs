//! `tapioctl why pod/NAME`: why something died, and everything that is known about it.

use clap::Args;
use serde_json::json;
use tapio_server::render;
use tapio_wire::service::{Event, Finding, ListEventsRequest, ListFindingsRequest};

use super::output::print;
use super::server::{Client, Failure, ServerAt, connect};
use super::{Printing, events, now_ns};

/// Events are looked for so much before a finding began and after it ended.
const BEFORE_NS: u64 = 5 * 60 * 1_000_000_000;
const AFTER_NS: u64 = 60 * 1_000_000_000;
/// Without a finding: how far back.
const LOOK_BACK_NS: u64 = 3600 * 1_000_000_000;
/// Findings that are looked at and shown at most, how many are asked for at once, and how often.
const FINDINGS_MAX: usize = 50;
const PAGE: u32 = 500;
const PAGES_MAX: usize = 20;
/// What people write who think of kubectl, and what nothing is found for.
const OTHER_KINDS: [&str; 12] = [
    "deployment",
    "deploy",
    "statefulset",
    "sts",
    "daemonset",
    "ds",
    "replicaset",
    "rs",
    "job",
    "cronjob",
    "service",
    "svc",
];
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
    /// pod/NAME, pod/NAMESPACE/NAME, pod/UID or the beginning of a uid, container/ID, unit/NAME, node/NAME; or a pod's NAME
    subject: String,
    /// The pod's namespace
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
    node: String,
    /// A container's id or the beginning of it, or a unit's name.
    entity: String,
}

/// What an argument and a namespace mean.
fn subject(argument: &str, namespace: &str) -> Result<Subject, Failure> {
    let (kind, name) = match argument.split_once('/') {
        Some((
            kind @ ("pod" | "pods" | "po" | "container" | "containers" | "unit" | "units" | "node" | "nodes"),
            name,
        )) => (kind, name),
        // NAMESPACE/NAME cannot be told from KIND/NAME but by the kinds that there are.
        Some((kind, _)) if OTHER_KINDS.contains(&kind) || argument.split('/').count() > 2 => {
            return Err(Failure::Usage(format!(
                "\"{kind}/…\" is not understood: write pod/NAME, pod/NAMESPACE/NAME, pod/UID, container/ID, unit/NAME or node/NAME"
            )));
        }
        _ => ("pod", argument),
    };
    if name.is_empty() {
        return Err(Failure::Usage(format!("\"{argument}\" has no name: write {kind}/NAME")));
    }
    if name.contains('/') && !namespace.is_empty() && !name.starts_with(&format!("{namespace}/")) {
        return Err(Failure::Usage(format!("\"{name}\" is not in the namespace {namespace}: leave one of them out")));
    }
    let kind = kind.trim_end_matches('s');
    let mut subject = Subject::default();
    match kind {
        "container" => subject.entity = name.split_once("://").map_or(name, |(_, id)| id).to_owned(),
        "unit" => subject.entity = name.to_owned(),
        "node" => subject.node = name.to_owned(),
        _ => subject.pod = name.to_owned(),
    }
    let kind = if kind == "po" { "pod" } else { kind };
    subject.called = format!("{kind} {name}");
    Ok(subject)
}

/// Whether a finding is about what is asked; the server has narrowed pods and nodes already.
fn is_about(subject: &Subject, finding: &Finding) -> bool {
    let Some(entity) = &finding.entity else { return subject.entity.is_empty() };
    subject.entity.is_empty()
        || entity.name == subject.entity
        || (subject.entity.len() >= 6 && entity.container_id.starts_with(&subject.entity))
}

/// How much a finding tells of why something died: a death that must not happen before an end that may have been meant, whatever
/// ended last; of equals the latest.
fn weight(finding: &Finding) -> (bool, bool, u64) {
    let is_severe = !matches!(finding.severity.as_str(), "" | "info" | "low");
    (finding.death.is_some() && is_severe, finding.death.is_some() || is_severe, finding.ended_ns)
}

/// The findings of the time before the newest of them, the one that tells most first; then the older ones, the newest first.
fn rank(findings: &mut [Finding]) {
    let newest_ns = findings.iter().map(|finding| finding.ended_ns).max().unwrap_or(0);
    let oldest_ns = newest_ns.saturating_sub(LOOK_BACK_NS);
    findings.sort_by_cached_key(|finding| {
        let is_recent = finding.ended_ns >= oldest_ns;
        let (is_severe_death, tells, ended_ns) =
            if is_recent { weight(finding) } else { (false, false, finding.ended_ns) };
        std::cmp::Reverse((is_recent, is_severe_death, tells, ended_ns))
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
            node: subject.node.clone(),
            namespace: arguments.namespace.clone(),
            ..ListFindingsRequest::default()
        };
        let answer = client.list_findings(request).await;
        let page = answer.map_err(|status| Failure::of(server, &status))?.into_inner();
        findings.extend(page.findings.into_iter().filter(|finding| is_about(&subject, finding)));
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
    let mut request = ListEventsRequest {
        since_ns,
        until_ns,
        namespace: arguments.namespace.clone(),
        pod: subject.pod.clone(),
        node: subject.node.clone(),
        entity: subject.entity.clone(),
        kinds: KINDS.iter().map(|&kind| kind.to_owned()).collect(),
        limit: arguments.events.max(1),
        newest: true,
    };
    let (mut last, mut unread) = read(&mut client, server, &request).await?;
    if finding.is_none() && last.is_empty() {
        // Nothing of a death in the last hour: what is there at all, of any kind and time, as `tapioctl events` shows it.
        request.since_ns = 0;
        request.kinds.clear();
        (last, unread) = read(&mut client, server, &request).await?;
    }
    last.sort_by_key(|event| event.time_ns);
    if finding.is_none() && last.is_empty() {
        return Err(Failure::Other(format!(
            "nothing is known of {}{}: no finding, and no event in the archive. `tapioctl findings -o wide` lists what was \
             found, with names",
            subject.called,
            if arguments.namespace.is_empty() { String::new() } else { format!(" in {}", arguments.namespace) }
        )));
    }
    let value = json!({
        "pod": subject.pod,
        "subject": subject.called,
        "finding": finding.as_ref().map(render::finding_value),
        "other_findings": others.iter().map(render::finding_value).collect::<Vec<_>>(),
        "last_events": last.iter().map(render::event_value).collect::<Vec<_>>(),
    });
    if let Some(text) = printing.format.one(&value) {
        return print(&text);
    }
    print(&text(printing, &subject, finding.as_ref(), &others, &last, unread))
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

fn text(
    printing: Printing,
    subject: &Subject,
    finding: Option<&Finding>,
    others: &[Finding],
    last: &[Event],
    unread: Option<String>,
) -> String {
    let style = printing.style;
    let mut out = match finding {
        Some(finding) => render::finding(style, finding),
        None => format!("No finding explains a death of {}.\n", render::clean(&subject.called)),
    };
    out.push_str("\nLast events\n");
    for event in last {
        out.push_str(&render::event_row(style, event));
    }
    if let Some(unread) = unread {
        out.push_str(&format!("  none: {}\n", render::clean(&unread)));
    }
    if !others.is_empty() {
        out.push_str("\nOther findings\n");
        out.push_str(&render::list_header(style));
        others.iter().for_each(|finding| out.push_str(&render::list_row(style, finding)));
    }
    out
}

#[cfg(test)]
mod tests {
    use tapio_wire::service::{Death, EntityRef};

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
        for text in ["deployment/web", "pod/", "a/b/c"] {
            assert!(matches!(subject(text, ""), Err(Failure::Usage(_))), "{text}");
        }
        assert!(matches!(subject("pod/shop/web-0", "other"), Err(Failure::Usage(_))));
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
