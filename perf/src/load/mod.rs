//! Load: simulated nodes, each a real collector fed through a ring, against a real server.
//!
//! ```text
//!  generator (one thread) ──► ring of node 0 ──► tapio-collector ─┐
//!                        └──► ring of node n ──► tapio-collector ─┴──► tapio-server
//!          count of what was emitted ◄──── the ledger check ────► status
//! ```
//!
//! This file is the whole machine of a run: who is started, in which order, what is sampled, when it is over.

mod bulk;
pub mod generator;
pub mod ledger;
pub mod pool;
pub mod profile;
pub mod random;

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use generator::{Generator, Node, Pace, Publication};
use ledger::NodeLedger;
use tapio_wire::service::StatusResponse;

use crate::client::Client;
use crate::clock::{pause, wait_for};
use crate::error::Error;
use crate::interrupt;
use crate::latency::Latencies;
use crate::processes::collector::Resources;
use crate::processes::usage::{self, Usage};
use crate::processes::{Collector, CollectorOptions, Server, ServerOptions};
use crate::report::{CollectorCost, Host, LoadReport, ServerCost};

/// How long the pipeline may take to empty itself after the last event.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// When nothing has arrived for so long, what is missing comes with the final frames, or never.
const DRAIN_SILENCE: Duration = Duration::from_secs(2);
const SAMPLE_INTERVAL: Duration = Duration::from_millis(250);
/// What a collector does in this time is its start: it describes every entity, and whatever it needs is touched first. Runs of at
/// least twice as long are measured without it, too.
pub const WARM_UP: Duration = Duration::from_secs(5);

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    pub nodes: usize,
    pub pace: Pace,
    pub duration: Duration,
    /// `host:port` of a server that runs already; a server is started when not given.
    pub server: Option<String>,
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

/// Runs it.
pub fn run(options: &LoadOptions) -> Result<LoadReport, Error> {
    if options.nodes == 0 {
        return Err(Error::Invalid("--nodes must be at least 1".into()));
    }
    if options.nodes > 1 && options.node_name.is_some() {
        return Err(Error::Invalid("--node-name names the only node: leave out --nodes, or make it 1".into()));
    }
    // Guards are dropped in reverse: collectors end before the server they ship to.
    let mut server = match &options.server {
        Some(_) => None,
        None => Some(Server::start(&ServerOptions {
            bin_dir: options.bin_dir.clone(),
            extra_config: options.server_config.clone(),
            ..ServerOptions::default()
        })?),
    };
    let address = match (&options.server, &server) {
        (Some(address), _) => address.clone(),
        (None, Some(server)) => server.address(),
        (None, None) => return Err(Error::Invalid("there is no server".into())),
    };
    let mut client = Client::connect(&address)?;
    let (mut stations, nodes) = start_nodes(options, &address)?;

    let before = client.status()?;
    let server_pid = server.as_ref().and_then(|server| server.pid());
    let usage_before = read_usage(server_pid, &stations);
    let start = Instant::now();
    let generator = Generator::start(nodes, options.pace, options.duration)?;
    let mut warm = None;
    while !generator.is_finished() {
        if warm.is_none() && options.duration >= WARM_UP * 2 && start.elapsed() >= WARM_UP {
            warm = Some((Instant::now(), read_usage(None, &stations).1));
        }
        interrupt::check()?;
        for station in &mut stations {
            station.collector.check_running()?;
        }
        if let Some(process) = server.as_mut().and_then(|server| server.process()) {
            process.check_running()?;
        }
        thread::sleep(SAMPLE_INTERVAL.min(options.duration / 4));
    }
    let steady = warm.map(|(since, before)| {
        let (spent, passed) = (cpu_ns(&before, &read_usage(None, &stations).1), since.elapsed());
        percent_of_core(spent, stations.len(), passed.as_secs_f64())
    });
    let nodes = generator.join()?;
    interrupt::check()?;

    let names: Vec<String> = stations.iter().map(|station| station.collector.node().to_owned()).collect();
    let settled = drain(&nodes, &names, &mut client, start)?;
    let usage_after = read_usage(server_pid, &stations);
    let settled_status = client.status()?;
    let mut report = LoadReport {
        nodes: options.nodes,
        rate: match options.pace {
            Pace::Max => "max".into(),
            Pace::PerSecond(rate) => rate.to_string(),
        },
        events_offered: nodes.iter().map(Node::offered).sum(),
        events_emitted: nodes.iter().map(Node::emitted).sum(),
        duration_s: settled.as_secs_f64(),
        host: Host::read(),
        ..LoadReport::default()
    };
    add_latencies(&mut report, &stations)?;
    for station in &mut stations {
        station.collector.stop()?;
    }
    let after = wait_for_books(&nodes, &names, &mut client)?;
    report.ledger = accounts(&nodes, &names, &after);
    add_books(&mut report, &before, &after);
    add_costs(&mut report, &usage_before, &usage_after, steady);
    report.server.entities = settled_status.shards.iter().map(|shard| shard.entities).sum();
    report.server.entities_evicted = settled_status.shards.iter().map(|shard| shard.evicted).sum();
    drop(stations);
    if let Some(server) = &mut server {
        server.stop()?;
    }
    Ok(report)
}

