//! Evidence that fades: what a cgroup and a signal's sender were like when something lethal arrived, read before it is gone.
//!
//! What enters: requests of the kernel's source, through a bounded channel. What leaves: `Observation` events of the
//! lethal lane, read on a thread of its own. What must hold: the sender of a request never waits, allocates or reads a
//! file. A request that finds no room, or comes too often, is dropped before it becomes an event, and counted in a
//! metric.

mod counters;
mod emit;
mod full_mount;
mod lasting;
mod log;
mod network;
mod node;
mod processes;
mod read;
mod sample;
mod sender;
mod tasks;
mod watch;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use tapio_probes::record::CGROUP_V1_MEMORY;
use tapio_wire::event::{EntityId, Lane, Point};
use tapio_wire::program::token_bucket::TokenBucket;

use crate::intake::Intake;
use crate::intake::decode::Batch;
use crate::intake::identity::Identity;
use crate::intake::identity::directory::Directory;
use crate::intake::pass::Pass;
use crate::intake::requests::{self, Evidence, EvidenceCounts, Request};
use full_mount::full_mount;
use log::Logs;
use read::{Mounts, Reading};
use watch::{LiveReport, Watch};

/// Readings at once, and then a second.
const READINGS_BURST: u32 = 50;
const READINGS_PER_SECOND: f64 = 200.0;
/// Within it, one reading of a cgroup is enough.
const COALESCED: Duration = Duration::from_millis(100);
/// Cgroups that were read lately, remembered for [`COALESCED`].
const RECENT_MAX: usize = 1024;

/// The thread that reads.
pub struct EvidenceReader {
    requests: Receiver<Request>,
    counts: Arc<EvidenceCounts>,
    mounts: Mounts,
    with_arguments: bool,
    node: EntityId,
    logs: Logs,
    /// Time of the last reading, by cgroup and sender.
    recent: HashMap<(u64, u32), Instant, foldhash::fast::RandomState>,
    watch: Watch,
    allowance: TokenBucket,
}

/// What is read, and how.
pub struct Options {
    /// Adds a sender's arguments to its program.
    pub with_arguments: bool,
    /// Containers are sampled so often, zero for never.
    pub watch_interval: Duration,
    /// The entity of the node's own troubles.
    pub node: EntityId,
    /// Lines of a dead container's log, 0 for none, and where kubelet keeps those.
    pub log_lines: usize,
    pub log_dir: PathBuf,
    pub directory: Arc<Directory>,
}

/// The sender of requests and the reader that answers them.
pub fn channel(options: Options) -> (Evidence, EvidenceReader) {
    let (evidence, requests, counts) = requests::channel(options.log_lines > 0);
    let reader = EvidenceReader {
        requests,
        counts,
        mounts: Mounts::of_this_machine(),
        logs: Logs::new(options.log_dir, options.log_lines, options.directory),
        recent: HashMap::default(),
        watch: Watch::new(options.watch_interval),
        with_arguments: options.with_arguments,
        node: options.node,
        allowance: TokenBucket::new(READINGS_BURST, READINGS_PER_SECOND, Instant::now()),
    };
    (evidence, reader)
}

impl EvidenceReader {
    /// Counters of the requests and readings.
    pub fn counts(&self) -> Arc<EvidenceCounts> {
        Arc::clone(&self.counts)
    }

