//! Troubles of live workloads have a finding while they last, which ends with them.

use crate::lab;
use crate::lab::Need::{Bpf, Cgroups, Root};
use crate::lab::can_run;
use tapio_perf::troubles;

#[test]
fn containers_that_are_throttled_crowded_or_hang_are_told_of_until_they_are_well() {
    let _turn = lab::alone();
    if !can_run("containers_that_are_throttled_crowded_or_hang_are_told_of_until_they_are_well", &[Root, Cgroups, Bpf])
    {
        return;
    }
    let report = troubles::run_all(None).unwrap_or_else(|error| panic!("{error}"));
    println!("{report}");
    let leak = report.told.last().expect("the last is the leak");
    assert!(leak.title.contains("a leak"), "{report}");
    assert_eq!(report.curve_points, 1, "one curve of one death");
}
