//! What events cost, as a straight line through load runs: a fixed part, and a part for each event.

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// What is taken of a report of `tapio-perf load --json`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Measured {
    pub nodes: usize,
    pub events_archived: u64,
    pub events_per_second: f64,
    pub bytes_wire: u64,
    pub ledger_closes: bool,
    pub collector: MeasuredCollector,
    pub server: MeasuredServer,
}

/// See [`Measured`].
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct MeasuredCollector {
    pub cpu_ns_per_event: f64,
    pub rss_bytes: u64,
}

/// See [`Measured`].
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct MeasuredServer {
    pub cpu_ns_per_event: f64,
    pub rss_bytes: u64,
}

/// Cost of a second: a fixed part, and a part for each event in it. CPU is in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Line {
    pub idle: f64,
    pub event: f64,
}

impl Line {
    /// The line through pairs of events a second and what that second cost that misses them least; never below 0.
    fn through(points: &[(f64, f64)]) -> Self {
        let count = points.len() as f64;
        let mean = |value: fn(&(f64, f64)) -> f64| points.iter().map(value).sum::<f64>() / count;
        let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
        let spread: f64 = points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
        let common: f64 = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
        let event = if spread > 0.0 { common / spread } else { 0.0 };
        let idle = y_mean - event * x_mean;
        if event > 0.0 && idle >= 0.0 {
            return Self { idle, event };
        }
        // Through the origin: one run only, or runs that disagree.
        let squares: f64 = points.iter().map(|(x, _)| x * x).sum();
        Self { idle: 0.0, event: points.iter().map(|(x, y)| x * y).sum::<f64>() / squares.max(1e-9) }
    }

    /// Returns the cost of a second with this many events.
    pub fn at(self, events_per_second: f64) -> f64 {
        self.idle + self.event * events_per_second
    }
}

/// Cost of a second for a server, in CPU nanoseconds: a fixed part, and parts for each node that ships and each event. A node
/// that has few events sends as many frames as one that has more, so nodes cost by themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ServerLine {
    pub idle: f64,
    pub node: f64,
    pub event: f64,
}

impl ServerLine {
    /// Fits the line to runs, each as nodes, events a second and CPU nanoseconds a second; never below 0.
    fn through(runs: &[[f64; 3]]) -> Self {
        if let Some([idle, node, event]) = least_squares(runs)
            && idle >= 0.0
            && node >= 0.0
            && event > 0.0
        {
            return Self { idle, node, event };
        }
        // Runs with the same number of nodes do not show which part is a node's: all of it may be.
        let event = Line::through(&runs.iter().map(|&[_, rate, cost]| (rate, cost)).collect::<Vec<_>>()).event;
        let of_node = |&[nodes, rate, cost]: &[f64; 3]| ((cost - event * rate) / nodes).max(0.0);
        Self { idle: 0.0, node: runs.iter().map(of_node).sum::<f64>() / runs.len() as f64, event }
    }

    /// Returns the cost of a second with this many nodes and events.
    pub fn at(self, nodes: f64, events_per_second: f64) -> f64 {
        self.idle + self.node * nodes + self.event * events_per_second
    }
}

/// `a + b·x + c·y = z` with the least error over rows of x, y, z; none where the rows leave it open.
fn least_squares(rows: &[[f64; 3]]) -> Option<[f64; 3]> {
    // The normal equations, with x and y scaled to 1 so that what is small beside 1 is nothing.
    let most = |column: usize| rows.iter().map(|row| row[column]).fold(f64::MIN_POSITIVE, f64::max);
    let scale = [1.0, most(0), most(1)];
    let mut equations = [[0.0; 4]; 3];
    for &[x, y, z] in rows {
        let terms = [1.0, x / scale[1], y / scale[2]];
        for (equation, factor) in equations.iter_mut().zip(terms) {
            for (sum, term) in equation.iter_mut().zip([terms[0], terms[1], terms[2], z]) {
                *sum += factor * term;
            }
        }
    }
    for column in 0..3 {
        let pivot = (column..3).max_by(|&a, &b| equations[a][column].abs().total_cmp(&equations[b][column].abs()))?;
        equations.swap(column, pivot);
        if equations[column][column].abs() < 1e-9 {
            return None;
        }
        let solved = equations[column];
        for (row, equation) in equations.iter_mut().enumerate() {
            if row != column {
                let factor = equation[column] / solved[column];
                equation.iter_mut().zip(solved).for_each(|(value, other)| *value -= factor * other);
            }
        }
    }
    Some([0, 1, 2].map(|index| equations[index][3] / equations[index][index] / scale[index]))
}

/// What was measured, ready to be multiplied.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Costs {
    pub runs: usize,
    /// Cost of one collector, without the probes.
    pub collector: Line,
    pub server: ServerLine,
    /// The most that was seen.
    pub collector_rss_bytes: u64,
    pub server_rss_bytes: u64,
    /// Bytes that a node sends in a second: compressed, as they are archived too. Few events make small frames, which cost more.
    pub wire: Line,
}

