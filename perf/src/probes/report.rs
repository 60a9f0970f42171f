//! What was measured of the probes, for people and for machines.

use std::fmt;

use serde::Serialize;

use crate::host::Host;

/// A loop may lose less than this with everything on.
pub const LOSS_GOAL_PERCENT: f64 = 3.0;
/// A record may cost at most this over an empty program at the same hook.
pub const RECORD_GOAL_NS: f64 = 150.0;

/// A series of measurements: its middle, and the quarters around it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Spread {
    /// Sums up values; zeros for none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |part: f64| values.get(((values.len().max(1) - 1) as f64 * part).round() as usize).copied();
        let at = |part| at(part).unwrap_or(0.0);
        Self { median: at(0.5), low: at(0.25), high: at(0.75) }
    }
}

/// One program. Keys are read by other programs: they stay. `None` means that it was not measured; `why` has the reason.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ProgramCost {
    pub program: String,
    pub hook: String,
    pub lane: String,
    pub workload: Option<String>,
    pub operation: Option<String>,
    pub rounds: usize,
    /// An operation, nothing attached.
    pub without_ns: Option<Spread>,
    /// An operation, this program attached.
    pub with_ns: Option<Spread>,
    /// Difference of the two, round by round.
    pub cost_ns: Option<Spread>,
    pub runs_per_operation: Option<f64>,
    pub records_per_operation: Option<f64>,
    /// Records a second into the ring, with a reader at work.
    pub records_per_second: Option<f64>,
    /// A run by the kernel's own clock.
    pub run_ns: Option<Spread>,
    /// A run of an empty program at the same hook.
    pub empty_run_ns: Option<Spread>,
    /// What a record costs over the empty program, runs that led to none included.
    pub record_ns: Option<Spread>,
    /// Cost of a program that only reserves, zeroes, stamps and submits 96 bytes at that hook: the ring's part of the
    /// cost.
    pub bare_record_ns: Option<Spread>,
    pub why: Option<String>,
}

/// A loop with everything that is on by default against nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Loss {
    pub workload: String,
    pub operation: String,
    pub rounds: usize,
    pub without_ns: Spread,
    pub with_ns: Spread,
    pub loss_percent: Spread,
    /// Loss with a program that does nothing at each hook: the cost of being called.
    pub empty_loss_percent: Spread,
    pub goal_percent: f64,
    pub is_met: bool,
}

/// A whole run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ProbesReport {
    pub host: Host,
    pub duration_s: f64,
    pub losses: Vec<Loss>,
    pub programs: Vec<ProgramCost>,
    pub record_goal_ns: f64,
    /// Programs whose records cost more.
    pub above_record_goal: Vec<String>,
    pub are_goals_met: bool,
}

impl fmt::Display for ProbesReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Host { cores, kernel, cpu_model, .. } = &self.host;
        writeln!(f, "{cores} cores of {cpu_model}, Linux {kernel}, {:.0} s\n", self.duration_s)?;
        writeln!(f, "everything that is on by default, against nothing:")?;
        for loss in &self.losses {
            writeln!(
                f,
                "  {:<10} {:>10.0} ns without, {:>10.0} ns with: loses {:>5.2} % ({:.2} to {:.2}), goal below {} %{}; \
                 empty programs at the same hooks {:.2} % ({:.2} to {:.2})",
                loss.workload,
                loss.without_ns.median,
                loss.with_ns.median,
                loss.loss_percent.median,
                loss.loss_percent.low,
                loss.loss_percent.high,
                loss.goal_percent,
                if loss.is_met { "" } else { ": missed" },
                loss.empty_loss_percent.median,
                loss.empty_loss_percent.low,
                loss.empty_loss_percent.high,
            )?;
        }
        writeln!(
            f,
            "\n{:<20} {:<10} {:>10} {:>9} {:>17} {:>6} {:>7} {:>8} {:>7} {:>9} {:>7} {:>11}",
            "program",
            "workload",
            "without/ns",
            "cost/ns",
            "quarters/ns",
            "runs",
            "records",
            "run/ns",
            "empty",
            "record/ns",
            "bare/ns",
            "records/s"
        )?;
        for cost in &self.programs {
            let (Some(without), Some(difference)) = (cost.without_ns, cost.cost_ns) else {
                writeln!(f, "{:<20} {}", cost.program, cost.why.as_deref().unwrap_or("not measured"))?;
                continue;
            };
            let number = |value: Option<f64>, digits: usize| {
                value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
            };
            let middle = |spread: Option<Spread>| number(spread.map(|spread| spread.median), 0);
            writeln!(
                f,
                "{:<20} {:<10} {:>10.0} {:>9.0} {:>17} {:>6} {:>7} {:>8} {:>7} {:>9} {:>7} {:>11}",
                cost.program,
                cost.workload.as_deref().unwrap_or("-"),
                without.median,
                difference.median,
                format!("{:.0} to {:.0}", difference.low, difference.high),
                number(cost.runs_per_operation, 1),
                number(cost.records_per_operation, 1),
                middle(cost.run_ns),
                middle(cost.empty_run_ns),
                middle(cost.record_ns),
                middle(cost.bare_record_ns),
                number(cost.records_per_second, 0),
            )?;
        }
        writeln!(
            f,
            "\nruns and records are by operation; run and empty are one run by the kernel's own clock; record is what a"
        )?;
        writeln!(
            f,
            "record costs over the empty program, bare what 96 bytes with nothing to report do at the same hook"
        )?;
        write!(f, "goal for a record: at most {} ns", self.record_goal_ns)?;
        if !self.above_record_goal.is_empty() {
            write!(f, ", missed by {}", self.above_record_goal.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Spread;

    #[test]
    fn a_spread_is_the_middle_and_the_quarters() {
        let spread = Spread::of(vec![5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!(spread, Spread { median: 3.0, low: 2.0, high: 4.0 });
        assert_eq!(Spread::of(vec![7.0]), Spread { median: 7.0, low: 7.0, high: 7.0 });
        assert_eq!(Spread::of(Vec::new()), Spread::default());
    }
}
