//! CPU time and memory of a process, from procfs.

use std::fs;

/// What a process has used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time of all its threads, nanoseconds.
    pub cpu_ns: u64,
    /// Resident memory now, bytes.
    pub rss_bytes: u64,
    /// The most it ever was, bytes.
    pub rss_peak_bytes: u64,
}

/// What process `pid` has used; `None` when it is gone.
///
/// The scheduler's exact sum covers threads that live, the ticks of `stat` also those that ended: the larger one is taken.
pub fn read(pid: u32) -> Option<Usage> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let exact: u64 = fs::read_dir(format!("/proc/{pid}/task"))
        .ok()?
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let tick_ns = 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1);
    Some(Usage {
        cpu_ns: exact.max(stat_ticks(&stat)? * tick_ns),
        rss_bytes: status_bytes(&status, "VmRSS:").unwrap_or(0),
        rss_peak_bytes: status_bytes(&status, "VmHWM:").unwrap_or(0),
    })
}

/// utime + stime; the name before them may hold spaces and parentheses.
fn stat_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

fn status_bytes(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::{read, stat_ticks, status_bytes};

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 50 60 0 0 20 0 1 0 9 1 2";
        assert_eq!(stat_ticks(stat), Some(110));
    }

    #[test]
    fn sizes_are_kibibytes() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(status_bytes(status, "VmRSS:"), Some(1 << 20));
        assert_eq!(status_bytes(status, "VmSwap:"), None);
    }

    #[test]
    fn this_process_uses_something() {
        let usage = read(std::process::id()).expect("this process lives");
        assert!(usage.cpu_ns > 0 && usage.rss_bytes > 0);
        assert!(usage.rss_peak_bytes >= usage.rss_bytes);
        assert_eq!(read(u32::MAX), None);
    }
}
