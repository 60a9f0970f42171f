//! `tapio-perf ingest`: every frame is acknowledged and accounted for, the report has its keys, and what goes wrong is said. No speed is
//! asserted.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tapio_perf::clock::wait_for;
use tapio_perf::processes::Process;

use crate::lab::{PERF, assert_says, refusal};

fn ingest(arguments: &[&str]) -> Output {
    Command::new(PERF).arg("ingest").args(arguments).output().expect("tapio-perf starts")
}

/// The report of a run that must be sound.
fn report(arguments: &[&str]) -> Value {
    let output = ingest(&[arguments, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[test]
fn every_frame_is_acknowledged_and_accounted_for() {
    let _turn = crate::lab::beside();
    let report = report(&[
        "--nodes",
        "20",
        "--frames-per-sec",
        "10",
        "--events-per-frame",
        "7",
        "--duration",
        "2s",
        "--server-cores",
        "0",
    ]);
    // A second of warm-up, two that are measured: 30 frames of each node, one more where it was due at the end.
    let emitted = report["events_emitted"].as_u64().expect("a number");
    assert_eq!(emitted % 7, 0);
    assert!((20 * 29 * 7..=20 * 31 * 7).contains(&emitted), "{emitted}");
    assert_eq!(report["events_archived"], emitted);
    assert_eq!((&report["ledger_closes"], &report["events_per_frame"]), (&Value::from(true), &Value::from(7.0)));
    for key in ["events_per_second", "frames_per_second", "duration_s"] {
        assert!(report[key].as_f64().is_some_and(|value| value > 0.0), "{key} in {report}");
    }
    for key in ["cpu_us_per_frame", "cpu_ns_per_event", "cpu_percent_of_core", "rss_bytes"] {
        assert!(report["server"][key].as_f64().is_some_and(|value| value > 0.0), "server.{key} in {report}");
    }
    for key in ["p50", "p99", "max"] {
        assert!(
            report["ack_latency_us"][key].as_u64().is_some_and(|value| value > 0),
            "ack_latency_us.{key} in {report}"
        );
    }
    assert!(report["host"]["cores"].as_u64() > Some(0) && report["revision"].is_string(), "{report}");
    let threads = report["server"]["threads"].as_array().expect("a list");
    assert!(threads.iter().any(|thread| thread["name"] == "archive"), "{report}");
}

#[test]
fn entities_are_described_and_deaths_found() {
    let _turn = crate::lab::beside();
    let described = report(&["--nodes", "5", "--describe", "--entities", "30", "--duration", "1s", "--signals", "50"]);
    assert_eq!((&described["describes"], &described["entities"]), (&Value::from(true), &Value::from(150)));
    assert!(described["findings"].as_u64() > Some(0), "containers were killed: {described}");
    assert_eq!(described["ledger_closes"], true);
}

#[test]
fn an_archive_is_sent_again_as_fast_as_it_goes() {
    let _turn = crate::lab::beside();
    let folder = tempfile::tempdir().expect("a folder");
    let archive = folder.path().join("archive");
    let archive = archive.to_str().expect("a path");
    let made = report(&["--nodes", "2", "--events-per-frame", "100", "--duration", "500ms", "--archive-dir", archive]);
    assert_eq!(made["ledger_closes"], true);
    let again = report(&["--nodes", "3", "--frames-per-sec", "max", "--duration", "500ms", "--archive", archive]);
    assert_eq!((&again["ledger_closes"], &again["events_per_frame"]), (&Value::from(true), &Value::from(100.0)));
    assert!(again["events_emitted"].as_u64() > made["events_emitted"].as_u64(), "{again}");
}

/// The process of this name that another one started.
fn child_of(parent: u32, name: &str) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{parent}/task")).ok()?;
    let children = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> =
        children.flat_map(|text| text.split(' ').flat_map(str::parse).collect::<Vec<_>>()).collect();
    let is_named = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
    children.into_iter().find(is_named)
}

#[test]
fn a_server_that_is_killed_in_the_middle_is_named() {
    let _turn = crate::lab::beside();
    let folder = tempfile::tempdir().expect("a folder");
    let archive = folder.path().join("archive");
    let mut command = Command::new(PERF);
    command.args(["ingest", "--nodes", "10", "--duration", "60s", "--archive-dir"]).arg(&archive);
    let mut process = Process::spawn("tapio-perf", command, folder.path().join("log")).expect("it starts");
    let wrote = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
    let server = wait_for("a server that archives", Duration::from_secs(30), |_| {
        Ok(child_of(process.pid(), "tapio-server").filter(|_| wrote(&archive)))
    });
    let server = server.unwrap_or_else(|error| panic!("{error}\n{}", process.output()));
    kill_process(Pid::from_raw(server as i32).expect("a process"), Signal::KILL).expect("it is ours");
    let status = process.wait(Duration::from_secs(20)).expect("it ends");
    assert_eq!(status.code(), Some(2), "{}", process.output());
    assert_says(&process.output(), &["tapio-server ended", "signal 9"]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let empty = folder.path().to_str().expect("a path");
    for (arguments, words) in [
        (&["--nodes", "0"][..], &["--nodes", "20000"][..]),
        (&["--events-per-frame", "0"], &["--events-per-frame", "65536"]),
        (&["--frames-per-sec", "fast"], &["fast", "max"]),
        (&["--server-cores", "x"], &["\"x\"", "like 0,2 or 1-3"]),
        (&["--server-cores", "1000"], &["no core 1000"]),
        (&["--signals=-1"], &["--signals"]),
        (&["--archive", empty], &[empty, "no segment"]),
        (&["--archive", empty, "--describe"], &["--describe", "--archive"]),
        (&["--bin-dir", "/nonexistent"], &["tapio-server", "/nonexistent", "make build"]),
    ] {
        let mut command = Command::new(PERF);
        command.arg("ingest").args(arguments);
        assert_says(&refusal(command, "tapio-perf ingest"), words);
    }
}
