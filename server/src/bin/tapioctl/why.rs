//! `tapioctl why pod/NAME`: what is wrong with something, or why it died, and everything that is known about it.
//!
//! What enters: a pod, a workload, a container, a unit, a host group, a node or a namespace. What leaves: its state now, the
//! finding that explains most, what changed before, the last events, other findings. It answers also when nothing is wrong, and
//! why nothing is known.

mod subject;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use clap_complete::engine::ArgValueCompleter;
use serde_json::json;
use tapio_server::query::why::{
    AFTER_NS, CHANGE_KINDS, CHANGES_BEFORE_NS, CHANGES_MAX, LOOK_BACK_NS, STATE_BACK_NS, STATE_KINDS, STATES_MAX,
    States, Subject, is_about, is_change, latest, rank, without_repeats,
};
use tapio_server::render;
use tapio_wire::service::{EntityRef, Event, Finding, ListEventsRequest, ListFindingsRequest, NodeStatus};

use subject::{KNOWN, as_container, hint, subject};

use super::output::print;
use super::server::{Client, Failure, ServerAt, connect};
use super::{Printing, complete, events, filter, now_ns};

/// How long before a finding's start events are searched.
const BEFORE_NS: u64 = 5 * 60 * 1_000_000_000;
const READ_MAX: u32 = 2_000;
/// A beginning that is named: with 0 a server answers from its own disk alone.
const FIRST_NS: u64 = 1;
/// Findings that are looked at and shown at most, how many are asked for at once, and how often.
const FINDINGS_MAX: usize = 50;
const PAGE: u32 = 500;
const PAGES_MAX: usize = 20;
/// Events that state that a process ended, or why.
const ENDS: [&str; 4] = ["exit", "oom", "signal", "signal_delivered"];
/// Events that say something about a death; the many bulk events do not.
const KINDS: [&str; 17] = [
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
    "trouble",
    "curve",
    "object_state",
];

#[derive(Args)]
pub struct Arguments {
    /// pod/NAME, pod/NAMESPACE/NAME, pod/UID or the beginning of a uid. Others: deploy/NAME, statefulset/NAME, daemonset/NAME,
    /// job/NAME, container/ID, unit/NAME, host/PATH (a host group's cgroup), node/NAME, ns/NAME. Without a prefix: a pod's NAME,
    /// a container's ID, a PATH
    #[arg(value_parser = NonEmptyStringValueParser::new(), add = ArgValueCompleter::new(complete::subjects))]
    subject: String,
    /// Namespace of the pod or workload
    #[arg(long, short, value_parser = NonEmptyStringValueParser::new())]
    namespace: Option<String>,
    /// Number of last events to show
    #[arg(long, default_value_t = 20)]
    events: u32,
}

/// Runs `tapioctl why`.
pub async fn run(server: &ServerAt, printing: Printing, arguments: &Arguments) -> Result<(), Failure> {
    let namespace = filter(&arguments.namespace);
    let mut subject = subject(&arguments.subject, &namespace)?;
    let mut client = connect(server, false).await?;
    let mut gathered = gather(&mut client, server, &subject, arguments.events).await?;
    if gathered.is_empty()
        && let Some(container) = as_container(&arguments.subject, &namespace)
    {
        let of_container = gather(&mut client, server, &container, arguments.events).await?;
        if !of_container.is_empty() {
            (subject, gathered) = (container, of_container);
        }
    }
    if gathered.is_empty() {
        return Err(Failure::Other(nothing_known(&mut client, server, &subject).await?));
    }
    let Gathered { finding, others, last, unread } = gathered;
    let states = states(&mut client, server, &subject).await?;
    let changes = changes(&mut client, server, &subject, finding.as_ref(), &last).await?;
    let value = json!({
        "state": states.shown.iter().map(render::event_value).collect::<Vec<_>>(),
        "state_left_out": states.left_out,
        "changes": changes.iter().map(render::event_value).collect::<Vec<_>>(),
        "pod": subject.pod,
        "subject": subject.called,
        "finding": finding.as_ref().map(render::finding_value),
        "other_findings": others.iter().map(render::finding_value).collect::<Vec<_>>(),
        "last_events": last.iter().map(render::event_value).collect::<Vec<_>>(),
        "remote": server.remote().as_ref().map(render::remote_value),
    });
    if let Some(text) = printing.format.one(&value) {
        return print(&text);
    }
    let answer = Answer { finding: finding.as_ref(), others: &others, last: &last, states: &states, changes: &changes };
    let mut text = text(printing, &subject, &answer, unread);
    if let Some(read) = server.remote() {
        text.push_str(&format!("\n{}\n", render::remote_read(&read)));
    }
    print(&text)
}

/// What is known of a subject.
struct Gathered {
    finding: Option<Finding>,
    others: Vec<Finding>,
    last: Vec<Event>,
    /// Why there are no events.
    unread: Option<String>,
}

impl Gathered {
    fn is_empty(&self) -> bool {
        self.finding.is_none() && self.last.is_empty()
    }
}

async fn gather(
    client: &mut Client,
    server: &ServerAt,
    subject: &Subject,
    events_max: u32,
) -> Result<Gathered, Failure> {
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
        findings.extend(page.findings.into_iter().filter(|finding| is_about(subject, finding)));
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
    let mut request = ListEventsRequest { since_ns, until_ns, ..events_of(subject, &KINDS) };
    let events_max = events_max.max(1);
    let (mut last, mut unread) = read_of(client, server, subject, &request).await?;
    if finding.is_none() && last.is_empty() {
        // Nothing of a death in the last hour: what is there at all, of any kind and time, in a remote archive too.
        request.since_ns = FIRST_NS;
        request.kinds.clear();
        if !subject.is_exact {
            request.limit = events_max;
        }
        (last, unread) = read_of(client, server, subject, &request).await?;
    }
    last.sort_by_key(|event| event.time_ns);
    without_repeats(&mut last);
    last.drain(..last.len().saturating_sub(events_max as usize));
    Ok(Gathered { finding, others, last, unread })
}

