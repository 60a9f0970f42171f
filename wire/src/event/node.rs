//! What systemd says, what is summed up over time, what was read as evidence, a table that is full, and what was missed.

use rkyv::{Archive, Deserialize, Serialize};

use super::{ArchivedFields, EntityId, FieldValue, Name};

fields! {
    /// A systemd unit changed its state.
    UnitState {
        unit: Name,
        /// `active`, `failed`, `activating`, … (`ActiveState`).
        active_state: Name,
        /// `running`, `auto-restart`, … (`SubState`).
        sub_state: Name,
        /// `success`, `exit-code`, `signal`, `oom-kill`, `start-limit-hit`, … (`Result`).
        result: Name,
        /// How the main process ended last: `CLD_*` of `waitid(2)`, and its exit code or signal.
        main_code: i32,
        main_status: i32,
        /// 0 while there is none.
        main_pid: u32,
        restarts: u32,
        /// 0 when it was not seen to run.
        main_exited_ns: u64,
    }
}

fields! {
    /// A job of systemd ended.
    UnitJob {
        unit: Name,
        /// `done`, `failed`, `canceled`, `timeout`, `dependency`, `skipped`, …
        result: Name,
    }
}

/// What a [`Histogram`] counts.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[rkyv(derive(Clone, Copy, Debug, PartialEq, Eq))]
#[repr(u8)]
pub enum Measure {
    /// Block I/O from issue to completion, by device and operation.
    BlockLatency = 1,
    /// Waiting for a CPU, by cgroup.
    RunQueueLatency = 2,
    /// DNS lookups from query to answer, by cgroup.
    DnsLatency = 3,
}

impl Measure {
    /// Every measure.
    pub const ALL: [Self; 3] = [Self::BlockLatency, Self::RunQueueLatency, Self::DnsLatency];

    /// The measure that a record's number names.
    pub fn from_u8(value: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|known| *known as u8 == value)
    }

    /// The name that metrics and people use.
    pub fn name(self) -> &'static str {
        match self {
            Self::BlockLatency => "block_latency",
            Self::RunQueueLatency => "run_queue_latency",
            Self::DnsLatency => "dns_latency",
        }
    }
}

impl ArchivedMeasure {
    /// The measure this stands for.
    pub fn get(self) -> Measure {
        match self {
            Self::BlockLatency => Measure::BlockLatency,
            Self::RunQueueLatency => Measure::RunQueueLatency,
            Self::DnsLatency => Measure::DnsLatency,
        }
    }
}

/// Slots of a [`Histogram`].
pub const HISTOGRAM_SLOTS: usize = 32;

fields! {
    /// Durations of many alike operations, summed up in the kernel since the histogram before this one.
    Histogram {
        measure: Measure,
        /// Operation as in `Detail::BlockIo`; 0 where it does not apply.
        operation: u8,
        device: u32,
        /// The time that it covers.
        interval_ns: u64,
        total_ns: u64,
        max_ns: u64,
        /// Slot `i` counts durations from 2^i up to 2^(i+1) microseconds; the first also what is shorter, the last what is longer.
        counts: [u32; HISTOGRAM_SLOTS],
    }
}

fields! {
    /// What the collector read when something lethal arrived, before it was gone. The subject is the event's entity.
    Observation {
        /// The cgroup that was read.
        cgroup: Name,
        /// Memory: 0 where it could not be read, `u64::MAX` for no limit.
        memory_limit_bytes: u64,
        memory_usage_bytes: u64,
        memory_peak_bytes: u64,
        /// `oom_kill` of `memory.events`, and how often the limit was hit (`max`, or `failcnt`).
        oom_kills: u64,
        limit_hits: u64,
        pids: u64,
        pids_limit: u64,
        /// `nr_throttled` and the time of `cpu.stat`.
        throttled: u64,
        throttled_us: u64,
        /// Memory pressure of `memory.pressure`: full, avg10, hundredths of a percent.
        memory_pressure: u32,
        /// The process that was read, where the cause was a signal: its sender.
        process: u32,
        process_comm: Name,
        process_command: Name,
        process_entity: EntityId,
        process_uid: u32,
    }
}

