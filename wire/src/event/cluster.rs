//! What Kubernetes says: events of [`super::Source::Kube`].
//!
//! The subject is [`super::Event::entity`]: a container, a pod, a workload or the node. What an object is called is in the
//! description of its entity, or here where it is no entity. Moments are nanoseconds since 1970 by the clock of whoever wrote
//! the object, 0 where it says none.

use rkyv::{Archive, Deserialize, Serialize};

use super::{ArchivedFields, EntityId, FieldValue, Name};

fields! {
    /// A pod's phase or conditions changed, or it is being deleted.
    PodState {
        /// `Pending`, `Running`, `Succeeded`, `Failed`, `Unknown`.
        phase: Name,
        /// `Evicted`, `NodeLost`, `DeadlineExceeded`, …
        reason: Name,
        message: Name,
        /// When it was asked to go.
        deletion_ns: u64,
        /// How long it may take, seconds.
        deletion_grace_s: u32,
        is_ready: bool,
        is_scheduled: bool,
        /// The object is gone. True as well where a relist found it missing.
        is_gone: bool,
        /// 0 unknown, 1 guaranteed, 2 burstable, 3 best effort.
        qos: u8,
    }
}

fields! {
    /// A container's state as kubelet reports it.
    ContainerState {
        /// The name in the pod's specification.
        container: Name,
        image: Name,
        /// Why it waits or ended: `CrashLoopBackOff`, `OOMKilled`, `Error`, `Completed`, …
        reason: Name,
        message: Name,
        /// Exit code of a run that ended.
        exit_code: i32,
        /// Signal of a run that ended, 0 when kubelet names none.
        signal: i32,
        restart_count: u32,
        started_ns: u64,
        finished_ns: u64,
        /// 1 waiting, 2 running, 3 terminated.
        state: u8,
        /// True for the run before the present one (`lastState`).
        is_last: bool,
        is_ready: bool,
        /// 0 an ordinary container, 1 an init container, 2 an ephemeral one.
        role: u8,
        /// Memory and CPU limits of the specification, bytes and thousandths of a core; 0 for none.
        memory_limit_bytes: u64,
        cpu_limit_milli: u64,
    }
}

fields! {
    /// A Kubernetes Event, new or repeated.
    KubeEvent {
        /// `BackOff`, `Unhealthy`, `Evicted`, `FailedScheduling`, …
        reason: Name,
        message: Name,
        /// What it is about: the object's kind, namespace and name.
        kind: Name,
        namespace: Name,
        name: Name,
        /// `spec.containers{web}` where it is about one.
        field_path: Name,
        /// Who said it: `kubelet`, `default-scheduler`, …
        component: Name,
        /// How often it was said so far.
        count: u32,
        first_ns: u64,
        last_ns: u64,
        /// `Warning`, otherwise `Normal`.
        is_warning: bool,
    }
}

fields! {
    /// A condition of a node changed.
    NodeCondition {
        /// `Ready`, `MemoryPressure`, `DiskPressure`, `PIDPressure`, `NetworkUnavailable`; `Schedulable` for cordons.
        condition: Name,
        reason: Name,
        message: Name,
        since_ns: u64,
        /// 0 false, 1 true, 2 unknown.
        status: u8,
    }
}

fields! {
    /// A Deployment, ReplicaSet, StatefulSet, DaemonSet or Job rolls out, or fails to.
    Rollout {
        kind: Name,
        namespace: Name,
        name: Name,
        /// All images of the pod template, comma separated, and those before this change; unset where nothing changed.
        images: Name,
        images_before: Name,
        /// Reason of the worst condition: `ProgressDeadlineExceeded`, `BackoffLimitExceeded`, …
        reason: Name,
        message: Name,
        generation: u64,
        observed_generation: u64,
        desired: u32,
        updated: u32,
        ready: u32,
        unavailable: u32,
        is_gone: bool,
    }
}

fields! {
    /// A ConfigMap's or Secret's data changed. Contents are never read.
    ConfigChange {
        /// `ConfigMap` or `Secret`.
        kind: Name,
        namespace: Name,
        name: Name,
        resource_version: Name,
        /// Workloads that mount it or take their environment from it.
        used_by: Vec<EntityId>,
        /// 1 made, 2 changed, 3 gone.
        change: u8,
    }
}

fields! {
    /// The endpoints of a Service changed.
    Endpoints {
        namespace: Name,
        service: Name,
        /// IPv6, or IPv4 mapped into it; empty while unknown or headless.
        cluster_addresses: Vec<[u8; 16]>,
        ports: Vec<u16>,
        backends: Vec<Backend>,
    }
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

fields! {
    /// Another object changed its state: a HorizontalPodAutoscaler, a PersistentVolumeClaim.
    ObjectState {
        kind: Name,
        namespace: Name,
        name: Name,
        /// A claim's phase, an autoscaler's worst condition.
        state: Name,
        reason: Name,
        message: Name,
        current: u64,
        desired: u64,
        is_gone: bool,
    }
}
