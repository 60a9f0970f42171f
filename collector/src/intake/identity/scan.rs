//! What procfs and the cgroup file systems say of containers that ran before anybody watched.
//!
//! What enters: the cgroups of a container. What leaves: its first process, those that entered it later, and the container that
//! holds it. What must hold: nothing is read of a process whose id may be another one's.

use std::path::{Path, PathBuf};

use super::path::{Named, name_of};
use super::roles::{Roles, Started};
use crate::base::clock::boottime_ns;
use tapio_wire::event::{EntityId, EntityKind};

/// Processes looked at in one container.
const PROCESSES_MAX: usize = 4096;
/// Generations that are gone up to find who holds a container.
const GENERATIONS_MAX: usize = 8;

/// Whether two times are one start. procfs gives a start to the hundredth of a second; 0 stands for an unknown one.
pub fn is_same_start(one_ns: u64, other_ns: u64) -> bool {
    one_ns == 0 || other_ns == 0 || one_ns.abs_diff(other_ns) < 20_000_000
}

/// What `/proc/PID/stat` says of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    pub comm: String,
    pub parent_pid: u32,
    /// `CLOCK_BOOTTIME`, to the hundredth of a second.
    pub start_time_ns: u64,
    /// True if stopped by SIGSTOP or a similar signal, or by a debugger.
    pub is_stopped: bool,
}

impl Stat {
    /// Reads a process's folder; [`None`] when it is gone.
    pub fn of(folder: &Path) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(folder.join("stat")).ok()?)
    }

    /// proc(5): the name stands in parentheses and may hold some itself; the state is the 3rd field, the parent the 4th,
    /// the start the 22nd.
    fn parse(text: &str) -> Option<Self> {
        let (before, after) = text.rsplit_once(')')?;
        let comm = before.split_once('(')?.1.to_owned();
        let mut fields = after.split_whitespace();
        let is_stopped = matches!(fields.next()?, "T" | "t");
        let parent_pid = fields.next()?.parse().ok()?;
        let ticks: u64 = fields.nth(17)?.parse().ok()?;
        let per_second = rustix::param::clock_ticks_per_second().max(1);
        let start_time_ns = ticks.saturating_mul(1_000_000_000 / per_second);
        Some(Self { comm, parent_pid, start_time_ns, is_stopped })
    }
}

/// Finds the first process of a container among the processes of its cgroups' folders: of those whose parent is not among them
/// the one that started first.
pub fn first_process(roles: &mut Roles, container: EntityId, in_pod: bool, folders: &[PathBuf]) -> Option<u32> {
    let mut pids: Vec<u32> = Vec::new();
    for folder in folders {
        let text = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).take(PROCESSES_MAX));
    }
    pids.sort_unstable();
    pids.dedup();
    pids.truncate(PROCESSES_MAX);
    let stats = pids.iter().filter_map(|&pid| Some((pid, Stat::of(&crate::base::host::process(pid)?)?)));
    let mut entered: Vec<(u32, Stat)> =
        stats.filter(|(_, stat)| pids.binary_search(&stat.parent_pid).is_err()).collect();
    entered.sort_by_key(|(pid, stat)| (stat.start_time_ns, *pid));
    let (pid, stat) = entered.first()?;
    let first = Started {
        pid: *pid,
        start_time_ns: stat.start_time_ns,
        parent_pid: stat.parent_pid,
        parent_inside: false,
        comm: &stat.comm,
        ns_pid: 0,
        ns_level: 1,
        in_pod,
    };
    roles.scanned(container, first, entered.iter().skip(1).map(|(pid, _)| *pid), boottime_ns());
    Some(*pid)
}

/// The container of a pod from which a process descends: a container that another container's runtime made is that one's.
pub fn holder(pid: u32) -> Option<Named> {
    let mut at = pid;
    for _ in 0..GENERATIONS_MAX {
        at = Stat::of(&crate::base::host::process(at)?)?.parent_pid;
        let text = std::fs::read_to_string(crate::base::host::process(at)?.join("cgroup")).ok()?;
        let paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
        let held = paths.map(name_of).find(|named| named.kind == EntityKind::Container && !named.pod_uid.is_empty());
        if held.is_some() {
            return held;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_whatever_its_name_is() {
        let own = Stat::of(Path::new("/proc/self")).expect("it runs");
        assert!(own.start_time_ns > 0 && own.parent_pid > 0, "{own:?}");
        let text = "42 (a) b (c) S 7 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 250 0 0";
        let stat = Stat::parse(text).expect("sound");
        assert_eq!((&*stat.comm, stat.parent_pid), ("a) b (c", 7));
        assert_eq!(stat.start_time_ns, 250 * (1_000_000_000 / rustix::param::clock_ticks_per_second()));
        assert_eq!(Stat::parse("42 (a"), None);
    }

    #[test]
    fn starts_are_compared_as_exactly_as_procfs_shows_them() {
        assert!(is_same_start(5_000_000_000, 5_009_999_999) && is_same_start(0, 5) && is_same_start(5, 0));
        assert!(!is_same_start(5_000_000_000, 5_100_000_000));
    }
}
