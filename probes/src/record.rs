//! The layout of every record that a probe, or a local process that writes a memfd ring, puts into a ring.
//!
//! A record is a [`Header`] followed by the fields of its [`RecordKind`]. All integers are in the machine's byte order, all
//! padding is explicit and zero, and sizes are multiples of eight. `bpf/include/record.h` declares the same structs in C; a
//! test compares both by the object's BTF, and the assertions below fix the sizes at compile time.
//!
//! ```text
//!  0      2      4        8                16               24       28       32
//!  ├──────┼──────┼────────┼────────────────┼────────────────┼────────┼────────┤
//!  │ kind │ size │  cpu   │ time_ns        │ cgroup_id      │  pid   │  tid   │ fields of the kind …
//!  └──────┴──────┴────────┴────────────────┴────────────────┴────────┴────────┘
//! ```
//!
//! `time_ns` is `CLOCK_BOOTTIME`. `cgroup_id`, `pid` (the thread group) and `tid` are those of the *subject*: the victim of
//! an OOM kill, the target of a signal, otherwise the task itself. Process ids are those of the node's own namespace.

mod kind;

use std::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use self::kind::RecordKind;

/// Set in a cgroup id that belongs to the version 1 memory hierarchy: ids of different hierarchies may collide.
pub const CGROUP_V1_MEMORY: u64 = 1 << 63;

/// Bytes of a `comm`: `TASK_COMM_LEN` of the kernel, NUL padded.
pub const COMM_BYTES: usize = 16;
/// Bytes of a cgroup path in [`Cgroup`], NUL padded.
pub const CGROUP_PATH_BYTES: usize = 256;
/// The largest record, in bytes.
pub const RECORD_BYTES_MAX: usize = 512;

