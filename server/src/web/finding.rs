//! `/f/ID`: one finding with everything that is known of it; `/f/ID.md`: the same as Markdown.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Redirect, Response};
use maud::{Markup, html};
use tapio_wire::program::units::human_bytes;
use tapio_wire::service::{Death, EntityRef, Event, Evidence, Finding, Limit, ListFindingsRequest};

use super::curve::{self, Note};
use super::frame::{self, PageHead};
use super::timeline::{self, Band, Mark};
use super::{Failure, Pages, commands, markdown, now_ns, or_nothing, parts, silences};
use crate::events::{self, Choice};
use crate::findings::{Certainty, LookupError, text};
use crate::query::why;
use crate::render;

/// Maximum number of other findings that are listed.
const OTHERS_MAX: usize = 8;
/// Events that are read to find changes and gaps, and curves.
const READ_MAX: u64 = 2_000;
const CURVES_MAX: u64 = 20;

/// What surrounds a finding, out of the archive.
#[derive(Default)]
pub struct Around {
    pub changes: Vec<Event>,
    gaps: Vec<Band>,
    curve: Option<Event>,
    /// What could not be read.
    pub missing: Vec<String>,
}

/// The page, or the Markdown of it.
pub async fn page(State(pages): State<Pages>, Path(name): Path<String>, headers: HeaderMap) -> Response {
    let (id, is_markdown) = match name.strip_suffix(".md") {
        Some(id) => (id, true),
        None => (name.as_str(), false),
    };
    let finding = match pages.store.get(id) {
        Ok(finding) => pages.silences.marked(finding),
        Err(error @ LookupError::NotFound(_)) => return Failure::not_found(error.to_string()).into_response(),
        Err(error) => return Failure::usage(error.to_string()).into_response(),
    };
    if finding.id != id {
        // Taken over by another, or the beginning of its id.
        let suffix = if is_markdown { ".md" } else { "" };
        return Redirect::to(&format!("/f/{}{suffix}", parts::encoded(&finding.id))).into_response();
    }
    let around = gather(&pages, &finding, &headers).await;
    if is_markdown {
        return markdown::response(&finding, &around, Certainty::of(&pages.patterns, &finding).as_ref());
    }
    let main = shown(&pages, &finding, &around);
    let place = PageHead { title: &finding.title, at: "", follows: &finding.id };
    frame::page(place, &main).into_response()
}

/// A moment of the node's clock since its boot, as nanoseconds since 1970.
fn since_1970(event: &Event, boottime_ns: u64) -> u64 {
    event.time_ns.saturating_sub(event.boottime_ns.saturating_sub(boottime_ns))
}

fn gap(event: &Event) -> Band {
    let detail = why::detail(event);
    let from_ns = since_1970(event, detail["from_ns"].as_u64().unwrap_or(event.boottime_ns));
    let until_ns = from_ns.saturating_add(detail["lasted_ns"].as_u64().unwrap_or(0));
    let (what, reason) = (why::field(&detail, "what"), why::field(&detail, "reason"));
    Band { from_ns, until_ns, why: format!("{what} not watched: {reason}") }
}

async fn gather(pages: &Pages, finding: &Finding, headers: &HeaderMap) -> Around {
    let none = EntityRef::default();
    let entity = finding.entity.as_ref().unwrap_or(&none);
    let (since_ns, until_ns) = (finding.started_ns, finding.ended_ns.saturating_add(why::AFTER_NS));
    let kinds = |names: &[&str]| events::kinds_named(names.iter().copied()).unwrap_or_default();
    let of_changes = Choice {
        since_ns: since_ns.saturating_sub(why::CHANGES_BEFORE_NS),
        until_ns: Some(until_ns),
        kinds: kinds(&[&why::CHANGE_KINDS[..], &["gap"][..]].concat()),
        limit: READ_MAX,
        newest: true,
        ..Choice::default()
    };
    let of_curve = Choice {
        since_ns: since_ns.saturating_sub(why::CHANGES_BEFORE_NS),
        until_ns: Some(until_ns),
        node: entity.node.clone(),
        entity: format!("{:016x}", entity.id),
        kinds: kinds(&["curve"]),
        limit: CURVES_MAX,
        newest: true,
        ..Choice::default()
    };
    let (changed, curves) = tokio::join!(pages.read(of_changes, headers), pages.read(of_curve, headers));
    let (gaps, mut changes): (Vec<_>, Vec<_>) = changed.events.into_iter().partition(|event| event.kind == "gap");
    changes.retain(|event| why::is_change(&why::Subject::default(), entity, event));
    changes.drain(..changes.len().saturating_sub(why::CHANGES_MAX));
    let is_here = |event: &&Event| event.entity.as_ref().is_some_and(|of| of.node == entity.node);
    let missing = changed.missing.into_iter().chain(curves.missing).collect();
    let mut around = Around {
        changes,
        gaps: gaps.iter().filter(is_here).map(gap).collect(),
        curve: curves.events.into_iter().next_back(),
        missing,
    };
    // Of what was lost only the number is known, not when.
    let loss = finding.loss.unwrap_or_default();
    if around.gaps.is_empty() && (loss.events > 0 || loss.open_interval) {
        let why = render::loss(finding.loss.as_ref());
        around.gaps.push(Band { from_ns: finding.started_ns, until_ns: finding.ended_ns, why });
    }
    around
}

