//! What is not known: servers that do not answer, collectors that are gone, sources that are off, events that were lost.

use maud::{Markup, html};
use tapio_wire::service::{NodeStatus, StatusResponse, Unanswered};

use super::parts;
use crate::findings::text;
use crate::render;

/// Lines that are shown of each kind.
const LINES_MAX: usize = 10;

/// Something that is not known.
struct Gap {
    /// True if it may hide a death: the page shows it first.
    is_grave: bool,
    text: String,
    path: Option<String>,
}

/// Events that a node's collector gave up, by where and why.
fn lost_on(node: &NodeStatus) -> Option<String> {
    let mut lost: Vec<(String, u64)> = Vec::new();
    for loss in node.epochs.iter().flat_map(|epoch| &epoch.sources).flat_map(|source| &source.dropped) {
        let at = format!("{}/{}", loss.stage, loss.reason);
        match lost.iter_mut().find(|(known, _)| *known == at) {
            Some((_, events)) => *events += loss.events,
            None => lost.push((at, loss.events)),
        }
    }
    lost.retain(|(_, events)| *events > 0);
    let sum: u64 = lost.iter().map(|(_, events)| events).sum();
    let why: Vec<_> = lost.iter().map(|(at, events)| format!("{at} {events}")).collect();
    (sum > 0).then(|| format!("{} lost on {}: {}", text::count(sum, "event"), render::where_of(node), why.join(", ")))
}

/// A node has a part on each server that it shipped to.
fn collectors(status: &StatusResponse) -> u64 {
    status.nodes.iter().map(|node| &node.node).collect::<std::collections::HashSet<_>>().len() as u64
}

fn last_frame_ns(node: &NodeStatus) -> u64 {
    node.epochs.iter().map(|epoch| epoch.last_frame_ns).max().unwrap_or(0)
}

/// Whether a collector that was here ships to another server now: each server has its own part of a node's status.
fn is_known_later(nodes: &[NodeStatus], node: &NodeStatus) -> bool {
    let others = nodes.iter().filter(|other| other.node == node.node && other.server != node.server);
    others.into_iter().any(|other| other.connected || last_frame_ns(other) > last_frame_ns(node))
}

fn gone(node: &NodeStatus, now_ns: u64) -> Option<String> {
    if node.connected || node.epochs.is_empty() {
        return None;
    }
    let last = node.epochs.iter().max_by_key(|epoch| epoch.last_frame_ns)?;
    let how = if last.state == "closed" { "ended" } else { "is gone" };
    let since = match last.last_frame_ns {
        0 => "it was never heard".to_owned(),
        at_ns => format!("last heard {}, {}", render::for_people(at_ns), parts::ago(at_ns, now_ns)),
    };
    Some(format!("The collector of {} {how}: {since}. Nothing is watched there.", render::where_of(node)))
}

fn gaps(status: Option<&StatusResponse>, unheard: &[Unanswered], now_ns: u64) -> Vec<Gap> {
    let grave = |text: String| Gap { is_grave: true, text, path: None };
    let mut gaps: Vec<_> = unheard.iter().map(|missing| grave(parts::unanswered(missing))).collect();
    let Some(status) = status else {
        gaps.push(grave("The server is starting: its archive is being opened.".into()));
        return gaps;
    };
    if !status.ready {
        gaps.push(grave(format!("The server is not ready: {}", status.not_ready_reason)));
    }
    // Those that answered nothing when they were asked for their status.
    let others = status.incomplete.iter().filter(|missing| !unheard.iter().any(|known| known.server == missing.server));
    gaps.extend(others.map(|missing| grave(parts::unanswered(missing))));
    if status.nodes.is_empty() {
        gaps.push(grave("No collector has connected to this server yet.".into()));
    }
    let path = |node: &NodeStatus| Some(format!("/n/{}", parts::encoded(&node.node)));
    for node in status.nodes.iter().filter(|node| !is_known_later(&status.nodes, node)) {
        gaps.extend(gone(node, now_ns).map(|text| Gap { is_grave: true, text, path: path(node) }));
    }
    if status.unexplained_events != 0 {
        let text = render::ledger_of(status).sum;
        gaps.push(Gap { is_grave: true, text, path: Some("/ledger".into()) });
    }
    for node in &status.nodes {
        gaps.extend(lost_on(node).map(|text| Gap { is_grave: false, text, path: Some("/ledger".into()) }));
    }
    for (what, reason) in render::unwatched(status) {
        gaps.push(Gap { is_grave: false, text: format!("Not watched: {what}: {reason}"), path: None });
    }
    gaps
}

