//! What patterns can ask of a clue, by name.
//!
//! One table: the name, how people read it, and which kinds of clue have it. A pattern that asks a kind for something it
//! does not have is refused when it is loaded.

use tapio_wire::event::EntityKind;
use tapio_wire::program::units::{human_bytes, human_duration};

use super::text;
use crate::correlate::clue::{About, Burst, Clue, ClueDetail, ClueKind, ClueKinds, FactValue, LimitLevel};

/// How a field is compared and shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldType {
    Number,
    Bytes,
    Nanoseconds,
    /// A signal's number, shown by its name.
    Signal,
    Flag,
    Text,
}

/// A field's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    Number(u64),
    Flag(bool),
    Text(&'a str),
}

/// A text that was reported.
fn known(text: &str) -> Option<Value<'_>> {
    (!text.is_empty()).then_some(Value::Text(text))
}

/// Kinds that name a process.
const PROCESS: &[ClueKind] = &[ClueKind::Exec, ClueKind::Exit, ClueKind::Oom, ClueKind::Kill];
const EXIT: &[ClueKind] = &[ClueKind::Exit];
const OOM: &[ClueKind] = &[ClueKind::Oom];
const KILL: &[ClueKind] = &[ClueKind::Kill];
const COMM: &[ClueKind] = &[ClueKind::Exec, ClueKind::Exit, ClueKind::Oom, ClueKind::Kill, ClueKind::Delivered];
const COUNTED: &[ClueKind] = &[
    ClueKind::ReclaimBurst,
    ClueKind::DirectReclaimBurst,
    ClueKind::RefusedBurst,
    ClueKind::RetransmitBurst,
    ClueKind::SynRetransmitBurst,
    ClueKind::SyscallErrorBurst,
    ClueKind::SlowIoBurst,
    ClueKind::IoErrorBurst,
    ClueKind::PacketDropBurst,
    ClueKind::DnsFailureBurst,
    ClueKind::RunQueueBurst,
    ClueKind::SlowShare,
    ClueKind::KubeEvent,
];
/// All of [`COUNTED`] but the last.
const BURST: &[ClueKind] = COUNTED.split_at(COUNTED.len() - 1).0;
const _: () = assert!(matches!(COUNTED[COUNTED.len() - 1], ClueKind::KubeEvent));
const PEER: &[ClueKind] = &[ClueKind::RefusedBurst, ClueKind::RetransmitBurst, ClueKind::SynRetransmitBurst];
/// Kinds of clues about a Service, or about the Service at the other end.
const BACKENDS: &[ClueKind] =
    &[ClueKind::Endpoints, ClueKind::RefusedBurst, ClueKind::RetransmitBurst, ClueKind::SynRetransmitBurst];
const DEVICE: &[ClueKind] = &[ClueKind::SlowIoBurst, ClueKind::IoErrorBurst, ClueKind::SlowShare];
const ERRNO: &[ClueKind] = &[ClueKind::SyscallErrorBurst, ClueKind::IoErrorBurst];
/// Kinds that speak of an object of Kubernetes by its name.
const OBJECT: &[ClueKind] =
    &[ClueKind::KubeEvent, ClueKind::Rollout, ClueKind::ConfigChange, ClueKind::Endpoints, ClueKind::ObjectState];
const REASON: &[ClueKind] = &[
    ClueKind::PodState,
    ClueKind::ContainerState,
    ClueKind::KubeEvent,
    ClueKind::NodeCondition,
    ClueKind::Rollout,
    ClueKind::ObjectState,
    ClueKind::Gap,
];
const POD_STATE: &[ClueKind] = &[ClueKind::PodState];
const CONTAINER: &[ClueKind] = &[ClueKind::ContainerState];
const ROLLOUT: &[ClueKind] = &[ClueKind::Rollout];
const UNIT: &[ClueKind] = &[ClueKind::UnitState, ClueKind::UnitJob];
const UNIT_STATE: &[ClueKind] = &[ClueKind::UnitState];
const OBSERVATION: &[ClueKind] = &[ClueKind::Observation];
const CGROUP_USE: &[ClueKind] = &[ClueKind::CgroupUse];
/// Counters: of a lifetime in an observation, differences over a time in a cgroup's use.
const COUNTERS: &[ClueKind] = &[ClueKind::Observation, ClueKind::CgroupUse];
const TROUBLE: &[ClueKind] = &[ClueKind::Trouble];
const CURVE: &[ClueKind] = &[ClueKind::Curve];
const CONNTRACK: &[ClueKind] = &[ClueKind::Conntrack];

