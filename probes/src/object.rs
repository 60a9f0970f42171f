//! What is in the compiled object: its programs, its maps, the layout of its counters.
//!
//! The constants are those of `bpf/include/tapio.h`.

use crate::record::{HISTOGRAM_SLOTS, RecordKind};

/// The compiled object, aligned as ELF wants it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tapio.bpf.o"));

/// Ring buffer of the lethal lane.
pub(crate) const LETHAL: &str = "lethal";
/// Array of ring buffers, one a CPU, of the bulk lane.
pub(crate) const BULK: &str = "bulk";
/// Size of the ring that the object declares for [`BULK`].
pub(crate) const BULK_TEMPLATE_BYTES: u32 = 65536;
/// Prefixes of paths, see [`crate::LoadConfig::audited_paths`].
pub(crate) const AUDITED: &str = "audited";
/// Set of cgroup ids, see [`crate::Controls::exclude_cgroup`].
pub(crate) const EXCLUDED: &str = "excluded";
/// One entry, see [`crate::Tuning`].
pub(crate) const TUNING: &str = "tuning";
/// Array of counters, see [`counter_index`].
pub(crate) const COUNTERS: &str = "counters";
/// What each cgroup has had of the lethal lane, see [`crate::Shares`].
pub(crate) const SHARES: &str = "shares";
/// Map of maps that says which maps of the aggregates are filled.
pub(crate) const SIDE: &str = "side";
/// One entry: `u32 need_wakeup`, then zeros.
pub(crate) const CONTROL: &str = "control";

const KINDS: usize = 64;
const COUNTERS_PER_KIND: usize = 5;
/// How many counters a CPU has.
pub(crate) const COUNTERS_PER_CPU: usize = KINDS * COUNTERS_PER_KIND;

const _: () = {
    let mut index = 0;
    while index < RecordKind::ALL.len() {
        assert!((RecordKind::ALL[index] as usize) < KINDS);
        index += 1;
    }
};

/// Which of a kind's counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Records that a program wanted to write, the dropped and the sampled ones included.
    Emitted = 0,
    /// Records that found the ring full.
    Dropped = 1,
    /// Records of the bulk lane that sampling left out, see [`crate::Tuning::bulk_sampling`].
    Sampled = 2,
    /// Records of the bulk lane whose kind is off ([`crate::Tuning::bulk_kinds_off`]) or whose cgroup is excluded
    /// ([`crate::Controls::exclude_cgroup`]).
    Excluded = 3,
    /// Records of the lethal lane whose cgroup had used up its share, see [`crate::LoadConfig::cgroup_records_per_second`].
    Limited = 4,
}

/// Where a counter is in the counters map: `u64[cpu][64 kinds][emitted, dropped, sampled, excluded, limited]`.
pub fn counter_index(cpu: usize, kind: RecordKind, counter: Counter) -> usize {
    (cpu * KINDS + kind as usize) * COUNTERS_PER_KIND + counter as usize
}

/// How a record travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordLane {
    /// Never sampled, rate limited or shed.
    Lethal,
    /// May be sampled, and every drop is counted.
    Bulk,
}

impl RecordLane {
    /// The name that metrics and logs use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lethal => "lethal",
            Self::Bulk => "bulk",
        }
    }
}

/// Where a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// Attaches to the raw tracepoint that its hook names.
    RawTracepoint,
    /// Attaches to a raw tracepoint whose arguments the verifier knows by type: what they point to is read by plain
    /// loads.
    TypedTracepoint,
    /// Attaches to what the sockets of all cgroups send: to the root of version 2.
    CgroupEgress,
    /// Attaches to what the sockets of all cgroups receive.
    CgroupIngress,
}

/// One program of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramInfo {
    /// Name in the object, in the kernel and in [`crate::LoadConfig::disabled`].
    pub name: &'static str,
    /// The raw tracepoint, or what else it belongs to.
    pub hook: &'static str,
    /// What sort of hook that is.
    pub attachment: Attachment,
    /// The lane of its records.
    pub lane: RecordLane,
    /// The kinds of its records.
    pub produces: &'static [RecordKind],
    /// The first kernel that has all it needs to attach.
    pub since: &'static str,
    /// Whether it runs unless it is disabled; the others run when they are asked for, see [`crate::LoadConfig::disabled`].
    pub by_default: bool,
}

const fn lethal(name: &'static str, hook: &'static str, produces: &'static [RecordKind]) -> ProgramInfo {
    let attachment = Attachment::RawTracepoint;
    ProgramInfo { name, hook, attachment, lane: RecordLane::Lethal, produces, since: "5.8", by_default: true }
}

const fn bulk(name: &'static str, hook: &'static str, produces: &'static [RecordKind]) -> ProgramInfo {
    let attachment = Attachment::RawTracepoint;
    ProgramInfo { name, hook, attachment, lane: RecordLane::Bulk, produces, since: "5.8", by_default: true }
}

