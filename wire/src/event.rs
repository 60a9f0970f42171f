//! Events: what a frame carries, and what everything behind the border works on.
//!
//! What enters: decoded ring records, Kubernetes and systemd observations. What leaves: one rkyv archive of a [`Body`]
//! per frame. What must hold: an event carries no string of its own: names are indices into the frame's table. An
//! archived event takes at most [`ARCHIVED_EVENT_BYTES_MAX`], since millions of them pass each second.

#[macro_use]
mod declare;

mod cluster;
mod kind;
mod node;

use rkyv::{Archive, Deserialize, Serialize};

pub use cluster::{
    ArchivedBackend, ArchivedConfigChange, ArchivedContainerState, ArchivedEndpoints, ArchivedKubeEvent,
    ArchivedNodeCondition, ArchivedObjectState, ArchivedPodState, ArchivedRollout, Backend, ConfigChange,
    ContainerState, Endpoints, KubeEvent, NodeCondition, ObjectState, PodState, Rollout,
};
use declare::ArchivedFields;
pub use declare::FieldValue;
pub use kind::{ArchivedDetail, Detail, KINDS, Kind, PerKind};
pub use node::{
    ArchivedCgroupUse, ArchivedConntrack, ArchivedCurve, ArchivedGap, ArchivedHistogram, ArchivedLogLines,
    ArchivedMeasure, ArchivedMember, ArchivedObservation, ArchivedPoint, ArchivedTrouble, ArchivedUnitJob,
    ArchivedUnitState, CgroupUse, Conntrack, Curve, Gap, HISTOGRAM_SLOTS, Histogram, LogLines, Measure, Member,
    Observation, Point, Trouble, UnitJob, UnitState,
};

/// The bound that the archived form of every event keeps, asserted below.
pub const ARCHIVED_EVENT_BYTES_MAX: usize = 88;

/// Identifies an entity on its node: a hash of its kind and name, never 0.
pub type EntityId = u64;

/// An index into [`Body::names`].
pub type Name = u32;

/// The reason of a [`Gap`] that stands where somebody had an event erased from an archive. Nothing was missed.
pub const ERASED: &str = "erased";

/// The name that stands for "unknown": never in the table.
pub const NO_NAME: Name = Name::MAX;

/// Where an event came from; the ledger is kept for each.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[rkyv(derive(Clone, Copy, Debug, PartialEq, Eq))]
#[repr(u8)]
pub enum Source {
    /// The kernel, through BPF rings.
    Ebpf = 0,
    /// Local processes, through memfd rings.
    Shm = 1,
    /// The Kubernetes API.
    Kube = 2,
    /// systemd's D-Bus signals.
    Systemd = 3,
    /// The collector itself: evidence it read when something lethal arrived.
    Collector = 4,
}

/// How many sources there are.
pub const SOURCES: usize = 5;

impl Source {
    /// Every source, in the order of their numbers.
    pub const ALL: [Self; SOURCES] = [Self::Ebpf, Self::Shm, Self::Kube, Self::Systemd, Self::Collector];

    /// The source that a number names.
    pub fn from_u8(value: u8) -> Option<Self> {
        Self::ALL.get(usize::from(value)).copied()
    }

    /// The name that metrics and people use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Shm => "shm",
            Self::Kube => "kube",
            Self::Systemd => "systemd",
            Self::Collector => "collector",
        }
    }
}

impl ArchivedSource {
    /// The source this stands for.
    pub fn get(self) -> Source {
        match self {
            Self::Ebpf => Source::Ebpf,
            Self::Shm => Source::Shm,
            Self::Kube => Source::Kube,
            Self::Systemd => Source::Systemd,
            Self::Collector => Source::Collector,
        }
    }
}

/// Which queue, ring and promise an event has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Never sampled, rate limited or shed.
    Lethal,
    /// May be sampled or shed; every such drop is counted.
    Bulk,
}

impl Lane {
    /// The name that metrics use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lethal => "lethal",
            Self::Bulk => "bulk",
        }
    }
}

/// One thing that happened.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Event {
    /// `CLOCK_BOOTTIME` of the node, nanoseconds.
    pub time_ns: u64,
    /// What it is about.
    pub entity: EntityId,
    /// The subject's process id in the node's namespace, 0 when there is none.
    pub pid: u32,
    /// Where it came from.
    pub source: Source,
    /// What happened.
    pub body: Detail,
}

