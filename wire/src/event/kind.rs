//! Kinds of event: what metrics, filters and indices go by, where the event itself does not matter.
//!
//! In: an event, or its archived form. Out: its kind, and by that its lane and its name. What must hold: the kinds are in the
//! order of [`Detail`]'s variants, since an archive's index keeps them by number.

use std::ops::{Deref, DerefMut};

use super::{ArchivedDetail, ArchivedEvent, Detail, Event, Lane};

/// How many kinds there are.
pub const KINDS: usize = 34;

/// Kinds of event, in the order of [`Detail`]'s variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    Exec,
    Exit,
    Oom,
    Signal,
    CgroupMade,
    CgroupRemoved,
    Tcp,
    Reclaim,
    BlockIo,
    SyscallError,
    Dns,
    RunQueue,
    PacketDrop,
    Fork,
    SignalDelivered,
    FileOpen,
    Histogram,
    PodState,
    ContainerState,
    KubeEvent,
    NodeCondition,
    Rollout,
    ConfigChange,
    Endpoints,
    ObjectState,
    UnitState,
    UnitJob,
    Observation,
    Gap,
    Conntrack,
    CgroupUse,
    Trouble,
    Curve,
    LogLines,
}

/// A count for each kind.
#[derive(Clone, Debug)]
pub struct PerKind([u64; KINDS]);

impl Default for PerKind {
    fn default() -> Self {
        Self([0; KINDS])
    }
}

impl Deref for PerKind {
    type Target = [u64; KINDS];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for PerKind {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; KINDS] = [
        Self::Exec,
        Self::Exit,
        Self::Oom,
        Self::Signal,
        Self::CgroupMade,
        Self::CgroupRemoved,
        Self::Tcp,
        Self::Reclaim,
        Self::BlockIo,
        Self::SyscallError,
        Self::Dns,
        Self::RunQueue,
        Self::PacketDrop,
        Self::Fork,
        Self::SignalDelivered,
        Self::FileOpen,
        Self::Histogram,
        Self::PodState,
        Self::ContainerState,
        Self::KubeEvent,
        Self::NodeCondition,
        Self::Rollout,
        Self::ConfigChange,
        Self::Endpoints,
        Self::ObjectState,
        Self::UnitState,
        Self::UnitJob,
        Self::Observation,
        Self::Gap,
        Self::Conntrack,
        Self::CgroupUse,
        Self::Trouble,
        Self::Curve,
        Self::LogLines,
    ];

    /// The one place that decides an event's lane.
    pub fn lane(self) -> Lane {
        match self {
            Self::Exec
            | Self::Exit
            | Self::Oom
            | Self::Signal
            | Self::CgroupMade
            | Self::CgroupRemoved
            | Self::SignalDelivered
            | Self::PodState
            | Self::ContainerState
            | Self::KubeEvent
            | Self::NodeCondition
            | Self::Rollout
            | Self::ConfigChange
            | Self::Endpoints
            | Self::ObjectState
            | Self::UnitState
            | Self::UnitJob
            | Self::Observation
            | Self::Gap
            | Self::Conntrack
            | Self::CgroupUse
            | Self::Trouble
            | Self::Curve
            | Self::LogLines => Lane::Lethal,
            Self::Tcp
            | Self::Reclaim
            | Self::BlockIo
            | Self::SyscallError
            | Self::Dns
            | Self::RunQueue
            | Self::PacketDrop
            | Self::Fork
            | Self::FileOpen
            | Self::Histogram => Lane::Bulk,
        }
    }

    /// The name that metrics and people use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Exit => "exit",
            Self::Oom => "oom",
            Self::Signal => "signal",
            Self::CgroupMade => "cgroup_made",
            Self::CgroupRemoved => "cgroup_removed",
            Self::Tcp => "tcp",
            Self::Reclaim => "reclaim",
            Self::BlockIo => "block_io",
            Self::SyscallError => "syscall_error",
            Self::Dns => "dns",
            Self::RunQueue => "run_queue",
            Self::PacketDrop => "packet_drop",
            Self::Fork => "fork",
            Self::SignalDelivered => "signal_delivered",
            Self::FileOpen => "file_open",
            Self::Histogram => "histogram",
            Self::PodState => "pod_state",
            Self::ContainerState => "container_state",
            Self::KubeEvent => "kube_event",
            Self::NodeCondition => "node_condition",
            Self::Rollout => "rollout",
            Self::ConfigChange => "config_change",
            Self::Endpoints => "endpoints",
            Self::ObjectState => "object_state",
            Self::UnitState => "unit_state",
            Self::UnitJob => "unit_job",
            Self::Observation => "observation",
            Self::Gap => "gap",
            Self::Conntrack => "conntrack",
            Self::CgroupUse => "cgroup_use",
            Self::Trouble => "trouble",
            Self::Curve => "curve",
            Self::LogLines => "log_lines",
        }
    }
}

