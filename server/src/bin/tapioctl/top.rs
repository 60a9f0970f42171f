//! `tapioctl top`: how many events a second, by node, kind and entity.
//!
//! Nodes and kinds are counted by the server. Entities are estimated from a sample of the newest events.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};
use tapio_server::findings::text;
use tapio_server::render::{self, Style};
use tapio_wire::service::{ListEventsRequest, StatusResponse};

use super::output::print;
use super::server::{Client, Failure, ServerAt, connect, status};
use super::{Printing, events, now_ns};

/// Newest events that are looked at for the entities.
const SAMPLE_EVENTS: u32 = 5000;
const SAMPLE_NS: u64 = 10_000_000_000;
/// Moves the cursor to the upper left and clears from there (ECMA-48).
const HOME_AND_CLEAR: &str = "\x1b[H\x1b[2J";

#[derive(Args)]
pub struct Arguments {
    /// Measure once and exit, for scripts
    #[arg(long)]
    once: bool,
    /// Time between two measurements
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = tapio_wire::program::units::parse_duration)]
    interval: Duration,
    /// Rows of each table
    #[arg(long, default_value_t = 10)]
    rows: usize,
}

struct Row {
    name: String,
    per_second: f64,
    total: Option<u64>,
}

struct Rates {
    nodes: Vec<Row>,
    kinds: Vec<Row>,
    /// Shares of the sample, in events a second.
    entities: Vec<Row>,
}

/// Runs `tapioctl top`.
pub async fn run(server: &ServerAt, printing: Printing, arguments: &Arguments) -> Result<(), Failure> {
    let mut client = connect(server, true).await?;
    let interval = arguments.interval.clamp(Duration::from_millis(100), Duration::from_secs(3600));
    let mut before = (Instant::now(), status(&mut client, server).await?);
    loop {
        tokio::time::sleep(interval).await;
        server.ask_anew();
        let now = (Instant::now(), status(&mut client, server).await?);
        let rates = measure(&mut client, server, &before, &now, arguments.rows).await?;
        let text = match printing.format.one(&value(&rates)) {
            Some(text) => text,
            None => tables(printing.style, &rates, &now.1),
        };
        // Nothing but a terminal can be cleared.
        let is_redrawn = !arguments.once && printing.format.is_table() && io::stdout().is_terminal();
        let clear = if is_redrawn { HOME_AND_CLEAR } else { "" };
        print(&format!("{clear}{text}"))?;
        if arguments.once {
            return Ok(());
        }
        before = now;
    }
}

fn archived(status: &StatusResponse) -> HashMap<String, u64> {
    let mut archived: HashMap<String, u64> = HashMap::new();
    // Several servers may have a part of a node.
    for node in &status.nodes {
        let sources = node.epochs.iter().flat_map(|epoch| &epoch.sources);
        *archived.entry(node.node.clone()).or_default() += sources.map(|source| source.archived).sum::<u64>();
    }
    archived
}

fn rates(before: &HashMap<String, u64>, now: HashMap<String, u64>, seconds: f64, rows: usize) -> Vec<Row> {
    let rate = |(name, total): (String, u64)| {
        let more = total.saturating_sub(before.get(&name).copied().unwrap_or(0));
        Row { name, per_second: more as f64 / seconds, total: Some(total) }
    };
    let mut rates: Vec<_> = now.into_iter().map(rate).collect();
    rates.sort_by(|a, b| b.per_second.total_cmp(&a.per_second).then_with(|| a.name.cmp(&b.name)));
    rates.truncate(rows);
    rates
}

async fn measure(
    client: &mut Client,
    server: &ServerAt,
    before: &(Instant, StatusResponse),
    now: &(Instant, StatusResponse),
    rows: usize,
) -> Result<Rates, Failure> {
    let seconds = (now.0 - before.0).as_secs_f64().max(1e-3);
    let by_kind = |status: &StatusResponse| -> HashMap<String, u64> {
        status.kinds.iter().map(|count| (count.kind.clone(), count.events)).collect()
    };
    let (kinds_before, kinds_now) = (by_kind(&before.1), by_kind(&now.1));
    let more: u64 =
        kinds_now.iter().map(|(kind, &count)| count.saturating_sub(kinds_before.get(kind).copied().unwrap_or(0))).sum();
    let mut entities: HashMap<String, u64> = HashMap::new();
    let request = ListEventsRequest {
        since_ns: now_ns().saturating_sub(SAMPLE_NS),
        limit: SAMPLE_EVENTS,
        newest: true,
        ..ListEventsRequest::default()
    };
    let mut sampled = 0;
    let sample = events::each(client, server, request, &mut |event| {
        let entity = event.entity.clone().unwrap_or_default();
        *entities.entry(format!("{} on {}", entity.name, entity.node)).or_default() += 1;
        sampled += 1;
        Ok(())
    })
    .await;
    match sample {
        // Others may be reading, or the server has no archive to read: the rest is still worth showing.
        Ok(()) | Err(Failure::Other(_)) => {}
        Err(failure) => return Err(failure),
    }
    let scale = more as f64 / f64::from(sampled.max(1));
    let mut entities: Vec<_> = entities
        .into_iter()
        .map(|(name, count)| Row { name, per_second: count as f64 * scale / seconds, total: None })
        .collect();
    entities.sort_by(|a, b| b.per_second.total_cmp(&a.per_second).then_with(|| a.name.cmp(&b.name)));
    entities.truncate(rows);
    Ok(Rates {
        nodes: rates(&archived(&before.1), archived(&now.1), seconds, rows),
        kinds: rates(&kinds_before, kinds_now, seconds, rows),
        entities,
    })
}

fn value(rates: &Rates) -> Value {
    let rows = |rows: &[Row]| -> Vec<Value> {
        let row = |row: &Row| json!({ "name": row.name, "per_second": row.per_second, "total": row.total });
        rows.iter().map(row).collect()
    };
    json!({ "nodes": rows(&rates.nodes), "kinds": rows(&rates.kinds), "entities": rows(&rates.entities) })
}

fn tables(style: Style, rates: &Rates, status: &StatusResponse) -> String {
    let mut out = format!(
        "{} · {} · {} unexplained\n",
        text::count(status.nodes.len() as u64, "node"),
        text::count(status.findings, "finding"),
        text::count(status.unexplained_events.unsigned_abs(), "event")
    );
    for (heading, rows) in [("NODE", &rates.nodes), ("KIND", &rates.kinds), ("ENTITY (SAMPLED)", &rates.entities)] {
        let cells: Vec<_> = rows
            .iter()
            .map(|row| {
                let total = row.total.map_or_else(|| "-".to_owned(), |total| total.to_string());
                vec![format!("{:.1}", row.per_second), total, render::clean(&row.name)]
            })
            .collect();
        out.push('\n');
        out.push_str(&render::table(style, &["EVENTS/S", "TOTAL", heading], &[true, true, false], &cells));
    }
    out
}
