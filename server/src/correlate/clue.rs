//! Clues: what shards send the finder.
//!
//! What enters: lethal events, and bursts of bulk events of one entity. What must hold: a clue stands for itself; every name
//! is resolved and the entity described, so that the frame it came from can go.

mod process;

use std::fmt;
use std::sync::Arc;

use rkyv::{Archive, Deserialize, Serialize};
use tapio_wire::event::{EntityId, EntityKind, Measure, Role};

use super::field_name::FieldName;
pub use super::limit_level::{LimitLevel, is_pod_cgroup};
use super::topology::EntityInfo;
pub use process::{Exec, Exit, Kill, NsPid, Oom, SenderClass};

macro_rules! clue_kinds {
    ($($(#[$meta:meta])* $name:ident => $text:literal,)*) => {
        /// Sorts of clue; patterns name them.
        #[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum ClueKind { $($(#[$meta])* $name,)* }
        impl ClueKind {
            /// Every kind, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
            /// The name that patterns and people use.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

clue_kinds! {
    Exec => "exec",
    Exit => "exit",
    Oom => "oom",
    /// A signal: SIGKILL and the like.
    Kill => "signal",
    /// A signal reached a process that it ends.
    Delivered => "signal_delivered",
    PodState => "pod_state",
    ContainerState => "container_state",
    KubeEvent => "kube_event",
    NodeCondition => "node_condition",
    Rollout => "rollout",
    ConfigChange => "config_change",
    Endpoints => "endpoints",
    ObjectState => "object_state",
    UnitState => "unit_state",
    UnitJob => "unit_job",
    /// What the collector read of the entity's cgroup when something lethal had arrived.
    Observation => "observation",
    Gap => "gap",
    /// The node's table of connections is full, or has room again.
    Conntrack => "conntrack",
    /// What filled a cgroup when something lethal had arrived, and how its counters had moved.
    CgroupUse => "cgroup_use",
    /// Something is wrong with the entity, which lives; or is no more.
    Trouble => "trouble",
    /// How the container's use went over the last minutes.
    Curve => "curve",
    /// The last lines that a container wrote before it died.
    LogLines => "log_lines",
    /// The entity's own memory limit made it reclaim again and again.
    ReclaimBurst => "reclaim_burst",
    /// The node's shortage made it reclaim again and again.
    DirectReclaimBurst => "direct_reclaim_burst",
    RefusedBurst => "refused_burst",
    RetransmitBurst => "retransmit_burst",
    /// Connections that were asked for and not answered.
    SynRetransmitBurst => "syn_retransmit_burst",
    SyscallErrorBurst => "syscall_error_burst",
    SlowIoBurst => "slow_io_burst",
    IoErrorBurst => "io_error_burst",
    PacketDropBurst => "packet_drop_burst",
    DnsFailureBurst => "dns_failure_burst",
    RunQueueBurst => "run_queue_burst",
    /// A share of the operations that the kernel summed up was slow.
    SlowShare => "slow_share",
}

impl ClueKind {
    /// The kind of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name)
    }

    /// Whether it stands for many bulk events.
    pub fn is_burst(self) -> bool {
        self as u8 >= Self::ReclaimBurst as u8
    }
}

/// A set of kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClueKinds(u64);

const _: () = assert!(ClueKind::SlowShare as u8 <= 63);

impl ClueKinds {
    /// Every kind.
    pub fn all() -> Self {
        ClueKind::ALL.iter().copied().collect()
    }

    /// Whether it is in.
    #[inline]
    pub fn contains(self, kind: ClueKind) -> bool {
        self.0 & (1 << kind as u8) != 0
    }
}

impl FromIterator<ClueKind> for ClueKinds {
    fn from_iter<I: IntoIterator<Item = ClueKind>>(kinds: I) -> Self {
        Self(kinds.into_iter().fold(0, |set, kind| set | 1 << kind as u8))
    }
}

/// One event of one archived frame.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EvidenceId {
    pub node: u64,
    pub epoch: u64,
    pub seq: u64,
    pub index: u32,
}

impl EvidenceId {
    /// Reads what [`Display`](fmt::Display) writes.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let mut hexadecimal = || u64::from_str_radix(parts.next()?, 16).ok();
        let (node, epoch) = (hexadecimal()?, hexadecimal()?);
        let (seq, index) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        parts.next().is_none().then_some(Self { node, epoch, seq, index })
    }
}

impl fmt::Display for EvidenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, epoch, seq, index } = self;
        write!(f, "{node:x}:{epoch:x}:{seq}:{index}")
    }
}

