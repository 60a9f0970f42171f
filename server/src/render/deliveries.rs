//! How each sink stands: `tapioctl deliveries`.

use std::fmt::Write as _;

use serde_json::{Value, json};
use tapio_wire::service::{DeliveryItem, DeliveryStatus, StatusResponse};

use super::layout::{Style, clean, table};
use super::time::{for_people, rfc3339};

/// Every sink on each server that has delivered, failed or given up something; on all servers where none has.
fn shown(status: &StatusResponse) -> Vec<&DeliveryStatus> {
    let has_worked = |sink: &&DeliveryStatus| {
        sink.delivered + sink.failed + sink.waiting > 0 || !sink.given_up.is_empty() || !sink.trouble.is_empty()
    };
    let working: Vec<&DeliveryStatus> = status.deliveries.iter().filter(has_worked).collect();
    let is_idle = |sink: &&DeliveryStatus| !working.iter().any(|other| other.sink == sink.sink);
    let mut shown: Vec<&DeliveryStatus> = status.deliveries.iter().filter(is_idle).collect();
    shown.extend(&working);
    shown.sort_by_key(|sink| (&sink.sink, &sink.server));
    shown
}

/// What waits, what failed last and why, and what was given up, of each sink.
pub fn deliveries(style: Style, status: &StatusResponse) -> String {
    if status.deliveries.is_empty() {
        return "Findings are delivered nowhere: `deliver` in server.yaml names no sink.\n".into();
    }
    let mut out = String::new();
    for sink in shown(status) {
        let server = if sink.server.is_empty() { String::new() } else { format!(" on {}", clean(&sink.server)) };
        let _ = writeln!(out, "{}{server}", style.bold(&clean(&sink.sink)));
        let last = if sink.delivered_ns == 0 { "never".into() } else { for_people(sink.delivered_ns) };
        let _ = writeln!(out, "  {} delivered, last {last} · {} lost", sink.delivered, sink.lost);
        if !sink.trouble.is_empty() {
            let _ = writeln!(out, "  {}: {}", style.bad("fails"), clean(&sink.trouble));
        }
        if let Some(failure) = &sink.failure {
            let (at, finding) = (for_people(failure.at_ns), clean(&failure.finding));
            let _ = writeln!(out, "  last failure {at}, finding {finding}: {}", clean(&failure.reason));
        }
        let _ = writeln!(out, "  {} waiting{}", sink.waiting, of_all(sink.queued.len(), sink.waiting));
        if !sink.queued.is_empty() {
            let rows: Vec<Vec<String>> =
                sink.queued.iter().map(|item| vec![clean(&item.finding), for_people(item.at_ns)]).collect();
            out.push_str(&table(style, &["FINDING", "PUBLISHED"], &[false; 2], &rows));
        }
        let _ = writeln!(out, "  {} given up since the start", sink.refused);
        if !sink.given_up.is_empty() {
            let row = |item: &DeliveryItem| {
                let revision = item.revision.to_string();
                // A mark of a version that kept no reason.
                let reason = if item.reason.is_empty() { "not recorded".into() } else { clean(&item.reason) };
                vec![clean(&item.finding), revision, for_people(item.at_ns), reason]
            };
            let rows: Vec<Vec<String>> = sink.given_up.iter().map(row).collect();
            let is_number = [false, true, false, false];
            out.push_str(&table(style, &["FINDING", "REVISION", "GIVEN UP", "WHY"], &is_number, &rows));
        }
    }
    out
}

fn of_all(named: usize, all: u64) -> String {
    // A server of a version that names none has none to show.
    if named > 0 && (named as u64) < all { format!(", the first {named} of them") } else { String::new() }
}

fn item(item: &DeliveryItem) -> Value {
    json!({
        "finding": item.finding,
        "revision": item.revision,
        "reason": item.reason,
        "at": rfc3339(item.at_ns),
    })
}

/// One sink, as the status has it too.
pub(super) fn delivery(delivery: &DeliveryStatus) -> Value {
    json!({
        "sink": delivery.sink,
        "server": delivery.server,
        "delivered": delivery.delivered,
        "repeated": delivery.repeated,
        "failed": delivery.failed,
        "refused": delivery.refused,
        "lost": delivery.lost,
        "waiting": delivery.waiting,
        "trouble": delivery.trouble,
        "delivered_at": (delivery.delivered_ns > 0).then(|| rfc3339(delivery.delivered_ns)),
        "queued": delivery.queued.iter().map(item).collect::<Vec<_>>(),
        "failure": delivery.failure.as_ref().map(item),
        "given_up": delivery.given_up.iter().map(item).collect::<Vec<_>>(),
    })
}

/// All sinks of all servers, an object each.
pub fn deliveries_values(status: &StatusResponse) -> Vec<Value> {
    status.deliveries.iter().map(delivery).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sink_says_what_waits_and_what_was_given_up() {
        let item = |finding: &str, reason: &str| DeliveryItem {
            finding: finding.into(),
            revision: 2,
            reason: reason.into(),
            at_ns: 1_700_000_000_000_000_000,
        };
        let sink = DeliveryStatus {
            sink: "otlp".into(),
            server: "server-0".into(),
            delivered: 7,
            refused: 1,
            waiting: 30,
            trouble: "\u{1b}[31maway".into(),
            queued: vec![item("a1", "")],
            failure: Some(item("a1", "connection refused")),
            given_up: vec![item("b2", "too\u{9b}2J old"), item("c3", "")],
            ..DeliveryStatus::default()
        };
        let follower = DeliveryStatus { sink: "otlp".into(), server: "server-1".into(), ..DeliveryStatus::default() };
        let status = StatusResponse { deliveries: vec![follower, sink], ..StatusResponse::default() };
        let text = deliveries(Style { colour: false }, &status);
        for wanted in [
            "otlp on server-0",
            "a1",
            "30 waiting, the first 1 of them",
            "connection refused",
            "too\u{fffd}2J old",
            "not recorded",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        assert!(!text.contains("server-1") && !text.contains(['\u{1b}', '\u{9b}']), "{text}");
        let values = deliveries_values(&status);
        assert_eq!(values[1]["given_up"][0]["reason"], "too\u{9b}2J old");
        let none = deliveries(Style { colour: false }, &StatusResponse::default());
        assert!(none.contains("delivered nowhere"), "{none}");
    }
}
