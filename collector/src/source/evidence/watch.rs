//! Watches what lives: how each container's use goes, and what is wrong with it without an event of the kernel.
//!
//! What enters: the cgroups of containers, of container runtimes, and of pods with limits; the clock. What leaves:
//! troubles when they begin, each minute while they last, and when they end. A container's curve when it dies, and
//! every ten minutes. How counters moved in the last two minutes. What must hold: a few reads of each container every
//! ten seconds, in small slices, since evidence of a death must not wait. Each sample is compared with the one before,
//! never with a lifetime. Containers and points are bounded.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use tapio_wire::event::Point;

use super::counters::{Counters, History};
use super::lasting::{Lasting, Trouble, What, Whose};
use super::network::{self, Network};
use super::node::NodeWatch;
use super::processes::{self, KnownLimits, Looked};
use super::read::{Mounts, Paths, runtime_comm};
use super::sample::{Files, Limits, Sample};
use super::tasks;
use crate::source::conntrack::Fill;

/// Samples that are kept: half an hour, with the interval that is configured by default. So are the other times below.
const POINTS_MAX: usize = 180;
/// A container that lives sends its curve after this many new samples.
const CURVE_POINTS: usize = 60;
/// Samples between two reads of what changes rarely, if the use has changed by a sixteenth since; otherwise five times as many.
const SLOW_SAMPLES: u64 = 6;
const SLOWEST_SAMPLES: u64 = 30;
/// Samples between two looks at a container's processes; one while something is wrong with a process.
const PROCESS_SAMPLES: u64 = 12;
/// Samples between two looks at the table of connections of a container's network namespace.
const NETWORK_SAMPLES: u64 = 6;
/// What goes on is reported again after this time at most.
const REPEAT_INTERVAL_MAX: Duration = Duration::from_secs(120);
/// Cgroups that are watched.
const WATCHED_MAX: usize = 2048;
/// Cgroups that are sampled at once, before requests are answered.
const SLICE: usize = 16;

/// Samples in a row that begin a trouble, or end it: a minute.
const SAMPLES: u32 = 6;
/// Percent of its periods from which on a container counts as throttled, and below which it no longer does.
const THROTTLED: u8 = 50;
const UNTHROTTLED: u8 = 25;
/// Percent of the last ten seconds in which everything in the cgroup waited for memory, hundredths.
const PRESSURE: u32 = 10_00;
/// Looks in a row that find a process near its limit of open files, or not any more.
const DESCRIPTOR_LOOKS: u32 = 2;
/// Rounds after which tasks and file systems are looked at; pods are sampled as rarely.
const ROUNDS: u64 = 3;
/// Rounds after which containers are listed: that reads all folders of cgroups.
const LIST_ROUNDS: u64 = 2 * ROUNDS;

/// Something to report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LiveReport {
    Trouble(Trouble),
    /// A curve of a container that lives.
    Curve {
        path: String,
    },
}

/// The states of a watched cgroup, in the order of [`STATES`].
type States = [Lasting; 3];
const STATES: [What; 3] = [What::Throttled, What::PidsAtLimit, What::MemoryHigh];

/// A container that is watched, or a pod that limits something.
#[derive(Default)]
struct Watched {
    is_pod: bool,
    points: VecDeque<Point>,
    since_curve: usize,
    last: Sample,
    limits: Limits,
    files: Files,
    has_files: bool,
    /// When the limits were read: number of samples and bytes in use at that time.
    limits_at: (u64, u64),
    samples: u64,
    states: States,
    descriptors: Lasting,
    stopped: Lasting,
    connections: Lasting,
    /// Table of connections of its network namespace at the last look.
    fill: Option<Fill>,
    processes: Looked,
    known_limits: KnownLimits,
    counters: History,
    seen: bool,
    /// True if the last listing of cgroups lacked it: its counters began with 0 since then.
    is_new: bool,
}

/// Samples every container and reports troubles that begin and end.
pub struct Watch {
    interval: Duration,
    rounds: u64,
    watched: HashMap<String, Watched, RandomState>,
    /// Cgroups of this round that are not sampled yet.
    left: Vec<String>,
    round: Option<Instant>,
    listed: Option<Instant>,
    node: NodeWatch,
    /// The most connections that a network namespace may track, as of the last list.
    entries_max: u64,
    /// Network namespaces, each with the path of the container that stands for its pod; the node's own has an empty one.
    networks: HashMap<u64, String, RandomState>,
}

