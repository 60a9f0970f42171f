//! Troubles of running workloads, and when to report them.
//!
//! In: whether a condition holds, once for each look. Out: reports of its beginning, its duration and its end. What must hold: several
//! looks in a row decide about the beginning and about the end. While a condition lasts it is reported again, for servers that missed
//! the first report.

use std::time::{Duration, Instant};

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// The CPU limit slows it down now.
    Throttled,
    /// The cgroup needs more processes than it may have.
    PidsAtLimit,
    /// Memory is above memory.high, and the cgroup waits for memory.
    MemoryHigh,
    /// A process has nearly all the descriptors open that it may have.
    DescriptorsAtLimit,
    /// The table of connections of its own network namespace is full, and packets are dropped.
    ConnectionsDropped,
    /// The first process is stopped.
    Stopped,
    /// A process waits in the kernel and cannot be interrupted.
    Blocked,
    /// A process was sent SIGKILL and still waits in the kernel, uninterruptibly.
    Unkillable,
    /// A file system of the node has no room.
    DiskFull,
    /// The file system has no free inodes.
    InodesFull,
    /// It will soon have no room: kubelet begins to delete images and to evict pods before it is full.
    DiskFilling,
    /// The same of its inodes.
    InodesFilling,
}

impl What {
    /// Name in events and patterns.
    pub fn name(self) -> &'static str {
        match self {
            Self::Throttled => "throttled",
            Self::PidsAtLimit => "pids-at-limit",
            Self::MemoryHigh => "memory-high",
            Self::DescriptorsAtLimit => "descriptors-at-limit",
            Self::ConnectionsDropped => "connections-dropped",
            Self::Stopped => "stopped",
            Self::Blocked => "blocked",
            Self::Unkillable => "unkillable",
            Self::DiskFull => "disk-full",
            Self::InodesFull => "inodes-full",
            Self::DiskFilling => "disk-filling",
            Self::InodesFilling => "inodes-filling",
        }
    }
}

/// Entity that has the trouble.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whose {
    /// A cgroup's, by its path.
    Cgroup(String),
    Node,
}

/// A trouble that begins, goes on, or is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    pub whose: Whose,
    pub what: What,
    /// The process that it is about, 0 where it is about none.
    pub pid: u32,
    pub comm: String,
    /// Where: a mount point, or a function of the kernel.
    pub place: String,
    pub since: Instant,
    /// How bad it is, and the limit that this is compared with.
    pub value: u64,
    pub limit: u64,
    pub is_over: bool,
}

impl Trouble {
    /// Makes a trouble of no process and no place.
    pub fn new(whose: Whose, what: What, since: Instant, (value, limit): (u64, u64), is_over: bool) -> Self {
        Self { whose, what, pid: 0, comm: String::new(), place: String::new(), since, value, limit, is_over }
    }
}

/// Decides when a condition is reported.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lasting {
    holds: u32,
    holds_not: u32,
    since: Option<Instant>,
    reported: Option<Instant>,
}

/// A report about a [`Lasting`] condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastingReport {
    pub since: Instant,
    pub is_over: bool,
}

impl Lasting {
    /// Whether its beginning was reported, and its end was not.
    pub fn is_reported(&self) -> bool {
        self.reported.is_some()
    }

    /// When it began; [`None`] unless its beginning was reported and its end was not.
    pub fn reported_since(&self) -> Option<Instant> {
        self.since.filter(|_| self.is_reported())
    }

    /// Takes in one look. `looks` equal ones in a row decide; a condition that lasts is reported again after `repeat_interval`.
    pub fn saw(&mut self, now: Instant, holds: bool, looks: u32, repeat_interval: Duration) -> Option<LastingReport> {
        if holds {
            self.holds_not = 0;
            self.holds += 1;
        } else {
            self.holds_not += 1;
            self.holds = 0;
        }
        let since = match holds || self.is_reported() {
            true => *self.since.get_or_insert(now),
            false => self.since.take().unwrap_or(now),
        };
        if self.reported.is_none() && self.holds >= looks
            || self.reported.is_some_and(|reported| holds && now.saturating_duration_since(reported) >= repeat_interval)
        {
            self.reported = Some(now);
            return Some(LastingReport { since, is_over: false });
        }
        if self.reported.is_some() && self.holds_not >= looks {
            (self.reported, self.since) = (None, None);
            return Some(LastingReport { since, is_over: true });
        }
        None
    }
}