/// The first cause, which offsets are counted from.
pub fn zero(finding: &Finding) -> u64 {
    finding.evidence.first().map_or(finding.started_ns, |piece| piece.time_ns)
}

fn shown(pages: &Pages, finding: &Finding, around: &Around) -> Markup {
    html! {
        article #finding data-fresh {
            (head(pages, finding))
            (or_nothing(finding.death.as_ref(), certificate))
            (times(finding, around))
            (or_nothing(around.curve.as_ref().and_then(|curve| curve::drawing(curve, &notes(finding, around))), |curve| html! {
                section { h2 { "Memory until then" } (curve) }
            }))
            (consequences(finding))
            (loss(finding, around))
            (advice(finding))
            (others(pages, finding))
        }
        (silences::of_finding(finding))
    }
}

fn head(pages: &Pages, finding: &Finding) -> Markup {
    let verdict = finding.death.as_ref().map_or("", |death| death.verdict.as_str());
    html! {
        header.finding-head {
            p { (parts::severity(&finding.severity)) " " (parts::standing(finding)) " " span.tag { (finding.pattern) } }
            h1 { (finding.title) }
            @if !verdict.is_empty() { p.verdict { (verdict) } }
            @if finding.summary != verdict { p { (finding.summary) } }
            (certainty(finding, Certainty::of(&pages.patterns, finding).as_ref()))
            p.quiet { (render::span(finding)) ", " (parts::ago(finding.ended_ns, now_ns())) }
            (or_nothing(finding.entity.as_ref(), place))
            @for sentence in render::held(finding) { p.notice { (sentence) } }
            p.actions {
                a href={ "/f/" (parts::encoded(&finding.id)) ".md" } { "Markdown for a postmortem" }
                " · id " code { (finding.id) }
            }
        }
    }
}

fn certainty(finding: &Finding, certainty: Option<&Certainty>) -> Markup {
    let sure = html! { strong { (render::percent(finding.confidence)) " sure" } };
    let lowered = certainty.map(|certainty| certainty.lowered.as_slice()).unwrap_or_default();
    html! {
        @if lowered.is_empty() && !finding.possible { p.sure { (sure) } }
        @else {
            details.sure open[finding.possible] {
                summary { (sure) " · what lowers it" }
                ul {
                    @if finding.possible { li { "Evidence that this needs was lost, or may have been: it is possible, not certain." } }
                    @for (why, minus) in lowered { li { "−" (render::percent(*minus)) ": " (why) } }
                }
                @if let Some(certainty) = certainty {
                    p.quiet { "With all evidence this pattern is " (render::percent(certainty.base)) " sure." }
                }
            }
        }
    }
}

/// Workload › pod › container › node.
fn place(entity: &EntityRef) -> Markup {
    let owner = parts::owner(entity);
    let named = |what: &str, name: &str| {
        html! { li { span.what { (what) } " " (name) } }
    };
    html! {
        nav.place aria-label="Where" {
            ol {
                (or_nothing(owner.as_ref(), |(path, called)| html! { li { a href=(path) { (called) } } }))
                @if !entity.pod.is_empty() && !entity.workload.is_empty() {
                    li { span.what { "pod" } " " a href=(parts::workload_path(&entity.namespace, &format!("Pod/{}", entity.pod))) { (entity.pod) } }
                }
                @if !entity.container.is_empty() { (named("container", &entity.container)) }
                @if owner.is_none() { (named("", &parts::called(entity))) }
                @if !entity.node.is_empty() {
                    li { span.what { "node" } " " a href={ "/n/" (parts::encoded(&entity.node)) } { (entity.node) } }
                }
            }
        }
        details {
            summary { "Its ids" }
            dl {
                @for (what, value) in [("image", &entity.image), ("container id", &entity.container_id),
                    ("pod uid", &entity.pod_uid), ("cgroup", &entity.cgroup)] {
                    @if !value.is_empty() { div { dt { (what) } dd { code { (value) } } } }
                }
            }
        }
    }
}

