//! Watches what lives: how each container's use goes, and what is wrong with it without an event of the kernel.
//!
//! What enters: the containers' cgroups, and the clock. What leaves: troubles as they begin, go on for another minute, and end; the
//! curve of a container's use when it dies, and every ten minutes. What must hold: a few reads a container each ten seconds, in small
//! slices, so that evidence that fades is not kept waiting; everything is compared with the sample before, never with a lifetime;
//! bounded in containers and points.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use tapio_wire::event::Point;

use super::read::Mounts;
use super::sample::{Files, Limits, Sample};
use super::tasks::{self, Task};

/// Samples that are kept: half an hour, with the interval that is configured by default. So are the other times below.
const POINTS_MAX: usize = 180;
/// A container that lives sends its curve after this many new samples.
const TOLD_POINTS: usize = 60;
/// What changes rarely is read with every so many samples, where the use has changed by a sixteenth since; otherwise five times as
/// rarely.
const SLOW_SAMPLES: u64 = 6;
const SLOWEST_SAMPLES: u64 = 30;
/// Containers that are watched.
const CONTAINERS_MAX: usize = 1024;
/// Containers that are sampled at once, before somebody else may have a turn.
const SLICE: usize = 16;

/// Samples in a row that begin a trouble, or end it: a minute.
const SAMPLES: u32 = 6;
/// A container is throttled when it is in so many percent of its periods, and is not any more below the second.
const THROTTLED: u8 = 50;
const UNTHROTTLED: u8 = 25;
/// Percent of the last ten seconds in which everything in the cgroup waited for memory, hundredths.
const PRESSURE: u32 = 10_00;
/// Rounds after which containers are listed, and processes and file systems looked at.
const ROUNDS: u64 = 3;
/// Looks in a row that find a task waiting without being interruptible: half a minute lies between them.
const BLOCKED_LOOKS: u32 = 2;
/// Looks in a row that find a file system full, or not any more.
const DISK_LOOKS: u32 = 2;
/// A file system is full from so many percent on, and has room again below the second.
const FULL: u64 = 95;
const ROOM: u64 = 90;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// It is slowed down by its CPU limit, now.
    Throttled,
    /// It wants more processes than it may have.
    PidsAtLimit,
    /// It is above memory.high, and waits for memory.
    MemoryHigh,
    /// A process waits in the kernel and cannot be interrupted.
    Blocked,
    /// The same, though it was sent SIGKILL.
    Unkillable,
    /// A file system of the node has no room.
    DiskFull,
    /// It has no inodes.
    InodesFull,
}

impl What {
    /// As events and patterns name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Throttled => "throttled",
            Self::PidsAtLimit => "pids-at-limit",
            Self::MemoryHigh => "memory-high",
            Self::Blocked => "blocked",
            Self::Unkillable => "unkillable",
            Self::DiskFull => "disk-full",
            Self::InodesFull => "inodes-full",
        }
    }
}

/// Whose trouble it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whose {
    /// A cgroup's, by its path.
    Cgroup(String),
    Node,
}

/// Something to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    Trouble {
        whose: Whose,
        pid: u32,
        what: What,
        place: String,
        comm: String,
        since: Instant,
        value: u64,
        limit: u64,
        is_over: bool,
    },
    /// Of a container that lives.
    Curve { path: String },
}

/// A condition that must hold for a while to be a trouble, and not to hold for a while to be none.
#[derive(Clone, Copy, Debug, Default)]
struct Lasting {
    holds: u32,
    holds_not: u32,
    since: Option<Instant>,
    told: Option<Instant>,
}

impl Lasting {
    /// Takes in whether it holds now. Says whether to tell: `Some(false)` that it begins or goes on, `Some(true)` that it is over.
    fn saw(&mut self, now: Instant, holds: bool, samples: u32, told_again: Duration) -> Option<bool> {
        if holds {
            self.holds_not = 0;
            self.holds += 1;
            self.since.get_or_insert(now);
        } else {
            self.holds_not += 1;
            self.holds = 0;
            if self.told.is_none() {
                self.since = None;
            }
        }
        if self.told.is_none() && self.holds >= samples
            || self.told.is_some_and(|told| holds && now.saturating_duration_since(told) >= told_again)
        {
            self.told = Some(now);
            return Some(false);
        }
        if self.told.is_some() && self.holds_not >= samples {
            self.told = None;
            return Some(true);
        }
        None
    }
}

/// A container that is watched.
struct Watched {
    points: VecDeque<Point>,
    since_told: usize,
    last: Sample,
    limits: Limits,
    files: Files,
    /// When the limits were read: after so many samples, with so many bytes in use.
    limits_at: (u64, u64),
    samples: u64,
    troubles: [Lasting; 3],
    seen: bool,
}