/// One fact about one entity.
#[derive(Archive, Serialize, Deserialize, Clone, Debug)]
pub struct Clue {
    pub entity: Arc<EntityInfo>,
    /// The subject's process id in the node's namespace, 0 when there is none.
    pub pid: u32,
    /// `CLOCK_BOOTTIME` of the node.
    pub boottime_ns: u64,
    /// The same moment since 1970, by the node's clock.
    pub realtime_ns: u64,
    pub evidence: EvidenceId,
    pub detail: ClueDetail,
}

/// What a clue says.
#[derive(Archive, Serialize, Deserialize, Clone, Debug)]
pub enum ClueDetail {
    Exec(Exec),
    Exit(Exit),
    Oom(Oom),
    Kill(Kill),
    Fact(Box<Fact>),
    Burst(Burst),
}

/// What Kubernetes, systemd or the collector said: rare, so its fields are kept by name.
#[derive(Archive, Serialize, Deserialize, Clone, Debug)]
pub struct Fact {
    pub kind: ClueKind,
    pub fields: Vec<(FieldName, FactValue)>,
    /// Others that it is about: the workloads that use a ConfigMap, the backends of a Service.
    pub related: Vec<EntityId>,
    /// Addresses of a Service and of its backends.
    pub endpoints: Option<Box<ServiceEndpoints>>,
    /// Address that has most connections of a table.
    pub talker: Option<Address>,
}

/// A field of a [`Fact`].
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum FactValue {
    Number(u64),
    Flag(bool),
    Text(Arc<str>),
}

/// Where a Service is reached, and what is behind it.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct ServiceEndpoints {
    /// `shop/db`
    pub name: Arc<str>,
    pub cluster_addresses: Vec<Address>,
    pub ports: Vec<u16>,
    /// Address, port, pod (0 for none), ready.
    pub backends: Vec<(Address, u16, EntityId, bool)>,
}

impl ServiceEndpoints {
    /// The Service's entity.
    pub fn id(&self) -> EntityId {
        tapio_wire::entity_id(EntityKind::Workload, &format!("Service/{}", self.name))
    }
}

/// IPv6, or IPv4 mapped into it.
pub type Address = [u8; 16];

impl Fact {
    /// A field; `None` when it is empty or was not reported.
    pub fn get(&self, name: &str) -> Option<&FactValue> {
        self.fields.iter().find(|(known, _)| **known == *name).map(|(_, value)| value)
    }

    /// A text field, empty when it was not reported.
    pub fn text(&self, name: &str) -> &str {
        match self.get(name) {
            Some(FactValue::Text(text)) => text,
            _ => "",
        }
    }

    /// A number, 0 when it was not reported.
    pub fn number(&self, name: &str) -> u64 {
        match self.get(name) {
            Some(FactValue::Number(number)) => *number,
            _ => 0,
        }
    }

    /// Whether it is said and true.
    pub fn is(&self, name: &str) -> bool {
        self.get(name) == Some(&FactValue::Flag(true))
    }
}

/// Bulk events of one kind came faster than is usual.
#[derive(Archive, Serialize, Deserialize, Clone, Debug)]
pub struct Burst {
    pub kind: ClueKind,
    /// What its events have in common.
    pub about: About,
    /// Who is at the other end, when the finder knows: `service shop/db`.
    pub peer: Option<Arc<str>>,
    /// Backends of a Service at the other end: ready ones, and all.
    pub peer_backends: Option<(u32, u32)>,
    /// Kernel's reason for dropped packets.
    pub drop_reason: Option<Arc<str>>,
    /// Events in the burst's window so far.
    pub count: u32,
    /// Sum of the stalls, waits or latencies; 0 where the kind has none.
    pub stall_us: u32,
    /// Time from the window's start to this clue.
    pub span_ms: u32,
}

