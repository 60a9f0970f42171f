//! Load: simulated nodes, each a real collector fed through a ring, against a real server or several.
//!
//! ```text
//!  generator (one thread) ──► ring of node 0 ──► tapio-collector ─┐
//!                        └──► ring of node n ──► tapio-collector ─┴──► tapio-server
//!          count of what was emitted ◄──── the ledger check ────► status
//! ```
//!
//! Of several servers, node n ships to the nth, and so round; they share a log in a nats-server of their own, or none.
//!
//! This file is the whole machine of a run: who is started, in which order, what is sampled, when it is over.

mod bulk;
pub mod compare;
mod deaths;
pub mod generator;
pub mod ledger;
mod log_watch;
pub mod pool;
pub mod profile;
pub mod report;
pub mod servers;

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use generator::{Generator, Node, Pace, Publication};
use ledger::NodeLedger;
use log_watch::LogWatch;
use report::{CollectorCost, LoadReport, ServerCost};
use servers::{ClusterReport, Servers};
use tapio_wire::service::StatusResponse;

use crate::clock::{pause, wait_for};
use crate::error::Error;
use crate::host::Host;
use crate::interrupt;
use crate::latency::Latencies;
use crate::processes::collector::Resources;
use crate::processes::usage::Usage;
use crate::processes::{Collector, CollectorOptions, Server};

/// How long the pipeline may take to empty itself after the last event.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// Silence after which missing events come with the final frames, or never.
const DRAIN_SILENCE: Duration = Duration::from_secs(2);
const SAMPLE_INTERVAL: Duration = Duration::from_millis(250);
/// What a collector does in this time is its start: it describes every entity, and whatever it needs is touched first. Runs of at
/// least twice as long are measured without it, too.
pub const WARM_UP: Duration = Duration::from_secs(5);

/// Servers that share the nodes among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeveralServers {
    pub count: usize,
    /// Whether they share a log.
    pub with_log: bool,
}

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    pub nodes: usize,
    /// Events of the mixed profile.
    pub pace: Pace,
    /// Clues of deaths beside them, a second over all nodes.
    pub clues: Option<f64>,
    pub duration: Duration,
    /// `host:port` of a server that runs already; a server is started when not given.
    pub server: Option<String>,
    /// Number of servers to start; one when not given.
    pub servers: Option<SeveralServers>,
    /// Containers of each node.
    pub entities: usize,
    /// Data bytes of each node's ring: a power of two.
    pub ring_bytes: usize,
    pub seed: u64,
    pub bin_dir: Option<PathBuf>,
    /// `grpc.batch_timeout`, as it is written there; the collector's default when not given.
    pub batch_timeout: Option<String>,
    pub resources: Resources,
    /// Sources that every collector runs beside its ring.
    pub also: Vec<String>,
    /// What the only node is called; a name of this run's own when not given.
    pub node_name: Option<String>,
    /// Further lines of every `collector.yaml` and of `server.yaml`.
    pub collector_config: String,
    pub server_config: String,
}

/// A collector and the ring that it reads. The ring is taken back before the collector goes.
struct Station {
    _publication: Publication,
    collector: Collector,
}

impl LoadOptions {
    fn check(&self) -> Result<(), Error> {
        let wrong = |text: &str| Err(Error::Invalid(text.into()));
        match (self.nodes, &self.node_name, self.servers) {
            (0, ..) => return wrong("--nodes must be at least 1"),
            (2.., Some(_), _) => return wrong("--node-name names the only node: leave out --nodes, or make it 1"),
            (nodes, _, Some(several)) if nodes < several.count => {
                return wrong(
                    "a server without a node would have nothing to do: --nodes must be at least as many as --servers",
                );
            }
            _ => {}
        }
        if self.servers.is_some() && self.server.is_some() {
            return wrong("--servers starts servers: leave out --server");
        }
        if self.clues.is_some() && self.pace == Pace::Max {
            return wrong("--clues come at a rate beside the other events: give those a --rate in events per second");
        }
        Ok(())
    }

    /// How fast all events come, and which part of them are clues of deaths.
    fn whole_pace(&self) -> (Pace, f64) {
        match (self.pace, self.clues) {
            (Pace::PerSecond(rate), Some(clues)) => (Pace::PerSecond(rate + clues), clues / (rate + clues)),
            (pace, _) => (pace, 0.0),
        }
    }
}

