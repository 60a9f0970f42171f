//! Kubernetes objects, cut down to what is reported of them.
//!
//! What enters: JSON of the API server. What leaves: the few fields that become events or names; all else is skipped while
//! parsing and never held. What must hold: an absent field, a null or an unknown one is no error, so that one old or new
//! object does not end a watch.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer};

/// Takes null for the default: an empty list of Go is written so.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Nanoseconds since 1970, 0 for none.
pub fn unix_ns(time: Option<&Time>) -> u64 {
    time.map_or(0, |time| u64::try_from(time.0.as_nanosecond()).unwrap_or(0))
}

/// What every watched object is.
pub trait Object: DeserializeOwned + Clone + Send + 'static {
    fn meta(&self) -> &Meta;
}

macro_rules! object {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(default, rename_all = "camelCase")]
        pub struct $name { $($(#[$field_doc])* #[serde(deserialize_with = "or_default")] pub $field: $type,)* }
    )*};
}

object! {
    Meta {
        name: String,
        namespace: String,
        uid: String,
        resource_version: String,
        generation: u64,
        creation_timestamp: Option<Time>,
        deletion_timestamp: Option<Time>,
        deletion_grace_period_seconds: u32,
        labels: Labels,
        annotations: Annotations,
        owner_references: Vec<OwnerReference>,
        finalizers: Vec<String>,
        managed_fields: Vec<ManagedFields>,
    }
    /// Who wrote a part of the object last; which part is not read.
    ManagedFields { manager: String, operation: String, time: Option<Time>, subresource: String, }
    OwnerReference { kind: String, name: String, controller: bool, }

    Pod { metadata: Meta, spec: PodSpec, status: PodStatus, }
    PodSpec {
        containers: Vec<Container>,
        init_containers: Vec<Container>,
        ephemeral_containers: Vec<Container>,
        volumes: Vec<Volume>,
        /// Since Kubernetes 1.26: what must be taken away before it is scheduled.
        scheduling_gates: Vec<Named>,
        node_name: String,
        scheduler_name: String,
        host_network: bool,
    }
    Container {
        name: String,
        image: String,
        resources: Resources,
        env: Vec<Variable>,
        env_from: Vec<EnvFrom>,
        restart_policy: String,
    }
    Resources { limits: Limits, }
    Limits { memory: String, cpu: String, }
    Variable { value_from: ValueFrom, }
    ValueFrom { config_map_key_ref: Named, secret_key_ref: Named, }
    EnvFrom { config_map_ref: Named, secret_ref: Named, }
    Named { name: String, }
    Volume {
        name: String,
        config_map: Named,
        secret: SecretVolume,
        projected: Projected,
        image: ImageVolume,
        persistent_volume_claim: ClaimVolume,
        /// A claim that is made for the pod.
        ephemeral: Option<IgnoredAny>,
    }
    ClaimVolume { claim_name: String, }
    /// Since Kubernetes 1.31: an image as a volume.
    ImageVolume { reference: String, }
    SecretVolume { secret_name: String, }
    Projected { sources: Vec<ProjectedSource>, }
    ProjectedSource { config_map: Named, secret: Named, }
    PodStatus {
        phase: String,
        reason: String,
        message: String,
        qos_class: String,
        conditions: Vec<Condition>,
        #[serde(rename = "podIPs")]
        pod_ips: Vec<PodIp>,
        #[serde(rename = "podIP")]
        pod_ip: String,
        container_statuses: Vec<ContainerStatus>,
        init_container_statuses: Vec<ContainerStatus>,
        ephemeral_container_statuses: Vec<ContainerStatus>,
    }
    PodIp { ip: String, }
    Condition { r#type: String, status: String, reason: String, message: String, last_transition_time: Option<Time>, }
    ContainerStatus {
        name: String,
        image: String,
        #[serde(rename = "containerID")]
        container_id: String,
        ready: bool,
        /// True if its startup probe has passed; absent where it has none, or is not known.
        started: Option<bool>,
        restart_count: u32,
        state: ContainerStates,
        last_state: ContainerStates,
    }
    ContainerStates { waiting: Option<Waiting>, running: Option<Running>, terminated: Option<Terminated>, }
    Waiting { reason: String, message: String, }
    Running { started_at: Option<Time>, }
    Terminated {
        exit_code: i32,
        signal: i32,
        reason: String,
        message: String,
        started_at: Option<Time>,
        finished_at: Option<Time>,
        #[serde(rename = "containerID")]
        container_id: String,
    }

    Event {
        metadata: Meta,
        involved_object: Reference,
        /// Another object that it is about.
        related: Reference,
        reason: String,
        message: String,
        source: EventSource,
        reporting_component: String,
        first_timestamp: Option<Time>,
        last_timestamp: Option<Time>,
        event_time: Option<MicroTime>,
        count: u32,
        series: Option<Series>,
        r#type: String,
    }
    Reference { kind: String, namespace: String, name: String, uid: String, field_path: String, }
    EventSource { component: String, }
    Series { count: u32, last_observed_time: Option<MicroTime>, }

    Node { metadata: Meta, spec: NodeSpec, status: NodeStatus, }
    NodeSpec { unschedulable: bool, }
    NodeStatus { conditions: Vec<Condition>, }

    /// A Deployment, ReplicaSet, StatefulSet, DaemonSet or Job.
    Workload { metadata: Meta, spec: WorkloadSpec, status: WorkloadStatus, }
    WorkloadSpec { replicas: Option<u32>, completions: Option<u32>, template: Template, }
    Template { spec: PodSpec, }
    WorkloadStatus {
        observed_generation: u64,
        replicas: u32,
        updated_replicas: u32,
        ready_replicas: u32,
        available_replicas: u32,
        unavailable_replicas: u32,
        desired_number_scheduled: u32,
        updated_number_scheduled: u32,
        number_ready: u32,
        number_unavailable: u32,
        active: u32,
        succeeded: u32,
        failed: u32,
        conditions: Vec<Condition>,
    }

    /// Metadata of an object whose contents are not read: a ConfigMap, a Secret.
    Metadata { metadata: Meta, }

    Service { metadata: Meta, spec: ServiceSpec, }
    ServiceSpec {
        #[serde(rename = "clusterIP")]
        cluster_ip: String,
        #[serde(rename = "clusterIPs")]
        cluster_ips: Vec<String>,
        ports: Vec<Port>,
    }
    Port { port: u16, }

    EndpointSlice { metadata: Meta, endpoints: Vec<SliceEndpoint>, ports: Vec<Port>, }
    SliceEndpoint { addresses: Vec<String>, conditions: EndpointConditions, target_ref: Reference, }
    EndpointConditions { ready: Option<bool>, }
    /// The older form: one object a Service.
    CoreEndpoints { metadata: Meta, subsets: Vec<Subset>, }
    Subset { addresses: Vec<SubsetAddress>, not_ready_addresses: Vec<SubsetAddress>, ports: Vec<Port>, }
    SubsetAddress { ip: String, target_ref: Reference, }

    Autoscaler { metadata: Meta, spec: AutoscalerSpec, status: AutoscalerStatus, }
    AutoscalerSpec { scale_target_ref: Reference, }
    AutoscalerStatus { current_replicas: u64, desired_replicas: u64, conditions: Vec<Condition>, }

    Claim { metadata: Meta, status: ClaimStatus, }
    ClaimStatus { phase: String, conditions: Vec<Condition>, }

    /// A page of a list.
    ListMeta { resource_version: String, r#continue: String, }
}

/// The labels that are read.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Labels {
    #[serde(rename = "pod-template-hash")]
    pub pod_template_hash: String,
    #[serde(rename = "kubernetes.io/service-name")]
    pub service_name: String,
}

/// The annotations that are read.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Annotations {
    /// Uid by which kubelet names a static pod's cgroup.
    #[serde(rename = "kubernetes.io/config.hash")]
    pub config_hash: String,
    /// Holder in an object that candidates of an election write every few seconds.
    #[serde(rename = "control-plane.alpha.kubernetes.io/leader")]
    pub leader: String,
}