impl Event {
    /// The event's kind.
    pub fn kind(&self) -> Kind {
        match &self.body {
            Detail::Exec(_) => Kind::Exec,
            Detail::Exit(_) => Kind::Exit,
            Detail::Oom(_) => Kind::Oom,
            Detail::Signal(_) => Kind::Signal,
            Detail::CgroupMade { .. } => Kind::CgroupMade,
            Detail::CgroupRemoved { .. } => Kind::CgroupRemoved,
            Detail::Tcp(_) => Kind::Tcp,
            Detail::Reclaim { .. } => Kind::Reclaim,
            Detail::BlockIo { .. } => Kind::BlockIo,
            Detail::SyscallError { .. } => Kind::SyscallError,
            Detail::Dns { .. } => Kind::Dns,
            Detail::RunQueue { .. } => Kind::RunQueue,
            Detail::PacketDrop { .. } => Kind::PacketDrop,
            Detail::Fork { .. } => Kind::Fork,
            Detail::SignalDelivered { .. } => Kind::SignalDelivered,
            Detail::FileOpen { .. } => Kind::FileOpen,
            Detail::Histogram(_) => Kind::Histogram,
            Detail::PodState(_) => Kind::PodState,
            Detail::ContainerState(_) => Kind::ContainerState,
            Detail::KubeEvent(_) => Kind::KubeEvent,
            Detail::NodeCondition(_) => Kind::NodeCondition,
            Detail::Rollout(_) => Kind::Rollout,
            Detail::ConfigChange(_) => Kind::ConfigChange,
            Detail::Endpoints(_) => Kind::Endpoints,
            Detail::ObjectState(_) => Kind::ObjectState,
            Detail::UnitState(_) => Kind::UnitState,
            Detail::UnitJob(_) => Kind::UnitJob,
            Detail::Observation(_) => Kind::Observation,
            Detail::Gap(_) => Kind::Gap,
            Detail::Conntrack(_) => Kind::Conntrack,
            Detail::CgroupUse(_) => Kind::CgroupUse,
            Detail::Trouble(_) => Kind::Trouble,
            Detail::Curve(_) => Kind::Curve,
            Detail::LogLines(_) => Kind::LogLines,
        }
    }
}

impl ArchivedEvent {
    /// The event's kind.
    pub fn kind(&self) -> Kind {
        match &self.body {
            ArchivedDetail::Exec(_) => Kind::Exec,
            ArchivedDetail::Exit(_) => Kind::Exit,
            ArchivedDetail::Oom(_) => Kind::Oom,
            ArchivedDetail::Signal(_) => Kind::Signal,
            ArchivedDetail::CgroupMade { .. } => Kind::CgroupMade,
            ArchivedDetail::CgroupRemoved { .. } => Kind::CgroupRemoved,
            ArchivedDetail::Tcp(_) => Kind::Tcp,
            ArchivedDetail::Reclaim { .. } => Kind::Reclaim,
            ArchivedDetail::BlockIo { .. } => Kind::BlockIo,
            ArchivedDetail::SyscallError { .. } => Kind::SyscallError,
            ArchivedDetail::Dns { .. } => Kind::Dns,
            ArchivedDetail::RunQueue { .. } => Kind::RunQueue,
            ArchivedDetail::PacketDrop { .. } => Kind::PacketDrop,
            ArchivedDetail::Fork { .. } => Kind::Fork,
            ArchivedDetail::SignalDelivered { .. } => Kind::SignalDelivered,
            ArchivedDetail::FileOpen { .. } => Kind::FileOpen,
            ArchivedDetail::Histogram(_) => Kind::Histogram,
            ArchivedDetail::PodState(_) => Kind::PodState,
            ArchivedDetail::ContainerState(_) => Kind::ContainerState,
            ArchivedDetail::KubeEvent(_) => Kind::KubeEvent,
            ArchivedDetail::NodeCondition(_) => Kind::NodeCondition,
            ArchivedDetail::Rollout(_) => Kind::Rollout,
            ArchivedDetail::ConfigChange(_) => Kind::ConfigChange,
            ArchivedDetail::Endpoints(_) => Kind::Endpoints,
            ArchivedDetail::ObjectState(_) => Kind::ObjectState,
            ArchivedDetail::UnitState(_) => Kind::UnitState,
            ArchivedDetail::UnitJob(_) => Kind::UnitJob,
            ArchivedDetail::Observation(_) => Kind::Observation,
            ArchivedDetail::Gap(_) => Kind::Gap,
            ArchivedDetail::Conntrack(_) => Kind::Conntrack,
            ArchivedDetail::CgroupUse(_) => Kind::CgroupUse,
            ArchivedDetail::Trouble(_) => Kind::Trouble,
            ArchivedDetail::Curve(_) => Kind::Curve,
            ArchivedDetail::LogLines(_) => Kind::LogLines,
        }
    }
}
