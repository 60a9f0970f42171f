//! What a living container uses, in as few reads as possible.
//!
//! In: a container's path in its hierarchies. Out: its limits, read now and then, and samples, read often. What must hold: what is read
//! often stays open, and a file that a container has not is left out.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::counters::Counters;
use super::processes::PROCESSES_MAX;
use super::read::{Breakdown, Mounts, field, limit_version_1, number, pressure, text, throttled_us};

/// What a container may use, and what its memory consists of, in 255ths. No limit is `u64::MAX`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub memory_bytes: u64,
    pub high_bytes: u64,
    pub pids: u64,
    /// Cgroup whose limit of processes that is.
    pub pids_of: PidsOf,
    pub file_share: u8,
    pub shmem_share: u8,
}

/// Cgroup whose limit of processes is the one that counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PidsOf {
    #[default]
    Nobody,
    Own,
    /// The pod's (`podPidsLimit`).
    Pod,
}

impl Limits {
    /// Whether anything is limited.
    pub fn limit_something(&self) -> bool {
        self.memory_bytes != u64::MAX || self.pids_of != PidsOf::Nobody
    }
}

/// What a container uses at a moment, and its counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    pub memory_bytes: u64,
    pub cpu_us: u64,
    pub periods: u64,
    pub throttled: u64,
    pub throttled_us: u64,
    pub pids: u64,
    /// How often a process could not be made for `pids.max`.
    pub pids_hits: u64,
    /// How often it was above `memory.high`, and the share of the last ten seconds in which all waited, hundredths of a percent.
    pub high_hits: u64,
    pub memory_pressure: u32,
}

/// The files of a container that are read again and again: to open them each time would be most of the price.
#[derive(Debug, Default)]
pub struct Files {
    memory: Option<File>,
    /// Version 2's `memory.events`; for version 1, the file that counts the same.
    memory_events: Option<File>,
    limit_hits: [Option<File>; 2],
    oom_control: Option<File>,
    has_high: bool,
    memory_pressure: Option<File>,
    cpu: Option<File>,
    cpuacct: Option<File>,
    pids: Option<File>,
    pids_events: Option<File>,
    processes: Option<File>,
}

/// Files that are sampled are shorter.
const SAMPLED_BYTES_MAX: usize = 2048;

impl Files {
    /// What a container uses now, where `last` is what it used before; [`None`] when it is gone, or has no memory cgroup.
    pub fn sample(&self, last: &Sample) -> Option<Sample> {
        let mut bytes = [0; SAMPLED_BYTES_MAX];
        let mut sample = Sample { pids: last.pids, ..Sample::default() };
        sample.memory_bytes = again(self.memory.as_ref(), &mut bytes)?.trim().parse().ok()?;
        if let Some(events) = again(self.memory_events.as_ref().filter(|_| self.has_high), &mut bytes) {
            sample.high_hits = field(events, "high");
        }
        if let Some(text) = again(self.memory_pressure.as_ref(), &mut bytes) {
            sample.memory_pressure = pressure(text);
        }
        if let Some(stat) = again(self.cpu.as_ref(), &mut bytes) {
            sample.periods = field(stat, "nr_periods");
            sample.throttled = field(stat, "nr_throttled");
            sample.throttled_us = throttled_us(stat);
            sample.cpu_us = field(stat, "usage_usec");
        }
        if let Some(usage) = again(self.cpuacct.as_ref(), &mut bytes) {
            // Version 1 counts it in nanoseconds, in a controller of its own.
            sample.cpu_us = usage.trim().parse::<u64>().unwrap_or(0) / 1000;
        }
        if let Some(events) = again(self.pids_events.as_ref(), &mut bytes) {
            sample.pids_hits = field(events, "max");
        }
        if sample.pids_hits > last.pids_hits {
            sample.pids = again(self.pids.as_ref(), &mut bytes).and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        }
        Some(sample)
    }

    /// The counters that are compared over minutes, with those of a sample just taken.
    pub fn counters(&self, sample: &Sample) -> Counters {
        let mut bytes = [0; SAMPLED_BYTES_MAX];
        let mut counters = Counters {
            periods: sample.periods,
            throttled: sample.throttled,
            throttled_us: sample.throttled_us,
            ..Counters::default()
        };
        if let Some(events) = again(self.memory_events.as_ref(), &mut bytes) {
            (counters.limit_hits, counters.oom_kills) = (field(events, "max"), field(events, "oom_kill"));
        }
        for hits in self.limit_hits.iter().flatten() {
            let hits = again(Some(hits), &mut bytes).and_then(|text| text.trim().parse().ok());
            counters.limit_hits = counters.limit_hits.max(hits.unwrap_or(0));
        }
        if let Some(text) = again(self.oom_control.as_ref(), &mut bytes) {
            counters.oom_kills = field(text, "oom_kill");
        }
        counters
    }