/// Events about the subject itself: the server brings those of everything with its name in theirs.
async fn read_of(
    client: &mut Client,
    server: &ServerAt,
    subject: &Subject,
    request: &ListEventsRequest,
) -> Result<(Vec<Event>, Option<String>), Failure> {
    let (mut events, unread) = read(client, server, request).await?;
    let is_it = |entity: &EntityRef| entity.name == subject.entity || entity.cgroup == subject.entity;
    events.retain(|event| !subject.is_exact || event.entity.as_ref().is_some_and(is_it));
    Ok((events, unread))
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
    let nodes = known_nodes(&status.nodes);
    let place =
        if subject.namespace.is_empty() || subject.called.contains('/') || subject.called.starts_with("namespace") {
            String::new()
        } else {
            format!(" in {}", subject.namespace)
        };
    let guess = match subject.is_guessed {
        true => format!(". It was taken for NAMESPACE/NAME of a pod; a kind is one of {KNOWN}"),
        false => hint(subject).to_owned(),
    };
    Ok(format!(
        "nothing is known of {}{place}: no finding, and no event in the archive; {nodes}. `tapioctl findings -o wide` lists what was \
         found, with names{guess}",
        subject.called
    ))
}

/// Which nodes the server has heard of: those that sent events, and those that are only connected.
fn known_nodes(nodes: &[NodeStatus]) -> String {
    let called = |has_sent: bool| {
        let nodes = nodes.iter().filter(|node| node.epochs.is_empty() != has_sent && (has_sent || node.connected));
        let mut nodes: Vec<_> = nodes.map(|node| node.node.as_str()).collect();
        nodes.sort_unstable();
        nodes.dedup();
        match nodes.len() {
            0 => None,
            count if count > STATES_MAX => Some(format!("{count} nodes")),
            _ => Some(nodes.join(", ")),
        }
    };
    match (called(true), called(false)) {
        (None, None) => "no collector has connected to this server yet".to_owned(),
        (Some(sent), None) => format!("events have come from {sent}"),
        (sent, Some(silent)) => {
            let sent = sent.map_or_else(String::new, |sent| format!("events have come from {sent}; "));
            format!(
                "{sent}connected, with 0 events sent so far: {silent} (`tapioctl status` says which sources are off)"
            )
        }
    }
}

async fn states(client: &mut Client, server: &ServerAt, subject: &Subject) -> Result<States, Failure> {
    let mut kinds = STATE_KINDS.to_vec();
    if subject.node.is_empty() {
        kinds.push("curve");
    }
    let now_ns = now_ns();
    let request = ListEventsRequest { since_ns: now_ns.saturating_sub(STATE_BACK_NS), ..events_of(subject, &kinds) };
    Ok(latest(subject, read_of(client, server, subject, &request).await?.0, now_ns))
}

/// Releases and other changes of its workload, changes of configuration in its namespace and of its node's conditions, before a
/// finding began or before now.
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

/// What is printed.
struct Answer<'a> {
    finding: Option<&'a Finding>,
    others: &'a [Finding],
    last: &'a [Event],
    states: &'a States,
    changes: &'a [Event],
}

fn text(printing: Printing, subject: &Subject, answer: &Answer<'_>, unread: Option<String>) -> String {
    let style = printing.style;
    let mut out = match answer.finding {
        Some(finding) => render::finding(style, finding),
        None => {
            let called = render::clean(&subject.called);
            match answer.last.iter().any(|event| ENDS.contains(&event.kind.as_str())) {
                true => format!(
                    "Nothing was found to be wrong with {called}. Processes of it ended, or were sent signals (see below); no pattern \
                     explains that.\n"
                ),
                false => format!("Nothing was found to be wrong with {called}, and no death of it was seen.\n"),
            }
        }
    };
    let rows = |out: &mut String, title: &str, events: &[Event]| {
        if !events.is_empty() {
            out.push_str(&format!("\n{title}\n"));
            events.iter().for_each(|event| out.push_str(&render::event_row(style, event)));
        }
    };
    rows(&mut out, "State now, as last reported", &answer.states.shown);
    if answer.states.left_out > 0 {
        out.push_str(&format!(
            "  and {} more that are not shown: `tapioctl why pod/NAME` has those of one pod\n",
            answer.states.left_out
        ));
    }
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
    if is_of_kubernetes(subject, answer) {
        out.push_str(LOGS);
    }
    out
}

const LOGS: &str = "\nTapio reads what containers write only where `collector.log_lines` says so: `kubectl logs --previous` has all of it.\n";

fn is_of_kubernetes(subject: &Subject, answer: &Answer<'_>) -> bool {
    let of_pod = |entity: &Option<EntityRef>| entity.as_ref().is_some_and(|entity| !entity.pod.is_empty());
    ![&subject.pod, &subject.workload, &subject.namespace].iter().all(|name| name.is_empty())
        || answer.finding.is_some_and(|finding| of_pod(&finding.entity))
        || answer.last.iter().any(|event| of_pod(&event.entity))
}

#[cfg(test)]
mod tests;
