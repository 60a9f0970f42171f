//! A storm: as many processes and connections as this machine can make, under real probes, a real collector and a real server.
//!
//! In: how long. Out: a [`StormReport`]. What must hold at its end: every event that the kernel emitted is archived or declared
//! lost by stage and reason, and of the lethal lane none is lost. What was made is counted here, so that a probe that reports
//! nothing does not pass: each process made is an exec and an exit that the collector took in.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;
use tapio_wire::complain;
use tapio_wire::service::StatusResponse;

use crate::client::Client;
use crate::clock::{boottime_ns, pause, wait_for};
use crate::error::{Context, Error};
use crate::host::Host;
use crate::interrupt;
use crate::probes::workload::Workload;
use crate::processes::collector::Feed;
use crate::processes::metrics::Metrics;
use crate::processes::{Collector, CollectorOptions, Server, ServerOptions};

/// The source that probes are counted under.
const SOURCE: &str = "ebpf";
/// How long the collector may take to have read what the kernel emitted.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
/// How long the server may take to have the final frames.
const BOOKS_LIMIT: Duration = Duration::from_secs(20);
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// Connections for each process made.
const CONNECTIONS_PER_PROCESS: u64 = 8;

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct StormOptions {
    pub duration: Duration,
    /// Two for each core when not given.
    pub threads: Option<usize>,
    pub bin_dir: Option<PathBuf>,
    /// Prints nothing while it runs.
    pub is_quiet: bool,
}

/// What became of it. Keys are read by other programs: they stay.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StormReport {
    pub host: Host,
    pub duration_s: f64,
    pub threads: usize,
    /// Made here.
    pub processes: u64,
    pub connections: u64,
    /// Events emitted, by the kernel's count.
    pub emitted: u64,
    pub archived: u64,
    pub dropped: u64,
    /// Losses by `stage/reason`.
    pub losses: BTreeMap<String, u64>,
    pub held: u64,
    /// Over all sources of the node, and what `emitted = archived + dropped + held` leaves open.
    pub unexplained: i64,
    /// Records of the lethal lane that found their ring full.
    pub lethal_ring_full: u64,
    /// Events of the lethal lane, of all sources, taken in before the collector was stopped.
    pub lethal_taken_in: u64,
    pub lethal_archived: u64,
    pub execs_taken_in: u64,
    pub exits_taken_in: u64,
    /// Runs of probes that the kernel skipped; their events are in no count.
    pub missed_runs: u64,
    pub processes_per_second: f64,
    pub connections_per_second: f64,
    pub events_per_second: f64,
    /// What does not hold; empty when all does.
    pub complaints: Vec<String>,
    pub is_accounted_for: bool,
}

/// What the threads have made.
#[derive(Default)]
struct Made {
    processes: AtomicU64,
    connections: AtomicU64,
    stop: AtomicBool,
}

/// Threads that end when this is dropped.
struct Threads {
    made: Arc<Made>,
    running: Vec<JoinHandle<Result<(), Error>>>,
}

impl Threads {
    fn start(count: usize) -> Result<Self, Error> {
        let mut threads = Self { made: Arc::default(), running: Vec::new() };
        for number in 0..count {
            let made = Arc::clone(&threads.made);
            let thread = thread::Builder::new().name(format!("storm-{number}"));
            let thread = thread.spawn(move || make(&made)).context(|| "start a thread".into())?;
            threads.running.push(thread);
        }
        Ok(threads)
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.made.stop.store(true, Ordering::Relaxed);
        for thread in self.running.drain(..) {
            thread.join().map_err(|_| Error::Invalid("a thread of the storm panicked".into()))??;
        }
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Already on the way out for another reason.
        let _ = self.stop();
    }
}

fn make(made: &Made) -> Result<(), Error> {
    let directory = std::env::temp_dir();
    let mut processes = Workload::Process.prepare(&directory)?;
    let mut connections = Workload::Tcp.prepare(&directory)?;
    let mut resets = Workload::TcpReset.prepare(&directory)?;
    while !made.stop.load(Ordering::Relaxed) {
        processes.run(1)?;
        made.processes.fetch_add(1, Ordering::Relaxed);
        connections.run(CONNECTIONS_PER_PROCESS - 1)?;
        resets.run(1)?;
        made.connections.fetch_add(CONNECTIONS_PER_PROCESS, Ordering::Relaxed);
    }
    Ok(())
}

