//! Containers that flood their node hide no death of another, cost the archive little, and have findings.

use crate::lab;
use crate::lab::Need::{Bpf, Cgroups, Root};
use crate::lab::can_run;
use tapio_perf::flood::{self, FloodOptions};

#[test]
fn a_hundred_deaths_beside_three_floods_are_found() {
    let _turn = lab::alone();
    if !can_run("a_hundred_deaths_beside_three_floods_are_found", &[Root, Cgroups, Bpf]) {
        return;
    }
    let options = FloodOptions { before: 5, kills: 100, ..FloodOptions::default() };
    let report = flood::run(&options).unwrap_or_else(|error| panic!("{error}"));
    println!("{report}");
    assert!(report.complaints.is_empty(), "{report}");
    assert_eq!(report.unexplained, 0, "{report}");
    assert!(report.left_out_per_second > 1_000.0, "the loops did not flood: {report}");
}
