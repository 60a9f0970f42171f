//! `tapioctl why pod/NAME`: the last death of a pod and everything that is known about it.

use clap::Args;
use serde_json::json;
use tapio_server::render;
use tapio_wire::service::{Event, Finding, ListEventsRequest, ListFindingsRequest};

use super::output::print;
use super::server::{Failure, ServerAt, connect};
use super::{Printing, events, now_ns};

/// Events are looked for so much before a finding began and after it ended.
const BEFORE_NS: u64 = 5 * 60 * 1_000_000_000;
const AFTER_NS: u64 = 60 * 1_000_000_000;
/// Without a finding: how far back.
const LOOK_BACK_NS: u64 = 3600 * 1_000_000_000;
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
    /// pod/NAME, or NAME
    pod: String,
    /// The pod's namespace
    #[arg(long, short, default_value = "", hide_default_value = true)]
    namespace: String,
    /// Last events to show
    #[arg(long, default_value_t = 20)]
    events: u32,
}

/// See the module.
pub async fn run(server: &ServerAt, printing: Printing, arguments: &Arguments) -> Result<(), Failure> {
    let pod = match arguments.pod.split_once('/') {
        Some(("pod" | "pods" | "po", name)) => name.to_owned(),
        Some((kind, _)) if arguments.pod.split('/').count() == 2 && arguments.namespace.is_empty() => {
            return Err(Failure::Usage(format!(
                "\"{kind}/…\" is not understood: write pod/NAME, and the namespace with -n"
            )));
        }
        _ => arguments.pod.clone(),
    };
    let mut client = connect(server, false).await?;
    let request = ListFindingsRequest {
        limit: 50,
        pod: pod.clone(),
        namespace: arguments.namespace.clone(),
        ..ListFindingsRequest::default()
    };
    let answer = client.list_findings(request).await;
    let mut findings = answer.map_err(|status| Failure::of(server, &status))?.into_inner().findings;
    // The newest death; a finding without one tells less.
    findings.sort_by_key(|finding| std::cmp::Reverse((finding.death.is_some(), finding.ended_ns)));
    let others = findings.split_off(findings.len().min(1));
    let finding = findings.pop();
    let (since_ns, until_ns) = match &finding {
        Some(finding) => (finding.started_ns.saturating_sub(BEFORE_NS), finding.ended_ns + AFTER_NS),
        None => (now_ns().saturating_sub(LOOK_BACK_NS), 0),
    };
    let request = ListEventsRequest {
        since_ns,
        until_ns,
        namespace: arguments.namespace.clone(),
        pod: pod.clone(),
        kinds: KINDS.iter().map(|&kind| kind.to_owned()).collect(),
        limit: arguments.events.max(1),
        newest: true,
        ..ListEventsRequest::default()
    };
    let mut last: Vec<Event> = Vec::new();
    let read = events::each(&mut client, server, request, &mut |event| {
        last.push(event.clone());
        Ok(())
    })
    .await;
    let unread = match read {
        Ok(()) => None,
        Err(Failure::Other(reason)) => Some(reason),
        Err(failure) => return Err(failure),
    };
    last.sort_by_key(|event| event.time_ns);
    if finding.is_none() && last.is_empty() {
        return Err(Failure::Other(format!(
            "nothing is known of pod {pod}{}: no finding, and no event in the last hour. `tapioctl findings -o wide` lists \
             what was found, with names",
            if arguments.namespace.is_empty() { String::new() } else { format!(" in {}", arguments.namespace) }
        )));
    }
    let value = json!({
        "pod": pod,
        "finding": finding.as_ref().map(render::finding_value),
        "other_findings": others.iter().map(render::finding_value).collect::<Vec<_>>(),
        "last_events": last.iter().map(render::event_value).collect::<Vec<_>>(),
    });
    if let Some(text) = printing.format.one(&value) {
        return print(&text);
    }
    print(&text(printing, finding.as_ref(), &others, &last, unread))
}

fn text(
    printing: Printing,
    finding: Option<&Finding>,
    others: &[Finding],
    last: &[Event],
    unread: Option<String>,
) -> String {
    let style = printing.style;
    let mut out = match finding {
        Some(finding) => render::finding(style, finding),
        None => "No finding explains a death of this pod.\n".to_owned(),
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
