//! The same load with the servers' log and without it, in turn: what the log costs acknowledgements.
//!
//! In: a load of several servers. Out: every run's report, and the medians side by side. What must hold: a run without the log comes
//! right before one with it, so that whatever else the machine does meets both.

use std::fmt;

use serde::Serialize;
use tapio_wire::program::units::human_duration;

use super::report::LoadReport;
use super::{LoadOptions, SeveralServers, run};
use crate::error::Error;
use crate::latency::Summary;

/// Runs of each kind, at most.
pub const ROUNDS_MAX: u16 = 100;

/// What was measured. Keys are read by other programs: they stay.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Comparison {
    /// Latency from an event's intended time to its durable acknowledgement: medians over the runs.
    pub without_log_us: Percentiles,
    pub with_log_us: Percentiles,
    /// Ratio of the medians: with the log by without it; below 1 where it was faster.
    pub p50_ratio: f64,
    pub p99_ratio: f64,
    /// Every run closed its ledger, and with the log all servers found the same.
    pub is_sound: bool,
    pub without_log: Vec<LoadReport>,
    pub with_log: Vec<LoadReport>,
}

/// Percentiles of a latency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Percentiles {
    pub p50: u64,
    pub p99: u64,
}

/// Runs `rounds` of each kind; `each` is called for every run.
pub fn compare(
    options: &LoadOptions,
    rounds: u16,
    mut each: impl FnMut(bool, &LoadReport) -> Result<(), Error>,
) -> Result<Comparison, Error> {
    let Some(several) = options.servers.filter(|several| several.count > 1) else {
        return Err(Error::Invalid("one server has no log to compare: --servers must be at least 2".into()));
    };
    let mut comparison = Comparison { is_sound: true, ..Comparison::default() };
    for _ in 0..rounds {
        for with_log in [false, true] {
            let servers = Some(SeveralServers { with_log, ..several });
            let report = run(&LoadOptions { servers, ..options.clone() })?;
            each(with_log, &report)?;
            comparison.is_sound &= report.is_sound();
            if with_log { &mut comparison.with_log } else { &mut comparison.without_log }.push(report);
        }
    }
    comparison.sum_up();
    Ok(comparison)
}

fn medians(reports: &[LoadReport]) -> Percentiles {
    let median = |of: fn(&Summary) -> u64| {
        let mut values: Vec<u64> = reports.iter().map(|report| of(&report.latency_us)).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or(0)
    };
    Percentiles { p50: median(|summary| summary.p50), p99: median(|summary| summary.p99) }
}

impl Comparison {
    fn sum_up(&mut self) {
        (self.without_log_us, self.with_log_us) = (medians(&self.without_log), medians(&self.with_log));
        let ratio = |with: u64, without: u64| with as f64 / without.max(1) as f64;
        self.p50_ratio = ratio(self.with_log_us.p50, self.without_log_us.p50);
        self.p99_ratio = ratio(self.with_log_us.p99, self.without_log_us.p99);
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.with_log.len();
        writeln!(f, "event→ack, medians of {runs} runs each, in turn")?;
        for (name, of) in [("without the log", self.without_log_us), ("with the log", self.with_log_us)] {
            writeln!(
                f,
                "  {name:15}  p50 {:>9}  p99 {:>9}",
                human_duration(of.p50 * 1000),
                human_duration(of.p99 * 1000)
            )?;
        }
        write!(f, "  {:15}  p50 {:>9.2}  p99 {:>9.2}", "ratio", self.p50_ratio, self.p99_ratio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(p50: u64, p99: u64) -> LoadReport {
        LoadReport { latency_us: Summary { p50, p99, ..Summary::default() }, ..LoadReport::default() }
    }

    #[test]
    fn one_odd_run_does_not_change_the_comparison() {
        let mut comparison = Comparison {
            without_log: vec![report(10, 100), report(12, 90_000), report(11, 110)],
            with_log: vec![report(22, 55), report(20, 60), report(24, 50)],
            ..Comparison::default()
        };
        comparison.sum_up();
        assert_eq!(comparison.without_log_us, Percentiles { p50: 11, p99: 110 });
        assert_eq!(comparison.with_log_us, Percentiles { p50: 22, p99: 55 });
        assert_eq!((comparison.p50_ratio, comparison.p99_ratio), (2.0, 0.5));
    }

    #[test]
    fn one_server_has_nothing_to_compare() {
        for servers in [None, Some(SeveralServers { count: 1, with_log: true })] {
            let options = LoadOptions { nodes: 1, servers, ..LoadOptions::default() };
            let error = compare(&options, 1, |_, _| Ok(())).expect_err("refused");
            assert!(error.to_string().contains("--servers"), "{error}");
        }
    }
}