    /// The ids of its processes, as many as are looked at; of a runtime, which has all its shims beside it, more.
    pub fn processes(&self, is_runtime: bool) -> Vec<u32> {
        let mut bytes = vec![0; if is_runtime { 16 << 10 } else { SAMPLED_BYTES_MAX }];
        let processes_max = if is_runtime { usize::MAX } else { PROCESSES_MAX };
        let text = again(self.processes.as_ref(), &mut bytes).unwrap_or_default();
        // A last number that is cut is left out.
        let whole = text.rfind('\n').and_then(|end| text.get(..end)).unwrap_or_default();
        whole.lines().filter_map(|line| line.parse().ok()).take(processes_max).collect()
    }
}

/// Reads an open file from its beginning.
fn again<'a>(file: Option<&File>, bytes: &'a mut [u8]) -> Option<&'a str> {
    let count = file?.read_at(bytes, 0).ok()?;
    std::str::from_utf8(bytes.get(..count)?).ok()
}

impl Mounts {
    /// What changes rarely: a container's limits, and what its memory consists of.
    pub fn limits(&self, path: &str) -> Limits {
        let at = |root: &Option<PathBuf>| root.as_ref().map(|root| root.join(path.trim_start_matches('/')));
        let mut limits = Limits { memory_bytes: u64::MAX, pids: u64::MAX, high_bytes: u64::MAX, ..Limits::default() };
        let folder = match (at(&self.memory), at(&self.version_2)) {
            (Some(folder), _) => {
                limits.memory_bytes = limit_version_1(&folder);
                folder
            }
            (None, Some(folder)) => {
                limits.memory_bytes = number(&folder.join("memory.max"));
                limits.high_bytes = number(&folder.join("memory.high"));
                folder
            }
            (None, None) => return limits,
        };
        let memory = Breakdown::of(&text(&folder.join("memory.stat")).unwrap_or_default());
        let all = memory.anon + memory.file + memory.shmem + memory.kernel;
        let share = |bytes: u64| (bytes.saturating_mul(255).checked_div(all).unwrap_or(0)) as u8;
        (limits.file_share, limits.shmem_share) = (share(memory.file), share(memory.shmem));
        if let Some(folder) = at(&self.pids).or_else(|| at(&self.version_2)) {
            let limit =
                |folder: &Path| Some(number(&folder.join("pids.max"))).filter(|limit| ![0, u64::MAX].contains(limit));
            let of_pod = || folder.parent().filter(|_| crate::intake::identity::is_container(path)).and_then(limit);
            (limits.pids, limits.pids_of) = match (limit(&folder), of_pod) {
                (Some(limit), _) => (limit, PidsOf::Own),
                (None, of_pod) => of_pod().map_or((u64::MAX, PidsOf::Nobody), |limit| (limit, PidsOf::Pod)),
            };
        }
        limits
    }

    /// Opens what is read of a container again and again; what it has not is left out.
    pub fn files(&self, path: &str, limits: &Limits) -> Files {
        let at = |root: &Option<PathBuf>| root.as_ref().map(|root| root.join(path.trim_start_matches('/')));
        let open = |folder: Option<PathBuf>, name: &str| File::open(folder?.join(name)).ok();
        let of_version_2 = self.memory.is_none();
        let folder = || if of_version_2 { at(&self.version_2) } else { at(&self.memory) };
        let of_version_1 = || folder().filter(|_| !of_version_2);
        let has_high = of_version_2 && limits.high_bytes != u64::MAX && limits.high_bytes != 0;
        let pids = || at(&self.pids).or_else(|| at(&self.version_2)).filter(|_| limits.pids_of != PidsOf::Nobody);
        // Where the pod's limit counts, it is the pod that has so many. The kernel counts who asked for too many at the asker
        // before Linux 6.11, and at the limit since.
        let has_pids = || match limits.pids_of {
            PidsOf::Pod => pids().and_then(|folder| folder.parent().map(Path::to_owned)),
            _ => pids(),
        };
        Files {
            memory: open(folder(), if of_version_2 { "memory.current" } else { "memory.usage_in_bytes" }),
            memory_events: open(folder().filter(|_| of_version_2), "memory.events"),
            limit_hits: ["memory.failcnt", "memory.memsw.failcnt"].map(|name| open(of_version_1(), name)),
            oom_control: open(of_version_1(), "memory.oom_control"),
            has_high,
            memory_pressure: open(folder().filter(|_| has_high), "memory.pressure"),
            cpu: open(at(&self.cpu).or_else(|| at(&self.version_2)), "cpu.stat"),
            cpuacct: open(at(&self.cpuacct), "cpuacct.usage"),
            pids: open(has_pids(), "pids.current"),
            pids_events: open(pids(), "pids.events"),
            processes: open(folder(), "cgroup.procs"),
        }
    }
}
