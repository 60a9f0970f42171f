//! A container's processes: descriptors that run out, and a first process that is stopped.
//!
//! In: the ids of the processes in a cgroup, each two minutes. Out: the process that is nearest to its limit of open files, and the first
//! one if it is stopped. What must hold: one small file is read of each process; a limit that is remembered is read again before
//! anything is said of it.
//!
//! Since Linux 6.2 the kernel gives the number of open files without a list. Before it they are listed, which costs
//! some time for each file. So they are listed only where the process's table of files could hold nearly as many as its
//! limit. Of all processes of a container, at most [`LISTED_MAX`] files are listed.

use std::path::Path;

use crate::base::host;
use crate::intake::identity::scan::Stat;

/// Processes of a container that are looked at.
pub const PROCESSES_MAX: usize = 32;
/// Percent of the descriptors that a process may have, from which on it is near its limit.
const NEAR: u64 = 95;
/// A lower limit is set on purpose, by a process that wants to open nothing any more.
const LIMIT_MIN: u64 = 10;
/// Open files that are listed in one look, on kernels that do not give their number. A limit above it is not watched there.
const LISTED_MAX: u64 = 65_536;

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
    let mut listable = LISTED_MAX;
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
        let open = open_files(&folder).or_else(|| listed_files(&folder, limit, &mut listable));
        let Some(open) = open.filter(|open| is_near(*open, limit)) else {
            seen.push((pid, stat.start_time_ns, limit));
            continue;
        };
        // It may have been raised meanwhile.
        let limit = open_files_limit(&folder).unwrap_or(u64::MAX);
        seen.push((pid, stat.start_time_ns, limit));
        if is_near(open, limit)
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

fn is_near(open: u64, limit: u64) -> bool {
    open.saturating_mul(100) >= limit.saturating_mul(NEAR)
}

/// How many files a process has open; [`None`] where the kernel gives no number without a list (before Linux 6.2 it is 0).
fn open_files(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::stat(folder.join("fd")).ok()?;
    u64::try_from(stat.st_size).ok().filter(|open| *open > 0)
}

/// Counts open files by listing them, if the process may be near its limit and `listable` allows that many.
fn listed_files(folder: &Path, limit: u64, listable: &mut u64) -> Option<u64> {
    // The table of files, which only grows, has room for so many.
    let status = std::fs::read_to_string(folder.join("status")).ok()?;
    let room = status.lines().find_map(|line| line.strip_prefix("FDSize:")?.trim().parse().ok())?;
    if !is_near(room, limit) || limit > *listable {
        return None;
    }
    // A lowered limit leaves open what is above it.
    let open = std::fs::read_dir(folder.join("fd")).ok()?.take(*listable as usize).count() as u64;
    *listable -= open;
    Some(open)
}

/// The soft limit of open files: proc(5), `limits`. [`None`] for none, or where it cannot be read.
fn open_files_limit(folder: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(folder.join("limits")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process that may have twenty files open, and has them.
    fn hoarder() -> Child {
        let script = "for n in 1 2 3 4 5 6 7 8 9 10; do exec {x}</dev/null; done; \
                      exec 3</dev/null 4</dev/null 5</dev/null 6</dev/null 7</dev/null 8</dev/null 9</dev/null; \
                      ulimit -Sn 20; echo; read -r x";
        let mut command = Command::new("bash");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("bash starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it is piped")).read_line(&mut line).expect("it has opened them");
        child
    }

    #[test]
    fn open_files_are_found_at_their_limit_on_any_kernel() {
        let mut child = hoarder();
        let found = look([child.id()].into_iter(), "", &mut KnownLimits::new()).descriptors;
        let folder = host::process(child.id()).expect("it runs");
        // Twenty, and what this test had open itself when it began.
        let open = std::fs::read_dir(folder.join("fd")).expect("a list").count() as u64;
        assert!(open >= 20, "{open}");
        assert_eq!(found, Some(Descriptors { pid: child.id(), comm: "bash".into(), open, limit: 20 }));
        // (limit, files that may still be listed, what is found)
        for (limit, listable, expected) in [(20, LISTED_MAX, Some(open)), (1 << 20, LISTED_MAX, None), (20, 19, None)] {
            let mut left = listable;
            assert_eq!(listed_files(&folder, limit, &mut left), expected, "{limit} {listable}");
            assert_eq!(left, listable - expected.unwrap_or(0));
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}
