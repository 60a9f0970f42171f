//! What concerns the whole cluster: all that the elected collector watches.
//!
//! What enters: a term of office. What leaves: what the followers of each resource report, until the term ends and this is
//! dropped. What must hold: a resource that this API server does not have is reported once and asked for again only now and
//! then; the others go on.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::claims::KnownClaims;
use super::client::Resource;
use super::config::{Configs, Uses};
use super::events::{Autoscalers, Claims, Events};
use super::nodes::Nodes;
use super::services::{CoreEndpointsOf, ServiceTable, Services, Slices};
use super::waiting::{self, Waiting};
use super::watch::{Context, Follower, follow};
use super::workloads::{ReplicaSets, WorkloadKind, Workloads};
use crate::intake::identity::directory::Directory;
use crate::settings::config::K8sSection;

/// How long until a resource is asked for again that was not there.
pub const ABSENT_PAUSE: Duration = Duration::from_secs(600);

/// Watches everything. `since_ns`: what is a moment and not a state, and was before, was reported by the leader before. `nodes` is
/// kept at the number of nodes; `directory` knows the pods of this node.
pub async fn watch(
    context: &Context,
    since_ns: u64,
    section: &K8sSection,
    nodes: &Arc<AtomicU64>,
    directory: &Arc<Directory>,
) {
    let excludes_system = section.exclude_system_namespaces;
    let uses = Arc::new(Mutex::new(Uses::default()));
    let services = Arc::new(Mutex::new(ServiceTable::default()));
    let (replica_sets, claims) = (ReplicaSets::default(), KnownClaims::default());
    let workloads = |kind: WorkloadKind| {
        let (uses, replica_sets) = (Arc::clone(&uses), replica_sets.clone());
        always(context, Resource::new(kind.what(), kind.path()), move || {
            Workloads::new(kind, Arc::clone(&uses), replica_sets.clone(), excludes_system)
        })
    };
    let configs = |what, kind, path| {
        let uses = Arc::clone(&uses);
        let node = Arc::clone(&context.node);
        let resource = Resource { metadata_only: true, ..Resource::new(what, path) };
        always(context, resource, move || {
            Configs::new(kind, Arc::clone(&node), Arc::clone(&uses), since_ns, excludes_system)
        })
    };
    let node = || Arc::clone(&context.node);
    futures::join!(
        always(context, Resource::new("events", "/api/v1/events"), || {
            let known = (Arc::clone(directory), replica_sets.clone(), claims.clone());
            Events::new(node(), known, since_ns, excludes_system)
        }),
        always(context, waiting::without_node(), || {
            Waiting::new(excludes_system, section.stuck_after, claims.clone())
        }),
        always(context, Resource::new("nodes", "/api/v1/nodes"), || Nodes::new(Arc::clone(nodes), section.stuck_after)),
        workloads(WorkloadKind::Deployment),
        workloads(WorkloadKind::ReplicaSet),
        workloads(WorkloadKind::StatefulSet),
        workloads(WorkloadKind::DaemonSet),
        workloads(WorkloadKind::Job),
        configs("configmaps", "ConfigMap", "/api/v1/configmaps"),
        configs("secrets", "Secret", "/api/v1/secrets"),
        always(context, Resource::new("services", "/api/v1/services"), || {
            Services::new(node(), Arc::clone(&services), excludes_system)
        }),
        endpoints(context, &services, excludes_system),
        always(
            context,
            Resource::new("horizontalpodautoscalers", "/apis/autoscaling/v2/horizontalpodautoscalers"),
            || Autoscalers::new(node(), excludes_system)
        ),
        always(context, Resource::new("persistentvolumeclaims", "/api/v1/persistentvolumeclaims"), || {
            Claims::new(node(), claims.clone(), excludes_system)
        }),
    );
}

/// Follows a resource for ever, with a new follower whenever the API server turned out not to have it.
async fn always<F: Follower>(context: &Context, resource: Resource, mut follower: impl FnMut() -> F) {
    let mut is_reported = false;
    loop {
        follow(context, &resource, &mut follower()).await;
        if !std::mem::replace(&mut is_reported, true) {
            tracing::warn!(
                what = resource.what,
                path = resource.path,
                "resource not served by this API server; the other watches continue"
            );
        }
        tokio::time::sleep(ABSENT_PAUSE).await;
    }
}

/// EndpointSlices where there are any (1.21 and later), otherwise the older Endpoints.
async fn endpoints(context: &Context, services: &Arc<Mutex<ServiceTable>>, excludes_system: bool) {
    let slices = Resource::new("endpointslices", "/apis/discovery.k8s.io/v1/endpointslices");
    let node = &context.node;
    follow(context, &slices, &mut Slices::new(Arc::clone(node), Arc::clone(services), excludes_system)).await;
    tracing::info!("this API server has no EndpointSlices of version 1: watching Endpoints instead");
    always(context, Resource::new("endpoints", "/api/v1/endpoints"), || {
        CoreEndpointsOf::new(Arc::clone(node), Arc::clone(services), excludes_system)
    })
    .await;
}
