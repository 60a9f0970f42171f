//! What events cost, as a straight line through load runs: a fixed part, and a part for each event.

use serde::{Deserialize, Serialize};

use super::server_line::{Fit, ServerLine, ServerRun};
use crate::error::Error;

/// What is taken of a report of `tapio-perf load --json` or `tapio-perf ingest --json`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Measured {
    Load(MeasuredLoad),
    Ingest(MeasuredIngest),
}

/// What is taken of a report of `tapio-perf ingest --json`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct MeasuredIngest {
    pub nodes: usize,
    pub frames_per_second: f64,
    pub events_per_second: f64,
    pub ledger_closes: bool,
    pub server: MeasuredServer,
}

/// What is taken of a report of `tapio-perf load --json`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct MeasuredLoad {
    pub nodes: usize,
    pub events_archived: u64,
    pub events_per_second: f64,
    pub bytes_wire: u64,
    /// 0 in reports of before they were counted.
    #[serde(default)]
    pub frames: u64,
    pub ledger_closes: bool,
    pub collector: MeasuredCollector,
    pub server: MeasuredServer,
}

/// See [`MeasuredLoad`].
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct MeasuredCollector {
    pub cpu_ns_per_event: f64,
    pub rss_bytes: u64,
}

/// See [`MeasuredLoad`] and [`MeasuredIngest`].
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

/// What was measured, ready to be multiplied.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Costs {
    pub runs: usize,
    /// Cost of one collector, without the probes.
    pub collector: Line,
    pub server: ServerLine,
    /// How far the server's line is from the runs it was laid through.
    pub fit: Fit,
    /// Frames that a node sends in a second.
    pub frames: Line,
    /// The most that was seen.
    pub collector_rss_bytes: u64,
    pub server_rss_bytes: u64,
    /// Bytes that a node sends in a second: compressed, as they are archived too. Few events make small frames, which cost more.
    pub wire: Line,
}

impl Costs {
    /// The costs that these runs had. Runs of `ingest`, where there are some, say alone what a server costs.
    ///
    /// # Errors
    /// When there is no load run, one archived nothing, one was of a server elsewhere, or a ledger does not close.
    pub fn fit(runs: &[Measured]) -> Result<Self, Error> {
        let (mut loads, mut servers) = (Vec::new(), Vec::new());
        for (number, run) in (1..).zip(runs) {
            let problem = match run {
                Measured::Load(load) => load.problem(),
                Measured::Ingest(ingest) => ingest.problem(),
            };
            if let Some(problem) = problem {
                return Err(Error::Invalid(format!("run {number} {problem}")));
            }
            match run {
                Measured::Load(load) => loads.push(load),
                Measured::Ingest(ingest) => servers.push(ingest.server_run()),
            }
        }
        if loads.is_empty() {
            return Err(Error::Invalid("there is no run of tapio-perf load to learn a collector's costs from".into()));
        }
        let through = |cost: fn(&MeasuredLoad) -> f64| {
            let points = loads.iter().map(|load| (load.node_rate(), load.node_rate() * cost(load)));
            Line::through(&points.collect::<Vec<_>>())
        };
        let frames = through(|load| load.frames as f64 / load.events_archived as f64);
        let (server, fit) = match servers.is_empty() {
            true => ServerLine::of_nodes(&loads.iter().map(|load| load.server_run()).collect::<Vec<_>>()),
            false => ServerLine::through(&servers),
        };
        let of_loads = loads.iter().map(|load| load.server.rss_bytes);
        let of_ingest = runs.iter().filter_map(|run| match run {
            Measured::Ingest(ingest) => Some(ingest.server.rss_bytes),
            Measured::Load(_) => None,
        });
        Ok(Self {
            runs: runs.len(),
            collector: through(|load| load.collector.cpu_ns_per_event),
            server,
            fit,
            frames,
            collector_rss_bytes: loads.iter().map(|load| load.collector.rss_bytes).max().unwrap_or(0),
            server_rss_bytes: of_loads.chain(of_ingest).max().unwrap_or(0),
            wire: through(|load| load.bytes_wire as f64 / load.events_archived as f64),
        })
    }
}

const OPEN: &str = "has a ledger that does not close: its costs are those of other events";

impl MeasuredLoad {
    /// Why nothing can be learned from it.
    fn problem(&self) -> Option<&'static str> {
        match self {
            run if run.events_archived == 0 || run.nodes == 0 => Some("archived nothing"),
            run if !run.ledger_closes => Some(OPEN),
            run if run.server.cpu_ns_per_event <= 0.0 => Some("did not measure the server: start it without --server"),
            _ => None,
        }
    }

    /// Events a second of one node.
    fn node_rate(&self) -> f64 {
        self.events_per_second / self.nodes as f64
    }

    fn server_run(&self) -> ServerRun {
        ServerRun {
            nodes: self.nodes as f64,
            frames_per_second: self.events_per_second * self.frames as f64 / self.events_archived as f64,
            events_per_second: self.events_per_second,
            cpu_ns_per_second: self.events_per_second * self.server.cpu_ns_per_event,
        }
    }
}

