//! What a server costs, laid through runs: a part for being there, and parts for each node, frame and event.
//!
//! In: runs with different numbers of nodes, frames and events. Out: the parts, and how far each run is from their sum. What must hold:
//! no part is below 0; a run counts by its relative error, so that small ones are met as well as large ones.

use serde::Serialize;

/// What one run says about a server.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ServerRun {
    pub nodes: f64,
    pub frames_per_second: f64,
    pub events_per_second: f64,
    pub cpu_ns_per_second: f64,
}

/// Cost of a second for a server, in CPU nanoseconds. A node that has few events sends as many frames as one that has more, so
/// frames cost by themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ServerLine {
    pub idle: f64,
    pub node: f64,
    pub frame: f64,
    pub event: f64,
}

/// How well a line meets the runs that it was laid through.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Fit {
    pub points: Vec<FitPoint>,
    /// The largest error.
    pub error_percent_max: f64,
}

/// One run beside its line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct FitPoint {
    pub nodes: f64,
    pub frames_per_second: f64,
    pub events_per_second: f64,
    /// Thousandths of a core.
    pub measured_cpu_milli: f64,
    pub fitted_cpu_milli: f64,
    /// By how much the line says more than was measured; below 0: less.
    pub error_percent: f64,
}

impl FitPoint {
    /// Compares what was measured with a line.
    pub fn new(run: &ServerRun, line: &ServerLine) -> Self {
        let (measured, fitted) = (run.cpu_ns_per_second, line.of(run));
        Self {
            nodes: run.nodes,
            frames_per_second: run.frames_per_second,
            events_per_second: run.events_per_second,
            measured_cpu_milli: measured / 1e6,
            fitted_cpu_milli: fitted / 1e6,
            error_percent: (fitted / measured.max(1e-9) - 1.0) * 100.0,
        }
    }
}

/// Parts of a cost: idle, node, frame, event.
const PARTS: usize = 4;

impl ServerLine {
    /// Lays the line through runs that differ in nodes, frames and events.
    pub fn through(runs: &[ServerRun]) -> (Self, Fit) {
        Self::by_parts(runs, [true; PARTS])
    }

    /// Lays the line through runs that do not tell frames from nodes, such as loads by collectors: what is no event's is a node's.
    pub fn of_nodes(runs: &[ServerRun]) -> (Self, Fit) {
        let (line, fit) = Self::by_parts(runs, [true, true, false, true]);
        let is_one_size = runs.iter().all(|run| run.nodes == runs[0].nodes);
        if !is_one_size {
            return (line, fit);
        }
        // Nothing tells the server's own part from its nodes'.
        Self::by_parts(runs, [false, true, false, true])
    }

    /// Lays the line by some of the parts. One that would be below 0 is left out.
    fn by_parts(runs: &[ServerRun], mut parts: [bool; PARTS]) -> (Self, Fit) {
        let mut line = Self::default();
        while parts.contains(&true) {
            let found = least_squares(runs, parts);
            let negative = (0..PARTS).filter(|&part| parts[part] && found.is_none_or(|found| found[part] < 0.0));
            // The event's part last: without it nothing grows.
            let Some(least) = negative.min_by(|&a, &b| {
                let of = |part: usize| found.map_or(part as f64, |found| found[part]);
                of(a).total_cmp(&of(b))
            }) else {
                let [idle, node, frame, event] = found.unwrap_or_default();
                line = Self { idle, node, frame, event };
                break;
            };
            parts[least] = false;
        }
        let points: Vec<FitPoint> = runs.iter().map(|run| FitPoint::new(run, &line)).collect();
        let error_percent_max = points.iter().map(|point| point.error_percent.abs()).fold(0.0, f64::max);
        (line, Fit { points, error_percent_max })
    }

    /// Returns the cost of a second like that of a run.
    pub fn of(&self, run: &ServerRun) -> f64 {
        self.at(run.nodes, run.frames_per_second, run.events_per_second)
    }

    /// Returns the cost of a second with this many nodes, frames and events.
    pub fn at(&self, nodes: f64, frames_per_second: f64, events_per_second: f64) -> f64 {
        self.idle + self.node * nodes + self.frame * frames_per_second + self.event * events_per_second
    }
}