const fn typed(program: ProgramInfo) -> ProgramInfo {
    ProgramInfo { attachment: Attachment::TypedTracepoint, ..program }
}

const fn on_packets(name: &'static str, attachment: Attachment, produces: &'static [RecordKind]) -> ProgramInfo {
    let hook = match attachment {
        Attachment::CgroupEgress => "cgroup_skb/egress",
        _ => "cgroup_skb/ingress",
    };
    ProgramInfo { attachment, ..bulk(name, hook, produces) }
}

const fn when_asked_for(program: ProgramInfo) -> ProgramInfo {
    ProgramInfo { by_default: false, ..program }
}

/// Every program, in the order in which they are attached: what others depend on for identity comes first.
pub const PROGRAMS: &[ProgramInfo] = &[
    typed(lethal("cgroup_mkdir", "cgroup_mkdir", &[RecordKind::CgroupMkdir])),
    typed(lethal("cgroup_rmdir", "cgroup_rmdir", &[RecordKind::CgroupRmdir])),
    lethal("process_exec", "sched_process_exec", &[RecordKind::Exec, RecordKind::ExecCommand]),
    lethal("process_exit", "sched_process_exit", &[RecordKind::Exit]),
    lethal("oom_victim", "mark_victim", &[RecordKind::Oom]),
    typed(lethal("signal_sent", "signal_generate", &[RecordKind::Signal])),
    bulk("reclaim_begin", "mm_vmscan_direct_reclaim_begin", &[]),
    bulk("reclaim_end", "mm_vmscan_direct_reclaim_end", &[RecordKind::Reclaim]),
    bulk("reclaim_mcg_begin", "mm_vmscan_memcg_reclaim_begin", &[]),
    bulk("reclaim_mcg_end", "mm_vmscan_memcg_reclaim_end", &[RecordKind::Reclaim]),
    typed(bulk("tcp_state", "inet_sock_set_state", &[RecordKind::Tcp])),
    typed(bulk("tcp_retransmit", "tcp_retransmit_skb", &[RecordKind::Tcp])),
    typed(bulk("tcp_reset_sent", "tcp_send_reset", &[RecordKind::Tcp])),
    typed(bulk("tcp_reset_recv", "tcp_receive_reset", &[RecordKind::Tcp])),
    typed(bulk("block_complete", "block_rq_complete", &[RecordKind::BlockIo, RecordKind::Histogram])),
    typed(bulk("packet_drop", "kfree_skb", &[RecordKind::PacketDrop])),
    // Before queries are remembered, their answers must be seen.
    on_packets(
        "packet_received",
        Attachment::CgroupIngress,
        &[RecordKind::Dns, RecordKind::Histogram, RecordKind::Tcp],
    ),
    on_packets("dns_query", Attachment::CgroupEgress, &[RecordKind::Dns]),
    typed(bulk("process_fork", "sched_process_fork", &[RecordKind::Fork])),
    lethal("signal_fatal", "signal_deliver", &[RecordKind::SignalDelivered]),
    typed(when_asked_for(bulk("sched_wakeup", "sched_wakeup", &[]))),
    typed(when_asked_for(bulk("sched_wake_new", "sched_wakeup_new", &[]))),
    typed(when_asked_for(bulk("sched_switch", "sched_switch", &[RecordKind::RunQueue, RecordKind::Histogram]))),
    when_asked_for(bulk("syscall_errors", "sys_exit", &[RecordKind::SyscallError])),
    when_asked_for(bulk("file_open", "sys_exit", &[RecordKind::FileOpen])),
];

/// The programs that run only when they are asked for.
pub fn off_by_default() -> Vec<String> {
    PROGRAMS.iter().filter(|program| !program.by_default).map(|program| program.name.to_owned()).collect()
}

/// Maps with a histogram for each CPU in each entry: of how many entries at least and at most, and how many bytes one of them
/// may take. Their two sides double that.
const HISTOGRAM_MAPS: &[(&str, [u32; 2], usize)] = &[
    ("block_latency_0", [32, 256], 2 << 20),
    ("block_latency_1", [32, 256], 2 << 20),
    ("run_queue_0", [128, 512], 8 << 20),
    ("run_queue_1", [128, 512], 8 << 20),
];

/// `struct histogram_sums` of `bpf/include/aggregate.h`: total, maximum, counts.
pub(crate) const HISTOGRAM_BYTES: usize = 16 + 4 * HISTOGRAM_SLOTS;

/// Returns the number of entries of these maps on a machine with this many CPUs.
pub(crate) fn histogram_map_entries(possible_cpus: usize) -> impl Iterator<Item = (&'static str, u32)> {
    HISTOGRAM_MAPS.iter().map(move |&(name, [least, most], bytes)| {
        let fitting = bytes / (HISTOGRAM_BYTES * possible_cpus.max(1));
        (name, u32::try_from(fitting).unwrap_or(most).clamp(least, most))
    })
}

