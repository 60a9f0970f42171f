//! What a run of queries says, for programs and for people.

use std::fmt;

use serde::Serialize;
use tapio_wire::program::units::{human_bytes, human_duration};

use crate::host::Host;

/// How long an answer took, the start of `tapioctl` included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Waited {
    /// Until the first byte.
    pub first_us: u64,
    pub total_us: u64,
}

impl Waited {
    /// The medians of several answers.
    pub(super) fn median(answers: &[Self]) -> Self {
        let middle = |of: fn(&Self) -> u64| {
            let mut sorted: Vec<u64> = answers.iter().map(of).collect();
            sorted.sort_unstable();
            sorted.get(sorted.len() / 2).copied().unwrap_or(0)
        };
        Self { first_us: middle(|answer| answer.first_us), total_us: middle(|answer| answer.total_us) }
    }
}

/// How long the answers to one question took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct QueryTimes {
    pub name: String,
    pub command: String,
    pub answer_bytes: u64,
    pub cold: Waited,
    pub warm: Waited,
}

/// A run's report. Keys are read by other programs: they stay.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct QueryReport {
    pub nodes: usize,
    pub events: u64,
    pub archive_bytes: u64,
    /// Until a server on this archive was ready: recovery and replay.
    pub restart_ms: u64,
    pub repeats: usize,
    /// The most the server ever had.
    pub server_rss_bytes: u64,
    pub questions: Vec<QueryTimes>,
    pub host: Host,
    pub revision: String,
}

impl fmt::Display for QueryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} events of {} nodes, {} on disk; {} cores of {}, Linux {}",
            self.events,
            self.nodes,
            human_bytes(self.archive_bytes),
            self.host.cores,
            self.host.cpu_model,
            self.host.kernel
        )?;
        writeln!(
            f,
            "ready {} after its start, server {} at the most; warm: median of {}",
            human_duration(self.restart_ms * 1_000_000),
            human_bytes(self.server_rss_bytes),
            self.repeats
        )?;
        write!(
            f,
            "{:<20} {:>11} {:>11} {:>11} {:>11} {:>10}",
            "QUESTION", "COLD, FIRST", "TO ITS END", "WARM, FIRST", "TO ITS END", "ANSWER"
        )?;
        for question in &self.questions {
            let time = |us: u64| human_duration(us * 1000);
            write!(
                f,
                "\n{:<20} {:>11} {:>11} {:>11} {:>11} {:>10}",
                question.name,
                time(question.cold.first_us),
                time(question.cold.total_us),
                time(question.warm.first_us),
                time(question.warm.total_us),
                human_bytes(question.answer_bytes)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Waited;

    #[test]
    fn the_median_is_of_each_figure_by_itself() {
        let answers = [(5, 9), (1, 20), (3, 10)].map(|(first_us, total_us)| Waited { first_us, total_us });
        assert_eq!(Waited::median(&answers), Waited { first_us: 3, total_us: 10 });
        assert_eq!(Waited::median(&[]), Waited::default());
    }
}