/// See the module.
pub struct Watch {
    interval: Duration,
    rounds: u64,
    containers: HashMap<String, Watched, RandomState>,
    /// Those of this round that were not sampled yet.
    left: Vec<String>,
    round: Option<Instant>,
    blocked: HashMap<Task, (Lasting, bool), RandomState>,
    disks: HashMap<String, (Lasting, Lasting), RandomState>,
}

impl Watch {
    /// Samples each container so often; never, with an interval of zero.
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            rounds: 0,
            containers: HashMap::default(),
            left: Vec::new(),
            round: None,
            blocked: HashMap::default(),
            disks: HashMap::default(),
        }
    }

    /// Between two samples.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// The pause between two events of a trouble that continues.
    fn told_again(&self) -> Duration {
        self.interval * SAMPLES
    }

    /// These containers are there, by their cgroups' paths. Of those that are gone troubles are over.
    pub fn containers(&mut self, paths: impl Iterator<Item = String>, told: &mut Vec<Told>) {
        for watched in self.containers.values_mut() {
            watched.seen = false;
        }
        for path in paths {
            if let Some(watched) = self.containers.get_mut(&path) {
                watched.seen = true;
            } else if self.containers.len() < CONTAINERS_MAX {
                self.containers.insert(
                    path,
                    Watched {
                        points: VecDeque::new(),
                        since_told: 0,
                        last: Sample::default(),
                        limits: Limits::default(),
                        files: Files::default(),
                        limits_at: (0, 0),
                        samples: 0,
                        troubles: Default::default(),
                        seen: true,
                    },
                );
            }
        }
        self.containers.retain(|path, watched| {
            if watched.seen {
                return true;
            }
            for (trouble, what) in watched.troubles.iter().zip([What::Throttled, What::PidsAtLimit, What::MemoryHigh]) {
                if let (Some(_), Some(since)) = (trouble.told, trouble.since) {
                    told.push(trouble_of(Whose::Cgroup(path.clone()), what, since, (0, 0), true));
                }
            }
            false
        });
    }

    /// Whether another round is due, or this one is not at its end.
    pub fn has_work(&self, now: Instant) -> bool {
        !self.interval.is_zero()
            && (!self.left.is_empty()
                || self.round.is_none_or(|round| now.saturating_duration_since(round) >= self.interval))
    }

    /// Does a slice of a round.
    pub fn work(&mut self, now: Instant, mounts: &Mounts, told: &mut Vec<Told>) {
        if self.left.is_empty() {
            self.round = Some(now);
            if self.rounds.is_multiple_of(ROUNDS) {
                self.containers(mounts.container_paths().into_iter(), told);
                self.tasks(now, tasks::blocked, told);
                self.disks(now, tasks::file_systems(), told);
            }
            self.rounds += 1;
            self.left.extend(self.containers.keys().cloned());
        }
        let (interval, told_again) = (self.interval, self.told_again());
        let rest = self.left.len().saturating_sub(SLICE);
        for path in self.left.split_off(rest) {
            let Some(watched) = self.containers.get_mut(&path) else { continue };
            if watched.wants_limits() {
                let limits = mounts.limits(&path);
                if watched.samples == 0
                    || watched.limits.pids != limits.pids
                    || watched.limits.high_bytes != limits.high_bytes
                {
                    watched.files = mounts.files(&path, &limits);
                }
                watched.limits = limits;
                watched.limits_at = (watched.samples, watched.last.memory_bytes);
            }
            if let Some(sample) = watched.files.sample(&watched.last) {
                watched.take(now, &path, sample, (interval, told_again), told);
            }
        }
    }

    fn tasks(&mut self, now: Instant, read: impl FnOnce() -> Vec<Task>, told: &mut Vec<Told>) {
        let (found, told_again) = (read(), self.told_again());
        for task in &found {
            self.blocked.entry(task.clone()).or_default();
        }
        self.blocked.retain(|task, (lasting, was_killed)| {
            let is_blocked = found.contains(task);
            *was_killed |= is_blocked && tasks::is_killed(task.pid);
            let what = if *was_killed { What::Unkillable } else { What::Blocked };
            let since = lasting.since;
            // It ends at once: a task that moved on is not blocked.
            let looks = if is_blocked { BLOCKED_LOOKS } else { 1 };
            if let Some(is_over) = lasting.saw(now, is_blocked, looks, told_again) {
                let trouble = Told::Trouble {
                    whose: Whose::Cgroup(task.cgroup.clone()),
                    pid: task.pid,
                    what,
                    place: task.place.clone(),
                    comm: task.comm.clone(),
                    since: lasting.since.or(since).unwrap_or(now),
                    value: 0,
                    limit: 0,
                    is_over,
                };
                told.push(trouble);
            }
            is_blocked
        });
    }

    fn disks(&mut self, now: Instant, found: Vec<tasks::FileSystem>, told: &mut Vec<Told>) {
        let told_again = self.told_again();
        for disk in found {
            let (bytes, inodes) = self.disks.entry(disk.mount.clone()).or_default();
            for (lasting, what, percent) in
                [(bytes, What::DiskFull, disk.used_percent), (inodes, What::InodesFull, disk.inodes_percent)]
            {
                let from = if lasting.told.is_some() { ROOM } else { FULL };
                let since = lasting.since;
                if let Some(is_over) = lasting.saw(now, percent >= from, DISK_LOOKS, told_again) {
                    told.push(Told::Trouble {
                        whose: Whose::Node,
                        pid: 0,
                        what,
                        place: disk.mount.clone(),
                        comm: String::new(),
                        since: lasting.since.or(since).unwrap_or(now),
                        value: percent,
                        limit: 100,
                        is_over,
                    });
                }
            }
        }
    }

    /// A container's limit and its samples, the oldest first; [`None`] of one that was not sampled twice.
    pub fn curve(&self, path: &str) -> Option<(u64, Vec<Point>)> {
        let watched = self.containers.get(path).filter(|watched| watched.points.len() > 1)?;
        Some((watched.limits.memory_bytes, watched.points.iter().copied().collect()))
    }
}

