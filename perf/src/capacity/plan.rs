//! From costs and a cluster to a plan: multiplication, and where it is rounded.

use std::time::Duration;

use serde::Serialize;

use super::cost::Costs;
use super::server_line::{FitPoint, ServerRun};
use crate::error::Error;
use crate::host::Host;

/// Replicas that the deployment may have.
pub const REPLICAS_MAX: u64 = 10;
/// A segment's size by default; an archive is cut into such.
const SEGMENT_BYTES: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

/// What a cluster is like.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cluster {
    pub nodes: u64,
    pub pods_per_node: u64,
    /// Events a second of a node, by day's average.
    pub events_per_node: f64,
    /// How much more there may be for minutes.
    pub peak_factor: f64,
    /// How long events are kept.
    pub retention_s: u64,
    /// Cores that one server may use.
    pub server_cores: f64,
    /// Share of these cores that may be used at the peak.
    pub utilisation: f64,
    /// What the probes take in the kernel for an event: `tapio-perf probes`.
    pub probe_ns_per_event: f64,
}

impl Cluster {
    /// Whether it can be planned for.
    ///
    /// # Errors
    /// With the value and what it may be.
    pub fn check(&self) -> Result<(), Error> {
        let problem = if self.nodes == 0 {
            "--nodes must be at least 1"
        } else if !(self.events_per_node > 0.0 && self.events_per_node.is_finite()) {
            "--events-per-node must be above 0"
        } else if !(self.peak_factor >= 1.0 && self.peak_factor.is_finite()) {
            "--peak must be at least 1"
        } else if !(self.utilisation > 0.0 && self.utilisation <= 1.0) {
            "--utilisation must be above 0 and up to 1"
        } else if !(self.server_cores > 0.0 && self.server_cores.is_finite()) {
            "--server-cores must be above 0"
        } else if self.retention_s < 60 {
            "--retention must be at least 1m"
        } else {
            return Ok(());
        };
        Err(Error::Invalid(problem.into()))
    }
}

/// What a program is to be given.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Needs {
    /// CPU on average.
    pub cpu_milli: u64,
    /// CPU at the peak; for a server, with one replica missing.
    pub cpu_milli_peak: u64,
    pub memory_request_mib: u64,
    pub memory_limit_mib: u64,
}

/// What a server did with as many nodes as the plan gives it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PlanCheck {
    /// How the plan's line compares with what was measured.
    pub point: FitPoint,
    /// Nodes that the plan wanted to be checked with: more than there are where the machine could not.
    pub nodes_wanted: u64,
    /// Share of the frames that were offered and acknowledged in time; below 1 the server, or this machine, was too slow.
    pub served: f64,
    pub ack_p99_us: u64,
    pub rss_bytes: u64,
}

