//! What patterns can ask of a signal, by name.
//!
//! One table: the name, how people read it, and which kinds of signal have it. A pattern that asks a kind for something it
//! does not have is refused when it is loaded.

use tapio_wire::event::{EntityKind, Role};
use tapio_wire::program::units::{human_bytes, human_duration};

use super::text;
use crate::correlate::signal::{About, Detail, FactValue, Signal, SignalKind, SignalKinds};

/// How a field is compared and shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldType {
    Number,
    Bytes,
    Nanoseconds,
    /// A process signal's number, shown by its name.
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

/// A text that was told.
fn known(text: &str) -> Option<Value<'_>> {
    (!text.is_empty()).then_some(Value::Text(text))
}

/// Kinds that name a process.
const PROCESS: &[SignalKind] = &[SignalKind::Exec, SignalKind::Exit, SignalKind::Oom, SignalKind::Kill];
const EXIT: &[SignalKind] = &[SignalKind::Exit];
const OOM: &[SignalKind] = &[SignalKind::Oom];
const KILL: &[SignalKind] = &[SignalKind::Kill];
const COMM: &[SignalKind] =
    &[SignalKind::Exec, SignalKind::Exit, SignalKind::Oom, SignalKind::Kill, SignalKind::Delivered];
const COUNTED: &[SignalKind] = &[
    SignalKind::ReclaimBurst,
    SignalKind::DirectReclaimBurst,
    SignalKind::RefusedBurst,
    SignalKind::RetransmitBurst,
    SignalKind::SynRetransmitBurst,
    SignalKind::SyscallErrorBurst,
    SignalKind::SlowIoBurst,
    SignalKind::IoErrorBurst,
    SignalKind::PacketDropBurst,
    SignalKind::DnsFailureBurst,
    SignalKind::RunQueueBurst,
    SignalKind::SlowShare,
    SignalKind::KubeEvent,
];
/// All of [`COUNTED`] but the last.
const BURST: &[SignalKind] = COUNTED.split_at(COUNTED.len() - 1).0;
const _: () = assert!(matches!(COUNTED[COUNTED.len() - 1], SignalKind::KubeEvent));
const PEER: &[SignalKind] = &[SignalKind::RefusedBurst, SignalKind::RetransmitBurst, SignalKind::SynRetransmitBurst];
/// Of a Service, or of the one at the other end.
const BACKENDS: &[SignalKind] =
    &[SignalKind::Endpoints, SignalKind::RefusedBurst, SignalKind::RetransmitBurst, SignalKind::SynRetransmitBurst];
const DEVICE: &[SignalKind] = &[SignalKind::SlowIoBurst, SignalKind::IoErrorBurst, SignalKind::SlowShare];
const ERRNO: &[SignalKind] = &[SignalKind::SyscallErrorBurst, SignalKind::IoErrorBurst];
/// Kinds that speak of an object of Kubernetes by its name.
const OBJECT: &[SignalKind] = &[
    SignalKind::KubeEvent,
    SignalKind::Rollout,
    SignalKind::ConfigChange,
    SignalKind::Endpoints,
    SignalKind::ObjectState,
];
const REASON: &[SignalKind] = &[
    SignalKind::PodState,
    SignalKind::ContainerState,
    SignalKind::KubeEvent,
    SignalKind::NodeCondition,
    SignalKind::Rollout,
    SignalKind::ObjectState,
    SignalKind::Gap,
];
const POD_STATE: &[SignalKind] = &[SignalKind::PodState];
const CONTAINER: &[SignalKind] = &[SignalKind::ContainerState];
const ROLLOUT: &[SignalKind] = &[SignalKind::Rollout];
const UNIT: &[SignalKind] = &[SignalKind::UnitState, SignalKind::UnitJob];
const UNIT_STATE: &[SignalKind] = &[SignalKind::UnitState];
const OBSERVATION: &[SignalKind] = &[SignalKind::Observation];
const CGROUP_USE: &[SignalKind] = &[SignalKind::CgroupUse];
/// Counters: of a lifetime in an observation, differences over a time in a cgroup's use.
const COUNTERS: &[SignalKind] = &[SignalKind::Observation, SignalKind::CgroupUse];
const TROUBLE: &[SignalKind] = &[SignalKind::Trouble];
const CURVE: &[SignalKind] = &[SignalKind::Curve];
const CONNTRACK: &[SignalKind] = &[SignalKind::Conntrack];

