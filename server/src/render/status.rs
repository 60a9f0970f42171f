//! The server's status for people, with the ledger's equation for every source.

use std::collections::BTreeMap;
use std::fmt::Write;

use tapio_wire::program::units::{human_bytes, human_duration};
use tapio_wire::service::{NodeStatus, StatusResponse, Unanswered};

use super::layout::{Style, clean, table};
use super::time::for_people;
use crate::archive::elsewhere::{ElsewhereKind, IN_REMOTE, NOT_IN_REMOTE};
use crate::findings::text;

/// The status.
pub fn status(style: Style, status: &StatusResponse) -> String {
    let mut out = String::new();
    let readiness = if status.ready {
        style.good("ready")
    } else {
        style.bad(&format!("not ready: {}", clean(&status.not_ready_reason)))
    };
    let _ = writeln!(
        out,
        "{} {readiness} · version {} · up {}",
        style.bold("tapio-server"),
        clean(&status.revision),
        human_duration(status.uptime_ns)
    );
    let _ = writeln!(
        out,
        "{} correlated · {}",
        text::count(status.events_correlated, "event"),
        text::count(status.findings, "finding")
    );
    servers(style, &mut out, status);
    deliveries(style, &mut out, status);
    nodes(style, &mut out, status);
    ledger(style, &mut out, status);
    if let Some(archive) = &status.archive {
        let _ = writeln!(out, "\n{}", style.bold("Archive"));
        let _ = writeln!(
            out,
            "  {} in {} by {} · {} · {}, {} of them lethal · {} · {} quarantined",
            human_bytes(archive.bytes),
            text::count(archive.segments, "segment"),
            clean(&archive.disk),
            text::count(archive.frames, "frame"),
            text::count(archive.events, "event"),
            archive.lethal_events,
            text::count(archive.duplicates, "duplicate"),
            archive.quarantined
        );
    }
    if !status.shards.is_empty() {
        let _ = writeln!(out, "\n{}", style.bold("Correlation"));
        let rows: Vec<_> = status
            .shards
            .iter()
            .map(|shard| {
                vec![
                    shard.shard.to_string(),
                    if shard.core < 0 { "any".into() } else { shard.core.to_string() },
                    shard.events.to_string(),
                    shard.entities.to_string(),
                    shard.evicted.to_string(),
                ]
            })
            .collect();
        out.push_str(&table(style, &["SHARD", "CORE", "EVENTS", "ENTITIES", "EVICTED"], &[true; 5], &rows));
    }
    out
}

fn nodes(style: Style, out: &mut String, status: &StatusResponse) {
    let _ = writeln!(out, "\n{}", style.bold("Nodes"));
    if status.nodes.is_empty() {
        out.push_str("  none: no collector has connected yet\n");
        return;
    }
    let mut rows = Vec::new();
    for node in &status.nodes {
        for epoch in &node.epochs {
            rows.push(vec![
                clean(&where_of(node)),
                if node.connected { "connected".into() } else { "gone".into() },
                format!("{:x}", epoch.epoch),
                clean(&epoch.state),
                epoch.durable_seq.to_string(),
                if epoch.last_frame_ns == 0 { "-".into() } else { for_people(epoch.last_frame_ns) },
            ]);
        }
        if node.epochs.is_empty() {
            let state = if node.connected { "connected" } else { "gone" };
            let blank = || "-".to_owned();
            rows.push(vec![clean(&where_of(node)), state.into(), blank(), "0 events".into(), blank(), blank()]);
        }
    }
    out.push_str(&table(
        style,
        &["NODE", "COLLECTOR", "EPOCH", "STATE", "DURABLE SEQ", "LAST FRAME"],
        &[false, false, false, false, true, false],
        &rows,
    ));
    not_watched(style, out, status);
}

/// Names of nodes in one line.
const NAMES_MAX: usize = 8;

/// What collectors do not watch, and why: those that lack the same for the same reason together.
pub fn unwatched(status: &StatusResponse) -> Vec<(String, String)> {
    let mut lacking: BTreeMap<(&str, &str), Vec<String>> = BTreeMap::new();
    for node in status.nodes.iter().filter(|node| node.connected) {
        for off in &node.off {
            lacking.entry((&off.source, &off.reason)).or_default().push(clean(&where_of(node)));
        }
    }
    let of_all = lacking.into_iter().map(|((source, reason), nodes)| {
        let more = match nodes.len().saturating_sub(NAMES_MAX) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let named: Vec<_> = nodes.into_iter().take(NAMES_MAX).collect();
        (format!("{} on {}{more}", clean(source), named.join(", ")), clean(reason))
    });
    of_all.collect()
}

