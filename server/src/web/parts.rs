//! Pieces that several pages share: addresses, moments, rows of findings and of events, bars of deaths by hour.

use std::fmt::Write;
use std::sync::Arc;

use maud::{Markup, html};
use tapio_wire::program::units::human_duration;
use tapio_wire::service::{EntityRef, Event, Finding, Unanswered};

use super::or_nothing;
use crate::findings::text;
use crate::render;

const SECOND_NS: u64 = 1_000_000_000;
const HOUR_NS: u64 = 3600 * SECOND_NS;
/// Bars of a sparkline.
pub const HOURS: usize = 24;
/// Characters of a text from a node in a row, and of a name.
const TEXT_MAX: usize = 400;

/// A text as one part of an address.
pub fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b':' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// `/w/shop/Deployment/web`, `/w/shop/Pod/web-0`: the page of what an entity belongs to, and what that is called.
pub fn owner(entity: &EntityRef) -> Option<(String, String)> {
    let (namespace, pod) = (entity.namespace.as_str(), entity.pod.as_str());
    if namespace.is_empty() {
        return None;
    }
    let owner = match (entity.workload.as_str(), pod) {
        ("", "") => return None,
        ("", pod) => format!("Pod/{pod}"),
        (workload, _) => workload.to_owned(),
    };
    Some((workload_path(namespace, &owner), format!("{namespace} › {owner}")))
}

/// The page of a workload, `Deployment/web`, or of a pod, `Pod/web-0`.
pub fn workload_path(namespace: &str, workload: &str) -> String {
    let parts: Vec<_> = workload.split('/').map(encoded).collect();
    format!("/w/{}/{}", encoded(namespace), parts.join("/"))
}

/// What an entity is called where Kubernetes says nothing of it: `unit nginx.service`.
pub fn called(entity: &EntityRef) -> String {
    match entity.name.strip_prefix(entity.kind.as_str()).is_some_and(|rest| rest.starts_with(' ')) {
        true => entity.name.clone(),
        false => format!("{} {}", text::kind_called(&entity.kind), entity.name),
    }
}

