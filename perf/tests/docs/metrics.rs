//! docs/metrics.md against what the real programs expose.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Duration;

use tapio_perf::clock::wait_for;
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions, http};

use crate::docs::pages;
use crate::lab::{FedNode, Need, can_run, inject};

const PAGE: &str = "docs/metrics.md";

/// Metrics that are not there from the start, and when they are.
const CONDITIONAL: &[(&str, &str)] = &[
    ("tapio_collector_events_decoded_total", "with the first event of a kind"),
    ("tapio_collector_events_dropped_total", "with the first loss"),
    ("tapio_collector_probe_missed_runs_total", "with source `ebpf`"),
    ("tapio_collector_probe_run_seconds_total", "with source `ebpf` and a CPU budget, after 8 s"),
    ("tapio_ledger_dropped_events_total", "with the first loss"),
    ("tapio_server_audit_calls_total", "with the first call"),
    ("tapio_server_audit_suppressed_lines_total", "with the first line that is left out"),
    ("tapio_server_denied_requests_total", "with the first refusal"),
    ("tapio_server_findings_published_total", "with the first finding"),
    ("tapio_server_findings_total", "with the first finding"),
    ("tapio_server_ingest_refused_total", "with the first refusal"),
    ("tapio_server_token_nodes_unknown_total", "with `server.auth.token_review`"),
    ("tapio_server_token_review_cache_entries", "with `server.auth.token_review`"),
    ("tapio_server_token_review_cache_hits_total", "with `server.auth.token_review`"),
    ("tapio_server_token_review_seconds", "with `server.auth.token_review`"),
    ("tapio_server_token_reviews_total", "with `server.auth.token_review`"),
    ("tapio_server_tls_handshakes_total", "with the first handshake, where TLS is on"),
];

/// A metric as a program exposes it, or as its source declares it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Family {
    kind: String,
    help: String,
    labels: Vec<String>,
}

/// Reads the text format.
fn families(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap_or((rest, ""));
            families.entry(name.into()).or_default().help = help.trim_end_matches('.').into();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            families.entry(name.into()).or_default().kind = kind.into();
        } else if let Some((series, rest)) = line.split_once('{') {
            let ends = ["_bucket", "_sum", "_count"];
            let name = ends.iter().find_map(|end| series.strip_suffix(end)).filter(|name| families.contains_key(*name));
            let family = families.entry(name.unwrap_or(series).into()).or_default();
            let labels = rest.split_once('}').expect("labels end").0;
            for label in labels.split(',').filter_map(|label| Some(label.split_once('=')?.0)) {
                if label != "le" && !label.contains('"') && !family.labels.iter().any(|known| known == label) {
                    family.labels.push(label.into());
                }
            }
            family.labels.sort();
        }
    }
    families
}

fn unit(name: &str) -> &'static str {
    let units = [
        ("timestamp_seconds", "Unix time in seconds"),
        ("milliseconds", "milliseconds"),
        ("microseconds", "microseconds"),
        ("millicores", "thousandths of a core"),
        ("seconds", "seconds"),
        ("bytes", "bytes"),
    ];
    let stem = name.strip_suffix("_total").unwrap_or(name);
    units.iter().find(|(end, _)| stem.ends_with(end)).map_or("number", |&(_, unit)| unit)
}

fn condition(name: &str) -> &'static str {
    CONDITIONAL.iter().find(|(known, _)| *known == name).map_or("always", |&(_, when)| when)
}

fn row(name: &str, family: &Family) -> String {
    let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
    format!(
        "| `{name}` | {} | {} | {} | {} | {} |",
        family.kind,
        labels.join(", "),
        unit(name),
        condition(name),
        family.help.replace('|', "\\|")
    )
}

fn table(prefixes: &[&str], families: &BTreeMap<String, Family>, written: &str) -> String {
    let mut rows: BTreeMap<String, String> = BTreeMap::new();
    // What this machine or this run does not bring about stays as it was written where it was brought about.
    for line in written.lines() {
        let name = line.strip_prefix("| `").and_then(|rest| rest.split_once('`')).map_or("", |(name, _)| name);
        if CONDITIONAL.iter().any(|(known, _)| *known == name) {
            rows.insert(name.into(), line.into());
        }
    }
    for (name, family) in families {
        if prefixes.iter().any(|prefix| name.starts_with(prefix)) {
            rows.insert(name.clone(), row(name, family));
        }
    }
    let mut text = "| name | type | labels | unit | there | meaning |\n|---|---|---|---|---|---|\n".to_owned();
    for row in rows.values() {
        let _ = writeln!(text, "{row}");
    }
    text
}