/// The parts whose sum has the least relative error over the runs; none where the runs leave it open.
fn least_squares(runs: &[ServerRun], parts: [bool; PARTS]) -> Option<[f64; PARTS]> {
    // The normal equations, with columns and costs scaled to 1 so that what is small beside 1 is nothing.
    let columns = |run: &ServerRun| [1.0, run.nodes, run.frames_per_second, run.events_per_second];
    let most = |of: &dyn Fn(&ServerRun) -> f64| runs.iter().map(of).fold(f64::MIN_POSITIVE, f64::max);
    let cost_max = most(&|run| run.cpu_ns_per_second);
    let scale: [f64; PARTS] = std::array::from_fn(|part| most(&|run| columns(run)[part]));
    let used: Vec<usize> = (0..PARTS).filter(|&part| parts[part]).collect();
    let mut equations = [[0.0; PARTS + 1]; PARTS];
    for run in runs {
        let weight = cost_max / run.cpu_ns_per_second.max(1.0);
        let term = |part: usize| columns(run)[part] / scale[part] * weight;
        for &row in &used {
            used.iter().for_each(|&column| equations[row][column] += term(row) * term(column));
            equations[row][PARTS] += term(row);
        }
    }
    for (step, &column) in used.iter().enumerate() {
        let by_size = |a: &&usize, b: &&usize| equations[**a][column].abs().total_cmp(&equations[**b][column].abs());
        let pivot = *used[step..].iter().max_by(by_size)?;
        equations.swap(column, pivot);
        if equations[column][column].abs() < 1e-9 {
            return None;
        }
        let solved = equations[column];
        for &row in used.iter().filter(|&&row| row != column) {
            let factor = equations[row][column] / solved[column];
            equations[row].iter_mut().zip(solved).for_each(|(value, other)| *value -= factor * other);
        }
    }
    let mut found = [0.0; PARTS];
    for &part in &used {
        found[part] = equations[part][PARTS] / equations[part][part] * cost_max / scale[part];
    }
    found.iter().all(|value| value.is_finite()).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::{ServerLine, ServerRun};

    fn run(line: &ServerLine, nodes: f64, frames: f64, events: f64) -> ServerRun {
        let (frames_per_second, events_per_second) = (nodes * frames, nodes * frames * events);
        let cpu_ns_per_second = line.at(nodes, frames_per_second, events_per_second);
        ServerRun { nodes, frames_per_second, events_per_second, cpu_ns_per_second }
    }

    const RUNS: [(f64, f64, f64); 6] = [
        (10.0, 5.0, 40.0),
        (100.0, 5.0, 40.0),
        (500.0, 5.0, 40.0),
        (100.0, 1.0, 40.0),
        (100.0, 5.0, 400.0),
        (1000.0, 5.0, 40.0),
    ];

    #[test]
    fn all_four_parts_are_told_apart() {
        let line = ServerLine { idle: 8e6, node: 2e4, frame: 4e4, event: 90.0 };
        let runs = RUNS.map(|(nodes, frames, events)| run(&line, nodes, frames, events));
        let (found, fit) = ServerLine::through(&runs);
        for (found, wanted) in
            [(found.idle, line.idle), (found.node, line.node), (found.frame, line.frame), (found.event, line.event)]
        {
            assert!((found / wanted - 1.0).abs() < 1e-3, "{found} for {wanted}");
        }
        assert!(fit.error_percent_max < 0.01 && fit.points.len() == 6, "{fit:?}");
    }

    #[test]
    fn runs_on_no_line_have_an_error() {
        let line = ServerLine { idle: 8e6, node: 2e4, frame: 4e4, event: 90.0 };
        let mut runs = RUNS.map(|(nodes, frames, events)| run(&line, nodes, frames, events));
        runs[1].cpu_ns_per_second *= 1.5;
        let (_, fit) = ServerLine::through(&runs);
        assert!(fit.error_percent_max > 5.0, "{fit:?}");
    }

    #[test]
    fn no_part_is_below_zero() {
        let runs = [(10.0, 9e6), (100.0, 8e6), (400.0, 1e6)].map(|(nodes, cpu_ns_per_second)| ServerRun {
            nodes,
            frames_per_second: nodes * 5.0,
            events_per_second: nodes * 200.0,
            cpu_ns_per_second,
        });
        let (line, _) = ServerLine::through(&runs);
        assert!([line.idle, line.node, line.frame, line.event].iter().all(|&part| part >= 0.0), "{line:?}");
        assert!(line.at(10.0, 50.0, 2000.0) > 0.0);
    }

    #[test]
    fn loads_tell_nodes_from_events() {
        let line = ServerLine { idle: 2e7, node: 3e6, frame: 0.0, event: 250.0 };
        let runs = [(1.0, 2e3), (1.0, 2e4), (1.0, 1e5), (4.0, 8e3)].map(|(nodes, events_per_second)| ServerRun {
            nodes,
            frames_per_second: 0.0,
            events_per_second,
            cpu_ns_per_second: line.at(nodes, 0.0, events_per_second),
        });
        let (found, _) = ServerLine::of_nodes(&runs);
        assert!((found.idle / 2e7 - 1.0).abs() < 1e-3 && (found.node / 3e6 - 1.0).abs() < 1e-3, "{found:?}");
        assert!((found.event / 250.0 - 1.0).abs() < 1e-3 && found.frame == 0.0, "{found:?}");
    }
}