/// Cuts a text to what a row has space for.
pub fn cut(text: &str) -> String {
    match text.char_indices().nth(TEXT_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// `4 min ago`
pub fn ago(at_ns: u64, now_ns: u64) -> String {
    let Some(since) = now_ns.checked_sub(at_ns) else { return "now".into() };
    // Decimals say nothing here.
    let text = human_duration((since / SECOND_NS).max(1) * SECOND_NS).replace(".0 ", " ");
    let rough: Vec<_> = text.split(' ').take(2).collect();
    format!("{} ago", rough.join(" "))
}

/// A moment, and how long ago it was.
pub fn moment(at_ns: u64, now_ns: u64) -> Markup {
    html! {
        time datetime=(render::rfc3339(at_ns)) title=(render::for_people(at_ns)) {
            (render::for_people(at_ns)[..19]) " " span.quiet { (ago(at_ns, now_ns)) }
        }
    }
}

/// A severity, by its name and colour.
pub fn severity(name: &str) -> Markup {
    let class = match name {
        "critical" | "high" | "medium" | "low" => name,
        _ => "info",
    };
    html! { span.severity.(class) { (name) } }
}

/// What became of a finding.
pub fn standing(finding: &Finding) -> Markup {
    html! {
        @if finding.withdrawn { span.tag { (render::withdrawal(finding).trim()) } }
        @else if finding.ongoing { span.tag.on { "goes on" } }
        @else if finding.resolved_ns > 0 {
            span.tag { "over after " (human_duration(finding.resolved_ns.saturating_sub(finding.started_ns))) }
        }
        @if finding.count > 1 { " " span.tag { (finding.count) "×" } }
        @if finding.silence.is_some() { " " span.tag { "silenced" } }
        @if finding.acknowledged.is_some() { " " span.tag { "acknowledged" } }
    }
}

/// A finding in a list.
pub fn finding_item(finding: &Finding, now_ns: u64) -> Markup {
    let entity = finding.entity.as_ref();
    html! {
        li.finding data-id=(finding.id) {
            (severity(&finding.severity))
            div {
                a.title href={ "/f/" (encoded(&finding.id)) } { (cut(&finding.title)) } " " (standing(finding))
                p.quiet {
                    (moment(finding.ended_ns, now_ns)) " · " (render::percent(finding.confidence)) " sure · " (finding.pattern)
                    (or_nothing(entity.and_then(render::pod), |pod| html! { " · pod " (pod) }))
                    (or_nothing(entity.filter(|entity| !entity.node.is_empty()), |entity| html! {
                        " · node " a href={ "/n/" (encoded(&entity.node)) } { (entity.node) }
                    }))
                }
            }
        }
    }
}

/// Findings in a list; a sentence where there are none.
pub fn finding_list(findings: &[Arc<Finding>], now_ns: u64, none: &str) -> Markup {
    html! {
        @if findings.is_empty() { p.quiet { (none) } }
        @else { ol.findings { @for finding in findings { (finding_item(finding, now_ns)) } } }
    }
}

/// The page of an event's raw record.
pub fn record_path(id: &str, time_ns: u64) -> String {
    format!("/e/{}?at={time_ns}", encoded(id))
}

/// Events, one a row; each opens its raw record.
pub fn event_table(caption: &str, events: &[Event]) -> Markup {
    html! {
        div.wide tabindex="0" role="region" aria-label=(caption) {
            table {
                caption { (caption) }
                thead { tr { th scope="col" { "Time" } th scope="col" { "Kind" } th scope="col" { "Of" } th scope="col" { "What" } } }
                tbody {
                    @for event in events {
                        tr {
                            td.time { a href=(record_path(&event.id, event.time_ns)) { (render::for_people(event.time_ns)[..23]) } }
                            td { (event.kind.replace('_', " ")) }
                            td.name { (or_nothing(event.entity.as_ref(), |entity| html! { (cut(&entity.name)) })) }
                            td.text { (cut(&event.text)) }
                        }
                    }
                }
            }
        }
    }
}

/// Says in a sentence whose part is missing.
pub fn unanswered(missing: &Unanswered) -> String {
    let who = match missing.server.as_str() {
        "" => String::new(),
        server => format!("Server {server}: "),
    };
    let nodes = match missing.nodes.is_empty() {
        true => String::new(),
        false => format!(" (nodes {})", missing.nodes.join(", ")),
    };
    format!("{who}{}{nodes}", missing.reason)
}

/// Deaths in each of the last hours, the oldest first.
pub fn deaths_by_hour<'a>(findings: impl IntoIterator<Item = &'a Arc<Finding>>, now_ns: u64) -> [u64; HOURS] {
    let mut hours = [0; HOURS];
    for finding in findings {
        let past = (now_ns.saturating_sub(finding.ended_ns) / HOUR_NS) as usize;
        if finding.death.is_some() && past < HOURS {
            hours[HOURS - 1 - past] += u64::from(finding.count.max(1));
        }
    }
    hours
}

/// Bars of deaths by hour. Nothing where nobody died.
pub fn sparkline(hours: &[u64; HOURS], is_large: bool) -> Markup {
    let (sum, most) = (hours.iter().sum::<u64>(), hours.iter().copied().max().unwrap_or(0));
    if sum == 0 {
        return html! {};
    }
    let latest = hours[HOURS - 1];
    let said = format!(
        "{} in the last {HOURS} hours, at most {most} in one hour, {latest} in the last one",
        text::count(sum, "death")
    );
    let (step, height) = if is_large { (12, 48) } else { (4, 16) };
    let mut bars = String::new();
    for (hour, &deaths) in hours.iter().enumerate().filter(|(_, deaths)| **deaths > 0) {
        let tall = (deaths * height).div_ceil(most).max(2);
        let (x, width) = (hour * step, step - 1);
        let _ = write!(bars, "M{x} {height}v-{tall}h{width}v{tall}z");
    }
    let width = HOURS * step;
    html! {
        figure.spark.large[is_large] {
            svg viewBox={ "0 0 " (width) " " (height + 1) } width=(width) height=(height + 1) role="img" aria-label=(said) {
                path.base d={ "M0 " (height) ".5H" (width) } {}
                path.bars d=(bars) {}
            }
            @if is_large { figcaption { (said) "." } }
        }
    }
}

#[cfg(test)]
mod tests {
    use tapio_wire::service::Death;

    use super::*;

    #[test]
    fn deaths_are_counted_in_the_hour_of_their_end() {
        let now = 100 * HOUR_NS;
        let died = |ended_ns: u64, count: u32| {
            Arc::new(Finding { ended_ns, count, death: Some(Death::default()), ..Finding::default() })
        };
        let lives = Arc::new(Finding { ended_ns: now, ..Finding::default() });
        let found = [died(now, 1), died(now - HOUR_NS, 3), died(now - 24 * HOUR_NS, 9), died(now + 5, 1), lives];
        let hours = deaths_by_hour(&found, now);
        assert_eq!((hours[23], hours[22], hours.iter().sum::<u64>()), (2, 3, 5));
        let shown = sparkline(&hours, true).into_string();
        assert!(shown.contains("5 deaths in the last 24 hours, at most 3 in one hour, 2 in the last one"), "{shown}");
        assert_eq!(sparkline(&[0; HOURS], true).into_string(), "");
    }

    #[test]
    fn addresses_hold_any_name() {
        assert_eq!(encoded("a b/ü?\"<&"), "a%20b%2F%C3%BC%3F%22%3C%26");
        assert_eq!(workload_path("shop", "Deployment/web"), "/w/shop/Deployment/web");
    }

    #[test]
    fn times_ago_are_rough() {
        let minute = 60 * 1_000_000_000;
        assert_eq!(ago(0, 5 * minute + 7_000_000_000), "5 min ago");
        assert_eq!((ago(9, 4).as_str(), ago(0, 103_700_000_000).as_str()), ("now", "103 s ago"));
    }
}
