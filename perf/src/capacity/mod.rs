//! Capacity planning: how many servers, how much CPU, memory, disk and network a cluster of a given size asks for.
//!
//! What enters: runs (made here, or read from `tapio-perf load --json` and `tapio-perf ingest --json`), and what the cluster is like.
//! Loads say what a collector costs, ingest what a server does. What leaves: a [`Plan`], checked by a run at the planned point.
//! What must hold: every figure follows from a measurement and an input that the report names; nothing is a rule of thumb that is
//! not said to be one.

pub mod cost;
pub mod plan;
mod report;
pub mod server_line;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Context, Error};
use crate::host::Host;
use crate::ingest::{self, Cores, FrameRate, IngestOptions, IngestReport};
use crate::load::generator::Pace;
use crate::load::{self, LoadOptions};

pub use cost::{Costs, Measured};
pub use plan::{Cluster, Plan, PlanCheck};
use server_line::{FitPoint, ServerRun};

/// Events a second of the collector that is measured.
const LOADS: [f64; 3] = [2_000.0, 20_000.0, 100_000.0];
/// The runs that measure a server: nodes, frames a second of each, events a frame. They tell the costs of a frame, a node, an event
/// and the server itself apart.
const SERVERS: [(usize, f64, usize); 6] =
    [(10, 5.0, 40), (100, 5.0, 40), (500, 5.0, 40), (1_000, 5.0, 40), (500, 1.0, 40), (100, 5.0, 800)];
/// Streams of a check at the most: with more this machine would be busy with making them.
const CHECK_NODES_MAX: f64 = 2_000.0;
/// Containers of a simulated node for each pod. A short run describes each container as often as a minute of a real
/// node's life. So a run with many more containers than a node has would make frames look too large.
const CONTAINERS_PER_POD: u64 = 2;
/// Ring size of `tapio-perf load`.
const RING_BYTES: usize = 8 << 20;
/// More than any node has.
const CONTAINERS_MAX: u64 = 10_000;

/// Where the costs come from.
#[derive(Clone, Debug)]
pub enum CostSource {
    /// Reports of `tapio-perf load --json` and `tapio-perf ingest --json`.
    Files(Vec<PathBuf>),
    /// Runs of this length: collectors at several rates, and servers with several numbers of nodes.
    Runs { duration: Duration, bin_dir: Option<PathBuf> },
}

/// What the runs of this command have in common.
struct Runs {
    duration: Duration,
    containers: usize,
    bin_dir: Option<PathBuf>,
    /// A core for the server alone, where there is more than one.
    server_cores: Option<Cores>,
}

impl Runs {
    fn new(duration: Duration, containers: usize, bin_dir: Option<PathBuf>) -> Result<Self, Error> {
        Ok(Self { duration, containers, bin_dir, server_cores: Cores::allowed()?.last_of_several() })
    }

    fn all(&self) -> Result<Vec<Measured>, Error> {
        let loads = LOADS.iter().map(|&rate| self.load(rate));
        let servers = SERVERS.iter().map(|&(nodes, frames, events)| reread(&self.ingest(nodes, frames, events)?));
        loads.chain(servers).collect()
    }

    fn load(&self, rate: f64) -> Result<Measured, Error> {
        reread(&load::run(&LoadOptions {
            nodes: 1,
            pace: Pace::PerSecond(rate),
            duration: self.duration,
            entities: self.containers,
            ring_bytes: RING_BYTES,
            seed: 1,
            bin_dir: self.bin_dir.clone(),
            ..LoadOptions::default()
        })?)
    }

    fn ingest(&self, nodes: usize, frames_per_second: f64, events_per_frame: usize) -> Result<IngestReport, Error> {
        ingest::run(&IngestOptions {
            nodes,
            frame_rate: FrameRate::PerSecond(frames_per_second),
            events_per_frame,
            duration: self.duration,
            entities: self.containers.min(ingest::ENTITIES_MAX),
            server_cores: self.server_cores.clone(),
            bin_dir: self.bin_dir.clone(),
            ..IngestOptions::default()
        })
    }

    /// Gives a server what the plan gives it.
    fn check(&self, plan: &Plan) -> Result<PlanCheck, Error> {
        let wanted = plan.point();
        let nodes = wanted.nodes.min(CHECK_NODES_MAX);
        let frames_per_node = wanted.frames_per_second / wanted.nodes;
        let events_per_frame = (wanted.events_per_second / wanted.frames_per_second).round().max(1.0);
        let report = self.ingest(nodes as usize, frames_per_node, events_per_frame as usize)?;
        if !report.ledger_closes {
            return Err(Error::Invalid("the ledger of the run that checks the plan does not close".into()));
        }
        let run = ServerRun {
            nodes,
            frames_per_second: report.frames_per_second,
            events_per_second: report.events_per_second,
            cpu_ns_per_second: report.server.cpu_percent_of_core * 1e7,
        };
        Ok(PlanCheck {
            point: FitPoint::new(&run, &plan.costs.server),
            nodes_wanted: wanted.nodes as u64,
            served: (report.frames_per_second / (nodes * frames_per_node)).min(1.0),
            ack_p99_us: report.ack_latency_us.p99,
            rss_bytes: report.server.rss_bytes,
        })
    }
}

fn read(path: &Path) -> Result<Measured, Error> {
    let text = std::fs::read_to_string(path).context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| {
        Error::Invalid(format!(
            "{}: {error}; name what tapio-perf load --json or tapio-perf ingest --json has printed",
            path.display()
        ))
    })
}

/// Takes of a report what would be taken of it out of a file.
fn reread(report: &impl serde::Serialize) -> Result<Measured, Error> {
    let value = serde_json::to_value(report).map_err(|error| Error::Invalid(error.to_string()))?;
    serde_json::from_value(value).map_err(|error| Error::Invalid(error.to_string()))
}

/// The plan for a cluster, on machines like this one. Costs that are measured here are of nodes with this cluster's pods, and the plan
/// is checked.
///
/// # Errors
/// When the cluster's description makes no sense, a file is no report, or a run fails. Also when a ledger does not close: a cost
/// would then be of events that are not there.
pub fn run(cluster: &Cluster, source: &CostSource) -> Result<Plan, Error> {
    cluster.check()?;
    let containers = cluster.pods_per_node.saturating_mul(CONTAINERS_PER_POD).clamp(1, CONTAINERS_MAX) as usize;
    match source {
        CostSource::Files(paths) => {
            let measured = paths.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
            Plan::make(cluster, &Costs::fit(&measured)?, Host::read())
        }
        CostSource::Runs { duration, bin_dir } => {
            let runs = Runs::new(*duration, containers, bin_dir.clone())?;
            let mut plan = Plan::make(cluster, &Costs::fit(&runs.all()?)?, Host::read())?;
            plan.add_check(runs.check(&plan)?);
            Ok(plan)
        }
    }
}
