//! Deaths of every kind, caused for real, are explained right.

use std::path::Path;

use crate::lab;
use crate::lab::Need::{Bpf, Cgroups, Root};
use crate::lab::can_run;
use tapio_perf::truth::scenario::Outcome;
use tapio_perf::truth::{self, Report, TruthOptions};

fn report_of(options: TruthOptions) -> Report {
    let report = truth::run(&TruthOptions { is_quiet: true, ..options }).unwrap_or_else(|error| panic!("{error}"));
    println!("{report}");
    assert!(report.is_true(), "{report}");
    report
}

#[test]
fn no_death_is_misjudged_and_the_page_holds() {
    let _turn = lab::alone();
    if !can_run("no_death_is_misjudged_and_the_page_holds", &[Root, Cgroups, Bpf]) {
        return;
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/truth.md");
    report_of(TruthOptions { page: Some(page), ..TruthOptions::default() });
}

/// On a node that is a container itself: what the kernel says of a process is not what its own procfs says of that number.
#[test]
fn a_collector_in_its_own_pid_namespace_finds_the_same() {
    let _turn = lab::alone();
    if !can_run("a_collector_in_its_own_pid_namespace_finds_the_same", &[Root, Cgroups, Bpf]) {
        return;
    }
    let only =
        ["oom-of-pid-1", "oom-shared", "child-oom-init-exits-1", "killed-by-a-host", "sigterm-obeyed", "exits-3"];
    let only = only.map(str::to_owned).to_vec();
    let report = report_of(TruthOptions { only, own_pid_namespace: true, ..TruthOptions::default() });
    assert!(report.scenarios.iter().all(|judged| judged.outcome == Outcome::Right), "{report}");
}