macro_rules! fields {
    ($($(#[$meta:meta])* $name:ident => $text:literal, $type:ident, $kinds:expr;)*) => {
        /// Fields of signals.
        #[allow(clippy::enum_variant_names, reason = "a field of a signal may be called field_path")]
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
            fn kinds(self) -> &'static [SignalKind] {
                match self { $(Self::$name => $kinds,)* }
            }
        }
    };
}

fields! {
    Entity => "entity", Number, SignalKind::ALL;
    EntityKind => "entity_kind", Text, SignalKind::ALL;
    EntityName => "entity_name", Text, SignalKind::ALL;
    Cgroup => "cgroup", Text, SignalKind::ALL;
    Pid => "pid", Number, SignalKind::ALL;
    Namespace => "namespace", Text, SignalKind::ALL;
    Pod => "pod", Text, SignalKind::ALL;
    /// Of the pod's uid: a pod that comes back with its name is another one.
    PodId => "pod_id", Number, SignalKind::ALL;
    Container => "container", Text, SignalKind::ALL;
    Workload => "workload", Text, SignalKind::ALL;
    Image => "image", Text, SignalKind::ALL;
    Node => "node", Text, SignalKind::ALL;
    Comm => "comm", Text, COMM;
    /// The container's first process; every process where there is no container.
    Lead => "lead", Flag, PROCESS;
    /// The container's first process; in a unit a process that the service manager started.
    Main => "main", Flag, EXIT;
    ExitCode => "exit_code", Number, &[SignalKind::Exit, SignalKind::ContainerState];
    Signal => "signal", Signal, &[SignalKind::Exit, SignalKind::Kill, SignalKind::Delivered];
    /// The signal that ended it, or that its exit code stands for.
    DiedBy => "died_by", Signal, EXIT;
    Failed => "failed", Flag, EXIT;
    Lifetime => "lifetime", Nanoseconds, EXIT;
    LimitHit => "limit_hit", Flag, OOM;
    LimitBytes => "limit_bytes", Bytes, OOM;
    UsageBytes => "usage_bytes", Bytes, OOM;
    OverBytes => "over_bytes", Bytes, OOM;
    RssBytes => "rss_bytes", Bytes, OOM;
    /// first, member, session, sandbox, runtime or unknown: the part that the process has in its container.
    ProcessRole => "process_role", Text, PROCESS;
    /// The first process of a pid namespace of its own: with it the namespace ends.
    NamespaceInit => "namespace_init", Flag, PROCESS;
    LimitCgroup => "limit_cgroup", Text, &[SignalKind::Oom, SignalKind::CgroupUse];
    /// own, pod, qos, allocatable, slice, unit or other: whose limit it is.
    LimitLevel => "limit_level", Text, OOM;
    /// The same for people.
    LimitOwner => "limit_owner", Text, OOM;
    LimitHeight => "limit_height", Number, OOM;
    /// Of 1000 the kernel kills it first, of -1000 never; the signal has 1000 added, so that it is no negative number.
    OomScore => "oom_score", Number, &[SignalKind::Oom, SignalKind::Exit];
    ParentPid => "parent_pid", Number, &[SignalKind::Exec, SignalKind::Exit];
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
    ThrottledShare => "throttled_share", Number, &[SignalKind::CgroupUse, SignalKind::Curve];
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
    /// So many more of the same since the signal before.
    Repeats => "repeats", Number, KILL;
    Count => "count", Number, COUNTED;
    Stall => "stall", Nanoseconds, BURST;
    Span => "span", Nanoseconds, BURST;
    /// Who is at the other end: `service shop/db`, `pod shop/db-0`, or its address.
    Peer => "peer", Text, PEER;
    PeerAddress => "peer_address", Text, PEER;
    PeerPort => "peer_port", Number, PEER;
    /// By its name: `EMFILE`.
    Errno => "errno", Text, ERRNO;
    Syscall => "syscall", Number, &[SignalKind::SyscallErrorBurst];
    /// `8:16`
    Device => "device", Number, DEVICE;
    /// As the kernel calls it: `NETFILTER_DROP`.
    DropReason => "drop_reason", Text, &[SignalKind::PacketDropBurst];
    Interface => "interface", Number, &[SignalKind::PacketDropBurst];
    /// `SERVFAIL`, `unanswered`.
    Rcode => "rcode", Text, &[SignalKind::DnsFailureBurst];
    Measure => "measure", Text, &[SignalKind::SlowShare];
    Total => "total", Number, &[SignalKind::SlowShare];
    Reason => "reason", Text, REASON;
    Message => "message", Text, &[
        SignalKind::PodState, SignalKind::ContainerState, SignalKind::KubeEvent, SignalKind::NodeCondition,
        SignalKind::Rollout, SignalKind::ObjectState];
    Type => "type", Text, &[SignalKind::KubeEvent];
    FieldPath => "field_path", Text, &[SignalKind::KubeEvent];
    Component => "component", Text, &[SignalKind::KubeEvent];
    ObjectKind => "object_kind", Text, OBJECT;
    ObjectNamespace => "object_namespace", Text, OBJECT;
    ObjectName => "object_name", Text, OBJECT;
    Phase => "phase", Text, POD_STATE;
    Ready => "ready", Flag, &[SignalKind::PodState, SignalKind::ContainerState];
    Deleting => "deleting", Flag, POD_STATE;
    Gone => "gone", Flag, &[SignalKind::PodState, SignalKind::Rollout, SignalKind::ObjectState];
    Grace => "grace", Nanoseconds, POD_STATE;
    State => "state", Text, &[SignalKind::ContainerState, SignalKind::ObjectState];
    RestartCount => "restart_count", Number, CONTAINER;
    Last => "last", Flag, CONTAINER;
    Role => "role", Text, CONTAINER;
    CpuLimit => "cpu_limit", Number, CONTAINER;
    Condition => "condition", Text, &[SignalKind::NodeCondition];
    Status => "status", Text, &[SignalKind::NodeCondition];
    Images => "images", Text, ROLLOUT;
    ImagesBefore => "images_before", Text, ROLLOUT;
    ImageChanged => "image_changed", Flag, ROLLOUT;
    Generation => "generation", Number, ROLLOUT;
    Desired => "desired", Number, &[SignalKind::Rollout, SignalKind::ObjectState];
    Updated => "updated", Number, ROLLOUT;
    ReadyReplicas => "ready_replicas", Number, ROLLOUT;
    Unavailable => "unavailable", Number, ROLLOUT;
    ResourceVersion => "resource_version", Text, &[SignalKind::ConfigChange];
    Change => "change", Text, &[SignalKind::ConfigChange];
    Backends => "backends", Number, BACKENDS;
    ReadyBackends => "ready_backends", Number, BACKENDS;
    UnreadyBackends => "unready_backends", Number, BACKENDS;
    Current => "current", Number, &[SignalKind::ObjectState];
    Unit => "unit", Text, UNIT;
    Result => "result", Text, UNIT;
    ActiveState => "active_state", Text, UNIT_STATE;
    SubState => "sub_state", Text, UNIT_STATE;
    MainStatus => "main_status", Number, UNIT_STATE;
    Restarts => "restarts", Number, UNIT_STATE;
    MemoryLimit => "memory_limit", Bytes, &[
        SignalKind::ContainerState, SignalKind::Observation, SignalKind::CgroupUse, SignalKind::Curve];
    MemoryUsage => "memory_usage", Bytes, &[SignalKind::Observation, SignalKind::CgroupUse, SignalKind::Curve];
    MemoryPeak => "memory_peak", Bytes, &[SignalKind::Observation, SignalKind::Curve];
    OomKills => "oom_kills", Number, COUNTERS;
    LimitHits => "limit_hits", Number, COUNTERS;
    Pids => "pids", Number, OBSERVATION;
    PidsLimit => "pids_limit", Number, OBSERVATION;
    /// At least 98 % of `pids.max` are in use.
    PidsFull => "pids_full", Flag, OBSERVATION;
    Throttled => "throttled", Number, COUNTERS;
    ThrottledTime => "throttled_time", Nanoseconds, COUNTERS;
    /// Percent of the last ten seconds in which everything waited for memory.
    MemoryPressure => "memory_pressure", Number, OBSERVATION;
    ProcessComm => "process_comm", Text, &[SignalKind::Observation, SignalKind::Trouble];
    ProcessCommand => "process_command", Text, OBSERVATION;
    What => "what", Text, &[SignalKind::Gap, SignalKind::Trouble];
    Lasted => "lasted", Nanoseconds, &[SignalKind::Gap, SignalKind::Trouble, SignalKind::Curve];
    /// A mount point, or the kernel's function that a task waits in.
    Place => "place", Text, TROUBLE;
    Value => "value", Number, TROUBLE;
    Limit => "limit", Number, TROUBLE;
    /// The trouble is over.
    Ended => "ended", Flag, TROUBLE;
    /// It is the whole pod's, and not a container's.
    OfPod => "of_pod", Flag, CURVE;
    /// leak, spike, cache, tmpfs, steady or unclear.
    Shape => "shape", Text, CURVE;
    /// Memory in use at the beginning of the curve.
    First => "first", Bytes, CURVE;
    GrowthPerHour => "growth_per_hour", Bytes, CURVE;
    /// Thousandths of a core, over the last minute.
    CpuMilli => "cpu_milli", Number, CURVE;
    /// What a container wrote last.
    Lines => "lines", Text, &[SignalKind::LogLines];
    LinesTold => "lines_told", Number, &[SignalKind::LogLines];
    FoundGone => "found_gone", Number, &[SignalKind::Gap];
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

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Unknown => "unknown",
        Role::First => "first",
        Role::Member => "member",
        Role::Session => "session",
        Role::Sandbox => "sandbox",
        Role::Runtime => "runtime",
    }
}

