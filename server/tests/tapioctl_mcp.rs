//! `tapioctl mcp` asked by the protocol's official client, against a real server.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tokio::task::block_in_place;

use crate::cluster_whole::{findings_when, ship};
use crate::correlate_node::{Node, SECOND};
use crate::whole_server::Whole;

/// The interpreter that has the client. `None` where there is none and it is not required.
fn python() -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target folder").join("tools");
    let python = tools.join("mcp/bin/python3");
    if python.is_file() {
        return Some(python);
    }
    assert!(
        std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"),
        "no client: deploy/local/install.sh mcp installs it"
    );
    eprintln!("SKIP: no client of the Model Context Protocol");
    None
}

fn asked(python: &Path, server: &str, calls: &Value) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mcp/client.py");
    let mut command = Command::new(python);
    command.arg(script).args([crate::programs::TAPIOCTL, server]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(calls.to_string().as_bytes()).expect("written");
    drop(input);
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_assistant_asks_why_and_only_reads() {
    let Some(python) = python() else { return };
    let server = Whole::start(|_| {}).await;
    let mut node = Node::new("n1");
    let db = node.kube_container("StatefulSet/db", "shop/db-0", "db");
    node.limit_kill(db, 700, 100 * SECOND);
    ship(&server, &node, 0).await;
    let found = findings_when(&server, |found| found.len() == 1).await;
    let id = &found[0].id;
    let calls = json!([
        ["why", {"subject": "pod/db-0", "namespace": "shop"}],
        ["list_findings", {"workload": "StatefulSet/db", "limit": 10}],
        ["get_finding", {"id": id}],
        ["list_events", {"pod": "shop/db-0", "kinds": "oom"}],
        ["ledger", {}],
        ["patterns", {}],
        ["get_finding", {"id": "--help"}],
        ["list_findings", {"severity": "huge"}],
        ["remove", {}],
    ]);
    let address = server.pipeline.grpc_address.to_string();
    let asked = block_in_place(|| asked(&python, &address, &calls));

    assert!(
        asked["begun"]["instructions"].as_str().is_some_and(|text| text.contains("never instructions")),
        "{asked:#}"
    );
    let tools = asked["tools"].as_array().expect("a list");
    assert_eq!(tools.len(), 7, "{tools:#?}");
    assert!(tools.iter().all(|tool| tool["annotations"]["readOnlyHint"] == true), "{tools:#?}");
    let answers: Vec<(&str, bool)> = asked["answers"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|answer| (answer["text"].as_str().expect("a text"), answer["is_error"] == true))
        .collect();
    let has = |index: usize, part: &str| assert!(answers[index].0.contains(part) && !answers[index].1, "{answers:#?}");
    has(0, "exceeded its memory limit");
    has(1, "\"pattern\":\"memory-limit-kill\"");
    has(2, "\"evidence\"");
    has(3, "\"kind\":\"oom\"");
    has(4, "The ledger closes");
    has(5, "memory-limit-kill (high)");
    let refused =
        |index: usize, part: &str| assert!(answers[index].0.contains(part) && answers[index].1, "{answers:#?}");
    refused(6, "--help");
    refused(7, "it is one of");
    refused(8, "no tool is called remove");
    server.pipeline.shutdown().await.expect("a good end");
}
