//! `/w/NAMESPACE/KIND/NAME` and `/n/NODE`: what happened to a workload, a pod or a node, how it is now, and its curves.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use maud::{Markup, html};
use serde_json::Value;
use tapio_wire::program::units::human_bytes;
use tapio_wire::service::{EntityRef, Event, Finding, ListFindingsRequest, NodeStatus, StatusResponse};

use super::frame::{self, PageHead};
use super::{Failure, Page, Pages, curve, ledger, now_ns, or_nothing, parts, unknown};
use crate::events::{self, Choice};
use crate::findings::text;
use crate::query::why::{self, Subject, detail, field};
use crate::render;

/// Findings that are listed, events that are read of each sort, curves that are drawn.
const FINDINGS: usize = 30;
const READ_MAX: u64 = 2_000;
const CURVES_MAX: usize = 4;

/// What is known of a subject.
struct Story {
    findings: Vec<Arc<Finding>>,
    states: Vec<Event>,
    states_left_out: usize,
    changes: Vec<Event>,
    /// The latest of each container.
    curves: Vec<Event>,
    missing: Vec<String>,
}

async fn story(pages: &Pages, subject: &Subject, headers: &HeaderMap) -> Result<Story, Failure> {
    let request = ListFindingsRequest {
        namespace: subject.namespace.clone(),
        workload: subject.workload.clone(),
        pod: subject.pod.clone(),
        node: subject.node.clone(),
        ..ListFindingsRequest::default()
    };
    let findings = pages.page(&request, usize::MAX).map_err(Failure::usage)?.findings;
    let since_ns = now_ns().saturating_sub(why::STATE_BACK_NS);
    let of_kinds = |kinds: &[&str]| Choice {
        since_ns,
        kinds: events::kinds_named(kinds.iter().copied()).unwrap_or_default(),
        limit: READ_MAX,
        newest: true,
        ..Choice::default()
    };
    let of_subject = |kinds: &[&str]| Choice {
        namespace: subject.namespace.clone(),
        workload: subject.workload.clone(),
        pod: subject.pod.clone(),
        node: subject.node.clone(),
        ..of_kinds(kinds)
    };
    let (stated, changed) = tokio::join!(
        pages.read(of_subject(&why::STATE_KINDS), headers),
        pages.read(of_kinds(&why::CHANGE_KINDS), headers)
    );
    // A node has too many curves; its workloads show them.
    let curves = match subject.node.is_empty() {
        true => pages.read(of_subject(&["curve"]), headers).await,
        false => super::Read::default(),
    };
    let whose = findings.first().and_then(|finding| finding.entity.clone()).unwrap_or_default();
    let mut changes = changed.events;
    changes.retain(|event| why::is_change(subject, &whose, event));
    changes.drain(..changes.len().saturating_sub(why::CHANGES_MAX));
    let mut missing = [stated.missing, changed.missing, curves.missing].concat();
    missing.sort();
    missing.dedup();
    let states = why::latest(subject, stated.events, now_ns());
    Ok(Story {
        findings,
        states: states.shown,
        states_left_out: states.left_out,
        changes,
        curves: latest_curves(curves.events),
        missing,
    })
}

/// The latest curve of each of the entities that have one, those with the newest first.
fn latest_curves(events: Vec<Event>) -> Vec<Event> {
    let mut latest: Vec<Event> = Vec::new();
    let id = |event: &Event| event.entity.as_ref().map_or(0, |entity| entity.id);
    for event in events.into_iter().rev() {
        if latest.len() < CURVES_MAX && !latest.iter().any(|known| id(known) == id(&event)) {
            latest.push(event);
        }
    }
    latest
}

