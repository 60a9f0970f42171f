//! The kinds of records: their numbers, their names, their lanes.

macro_rules! record_kinds {
    ($($(#[$meta:meta])* $kind:ident = $number:literal => $name:literal,)*) => {
        /// What happened: the first field of every record.
        ///
        /// Kinds below 32 travel in the lethal lane and are never sampled; the others in the bulk lane.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum RecordKind { $($(#[$meta])* $kind = $number,)* }

        impl RecordKind {
            /// Every kind.
            pub const ALL: [Self; [$($number),*].len()] = [$(Self::$kind),*];

            /// The kind that a header's `kind` names, if any.
            pub fn from_u16(value: u16) -> Option<Self> {
                match value {
                    $($number => Some(Self::$kind),)*
                    _ => None,
                }
            }

            /// The name that metrics and logs use.
            pub fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }
        }
    };
}

// A kind's number and name are those of `KIND_…` in `bpf/include/record.h`; `tests/layout.rs` compares them.
record_kinds! {
    /// A process image was replaced: [`Exec`](super::Exec).
    Exec = 1 => "exec",
    /// The last thread of a process died: [`Exit`](super::Exit).
    Exit = 2 => "exit",
    /// The OOM killer chose a victim: [`Oom`](super::Oom).
    Oom = 3 => "oom",
    /// A signal that can end a process was sent: [`Signal`](super::Signal).
    Signal = 4 => "signal",
    /// A cgroup was made: [`Cgroup`](super::Cgroup).
    CgroupMkdir = 5 => "cgroup_mkdir",
    /// A cgroup was removed: [`Cgroup`](super::Cgroup).
    CgroupRmdir = 6 => "cgroup_rmdir",
    /// A signal reached a process and ends it: [`SignalDelivered`](super::SignalDelivered).
    SignalDelivered = 7 => "signal_delivered",
    /// A process image was replaced, and by what: [`ExecCommand`](super::ExecCommand), instead of [`Exec`](super::Exec).
    ExecCommand = 8 => "exec_command",
    /// Records of a cgroup that floods the lethal lane were left out: [`LeftOut`](super::LeftOut).
    LeftOut = 9 => "left_out",
    /// A TCP connection changed: [`Tcp`](super::Tcp).
    Tcp = 32 => "tcp",
    /// Stalls in memory reclaim added up to a burst: [`Reclaim`](super::Reclaim).
    Reclaim = 33 => "reclaim",
    /// A block I/O was slow or failed: [`BlockIo`](super::BlockIo).
    BlockIo = 34 => "block_io",
    /// System calls failed: [`SyscallError`](super::SyscallError).
    SyscallError = 35 => "syscall_error",
    /// A DNS lookup failed or was slow: [`Dns`](super::Dns).
    Dns = 36 => "dns",
    /// A task waited long for a CPU: [`RunQueue`](super::RunQueue).
    RunQueue = 37 => "run_queue",
    /// Packets were dropped: [`PacketDrop`](super::PacketDrop).
    PacketDrop = 38 => "packet_drop",
    /// A process was made: [`Fork`](super::Fork).
    Fork = 39 => "fork",
    /// A file that is audited was opened: [`FileOpen`](super::FileOpen).
    FileOpen = 40 => "file_open",
    /// Durations of many operations, summed up in the kernel: [`Histogram`](super::Histogram).
    Histogram = 41 => "histogram",
}

impl RecordKind {
    /// Whether records of this kind travel in the lethal lane.
    pub fn is_lethal(self) -> bool {
        (self as u16) < 32
    }
}