fields! {
    /// Something is wrong with a subject that lives, begins to be, goes on, or is over. Seen by the collector in its cgroup or its
    /// processes, without an event of the kernel.
    Trouble {
        /// `throttled`, `pids-at-limit`, `memory-high`, `blocked`, `disk-full`, …
        what: Name,
        /// Where: a mount point, or the kernel's function that a task waits in; unset where there is none.
        place: Name,
        /// The process that it is about, if one is.
        comm: Name,
        /// `CLOCK_BOOTTIME` when it was first seen, nanoseconds.
        since_ns: u64,
        /// How bad: percent of the periods, tasks, bytes, …, and the limit that it is compared with; 0 where there is none.
        value: u64,
        limit: u64,
        /// True if the trouble is over.
        is_over: bool,
    }
}

fields! {
    /// How a container's use went over the last minutes. The subject is the event's entity.
    Curve {
        /// The cgroup that was read.
        cgroup: Name,
        /// Memory limit, bytes; `u64::MAX` for none.
        limit_bytes: u64,
        /// Time between two points.
        interval_ns: u64,
        /// The oldest first; the last was taken at the event's time.
        points: Vec<Point>,
    }
}

fields! {
    /// The last lines that a container wrote before it died, without what is recognised as secret. The subject is the container.
    LogLines {
        /// The oldest first.
        lines: Vec<Name>,
    }
}

/// One sample of a [`Curve`].
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Point {
    /// Memory in use, KiB.
    pub memory_kib: u32,
    /// Share of page cache, and shared memory with tmpfs, in 255ths; what is left is anonymous memory and the kernel's.
    pub file_share: u8,
    pub shmem_share: u8,
    /// CPU time since the point before, thousandths of one core.
    pub cpu_milli: u16,
    /// Share of its periods since the point before in which it was throttled, percent.
    pub throttled: u8,
}

fields! {
    /// What fills a cgroup, and how its counters moved, read when something lethal arrived. The subject is the event's entity; the
    /// cgroup is its own, or the one above it whose limit was full.
    #[derive(Default)]
    CgroupUse {
        /// The cgroup that was read.
        cgroup: Name,
        /// Levels above the subject's own.
        height: u32,
        /// Bytes in use and the limit, `u64::MAX` for none; 0 where they could not be read.
        usage_bytes: u64,
        limit_bytes: u64,
        /// What the memory use consists of, by `memory.stat`, bytes. Kernel memory is 0 where version 1 does not say.
        anon_bytes: u64,
        file_bytes: u64,
        shmem_bytes: u64,
        kernel_bytes: u64,
        /// The time over which the differences below were taken; 0 where there is no earlier sample, and then no difference.
        window_ns: u64,
        /// Differences of `cpu.stat`: periods, throttled ones, and how long tasks were throttled.
        periods: u64,
        throttled: u64,
        throttled_us: u64,
        /// Differences of `memory.events`: how often the limit was hit, and OOM kills.
        limit_hits: u64,
        oom_kills: u64,
        /// The biggest cgroups below it, the biggest first; empty unless it is above the subject's own.
        members: Vec<Member>,
        /// A file system that the subject writes to and that has no room left, and its size; unset where none was found.
        full_mount: Name,
        full_mount_bytes: u64,
    }
}

/// One of the biggest below a cgroup.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Member {
    pub entity: EntityId,
    /// Path of the cgroup.
    pub cgroup: Name,
    pub usage_bytes: u64,
    /// 0 for no limit of its own.
    pub limit_bytes: u64,
    /// `oom_score_adj` of one of its processes.
    pub oom_score_adj: i16,
}

fields! {
    /// The kernel's table of connections (nf_conntrack) is full, or has room again. The subject is the node.
    Conntrack {
        entries: u64,
        entries_max: u64,
        /// Packets dropped because there was no room, and connections forgotten early to make some, since the event before this
        /// one; `u64::MAX` where the kernel does not report it.
        dropped: u64,
        early_dropped: u64,
        /// Who has most connections, by the address that began them: IPv6, or IPv4 mapped into it; 0 where it was not looked for.
        top_address: [u8; 16],
        /// How many of the connections that were looked at are its.
        top_entries: u64,
        looked_at: u64,
        /// Whether it is full: above the one threshold, and not yet below the other.
        is_full: bool,
    }
}

fields! {
    /// Something was missed, and when.
    Gap {
        /// What was watched: `pods`, `units`, …
        what: Name,
        /// Why: `expired`, `bus restarted`, …
        reason: Name,
        /// The interval in which changes may have been missed, `CLOCK_BOOTTIME` of the node, nanoseconds.
        from_ns: u64,
        until_ns: u64,
        /// Objects that were found to be gone afterwards.
        found_gone: u32,
    }
}