/// A page of a list.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound = "T: Deserialize<'de>")]
pub struct Page<T> {
    #[serde(default)]
    pub metadata: ListMeta,
    #[serde(default = "Vec::new", deserialize_with = "or_default")]
    pub items: Vec<T>,
}

macro_rules! with_meta {
    ($($name:ident)*) => {$(
        impl Object for $name {
            fn meta(&self) -> &Meta {
                &self.metadata
            }
        }
    )*};
}

with_meta!(Pod Event Node Workload Metadata Service EndpointSlice CoreEndpoints Autoscaler Claim);

/// A quantity of Kubernetes in thousandths: `500m`, `2`, `128Mi`, `1.5G`, `1e3`. 0 for what is none.
pub fn quantity_milli(text: &str) -> u64 {
    const SUFFIXES: [(&str, f64); 13] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
    ];
    let (number, factor) = SUFFIXES
        .iter()
        .find_map(|(suffix, factor)| text.strip_suffix(suffix).map(|number| (number, *factor)))
        .unwrap_or((text, 1.0));
    let milli = number.parse::<f64>().unwrap_or(0.0) * factor * 1000.0;
    // A float beyond the range saturates, a negative one and what is no number become 0.
    milli.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_in_every_notation() {
        for (text, milli) in
            [("500m", 500), ("2", 2000), ("128Mi", 134_217_728_000), ("1.5G", 1_500_000_000_000), ("1e3", 1_000_000)]
        {
            assert_eq!(quantity_milli(text), milli, "{text}");
        }
        assert_eq!((quantity_milli(""), quantity_milli("-1"), quantity_milli("many")), (0, 0, 0));
    }

    #[test]
    fn nulls_and_unknown_fields_are_no_errors() {
        let pod: Pod = serde_json::from_str(
            r#"{"metadata":{"name":"a","creationTimestamp":null,"labels":null,"managedFields":[{}]},
                "spec":{"containers":null,"tolerations":[1]},"status":{"conditions":null}}"#,
        )
        .expect("parsed");
        assert_eq!(pod.metadata.name, "a");
        assert!(pod.spec.containers.is_empty());
    }
}