/// Runs it.
pub fn run(options: &LoadOptions) -> Result<LoadReport, Error> {
    options.check()?;
    // Guards are dropped in reverse: collectors end before the servers they ship to.
    let mut servers = Servers::start(options)?;
    let mut log = servers.group().map(LogWatch::start).transpose()?.flatten();
    let (mut stations, nodes) = start_nodes(options, &servers)?;

    let before = servers.status()?;
    let usage_before = (servers.usage(), read_usage(&stations));
    let start = Instant::now();
    let generator = Generator::start(nodes, options.whole_pace().0, options.duration)?;
    let mut warm = None;
    while !generator.is_finished() {
        if warm.is_none() && options.duration >= WARM_UP * 2 && start.elapsed() >= WARM_UP {
            warm = Some((Instant::now(), read_usage(&stations)));
        }
        interrupt::check()?;
        for station in &mut stations {
            station.collector.check_running()?;
        }
        servers.check_running()?;
        sample(&mut log, &servers)?;
        thread::sleep(SAMPLE_INTERVAL.min(options.duration / 4));
    }
    let steady = warm.map(|(since, before)| {
        let (spent, passed) = (cpu_ns(&before, &read_usage(&stations)), since.elapsed());
        percent_of_core(spent, stations.len(), passed.as_secs_f64())
    });
    let nodes = generator.join()?;
    interrupt::check()?;

    let names: Vec<String> = stations.iter().map(|station| station.collector.node().to_owned()).collect();
    let settled = drain(&nodes, &names, &mut servers, start)?;
    sample(&mut log, &servers)?;
    let usage_after = (servers.usage(), read_usage(&stations));
    let settled_status = servers.status()?;
    let mut report = LoadReport {
        nodes: options.nodes,
        rate: match options.pace {
            Pace::Max => "max".into(),
            Pace::PerSecond(rate) => rate.to_string(),
        },
        clues_per_second: options.clues,
        events_offered: nodes.iter().map(Node::offered).sum(),
        events_emitted: nodes.iter().map(Node::emitted).sum(),
        duration_s: settled.as_secs_f64(),
        host: Host::read(),
        ..LoadReport::default()
    };
    add_latencies(&mut report, &stations)?;
    let nats_cost = match (&log, servers.group().and_then(|group| group.nats())) {
        (Some(log), Some(nats)) => Some(log.cost(nats, report.duration_s)?),
        _ => None,
    };
    for station in &mut stations {
        station.collector.stop()?;
    }
    let after = wait_for_books(&nodes, &names, &mut servers)?;
    report.ledger = accounts(&nodes, &names, &after);
    add_books(&mut report, &before, &after);
    add_costs(&mut report, &usage_before, &usage_after, steady);
    report.server.entities = settled_status.shards.iter().map(|shard| shard.entities).sum();
    report.server.entities_evicted = settled_status.shards.iter().map(|shard| shard.evicted).sum();
    if options.servers.is_some() {
        let findings = log.as_mut().map(|log| servers.agree(log)).transpose()?;
        let mut shares = servers.shares(&report.ledger, report.duration_s, (&usage_before.0, &usage_after.0))?;
        if let Some(log) = log {
            log.add_to(&mut shares);
        }
        report.ledger_closes &= shares.iter().all(|share| share.ledger_closes);
        report.cluster = Some(ClusterReport { servers: shares, log: nats_cost, findings });
    }
    drop(stations);
    servers.stop()?;
    Ok(report)
}

fn sample(log: &mut Option<LogWatch>, servers: &Servers) -> Result<(), Error> {
    match (log, servers.group()) {
        (Some(log), Some(group)) => log.sample(group).map(drop),
        _ => Ok(()),
    }
}

fn start_nodes(options: &LoadOptions, servers: &Servers) -> Result<(Vec<Station>, Vec<Node>), Error> {
    let mut collectors = Vec::new();
    let run = crate::clock::boottime_ns();
    for index in 0..options.nodes {
        let mut collector = Collector::prepare(&CollectorOptions {
            bin_dir: options.bin_dir.clone(),
            // The same server may be loaded again: its books keep what it saw of earlier runs.
            node: options.node_name.clone().unwrap_or_else(|| format!("load-{run:x}-{index}")),
            server: servers.address_for(index).to_owned(),
            also: options.also.clone(),
            resources: options.resources,
            extra_grpc: options
                .batch_timeout
                .as_ref()
                .map_or_else(String::new, |timeout| format!(", batch_timeout: {timeout}")),
            extra_config: options.collector_config.clone(),
            ..CollectorOptions::default()
        })?;
        collector.spawn()?;
        collectors.push(collector);
    }
    let (mut stations, mut nodes) = (Vec::new(), Vec::new());
    for (index, mut collector) in collectors.into_iter().enumerate() {
        collector.wait_ready()?;
        let seed = options.seed.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (node, ring) =
            Node::with_clues(collector.node(), seed, options.entities, options.ring_bytes, options.whole_pace().1)?;
        stations.push(Station { _publication: ring.publish(collector.socket())?, collector });
        nodes.push(node);
    }
    Ok((stations, nodes))
}

/// What the collectors have used.
fn read_usage(stations: &[Station]) -> Vec<Usage> {
    stations.iter().map(|station| station.collector.usage().unwrap_or_default()).collect()
}

/// The account of every node.
pub fn accounts(nodes: &[Node], names: &[String], status: &StatusResponse) -> Vec<NodeLedger> {
    nodes.iter().zip(names).map(|(node, name)| NodeLedger::new(name, node.emitted(), status)).collect()
}

