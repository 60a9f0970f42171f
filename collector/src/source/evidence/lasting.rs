//! Troubles of running workloads, and when to report them.
//!
//! In: whether a condition holds, once for each look. Out: reports of its beginning, its duration and its end. What must hold: several
//! looks in a row decide about the beginning and about the end. While a condition lasts it is reported again, for servers that missed
//! the first report.

use std::time::{Duration, Instant};

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// It is slowed down by its CPU limit, now.
    Throttled,
    /// It wants more processes than it may have.
    PidsAtLimit,
    /// It is above memory.high, and waits for memory.
    MemoryHigh,
    /// A process has nearly all the descriptors open that it may have.
    DescriptorsAtLimit,
    /// The table of connections of its own network namespace is full, and packets are dropped.
    ConnectionsDropped,
    /// Its first process is stopped.
    Stopped,
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
            Self::DescriptorsAtLimit => "descriptors-at-limit",
            Self::ConnectionsDropped => "connections-dropped",
            Self::Stopped => "stopped",
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
    /// One of no process and no place.
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
    told: Option<Instant>,
}

/// A report about a [`Lasting`] condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToTell {
    pub since: Instant,
    pub is_over: bool,
}

impl Lasting {
    /// Whether its beginning was reported, and its end was not.
    pub fn is_told(&self) -> bool {
        self.told.is_some()
    }

    /// When it began; [`None`] unless its beginning was reported and its end was not.
    pub fn told_since(&self) -> Option<Instant> {
        self.since.filter(|_| self.is_told())
    }

    /// Takes in one look. `looks` equal ones in a row decide; a condition that lasts is reported again after `told_again`.
    pub fn saw(&mut self, now: Instant, holds: bool, looks: u32, told_again: Duration) -> Option<ToTell> {
        if holds {
            self.holds_not = 0;
            self.holds += 1;
        } else {
            self.holds_not += 1;
            self.holds = 0;
        }
        let since = match holds || self.is_told() {
            true => *self.since.get_or_insert(now),
            false => self.since.take().unwrap_or(now),
        };
        if self.told.is_none() && self.holds >= looks
            || self.told.is_some_and(|told| holds && now.saturating_duration_since(told) >= told_again)
        {
            self.told = Some(now);
            return Some(ToTell { since, is_over: false });
        }
        if self.told.is_some() && self.holds_not >= looks {
            (self.told, self.since) = (None, None);
            return Some(ToTell { since, is_over: true });
        }
        None
    }
}
