//! A window of another archive comes back: a server shows its events and findings beside its own.

use std::path::Path;

use serde_json::{Value, json};
use tapio_wire::service::Finding;

use crate::archive_support::*;
use crate::parquet_support::*;
use crate::remote_support::*;
use crate::whole_server::Whole;

async fn printed(whole: &Whole, arguments: &[&str]) -> String {
    let command = crate::programs::tapioctl(whole.pipeline.grpc_address, arguments);
    crate::programs::printed(crate::programs::output(command).await)
}

/// The archive of a server that is gone: a bad hour, and a finding about it.
fn a_predecessor(dir: &Path) {
    let archive = open(small(dir));
    a_bad_hour(&archive);
    archive.shutdown();
    let finding = Finding {
        id: "f00d000000000001".into(),
        title: "web exceeded its limit".into(),
        severity: "high".into(),
        pattern: "memory-limit-kill".into(),
        started_ns: now_ns() - 36 * MINUTE_NS,
        ended_ns: now_ns() - 35 * MINUTE_NS,
        published_ns: now_ns() - 35 * MINUTE_NS,
        confidence: 0.9,
        ..Finding::default()
    };
    let line = json!({ "published": finding });
    std::fs::write(dir.join("findings.jsonl"), format!("{line}\n")).expect("written");
}

/// A server's own archive, with an event of now.
fn an_archive(dir: &Path) {
    let archive = open(small(dir));
    let mut node = Node::new("node-7", 7);
    let mut bodies = Bodies::default();
    bodies.waits(now_ns(), 3);
    node.send(&archive, now_ns(), &bodies.body);
    archive.shutdown();
}

fn restore(environment: &[(&str, String)], cache: &Path, arguments: &[&str]) -> Value {
    let all: Vec<&str> = ["archive", "restore", "--json"].iter().chain(arguments).copied().collect();
    let (output, text) = command(cache, environment, &all);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).expect("JSON")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_of_a_folder_comes_back_with_its_findings() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    tokio::task::block_in_place(|| {
        a_predecessor(from.path());
        an_archive(to.path());
    });
    let (from, dir) = (from.path().to_str().expect("UTF-8"), to.path().to_owned());
    let to = dir.to_str().expect("UTF-8");
    let value = restore(&[], &dir, &[from, to, "--since", "1h", "--until", "10m"]);
    assert_eq!((&value["findings"], value["events"].as_u64() > Some(1000)), (&1.into(), true), "{value}");
    let (output, _) = command(&dir, &[], &["archive", "restore", from, to, "--since", "10d", "--until", "9d"]);
    assert!(!output.status.success(), "nothing is of that time");
    let whole = Whole::start(|config| config.archive.dir = dir.clone()).await;
    // While a server has it, nobody restores into it.
    let (output, _) = command(&dir, &[], &["archive", "restore", from, to, "--name", "again"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains(&std::process::id().to_string()), "{said}");
    let text = printed(&whole, &["events", "--pod", "shop/web-1", "--kind", "exit,oom", "-o", "json"]).await;
    assert_eq!(text.lines().count(), 5, "{text}");
    let text = printed(&whole, &["events", "--node", "node-7", "-o", "json"]).await;
    assert_eq!(text.lines().count(), 3, "its own are there: {text}");
    let text = printed(&whole, &["findings", "-o", "json"]).await;
    assert!(text.contains("f00d000000000001"), "{text}");
    let text = printed(&whole, &["ledger"]).await;
    assert!(text.contains("The ledger closes") && !text.contains("node-1"), "it counts its own alone: {text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_of_s3_comes_back_and_is_found_again() {
    let Some(server) = S3::start() else { return };
    let (from, to, keys) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = s3(server.port(), keys.path());
    let uploaded = Uploaded::open(small(from.path()), &section);
    tokio::task::block_in_place(|| {
        a_bad_hour(&uploaded.archive);
        uploaded.end(GRACE);
    });
    let dir = to.path().to_owned();
    let environment = s3_environment(server.port());
    let value = restore(&environment, keys.path(), &[&section.url, dir.to_str().expect("UTF-8"), "--since", "1h"]);
    let found = value["findings"].as_u64().expect("a number");
    assert!(found >= 1 && value["events"].as_u64() > Some(1000), "{value}");
    let whole = Whole::start(|config| config.archive.dir = dir).await;
    let text = printed(&whole, &["events", "--pod", "shop/web-1", "--kind", "exit,oom", "-o", "json"]).await;
    assert_eq!(text.lines().count(), 5, "{text}");
    let text = printed(&whole, &["findings", "-o", "json"]).await;
    assert_eq!(text.lines().count() as u64, found, "{text}");
}