/// A member of a record: its name, offset and bytes.
pub type Member = (&'static str, usize, usize);

macro_rules! record {
    ($(#[$meta:meta])* $name:ident, $bytes:literal { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }
        impl $name {
            /// The members in their order. `tests/layout.rs` compares them with those of the struct in C.
            pub const MEMBERS: &'static [Member] =
                &[$((stringify!($field), offset_of!($name, $field), size_of::<$type>())),*];
        }
        const _: () = assert!(size_of::<$name>() == $bytes && $bytes % 8 == 0 && $bytes <= RECORD_BYTES_MAX);
    };
}

record! {
    /// What every record starts with.
    Header, 32 {
        /// A [`RecordKind`].
        kind: u16,
        /// Bytes of the whole record, this header included.
        size: u16,
        /// The CPU that wrote it.
        cpu: u32,
        /// `CLOCK_BOOTTIME`, nanoseconds.
        time_ns: u64,
        /// The subject's cgroup: of version 2, or, where the task has none but the root, of the version 1 memory
        /// hierarchy with [`CGROUP_V1_MEMORY`] set.
        cgroup_id: u64,
        /// The subject's process (thread group).
        pid: u32,
        /// The subject's thread.
        tid: u32,
    }
}

record! {
    /// A process image was replaced.
    Exec, 80 {
        header: Header,
        parent_pid: u32,
        /// The process id in its own pid namespace: 1 is a container's init.
        ns_pid: u32,
        /// How deep its pid namespace is nested: 0 is the node's.
        ns_level: u32,
        pad: u32,
        /// When the process started, `CLOCK_BOOTTIME`, nanoseconds; 0 where it is not known.
        start_time_ns: u64,
        /// Cgroup of the parent, as in the header; 0 where it is not known. Who started a container is outside of it.
        parent_cgroup_id: u64,
        comm: [u8; COMM_BYTES],
    }
}

record! {
    /// The last thread of a process died.
    Exit, 80 {
        header: Header,
        parent_pid: u32,
        ns_pid: u32,
        ns_level: u32,
        /// Status as `wait(2)` reports it: exit code in bits 8–15, signal in bits 0–6, core dump in bit 7.
        status: u32,
        /// When the process started, `CLOCK_BOOTTIME`, nanoseconds.
        start_time_ns: u64,
        oom_score_adj: i16,
        pad: [u8; 6],
        comm: [u8; COMM_BYTES],
    }
}

record! {
    /// The OOM killer chose a victim (the subject). The allocating task is the one that ran into the limit.
    Oom, 296 {
        header: Header,
        ns_pid: u32,
        ns_level: u32,
        allocator_pid: u32,
        allocator_tid: u32,
        allocator_cgroup_id: u64,
        /// The victim's memory when it was chosen, bytes; without what single CPUs (single threads before Linux 6.2) have
        /// yet to add, some dozens of pages each.
        anon_rss_bytes: u64,
        file_rss_bytes: u64,
        shmem_rss_bytes: u64,
        /// The victim's address space.
        total_vm_bytes: u64,
        /// The cgroup in the victim's chain whose limit left no room (version 1 ids are marked), 0 when no cgroup of the
        /// chain has a limit.
        limit_cgroup_id: u64,
        /// Memory limit, bytes.
        limit_bytes: u64,
        /// What it used when the victim was chosen, bytes.
        usage_bytes: u64,
        /// How many levels above the victim's own memory cgroup it is.
        limit_height: u32,
        oom_score_adj: i16,
        /// 1 when the allocator's memory is charged to that cgroup too; 2 when not: then the shortage was not there, unless
        /// it uses more than its limit. 3 when it had room again, and the kernel was still killing for that limit. 0 where it is
        /// not known.
        allocator_inside: u8,
        pad: u8,
        /// When the victim started, and its parent; 0 where they are not known.
        start_time_ns: u64,
        parent_pid: u32,
        pad2: u32,
        comm: [u8; COMM_BYTES],
        allocator_comm: [u8; COMM_BYTES],
        /// The last component of the limiting cgroup's path.
        limit_name: [u8; 128],
    }
}

record! {
    /// A signal that can end a process was sent to the subject.
    Signal, 136 {
        header: Header,
        signal: u32,
        /// `si_code`; `SI_KERNEL` (0x80) when the kernel sent it without details.
        code: i32,
        /// The sender: the task that was running. It has nothing to do with it where `from_kernel` is set and the task is
        /// not the target.
        sender_pid: u32,
        sender_tid: u32,
        sender_cgroup_id: u64,
        /// The target's process id in its own pid namespace.
        ns_pid: u32,
        ns_level: u32,
        /// 1 when the kernel itself sent it (a fault, the OOM killer, a timer, finished I/O), 0 when a process did.
        from_kernel: u8,
        /// `TRACE_SIGNAL_*`: 0 delivered, 1 ignored, 2 already pending, 3 and 4 overflow.
        result: u8,
        /// 1 when the kernel killed a process that had used up its CPU time (RLIMIT_CPU).
        over_cpu_limit: u8,
        pad: u8,
        /// Signals of the same number to the same process, which handles or ignores it, since the record before this
        /// one.
        repeats: u32,
        /// When the sender started, `CLOCK_BOOTTIME`, nanoseconds; 0 where it is not known.
        sender_start_time_ns: u64,
        /// Who started the sender, or adopted it when its parent ended.
        sender_parent_pid: u32,
        pad2: u32,
        comm: [u8; COMM_BYTES],
        sender_comm: [u8; COMM_BYTES],
        sender_parent_comm: [u8; COMM_BYTES],
    }
}

record! {
    /// A cgroup was made or removed: `header.cgroup_id` is its id.
    Cgroup, 312 {
        header: Header,
        /// 0 for version 2.
        hierarchy: u32,
        level: u32,
        /// Bytes of `path` before its NUL; a path that did not fit is cut.
        path_bytes: u32,
        pad: u32,
        /// The cgroup of who made or removed it; 0 where it is not known.
        creator_cgroup_id: u64,
        path: [u8; CGROUP_PATH_BYTES],
    }
}

record! {
    /// A TCP connection changed. The subject is who connected, or listened; a connection older than the probes has a cgroup
    /// and no process.
    Tcp, 96 {
        header: Header,
        /// Since the connection attempt, or since it was accepted, nanoseconds; 0 where that was before the probes.
        duration_ns: u64,
        /// IPv6, or IPv4 mapped into IPv6 (RFC 4291, section 2.5.5.2); network byte order.
        source: [u8; 16],
        destination: [u8; 16],
        /// Ports are in the machine's byte order. The source is this side, whichever connected.
        source_port: u16,
        destination_port: u16,
        /// 1 established, 2 refused, 3 timed out (nobody answered, or there is no way), 4 closed, 5 retransmitted,
        /// 6 SYN retransmitted, 7 reset sent, 8 reset received.
        change: u8,
        /// 1 when this side connected, 0 when it accepted.
        active: u8,
        pad: [u8; 2],
        /// Payload of the connection so far; what was sent again counts once.
        bytes_sent: u64,
        bytes_received: u64,
    }
}

record! {
    /// The stalls of a cgroup's tasks in memory reclaim added up to a burst. The subject is the task whose stall was the last.
    Reclaim, 56 {
        header: Header,
        /// Since the cgroup's record before this, of all its tasks.
        stall_ns: u64,
        pages_reclaimed: u64,
        /// 1 for a memory cgroup's own limit, 0 for the node's.
        memcg: u8,
        pad: [u8; 7],
    }
}

record! {
    /// A block I/O was slow or failed.
    BlockIo, 64 {
        header: Header,
        latency_ns: u64,
        bytes: u64,
        /// `dev_t` as the kernel encodes it: major in the upper 12 bits, minor in the lower 20.
        device: u32,
        /// Negative errno, 0 when it only was slow.
        error: i32,
        /// 0 read, 1 write, 2 flush, 3 discard.
        operation: u8,
        pad: [u8; 7],
    }
}

record! {
    /// System calls failed alike.
    SyscallError, 48 {
        header: Header,
        /// The system call's number on this architecture.
        syscall: u32,
        errno: u32,
        count: u64,
    }
}

record! {
    /// A DNS lookup failed or was slow.
    Dns, 120 {
        header: Header,
        latency_ns: u64,
        /// RFC 1035 response code; 255 when nothing answered.
        rcode: u8,
        pad: u8,
        /// RFC 1035 query type.
        query_type: u16,
        pad2: u32,
        /// The queried name in dotted form, NUL padded, cut when longer.
        name: [u8; 72],
    }
}

record! {
    /// A task waited long for a CPU.
    RunQueue, 40 {
        header: Header,
        wait_ns: u64,
    }
}

record! {
    /// Packets were dropped for one reason.
    PacketDrop, 48 {
        header: Header,
        /// `enum skb_drop_reason` of this kernel.
        reason: u32,
        interface: u32,
        count: u64,
    }
}

record! {
    /// Records of one cgroup were left out of the lethal lane, since the cgroup had used up its share. Made in user space, of the map
    /// `shares`.
    LeftOut, 56 {
        header: Header,
        /// How many, in the interval.
        count: u64,
        interval_ns: u64,
        /// How many the cgroup may have.
        records_per_second: u32,
        /// 1 when nothing more was left out for a while.
        is_over: u32,
    }
}

/// Slots of a [`Histogram`].
pub const HISTOGRAM_SLOTS: usize = 32;

record! {
    /// Durations of many operations of one sort, since the record before.
    Histogram, 192 {
        header: Header,
        /// 1 block I/O from issue to completion, 2 waiting for a CPU, 3 DNS lookups.
        measure: u8,
        /// Operation as in [`BlockIo`].
        operation: u8,
        pad: [u8; 2],
        device: u32,
        /// The time that it covers, nanoseconds.
        interval_ns: u64,
        total_ns: u64,
        max_ns: u64,
        /// Slot `i` counts durations from 2^i up to 2^(i+1) microseconds; the first also what is shorter, the last what is
        /// longer.
        counts: [u32; HISTOGRAM_SLOTS],
    }
}

/// Bytes of an [`ExecCommand`]'s path, NUL padded.
pub const EXEC_PATH_BYTES: usize = 128;
/// Bytes of an [`ExecCommand`]'s arguments.
pub const EXEC_ARGUMENT_BYTES: usize = 256;
/// Bytes of a [`FileOpen`]'s path, NUL padded.
pub const OPEN_PATH_BYTES: usize = 128;

record! {
    /// A signal reached a process that does not handle it, and ends it: one a process.
    SignalDelivered, 64 {
        header: Header,
        signal: u32,
        /// `si_code`. 0 also where the kernel does not keep it: it does for signals that dump core. See [`Signal`] for the others.
        code: i32,
        ns_pid: u32,
        ns_level: u32,
        comm: [u8; COMM_BYTES],
    }
}

record! {
    /// A process image was replaced, and by what.
    ExecCommand, 464 {
        header: Header,
        parent_pid: u32,
        ns_pid: u32,
        ns_level: u32,
        /// How many bytes of `arguments` were written: all of them when there may be more.
        argument_bytes: u32,
        /// Start of the process as in [`Exec`].
        start_time_ns: u64,
        parent_cgroup_id: u64,
        comm: [u8; COMM_BYTES],
        /// Path as it was named to the kernel, which may be relative; cut when longer.
        path: [u8; EXEC_PATH_BYTES],
        /// Each ends with a NUL, but for the last when it was cut. Nothing of them unless they are asked for.
        arguments: [u8; EXEC_ARGUMENT_BYTES],
    }
}

record! {
    /// A process was made. It is the subject; its `comm` is still its parent's.
    Fork, 64 {
        header: Header,
        parent_pid: u32,
        ns_pid: u32,
        ns_level: u32,
        pad: u32,
        comm: [u8; COMM_BYTES],
    }
}

record! {
    /// A file that is audited was opened.
    FileOpen, 184 {
        header: Header,
        /// Flags of open(2).
        flags: u32,
        pad: u32,
        comm: [u8; COMM_BYTES],
        /// Path as the process named it, which may be relative; cut when longer.
        path: [u8; OPEN_PATH_BYTES],
    }
}

/// The text before the first NUL, with anything that is not UTF-8 replaced.
pub fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end])
}

/// A `comm` field made of `name`, cut to 15 bytes as the kernel does.
pub fn comm(name: &str) -> [u8; COMM_BYTES] {
    let mut field = [0; COMM_BYTES];
    let bytes = &name.as_bytes()[..name.len().min(COMM_BYTES - 1)];
    field[..bytes.len()].copy_from_slice(bytes);
    field
}
