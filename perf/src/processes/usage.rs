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

/// What the threads of one name have used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThreadUsage {
    pub name: String,
    pub cpu_ns: u64,
    /// How often they were put to sleep because they had nothing to do: as often they were woken.
    pub sleeps: u64,
}

/// What each thread of process `pid` has used, those of one name together; empty when it is gone.
pub fn threads(pid: u32) -> Vec<ThreadUsage> {
    let mut threads: Vec<ThreadUsage> = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let text = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        // io_uring's workers have their creator's number in their names, and shards their own.
        let name = text("comm").trim().trim_end_matches(|c: char| c.is_ascii_digit() || c == '-').to_owned();
        let cpu_ns = text("schedstat").split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0);
        let status = text("status");
        let sleeps = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let sleeps = sleeps.and_then(|count| count.trim().parse().ok()).unwrap_or(0);
        match threads.iter_mut().find(|known| known.name == name) {
            Some(known) => {
                known.cpu_ns += cpu_ns;
                known.sleeps += sleeps;
            }
            None => threads.push(ThreadUsage { name, cpu_ns, sleeps }),
        }
    }
    threads.sort_by(|a, b| a.name.cmp(&b.name));
    threads
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
    use super::{read, stat_ticks, status_bytes, threads};

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

    #[test]
    fn threads_of_one_name_are_counted_together() {
        let work = || std::thread::sleep(std::time::Duration::from_millis(1));
        let (hold, wait) = std::sync::mpsc::sync_channel::<()>(0);
        let started: Vec<_> = (0..2)
            .map(|number| {
                let hold = hold.clone();
                let body = move || {
                    work();
                    hold.send(()).is_ok()
                };
                std::thread::Builder::new().name(format!("twin-{number}")).spawn(body).expect("it starts")
            })
            .collect();
        let twins = loop {
            let twins = threads(std::process::id()).into_iter().find(|thread| thread.name == "twin");
            // Each of them has slept once, and waits for its word to be taken.
            if let Some(twins) = twins.filter(|twins| twins.sleeps >= 4) {
                break twins;
            }
        };
        assert!(twins.cpu_ns > 0);
        (0..2).for_each(|_| wait.recv().expect("a word"));
        assert!(started.into_iter().all(|thread| thread.join().expect("it ends")));
        assert!(threads(u32::MAX).is_empty());
    }
}