impl Field {
    /// The field of this name, if signals of `kind` have it.
    pub fn of_kind(name: &str, kind: SignalKind) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|field| field.name() == name && field.kinds().iter().copied().collect::<SignalKinds>().contains(kind))
    }

    /// The names of what signals of `kind` have.
    pub fn names_of(kind: SignalKind) -> String {
        let names: Vec<_> =
            Self::ALL.iter().filter(|field| field.kinds().contains(&kind)).map(|field| field.name()).collect();
        names.join(", ")
    }

    /// Its value, if the signal has one.
    pub fn get(self, signal: &Signal) -> Option<Value<'_>> {
        let entity = &signal.entity;
        Some(match (self, &signal.detail) {
            (Self::Entity, _) => Value::Number(signal.entity.id),
            (Self::EntityKind, _) => Value::Text(entity.kind_name()),
            (Self::EntityName, _) => Value::Text(&entity.name),
            (Self::Cgroup, _) => Value::Text(&entity.cgroup),
            (Self::Pid, _) => Value::Number(u64::from(signal.pid)),
            (Self::Namespace, detail) => match (known(&entity.namespace), detail) {
                (Some(namespace), _) => namespace,
                (None, Detail::Fact(fact)) => known(fact.text("object_namespace"))?,
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
                (None, Detail::Fact(fact)) => match fact.text("container") {
                    "" => known(fact.text("field_path").split_once('{')?.1.trim_end_matches('}'))?,
                    container => known(container)?,
                },
                (None, _) => return None,
            },
            (Self::Workload, _) => known(&entity.workload)?,
            (Self::Image, detail) => match (known(&entity.image), detail) {
                (Some(image), _) => image,
                (None, Detail::Fact(fact)) => known(fact.text("image"))?,
                (None, _) => return None,
            },
            (Self::Node, _) => Value::Text(&entity.node.name),
            (field, Detail::Fact(fact)) => match fact.get(field.name())? {
                FactValue::Number(number) => Value::Number(*number),
                FactValue::Flag(flag) => Value::Flag(*flag),
                FactValue::Text(text) => Value::Text(text),
            },
            (Self::Comm, _) => Value::Text(signal.comm()?),
            (Self::Lead, _) => Value::Flag(signal.is_lead()),
            (Self::Main, Detail::Exit(exit)) => {
                Value::Flag(signal.is_lead() && (entity.kind != Some(EntityKind::Unit) || exit.parent_pid <= 1))
            }
            (Self::ExitCode, Detail::Exit(exit)) => Value::Number(exit.exit_code()?.into()),
            (Self::Signal, Detail::Exit(exit)) => Value::Number(exit.signal()?.into()),
            (Self::DiedBy, Detail::Exit(exit)) => Value::Number(exit.died_by()?.into()),
            (Self::Failed, Detail::Exit(exit)) => Value::Flag(exit.status != 0),
            (Self::Lifetime, Detail::Exit(exit)) => {
                Value::Number(signal.boottime_ns.saturating_sub(exit.start_time_ns))
            }
            (Self::LimitHit, Detail::Oom(oom)) => Value::Flag(oom.limit_hit()),
            (Self::LimitBytes, Detail::Oom(oom)) => Value::Number(oom.limit_bytes),
            (Self::UsageBytes, Detail::Oom(oom)) => Value::Number(oom.usage_bytes),
            (Self::OverBytes, Detail::Oom(oom)) => Value::Number(oom.over_bytes()?),
            (Self::RssBytes, Detail::Oom(oom)) => Value::Number(oom.rss_bytes),
            (Self::LimitCgroup, Detail::Oom(oom)) => Value::Text(&oom.limit_cgroup),
            (Self::LimitLevel, Detail::Oom(oom)) => Value::Text(oom.limit_level.name()),
            (Self::LimitHeight, Detail::Oom(oom)) => Value::Number(oom.limit_height.into()),
            (Self::OomScore, Detail::Oom(oom)) => Value::Number((i64::from(oom.oom_score_adj) + 1000) as u64),
            (Self::OomScore, Detail::Exit(exit)) => Value::Number((i64::from(exit.oom_score_adj) + 1000) as u64),
            (Self::ParentPid, Detail::Exec(exec)) => Value::Number(exec.parent_pid.into()),
            (Self::ParentPid, Detail::Exit(exit)) => Value::Number(exit.parent_pid.into()),
            (Self::OverCpuLimit, Detail::Kill(kill)) => Value::Flag(kill.over_cpu_limit),
            (Self::NamespaceInit, _) => Value::Flag(signal.is_namespace_init()),
            (Self::ProcessRole, _) => Value::Text(role_name(signal.role())),
            (Self::AllocatorComm, Detail::Oom(oom)) => Value::Text(&oom.allocator_comm),
            (Self::AllocatorPid, Detail::Oom(oom)) => Value::Number(oom.allocator_pid.into()),
            (Self::Signal, Detail::Kill(kill)) => Value::Number(kill.signal.into()),
            (Self::Sender, Detail::Kill(kill)) => Value::Text(kill.sender_class.name()),
            (Self::SenderPid, Detail::Kill(kill)) => Value::Number(kill.sender_pid.into()),
            (Self::SenderComm, Detail::Kill(kill)) => Value::Text(&kill.sender_comm),
            (Self::SentBy, Detail::Kill(kill)) => Value::Text(kill.sender_class.name()),
            (Self::SenderEntity, Detail::Kill(kill)) => Value::Number(kill.sender.id),
            (Self::SenderKind, Detail::Kill(kill)) => Value::Text(kill.sender.kind_name()),
            (Self::Ignored, Detail::Kill(kill)) => Value::Flag(kill.ignored),
            (Self::Repeats, Detail::Kill(kill)) if kill.repeats > 0 => Value::Number(kill.repeats.into()),
            (Self::Count, Detail::Burst(burst)) => Value::Number(burst.count.into()),
            (Self::Stall, Detail::Burst(burst)) => Value::Number(u64::from(burst.stall_us) * 1_000),
            (Self::Span, Detail::Burst(burst)) => Value::Number(u64::from(burst.span_ms) * 1_000_000),
            (Self::Peer, Detail::Burst(burst)) => Value::Text(burst.peer.as_deref()?),
            (Self::DropReason, Detail::Burst(burst)) => Value::Text(burst.drop_reason.as_deref()?),
            (Self::Backends, Detail::Burst(burst)) => Value::Number(burst.peer_backends?.1.into()),
            (Self::ReadyBackends, Detail::Burst(burst)) => Value::Number(burst.peer_backends?.0.into()),
            (Self::UnreadyBackends, Detail::Burst(burst)) => {
                let (ready, all) = burst.peer_backends?;
                Value::Number(u64::from(all.saturating_sub(ready)))
            }
            (field, Detail::Burst(burst)) => field.of_burst(burst.about)?,
            _ => return None,
        })
    }

    fn of_burst(self, about: About) -> Option<Value<'static>> {
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

    /// Its value for people.
    pub fn show(self, signal: &Signal) -> Option<String> {
        match (self, &signal.detail) {
            (Self::Entity, _) => return Some(signal.entity.to_string()),
            (Self::LimitOwner, Detail::Oom(oom)) => return Some(oom.limit_level.describe(&oom.limit_cgroup)),
            (Self::OomScore, Detail::Oom(oom)) => return Some(oom.oom_score_adj.to_string()),
            (Self::OomScore, Detail::Exit(exit)) => return Some(exit.oom_score_adj.to_string()),
            (Self::SenderEntity, Detail::Kill(kill)) => return Some(kill.sender.to_string()),
            (Self::SentBy, Detail::Kill(kill)) => return Some(text::sent_by(kill)),
            (Self::Value | Self::Limit, Detail::Fact(fact)) if fact.text("what") == "memory-high" => {
                return Some(human_bytes(fact.number(self.name())));
            }
            (Self::Peer, Detail::Burst(burst)) => return Some(text::peer(burst)),
            (Self::PeerAddress, Detail::Burst(burst)) => return text::peer_address(burst.about),
            (Self::Device, Detail::Burst(burst)) => return text::device(burst.about),
            _ => {}
        }
        Some(match (self.get(signal)?, self.field_type()) {
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