fn not_watched(style: Style, out: &mut String, status: &StatusResponse) {
    for (what, reason) in unwatched(status) {
        let _ = writeln!(out, "  {}: {reason}", style.bad(&format!("not watched: {what}")));
    }
}

/// A node, and the server that has this part of it where there are several.
pub fn where_of(node: &NodeStatus) -> String {
    if node.server.is_empty() { node.node.clone() } else { format!("{} at {}", node.node, node.server) }
}

fn servers(style: Style, out: &mut String, status: &StatusResponse) {
    if status.servers.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{}", style.bold("Servers"));
    let own = "this one".to_owned();
    let rows: Vec<_> = status
        .servers
        .iter()
        .map(|server| {
            let address = if server.address.is_empty() { own.clone() } else { clean(&server.address) };
            let state = match (server.ready, server.alone, server.leads) {
                (false, ..) => "not ready",
                (true, true, _) => "alone: the servers' log is away",
                (true, false, true) => "ready, leads",
                (true, false, false) => "ready",
            };
            vec![clean(&server.server), address, state.into(), server.findings.to_string(), clean(&server.revision)]
        })
        .collect();
    out.push_str(&table(
        style,
        &["SERVER", "ADDRESS", "STATE", "FINDINGS", "VERSION"],
        &[false, false, false, true, false],
        &rows,
    ));
    for server in &status.servers {
        let name = clean(&server.server);
        if server.healing_ns > 0 {
            let lasted = server.healing_ns as f64 / 1e9;
            let text =
                format!("{name} has been sending what the servers' log had lost from its archive for {lasted:.1} s");
            let _ = writeln!(out, "  {}", style.bad(&text));
        }
        if !server.log_trouble.is_empty() {
            let text = format!("{name} cannot use the servers' log: {}", clean(&server.log_trouble));
            let _ = writeln!(out, "  {}", style.bad(&text));
        }
    }
    if let Some(short_ns) = status.servers.iter().map(|server| server.log_short_ns).max().filter(|ns| *ns > 0) {
        let text = format!(
            "the servers' log is full and lacks {} of what a restarted server reads, so that it may report other findings: \
             raise cluster.max_bytes and NATS's room",
            human_duration(short_ns)
        );
        let _ = writeln!(out, "  {}", style.bad(&text));
    }
    for missing in &status.incomplete {
        let _ = writeln!(out, "  {}", style.bad(&lacking(status, missing)));
    }
}

/// Whose part is missing, and why. The trouble with the log of a server that answered is printed above.
fn lacking(status: &StatusResponse, missing: &Unanswered) -> String {
    let name = clean(&missing.server);
    match status.servers.iter().find(|server| server.server == missing.server) {
        Some(answered) => {
            let said = format!("; {}", answered.log_trouble);
            format!("{name}: {}", clean(missing.reason.strip_suffix(&said).unwrap_or(&missing.reason)))
        }
        // What is known without asking it.
        None if missing.since_ns == 0 => format!("{name}: {}", clean(&missing.reason)),
        None => format!("no answer from {name}: {}", clean(&missing.reason)),
    }
}

fn deliveries(style: Style, out: &mut String, status: &StatusResponse) {
    if status.deliveries.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{}", style.bold("Deliveries"));
    let rows: Vec<_> = status
        .deliveries
        .iter()
        .map(|sink| {
            let counts = [sink.delivered, sink.repeated, sink.failed, sink.refused, sink.lost, sink.waiting];
            let last = if sink.delivered_ns == 0 { "-".into() } else { for_people(sink.delivered_ns) };
            let mut row = vec![clean(&sink.sink), clean(&sink.server)];
            row.extend(counts.map(|count| count.to_string()));
            row.push(last);
            row
        })
        .collect();
    let headings = ["SINK", "SERVER", "DELIVERED", "REPEATED", "FAILED", "REFUSED", "LOST", "WAITING", "LAST"];
    let is_number = [false, false, true, true, true, true, true, true, false];
    out.push_str(&table(style, &headings, &is_number, &rows));
    for sink in status.deliveries.iter().filter(|sink| !sink.trouble.is_empty()) {
        let _ = writeln!(out, "  {}: {}", style.bad(&format!("{} fails", clean(&sink.sink))), clean(&sink.trouble));
    }
}

/// The column of the events that are elsewhere, which is there when there are some.
const ELSEWHERE_AT: usize = 11;
/// What is known of who has them.
const ELSEWHERE: [(ElsewhereKind, &str); 2] = [
    (
        ElsewhereKind::AnotherServer,
        "another_server: another server has them, or this archive was restored from a backup",
    ),
    (
        ElsewhereKind::EmptyArchive,
        "empty_archive: the archive was empty at the start. The server is new, and another one has them, or its disk was emptied",
    ),
];