/// Runs it.
pub fn run(options: &StormOptions) -> Result<StormReport, Error> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Invalid("the storm runs under real probes: run tapio-perf storm as root".into()));
    }
    let host = Host::read();
    let threads = options.threads.unwrap_or(2 * host.cores).max(1);
    // Guards are dropped in reverse: the storm ends first, the server last.
    let mut server = Server::start(&ServerOptions { bin_dir: options.bin_dir.clone(), ..ServerOptions::default() })?;
    let mut collector = Collector::start(&CollectorOptions {
        bin_dir: options.bin_dir.clone(),
        node: format!("storm-{:x}", boottime_ns()),
        server: server.address(),
        feed: Feed::Ebpf,
        // All of it comes from one cgroup, and all of it is to be seen.
        extra_ebpf: ", cgroup_records_per_second: 0".into(),
        ..CollectorOptions::default()
    })?;
    let mut client = Client::connect(&server.address())?;

    let start = Instant::now();
    let mut storm = Threads::start(threads)?;
    let mut reported_at = Instant::now();
    while start.elapsed() < options.duration {
        pause(Duration::from_millis(100).min(options.duration / 4))?;
        collector.check_running()?;
        if let Some(process) = server.process() {
            process.check_running()?;
        }
        // A thread ends by itself only when something failed.
        if storm.running.iter().any(JoinHandle::is_finished) {
            break;
        }
        if !options.is_quiet && reported_at.elapsed() >= PROGRESS_INTERVAL {
            reported_at = Instant::now();
            let processes = storm.made.processes.load(Ordering::Relaxed);
            complain!("{:>5} s: {processes} processes made", start.elapsed().as_secs());
        }
    }
    storm.stop()?;
    let duration_s = start.elapsed().as_secs_f64();
    interrupt::check()?;

    let (processes, connections) =
        (storm.made.processes.load(Ordering::Relaxed), storm.made.connections.load(Ordering::Relaxed));
    let metrics = wait_until_taken_in(&collector, processes)?;
    let node = collector.node().to_owned();
    collector.stop()?;
    let mut report = StormReport {
        host,
        duration_s,
        threads,
        processes,
        connections,
        lethal_ring_full: metrics.sum("tapio_collector_lethal_ring_full_total", &[]),
        lethal_taken_in: metrics.sum(DECODED, &["lane=\"lethal\""]),
        execs_taken_in: metrics.sum(DECODED, &["kind=\"exec\""]),
        exits_taken_in: metrics.sum(DECODED, &["kind=\"exit\""]),
        missed_runs: metrics.sum("tapio_collector_probe_missed_runs_total", &[]),
        ..StormReport::default()
    };
    wait_for_books(&mut report, &node, &mut client)?;
    report.processes_per_second = processes as f64 / duration_s;
    report.connections_per_second = connections as f64 / duration_s;
    report.events_per_second = report.emitted as f64 / duration_s;
    report.judge();
    server.stop()?;
    Ok(report)
}

const DECODED: &str = "tapio_collector_events_decoded_total";

/// Waits until the collector has taken in an end of every process made; the report has what is missing then.
fn wait_until_taken_in(collector: &Collector, processes: u64) -> Result<Metrics, Error> {
    let taken_in = wait_for("the rings to be read", SETTLE_LIMIT, |_| {
        let metrics = Metrics::read(collector.port())?;
        let ends = metrics.sum(DECODED, &["kind=\"exit\""]);
        Ok((ends >= processes).then_some(metrics))
    });
    match taken_in {
        Err(Error::TimedOut { .. }) => Metrics::read(collector.port()),
        other => other,
    }
}