/// The page of a workload, or of a pod.
pub async fn workload(
    State(pages): State<Pages>,
    Path((namespace, owner)): Path<(String, String)>,
    headers: HeaderMap,
) -> Page {
    let Some((kind, name)) = owner.split_once('/').filter(|(kind, name)| !kind.is_empty() && !name.is_empty()) else {
        return Err(Failure::usage("a workload is /w/NAMESPACE/KIND/NAME, as in /w/shop/Deployment/web"));
    };
    let mut subject = Subject { called: owner.clone(), namespace: namespace.clone(), ..Subject::default() };
    match kind {
        "Pod" => subject.pod = format!("{namespace}/{name}"),
        _ => subject.workload = owner.clone(),
    }
    let story = story(&pages, &subject, &headers).await?;
    let is_unknown = story.findings.is_empty() && story.states.is_empty() && story.curves.is_empty();
    if is_unknown && story.missing.is_empty() {
        let text = format!("nothing is known of {owner} in {namespace}: no finding, and no event of the last day");
        return Err(Failure::not_found(text));
    }
    let title = format!("{namespace} › {owner}");
    let list = match subject.pod.as_str() {
        "" => format!("/?namespace={}&workload={}&view=list", parts::encoded(&namespace), parts::encoded(&owner)),
        pod => format!("/?pod={}&view=list", parts::encoded(pod)),
    };
    let main = html! {
        div #story data-fresh {
            h1 { (title) }
            (unread(&story.missing))
            (deaths(&story, &list))
            (containers(&story.states))
            (events_of(&story))
            @for event in &story.curves {
                (or_nothing(curve::drawing(event, &notes(&story, event)), |drawing| html! {
                    section {
                        h2 { "Memory of " (event.entity.as_ref().map_or("", |entity| entity.name.as_str())) }
                        (drawing)
                    }
                }))
            }
        }
    };
    Ok(frame::page(PageHead { title: &title, at: "", follows: "all" }, &main))
}

/// The page of a node.
pub async fn node(State(pages): State<Pages>, Path(name): Path<String>, headers: HeaderMap) -> Page {
    let subject = Subject { called: format!("node {name}"), node: name.clone(), ..Subject::default() };
    let story = story(&pages, &subject, &headers).await?;
    let status = pages.status(&headers).await.map(|status| of_node(status, &name));
    let is_listed = status.as_ref().is_some_and(|status| !status.nodes.is_empty());
    if !is_listed && story.findings.is_empty() && story.states.is_empty() && story.missing.is_empty() {
        return Err(Failure::not_found(format!(
            "no collector of a node {name} has connected, and nothing was found on it"
        )));
    }
    let list = format!("/?node={}&view=list", parts::encoded(&name));
    let main = html! {
        div #story data-fresh {
            h1 { "Node " (name) }
            (unread(&story.missing))
            @if is_listed { (unknown::notice(status.as_ref(), &[], now_ns())) }
            (deaths(&story, &list))
            (events_of(&story))
            (or_nothing(status.as_ref().filter(|_| is_listed), |status| html! {
                section { h2 { "Collector" } (epochs(&status.nodes)) }
                section { h2 { "Ledger" } (ledger::ledger(status)) }
            }))
        }
    };
    Ok(frame::page(PageHead { title: &format!("Node {name}"), at: "", follows: "all" }, &main))
}

/// A status of one node alone. Whether the ledger closes is asked of this node, too.
fn of_node(mut status: StatusResponse, name: &str) -> StatusResponse {
    status.nodes.retain(|node| node.node == name);
    let sources = status.nodes.iter().flat_map(|node| &node.epochs).flat_map(|epoch| &epoch.sources);
    status.unexplained_events = sources.map(|source| source.unexplained.saturating_abs()).sum();
    status.elsewhere.clear();
    status
}

fn unread(missing: &[String]) -> Markup {
    html! { @for missing in missing { p.notice.bad { (missing) } } }
}

fn deaths(story: &Story, list: &str) -> Markup {
    let now_ns = now_ns();
    let deaths = story.findings.iter().filter(|finding| finding.death.is_some());
    let deaths: u64 = deaths.map(|finding| u64::from(finding.count.max(1))).sum();
    html! {
        section {
            h2 { "Findings" }
            p.quiet { (text::count(story.findings.len() as u64, "finding")) ", " (text::count(deaths, "death")) }
            (parts::sparkline(&parts::deaths_by_hour(&story.findings, now_ns), true))
            (parts::finding_list(&story.findings[..story.findings.len().min(FINDINGS)], now_ns, "Nothing was found to be wrong."))
            @if story.findings.len() > FINDINGS { p.more { a href=(list) { "All of them" } } }
        }
    }
}