/// Waits until rings are read and the server has everything, or nothing comes any more; returns when the last event came.
fn drain(nodes: &[Node], names: &[String], servers: &mut Servers, start: Instant) -> Result<Duration, Error> {
    let end = Instant::now() + DRAIN_LIMIT;
    let (mut archived, mut last_change) = (0, Instant::now());
    loop {
        interrupt::check()?;
        let asked = Instant::now();
        let accounts = accounts(nodes, names, &servers.status()?);
        let now_archived: u64 = accounts.iter().map(|account| account.archived).sum();
        if now_archived != archived {
            (archived, last_change) = (now_archived, asked);
        }
        let is_settled = accounts.iter().all(NodeLedger::is_settled);
        if (is_settled && nodes.iter().all(Node::is_consumed))
            || last_change.elapsed() > DRAIN_SILENCE
            || Instant::now() > end
        {
            return Ok(last_change - start);
        }
        pause(Duration::from_millis(10))?;
    }
}

/// Waits until the server has the final frames; the report says if a ledger stays open.
fn wait_for_books(nodes: &[Node], names: &[String], servers: &mut Servers) -> Result<StatusResponse, Error> {
    let mut last = servers.status()?;
    let closed = wait_for("the ledger's closing", Duration::from_secs(5), |_| {
        last = servers.status()?;
        let accounts = accounts(nodes, names, &last);
        Ok(accounts.iter().all(NodeLedger::closes).then_some(()))
    });
    match closed {
        Ok(()) | Err(Error::TimedOut { .. }) => Ok(last),
        Err(error) => Err(error),
    }
}

fn add_latencies(report: &mut LoadReport, stations: &[Station]) -> Result<(), Error> {
    let (mut events, mut frames) = (Latencies::default(), Latencies::default());
    for station in stations {
        let latency = station.collector.latency()?;
        for (us, count) in latency.event_to_ack_us {
            events.record(us, count);
        }
        for (us, count) in latency.frame_to_ack_us {
            frames.record(us, count);
        }
        report.frames += latency.frames;
        report.bytes_raw += latency.bytes_raw;
        report.bytes_wire += latency.bytes_wire;
    }
    report.latency_us = events.summary();
    report.ack_latency_us = frames.summary();
    Ok(())
}

fn add_books(report: &mut LoadReport, before: &StatusResponse, after: &StatusResponse) {
    let bytes = |status: &StatusResponse| status.archive.as_ref().map_or(0, |archive| archive.written_bytes);
    report.events_archived = report.ledger.iter().map(|account| account.archived).sum();
    report.events_dropped = report.ledger.iter().map(|account| account.dropped).sum();
    report.events_unexplained =
        report.ledger.iter().map(|account| account.unexplained.unsigned_abs() + account.held).sum();
    report.ledger_closes = report.ledger.iter().all(NodeLedger::closes);
    report.events_correlated = after.events_correlated - before.events_correlated.min(after.events_correlated);
    report.archive_bytes = bytes(after).saturating_sub(bytes(before));
    report.events_per_second = report.events_archived as f64 / report.duration_s.max(1e-9);
    report.revision = after.revision.clone();
}

fn add_costs(
    report: &mut LoadReport,
    before: &(Vec<Usage>, Vec<Usage>),
    after: &(Vec<Usage>, Vec<Usage>),
    steady_cpu_percent_of_core: Option<f64>,
) {
    let events = report.events_archived.max(1) as f64;
    let collectors = cpu_ns(&before.1, &after.1);
    let server = cpu_ns(&before.0, &after.0);
    report.collector = CollectorCost {
        cpu_ns_per_event: collectors as f64 / events,
        cpu_percent_of_core: percent_of_core(collectors, after.1.len(), report.duration_s),
        steady_cpu_percent_of_core,
        rss_bytes: after.1.iter().map(|usage| usage.rss_peak_bytes).max().unwrap_or(0),
    };
    report.server = ServerCost {
        cpu_ns_per_event: server as f64 / events,
        cpu_percent_of_core: percent_of_core(server, 1, report.duration_s),
        rss_bytes: after.0.iter().map(|usage| usage.rss_peak_bytes).max().unwrap_or(0),
        rss_end_bytes: after.0.iter().map(|usage| usage.rss_bytes).max().unwrap_or(0),
        ..ServerCost::default()
    };
}

/// What processes spent in between, all together.
fn cpu_ns(before: &[Usage], after: &[Usage]) -> u64 {
    before.iter().zip(after).map(|(before, after)| after.cpu_ns.saturating_sub(before.cpu_ns)).sum()
}

/// CPU of each of `processes` processes, on average; 100 is one core all the time.
fn percent_of_core(cpu_ns: u64, processes: usize, seconds: f64) -> f64 {
    cpu_ns as f64 / processes.max(1) as f64 / (seconds.max(1e-9) * 1e9) * 100.0
}