/// The ledger alone.
pub fn ledger_text(style: Style, status: &StatusResponse) -> String {
    let mut out = String::new();
    ledger(style, &mut out, status);
    out.trim_start().to_owned()
}

/// A row for each source of each epoch.
fn ledger_rows(status: &StatusResponse, shows_elsewhere: bool) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for node in &status.nodes {
        for epoch in &node.epochs {
            for source in &epoch.sources {
                let dropped: u64 = source.dropped.iter().map(|loss| loss.events).sum();
                let why: Vec<_> = source
                    .dropped
                    .iter()
                    .map(|loss| format!("{}/{} {}", clean(&loss.stage), clean(&loss.reason), loss.events))
                    .collect();
                let mut row = vec![
                    clean(&where_of(node)),
                    format!("{:x}", epoch.epoch),
                    clean(&source.source),
                    source.emitted.to_string(),
                    "=".into(),
                    source.archived.to_string(),
                    "+".into(),
                    dropped.to_string(),
                    "+".into(),
                    source.held.to_string(),
                    source.unexplained.to_string(),
                    why.join(", "),
                ];
                if shows_elsewhere {
                    row.insert(ELSEWHERE_AT, source.elsewhere.to_string());
                }
                rows.push(row);
            }
        }
    }
    rows
}

/// The ledger of all nodes.
pub struct Ledger {
    /// Headings, and whether what is below them is a number.
    pub headings: Vec<(&'static str, bool)>,
    /// A row for each source of each epoch.
    pub rows: Vec<Vec<String>>,
    /// Whether it closes, in a sentence.
    pub sum: String,
    pub closes: bool,
    pub remarks: Vec<String>,
}

/// What the ledger of a status says.
pub fn ledger_of(status: &StatusResponse) -> Ledger {
    let all = || status.nodes.iter().flat_map(|node| &node.epochs).flat_map(|epoch| &epoch.sources);
    let elsewhere = all().fold(0_u64, |sum, source| sum.saturating_add(source.elsewhere));
    let mut headings = vec![
        ("NODE", false),
        ("EPOCH", false),
        ("SOURCE", false),
        ("EMITTED", true),
        ("", false),
        ("ARCHIVED", true),
        ("", false),
        ("DROPPED", true),
        ("", false),
        ("HELD", true),
        ("UNEXPLAINED", true),
        ("DROPPED AT", false),
    ];
    if elsewhere > 0 {
        headings.insert(ELSEWHERE_AT, ("ELSEWHERE", true));
    }
    let sum = match status.unexplained_events {
        0 => "The ledger closes: no event is unexplained.".to_owned(),
        1 => "The ledger does not close: 1 event is unexplained.".to_owned(),
        events => format!("The ledger does not close: {events} events are unexplained."),
    };
    let mut remarks = Vec::new();
    if elsewhere > 0 {
        remarks.push(format!(
            "{elsewhere} events were acknowledged elsewhere: they are not in this archive, nor in EMITTED."
        ));
    }
    for (kind, text) in ELSEWHERE {
        let events = status.elsewhere.iter().filter(|count| count.kind == kind.name());
        let events = events.fold(0_u64, |sum, count| sum.saturating_add(count.events));
        if events > 0 {
            remarks.push(format!("  {events} since the start, {text}"));
        }
    }
    for (kind, text) in
        [(IN_REMOTE, "archive.remote has"), (NOT_IN_REMOTE, "archive.remote lacks: one disk alone has, or had, them")]
    {
        let events: u64 = status.elsewhere.iter().filter(|count| count.kind == kind).map(|count| count.events).sum();
        if events > 0 {
            remarks.push(format!("  {events} of them {text}"));
        }
    }
    let rows = ledger_rows(status, elsewhere > 0);
    Ledger { headings, rows, sum, closes: status.unexplained_events == 0, remarks }
}

fn ledger(style: Style, out: &mut String, status: &StatusResponse) {
    let _ = writeln!(
        out,
        "\n{}  {}",
        style.bold("Ledger"),
        style.dim("emitted = archived + dropped + held, for every source")
    );
    let Ledger { headings, rows, sum, closes, remarks } = ledger_of(status);
    if rows.is_empty() {
        out.push_str("  nothing was emitted yet\n");
    } else {
        let (names, is_number): (Vec<_>, Vec<_>) = headings.into_iter().unzip();
        out.push_str(&table(style, &names, &is_number, &rows));
    }
    let _ = writeln!(out, "  {}", if closes { style.good(&sum) } else { style.bad(&sum) });
    for remark in remarks {
        let _ = writeln!(out, "  {remark}");
    }
}