/// Containers as Kubernetes reported them last: restarts and limits.
fn containers(states: &[Event]) -> Markup {
    let of_containers: Vec<_> = states.iter().filter(|event| event.kind == "container_state").collect();
    let bytes = |detail: &Value, name: &str| match detail[name].as_u64() {
        None | Some(0) | Some(u64::MAX) => "none".to_owned(),
        Some(bytes) => human_bytes(bytes),
    };
    let milli = |detail: &Value| match detail["cpu_limit_milli"].as_u64() {
        None | Some(0) => "none".to_owned(),
        Some(milli) => format!("{milli}m"),
    };
    let none = EntityRef::default();
    html! {
        @if !of_containers.is_empty() {
            section {
                h2 { "Containers" }
                div.wide tabindex="0" role="region" aria-label="Containers" {
                    table {
                        caption { "As Kubernetes reported them last" }
                        thead { tr {
                            th scope="col" { "Pod" } th scope="col" { "Container" } th scope="col" { "State" }
                            th.number scope="col" { "Restarts" } th.number scope="col" { "Memory limit" }
                            th.number scope="col" { "CPU limit" }
                        } }
                        tbody {
                            @for event in of_containers {
                                @let detail = detail(event);
                                @let entity = event.entity.as_ref().unwrap_or(&none);
                                tr {
                                    td.name { (entity.pod) }
                                    td.name { (field(&detail, "container")) }
                                    td { (field(&detail, "state")) " " (field(&detail, "reason")) }
                                    td.number { (detail["restart_count"].as_u64().unwrap_or(0)) }
                                    td.number { (bytes(&detail, "memory_limit_bytes")) }
                                    td.number { (milli(&detail)) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn events_of(story: &Story) -> Markup {
    html! {
        @if !story.states.is_empty() {
            section {
                h2 { "State now" }
                (parts::event_table("As last reported", &story.states))
                @if story.states_left_out > 0 { p { "and " (story.states_left_out) " more that are not shown" } }
            }
        }
        @if !story.changes.is_empty() { section { h2 { "Changes" } (parts::event_table("Of the last day", &story.changes)) } }
    }
}

/// What is marked in a curve: deaths of its entity, and changes.
fn notes(story: &Story, event: &Event) -> Vec<curve::Note> {
    let id = event.entity.as_ref().map_or(0, |entity| entity.id);
    let of_it = |finding: &&Arc<Finding>| {
        finding.death.is_some() && finding.entity.as_ref().is_some_and(|entity| entity.id == id)
    };
    let died = story.findings.iter().filter(of_it).map(|finding| curve::Note {
        time_ns: finding.ended_ns,
        text: parts::cut(&finding.title),
        is_death: true,
    });
    let changed = story.changes.iter().map(|event| curve::Note {
        time_ns: event.time_ns,
        text: parts::cut(&event.text),
        is_death: false,
    });
    changed.chain(died).collect()
}

fn epochs(nodes: &[NodeStatus]) -> Markup {
    html! {
        div.wide tabindex="0" role="region" aria-label="Collector" {
            table {
                caption { "Its collector's epochs" }
                thead { tr {
                    th scope="col" { "Node" } th scope="col" { "Collector" } th scope="col" { "Epoch" } th scope="col" { "State" }
                    th scope="col" { "Last frame" }
                } }
                tbody {
                    @for node in nodes {
                        @for epoch in &node.epochs {
                            tr {
                                td { (render::where_of(node)) }
                                td { @if node.connected { "connected" } @else { "gone" } }
                                td { code { (format!("{:x}", epoch.epoch)) } }
                                td { (epoch.state) }
                                td { @if epoch.last_frame_ns > 0 { (parts::moment(epoch.last_frame_ns, now_ns())) } @else { "-" } }
                            }
                        }
                    }
                }
            }
        }
    }
}