/// Maps that only one program needs: where it is off they have a single entry.
pub(crate) const MAPS_OF_ONE_PROGRAM: &[(&str, &str)] = &[
    ("waiting", "sched_switch"),
    ("run_queue_0", "sched_switch"),
    ("run_queue_1", "sched_switch"),
    ("failing_0", "syscall_errors"),
    ("failing_1", "syscall_errors"),
    ("block_latency_0", "block_complete"),
    ("block_latency_1", "block_complete"),
    ("packet_drops_0", "packet_drop"),
    ("packet_drops_1", "packet_drop"),
    ("dns_queries", "dns_query"),
    ("dns_latency_0", "packet_received"),
    ("dns_latency_1", "packet_received"),
];

/// A set of error numbers; those above 191 are ignored.
pub(crate) fn errno_words(errnos: &[u32]) -> [u64; 3] {
    let mut words = [0; 3];
    for &errno in errnos {
        if let Some(word) = words.get_mut(errno as usize / 64) {
            *word |= 1 << (errno % 64);
        }
    }
    words
}

/// A set of signals as [`crate::LoadConfig::signal_mask`] wants it: bit `number - 1`, as in a `sigset_t`. Numbers outside 1
/// to 64 are ignored.
pub const fn signal_mask(signals: &[u32]) -> u64 {
    let mut mask = 0;
    let mut index = 0;
    while index < signals.len() {
        if let 1..=64 = signals[index] {
            mask |= 1 << (signals[index] - 1);
        }
        index += 1;
    }
    mask
}

/// Signals that end a process and are sent for a reason. Their numbers are those of x86-64 and aarch64: HUP INT QUIT
/// ILL TRAP ABRT BUS FPE KILL SEGV TERM XCPU XFSZ SYS.
pub const DEFAULT_SIGNAL_MASK: u64 = signal_mask(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 15, 24, 25, 31]);

/// Signals that end a process which does not handle them, and are frequent where it does: USR1 USR2 PIPE ALRM STKFLT VTALRM
/// PROF WINCH IO PWR and the real-time ones. Recorded where nobody handles them, or from another cgroup: an image may name any
/// of them as its STOPSIGNAL.
pub const DEFAULT_SIGNAL_MASK_UNHANDLED: u64 =
    signal_mask(&[10, 12, 13, 14, 16, 26, 27, 28, 29, 30]) | !signal_mask_below(34);

const fn signal_mask_below(signal: u32) -> u64 {
    (1 << (signal - 1)) - 1
}

/// Errors that mean that something has run out or is broken: EIO ENOMEM ENFILE EMFILE ENOSPC EROFS ECONNREFUSED.
pub const DEFAULT_ERRNOS: &[u32] = &[5, 12, 23, 24, 28, 30, 111];

/// Errors that mean so only where a process should have been made: EAGAIN.
pub const DEFAULT_ERRNOS_OF_FORK: &[u32] = &[11];

/// See [`crate::LoadConfig::cgroup_records_per_second`].
pub const DEFAULT_CGROUP_RECORDS_PER_SECOND: u32 = 4_000;
/// Part of its share that a cgroup may use at once.
pub(crate) const SHARE_BURST_NS: u64 = 250_000_000;

/// Where containers, and kubelet, have secrets.
pub const DEFAULT_AUDITED_PATHS: &[&str] = &["/var/run/secrets/", "/run/secrets/", "/etc/secrets/"];

/// How many paths can be audited.
pub const AUDITED_PATHS_MAX: usize = 8;
/// How long one may be.
pub const AUDITED_PATH_BYTES_MAX: usize = 63;

/// The compiled object, an ELF file.
pub fn object() -> &'static [u8] {
    OBJECT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_counters_share_a_place_and_all_are_inside() {
        let mut places = std::collections::HashSet::new();
        for cpu in 0..4 {
            for kind in RecordKind::ALL {
                for counter in
                    [Counter::Emitted, Counter::Dropped, Counter::Sampled, Counter::Excluded, Counter::Limited]
                {
                    let index = counter_index(cpu, kind, counter);
                    assert!(index < 4 * COUNTERS_PER_CPU);
                    assert!(places.insert(index));
                }
            }
        }
    }

    #[test]
    fn every_program_writes_only_kinds_of_its_lane() {
        for program in PROGRAMS {
            assert!(program.produces.iter().all(|kind| kind.is_lethal() == (program.lane == RecordLane::Lethal)));
        }
    }

    #[test]
    fn the_signal_mask_has_a_bit_for_each_signal() {
        assert_eq!(signal_mask(&[1, 9, 64, 0, 65]), 1 | 1 << 8 | 1 << 63);
    }
}