impl MeasuredIngest {
    fn problem(&self) -> Option<&'static str> {
        match self {
            run if run.nodes == 0 || run.events_per_second <= 0.0 => Some("archived nothing"),
            run if !run.ledger_closes => Some(OPEN),
            _ => None,
        }
    }

    fn server_run(&self) -> ServerRun {
        ServerRun {
            nodes: self.nodes as f64,
            frames_per_second: self.frames_per_second,
            events_per_second: self.events_per_second,
            cpu_ns_per_second: self.events_per_second * self.server.cpu_ns_per_event,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Costs, Line, Measured, MeasuredCollector, MeasuredIngest, MeasuredLoad, MeasuredServer};

    fn load(rate: f64, idle: f64, event: f64) -> MeasuredLoad {
        let cost = idle / rate + event;
        MeasuredLoad {
            nodes: 1,
            events_archived: rate as u64 * 10,
            events_per_second: rate,
            bytes_wire: 10 * (4000 + rate as u64 * 30),
            frames: 10 * (5 + rate as u64 / 1000),
            ledger_closes: true,
            collector: MeasuredCollector { cpu_ns_per_event: cost, rss_bytes: 20 << 20 },
            server: MeasuredServer { cpu_ns_per_event: cost / 2.0, rss_bytes: 40 << 20 },
        }
    }

    fn run(rate: f64) -> Measured {
        Measured::Load(load(rate, 5e6, 200.0))
    }

    #[test]
    fn a_line_through_exact_points_is_found_again() {
        let costs = Costs::fit(&[run(1e3), run(1e4), run(1e5)]).expect("costs");
        assert!((costs.collector.event - 200.0).abs() < 1e-6 && (costs.collector.idle - 5e6).abs() < 1.0);
        // All runs had one node: what is not the events' is taken for the node's.
        assert!((costs.server.event - 100.0).abs() < 1e-6 && (costs.server.node - 2.5e6).abs() < 10.0);
        assert_eq!((costs.server.idle, costs.server.frame), (0.0, 0.0));
        assert!((costs.wire.event - 30.0).abs() < 1e-6 && (costs.wire.idle - 4000.0).abs() < 1e-3);
        assert!((costs.frames.event - 1e-3).abs() < 1e-9 && (costs.frames.idle - 5.0).abs() < 1e-6);
    }

    #[test]
    fn a_server_costs_what_ingest_measured() {
        let ingest = |nodes: usize, frames: f64, events: f64| {
            let (frames_per_second, events_per_second) = (nodes as f64 * frames, nodes as f64 * frames * events);
            let cost = 1e6 + nodes as f64 * 1e4 + frames_per_second * 3e4 + events_per_second * 80.0;
            let server = MeasuredServer { cpu_ns_per_event: cost / events_per_second, rss_bytes: 90 << 20 };
            Measured::Ingest(MeasuredIngest {
                nodes,
                frames_per_second,
                events_per_second,
                ledger_closes: true,
                server,
            })
        };
        let runs =
            [ingest(10, 5.0, 40.0), ingest(100, 5.0, 40.0), ingest(100, 1.0, 40.0), ingest(100, 5.0, 400.0), run(1e3)];
        let costs = Costs::fit(&runs).expect("costs");
        let server = costs.server;
        assert!((server.frame / 3e4 - 1.0).abs() < 1e-3 && (server.event / 80.0 - 1.0).abs() < 1e-3, "{server:?}");
        assert!(costs.fit.error_percent_max < 0.1 && costs.server_rss_bytes == 90 << 20, "{costs:?}");
        let error = Costs::fit(&runs[..2]).expect_err("no collector was measured");
        assert!(error.to_string().contains("tapio-perf load"), "{error}");
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
    fn runs_without_information_are_refused_with_the_reason() {
        for (change, word) in [
            ((|run| run.events_archived = 0) as fn(&mut MeasuredLoad), "archived nothing"),
            (|run| run.ledger_closes = false, "ledger"),
            (|run| run.server.cpu_ns_per_event = 0.0, "--server"),
        ] {
            let mut broken = load(1e4, 0.0, 100.0);
            change(&mut broken);
            let error = Costs::fit(&[run(1e4), Measured::Load(broken)]).expect_err("refused").to_string();
            assert!(error.contains(word) && error.contains("run 2"), "{error}");
        }
        assert!(Costs::fit(&[]).is_err());
    }
}