fn certificate(death: &Death) -> Markup {
    html! {
        section {
            h2 { "Death certificate" }
            dl.certificate {
                @for (what, value) in render::certificate_rows(death) {
                    @if what != "verdict" {
                        div.bad[what == "label" && death.label_agrees == Some(false)] { dt { (what) } dd { (value) } }
                    }
                }
            }
            (or_nothing(death.limit.as_ref(), limit))
        }
    }
}

/// Shows whose limit it is and how full it was, as a bar.
fn limit(limit: &Limit) -> Markup {
    const WIDTH: u64 = 600;
    if limit.limit_bytes == 0 {
        return html! {};
    }
    let used = (limit.usage_bytes as f64 / limit.limit_bytes as f64).clamp(0.0, 1.0);
    let said =
        format!("{} of {} used in {}", human_bytes(limit.usage_bytes), human_bytes(limit.limit_bytes), limit.cgroup);
    html! {
        figure.limit {
            svg viewBox={ "0 0 " (WIDTH) " 20" } role="img" aria-label=(said) preserveAspectRatio="none" {
                rect.free x="0" y="0" width=(WIDTH) height="20" {}
                rect.used.hit[limit.hit] x="0" y="0" width=(format!("{:.1}", used * WIDTH as f64)) height="20" {}
            }
            figcaption { (said) }
        }
    }
}

/// Everything that the timeline shows: evidence, changes before it, what it brought about. Each with its number below.
fn marks(finding: &Finding, around: &Around) -> Vec<Mark> {
    let causes = render::causes(&finding.evidence);
    let of_evidence = finding.evidence.iter().zip(causes).map(|(piece, cause)| Mark {
        time_ns: piece.time_ns,
        kind: piece.kind.clone(),
        text: parts::cut(&piece.text),
        path: parts::record_path(&piece.id, piece.time_ns),
        cause,
        is_aside: false,
        lane: timeline::lane_of(&piece.kind),
    });
    let of_changes = around.changes.iter().map(|event| Mark {
        time_ns: event.time_ns,
        kind: event.kind.clone(),
        text: parts::cut(&event.text),
        path: parts::record_path(&event.id, event.time_ns),
        cause: None,
        is_aside: true,
        lane: timeline::lane_of(&event.kind),
    });
    let anchor = finding.evidence.len().checked_sub(1);
    let of_consequences = finding.consequences.iter().map(|consequence| Mark {
        time_ns: consequence.started_ns,
        kind: consequence.pattern.clone(),
        text: parts::cut(&consequence.title),
        path: format!("/f/{}", parts::encoded(&consequence.id)),
        cause: anchor,
        is_aside: true,
        lane: timeline::LANES.len() - 1,
    });
    of_evidence.chain(of_changes).chain(of_consequences).collect()
}

fn times(finding: &Finding, around: &Around) -> Markup {
    let (zero, marks) = (zero(finding), marks(finding, around));
    let causes = render::causes(&finding.evidence);
    let first_aside = finding.evidence.len();
    html! {
        section {
            h2 { "Timeline" }
            p.quiet {
                "Counted from 1. A minus: it was stamped before. Offsets are drawn by their logarithm; each number opens its record."
                @if !around.gaps.is_empty() { " Hatched: something was lost or not watched." }
            }
            (timeline::drawing(zero, &marks, &around.gaps))
            ol.chain {
                @for (piece, cause) in finding.evidence.iter().zip(causes) { (evidence(piece, cause, zero)) }
            }
            @if !around.changes.is_empty() {
                h3 { "What changed before" }
                ol.chain start=(first_aside + 1) {
                    @for event in &around.changes {
                        li {
                            p {
                                a href=(parts::record_path(&event.id, event.time_ns)) { (render::offset(event.time_ns, zero)) }
                                " " span.step { (event.kind.replace('_', " ")) }
                                (or_nothing(event.entity.as_ref(), |entity| html! { " " (parts::cut(&entity.name)) }))
                            }
                            p { (parts::cut(&event.text)) }
                        }
                    }
                }
            }
            @for gap in &around.gaps { p.quiet { "Hatched: " (gap.why) } }
        }
    }
}

