//! Troubles of live workloads have a finding while they last, which ends with them.

use crate::lab;
use crate::lab::Need::{Bpf, Cgroups, Root};
use crate::lab::can_run;
use tapio_perf::troubles;

#[test]
fn throttled_or_hung_containers_are_reported_until_well() {
    let _turn = lab::alone();
    if !can_run("throttled_or_hung_containers_are_reported_until_well", &[Root, Cgroups, Bpf]) {
        return;
    }
    let report = troubles::run_all(None).unwrap_or_else(|error| panic!("{error}"));
    println!("{report}");
    let leak = report.findings.last().expect("the last is the leak");
    assert!(leak.title.contains("a leak"), "{report}");
    assert_eq!(report.curve_points, 1, "one curve of one death");
}