impl Watch {
    /// Samples each container so often; never, with an interval of zero.
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            rounds: 0,
            watched: HashMap::default(),
            left: Vec::new(),
            round: None,
            listed: None,
            node: NodeWatch::default(),
            entries_max: 0,
            networks: HashMap::default(),
        }
    }

    /// The pause between two events of a trouble that continues.
    fn repeat_interval(&self) -> Duration {
        (self.interval * SAMPLES).min(REPEAT_INTERVAL_MAX)
    }

    /// Updates the containers and pods that exist, by their cgroups' paths. Troubles of those that are gone are over.
    pub fn cgroups(&mut self, now: Instant, paths: &Paths, reports: &mut Vec<LiveReport>) {
        let is_new = self.listed.is_some();
        for watched in self.watched.values_mut() {
            watched.seen = false;
        }
        let containers = paths.containers.iter().chain(&paths.runtimes).map(|path| (path, false));
        for (path, is_pod) in containers.chain(paths.pods.iter().map(|path| (path, true))) {
            if let Some(watched) = self.watched.get_mut(path) {
                watched.seen = true;
            } else if self.watched.len() < WATCHED_MAX {
                self.watched.insert(path.clone(), Watched { is_pod, seen: true, is_new, ..Watched::default() });
            }
        }
        self.watched.retain(|path, watched| {
            if !watched.seen {
                watched.end(path, reports);
            }
            watched.seen
        });
        self.networks.retain(|_, path| self.watched.contains_key(path.as_str()));
        self.entries_max = network::entries_max().unwrap_or(0);
        if let Some(of_node) = network::of_node() {
            self.networks.insert(of_node, String::new());
        }
        self.listed = Some(now);
    }

    /// Whether another round is due, or this one is not at its end.
    pub fn has_work(&self, now: Instant) -> bool {
        !self.interval.is_zero()
            && (!self.left.is_empty()
                || self.round.is_none_or(|round| now.saturating_duration_since(round) >= self.interval))
    }

    /// Does a slice of a round.
    pub fn work(&mut self, now: Instant, mounts: &Mounts, reports: &mut Vec<LiveReport>) {
        if self.left.is_empty() {
            self.round = Some(now);
            let with_pods = self.rounds.is_multiple_of(ROUNDS);
            if self.rounds.is_multiple_of(LIST_ROUNDS) {
                self.cgroups(now, &mounts.container_paths(), reports);
            }
            if with_pods {
                let (repeat_interval, mut troubles) = (self.repeat_interval(), Vec::new());
                self.node.tasks(now, repeat_interval, &tasks::blocked(), &mut troubles);
                self.node.disks(now, repeat_interval, tasks::file_systems(), &mut troubles);
                reports.extend(troubles.into_iter().map(LiveReport::Trouble));
            }
            self.rounds += 1;
            let due = self.watched.iter().filter(|(_, watched)| with_pods || !watched.is_pod);
            self.left.extend(due.map(|(path, _)| path.clone()));
        }
        let (interval, repeat_interval) = (self.interval, self.repeat_interval());
        let rest = self.left.len().saturating_sub(SLICE);
        for path in self.left.split_off(rest) {
            let Some(watched) = self.watched.get_mut(&path) else { continue };
            watched.read_limits(mounts, &path);
            if watched.is_pod && !watched.limits.limit_something() {
                // Its limits are looked at again, as rarely as those of others.
                watched.samples += 1;
                continue;
            }
            if let Some(sample) = watched.files.sample(&watched.last) {
                if watched.counters.is_due(now) {
                    watched.counters.push(now, watched.files.counters(&sample));
                }
                let is_due = watched.samples.is_multiple_of(PROCESS_SAMPLES) || watched.processes != Looked::default();
                if !watched.is_pod && is_due {
                    let comm = runtime_comm(&path);
                    let pids = watched.files.processes(!comm.is_empty());
                    watched.processes = processes::look(pids.into_iter(), comm, &mut watched.known_limits);
                }
                if !watched.is_pod && watched.samples.is_multiple_of(NETWORK_SAMPLES) {
                    let network = watched.files.processes(false).first().and_then(|pid| network::of_process(*pid));
                    // The containers of a pod share one. A container's earlier one is forgotten: its number may come again.
                    let is_its = |network: &Network| {
                        self.networks.retain(|id, known| *id == network.id || *known != path);
                        self.networks.entry(network.id).or_insert_with(|| path.clone()) == path.as_str()
                    };
                    if let Some(network) = network.filter(is_its) {
                        let fill = network.fill.of_at_most(self.entries_max);
                        watched.look_at_connections(now, &path, fill, repeat_interval, reports);
                    }
                }
                let interval = if watched.is_pod { interval * ROUNDS as u32 } else { interval };
                watched.take(now, &path, sample, (interval, repeat_interval), reports);
            }
        }
    }

    /// The samples of a container, or of a pod that limits something; [`None`] of one that was not sampled twice.
    pub fn curve(&self, path: &str) -> Option<Samples> {
        let watched = self.watched.get(path).filter(|watched| watched.points.len() > 1)?;
        Some(Samples {
            limit_bytes: watched.limits.memory_bytes,
            interval: if watched.is_pod { self.interval * ROUNDS as u32 } else { self.interval },
            points: watched.points.iter().copied().collect(),
        })
    }

    /// How the counters of a cgroup moved in the last two minutes, or since it is there, and in which time; [`None`] while there is
    /// nothing to compare with.
    pub fn difference(&self, now: Instant, path: &str, counters: Counters) -> Option<(Duration, Counters)> {
        match self.watched.get(path).and_then(|watched| watched.counters.difference(now, counters)) {
            Some(difference) => Some(difference),
            // A container that is not listed yet began after the last list, with counters of zero.
            None if self.watched.len() < WATCHED_MAX
                && !self.watched.contains_key(path)
                && crate::intake::identity::is_container_itself(path) =>
            {
                Some((now.saturating_duration_since(self.listed?), counters))
            }
            None => None,
        }
    }
}