    /// Answers requests until all senders are gone and every event was handed on.
    pub fn run(mut self, mut intake: Intake) {
        let mut pass = intake.begin();
        loop {
            let now = Instant::now();
            let mut reports = Vec::new();
            if self.watch.has_work(now) {
                self.watch.work(now, &self.mounts, &mut reports);
            }
            self.emit_watched(now, reports, &mut pass);
            self.emit_logs(now, &mut pass);
            let pause = match self.watch.has_work(now) {
                true => Duration::ZERO,
                false => self.logs.pause(now).unwrap_or(Duration::MAX).min(pass.sleep_limit()),
            };
            match self.requests.recv_timeout(pause) {
                Ok(request) => self.answer(&request, &mut pass),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            pass.renew();
        }
        self.emit_logs(Instant::now() + log::NAMED_MAX, &mut pass);
        pass.finish();
        while let Some(pause) = intake.hand_on() {
            std::thread::sleep(pause);
        }
    }

    fn answer(&mut self, request: &Request, pass: &mut Pass<'_>) {
        let now = Instant::now();
        if request.is_end {
            self.logs.ended(now, request.entity, request.pid);
        }
        if request.is_log_only {
            return;
        }
        let key = (request.cgroup_id, request.sender_pid);
        let is_fresh = |at: &Instant| now.saturating_duration_since(*at) < COALESCED;
        if self.recent.get(&key).is_some_and(is_fresh) {
            self.counts.coalesced.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if !self.may_read(now) {
            self.counts.rate.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if self.recent.len() >= RECENT_MAX {
            self.recent.retain(|_, at| is_fresh(at));
        }
        if self.recent.len() < RECENT_MAX {
            self.recent.insert(key, now);
        }
        let is_version_1 = request.cgroup_id & CGROUP_V1_MEMORY != 0;
        let readings = self.mounts.read(request.pid, request.path(), is_version_1);
        let process = (request.sender_pid != 0)
            .then(|| sender::process(request.sender_pid, request.sender_start_time_ns, self.with_arguments))
            .flatten();
        self.counts.readings.fetch_add(1, Ordering::Relaxed);
        self.counts.reading_us.fetch_add(now.elapsed().as_micros() as u64, Ordering::Relaxed);
        let nothing = Reading { path: request.path().to_owned(), ..Reading::default() };
        let readings = match readings.is_empty() && process.is_some() {
            true => vec![nothing],
            false => readings,
        };
        let full_mount = request.is_bus_error.then(|| full_mount(mounted_for(request.pid, &readings))).flatten();
        for (level, reading) in readings.iter().enumerate() {
            emit::wait_for_room(pass);
            emit::observation(pass, request, reading, process.as_ref().filter(|_| level == 0));
            let is_full = request.full_height == Some(reading.height) && reading.height > 0;
            if level == 0 || is_full {
                let difference = self.watch.difference(now, &reading.path, reading.into());
                emit::cgroup_use(
                    pass,
                    request,
                    reading,
                    difference,
                    is_full,
                    full_mount.as_ref().filter(|_| level == 0),
                );
            }
            if (level == 0 || is_full)
                && let Some(mut samples) = self.watch.curve(&reading.path)
            {
                // What it was at the end, which no sample has seen.
                if let Some(last) = samples.points.last().copied() {
                    let memory_kib = u32::try_from(reading.memory_usage_bytes >> 10).unwrap_or(u32::MAX);
                    samples.points.push(Point { memory_kib: memory_kib.max(last.memory_kib), ..last });
                }
                emit::wait_for_room(pass);
                emit::curve(pass, |_, _| (request.entity, request.pid), &reading.path, samples);
            }
        }
    }

    fn emit_logs(&mut self, now: Instant, pass: &mut Pass<'_>) {
        while let Some(said) = self.logs.next(now) {
            emit::wait_for_room(pass);
            emit::log_lines(pass, said);
        }
    }

    fn emit_watched(&self, now: Instant, reports: Vec<LiveReport>, pass: &mut Pass<'_>) {
        for report in reports {
            emit::wait_for_room(pass);
            match report {
                LiveReport::Curve { path } => {
                    if let Some(samples) = self.watch.curve(&path) {
                        let whose = |batch: &mut Batch, identity: &mut Identity| {
                            (identity.resolve_path(&path, Lane::Lethal, &mut batch.body.entities), 0)
                        };
                        emit::curve(pass, whose, &path, samples);
                    }
                }
                LiveReport::Trouble(trouble) => emit::trouble(pass, now, self.node, &trouble),
            }
        }
    }

    fn may_read(&mut self, now: Instant) -> bool {
        self.allowance.take(1, now).is_ok()
    }
}

/// Returns processes whose mounts may hold what a process wrote to: its own, or the others of its cgroup if it is gone.
fn mounted_for(pid: u32, readings: &[Reading]) -> impl Iterator<Item = u32> {
    let folder = readings.first().map(|reading| reading.folder.join("cgroup.procs"));
    let parent = crate::base::host::process(pid).and_then(|folder| crate::intake::identity::scan::Stat::of(&folder));
    let others = folder.and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
    let others: Vec<u32> = others.lines().filter_map(|line| line.parse().ok()).take(8).collect();
    [pid].into_iter().chain(others).chain(parent.map(|stat| stat.parent_pid))
}

#[cfg(test)]
mod tests {
    use tapio_wire::event::{Detail, EntityKind, Event, Exit, NO_NAME, Role, Source};

    use super::*;
    use crate::intake::identity::directory::{ContainerNames, PodNames};
    use crate::intake::requests::REQUESTS_MAX;
    use crate::intake::source_context::SourceContext;
    use crate::outbox::queue::{OpenLanes, Queues};
    use crate::settings::config::{Config, WATCH_INTERVAL};

    fn options() -> Options {
        Options {
            with_arguments: false,
            watch_interval: WATCH_INTERVAL,
            node: 7,
            log_lines: 0,
            log_dir: PathBuf::new(),
            directory: Arc::default(),
        }
    }

    fn death(status: u32) -> Event {
        let exit = Exit {
            start_time_ns: 0,
            parent_pid: 1,
            ns_pid: 1,
            ns_level: 0,
            status,
            comm: NO_NAME,
            oom_score_adj: 0,
            role: 0,
        };
        Event { time_ns: 1, entity: 5, pid: std::process::id(), source: Source::Ebpf, body: Detail::Exit(exit) }
    }

    #[test]
    fn a_full_channel_drops_requests_and_counts_them() {
        let (evidence, reader) = channel(options());
        let identity = Identity::new(Vec::new());
        for _ in 0..REQUESTS_MAX + 7 {
            evidence.ask(&death(9), 3, 0, &identity);
        }
        assert_eq!(reader.counts().dropped(), [("full", 7), ("rate", 0), ("path", 0)]);
        evidence.ask(&death(1 << 8), 3, 0, &identity);
        assert_eq!(reader.counts().dropped()[0].1, 7, "an exit with a status leaves nothing to read");
    }

    #[test]
    fn a_containers_last_lines_are_reported_redacted_when_asked_for() {
        let names = PodNames {
            uid: "u1".into(),
            namespace: "shop".into(),
            name: "web-1".into(),
            owner: None,
            addresses: Vec::new(),
        };
        let directory = Arc::<Directory>::default();
        let container = ContainerNames { id: "0123456789ab".into(), name: "web".into(), image: "".into() };
        directory.update(names, vec![container], Instant::now());
        let folder = tempfile::tempdir().expect("a folder");
        let of_web = folder.path().join("shop_web-1_u1/web");
        std::fs::create_dir_all(&of_web).expect("made");
        let text = "2026-01-02T03:04:05Z stderr F no such table, password=hunter2\n";
        std::fs::write(of_web.join("0.log"), text).expect("written");

        let lines_for = |log_lines, status, role: Role| {
            let (queues, _parker) = Queues::new(64);
            let context = SourceContext::for_config(&Config::default(), queues);
            let directory = Arc::clone(&directory);
            let (evidence, reader) =
                channel(Options { log_lines, log_dir: folder.path().into(), directory, ..options() });
            let mut event = death(status);
            event.entity = tapio_wire::entity_id(EntityKind::Container, "0123456789ab");
            if let Detail::Exit(exit) = &mut event.body {
                exit.role = role as u8;
            }
            evidence.ask(&event, 3, 0, &Identity::new(Vec::new()));
            drop(evidence);
            reader.run(Intake::new(context.clone(), Source::Collector, Identity::new(Vec::new())));
            let bodies = std::iter::from_fn(|| context.queues.pop(OpenLanes::Both)).map(|(_, body)| body);
            let lines = bodies.flat_map(|body| {
                let of = |event: &Event| match &event.body {
                    Detail::LogLines(log) => {
                        Some(log.lines.iter().map(|line| body.names[*line as usize].clone()).collect::<Vec<_>>())
                    }
                    _ => None,
                };
                body.events.iter().filter_map(of).flatten().collect::<Vec<_>>()
            });
            lines.collect::<Vec<_>>()
        };
        assert_eq!(lines_for(9, 1 << 8, Role::First), ["no such table, password [redacted]"]);
        assert_eq!(lines_for(9, 9, Role::First).len(), 1);
        for (log_lines, status, role) in [(0, 1 << 8, Role::First), (9, 0, Role::First), (9, 9, Role::Member)] {
            assert!(lines_for(log_lines, status, role).is_empty(), "{log_lines} {status} {role:?}");
        }
    }

    #[test]
    fn readings_are_one_per_cgroup_and_bounded() {
        let (queues, _parker) = Queues::new(1024);
        let context = SourceContext::for_config(&Config::default(), queues);
        let (evidence, reader) = channel(options());
        let (counts, identity) = (reader.counts(), Identity::new(Vec::new()));
        for _ in 0..20 {
            evidence.ask(&death(9), 3, 0, &identity);
        }
        for cgroup in 0..100 {
            evidence.ask(&death(9), 10 + cgroup, 0, &identity);
        }
        drop(evidence);
        reader.run(Intake::new(context.clone(), Source::Collector, Identity::new(Vec::new())));
        assert_eq!(counts.coalesced(), 19);
        let (readings, limited) = (counts.readings().0, counts.dropped()[1].1);
        assert_eq!(readings + limited, 101);
        assert!(readings >= u64::from(READINGS_BURST), "{readings}");
        while let Some((lane, body)) = context.queues.pop(OpenLanes::Both) {
            assert_eq!(lane, Lane::Lethal);
            // 7 is the node, whose disks it reports at first.
            assert!(
                body.events.iter().all(|event| [5, 7].contains(&event.entity) && event.source == Source::Collector)
            );
        }
    }
}
