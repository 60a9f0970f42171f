//! Ingest: what frames cost a server, apart from the collectors that make them.
//!
//! ```text
//!  frames, packed once ──► feed of node 0 ──► stream ─┐   header, times and checksums are set when a frame leaves
//!                     └──► feed of node n ──► stream ─┴──► tapio-server, on cores of its own, with an archive of its own
//!          latency of each frame ◄──── acknowledgements
//! ```
//!
//! In: how many nodes, how fast, how large. Out: a report. What must hold: the server is the real program, and acknowledges
//! a frame when it is durable. A run is sound only if the server's books have every event that was sent.
//!
//! This file is the whole machine of a run.

mod archived;
mod body;
mod cores;
mod feed;
mod report;
mod streams;

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tapio_wire::event::Lane;
use tapio_wire::frame::{Encoder, ReplayFrame};
use tapio_wire::limits::FRAME_EVENTS_MAX;
use tokio::sync::watch;
use tokio::time::Instant;

use body::Bodies;
use feed::{Schedule, Supply};
use streams::{Counters, Outcome, Phase, Sent, Streams, Target};

use crate::clock::pause;
use crate::error::Error;
use crate::interrupt;
use crate::load::ledger::NodeLedger;
use crate::processes::usage::{self, ThreadUsage, Usage};
use crate::processes::{Server, ServerOptions};

pub(crate) use body::pod_name;
pub use cores::Cores;
pub use report::{IngestReport, ServerCost, ThreadCost};

/// What the server does in this time is its start: it meets every node and entity for the first time.
pub const WARM_UP: Duration = Duration::from_secs(1);
/// How long all streams may take to open, and the last acknowledgements to come.
const OPEN_LIMIT: Duration = Duration::from_secs(60);
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
/// How long the end of a server takes to show after its streams broke.
const END_SHOWS: Duration = Duration::from_secs(1);
/// Frames that nodes share: together at most so many events, since they are kept in memory.
const FRAMES_MAX: usize = 64;
const POOL_EVENTS_MAX: usize = 1 << 18;
/// Frames of each node that describe their entities.
const OWN_FRAMES: usize = 2;
/// More would not fit into the frame that introduces them.
pub const ENTITIES_MAX: usize = 4_000;
const NODES_MAX: usize = 20_000;

/// How fast each node sends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FrameRate {
    PerSecond(f64),
    /// As fast as the server gives credit.
    Max,
}

impl FromStr for FrameRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse::<f64>()) {
            ("max", _) => Ok(Self::Max),
            (_, Ok(rate)) if rate.is_finite() && rate > 0.0 => Ok(Self::PerSecond(rate)),
            _ => Err("a rate is a number of frames a second above 0, or max".into()),
        }
    }
}

/// What to run.
#[derive(Clone, Debug)]
pub struct IngestOptions {
    pub nodes: usize,
    /// Of each node.
    pub frame_rate: FrameRate,
    pub events_per_frame: usize,
    pub duration: Duration,
    /// Frames of each node after which it has sent all, though time is left.
    pub frames_max: Option<u64>,
    /// Whether each frame describes its entities.
    pub describe: bool,
    /// Signals that end a process, a second over all nodes.
    pub signals: f64,
    /// Containers of each node.
    pub entities: usize,
    /// Takes frames of this archive instead of making some.
    pub archive: Option<PathBuf>,
    pub server_cores: Option<Cores>,
    /// Further lines of `server.yaml`.
    pub server_config: String,
    /// Where the server archives; a temporary folder when not given.
    pub archive_dir: Option<PathBuf>,
    pub bin_dir: Option<PathBuf>,
    pub seed: u64,
}

impl Default for IngestOptions {
    fn default() -> Self {
        Self {
            nodes: 500,
            frame_rate: FrameRate::PerSecond(5.0),
            events_per_frame: 40,
            duration: Duration::from_secs(10),
            frames_max: None,
            describe: false,
            signals: 0.0,
            entities: 100,
            archive: None,
            server_cores: None,
            server_config: String::new(),
            archive_dir: None,
            bin_dir: None,
            seed: 1,
        }
    }
}

