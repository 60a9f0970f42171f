//! A container's processes: descriptors that run out, and a first process that is stopped.
//!
//! In: the ids of the processes in a cgroup, each two minutes. Out: the process that is nearest to its limit of open files, and the first
//! one if it is stopped. What must hold: one small file is read of each process; the kernel gives the number of its open files without
//! a list, or they are not counted; a limit that is remembered is read again before anything is said of it.

use std::path::Path;

use crate::host;
use crate::identity::scan::Stat;

/// Processes of a container that are looked at.
pub const PROCESSES_MAX: usize = 32;
/// Percent of the descriptors that a process may have, from which on it is near its limit.
const NEAR: u64 = 95;
/// A lower limit is set on purpose, by a process that wants to open nothing any more.
const LIMIT_MIN: u64 = 10;

/// A process that has nearly all descriptors open that it may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptors {
    pub pid: u32,
    pub comm: String,
    pub open: u64,
    pub limit: u64,
}

/// What a look at a container's processes has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looked {
    pub descriptors: Option<Descriptors>,
    /// The first process, where it is stopped.
    pub stopped: Option<(u32, String)>,
}

/// The limits of open files that were read, by process and its start.
pub type KnownLimits = Vec<(u32, u64, u64)>;

/// Looks at these processes. The first process of the cgroup is the oldest one whose name begins with `first_comm`; empty means any.
pub fn look(pids: impl Iterator<Item = u32>, first_comm: &str, known: &mut KnownLimits) -> Looked {
    let mut looked = Looked::default();
    let mut seen = KnownLimits::new();
    let mut first: Option<(u64, bool, u32, String)> = None;
    for pid in pids {
        let Some(folder) = host::process(pid) else { continue };
        let Some(stat) = Stat::of(&folder) else { continue };
        // The runtime starts the first process before all others. Shims outlive their runtime, and are not it.
        let may_be_first = first_comm.is_empty() || stat.comm.starts_with(first_comm) && !stat.comm.contains("shim");
        if may_be_first && first.as_ref().is_none_or(|(start, ..)| stat.start_time_ns < *start) {
            first = Some((stat.start_time_ns, stat.is_stopped, pid, stat.comm.clone()));
        }
        let is_known = |known: &&(u32, u64, u64)| (known.0, known.1) == (pid, stat.start_time_ns);
        let limit = match known.iter().find(is_known) {
            Some(known) => known.2,
            None => open_files_limit(&folder).unwrap_or(u64::MAX),
        };
        let is_near = |open: &u64, limit: u64| open.saturating_mul(100) >= limit.saturating_mul(NEAR);
        let Some(open) = open_files(&folder).filter(|open| is_near(open, limit)) else {
            seen.push((pid, stat.start_time_ns, limit));
            continue;
        };
        // It may have been raised meanwhile.
        let limit = open_files_limit(&folder).unwrap_or(u64::MAX);
        seen.push((pid, stat.start_time_ns, limit));
        if is_near(&open, limit)
            && (LIMIT_MIN..u64::MAX).contains(&limit)
            && looked.descriptors.as_ref().is_none_or(|known| open > known.open)
        {
            looked.descriptors = Some(Descriptors { pid, comm: stat.comm, open, limit });
        }
    }
    *known = seen;
    looked.stopped = first.and_then(|(_, is_stopped, pid, comm)| is_stopped.then_some((pid, comm)));
    looked
}

/// How many files a process has open; [`None`] where the kernel gives no number without a list (before Linux 6.2 it is 0).
fn open_files(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::stat(folder.join("fd")).ok()?;
    u64::try_from(stat.st_size).ok().filter(|open| *open > 0)
}

/// The soft limit of open files: proc(5), `limits`. [`None`] for none, or where it cannot be read.
fn open_files_limit(folder: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(folder.join("limits")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}