macro_rules! fields {
    ($($(#[$meta:meta])* $name:ident => $text:literal, $type:ident, $kinds:expr;)*) => {
        /// Fields of clues.
        #[allow(clippy::enum_variant_names, reason = "a field of a clue may be called field_path")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Field { $($(#[$meta])* $name,)* }
        impl Field {
            const ALL: &'static [Self] = &[$(Self::$name,)*];
            /// The name that patterns use.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
            /// How it is compared and shown.
            pub fn field_type(self) -> FieldType {
                match self { $(Self::$name => FieldType::$type,)* }
            }
            fn kinds(self) -> &'static [ClueKind] {
                match self { $(Self::$name => $kinds,)* }
            }
        }
    };
}

fields! {
    Entity => "entity", Number, ClueKind::ALL;
    EntityKind => "entity_kind", Text, ClueKind::ALL;
    EntityName => "entity_name", Text, ClueKind::ALL;
    Cgroup => "cgroup", Text, ClueKind::ALL;
    Pid => "pid", Number, ClueKind::ALL;
    Namespace => "namespace", Text, ClueKind::ALL;
    Pod => "pod", Text, ClueKind::ALL;
    /// Number of the pod's uid: a pod that comes back with its name is another one.
    PodId => "pod_id", Number, ClueKind::ALL;
    Container => "container", Text, ClueKind::ALL;
    Workload => "workload", Text, ClueKind::ALL;
    Image => "image", Text, ClueKind::ALL;
    Node => "node", Text, ClueKind::ALL;
    Comm => "comm", Text, COMM;
    /// The container's first process; every process where there is no container.
    Lead => "lead", Flag, PROCESS;
    /// The container's first process; in a unit a process that the service manager started.
    Main => "main", Flag, EXIT;
    ExitCode => "exit_code", Number, &[ClueKind::Exit, ClueKind::ContainerState];
    Signal => "signal", Signal, &[ClueKind::Exit, ClueKind::Kill, ClueKind::Delivered];
    /// The signal that ended it, or that its exit code stands for.
    DiedBy => "died_by", Signal, EXIT;
    Failed => "failed", Flag, EXIT;
    Lifetime => "lifetime", Nanoseconds, EXIT;
    LimitHit => "limit_hit", Flag, OOM;
    LimitBytes => "limit_bytes", Bytes, OOM;
    UsageBytes => "usage_bytes", Bytes, OOM;
    OverBytes => "over_bytes", Bytes, OOM;
    RssBytes => "rss_bytes", Bytes, OOM;
    AnonRss => "anon_rss", Bytes, OOM;
    FileRss => "file_rss", Bytes, OOM;
    ShmemRss => "shmem_rss", Bytes, OOM;
    /// first, member, session, sandbox, runtime or unknown: the part that the process has in its container.
    ProcessRole => "process_role", Text, PROCESS;
    /// The first process of a pid namespace of its own: with it the namespace ends.
    NamespaceInit => "namespace_init", Flag, PROCESS;
    LimitCgroup => "limit_cgroup", Text, &[ClueKind::Oom, ClueKind::CgroupUse];
    /// own, pod, qos, allocatable, slice, unit or other: whose limit it is.
    LimitLevel => "limit_level", Text, OOM;
    /// Owner of the limit, for people.
    LimitOwner => "limit_owner", Text, OOM;
    /// The limit, where it is the victim's own.
    OwnLimit => "own_limit", Bytes, OOM;
    /// The limit, where it is the whole pod's.
    PodLimit => "pod_limit", Bytes, OOM;
    /// The limit, where it is neither the victim's own nor its pod's.
    SharedLimit => "shared_limit", Bytes, OOM;
    LimitHeight => "limit_height", Number, OOM;
    /// OOM score: the kernel kills 1000 first and -1000 never. The clue has 1000 added, so that it is not negative.
    OomScore => "oom_score", Number, &[ClueKind::Oom, ClueKind::Exit];
    ParentPid => "parent_pid", Number, &[ClueKind::Exec, ClueKind::Exit];
    /// The process had used up its CPU time (RLIMIT_CPU).
    OverCpuLimit => "over_cpu_limit", Flag, KILL;
    Height => "height", Number, CGROUP_USE;
    Anon => "anon", Bytes, CGROUP_USE;
    PageCache => "page_cache", Bytes, CGROUP_USE;
    Shmem => "shmem", Bytes, CGROUP_USE;
    KernelMemory => "kernel_memory", Bytes, CGROUP_USE;
    /// anon, page_cache, shmem or kernel_memory: what most of the memory is.
    Mostly => "mostly", Text, CGROUP_USE;
    /// Percent of the limit.
    AnonShare => "anon_share", Number, CGROUP_USE;
    PageCacheShare => "page_cache_share", Number, CGROUP_USE;
    ShmemShare => "shmem_share", Number, CGROUP_USE;
    /// The time over which the differences were taken.
    Over => "over", Nanoseconds, CGROUP_USE;
    /// Percent of the periods.
    ThrottledShare => "throttled_share", Number, &[ClueKind::CgroupUse, ClueKind::Curve];
    /// The biggest below the cgroup.
    Members => "members", Text, CGROUP_USE;
    FullMount => "full_mount", Text, CGROUP_USE;
    FullMountSize => "full_mount_size", Bytes, CGROUP_USE;
    MountFull => "mount_full", Flag, CGROUP_USE;
    AllocatorComm => "allocator_comm", Text, OOM;
    AllocatorPid => "allocator_pid", Number, OOM;
    /// kernel, self, same (entity or pod), runtime or outside.
    Sender => "sender", Text, KILL;
    SenderPid => "sender_pid", Number, KILL;
    SenderComm => "sender_comm", Text, KILL;
    /// Who sent it, for people: by the kernel, while somebody was running, or a process.
    SentBy => "sent_by", Text, KILL;
    SenderEntity => "sender_entity", Number, KILL;
    SenderKind => "sender_kind", Text, KILL;
    Ignored => "ignored", Flag, KILL;
    /// Repeats of the same signal since the one before.
    Repeats => "repeats", Number, KILL;
    Count => "count", Number, COUNTED;
    Stall => "stall", Nanoseconds, BURST;
    Span => "span", Nanoseconds, BURST;
    /// Who is at the other end: `service shop/db`, `pod shop/db-0`, or its address.
    Peer => "peer", Text, PEER;
    PeerAddress => "peer_address", Text, PEER;
    PeerPort => "peer_port", Number, PEER;
    /// Name of the error: `EMFILE`.
    Errno => "errno", Text, ERRNO;
    Syscall => "syscall", Number, &[ClueKind::SyscallErrorBurst];
    /// `8:16`
    Device => "device", Number, DEVICE;
    /// Kernel's reason of the drop: `NETFILTER_DROP`.
    DropReason => "drop_reason", Text, &[ClueKind::PacketDropBurst];
    Interface => "interface", Number, &[ClueKind::PacketDropBurst];
    /// `SERVFAIL`, `unanswered`.
    Rcode => "rcode", Text, &[ClueKind::DnsFailureBurst];
    Measure => "measure", Text, &[ClueKind::SlowShare];
    Total => "total", Number, &[ClueKind::SlowShare];
    Reason => "reason", Text, REASON;
    Message => "message", Text, &[
        ClueKind::PodState, ClueKind::ContainerState, ClueKind::KubeEvent, ClueKind::NodeCondition,
        ClueKind::Rollout, ClueKind::ObjectState];
    /// The pod that a controller says to have deleted: `Deleted pod: web-1`.
    DeletedPod => "deleted_pod", Text, &[ClueKind::KubeEvent];
    Type => "type", Text, &[ClueKind::KubeEvent];
    FieldPath => "field_path", Text, &[ClueKind::KubeEvent];
    Component => "component", Text, &[ClueKind::KubeEvent];
    ObjectKind => "object_kind", Text, OBJECT;
    ObjectNamespace => "object_namespace", Text, OBJECT;
    ObjectName => "object_name", Text, OBJECT;
    Phase => "phase", Text, POD_STATE;
    Ready => "ready", Flag, &[ClueKind::PodState, ClueKind::ContainerState];
    Deleting => "deleting", Flag, POD_STATE;
    Gone => "gone", Flag, &[ClueKind::PodState, ClueKind::Rollout, ClueKind::ObjectState];
    Grace => "grace", Nanoseconds, POD_STATE;
    State => "state", Text, &[ClueKind::ContainerState, ClueKind::ObjectState];
    RestartCount => "restart_count", Number, CONTAINER;
    Last => "last", Flag, CONTAINER;
    Role => "role", Text, CONTAINER;
    CpuLimit => "cpu_limit", Number, CONTAINER;
    Condition => "condition", Text, &[ClueKind::NodeCondition];
    Status => "status", Text, &[ClueKind::NodeCondition];
    Images => "images", Text, ROLLOUT;
    ImagesBefore => "images_before", Text, ROLLOUT;
    ImageChanged => "image_changed", Flag, ROLLOUT;
    Generation => "generation", Number, ROLLOUT;
    Desired => "desired", Number, &[ClueKind::Rollout, ClueKind::ObjectState];
    Updated => "updated", Number, ROLLOUT;
    ReadyReplicas => "ready_replicas", Number, ROLLOUT;
    Unavailable => "unavailable", Number, ROLLOUT;
    ResourceVersion => "resource_version", Text, &[ClueKind::ConfigChange];
    Change => "change", Text, &[ClueKind::ConfigChange];
    Backends => "backends", Number, BACKENDS;
    ReadyBackends => "ready_backends", Number, BACKENDS;
    UnreadyBackends => "unready_backends", Number, BACKENDS;
    Current => "current", Number, &[ClueKind::ObjectState];
    Unit => "unit", Text, UNIT;
    Result => "result", Text, UNIT;
    ActiveState => "active_state", Text, UNIT_STATE;
    SubState => "sub_state", Text, UNIT_STATE;
    MainStatus => "main_status", Number, UNIT_STATE;
    Restarts => "restarts", Number, UNIT_STATE;
    MemoryLimit => "memory_limit", Bytes, &[
        ClueKind::ContainerState, ClueKind::Observation, ClueKind::CgroupUse, ClueKind::Curve];
    MemoryUsage => "memory_usage", Bytes, &[ClueKind::Observation, ClueKind::CgroupUse, ClueKind::Curve];
    MemoryPeak => "memory_peak", Bytes, &[ClueKind::Observation, ClueKind::Curve];
    OomKills => "oom_kills", Number, COUNTERS;
    LimitHits => "limit_hits", Number, COUNTERS;
    Pids => "pids", Number, OBSERVATION;
    PidsLimit => "pids_limit", Number, OBSERVATION;
    /// True if at least 98 % of `pids.max` are in use.
    PidsFull => "pids_full", Flag, OBSERVATION;
    Throttled => "throttled", Number, COUNTERS;
    ThrottledTime => "throttled_time", Nanoseconds, COUNTERS;
    /// Percent of the last ten seconds in which everything waited for memory.
    MemoryPressure => "memory_pressure", Number, OBSERVATION;
    ProcessComm => "process_comm", Text, &[ClueKind::Observation, ClueKind::Trouble];
    ProcessCommand => "process_command", Text, OBSERVATION;
    What => "what", Text, &[ClueKind::Gap, ClueKind::Trouble];
    Lasted => "lasted", Nanoseconds, &[ClueKind::Gap, ClueKind::Trouble, ClueKind::Curve, ClueKind::NodeCondition];
    /// A mount point, or the kernel's function that a task waits in.
    Place => "place", Text, TROUBLE;
    Value => "value", Number, TROUBLE;
    Limit => "limit", Number, TROUBLE;
    /// The trouble is over.
    Ended => "ended", Flag, TROUBLE;
    /// True for the whole pod's curve, false for a container's.
    OfPod => "of_pod", Flag, CURVE;
    /// leak, spike, cache, tmpfs, steady or unclear.
    Shape => "shape", Text, CURVE;
    /// Memory in use at the beginning of the curve.
    First => "first", Bytes, CURVE;
    GrowthPerHour => "growth_per_hour", Bytes, CURVE;
    /// Thousandths of a core, over the last minute.
    CpuMilli => "cpu_milli", Number, CURVE;
    /// What a container wrote last.
    Lines => "lines", Text, &[ClueKind::LogLines];
    LineCount => "line_count", Number, &[ClueKind::LogLines];
    FoundGone => "found_gone", Number, &[ClueKind::Gap];
    /// Above the threshold, and not yet below the lower one.
    Full => "full", Flag, CONNTRACK;
    Entries => "entries", Number, CONNTRACK;
    EntriesMax => "entries_max", Number, CONNTRACK;
    /// Percent.
    Filled => "filled", Number, CONNTRACK;
    Dropped => "dropped", Number, CONNTRACK;
    EarlyDropped => "early_dropped", Number, CONNTRACK;
    /// Who has most connections: `pod shop/crawler-0 (10.0.0.7)`, or its address.
    Talker => "talker", Text, CONNTRACK;
    TalkerAddress => "talker_address", Text, CONNTRACK;
    /// Percent of the connections that were looked at.
    TalkerShare => "talker_share", Number, CONNTRACK;
}

impl Field {
    /// The field of this name, if clues of `kind` have it.
    pub fn of_kind(name: &str, kind: ClueKind) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|field| field.name() == name && field.kinds().iter().copied().collect::<ClueKinds>().contains(kind))
    }

    /// The names of what clues of `kind` have.
    pub fn names_of(kind: ClueKind) -> String {
        let names: Vec<_> =
            Self::ALL.iter().filter(|field| field.kinds().contains(&kind)).map(|field| field.name()).collect();
        names.join(", ")
    }

    /// Returns the clue's value of the field, if it has one.
    pub fn get(self, clue: &Clue) -> Option<Value<'_>> {
        let entity = &clue.entity;
        Some(match (self, &clue.detail) {
            (Self::Entity, _) => Value::Number(clue.entity.id),
            (Self::EntityKind, _) => Value::Text(entity.kind_name()),
            (Self::EntityName, _) => Value::Text(&entity.name),
            (Self::Cgroup, _) => Value::Text(&entity.cgroup),
            (Self::Pid, _) => Value::Number(u64::from(clue.pid)),
            (Self::Namespace, detail) => match (known(&entity.namespace), detail) {
                (Some(namespace), _) => namespace,
                (None, ClueDetail::Fact(fact)) => known(fact.text("object_namespace"))?,
                (None, _) => return None,
            },
            (Self::Pod, _) => known(&entity.pod)?,
            (Self::PodId, _) => match entity.pod_id() {
                0 => return None,
                pod => Value::Number(pod),
            },
            (Self::Container, detail) => match (known(&entity.container), detail) {
                (Some(container), _) => container,
                // `spec.containers{web}`
                (None, ClueDetail::Fact(fact)) => match fact.text("container") {
                    "" => known(fact.text("field_path").split_once('{')?.1.trim_end_matches('}'))?,
                    container => known(container)?,
                },
                (None, _) => return None,
            },
            (Self::Workload, _) => known(&entity.workload)?,
            (Self::Image, detail) => match (known(&entity.image), detail) {
                (Some(image), _) => image,
                (None, ClueDetail::Fact(fact)) => known(fact.text("image"))?,
                (None, _) => return None,
            },
            (Self::Node, _) => Value::Text(&entity.node.name),
            (Self::DeletedPod, ClueDetail::Fact(fact)) => Value::Text(text::deleted_pod(fact.text("message"))?),
            (field, ClueDetail::Fact(fact)) => match fact.get(field.name())? {
                FactValue::Number(number) => Value::Number(*number),
                FactValue::Flag(flag) => Value::Flag(*flag),
                FactValue::Text(text) => Value::Text(text),
            },
            (Self::Comm, _) => Value::Text(clue.comm()?),
            (Self::Lead, _) => Value::Flag(clue.is_lead()),
            (Self::NamespaceInit, _) => Value::Flag(clue.is_namespace_init()),
            (Self::ProcessRole, _) => Value::Text(text::role_name(clue.role())),
            (field, ClueDetail::Burst(burst)) => field.of_burst(burst)?,
            (field, _) => field.of_process(clue)?,
        })
    }

    /// Returns the value from what the kernel said of a process.
    fn of_process(self, clue: &Clue) -> Option<Value<'_>> {
        Some(match (self, &clue.detail) {
            (Self::Main, ClueDetail::Exit(exit)) => {
                Value::Flag(clue.is_lead() && (clue.entity.kind != Some(EntityKind::Unit) || exit.parent_pid <= 1))
            }
            (Self::ExitCode, ClueDetail::Exit(exit)) => Value::Number(exit.exit_code()?.into()),
            (Self::Signal, ClueDetail::Exit(exit)) => Value::Number(exit.signal()?.into()),
            (Self::DiedBy, ClueDetail::Exit(exit)) => Value::Number(exit.died_by()?.into()),
            (Self::Failed, ClueDetail::Exit(exit)) => Value::Flag(exit.status != 0),
            (Self::Lifetime, ClueDetail::Exit(exit)) => {
                Value::Number(clue.boottime_ns.saturating_sub(exit.start_time_ns))
            }
            (Self::LimitHit, ClueDetail::Oom(oom)) => Value::Flag(oom.limit_hit()),
            (Self::LimitBytes, ClueDetail::Oom(oom)) => Value::Number(oom.limit_bytes),
            (Self::UsageBytes, ClueDetail::Oom(oom)) => Value::Number(oom.usage_bytes),
            (Self::OverBytes, ClueDetail::Oom(oom)) => Value::Number(oom.over_bytes()?),
            (Self::RssBytes, ClueDetail::Oom(oom)) => Value::Number(oom.rss_bytes),
            (Self::AnonRss, ClueDetail::Oom(oom)) => Value::Number(oom.resident()?.anon),
            (Self::FileRss, ClueDetail::Oom(oom)) => Value::Number(oom.resident()?.file),
            (Self::ShmemRss, ClueDetail::Oom(oom)) => Value::Number(oom.resident()?.shmem),
            (Self::LimitCgroup, ClueDetail::Oom(oom)) => Value::Text(&oom.limit_cgroup),
            (Self::LimitLevel, ClueDetail::Oom(oom)) => Value::Text(oom.limit_level.name()),
            (Self::OwnLimit | Self::PodLimit | Self::SharedLimit, ClueDetail::Oom(oom)) => {
                let field = match oom.limit_level {
                    LimitLevel::Own => Self::OwnLimit,
                    LimitLevel::Pod => Self::PodLimit,
                    _ => Self::SharedLimit,
                };
                (oom.limit_hit() && self == field).then_some(Value::Number(oom.limit_bytes))?
            }
            (Self::LimitHeight, ClueDetail::Oom(oom)) => Value::Number(oom.limit_height.into()),
            (Self::OomScore, ClueDetail::Oom(oom)) => Value::Number((i64::from(oom.oom_score_adj) + 1000) as u64),
            (Self::OomScore, ClueDetail::Exit(exit)) => Value::Number((i64::from(exit.oom_score_adj) + 1000) as u64),
            (Self::ParentPid, ClueDetail::Exec(exec)) => Value::Number(exec.parent_pid.into()),
            (Self::ParentPid, ClueDetail::Exit(exit)) => Value::Number(exit.parent_pid.into()),
            (Self::OverCpuLimit, ClueDetail::Kill(kill)) => Value::Flag(kill.over_cpu_limit),
            (Self::AllocatorComm, ClueDetail::Oom(oom)) => Value::Text(&oom.allocator_comm),
            (Self::AllocatorPid, ClueDetail::Oom(oom)) => Value::Number(oom.allocator_pid.into()),
            (Self::Signal, ClueDetail::Kill(kill)) => Value::Number(kill.signal.into()),
            (Self::Sender, ClueDetail::Kill(kill)) => Value::Text(kill.sender_class.name()),
            (Self::SenderPid, ClueDetail::Kill(kill)) => Value::Number(kill.sender_pid.into()),
            (Self::SenderComm, ClueDetail::Kill(kill)) => Value::Text(&kill.sender_comm),
            (Self::SentBy, ClueDetail::Kill(kill)) => Value::Text(kill.sender_class.name()),
            (Self::SenderEntity, ClueDetail::Kill(kill)) => Value::Number(kill.sender.id),
            (Self::SenderKind, ClueDetail::Kill(kill)) => Value::Text(kill.sender.kind_name()),
            (Self::Ignored, ClueDetail::Kill(kill)) => Value::Flag(kill.ignored),
            (Self::Repeats, ClueDetail::Kill(kill)) if kill.repeats > 0 => Value::Number(kill.repeats.into()),
            _ => return None,
        })
    }

    fn of_burst(self, burst: &Burst) -> Option<Value<'_>> {
        Some(match self {
            Self::Count => Value::Number(burst.count.into()),
            Self::Stall => Value::Number(u64::from(burst.stall_us) * 1_000),
            Self::Span => Value::Number(u64::from(burst.span_ms) * 1_000_000),
            Self::Peer => Value::Text(burst.peer.as_deref()?),
            Self::DropReason => Value::Text(burst.drop_reason.as_deref()?),
            Self::Backends => Value::Number(burst.peer_backends?.1.into()),
            Self::ReadyBackends => Value::Number(burst.peer_backends?.0.into()),
            Self::UnreadyBackends => {
                let (ready, all) = burst.peer_backends?;
                Value::Number(u64::from(all.saturating_sub(ready)))
            }
            field => field.of_cause(burst.about)?,
        })
    }

    /// Returns the value from what the events of a burst have in common.
    fn of_cause(self, about: About) -> Option<Value<'static>> {
        Some(match (self, about) {
            (Self::PeerPort, About::Peer { port, .. }) => Value::Number(port.into()),
            (Self::Errno, About::Errno { errno, .. } | About::Device { errno, .. }) if errno != 0 => {
                Value::Text(text::errno_name(errno))
            }
            (Self::Syscall, About::Errno { syscall, .. }) => Value::Number(syscall.into()),
            (Self::Interface, About::Drop { interface, .. }) => Value::Number(interface.into()),
            (Self::Rcode, About::Dns { rcode }) => Value::Text(text::rcode_name(rcode)),
            (Self::Measure, About::Share { measure, .. }) => Value::Text(measure.name()),
            (Self::Total, About::Share { total, .. }) => Value::Number(total),
            // Compared as the kernel's number, shown as `8:16`.
            (Self::Device, About::Device { device, .. } | About::Share { device, .. }) => Value::Number(device.into()),
            _ => return None,
        })
    }

    /// Formats the value for people.
    pub fn show(self, clue: &Clue) -> Option<String> {
        match (self, &clue.detail) {
            (Self::Entity, _) => return Some(clue.entity.to_string()),
            (Self::LimitOwner, ClueDetail::Oom(oom)) => return Some(oom.limit_level.describe(&oom.limit_cgroup)),
            (Self::OomScore, ClueDetail::Oom(oom)) => return Some(oom.oom_score_adj.to_string()),
            (Self::OomScore, ClueDetail::Exit(exit)) => return Some(exit.oom_score_adj.to_string()),
            (Self::SenderEntity, ClueDetail::Kill(kill)) => return Some(kill.sender.to_string()),
            (Self::SentBy, ClueDetail::Kill(kill)) => return Some(text::sent_by(kill)),
            (Self::Value | Self::Limit, ClueDetail::Fact(fact)) if fact.text("what") == "memory-high" => {
                return Some(human_bytes(fact.number(self.name())));
            }
            (Self::Peer, ClueDetail::Burst(burst)) => return Some(text::peer(burst)),
            (Self::PeerAddress, ClueDetail::Burst(burst)) => return text::peer_address(burst.about),
            (Self::Device, ClueDetail::Burst(burst)) => return text::device(burst.about),
            _ => {}
        }
        Some(match (self.get(clue)?, self.field_type()) {
            (Value::Number(bytes), FieldType::Bytes) => human_bytes(bytes),
            (Value::Number(ns), FieldType::Nanoseconds) => human_duration(ns),
            (Value::Number(signal), FieldType::Signal) => text::signal_name(signal as u32),
            (Value::Number(number), _) => number.to_string(),
            (Value::Flag(flag), _) => flag.to_string(),
            (Value::Text(""), _) => "?".to_owned(),
            (Value::Text(text), _) => text.to_owned(),
        })
    }
}