/// What is not known, for the top of a page.
pub fn notice(status: Option<&StatusResponse>, unheard: &[Unanswered], now_ns: u64) -> Markup {
    let gaps = gaps(status, unheard, now_ns);
    let (grave, light): (Vec<_>, Vec<_>) = gaps.into_iter().partition(|gap| gap.is_grave);
    let list = |gaps: &[Gap]| {
        html! {
            ul {
                @for gap in gaps.iter().take(LINES_MAX) {
                    li {
                        @if let Some(path) = &gap.path { a href=(path) { (gap.text) } } @else { (gap.text) }
                    }
                }
                @if gaps.len() > LINES_MAX { li { "and " (gaps.len() - LINES_MAX) " more: " a href="/ledger" { "the ledger" } } }
            }
        }
    };
    html! {
        @if grave.is_empty() && light.is_empty() {
            p.notice.good {
                "Nothing is missing: "
                (text::count(status.map_or(0, collectors), "collector")) " watched, no event lost."
            }
        }
        @if !grave.is_empty() {
            section.notice.bad aria-label="What is not known" { h2 { "Not known" } (list(&grave)) }
        }
        @if !light.is_empty() {
            details.notice { summary { (text::count(light.len() as u64, "gap")) " in what is watched" } (list(&light)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use tapio_wire::service::{EpochStatus, LossCount, SourceLedger};

    use super::*;

    fn node(name: &str, connected: bool, lost: u64) -> NodeStatus {
        let dropped = vec![LossCount { stage: "ring".into(), reason: "full".into(), events: lost }];
        let sources = vec![SourceLedger { dropped, ..SourceLedger::default() }];
        let epochs = vec![EpochStatus { sources, last_frame_ns: 7, state: "open".into(), ..EpochStatus::default() }];
        NodeStatus { node: name.into(), connected, epochs, ..NodeStatus::default() }
    }

    fn shown(nodes: Vec<NodeStatus>, unheard: &[Unanswered]) -> String {
        let status = StatusResponse { ready: true, nodes, ..StatusResponse::default() };
        notice(Some(&status), unheard, 9).into_string()
    }

    #[test]
    fn a_collector_that_ships_to_another_server_is_not_gone() {
        let of = |server: &str, connected: bool| NodeStatus { server: server.into(), ..node("n1", connected, 0) };
        let moved = shown(vec![of("a", false), of("b", true)], &[]);
        assert!(moved.contains("1 collector watched") && !moved.contains("gone"), "{moved}");
        assert!(shown(vec![of("a", false), of("b", false)], &[]).contains("gone"));
    }

    #[test]
    fn silent_servers_gone_collectors_and_losses_are_named() {
        let silent = Unanswered { server: "s2".into(), reason: "it has said nothing".into(), ..Unanswered::default() };
        let text = shown(vec![node("n1", true, 7), node("n2<b>", false, 0)], &[silent]);
        for part in [
            "Server s2: it has said nothing",
            "7 events lost on n1: ring/full 7",
            "The collector of n2&lt;b&gt; is gone",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(shown(vec![node("n1", true, 0)], &[]).contains("Nothing is missing: 1 collector watched"));
        assert!(shown(Vec::new(), &[]).contains("No collector has connected"));
        assert!(notice(None, &[], 9).into_string().contains("being opened"));
    }
}