/// A plan. Keys are read by other programs: they stay.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    pub cluster: Cluster,
    pub costs: Costs,
    pub host: Host,
    pub events_per_second: f64,
    pub events_per_second_peak: f64,
    /// Nodes that one server can take at their peak.
    pub server_nodes_max: u64,
    /// Frames that each of them then sends.
    pub node_frames_per_second_peak: f64,
    /// A run at the planned point, or as close to it as this machine gets; none where costs were read from files.
    pub check: Option<PlanCheck>,
    /// Enough for the peak while one is missing.
    pub server_replicas: u64,
    pub server: Needs,
    pub collector: Needs,
    /// Archive size of one server for the wanted retention, in whole segments and with one replica missing.
    pub archive_max_bytes: u64,
    pub archive_bytes_per_day: u64,
    /// What a node sends, and what all servers together receive.
    pub node_bytes_per_second: u64,
    pub node_bytes_per_second_peak: u64,
    pub server_bytes_per_second_peak: u64,
    /// What to look at before this is done.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Multiplies.
    ///
    /// # Errors
    /// When a single server cannot even be idle within its cores.
    pub fn make(cluster: &Cluster, costs: &Costs, host: Host) -> Result<Self, Error> {
        let average = cluster.events_per_node * cluster.nodes as f64;
        let peak = average * cluster.peak_factor;
        let nodes = cluster.nodes as f64;
        let room = cluster.server_cores * cluster.utilisation * 1e9 - costs.server.idle;
        // A frame has at least an event.
        let frames = |rate: f64| costs.frames.at(rate).min(rate);
        let frames_peak = frames(peak / nodes);
        let of_one_node = costs.server.node + costs.server.frame * frames_peak + costs.server.event * peak / nodes;
        let nodes_max = (room / of_one_node).floor();
        if nodes_max < 1.0 {
            return Err(Error::Invalid(format!(
                "a server with {} cores at {:.0} % cannot take a single node at its peak; give it more",
                cluster.server_cores,
                cluster.utilisation * 100.0
            )));
        }
        let needed = ((nodes / nodes_max).ceil() as u64).max(1);
        let replicas = needed + 1;
        let of_server = |count: u64, rate: f64| {
            let share = nodes / count as f64;
            milli(costs.server.at(share, frames(rate / nodes) * share, rate / count as f64))
        };
        let server = Needs {
            cpu_milli: of_server(replicas, average),
            cpu_milli_peak: of_server(needed, peak),
            memory_request_mib: mib(costs.server_rss_bytes as f64 * 1.5),
            memory_limit_mib: mib(costs.server_rss_bytes as f64 * 3.0),
        };
        let of_node = |rate: f64| milli(costs.collector.at(rate) + cluster.probe_ns_per_event * rate);
        let collector = Needs {
            cpu_milli: of_node(cluster.events_per_node),
            cpu_milli_peak: of_node(cluster.events_per_node * cluster.peak_factor),
            memory_request_mib: mib(costs.collector_rss_bytes as f64 * 1.25),
            memory_limit_mib: mib(costs.collector_rss_bytes as f64 * 2.0),
        };
        let of_wire = |rate: f64| costs.wire.at(rate);
        let bytes_per_second = cluster.nodes as f64 * of_wire(cluster.events_per_node);
        let kept = bytes_per_second * cluster.retention_s as f64 / needed as f64;
        // The oldest segment goes as a whole and the newest is reserved as a whole.
        let segments = (kept / SEGMENT_BYTES as f64).ceil() as u64 + 2;
        let mut plan = Self {
            cluster: cluster.clone(),
            costs: costs.clone(),
            host,
            events_per_second: average,
            events_per_second_peak: peak,
            server_nodes_max: nodes_max as u64,
            node_frames_per_second_peak: frames_peak,
            check: None,
            server_replicas: replicas,
            server,
            collector,
            archive_max_bytes: segments * SEGMENT_BYTES,
            archive_bytes_per_day: (bytes_per_second * DAY_S) as u64,
            node_bytes_per_second: of_wire(cluster.events_per_node) as u64,
            node_bytes_per_second_peak: of_wire(peak / cluster.nodes as f64) as u64,
            server_bytes_per_second_peak: (cluster.nodes as f64 * of_wire(peak / cluster.nodes as f64)) as u64,
            warnings: Vec::new(),
        };
        plan.warn();
        Ok(plan)
    }

    /// What one server is to take at the peak, while one is missing.
    pub fn point(&self) -> ServerRun {
        let nodes = (self.cluster.nodes as f64 / (self.server_replicas - 1) as f64).ceil();
        let rate = self.events_per_second_peak / self.cluster.nodes as f64;
        ServerRun {
            nodes,
            frames_per_second: nodes * self.node_frames_per_second_peak,
            events_per_second: nodes * rate,
            cpu_ns_per_second: 0.0,
        }
    }

    /// Adds what a run at that point showed, and warns where it shows that the plan is wrong.
    pub fn add_check(&mut self, check: PlanCheck) {
        if check.served < SERVED_MIN {
            self.warnings.push(format!(
                "with {:.0} nodes only {:.0} % of the frames were acknowledged in time: this machine, or a server, is too slow",
                check.point.nodes,
                check.served * 100.0
            ));
        }
        if check.point.error_percent < -CHECK_ERROR_PERCENT_MAX {
            self.warnings.push(format!(
                "with {:.0} nodes a server took {:.0} thousandths of a core, and the plan says {:.0}: give it more",
                check.point.nodes, check.point.measured_cpu_milli, check.point.fitted_cpu_milli
            ));
        }
        self.check = Some(check);
    }

    fn warn(&mut self) {
        if self.costs.fit.error_percent_max > FIT_ERROR_PERCENT_MAX {
            self.warnings.push(format!(
                "the line misses a run by {:.0} %: measure again with nothing else running",
                self.costs.fit.error_percent_max
            ));
        }
        if self.server_replicas > REPLICAS_MAX {
            self.warnings.push(format!(
                "{} servers are more than the {REPLICAS_MAX} of the deployment: give each more than {} cores, or sample the \
                 bulk lane (collector.sampling_rate)",
                self.server_replicas, self.cluster.server_cores
            ));
        }
        if self.collector.cpu_milli > BUDGET_MILLI {
            self.warnings.push(format!(
                "a collector needs {} thousandths of a core on average and has {BUDGET_MILLI} by default: raise \
                 resources.max_cpu_milli, or the governor leaves bulk events out",
                self.collector.cpu_milli
            ));
        }
        if self.costs.runs < 2 {
            self.warnings.push(
                "one run only: what a program costs while nothing happens is taken for a cost of events; measure at a \
                 second rate"
                    .into(),
            );
        }
    }

    /// How long events are kept, for people.
    pub fn retention(&self) -> Duration {
        Duration::from_secs(self.cluster.retention_s)
    }
}