/// What the events of a burst have in common; bursts are counted by it.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    Nothing,
    Peer {
        address: Address,
        port: u16,
    },
    Errno {
        errno: u32,
        syscall: u32,
    },
    Device {
        device: u32,
        errno: u32,
    },
    /// The reason is the hash of its name.
    Drop {
        reason: u32,
        interface: u32,
    },
    Dns {
        rcode: u8,
    },
    /// The count of the burst was slow, of `total` operations.
    Share {
        measure: Measure,
        device: u32,
        total: u64,
    },
}

impl About {
    /// What distinguishes bursts of one entity and kind.
    #[inline]
    pub fn discriminator(self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Peer { address, port } => {
                let halves = address.split_at(8);
                let half = |bytes: &[u8]| bytes.iter().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
                half(halves.0).rotate_left(17) ^ half(halves.1) ^ (u64::from(port) << 48)
            }
            Self::Errno { errno, syscall } => u64::from(errno) << 32 | u64::from(syscall),
            Self::Device { device, .. } => device.into(),
            Self::Drop { reason, interface } => u64::from(reason) << 32 | u64::from(interface),
            Self::Dns { rcode } => rcode.into(),
            Self::Share { measure, device, .. } => (measure as u64) << 32 | u64::from(device),
        }
    }
}

impl Clue {
    /// Kind of the clue.
    pub fn kind(&self) -> ClueKind {
        match &self.detail {
            ClueDetail::Exec(_) => ClueKind::Exec,
            ClueDetail::Exit(_) => ClueKind::Exit,
            ClueDetail::Oom(_) => ClueKind::Oom,
            ClueDetail::Kill(_) => ClueKind::Kill,
            ClueDetail::Fact(fact) => fact.kind,
            ClueDetail::Burst(burst) => burst.kind,
        }
    }

    /// The entity it is about, with its node.
    pub fn key(&self) -> (u64, EntityId) {
        (self.entity.node.id, self.entity.id)
    }

    /// The process it is about, where it names one.
    pub fn comm(&self) -> Option<&Arc<str>> {
        match &self.detail {
            ClueDetail::Exec(exec) => Some(&exec.comm),
            ClueDetail::Exit(exit) => Some(&exit.comm),
            ClueDetail::Oom(oom) => Some(&oom.comm),
            ClueDetail::Kill(kill) => Some(&kill.comm),
            ClueDetail::Fact(_) | ClueDetail::Burst(_) => None,
        }
    }

    /// Whether the process leads its entity: a container lives and dies with what its runtime started in it; elsewhere every
    /// process counts. Where nobody saw the container begin, the init of a pid namespace is taken for it.
    pub fn is_lead(&self) -> bool {
        if self.ns().is_none() {
            return false;
        }
        if self.entity.kind != Some(EntityKind::Container) {
            return true;
        }
        match self.role() {
            Role::First => true,
            Role::Unknown => self.is_namespace_init(),
            Role::Member | Role::Session | Role::Sandbox | Role::Runtime => false,
        }
    }

    /// Whether the process is the init of a pid namespace other than the node's.
    pub fn is_namespace_init(&self) -> bool {
        self.ns().is_some_and(|ns| ns.pid == 1 && ns.level > 0)
    }

    /// The part that the process has in its container.
    pub fn role(&self) -> Role {
        let role = match &self.detail {
            ClueDetail::Exec(exec) => exec.role,
            ClueDetail::Exit(exit) => exit.role,
            ClueDetail::Oom(oom) => oom.role,
            ClueDetail::Kill(kill) => kill.role,
            ClueDetail::Fact(_) | ClueDetail::Burst(_) => Role::Unknown,
        };
        // The collector knows a sandbox by its program's name. Kubernetes lists no sandbox among a pod's containers.
        match role {
            Role::Sandbox if !self.entity.container.is_empty() => Role::First,
            role => role,
        }
    }

    fn ns(&self) -> Option<NsPid> {
        match &self.detail {
            ClueDetail::Exec(exec) => Some(exec.ns),
            ClueDetail::Exit(exit) => Some(exit.ns),
            ClueDetail::Oom(oom) => Some(oom.ns),
            ClueDetail::Kill(kill) => Some(kill.ns),
            ClueDetail::Fact(_) | ClueDetail::Burst(_) => None,
        }
    }
}
