//! The kinds of records: their numbers, their names, their lanes.

/// What happened: the first field of every record.
///
/// Kinds below 32 travel in the lethal lane and are never sampled; the others in the bulk lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum RecordKind {
    /// A process image was replaced: [`Exec`](super::Exec).
    Exec = 1,
    /// The last thread of a process died: [`Exit`](super::Exit).
    Exit = 2,
    /// The OOM killer chose a victim: [`Oom`](super::Oom).
    Oom = 3,
    /// A signal that can end a process was sent: [`Signal`](super::Signal).
    Signal = 4,
    /// A cgroup was made: [`Cgroup`](super::Cgroup).
    CgroupMkdir = 5,
    /// A cgroup was removed: [`Cgroup`](super::Cgroup).
    CgroupRmdir = 6,
    /// A signal reached a process and ends it: [`SignalDelivered`](super::SignalDelivered).
    SignalDelivered = 7,
    /// A process image was replaced, and by what: [`ExecCommand`](super::ExecCommand), instead of [`Exec`](super::Exec).
    ExecCommand = 8,
    /// Records of a cgroup that floods the lethal lane were left out: [`LeftOut`](super::LeftOut).
    LeftOut = 9,
    /// A TCP connection changed: [`Tcp`](super::Tcp).
    Tcp = 32,
    /// Stalls in memory reclaim added up to a burst: [`Reclaim`](super::Reclaim).
    Reclaim = 33,
    /// A block I/O was slow or failed: [`BlockIo`](super::BlockIo).
    BlockIo = 34,
    /// System calls failed: [`SyscallError`](super::SyscallError).
    SyscallError = 35,
    /// A DNS lookup failed or was slow: [`Dns`](super::Dns).
    Dns = 36,
    /// A task waited long for a CPU: [`RunQueue`](super::RunQueue).
    RunQueue = 37,
    /// Packets were dropped: [`PacketDrop`](super::PacketDrop).
    PacketDrop = 38,
    /// A process was made: [`Fork`](super::Fork).
    Fork = 39,
    /// A file that is audited was opened: [`FileOpen`](super::FileOpen).
    FileOpen = 40,
    /// Durations of many operations, summed up in the kernel: [`Histogram`](super::Histogram).
    Histogram = 41,
}

impl RecordKind {
    /// Every kind.
    pub const ALL: [Self; 19] = [
        Self::Exec,
        Self::Exit,
        Self::Oom,
        Self::Signal,
        Self::CgroupMkdir,
        Self::CgroupRmdir,
        Self::SignalDelivered,
        Self::ExecCommand,
        Self::LeftOut,
        Self::Tcp,
        Self::Reclaim,
        Self::BlockIo,
        Self::SyscallError,
        Self::Dns,
        Self::RunQueue,
        Self::PacketDrop,
        Self::Fork,
        Self::FileOpen,
        Self::Histogram,
    ];

    /// The kind that a header's `kind` names, if any.
    pub fn from_u16(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Exec,
            2 => Self::Exit,
            3 => Self::Oom,
            4 => Self::Signal,
            5 => Self::CgroupMkdir,
            6 => Self::CgroupRmdir,
            7 => Self::SignalDelivered,
            8 => Self::ExecCommand,
            9 => Self::LeftOut,
            32 => Self::Tcp,
            33 => Self::Reclaim,
            34 => Self::BlockIo,
            35 => Self::SyscallError,
            36 => Self::Dns,
            37 => Self::RunQueue,
            38 => Self::PacketDrop,
            39 => Self::Fork,
            40 => Self::FileOpen,
            41 => Self::Histogram,
            _ => return None,
        })
    }

    /// Whether records of this kind travel in the lethal lane.
    pub fn is_lethal(self) -> bool {
        (self as u16) < 32
    }

    /// The name that metrics and logs use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Exit => "exit",
            Self::Oom => "oom",
            Self::Signal => "signal",
            Self::CgroupMkdir => "cgroup_mkdir",
            Self::CgroupRmdir => "cgroup_rmdir",
            Self::SignalDelivered => "signal_delivered",
            Self::ExecCommand => "exec_command",
            Self::LeftOut => "left_out",
            Self::Tcp => "tcp",
            Self::Reclaim => "reclaim",
            Self::BlockIo => "block_io",
            Self::SyscallError => "syscall_error",
            Self::Dns => "dns",
            Self::RunQueue => "run_queue",
            Self::PacketDrop => "packet_drop",
            Self::Fork => "fork",
            Self::FileOpen => "file_open",
            Self::Histogram => "histogram",
        }
    }
}