fn start_nodes(options: &LoadOptions, address: &str) -> Result<(Vec<Station>, Vec<Node>), Error> {
    let mut collectors = Vec::new();
    let run = crate::clock::boottime_ns();
    for index in 0..options.nodes {
        let mut collector = Collector::prepare(&CollectorOptions {
            bin_dir: options.bin_dir.clone(),
            // The same server may be loaded again: its books keep what it saw of earlier runs.
            node: options.node_name.clone().unwrap_or_else(|| format!("load-{run:x}-{index}")),
            server: address.to_owned(),
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
        let (node, ring) = Node::new(collector.node(), seed, options.entities, options.ring_bytes)?;
        stations.push(Station { _publication: ring.publish(collector.socket())?, collector });
        nodes.push(node);
    }
    Ok((stations, nodes))
}

/// What server and collectors have used.
fn read_usage(server: Option<u32>, stations: &[Station]) -> (Usage, Vec<Usage>) {
    let collectors = stations.iter().map(|station| station.collector.usage().unwrap_or_default());
    (server.and_then(usage::read).unwrap_or_default(), collectors.collect())
}

/// The account of every node.
pub fn accounts(nodes: &[Node], names: &[String], status: &StatusResponse) -> Vec<NodeLedger> {
    nodes.iter().zip(names).map(|(node, name)| NodeLedger::new(name, node.emitted(), status)).collect()
}

/// Waits until rings are read and the server has everything, or nothing comes any more; tells when the last event came.
fn drain(nodes: &[Node], names: &[String], client: &mut Client, start: Instant) -> Result<Duration, Error> {
    let end = Instant::now() + DRAIN_LIMIT;
    let (mut archived, mut last_change) = (0, Instant::now());
    loop {
        interrupt::check()?;
        let asked = Instant::now();
        let accounts = accounts(nodes, names, &client.status()?);
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

/// Waits until the server has the final frames; a ledger that stays open is the report's to tell.
fn wait_for_books(nodes: &[Node], names: &[String], client: &mut Client) -> Result<StatusResponse, Error> {
    let mut last = client.status()?;
    let closed = wait_for("the ledger's closing", Duration::from_secs(5), |_| {
        last = client.status()?;
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
    let bytes = |status: &StatusResponse| status.archive.as_ref().map_or(0, |archive| archive.bytes);
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
    before: &(Usage, Vec<Usage>),
    after: &(Usage, Vec<Usage>),
    steady_cpu_percent_of_core: Option<f64>,
) {
    let events = report.events_archived.max(1) as f64;
    let collectors = cpu_ns(&before.1, &after.1);
    let server = cpu_ns(&[before.0], &[after.0]);
    report.collector = CollectorCost {
        cpu_ns_per_event: collectors as f64 / events,
        cpu_percent_of_core: percent_of_core(collectors, after.1.len(), report.duration_s),
        steady_cpu_percent_of_core,
        rss_bytes: after.1.iter().map(|usage| usage.rss_peak_bytes).max().unwrap_or(0),
    };
    report.server = ServerCost {
        cpu_ns_per_event: server as f64 / events,
        cpu_percent_of_core: percent_of_core(server, 1, report.duration_s),
        rss_bytes: after.0.rss_peak_bytes,
        rss_end_bytes: after.0.rss_bytes,
        ..ServerCost::default()
    };
}

/// What processes spent in between, all together.
fn cpu_ns(before: &[Usage], after: &[Usage]) -> u64 {
    before.iter().zip(after).map(|(before, after)| after.cpu_ns.saturating_sub(before.cpu_ns)).sum()
}

/// Of each of so many processes, on average; 100 is one core all the time.
fn percent_of_core(cpu_ns: u64, processes: usize, seconds: f64) -> f64 {
    cpu_ns as f64 / processes.max(1) as f64 / (seconds.max(1e-9) * 1e9) * 100.0
}