impl IngestOptions {
    fn check(&self) -> Result<(), Error> {
        let wrong = |text: String| Err(Error::Invalid(text));
        let within = |value: usize, most: usize| (1..=most).contains(&value);
        if !within(self.nodes, NODES_MAX) {
            return wrong(format!("--nodes must be from 1 to {NODES_MAX}"));
        }
        if !within(self.events_per_frame, FRAME_EVENTS_MAX) {
            return wrong(format!("--events-per-frame must be from 1 to {FRAME_EVENTS_MAX}"));
        }
        if !within(self.entities, ENTITIES_MAX) {
            return wrong(format!("--entities must be from 1 to {ENTITIES_MAX}"));
        }
        if !(self.signals >= 0.0 && self.signals.is_finite()) {
            return wrong("--signals must be a number of signals a second".into());
        }
        if self.duration < Duration::from_millis(100) {
            return wrong("--duration must be at least 100ms".into());
        }
        if self.archive.is_some() && self.describe {
            return wrong("--describe makes frames, and --archive takes them as they are: leave one out".into());
        }
        match &self.server_cores {
            Some(cores) => cores.check_within(&Cores::allowed()?),
            None => Ok(()),
        }
    }
}

/// Runs it.
///
/// # Errors
/// When options make no sense, the server cannot start or ends early, or a stream breaks.
pub fn run(options: &IngestOptions) -> Result<IngestReport, Error> {
    run_beside(options, |_| Ok(())).map(|(report, ())| report)
}

/// Runs it, and does something with the server before it is stopped: what was sent is archived by then.
///
/// # Errors
/// As [`run`], and what the work says.
pub fn run_beside<T>(
    options: &IngestOptions,
    work: impl FnOnce(&mut Server) -> Result<T, Error>,
) -> Result<(IngestReport, T), Error> {
    options.check()?;
    let supply = Arc::new(supply(options)?);
    let mut server = start_server(options)?;
    let counters = Arc::new(Counters::default());
    let (phase, seen_phase) = watch::channel(Phase::Wait);
    let run = crate::clock::boottime_ns();
    let names: Vec<String> = (0..options.nodes).map(|node| format!("ingest-{run:x}-{node}")).collect();
    let target = Target {
        address: server.address(),
        supply: Arc::clone(&supply),
        counters: Arc::clone(&counters),
        phase: seen_phase,
        names: Arc::new(names),
    };
    let (threads, may_end) = (start_threads(options, &target)?, options.frames_max.is_some());
    let mut machine = Machine { threads, ended: Outcome::default(), may_end, phase, counters };
    let measured = machine.measure(options, &mut server)?;
    let sent = machine.finish(options, &mut server)?;
    let report = account(options, &server, &target.names, sent, &measured)?;
    let done = work(&mut server)?;
    server.stop()?;
    Ok((report, done))
}

/// Makes or reads what is sent.
fn supply(options: &IngestOptions) -> Result<Supply, Error> {
    let mut encoder = Encoder::default();
    let mut bodies = Bodies::new(options.seed, options.entities);
    let bad =
        |error| Error::Invalid(format!("a frame of {} events cannot be packed: {error}", options.events_per_frame));
    let frames = match &options.archive {
        Some(dir) => vec![archived::frames(dir, FRAMES_MAX, &mut encoder)?],
        None => {
            let kept = (POOL_EVENTS_MAX / options.events_per_frame).clamp(OWN_FRAMES, FRAMES_MAX);
            let mut made = bodies.bulk(kept, options.events_per_frame);
            let mut pack = |body: &mut _| ReplayFrame::pack(&mut encoder, body, Lane::Bulk).map_err(bad);
            if options.describe {
                let mut own = |node: usize| {
                    let one = |turn: usize| {
                        let mut body = made[(node + turn) % made.len()].clone();
                        let first = (node + turn) * options.events_per_frame % bodies.containers();
                        bodies.describe(&mut body, node, first);
                        pack(&mut body)
                    };
                    (0..OWN_FRAMES).map(one).collect::<Result<Vec<_>, _>>()
                };
                (0..options.nodes).map(&mut own).collect::<Result<Vec<_>, _>>()?
            } else {
                vec![made.iter_mut().map(&mut pack).collect::<Result<Vec<_>, _>>()?]
            }
        }
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Supply {
        frames,
        bodies,
        encoder: Mutex::new(encoder),
        epoch: now.as_nanos() as u64,
        booted: Instant::now(),
        introduces: options.archive.is_none() && !options.describe,
    })
}

