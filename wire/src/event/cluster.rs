//! What Kubernetes says: events of [`super::Source::Kube`].
//!
//! The subject is [`super::Event::entity`]: a container, a pod, a workload or the node. What an object is called is in the
//! description of its entity, or here where it is no entity. Moments are nanoseconds since 1970 by the clock of whoever wrote
//! the object, 0 where it says none.

use rkyv::{Archive, Deserialize, Serialize};

use super::{EntityId, Name};

/// A pod's phase or conditions changed, or it is being deleted.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct PodState {
    /// `Pending`, `Running`, `Succeeded`, `Failed`, `Unknown`.
    pub phase: Name,
    /// `Evicted`, `NodeLost`, `DeadlineExceeded`, …
    pub reason: Name,
    pub message: Name,
    /// When it was asked to go.
    pub deletion_ns: u64,
    /// How long it may take, seconds.
    pub deletion_grace_s: u32,
    pub is_ready: bool,
    pub is_scheduled: bool,
    /// The object is gone. True as well where a relist found it missing.
    pub is_gone: bool,
    /// 0 unknown, 1 guaranteed, 2 burstable, 3 best effort.
    pub qos: u8,
}

/// A container's state as kubelet reports it.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ContainerState {
    /// The name in the pod's specification.
    pub container: Name,
    pub image: Name,
    /// Why it waits or ended: `CrashLoopBackOff`, `OOMKilled`, `Error`, `Completed`, …
    pub reason: Name,
    pub message: Name,
    /// Of a run that ended.
    pub exit_code: i32,
    /// Of a run that ended, 0 when kubelet names none.
    pub signal: i32,
    pub restart_count: u32,
    pub started_ns: u64,
    pub finished_ns: u64,
    /// 1 waiting, 2 running, 3 terminated.
    pub state: u8,
    /// This is the run before the present one (`lastState`).
    pub is_last: bool,
    pub is_ready: bool,
    /// 0 an ordinary container, 1 an init container, 2 an ephemeral one.
    pub role: u8,
    /// Memory and CPU limits of the specification, bytes and thousandths of a core; 0 for none.
    pub memory_limit_bytes: u64,
    pub cpu_limit_milli: u64,
}

/// A Kubernetes Event, new or repeated.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct KubeEvent {
    /// `BackOff`, `Unhealthy`, `Evicted`, `FailedScheduling`, …
    pub reason: Name,
    pub message: Name,
    /// What it is about: the object's kind, namespace and name.
    pub kind: Name,
    pub namespace: Name,
    pub name: Name,
    /// `spec.containers{web}` where it is about one.
    pub field_path: Name,
    /// Who said it: `kubelet`, `default-scheduler`, …
    pub component: Name,
    /// How often it was said so far.
    pub count: u32,
    pub first_ns: u64,
    pub last_ns: u64,
    /// `Warning`, otherwise `Normal`.
    pub is_warning: bool,
}

/// A condition of a node changed.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct NodeCondition {
    /// `Ready`, `MemoryPressure`, `DiskPressure`, `PIDPressure`, `NetworkUnavailable`; `Schedulable` for cordons.
    pub condition: Name,
    pub reason: Name,
    pub message: Name,
    pub since_ns: u64,
    /// 0 false, 1 true, 2 unknown.
    pub status: u8,
}

/// A Deployment, ReplicaSet, StatefulSet, DaemonSet or Job rolls out, or fails to.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Rollout {
    pub kind: Name,
    pub namespace: Name,
    pub name: Name,
    /// All images of the pod template, comma separated, and those before this change; unset where nothing changed.
    pub images: Name,
    pub images_before: Name,
    /// Of the condition that is worst: `ProgressDeadlineExceeded`, `BackoffLimitExceeded`, …
    pub reason: Name,
    pub message: Name,
    pub generation: u64,
    pub observed_generation: u64,
    pub desired: u32,
    pub updated: u32,
    pub ready: u32,
    pub unavailable: u32,
    pub is_gone: bool,
}

/// A ConfigMap's or Secret's data changed. Contents are never read.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ConfigChange {
    /// `ConfigMap` or `Secret`.
    pub kind: Name,
    pub namespace: Name,
    pub name: Name,
    pub resource_version: Name,
    /// Workloads that mount it or take their environment from it.
    pub used_by: Vec<EntityId>,
    /// 1 made, 2 changed, 3 gone.
    pub change: u8,
}

/// The endpoints of a Service changed.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Endpoints {
    pub namespace: Name,
    pub service: Name,
    /// IPv6, or IPv4 mapped into it; empty while unknown or headless.
    pub cluster_addresses: Vec<[u8; 16]>,
    pub ports: Vec<u16>,
    pub backends: Vec<Backend>,
}

/// One backend of a Service.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct Backend {
    pub address: [u8; 16],
    /// The pod behind it, 0 when there is none.
    pub pod: EntityId,
    pub port: u16,
    pub is_ready: bool,
}

/// Another object changed its state: a HorizontalPodAutoscaler, a PersistentVolumeClaim.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ObjectState {
    pub kind: Name,
    pub namespace: Name,
    pub name: Name,
    /// A claim's phase, an autoscaler's worst condition.
    pub state: Name,
    pub reason: Name,
    pub message: Name,
    pub current: u64,
    pub desired: u64,
    pub is_gone: bool,
}