/// Who has a container's network namespace: its pod, or itself where it is in none.
fn with_network(path: &str) -> &str {
    path.rsplit_once('/').map(|(above, _)| above).filter(|above| crate::intake::identity::is_pod(above)).unwrap_or(path)
}

/// How the use of a cgroup went.
pub struct Samples {
    /// Memory limit, bytes; `u64::MAX` for none.
    pub limit_bytes: u64,
    pub interval: Duration,
    /// The oldest first.
    pub points: Vec<Point>,
}

impl Watched {
    fn read_limits(&mut self, mounts: &Mounts, path: &str) {
        let (at, bytes) = self.limits_at;
        let since = self.samples.saturating_sub(at);
        let has_changed = self.last.memory_bytes.abs_diff(bytes) > bytes / 16;
        if self.samples > 1 && since < SLOWEST_SAMPLES && !(since >= SLOW_SAMPLES && has_changed) {
            return;
        }
        let limits = mounts.limits(path);
        let is_first = self.samples == 0;
        let has_changed = self.limits.pids_of != limits.pids_of || self.limits.high_bytes != limits.high_bytes;
        let is_wanted = !self.is_pod || limits.limit_something();
        if is_wanted && (is_first || has_changed || !self.has_files) {
            self.has_files = true;
            self.files = mounts.files(path, &limits);
        }
        self.limits = limits;
        self.limits_at = (self.samples, self.last.memory_bytes);
    }