const DAY_S: f64 = 86_400.0;
/// A line that misses a run by more says little.
const FIT_ERROR_PERCENT_MAX: f64 = 30.0;
/// By how much less a plan may say than the run at its point shows.
const CHECK_ERROR_PERCENT_MAX: f64 = 20.0;
/// Share of the frames that must be acknowledged in time.
const SERVED_MIN: f64 = 0.97;
/// `resources.max_cpu_milli` of a collector by default.
const BUDGET_MILLI: u64 = 10;

/// CPU nanoseconds a second as thousandths of a core, rounded up.
fn milli(ns: f64) -> u64 {
    (ns / 1e6).ceil() as u64
}

/// Rounded up to 16 MiB.
fn mib(bytes: f64) -> u64 {
    ((bytes / MIB as f64).ceil().max(1.0) as u64).div_ceil(16) * 16
}

#[cfg(test)]
mod tests {
    use super::{Cluster, Plan, PlanCheck};
    use crate::capacity::cost::{Costs, Line};
    use crate::capacity::server_line::{Fit, FitPoint, ServerLine};
    use crate::host::Host;

    fn cluster() -> Cluster {
        Cluster {
            nodes: 100,
            pods_per_node: 30,
            events_per_node: 500.0,
            peak_factor: 4.0,
            retention_s: 86_400,
            server_cores: 0.5,
            utilisation: 0.6,
            probe_ns_per_event: 400.0,
        }
    }

    fn costs() -> Costs {
        Costs {
            runs: 3,
            collector: Line { idle: 4e6, event: 1000.0 },
            server: ServerLine { idle: 1e7, node: 5e4, frame: 1e4, event: 1000.0 },
            fit: Fit::default(),
            frames: Line { idle: 3.0, event: 0.001 },
            collector_rss_bytes: 20 << 20,
            server_rss_bytes: 40 << 20,
            wire: Line { idle: 2000.0, event: 40.0 },
        }
    }

    fn plan(cluster: &Cluster) -> Plan {
        Plan::make(cluster, &costs(), Host::default()).expect("a plan")
    }