/// Which part a process has in its container, as the collector knows it.
///
/// Events carry it as one byte, 0 in frames of version 1, where it stands in what was padding.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// Nobody saw the container begin.
    #[default]
    Unknown = 0,
    /// What the container runtime started in the container's cgroup: the container lives and dies with it.
    First = 1,
    /// A descendant of the first process.
    Member = 2,
    /// Entered the container later and from outside, as `kubectl exec` does, or a descendant of such a process.
    Session = 3,
    /// The first process of a pod's sandbox (pause): it ends with its pod.
    Sandbox = 4,
    /// A program of the runtime that prepares the container and has not yet started its program.
    Runtime = 5,
}

impl Role {
    /// The role that an event's byte names.
    pub fn from_u8(value: u8) -> Self {
        match value {
            1 => Self::First,
            2 => Self::Member,
            3 => Self::Session,
            4 => Self::Sandbox,
            5 => Self::Runtime,
            _ => Self::Unknown,
        }
    }
}

fields! {
    /// See [`Detail::Exec`].
    Exec {
        parent_pid: u32,
        /// The process id in its own pid namespace.
        ns_pid: u32,
        /// How deep that namespace is nested; 0 is the node's.
        ns_level: u32,
        comm: Name,
        /// The file that runs, and its first arguments, space separated; unset unless they are asked for.
        path: Name,
        arguments: Name,
        /// A [`Role`].
        role: u8,
    }
}

fields! {
    /// See [`Detail::Exit`].
    Exit {
        /// `CLOCK_BOOTTIME` when the process started, nanoseconds.
        start_time_ns: u64,
        parent_pid: u32,
        ns_pid: u32,
        ns_level: u32,
        /// Status as `wait(2)` reports it.
        status: u32,
        comm: Name,
        oom_score_adj: i16,
        /// A [`Role`].
        role: u8,
    }
}

fields! {
    /// See [`Detail::Oom`]. Sizes in bytes.
    Oom {
        comm: Name,
        ns_pid: u32,
        ns_level: u32,
        /// Who allocated when memory ran out.
        allocator_pid: u32,
        allocator_comm: Name,
        allocator_entity: EntityId,
        /// The victim's address space.
        total_vm_bytes: u64,
        anon_rss_bytes: u64,
        file_rss_bytes: u64,
        shmem_rss_bytes: u64,
        /// The cgroup whose limit was full: its path where known, else its last component. In frames of version 1, and where
        /// `allocator_inside` is 2, the one of the victim's chain with the least room under its limit.
        limit_cgroup: Name,
        /// 0 when no cgroup of the victim's chain has a limit.
        limit_bytes: u64,
        usage_bytes: u64,
        /// Levels above the victim's own memory cgroup.
        limit_height: u32,
        oom_score_adj: i16,
        /// A [`Role`].
        role: u8,
        /// Whether the allocator is below that cgroup, so that its limit is the one that was hit: 0 unknown, 1 yes, 2 no. 3: the
        /// kernel said that it kills for this very limit, whatever was given back since.
        allocator_inside: u8,
    }
}

fields! {
    /// See [`Detail::Signal`].
    Signal {
        signal: u32,
        /// `si_code`.
        code: i32,
        ns_pid: u32,
        ns_level: u32,
        comm: Name,
        sender_pid: u32,
        sender_comm: Name,
        /// [`Name`] plus one of the comm of the sender's parent; `init` for process 1, whatever it is called. 0: not known, as from
        /// collectors that did not say it: these bytes were zero.
        sender_parent: u32,
        sender_entity: EntityId,
        /// The kernel itself sent it.
        from_kernel: bool,
        /// `TRACE_SIGNAL_*`: 0 delivered, 1 ignored, 2 already pending.
        result: u8,
        /// A [`Role`], of the target.
        role: u8,
        /// 1 when the kernel sent it to a process that had used up its CPU time (RLIMIT_CPU).
        over_cpu_limit: u8,
        /// Signals of the same number to the same process, which handles or ignores it, since the event before this
        /// one.
        repeats: u32,
    }
}

fields! {
    /// See [`Detail::Tcp`].
    Tcp {
        /// IPv6, or IPv4 mapped into it; network byte order.
        source: [u8; 16],
        destination: [u8; 16],
        duration_us: u32,
        /// Sent and received, KiB rounded up, saturating.
        kib_sent: u32,
        kib_received: u32,
        source_port: u16,
        destination_port: u16,
        /// 1 established, 2 refused, 3 timed out, 4 closed, 5 retransmitted, 6 SYN retransmitted, 7 reset sent, 8 reset received,
        /// 9 refused by a full listen queue.
        change: u8,
        /// True if this side connected.
        active: bool,
    }
}

