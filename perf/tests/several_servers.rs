//! A load over several servers is measured, its ledger closes over all of them, and with a log all find the same.

use std::process::Command;
use std::time::Duration;

use crate::lab::Need::{Bpf, Cgroups, Nats};
use crate::lab::{self, PERF, can_run};
use serde_json::Value;
use tapio_perf::load::generator::Pace;
use tapio_perf::load::report::LoadReport;
use tapio_perf::load::servers::ClusterReport;
use tapio_perf::load::{self, LoadOptions, SeveralServers};

/// Two servers with a node each, for a few seconds, at rates that a busy machine can take.
fn two_servers(with_log: bool) -> (LoadReport, ClusterReport) {
    let report = load::run(&LoadOptions {
        nodes: 2,
        pace: Pace::PerSecond(2_000.0),
        clues: Some(400.0),
        duration: Duration::from_secs(3),
        servers: Some(SeveralServers { count: 2, with_log }),
        entities: 50,
        ring_bytes: 8 << 20,
        seed: 1,
        ..LoadOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let cluster = report.cluster.clone().expect("several servers");
    assert!(report.ledger_closes && report.events_dropped == 0, "{report}");
    // One more where the last is due at the end.
    assert!((7_200..=7_201).contains(&report.events_offered), "{report}");
    assert_eq!(report.events_archived, report.events_emitted, "{report}");
    assert_eq!(cluster.servers.iter().map(|share| share.events_archived).sum::<u64>(), report.events_archived);
    for share in &cluster.servers {
        assert!(share.nodes == 1 && share.ledger_closes && share.events_archived > 3_000, "{report}");
        assert!(share.events_per_second > 0.0 && share.cpu_percent_of_core > 0.0 && share.rss_bytes > 0, "{report}");
    }
    assert!(report.latency_us.p99 > 0, "{report}");
    assert!((10_000..16 << 20).contains(&report.archive_bytes), "what was written, not what is reserved: {report}");
    (report, cluster)
}

#[test]
fn two_servers_with_a_log_find_the_same() {
    let _turn = lab::alone();
    if !can_run("two_servers_with_a_log_find_the_same", &[Nats]) {
        return;
    }
    let (report, cluster) = two_servers(true);
    let log = cluster.log.expect("a log");
    assert!(log.messages > 0 && log.bytes_in > 100_000 && log.bytes_out > log.bytes_in, "{report}");
    assert!(log.nats_cpu_percent_of_core > 0.0 && log.nats_rss_bytes > 0, "{report}");
    let findings = cluster.findings.expect("compared");
    assert!(findings.equal && findings.equal_by_id && findings.count > 10, "{report}");
    assert!(report.is_sound(), "{report}");
    let readers: Vec<_> = cluster.servers.iter().filter_map(|share| share.log.clone()).collect();
    assert_eq!(readers.len(), 2);
    assert_eq!(readers.iter().map(|reader| reader.rebuilds).sum::<u64>(), 0, "{report}");
    assert_eq!(readers[0].clues_found, readers[1].clues_found, "{report}");
    // 400 a second for 3 s, and those of the mixed profile.
    assert!(readers[0].clues_found >= 1_200, "{report}");
    assert_eq!(cluster.servers[0].findings, cluster.servers[1].findings, "{report}");
}

#[test]
fn without_a_log_servers_find_what_their_nodes_report() {
    let _turn = lab::alone();
    let (report, cluster) = two_servers(false);
    assert!(cluster.log.is_none() && cluster.findings.is_none() && report.is_sound(), "{report}");
    assert!(cluster.servers.iter().all(|share| share.findings > 5 && share.log.is_none()), "{report}");
}

/// The JSON that a command prints, which must end well.
fn json(arguments: &[&str]) -> Value {
    let output = Command::new(PERF).args(arguments).arg("--json").output().expect("tapio-perf starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}\n{}", String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[test]
fn one_command_compares_acknowledgements_with_and_without_the_log() {
    let _turn = lab::alone();
    if !can_run("one_command_compares_acknowledgements_with_and_without_the_log", &[Nats]) {
        return;
    }
    let words = "load --servers 2 --compare-log 1 --nodes 2 --rate 1000 --clues 200 --entities 20 --duration 1s";
    let answer = json(&words.split(' ').collect::<Vec<_>>());
    for side in ["without_log", "with_log"] {
        let runs = answer[side].as_array().expect("runs");
        assert_eq!(runs.len(), 1, "{answer}");
        assert_eq!(answer[&format!("{side}_us")]["p99"], runs[0]["latency_us"]["p99"], "{answer}");
        assert_eq!(runs[0]["cluster"]["log"].is_null(), side == "without_log", "{answer}");
    }
    assert!(answer["p99_ratio"].as_f64().is_some_and(|ratio| ratio > 0.0) && answer["is_sound"] == true, "{answer}");
}

#[test]
fn one_command_compares_latency_with_and_without_the_log() {
    let _turn = lab::alone();
    if !can_run("one_command_compares_latency_with_and_without_the_log", &[Nats, Cgroups, Bpf]) {
        return;
    }
    let words = "inject kill --measure --servers 2 --compare-log 1 --repeat 2 --interval 10ms --keep-time 10ms";
    let answer = json(&words.split(' ').collect::<Vec<_>>());
    for side in ["without_log", "with_log"] {
        assert_eq!((&answer[side]["injections"], &answer[side]["missing"]), (&2.into(), &0.into()), "{answer}");
        assert!(answer[side]["latency_us"]["p50"].as_u64().is_some_and(|us| us > 0), "{answer}");
    }
    assert!(answer["without_log"]["elsewhere_latency_us"].is_null(), "{answer}");
    assert!(answer["with_log"]["elsewhere_latency_us"]["p50"].as_u64().is_some_and(|us| us > 0), "{answer}");
}

#[test]
fn what_makes_no_sense_together_is_refused() {
    let _turn = lab::beside();
    for (arguments, words) in [
        ("load --servers 11 --nodes 11", ["servers", "10"]),
        ("load --servers 2 --server 127.0.0.1:1", ["--servers", "--server"]),
        ("load --without-log", ["--servers", "required"]),
        ("load --servers 2 --nodes 1", ["--nodes", "--servers"]),
        ("load --compare-log --servers 1", ["--servers", "2"]),
        ("load --compare-log --without-log --servers 2", ["--compare-log", "--without-log"]),
        ("load --clues 100 --rate max", ["--clues", "--rate"]),
        ("load --clues max --rate 10", ["rate", "50000"]),
        ("inject kill --servers 2", ["--measure", "--servers"]),
    ] {
        let mut command = Command::new(PERF);
        command.args(arguments.split(' '));
        lab::assert_says(&lab::refusal(command, arguments), &words);
    }
}