    #[test]
    fn servers_are_enough_for_the_peak_while_one_is_missing() {
        let plan = plan(&cluster());
        assert_eq!((plan.events_per_second, plan.events_per_second_peak), (50_000.0, 200_000.0));
        // 0.3 cores less 0.01 for being there; a node is 0.05 ms, 5 frames at 10 µs and 2,000 events at 1 µs.
        assert_eq!(plan.server_nodes_max, 138);
        assert_eq!(plan.server_replicas, 2);
        // 50 nodes with 25,000 events a second each on average, all 100 with 200,000 on the one that is left.
        assert_eq!((plan.server.cpu_milli, plan.server.cpu_milli_peak), (40, 220));
        let big = self::plan(&Cluster { nodes: 1000, ..cluster() });
        assert_eq!(big.server_replicas, 9);
        assert!(big.server.cpu_milli_peak as f64 <= 0.5 * 0.6 * 1000.0);
    }

    #[test]
    fn a_check_warns_when_the_plan_is_wrong() {
        let plan = plan(&Cluster { nodes: 1000, ..cluster() });
        let point = plan.point();
        assert_eq!((point.nodes, point.frames_per_second, point.events_per_second), (125.0, 625.0, 250_000.0));
        let check = |measured_cpu_milli: f64, served: f64| {
            let run = super::ServerRun { cpu_ns_per_second: measured_cpu_milli * 1e6, ..point };
            let point = FitPoint::new(&run, &plan.costs.server);
            let mut checked = plan.clone();
            let warnings = checked.warnings.len();
            checked.add_check(PlanCheck { point, nodes_wanted: 125, served, ..PlanCheck::default() });
            checked.warnings.split_off(warnings)
        };
        // The line says 10 + 125 × 2.1 = 272.5.
        assert!(check(272.0, 1.0).is_empty() && check(200.0, 1.0).is_empty());
        assert!(check(400.0, 1.0)[0].contains("400 thousandths of a core, and the plan says 272"));
        assert!(check(272.0, 0.8)[0].contains("80 % of the frames"));
    }

    #[test]
    fn a_collector_pays_for_its_probes_too() {
        let plan = plan(&cluster());
        // 4 ms for being there, and 1.4 µs for each of 500 (2,000 at the peak).
        assert_eq!((plan.collector.cpu_milli, plan.collector.cpu_milli_peak), (5, 7));
        assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
        let busy = self::plan(&Cluster { events_per_node: 10_000.0, ..cluster() });
        assert!(busy.warnings.iter().any(|warning| warning.contains("max_cpu_milli")), "{:?}", busy.warnings);
        assert!(busy.warnings.iter().any(|warning| warning.contains("more than the 10")), "{:?}", busy.warnings);
    }

    #[test]
    fn disk_and_network_are_rate_times_size_times_time() {
        let plan = plan(&cluster());
        assert_eq!(plan.archive_bytes_per_day, 100 * (2_000 + 500 * 40) * 86_400);
        assert_eq!((plan.node_bytes_per_second, plan.server_bytes_per_second_peak), (22_000, 100 * 82_000));
        let kept = plan.archive_bytes_per_day as f64;
        let room = plan.archive_max_bytes as f64;
        assert!(room >= kept + f64::from(64 << 20) && room <= kept + 3.0 * f64::from(64 << 20), "{room} for {kept}");
        assert_eq!(plan.archive_max_bytes % (64 << 20), 0);
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_name() {
        for (change, name) in [
            ((|cluster| cluster.nodes = 0) as fn(&mut Cluster), "--nodes"),
            (|cluster| cluster.events_per_node = 0.0, "--events-per-node"),
            (|cluster| cluster.peak_factor = 0.5, "--peak"),
            (|cluster| cluster.utilisation = 2.0, "--utilisation"),
            (|cluster| cluster.server_cores = f64::NAN, "--server-cores"),
            (|cluster| cluster.retention_s = 0, "--retention"),
        ] {
            let mut wrong = cluster();
            change(&mut wrong);
            assert!(wrong.check().expect_err("refused").to_string().contains(name));
        }
        let tiny = Cluster { server_cores: 0.01, ..cluster() };
        assert!(
            Plan::make(&tiny, &costs(), Host::default()).expect_err("refused").to_string().contains("give it more")
        );
    }
}
