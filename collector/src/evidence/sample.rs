//! What a living container uses, in as few reads as possible.
//!
//! In: a container's path in its hierarchies. Out: its limits, read now and then, and samples, read often. What must hold: what is read
//! often stays open, and a file that a container has not is left out.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::read::{Breakdown, Mounts, field, limit_version_1, number, pressure, text};

/// What a container may use, and what its memory consists of, in 255ths. No limit is `u64::MAX`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub memory_bytes: u64,
    pub high_bytes: u64,
    pub pids: u64,
    pub file_share: u8,
    pub shmem_share: u8,
}

/// What a container uses at a moment, and its counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    pub memory_bytes: u64,
    pub cpu_us: u64,
    pub periods: u64,
    pub throttled: u64,
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
    memory_events: Option<File>,
    memory_pressure: Option<File>,
    cpu: Option<File>,
    cpuacct: Option<File>,
    pids: Option<File>,
    pids_events: Option<File>,
}

/// Files that are sampled are shorter.
const SAMPLED_BYTES_MAX: usize = 2048;

impl Files {
    /// What a container uses now, where `last` is what it used before; [`None`] when it is gone, or has no memory cgroup.
    pub fn sample(&self, last: &Sample) -> Option<Sample> {
        let mut bytes = [0; SAMPLED_BYTES_MAX];
        let mut sample = Sample { pids: last.pids, ..Sample::default() };
        sample.memory_bytes = again(self.memory.as_ref(), &mut bytes)?.trim().parse().ok()?;
        if let Some(events) = again(self.memory_events.as_ref(), &mut bytes) {
            sample.high_hits = field(events, "high");
        }
        if let Some(text) = again(self.memory_pressure.as_ref(), &mut bytes) {
            sample.memory_pressure = pressure(text);
        }
        if let Some(stat) = again(self.cpu.as_ref(), &mut bytes) {
            sample.periods = field(stat, "nr_periods");
            sample.throttled = field(stat, "nr_throttled");
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
            limits.pids = match number(&folder.join("pids.max")) {
                0 => u64::MAX,
                limit => limit,
            };
        }
        limits
    }

    /// Opens what is read of a container again and again; what it has not is left out.
    pub fn files(&self, path: &str, limits: &Limits) -> Files {
        let at = |root: &Option<PathBuf>| root.as_ref().map(|root| root.join(path.trim_start_matches('/')));
        let open = |folder: Option<PathBuf>, name: &str| File::open(folder?.join(name)).ok();
        let of_version_2 = self.memory.is_none();
        let has_high = of_version_2 && limits.high_bytes != u64::MAX && limits.high_bytes != 0;
        let memory = if of_version_2 { "memory.current" } else { "memory.usage_in_bytes" };
        let folder = || if of_version_2 { at(&self.version_2) } else { at(&self.memory) };
        let pids = || at(&self.pids).or_else(|| at(&self.version_2)).filter(|_| limits.pids != u64::MAX);
        Files {
            memory: open(folder(), memory),
            memory_events: open(folder().filter(|_| has_high), "memory.events"),
            memory_pressure: open(folder().filter(|_| has_high), "memory.pressure"),
            cpu: open(at(&self.cpu).or_else(|| at(&self.version_2)), "cpu.stat"),
            cpuacct: open(at(&self.cpuacct), "cpuacct.usage"),
            pids: open(pids(), "pids.current"),
            pids_events: open(pids(), "pids.events"),
        }
    }
}
