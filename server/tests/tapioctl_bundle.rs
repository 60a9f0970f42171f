//! `tapioctl bundle` against a real server with an archive.

use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use serde_json::Value;
use tokio::task::block_in_place;

use crate::cluster_whole::{findings_when, ship};
use crate::correlate_node::{Node, SECOND};
use crate::programs::tapioctl;
use crate::whole_server::Whole;

/// What identifies the cluster of these tests.
const NAMES: [&str; 5] = ["worker-17", "shop", "db-0", "StatefulSet/db", "shop/web:2"];

async fn server_with_a_death() -> (Whole, String) {
    let server = Whole::start(|_| {}).await;
    let mut node = Node::new("worker-17");
    let db = node.kube_container("StatefulSet/db", "shop/db-0", "db");
    node.limit_kill(db, 700, 100 * SECOND);
    ship(&server, &node, 0).await;
    let found = findings_when(&server, |found| found.len() == 1).await;
    let id = found[0].id.clone();
    (server, id)
}

fn bundle(server: &Whole, folder: &std::path::Path, arguments: &[&str]) -> (Output, String) {
    let address = server.pipeline.grpc_address.to_string();
    let output = block_in_place(|| tapioctl(&address, arguments).current_dir(folder).output().expect("tapioctl runs"));
    let said = String::from_utf8_lossy(&[output.stdout.clone(), output.stderr.clone()].concat()).into_owned();
    (output, said)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bundle_holds_the_finding_its_events_and_the_ledger() {
    let (server, id) = server_with_a_death().await;
    let folder = tempfile::tempdir().expect("a folder");
    let (output, said) = bundle(&server, folder.path(), &["bundle", &id[..8]]);
    assert!(output.status.success() && said.contains("use --redact"), "{said}");
    let path = folder.path().join(format!("tapio-{id}.json"));
    assert_eq!(std::fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
    let text = std::fs::read_to_string(&path).expect("read");
    let bundle_of: Value = serde_json::from_str(&text).expect("one object");
    assert_eq!(bundle_of["finding"]["pattern"], "memory-limit-kill");
    let events = bundle_of["events"].as_array().expect("a list");
    let kinds: Vec<&str> = events.iter().filter_map(|event| event["kind"].as_str()).collect();
    assert!(["oom", "signal", "exit"].iter().all(|kind| kinds.contains(kind)), "{kinds:?}");
    assert_eq!(bundle_of["status"]["nodes"][0]["node"], "worker-17");
    assert!(NAMES.iter().all(|name| text.contains(name)), "{text}");
    // What is there may be another one's.
    let (output, said) = bundle(&server, folder.path(), &["bundle", &id]);
    assert!(output.status.code() == Some(1) && said.contains("--to"), "{said}");
    server.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redacted_bundle_names_nothing_of_the_cluster() {
    let (server, id) = server_with_a_death().await;
    let folder = tempfile::tempdir().expect("a folder");
    let (output, text) = bundle(&server, folder.path(), &["bundle", &id, "--redact", "--to", "-"]);
    assert!(output.status.success(), "{text}");
    let bundle_of: Value = serde_json::from_str(&text).expect("one object");
    for name in NAMES {
        assert!(!text.contains(name), "{name}: {text}");
    }
    let of_node = |place: &Value| place["node"].as_str().map(str::to_owned);
    assert_eq!(of_node(&bundle_of["finding"]["entity"]), of_node(&bundle_of["status"]["nodes"][0]), "{bundle_of:#}");
    server.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bundle_of_no_finding_says_so() {
    let server = Whole::start(|_| {}).await;
    let folder = tempfile::tempdir().expect("a folder");
    let (output, said) = bundle(&server, folder.path(), &["bundle", "abcdef"]);
    assert!(output.status.code() == Some(1) && said.contains("abcdef"), "{said}");
    let (output, said) = bundle(&server, folder.path(), &["bundle", "abcdef", "--around", "soon"]);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 0);
    server.pipeline.shutdown().await.expect("a good end");
}
