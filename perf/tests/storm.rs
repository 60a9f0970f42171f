//! The storm in short: what the kernel emitted under it is archived or declared lost, and nothing lethal is lost.

use std::process::Command;

use crate::lab::Need::Bpf;
use crate::lab::{PERF, can_run};
use serde_json::Value;

#[test]
fn a_storm_is_accounted_for_and_loses_nothing_lethal() {
    let _turn = crate::lab::alone();
    if !can_run("a_storm_is_accounted_for_and_loses_nothing_lethal", &[Bpf]) {
        return;
    }
    let output = Command::new(PERF).args(["storm", "--duration", "10s", "--json"]).output().expect("tapio-perf starts");
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    assert!(output.status.success(), "{report:#} {said}");
    let number = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("no {key} in {report:#}"));
    assert!(number("processes") > 0 && number("connections") > number("processes"));
    // An exec and an exit of each process, at least.
    assert!(number("emitted") >= 2 * number("processes"));
    assert_eq!((number("lethal_ring_full"), number("held")), (0, 0));
    assert_eq!(report["unexplained"], 0);
}