/// What both programs expose after some events, a refusal and, where the kernel lets us, a kill.
fn exposed() -> BTreeMap<String, Family> {
    let fail = |error: tapio_perf::error::Error| -> ! { panic!("{error}") };
    let server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| fail(error));
    let options = CollectorOptions {
        node: "docs-node".into(),
        server: server.address(),
        // Most of the bulk lane is left out, so that there are losses to report.
        extra_config: "pipeline: {filter_config: {min_severity: critical}}\n".into(),
        ..CollectorOptions::default()
    };
    let collector = Collector::start(&options).unwrap_or_else(|error| fail(error));
    let node = FedNode::feed(collector, 20_000.0);
    node.wait_for_progress(&server, &mut 0, 500);
    let scrape = |port| http::get(port, "/metrics").unwrap_or_else(|error| fail(error)).1;
    let mut found = families(&scrape(node.collector.port()));
    if can_run("the probes' metrics of docs/metrics.md", &[Need::Cgroups, Need::Bpf]) {
        let options = CollectorOptions {
            node: "docs-kernel".into(),
            server: server.address(),
            feed: Feed::Ebpf,
            ..CollectorOptions::default()
        };
        let collector = Collector::start(&options).unwrap_or_else(|error| fail(error));
        inject(&["oom", "--memory", "16MiB"]);
        let waited = wait_for("the finding's metrics", Duration::from_secs(20), |seen| {
            *seen = scrape(server.http_port());
            Ok(seen.contains("tapio_server_findings_total{").then_some(()))
        });
        waited.unwrap_or_else(|error| fail(error));
        found.extend(families(&scrape(collector.port())));
    }
    found.extend(families(&scrape(server.http_port())));
    node.finish(&server);
    found
}

/// The text of all sources.
fn sources() -> String {
    fn visit(folder: &Path, all: &mut String) {
        for entry in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            if entry.is_dir() {
                visit(&entry, all);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                all.push_str(&fs::read_to_string(&entry).expect("a source file"));
            }
        }
    }
    let mut all = String::new();
    for folder in ["collector/src", "server/src"] {
        visit(&pages::root().join(folder), &mut all);
    }
    all
}

/// Names of metrics that the sources write out, whether a run exposes them or not.
fn declared(sources: &str) -> Vec<String> {
    let names = sources.split('"').filter(|part| part.starts_with("tapio_") && !part.ends_with('_'));
    names.filter(|name| name.bytes().all(|b| b == b'_' || b.is_ascii_lowercase())).map(str::to_owned).collect()
}

pub fn check() {
    let families = exposed();
    for (name, prefixes) in
        [("server", &["tapio_server_", "tapio_ledger_", "tapio_archive_"][..]), ("collector", &["tapio_collector_"])]
    {
        let written = pages::generated(PAGE, name);
        pages::check_generated(PAGE, name, &table(prefixes, &families, &written));
    }
    let page = pages::read(PAGE);
    let is_listed = |name: &str| page.contains(&format!("\n| `{name}` |"));
    let sources = sources();
    for name in families.keys().cloned().chain(declared(&sources)) {
        assert!(
            is_listed(&name),
            "{PAGE} does not list {name}: run `make docs`, or add a row if it is there under a condition"
        );
    }
    for (name, _) in CONDITIONAL {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("{PAGE} does not list {name}"));
        let meaning = row.trim_end_matches(" |").rsplit_once("| ").map_or("", |(_, meaning)| meaning);
        assert!(sources.contains(&format!("\"{meaning}")), "{name}: no source says \"{meaning}\"");
    }
}

#[test]
fn the_text_format_is_read_with_types_labels_and_help() {
    let text = "# HELP a_total How many.\n# TYPE a_total counter\na_total{kind=\"x,y\",lane=\"b\"} 1\n\
                # HELP b_seconds Time\n# TYPE b_seconds histogram\nb_seconds_bucket{le=\"1\"} 2\nb_seconds_sum 3\n";
    let found = families(text);
    let expected =
        Family { kind: "counter".into(), help: "How many".into(), labels: vec!["kind".into(), "lane".into()] };
    assert_eq!(found["a_total"], expected);
    assert_eq!((found.len(), found["b_seconds"].labels.len()), (2, 0));
    assert_eq!(unit("b_seconds"), "seconds");
}
