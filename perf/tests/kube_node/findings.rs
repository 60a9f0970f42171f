//! The findings about a real node's pods, as `tapioctl` lists and shows them.

use std::process::Command;

use serde_json::Value;
use tapio_perf::processes::{bin_dir, binary};

use super::await_that;

/// What `tapioctl findings` lists.
pub fn findings(server: &str) -> Vec<Value> {
    let folder = bin_dir(None).expect("the programs' folder");
    let tapioctl = binary("tapioctl", &folder).unwrap_or_else(|error| panic!("{error}"));
    let arguments = ["--server", server, "findings", "-o", "json", "--limit", "500"];
    let output = Command::new(&tapioctl).args(arguments).output().expect("tapioctl starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).expect("an object a line")).collect()
}

/// Waits until one of a pattern is listed that is about a container, pod or workload of this name: names that came late
/// included. Gives its JSON.
pub fn listed(server: &str, pattern: &str, name: impl Fn(&str) -> bool) -> Value {
    await_that(&format!("a finding of {pattern}"), |seen| {
        let all = findings(server);
        *seen =
            all.iter().map(|one| format!("\n{} {} {}", one["pattern"], one["entity"]["name"], one["title"])).collect();
        all.into_iter().find(|one| one["pattern"] == pattern && one["entity"]["name"].as_str().is_some_and(&name))
    })
}

/// Shows a finding as an operator sees it.
pub fn print(server: &str, finding: &Value) {
    let tapioctl = bin_dir(None).expect("the programs' folder").join("tapioctl");
    let id = finding["id"].as_str().expect("an id");
    let output = Command::new(tapioctl).args(["--server", server, "finding", id]).output().expect("tapioctl starts");
    println!("{}", String::from_utf8_lossy(&output.stdout));
}

/// What the entity of a finding is called, part by part.
pub fn named(finding: &Value) -> (String, String, String, String) {
    let part = |key: &str| finding["entity"][key].as_str().unwrap_or_default().to_owned();
    (part("namespace"), part("pod"), part("container"), part("workload"))
}