const _: () = assert!(size_of::<ArchivedEvent>() <= ARCHIVED_EVENT_BYTES_MAX);

impl Detail {
    /// Whether something died, or is about to: such an event must not wait for others. The life of healthy processes and
    /// cgroups is not urgent.
    pub fn is_urgent(&self) -> bool {
        match self {
            Self::Oom(_)
            | Self::Signal(_)
            | Self::SignalDelivered { .. }
            | Self::Observation(_)
            | Self::CgroupUse(_)
            | Self::UnitState(_) => true,
            Self::Exit(exit) => exit.status != 0,
            Self::ContainerState(container) => container.state == 3,
            Self::KubeEvent(event) => event.is_warning,
            Self::Conntrack(table) => table.is_full,
            _ => false,
        }
    }
}

/// What sort of thing an entity is.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[rkyv(derive(Clone, Copy, Debug, PartialEq, Eq))]
#[repr(u8)]
pub enum EntityKind {
    /// Processes of the node outside of any unit or container, by cgroup.
    Host,
    /// A container of a pod, or of a plain container runtime.
    Container,
    /// A pod.
    Pod,
    /// A systemd service, scope or socket.
    Unit,
    /// The node itself.
    Node,
    /// A Deployment, StatefulSet, DaemonSet, Job or CronJob: what owns pods. Its key is `kind/namespace/name`.
    Workload,
}

impl EntityKind {
    /// Every kind.
    pub const ALL: [Self; 6] = [Self::Host, Self::Container, Self::Pod, Self::Unit, Self::Node, Self::Workload];

    /// The name that people see.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Container => "container",
            Self::Pod => "pod",
            Self::Unit => "unit",
            Self::Node => "node",
            Self::Workload => "workload",
        }
    }
}

impl ArchivedEntityKind {
    /// The kind this stands for.
    pub fn get(self) -> EntityKind {
        match self {
            Self::Host => EntityKind::Host,
            Self::Container => EntityKind::Container,
            Self::Pod => EntityKind::Pod,
            Self::Unit => EntityKind::Unit,
            Self::Node => EntityKind::Node,
            Self::Workload => EntityKind::Workload,
        }
    }
}

/// What an entity is called. Sent when an entity first appears on a stream and again from time to time.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Entity {
    pub id: EntityId,
    pub kind: EntityKind,
    /// The entity that holds this one: a container's pod, a pod's workload; otherwise 0.
    pub parent: EntityId,
    /// Name for people: `shop/nginx-7d4…/web`, `shop/nginx-7d4…`, `Deployment shop/nginx`, `sshd.service`; a
    /// container's short id, a pod's uid or a cgroup's path while no name is known.
    pub name: String,
    /// 64 hexadecimal digits, empty when it is no container.
    pub container_id: String,
    /// Empty when it belongs to no pod.
    pub pod_uid: String,
    /// Path of its cgroup below the hierarchy's root.
    pub cgroup: String,
    /// What follows is what Kubernetes reported, empty or 0 until then.
    pub namespace: String,
    pub pod: String,
    /// The container's name in its pod.
    pub container: String,
    pub image: String,
    /// The pod's workload: `Deployment/nginx`.
    pub workload: String,
    /// The pod's addresses: IPv6, or IPv4 mapped into it.
    pub addresses: Vec<[u8; 16]>,
}

impl Entity {
    /// An entity of which only its kind, id and name are known.
    pub fn named(kind: EntityKind, id: EntityId, name: impl Into<String>) -> Self {
        Self {
            id,
            kind,
            parent: 0,
            name: name.into(),
            container_id: String::new(),
            pod_uid: String::new(),
            cgroup: String::new(),
            namespace: String::new(),
            pod: String::new(),
            container: String::new(),
            image: String::new(),
            workload: String::new(),
            addresses: Vec::new(),
        }
    }
}

/// Everything in one frame.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct Body {
    /// The frame's names; events refer to them by index.
    pub names: Vec<String>,
    /// Entities that the receiver may not know yet.
    pub entities: Vec<Entity>,
    /// Events of one lane, in the order in which they were taken from their sources.
    pub events: Vec<Event>,
}

impl Body {
    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.names.clear();
        self.entities.clear();
        self.events.clear();
    }
}

impl ArchivedBody {
    /// The name at an index; `None` for [`NO_NAME`] and for an index past the table.
    pub fn name(&self, index: u32) -> Option<&str> {
        self.names.get(index as usize).map(|name| name.as_str())
    }
}