fn start_server(options: &IngestOptions) -> Result<Server, Error> {
    let start = || {
        Server::start(&ServerOptions {
            bin_dir: options.bin_dir.clone(),
            archive_dir: options.archive_dir.clone(),
            extra_server: format!(", max_connection_age: 0s, max_concurrent_streams: {}", options.nodes.max(1000)),
            extra_config: options.server_config.clone(),
            ..ServerOptions::default()
        })
    };
    match &options.server_cores {
        Some(cores) => cores.within(start),
        None => start(),
    }
}

/// A thread for each core that the server does not have, or one.
fn start_threads(options: &IngestOptions, target: &Target) -> Result<Vec<Streams>, Error> {
    let cores = match &options.server_cores {
        Some(cores) => Cores::allowed()?.without(cores),
        None => None,
    };
    let threads = cores.as_ref().map_or(1, Cores::count).min(options.nodes);
    let part = |thread: usize| (thread..options.nodes).step_by(threads).collect();
    (0..threads).map(|thread| Streams::start(target.clone(), part(thread), cores.clone())).collect()
}

/// What was read at one moment.
#[derive(Clone, Default)]
struct Sample {
    at: Option<Instant>,
    frames: u64,
    events: u64,
    server: Usage,
    threads: Vec<ThreadUsage>,
    load: Usage,
}

/// The part of a run whose costs count.
struct Measured {
    before: Sample,
    after: Sample,
}

/// The load side while it runs.
struct Machine {
    threads: Vec<Streams>,
    /// What became of threads that ended before the end.
    ended: Outcome,
    /// Whether threads may end before: when all that there is was sent.
    may_end: bool,
    phase: watch::Sender<Phase>,
    counters: Arc<Counters>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.phase.send_replace(Phase::Stop);
    }
}

impl Machine {
    /// Opens all streams, sends, and reads what the server used between the warm-up and the end.
    fn measure(&mut self, options: &IngestOptions, server: &mut Server) -> Result<Measured, Error> {
        let limit = Instant::now() + OPEN_LIMIT;
        while self.counters.open.load(Ordering::Relaxed) < options.nodes {
            self.check(server)?;
            if Instant::now() > limit {
                let open = self.counters.open.load(Ordering::Relaxed);
                let seen = format!("{open} of {} are open", options.nodes);
                return Err(Error::TimedOut { what: "the opening of all streams".into(), seconds: 60, seen });
            }
            pause(Duration::from_millis(2))?;
        }
        let start = Instant::now() + Duration::from_millis(50);
        let measured_from = start + WARM_UP;
        let per_node = |rate: f64| Duration::from_secs_f64(1.0 / rate);
        let schedule = Schedule {
            start,
            measured_from,
            end: measured_from + options.duration,
            interval: match options.frame_rate {
                FrameRate::PerSecond(rate) => Some(per_node(rate)),
                FrameRate::Max => None,
            },
            death_interval: (options.signals > 0.0).then(|| per_node(options.signals / options.nodes as f64)),
            frames_max: options.frames_max.unwrap_or(u64::MAX),
            nodes: options.nodes,
        };
        self.phase.send_replace(Phase::Send(schedule));
        self.wait_until(schedule.measured_from, options, server)?;
        let before = self.sample(server);
        self.wait_until(schedule.end, options, server)?;
        Ok(Measured { before, after: self.sample(server) })
    }