fn trouble_of(whose: Whose, what: What, since: Instant, (value, limit): (u64, u64), is_over: bool) -> Told {
    Told::Trouble { whose, pid: 0, what, place: String::new(), comm: String::new(), since, value, limit, is_over }
}

impl Watched {
    fn wants_limits(&self) -> bool {
        let (at, bytes) = self.limits_at;
        let since = self.samples.saturating_sub(at);
        let has_changed = self.last.memory_bytes.abs_diff(bytes) > bytes / 16;
        self.samples <= 1 || since >= SLOWEST_SAMPLES || since >= SLOW_SAMPLES && has_changed
    }

    fn take(
        &mut self,
        now: Instant,
        path: &str,
        sample: Sample,
        (interval, told_again): (Duration, Duration),
        told: &mut Vec<Told>,
    ) {
        let last = std::mem::replace(&mut self.last, sample);
        self.samples += 1;
        if self.samples == 1 {
            // Counters are differences: the first sample is only what the next is compared with.
            self.push(sample, 0, 0);
            return;
        }
        let periods = sample.periods.saturating_sub(last.periods);
        let throttled = sample.throttled.saturating_sub(last.throttled).saturating_mul(100).checked_div(periods);
        let throttled = throttled.unwrap_or(0).min(100) as u8;
        let cpu_us = sample.cpu_us.saturating_sub(last.cpu_us);
        let cpu_milli = cpu_us / (interval.as_millis() as u64).max(1);
        self.push(sample, cpu_milli.min(u64::from(u16::MAX)) as u16, throttled);
        let is_throttled = throttled >= if self.troubles[0].told.is_some() { UNTHROTTLED } else { THROTTLED };
        let states = [
            (What::Throttled, is_throttled, SAMPLES, (throttled.into(), 100)),
            (What::PidsAtLimit, sample.pids_hits > last.pids_hits, 1, (sample.pids, self.limits.pids)),
            (
                What::MemoryHigh,
                sample.high_hits > last.high_hits && sample.memory_pressure >= PRESSURE,
                SAMPLES,
                (sample.memory_bytes, self.limits.high_bytes),
            ),
        ];
        for (lasting, (what, holds, samples, figures)) in self.troubles.iter_mut().zip(states) {
            let since = lasting.since;
            // Begins after so many samples, and ends after a minute without.
            let needed = if holds { samples } else { SAMPLES };
            if let Some(is_over) = lasting.saw(now, holds, needed, told_again) {
                let since = lasting.since.or(since).unwrap_or(now);
                told.push(trouble_of(Whose::Cgroup(path.to_owned()), what, since, figures, is_over));
            }
        }
        self.since_told += 1;
        if self.since_told >= TOLD_POINTS {
            self.since_told = 0;
            told.push(Told::Curve { path: path.to_owned() });
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
mod tests {
    use super::*;

    const INTERVAL: Duration = super::super::WATCH_INTERVAL;
    const PATH: &str = "/kubepods/pod1/c1";

    fn at(start: Instant, samples: u64) -> Instant {
        start + INTERVAL * samples as u32
    }

    fn watched() -> Watched {
        let mut watch = Watch::new(INTERVAL);
        watch.containers([PATH.to_owned()].into_iter(), &mut Vec::new());
        watch.containers.remove(PATH).expect("it is watched")
    }

    fn overs(told: &[Told]) -> Vec<(What, bool)> {
        let of = |told: &Told| match told {
            Told::Trouble { what, is_over, .. } => Some((*what, *is_over)),
            Told::Curve { .. } => None,
        };
        told.iter().filter_map(of).collect()
    }

    #[test]
    fn throttling_begins_after_a_minute_of_it_and_is_over_after_a_minute_without() {
        let (start, mut watched, mut told) = (Instant::now(), watched(), Vec::new());
        let mut sample = Sample::default();
        for number in 0..30 {
            sample.periods += 100;
            sample.throttled += if (3..12).contains(&number) { 80 } else { 1 };
            watched.take(at(start, number), PATH, sample, (INTERVAL, INTERVAL * SAMPLES), &mut told);
        }
        assert_eq!(overs(&told), [(What::Throttled, false), (What::Throttled, true)]);
        let Told::Trouble { since, value, .. } = &told[0] else { panic!("{told:?}") };
        assert_eq!((*since, *value), (at(start, 3), 80));
    }

    #[test]
    fn a_limit_of_processes_that_is_hit_is_told_at_once_and_again_while_it_goes_on() {
        let (start, mut watched, mut told) = (Instant::now(), watched(), Vec::new());
        // What was counted before the first sample was long ago.
        let mut sample = Sample { pids_hits: 1_000, ..Sample::default() };
        for number in 0..20 {
            sample.pids_hits += u64::from((5..12).contains(&number));
            watched.take(at(start, number), PATH, sample, (INTERVAL, INTERVAL * SAMPLES), &mut told);
        }
        let pids = What::PidsAtLimit;
        assert_eq!(overs(&told), [(pids, false), (pids, false), (pids, true)]);
    }

    #[test]
    fn a_container_that_is_gone_has_no_trouble_any_more() {
        let (start, mut watch, mut told) = (Instant::now(), Watch::new(INTERVAL), Vec::new());
        watch.containers([PATH.to_owned()].into_iter(), &mut told);
        let watched = watch.containers.get_mut(PATH).expect("it is watched");
        for number in 0..3 {
            let sample = Sample { pids_hits: number, ..Sample::default() };
            watched.take(at(start, number), PATH, sample, (INTERVAL, INTERVAL * SAMPLES), &mut told);
        }
        watch.containers(std::iter::empty(), &mut told);
        assert_eq!(overs(&told), [(What::PidsAtLimit, false), (What::PidsAtLimit, true)]);
        assert!(watch.curve(PATH).is_none());
    }

    #[test]
    fn a_curve_is_bounded_and_told_every_ten_minutes() {
        let (start, mut watch, mut told) = (Instant::now(), Watch::new(INTERVAL), Vec::new());
        watch.containers([PATH.to_owned()].into_iter(), &mut told);
        let watched = watch.containers.get_mut(PATH).expect("it is watched");
        for number in 0..400 {
            let sample = Sample { memory_bytes: number << 20, cpu_us: number * 5_000_000, ..Sample::default() };
            watched.take(at(start, number), PATH, sample, (INTERVAL, INTERVAL * SAMPLES), &mut told);
        }
        assert_eq!(told.len(), 6);
        let (_, points) = watch.curve(PATH).expect("it was sampled");
        assert_eq!(points.len(), POINTS_MAX);
        assert_eq!(points.last().map(|point| (point.memory_kib >> 10, point.cpu_milli)), Some((399, 500)));
    }

    #[test]
    fn a_task_that_waits_for_half_a_minute_is_blocked_until_it_moves() {
        let (start, mut watch, mut told) = (Instant::now(), Watch::new(INTERVAL), Vec::new());
        let task = Task {
            // Of nobody: it has no pending SIGKILL.
            pid: 0,
            start_time_ns: 7,
            switches: 9,
            comm: "dd".into(),
            place: "nfs_wait".into(),
            cgroup: PATH.into(),
        };
        for number in 0..8 {
            let found = if (1..6).contains(&number) { vec![task.clone()] } else { Vec::new() };
            watch.tasks(at(start, number), || found, &mut told);
        }
        assert_eq!(overs(&told), [(What::Blocked, false), (What::Blocked, true)]);
        assert!(watch.blocked.is_empty());
    }

    #[test]
    fn a_file_system_is_full_until_it_has_room_again() {
        let (start, mut watch, mut told) = (Instant::now(), Watch::new(INTERVAL), Vec::new());
        for number in 0..40 {
            let used_percent = match number {
                0..10 => 96,
                10..20 => 92,
                _ => 80,
            };
            let disk = tasks::FileSystem { mount: "/var".into(), used_percent, inodes_percent: 3 };
            watch.disks(at(start, number), vec![disk], &mut told);
        }
        let full = What::DiskFull;
        assert_eq!(overs(&told).first(), Some(&(full, false)));
        assert_eq!(overs(&told).last(), Some(&(full, true)));
        assert!(overs(&told).iter().filter(|told| told.1).count() == 1, "{told:?}");
    }
}