    fn take(
        &mut self,
        now: Instant,
        path: &str,
        sample: Sample,
        (interval, repeat_interval): (Duration, Duration),
        reports: &mut Vec<LiveReport>,
    ) {
        let last = std::mem::replace(&mut self.last, sample);
        self.samples += 1;
        if self.samples == 1 {
            // Counters are differences: the first sample is only what the next is compared with. Processes that were refused to one
            // that began since the last list were refused lately.
            self.push(sample, 0, 0);
            if self.is_new && !self.is_pod && sample.pids_hits > 0 {
                let figures = (sample.pids, self.limits.pids);
                let whose = Whose::Cgroup(path.to_owned());
                if let Some(report) = self.states[1].saw(now, true, 1, repeat_interval) {
                    let trouble = Trouble::new(whose, What::PidsAtLimit, report.since, figures, report.is_over);
                    reports.push(LiveReport::Trouble(trouble));
                }
            }
            return;
        }
        let periods = sample.periods.saturating_sub(last.periods);
        let throttled = sample.throttled.saturating_sub(last.throttled).saturating_mul(100).checked_div(periods);
        let throttled = throttled.unwrap_or(0).min(100) as u8;
        let cpu_us = sample.cpu_us.saturating_sub(last.cpu_us);
        let cpu_milli = cpu_us / (interval.as_millis() as u64).max(1);
        self.push(sample, cpu_milli.min(u64::from(u16::MAX)) as u16, throttled);
        let is_throttled = throttled >= if self.states[0].is_reported() { UNTHROTTLED } else { THROTTLED };
        // A pod's throttling is its containers'. Since Linux 6.11 a pod's counter includes hits of its containers' own limits.
        let is_full = !self.is_pod || sample.pids.saturating_mul(20) >= self.limits.pids.saturating_mul(19);
        let states = [
            (is_throttled && !self.is_pod, SAMPLES, (throttled.into(), 100)),
            (sample.pids_hits > last.pids_hits && is_full, 1, (sample.pids, self.limits.pids)),
            (
                // A process that waits for seconds causes no hit meanwhile.
                (sample.high_hits > last.high_hits || sample.memory_bytes >= self.limits.high_bytes)
                    && sample.memory_pressure >= PRESSURE,
                SAMPLES,
                (sample.memory_bytes, self.limits.high_bytes),
            ),
        ];
        let whose = || Whose::Cgroup(path.to_owned());
        for ((lasting, what), (holds, samples, figures)) in self.states.iter_mut().zip(STATES).zip(states) {
            // Begins after so many samples, and ends after a minute without.
            let needed = if holds { samples } else { SAMPLES };
            if let Some(report) = lasting.saw(now, holds, needed, repeat_interval) {
                reports.push(LiveReport::Trouble(Trouble::new(whose(), what, report.since, figures, report.is_over)));
            }
        }
        // The last look counts until the next one.
        let found = self.processes.descriptors.as_ref();
        if let Some(report) = self.descriptors.saw(now, found.is_some(), DESCRIPTOR_LOOKS, repeat_interval) {
            let figures = found.map_or((0, 0), |found| (found.open, found.limit));
            let mut trouble = Trouble::new(whose(), What::DescriptorsAtLimit, report.since, figures, report.is_over);
            if let Some(found) = found {
                (trouble.pid, trouble.comm) = (found.pid, found.comm.clone());
            }
            reports.push(LiveReport::Trouble(trouble));
        }
        let stopped = self.processes.stopped.as_ref();
        if let Some(report) = self.stopped.saw(now, stopped.is_some(), SAMPLES, repeat_interval) {
            let mut trouble = Trouble::new(whose(), What::Stopped, report.since, (0, 0), report.is_over);
            if let Some((pid, comm)) = stopped {
                (trouble.pid, trouble.comm) = (*pid, comm.clone());
            }
            reports.push(LiveReport::Trouble(trouble));
        }
        self.since_curve += 1;
        if self.since_curve >= CURVE_POINTS && !self.is_pod {
            self.since_curve = 0;
            reports.push(LiveReport::Curve { path: path.to_owned() });
        }
    }

    /// A look at the counters of its network namespace, of which it is the only one that reports.
    fn look_at_connections(
        &mut self,
        now: Instant,
        path: &str,
        fill: Fill,
        repeat_interval: Duration,
        reports: &mut Vec<LiveReport>,
    ) {
        let Some(before) = self.fill.replace(fill) else { return };
        let dropped = fill.dropped_since(&before).unwrap_or(0);
        // What the kernel counted is certain: one look is enough.
        if let Some(report) = self.connections.saw(now, dropped > 0, 1, repeat_interval) {
            let figures = if report.is_over { (0, 0) } else { (dropped, fill.entries_max) };
            let whose = Whose::Cgroup(with_network(path).to_owned());
            reports.push(LiveReport::Trouble(Trouble::new(
                whose,
                What::ConnectionsDropped,
                report.since,
                figures,
                report.is_over,
            )));
        }
    }

    /// Ends what was wrong with a cgroup that is gone.
    fn end(&self, path: &str, reports: &mut Vec<LiveReport>) {
        if let Some(since) = self.connections.reported_since() {
            let whose = Whose::Cgroup(with_network(path).to_owned());
            reports.push(LiveReport::Trouble(Trouble::new(whose, What::ConnectionsDropped, since, (0, 0), true)));
        }
        let processes = [(&self.descriptors, What::DescriptorsAtLimit), (&self.stopped, What::Stopped)];
        for (lasting, what) in self.states.iter().zip(STATES).chain(processes) {
            if let Some(since) = lasting.reported_since() {
                reports.push(LiveReport::Trouble(Trouble::new(
                    Whose::Cgroup(path.to_owned()),
                    what,
                    since,
                    (0, 0),
                    true,
                )));
            }
        }
    }

    fn push(&mut self, sample: Sample, cpu_milli: u16, throttled: u8) {
        if self.points.len() == POINTS_MAX {
            self.points.pop_front();
        }
        self.points.push_back(Point {
            memory_kib: u32::try_from(sample.memory_bytes >> 10).unwrap_or(u32::MAX),
            file_share: self.limits.file_share,
            shmem_share: self.limits.shmem_share,
            cpu_milli,
            throttled,
        });
    }
}

#[cfg(test)]
mod tests;