impl Costs {
    /// The costs that these runs had.
    ///
    /// # Errors
    /// When there is no run, one archived nothing, one was of a server elsewhere, or a ledger does not close.
    pub fn fit(runs: &[Measured]) -> Result<Self, Error> {
        for (number, run) in (1..).zip(runs) {
            let problem = match run {
                run if run.events_archived == 0 || run.nodes == 0 => "archived nothing",
                run if !run.ledger_closes => "has a ledger that does not close: its costs are those of other events",
                run if run.server.cpu_ns_per_event <= 0.0 => "did not measure the server: start it without --server",
                _ => continue,
            };
            return Err(Error::Invalid(format!("run {number} {problem}")));
        }
        if runs.is_empty() {
            return Err(Error::Invalid("there is no run to learn costs from".into()));
        }
        let of_collector = |run: &Measured| {
            let rate = run.events_per_second / run.nodes as f64;
            (rate, rate * run.collector.cpu_ns_per_event)
        };
        let of_wire = |run: &Measured| {
            let rate = run.events_per_second / run.nodes as f64;
            (rate, rate * run.bytes_wire as f64 / run.events_archived as f64)
        };
        let of_server = |run: &Measured| {
            let cost = run.events_per_second * run.server.cpu_ns_per_event;
            [run.nodes as f64, run.events_per_second, cost]
        };
        Ok(Self {
            runs: runs.len(),
            collector: Line::through(&runs.iter().map(of_collector).collect::<Vec<_>>()),
            server: ServerLine::through(&runs.iter().map(of_server).collect::<Vec<_>>()),
            collector_rss_bytes: runs.iter().map(|run| run.collector.rss_bytes).max().unwrap_or(0),
            server_rss_bytes: runs.iter().map(|run| run.server.rss_bytes).max().unwrap_or(0),
            wire: Line::through(&runs.iter().map(of_wire).collect::<Vec<_>>()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Costs, Line, Measured, MeasuredCollector, MeasuredServer, ServerLine};

    pub fn run(rate: f64, idle: f64, event: f64) -> Measured {
        let cost = idle / rate + event;
        Measured {
            nodes: 1,
            events_archived: rate as u64 * 10,
            events_per_second: rate,
            bytes_wire: 10 * (4000 + rate as u64 * 30),
            ledger_closes: true,
            collector: MeasuredCollector { cpu_ns_per_event: cost, rss_bytes: 20 << 20 },
            server: MeasuredServer { cpu_ns_per_event: cost / 2.0, rss_bytes: 40 << 20 },
        }
    }

    #[test]
    fn a_line_through_exact_points_is_found_again() {
        let costs = Costs::fit(&[run(1e3, 5e6, 200.0), run(1e4, 5e6, 200.0), run(1e5, 5e6, 200.0)]).expect("costs");
        assert!((costs.collector.event - 200.0).abs() < 1e-6 && (costs.collector.idle - 5e6).abs() < 1.0);
        // All runs had one node: what is not the events' is taken for the node's.
        assert!((costs.server.event - 100.0).abs() < 1e-6 && (costs.server.node - 2.5e6).abs() < 10.0);
        assert_eq!(costs.server.idle, 0.0);
        assert!((costs.wire.event - 30.0).abs() < 1e-6 && (costs.wire.idle - 4000.0).abs() < 1e-3);
    }

    #[test]
    fn one_run_has_no_idle_part_or_negative_line() {
        let line = Line::through(&[(1000.0, 2e6)]);
        assert_eq!((line.idle, line.event), (0.0, 2000.0));
        let line = Line::through(&[(10.0, 0.0), (20.0, 100.0)]);
        assert!(line.idle == 0.0 && line.event > 0.0, "{line:?}");
        let line = Line::through(&[(10.0, 100.0), (20.0, 50.0)]);
        assert!(line.idle == 0.0 && line.event > 0.0, "{line:?}");
    }

    #[test]
    fn costs_of_server_nodes_and_events_are_separated() {
        let true_line = ServerLine { idle: 2e7, node: 3e6, event: 250.0 };
        let runs = [(1.0, 2e3), (1.0, 2e4), (1.0, 1e5), (4.0, 8e3)];
        let found = ServerLine::through(&runs.map(|(nodes, rate)| [nodes, rate, true_line.at(nodes, rate)]));
        assert!((found.idle / 2e7 - 1.0).abs() < 1e-6, "{found:?}");
        assert!((found.node / 3e6 - 1.0).abs() < 1e-6 && (found.event / 250.0 - 1.0).abs() < 1e-6, "{found:?}");
        // Runs that disagree give no negative cost.
        let found = ServerLine::through(&[[1.0, 1e3, 9e6], [1.0, 1e4, 8e6], [4.0, 4e3, 1e6]]);
        assert!(found.idle >= 0.0 && found.node >= 0.0 && found.event > 0.0, "{found:?}");
    }

    #[test]
    fn runs_without_information_are_refused_with_the_reason() {
        for (change, word) in [
            ((|run| run.events_archived = 0) as fn(&mut Measured), "archived nothing"),
            (|run| run.ledger_closes = false, "ledger"),
            (|run| run.server.cpu_ns_per_event = 0.0, "--server"),
        ] {
            let mut broken = run(1e4, 0.0, 100.0);
            change(&mut broken);
            let error = Costs::fit(&[run(1e4, 0.0, 100.0), broken]).expect_err("refused").to_string();
            assert!(error.contains(word) && error.contains("run 2"), "{error}");
        }
        assert!(Costs::fit(&[]).is_err());
    }
}