    /// Waits until a moment, or until all nodes have sent all they had.
    fn wait_until(&mut self, moment: Instant, options: &IngestOptions, server: &mut Server) -> Result<(), Error> {
        loop {
            if options.frames_max.is_some() && self.counters.done.load(Ordering::Relaxed) == options.nodes {
                return Ok(());
            }
            self.check(server)?;
            let left = moment.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            pause(left.min(Duration::from_millis(50)))?;
        }
    }

    /// An error when the server or a thread has ended.
    fn check(&mut self, server: &mut Server) -> Result<(), Error> {
        interrupt::check()?;
        server.check_running()?;
        let Some(ended) = self.threads.iter().position(Streams::is_finished) else { return Ok(()) };
        let outcome = match self.threads.swap_remove(ended).join() {
            Ok(outcome) if self.may_end => {
                self.ended.add(outcome);
                return Ok(());
            }
            outcome => outcome,
        };
        // Streams break before their server is known to have ended, which says more.
        let limit = Instant::now() + END_SHOWS;
        while Instant::now() < limit {
            server.check_running()?;
            pause(Duration::from_millis(10))?;
        }
        match outcome {
            Err(error) => Err(error),
            Ok(_) => Err(Error::Invalid("all streams of a thread ended in the middle of the run".into())),
        }
    }

    fn sample(&self, server: &Server) -> Sample {
        Sample {
            at: Some(Instant::now()),
            frames: self.counters.frames.load(Ordering::Relaxed),
            events: self.counters.events.load(Ordering::Relaxed),
            server: server.usage().unwrap_or_default(),
            threads: server.pid().map(usage::threads).unwrap_or_default(),
            load: usage::read(std::process::id()).unwrap_or_default(),
        }
    }

    /// Waits for the last acknowledgements; what became of each stream.
    fn finish(&mut self, options: &IngestOptions, server: &mut Server) -> Result<Outcome, Error> {
        let limit = Instant::now() + DRAIN_LIMIT;
        while self.counters.done.load(Ordering::Relaxed) < options.nodes && Instant::now() < limit {
            interrupt::check()?;
            server.check_running()?;
            if self.threads.iter().all(Streams::is_finished) {
                break;
            }
            pause(Duration::from_millis(5))?;
        }
        // What is not acknowledged by now shows in the ledger.
        self.phase.send_replace(Phase::Stop);
        let mut all = std::mem::take(&mut self.ended);
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(part) => all.add(part),
                Err(error) => {
                    server.check_running()?;
                    return Err(error);
                }
            }
        }
        all.sent.sort_by_key(|sent| sent.node);
        Ok(all)
    }
}

/// Compares what was sent with the server's books, and sums up.
fn account(
    options: &IngestOptions,
    server: &Server,
    names: &[String],
    Outcome { sent, timings }: Outcome,
    measured: &Measured,
) -> Result<IngestReport, Error> {
    let status = server.client()?.status()?;
    let mut report = IngestReport::new(options, measured);
    report.revision.clone_from(&status.revision);
    report.entities = status.shards.iter().map(|shard| shard.entities).sum();
    report.findings = status.findings;
    report.add_sent(&sent, &timings);
    let nodes: Vec<NodeLedger> = {
        let account = |sent: &Sent| NodeLedger::new(&names[sent.node], sent.flow.emitted, &status);
        sent.iter().map(account).collect()
    };
    report.events_archived = nodes.iter().map(|node| node.archived).sum();
    let is_whole = |(sent, node): (&Sent, &NodeLedger)| {
        node.closes() && node.archived == sent.flow.emitted && sent.flow.acked_events == sent.flow.emitted
    };
    report.open_ledgers =
        sent.iter().zip(&nodes).filter(|pair| !is_whole(*pair)).map(|(_, node)| node.to_string()).collect();
    report.ledger_closes = report.open_ledgers.is_empty() && sent.len() == options.nodes;
    Ok(report)
}
