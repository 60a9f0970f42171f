//! Capacity planning: how many servers, how much CPU, memory, disk and network a cluster of a given size asks for.
//!
//! What enters: load runs (made here, or read from `tapio-perf load --json`), and what the cluster is like. What leaves: a [`Plan`].
//! What must hold: every figure follows from a measurement and an input that the report names; nothing is a rule of thumb that is
//! not said to be one.

pub mod cost;
pub mod plan;
mod report;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Context, Error};
use crate::host::Host;
use crate::load::generator::Pace;
use crate::load::{self, LoadOptions};

pub use cost::{Costs, Measured};
pub use plan::{Cluster, Plan};

/// Nodes, and events a second of all of them, of the runs made here: so that what is an event's, a node's and the server's own is
/// known apart.
const RUNS: [(usize, f64); 4] = [(1, 2_000.0), (1, 20_000.0), (1, 100_000.0), (4, 8_000.0)];
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
    /// Reports of `tapio-perf load --json`.
    Files(Vec<PathBuf>),
    /// Runs of this length, at several rates and with one node and more.
    Runs { duration: Duration, bin_dir: Option<PathBuf> },
}

/// Measures on a node with this many containers, or reads what was measured.
///
/// # Errors
/// When a file is no report, a run fails, or a ledger does not close: a cost would then be of events that are not there.
pub fn costs(source: &CostSource, containers: usize) -> Result<Costs, Error> {
    let measured = match source {
        CostSource::Files(paths) => paths.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?,
        CostSource::Runs { duration, bin_dir } => RUNS
            .iter()
            .map(|&(nodes, rate)| measure(nodes, rate, *duration, containers, bin_dir.clone()))
            .collect::<Result<Vec<_>, _>>()?,
    };
    Costs::fit(&measured)
}

fn read(path: &Path) -> Result<Measured, Error> {
    let text = std::fs::read_to_string(path).context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| {
        Error::Invalid(format!("{}: {error}; name what tapio-perf load --json has printed", path.display()))
    })
}

fn measure(
    nodes: usize,
    rate: f64,
    duration: Duration,
    containers: usize,
    bin_dir: Option<PathBuf>,
) -> Result<Measured, Error> {
    let report = load::run(&LoadOptions {
        nodes,
        pace: Pace::PerSecond(rate),
        duration,
        entities: containers,
        ring_bytes: RING_BYTES,
        seed: 1,
        bin_dir,
        ..LoadOptions::default()
    })?;
    let value = serde_json::to_value(&report).map_err(|error| Error::Invalid(error.to_string()))?;
    serde_json::from_value(value).map_err(|error| Error::Invalid(error.to_string()))
}

/// The plan for a cluster, on machines like this one.
///
/// # Errors
/// As [`costs`], and when the cluster's description makes no sense.
pub fn run(cluster: &Cluster, source: &CostSource) -> Result<Plan, Error> {
    cluster.check()?;
    let containers = cluster.pods_per_node.saturating_mul(CONTAINERS_PER_POD).clamp(1, CONTAINERS_MAX) as usize;
    Plan::make(cluster, &costs(source, containers)?, Host::read())
}