/// Waits until the server's books close; the report has what stays open.
fn wait_for_books(report: &mut StormReport, node: &str, client: &mut Client) -> Result<(), Error> {
    let closed = wait_for("the ledger's closing", BOOKS_LIMIT, |_| {
        report.read(node, &client.status()?);
        Ok((report.unexplained == 0 && report.held == 0 && report.emitted > 0).then_some(()))
    });
    match closed {
        Ok(()) | Err(Error::TimedOut { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

impl StormReport {
    fn read(&mut self, node: &str, status: &StatusResponse) {
        (self.emitted, self.archived, self.dropped, self.held, self.unexplained) = (0, 0, 0, 0, 0);
        self.losses.clear();
        self.lethal_archived = status.archive.as_ref().map_or(0, |archive| archive.lethal_events);
        let nodes = status.nodes.iter().filter(|status| status.node == node);
        for source in nodes.flat_map(|node| &node.epochs).flat_map(|epoch| &epoch.sources) {
            self.unexplained += source.unexplained;
            if source.source != SOURCE {
                continue;
            }
            self.emitted += source.emitted;
            self.archived += source.archived;
            self.held += source.held;
            for loss in &source.dropped {
                self.dropped += loss.events;
                *self.losses.entry(format!("{}/{}", loss.stage, loss.reason)).or_default() += loss.events;
            }
        }
        self.unexplained += self.emitted as i64 - self.archived as i64 - self.dropped as i64 - self.held as i64;
    }

    fn judge(&mut self) {
        let mut complain = |holds: bool, text: String| {
            if !holds {
                self.complaints.push(text);
            }
        };
        complain(self.emitted > 0, "the server knows of no event of this node".into());
        complain(self.unexplained == 0, format!("{} events are unexplained", self.unexplained));
        complain(self.held == 0, format!("{} events are held after the end", self.held));
        let (execs, exits, made) = (self.execs_taken_in, self.exits_taken_in, self.processes);
        complain(execs >= made, format!("{made} processes were made, {execs} execs taken in"));
        complain(exits >= made, format!("{made} processes were made, {exits} exits taken in"));
        complain(self.lethal_ring_full == 0, format!("{} lethal records found their ring full", self.lethal_ring_full));
        let (taken_in, archived) = (self.lethal_taken_in, self.lethal_archived);
        complain(archived >= taken_in, format!("{taken_in} lethal events were taken in, {archived} archived"));
        self.is_accounted_for = self.complaints.is_empty();
    }
}

impl std::fmt::Display for StormReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{:.0} s with {} threads: {} processes ({:.0} a second), {} connections ({:.0} a second)",
            self.duration_s,
            self.threads,
            self.processes,
            self.processes_per_second,
            self.connections,
            self.connections_per_second
        )?;
        writeln!(
            f,
            "events: emitted {} ({:.0} a second) = archived {} + dropped {} + held {}, unexplained {}",
            self.emitted, self.events_per_second, self.archived, self.dropped, self.held, self.unexplained
        )?;
        for (reason, events) in &self.losses {
            writeln!(f, "  lost at {reason}: {events}")?;
        }
        write!(
            f,
            "lethal lane: {} taken in, {} archived, {} lost at a full ring; {} runs skipped by the kernel",
            self.lethal_taken_in, self.lethal_archived, self.lethal_ring_full, self.missed_runs
        )?;
        for complaint in &self.complaints {
            write!(f, "\nNOT ACCOUNTED FOR: {complaint}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::StormReport;

    fn whole() -> StormReport {
        StormReport {
            processes: 10,
            emitted: 50,
            execs_taken_in: 10,
            exits_taken_in: 11,
            lethal_taken_in: 21,
            lethal_archived: 22,
            ..StormReport::default()
        }
    }

    #[test]
    fn each_kind_of_loss_is_complained_of() {
        let mut report = whole();
        report.judge();
        assert!(report.is_accounted_for, "{report}");
        let changes: [fn(&mut StormReport); 7] = [
            |report| report.emitted = 0,
            |report| report.unexplained = -1,
            |report| report.held = 1,
            |report| report.execs_taken_in = 9,
            |report| report.exits_taken_in = 9,
            |report| report.lethal_ring_full = 1,
            |report| report.lethal_archived = 20,
        ];
        for change in changes {
            let mut report = whole();
            change(&mut report);
            report.judge();
            assert_eq!((report.complaints.len(), report.is_accounted_for), (1, false), "{report}");
        }
    }
}