fn evidence(piece: &Evidence, cause: Option<usize>, zero: u64) -> Markup {
    html! {
        li {
            p {
                a href=(parts::record_path(&piece.id, piece.time_ns)) { (render::offset(piece.time_ns, zero)) }
                " " span.step { (piece.step) }
                (or_nothing(cause, |cause| html! { " " span.quiet { "brought about by " (cause + 1) } }))
            }
            p { (piece.text) }
        }
    }
}

/// What is marked in the memory curve.
fn notes(finding: &Finding, around: &Around) -> Vec<Note> {
    let died = finding.death.as_ref().map(|death| Note {
        time_ns: finding.ended_ns,
        text: format!("{} ended", text::process(&death.comm, death.pid)),
        is_death: true,
    });
    let changed = around.changes.iter().map(|event| Note {
        time_ns: event.time_ns,
        text: format!("{}: {}", event.kind.replace('_', " "), parts::cut(&event.text)),
        is_death: false,
    });
    changed.chain(died).collect()
}

fn consequences(finding: &Finding) -> Markup {
    let zero = finding.started_ns;
    html! {
        @if !finding.consequences.is_empty() {
            section {
                h2 { "What it brought about" }
                ul {
                    @for consequence in &finding.consequences {
                        li {
                            (render::offset(consequence.started_ns, zero)) " "
                            a href={ "/f/" (parts::encoded(&consequence.id)) } { (consequence.title) }
                        }
                    }
                }
            }
        }
    }
}

fn loss(finding: &Finding, around: &Around) -> Markup {
    html! {
        section {
            h2 { "Loss" }
            @if !finding.missing_servers.is_empty() {
                p { "Nothing was heard of " (finding.missing_servers.join(", ")) " when this was found." }
            }
            p { (render::loss(finding.loss.as_ref())) }
            @for missing in &around.missing { p.notice.bad { (missing) } }
        }
    }
}

fn advice(finding: &Finding) -> Markup {
    html! {
        section {
            h2 { "What to do" }
            @if !finding.advice.is_empty() { ol.advice { @for advice in &finding.advice { li { (advice) } } } }
            h3 { "Commands" }
            dl.commands {
                @for command in commands::of(finding) {
                    div { dt { (command.purpose) } dd { code data-copy { (command.line) } } }
                }
            }
        }
    }
}

/// Other findings of the same: of this pod or unit, and of other replicas.
fn others(pages: &Pages, finding: &Finding) -> Markup {
    let none = EntityRef::default();
    let entity = finding.entity.as_ref().unwrap_or(&none);
    let has_owner = parts::owner(entity).is_some();
    let mut request = ListFindingsRequest::default();
    match (has_owner, entity.workload.is_empty()) {
        (true, false) => {
            (request.namespace, request.workload) = (entity.namespace.clone(), entity.workload.clone());
        }
        (true, true) => request.pod = format!("{}/{}", entity.namespace, entity.pod),
        (false, _) => request.node = entity.node.clone(),
    }
    let found = pages.page(&request, usize::MAX).unwrap_or_default().findings;
    let is_other = |other: &Arc<Finding>| {
        let is_same =
            has_owner || other.entity.as_ref().is_some_and(|of| of.name == entity.name && of.kind == entity.kind);
        other.id != finding.id && is_same
    };
    let is_of_pod = |other: &Arc<Finding>| other.entity.as_ref().is_some_and(|of| of.pod == entity.pod);
    let (same, replicas): (Vec<_>, Vec<_>) = found.into_iter().filter(is_other).partition(is_of_pod);
    let now_ns = now_ns();
    let list = |title: &str, findings: &[Arc<Finding>]| {
        html! {
            @if !findings.is_empty() {
                section {
                    h2 { (title) }
                    (parts::finding_list(&findings[..findings.len().min(OTHERS_MAX)], now_ns, ""))
                    @if findings.len() > OTHERS_MAX {
                        p.more { (or_nothing(parts::owner(entity), |(path, called)| html! { a href=(path) { "All of " (called) } })) }
                    }
                }
            }
        }
    };
    html! {
        (list(if has_owner { "Earlier and later, the same pod" } else { "Earlier and later, the same" }, &same))
        (list("Other pods of this workload", &replicas))
    }
}
