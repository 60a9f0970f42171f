//! The kinds of event: what each is, its lane, its name, and its fields or the type that has them.
//!
//! In: the one declaration below. Out: [`Detail`], which travels, and [`Kind`], which metrics, filters and indices go by. What must
//! hold: a new kind comes last and is a new version of the frame, since archives keep kinds by number.

use std::ops::{Deref, DerefMut};

use super::{
    ArchivedEvent, ArchivedFields, CgroupUse, ConfigChange, Conntrack, ContainerState, Curve, Endpoints, Event, Exec,
    Exit, FieldValue, Gap, Histogram, KubeEvent, Lane, LogLines, Name, NodeCondition, ObjectState, Observation, Oom,
    PodState, Rollout, Signal, Tcp, Trouble, UnitJob, UnitState,
};

kinds! {
    /// A process image was replaced.
    Exec(Exec) => Lethal, "exec";
    /// The last thread of a process died.
    Exit(Exit) => Lethal, "exit";
    /// The OOM killer chose this process.
    Oom(Box<Oom>) => Lethal, "oom";
    /// A signal that can end a process was sent to this one.
    Signal(Box<Signal>) => Lethal, "signal";
    /// A cgroup appeared.
    CgroupMade { path: Name } => Lethal, "cgroup_made";
    /// A cgroup went away.
    CgroupRemoved { path: Name } => Lethal, "cgroup_removed";
    /// A TCP connection changed.
    Tcp(Tcp) => Bulk, "tcp";
    /// A burst of memory reclaim ended.
    Reclaim { stall_ns: u64, pages: u64, memcg: bool } => Bulk, "reclaim";
    /// A block I/O was slow or failed.
    BlockIo { latency_ns: u64, bytes: u64, device: u32, error: i32, operation: u8 } => Bulk, "block_io";
    /// System calls failed alike.
    SyscallError { count: u64, syscall: u32, errno: u32 } => Bulk, "syscall_error";
    /// A DNS lookup failed or was slow.
    Dns { latency_ns: u64, name: Name, query_type: u16, rcode: u8 } => Bulk, "dns";
    /// A task waited long for a CPU.
    RunQueue { wait_ns: u64 } => Bulk, "run_queue";
    /// Packets were dropped for one reason, named as the kernel names it; unset where it gives none. The interface's number is
    /// that of its own network namespace, 0 where it is not known.
    PacketDrop { count: u64, reason: Name, interface: u32 } => Bulk, "packet_drop";
    /// A process was made.
    Fork { parent_pid: u32, ns_pid: u32, ns_level: u32, comm: Name } => Bulk, "fork";
    /// A signal that ends the process reached it.
    SignalDelivered { signal: u32, code: i32, ns_pid: u32, ns_level: u32, comm: Name } => Lethal, "signal_delivered";
    /// A file that is audited was opened.
    FileOpen { path: Name, comm: Name, flags: u32 } => Bulk, "file_open";
    /// Durations of many operations.
    Histogram(Box<Histogram>) => Bulk, "histogram";
    /// A pod changed.
    PodState(Box<PodState>) => Lethal, "pod_state";
    /// A container changed, as kubelet says.
    ContainerState(Box<ContainerState>) => Lethal, "container_state";
    /// A Kubernetes Event.
    KubeEvent(Box<KubeEvent>) => Lethal, "kube_event";
    /// A node's condition changed.
    NodeCondition(Box<NodeCondition>) => Lethal, "node_condition";
    /// A workload rolls out.
    Rollout(Box<Rollout>) => Lethal, "rollout";
    /// A ConfigMap or Secret changed.
    ConfigChange(Box<ConfigChange>) => Lethal, "config_change";
    /// A Service's endpoints changed.
    Endpoints(Box<Endpoints>) => Lethal, "endpoints";
    /// Another Kubernetes object changed.
    ObjectState(Box<ObjectState>) => Lethal, "object_state";
    /// A systemd unit changed.
    UnitState(Box<UnitState>) => Lethal, "unit_state";
    /// A job of systemd ended.
    UnitJob(Box<UnitJob>) => Lethal, "unit_job";
    /// Evidence that fades, read in time.
    Observation(Box<Observation>) => Lethal, "observation";
    /// Something was missed.
    Gap(Box<Gap>) => Lethal, "gap";
    /// The table of connections is full, or has room again.
    Conntrack(Box<Conntrack>) => Lethal, "conntrack";
    /// What fills a cgroup, and how its counters moved. Since version 2 of the frame.
    CgroupUse(Box<CgroupUse>) => Lethal, "cgroup_use";
    /// Something is wrong with what lives. Since version 3 of the frame.
    Trouble(Box<Trouble>) => Lethal, "trouble";
    /// How a container's use went. Since version 3 of the frame.
    Curve(Box<Curve>) => Lethal, "curve";
    /// The last lines that a dead container wrote. Since version 3 of the frame.
    LogLines(Box<LogLines>) => Lethal, "log_lines";
}

/// How many kinds there are.
pub const KINDS: usize = Kind::ALL.len();

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
