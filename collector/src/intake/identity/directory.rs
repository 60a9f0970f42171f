//! The directory: what Kubernetes calls containers and pods, shared by everything that describes entities.
//!
//! What enters: pods of this node as the Kubernetes source hears of them, and the cgroup paths that identity learns.
//! What leaves: names by entity, each with the version that says whether a description is out of date. What must hold:
//! it is bounded. Names outlive their objects for [`REMEMBERED`], because a container's last events come late. It is
//! read only when an entity is described, never for each event, so a lock is cheap enough.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tapio_wire::entity_id;
use tapio_wire::event::{Entity, EntityId, EntityKind};

/// How long names are remembered after their object is gone.
const REMEMBERED: Duration = Duration::from_secs(600);
/// Containers and pods at the same time, gone ones included; some 200 bytes each.
pub const CONTAINERS_MAX: usize = 32_768;
pub const PODS_MAX: usize = 16_384;
/// Cgroup paths of containers and pods.
const CGROUPS_MAX: usize = 32_768;
/// Addresses kept of one pod: one of each family, and room for more networks.
const ADDRESSES_MAX: usize = 8;

/// What owns a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub kind: Arc<str>,
    pub name: Arc<str>,
}

/// What Kubernetes calls a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodNames {
    /// Uid as in the pod's cgroup; for a static pod, the hash of its file.
    pub uid: Arc<str>,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub owner: Option<Owner>,
    pub addresses: Vec<[u8; 16]>,
}

/// What Kubernetes calls a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerNames {
    /// 64 hexadecimal digits.
    pub id: Arc<str>,
    pub name: Arc<str>,
    pub image: Arc<str>,
}

/// An address as events carry it.
pub fn address_bytes(address: &str) -> Option<[u8; 16]> {
    match address.parse().ok()? {
        IpAddr::V4(address) => Some(address.to_ipv6_mapped().octets()),
        IpAddr::V6(address) => Some(address.octets()),
    }
}

/// The key of a workload's entity.
pub fn workload_key(kind: &str, namespace: &str, name: &str) -> String {
    format!("{kind}/{namespace}/{name}")
}

/// A workload's entity.
pub fn workload_entity(kind: &str, namespace: &str, name: &str) -> Entity {
    let id = entity_id(EntityKind::Workload, &workload_key(kind, namespace, name));
    Entity {
        namespace: namespace.into(),
        workload: format!("{kind}/{name}"),
        ..Entity::named(EntityKind::Workload, id, format!("{kind} {namespace}/{name}"))
    }
}

struct Pod {
    names: PodNames,
    containers: Vec<EntityId>,
    version: u64,
    is_gone: bool,
}

struct Container {
    names: ContainerNames,
    pod: EntityId,
    version: u64,
    is_gone: bool,
}

#[derive(Default)]
struct Tables {
    pods: HashMap<EntityId, Pod, foldhash::fast::RandomState>,
    containers: HashMap<EntityId, Container, foldhash::fast::RandomState>,
    cgroups: HashMap<EntityId, Arc<str>, foldhash::fast::RandomState>,
    /// Pods and containers that have gone, in the order in which they went.
    gone: VecDeque<(Instant, EntityId)>,
}

/// Maps container and pod ids to their Kubernetes names.
#[derive(Default)]
pub struct Directory {
    /// Counts changes. Release: pairs with the Acquire in [`Directory::version`]; the lock orders the tables themselves.
    version: AtomicU64,
    tables: RwLock<Tables>,
    /// Namespaces that are left out of the bulk lane.
    excluded: OnceLock<Vec<String>>,
}

impl Directory {
    /// Changes whenever any name does.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Names the namespaces that are left out of the bulk lane; once, before anything is learned.
    pub fn exclude_namespaces(&self, namespaces: Vec<String>) {
        let _ = self.excluded.set(namespaces);
    }

    /// Whether any namespace is left out.
    pub fn excludes(&self) -> bool {
        self.excluded.get().is_some_and(|namespaces| !namespaces.is_empty())
    }

    /// Whether a container or a pod belongs to a namespace that is left out. Of a container that Kubernetes does not list,
    /// `pod` decides.
    pub fn is_excluded(&self, entity: EntityId, pod: EntityId) -> bool {
        let Some(excluded) = self.excluded.get().filter(|namespaces| !namespaces.is_empty()) else { return false };
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let pod = tables.containers.get(&entity).map_or(pod, |container| container.pod);
        let Some(pod) = tables.pods.get(&pod).or_else(|| tables.pods.get(&entity)) else { return false };
        excluded.iter().any(|namespace| **namespace == *pod.names.namespace)
    }

    /// Pods and containers known, gone ones included.
    pub fn len(&self) -> (usize, usize) {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        (tables.pods.len(), tables.containers.len())
    }

    /// Whether it knows nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == (0, 0)
    }

    /// Learns a pod and its containers, present and last ones. Containers that it had and that are not named are taken for
    /// gone. Returns whether anything changed.
    pub fn update(&self, names: PodNames, containers: Vec<ContainerNames>, now: Instant) -> bool {
        let pod = entity_id(EntityKind::Pod, &names.uid);
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let tables = &mut *tables;
        let version = self.version.load(Ordering::Relaxed) + 1;
        let mut changed = false;
        let mut ids: Vec<EntityId> = Vec::with_capacity(containers.len());
        for names in containers {
            let id = entity_id(EntityKind::Container, &names.id);
            ids.push(id);
            let same = tables.containers.get_mut(&id).is_some_and(|known| {
                known.is_gone = false;
                known.names == names && known.pod == pod
            });
            if !same {
                tables.containers.insert(id, Container { names, pod, version, is_gone: false });
                changed = true;
            }
        }
        let mut names = names;
        names.addresses.truncate(ADDRESSES_MAX);
        match tables.pods.get_mut(&pod) {
            Some(known) => {
                for id in known.containers.iter().filter(|id| !ids.contains(id)) {
                    mark_gone(&mut tables.containers, &mut tables.gone, *id, now);
                }
                known.containers = ids;
                known.is_gone = false;
                if known.names != names {
                    (known.names, known.version) = (names, version);
                    changed = true;
                }
            }
            None => {
                tables.pods.insert(pod, Pod { names, containers: ids, version, is_gone: false });
                changed = true;
            }
        }
        tables.forget(now);
        if changed {
            self.version.store(version, Ordering::Release);
        }
        changed
    }

    /// The uid of a pod by its name: of the present one where others had the name before.
    pub fn uid_of(&self, namespace: &str, name: &str) -> Option<Arc<str>> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let named = tables.pods.values().filter(|pod| (&*pod.names.namespace, &*pod.names.name) == (namespace, name));
        named.min_by_key(|pod| (pod.is_gone, std::cmp::Reverse(pod.version))).map(|pod| Arc::clone(&pod.names.uid))
    }

    /// Notes that a pod's object is gone; its names are remembered for a while.
    pub fn pod_gone(&self, pod: EntityId, now: Instant) {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let tables = &mut *tables;
        let Some(known) = tables.pods.get_mut(&pod) else { return };
        if std::mem::replace(&mut known.is_gone, true) {
            return;
        }
        for id in &known.containers {
            mark_gone(&mut tables.containers, &mut tables.gone, *id, now);
        }
        tables.gone.push_back((now, pod));
        tables.forget(now);
    }

    /// Notes the cgroup of a container or a pod, so that a description that the kernel's events did not cause has it too.
    pub fn note_cgroup(&self, entity: EntityId, path: &str) {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        if tables.cgroups.len() >= CGROUPS_MAX {
            let Tables { cgroups, pods, containers, .. } = &mut *tables;
            cgroups.retain(|entity, _| pods.contains_key(entity) || containers.contains_key(entity));
            if cgroups.len() >= CGROUPS_MAX {
                // They are learned again with the next event of their entity.
                cgroups.clear();
            }
        }
        tables.cgroups.insert(entity, path.into());
    }

    /// The version of the names of a container, 0 while Kubernetes gave none. A container that Kubernetes does not list, like a
    /// pod's sandbox, has its pod's.
    pub fn container_version(&self, container: EntityId, pod: EntityId) -> (u64, bool) {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let own = tables.containers.get(&container);
        let of_pod = tables.pods.get(&own.map_or(pod, |own| own.pod)).map_or(0, |pod| pod.version);
        (own.map_or(0, |own| own.version).max(of_pod), own.is_some() && of_pod > 0)
    }

    /// The version of a pod's names, 0 while Kubernetes gave none.
    pub fn pod_version(&self, pod: EntityId) -> u64 {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        tables.pods.get(&pod).map_or(0, |pod| pod.version)
    }

    /// Adds what Kubernetes reported to a description of a container or a pod, and describes what it belongs to. False when
    /// nothing is known.
    pub fn complete(&self, entity: &mut Entity, described: &mut Vec<Entity>) -> bool {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        if entity.cgroup.is_empty()
            && let Some(path) = tables.cgroups.get(&entity.id)
        {
            entity.cgroup = path.to_string();
        }
        let container = tables.containers.get(&entity.id);
        let pod = match entity.kind {
            EntityKind::Pod => entity.id,
            _ => container.map_or(entity.parent, |container| container.pod),
        };
        let Some(Pod { names, .. }) = tables.pods.get(&pod) else { return false };
        entity.namespace = names.namespace.to_string();
        entity.pod = names.name.to_string();
        entity.pod_uid = names.uid.to_string();
        let owner = names.owner.as_ref();
        entity.workload = owner.map(|owner| format!("{}/{}", owner.kind, owner.name)).unwrap_or_default();
        if entity.kind == EntityKind::Pod {
            entity.name = format!("{}/{}", names.namespace, names.name);
            entity.addresses.clone_from(&names.addresses);
            if let Some(owner) = owner {
                let workload = workload_entity(&owner.kind, &names.namespace, &owner.name);
                entity.parent = workload.id;
                described.push(workload);
            }
            return true;
        }
        entity.parent = pod;
        let last = match container {
            Some(container) => {
                entity.container_id = container.names.id.to_string();
                entity.container = container.names.name.to_string();
                entity.image = container.names.image.to_string();
                entity.container.clone()
            }
            // The pod's sandbox, as a rule.
            None => entity.container_id.get(..12).unwrap_or(&entity.container_id).to_owned(),
        };
        entity.name = format!("{}/{}/{last}", names.namespace, names.name);
        true
    }

    /// The pod of a container that Kubernetes listed.
    pub fn pod_of(&self, container: EntityId) -> Option<EntityId> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        tables.containers.get(&container).map(|container| container.pod)
    }
}

fn mark_gone(
    containers: &mut HashMap<EntityId, Container, foldhash::fast::RandomState>,
    gone: &mut VecDeque<(Instant, EntityId)>,
    id: EntityId,
    now: Instant,
) {
    if let Some(container) = containers.get_mut(&id)
        && !std::mem::replace(&mut container.is_gone, true)
    {
        gone.push_back((now, id));
    }
}

impl Tables {
    /// Forgets what went long ago, and what went first while there is too much.
    fn forget(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.gone.front() {
            let is_crowded = self.containers.len() > CONTAINERS_MAX || self.pods.len() > PODS_MAX;
            if !is_crowded && now.saturating_duration_since(at) < REMEMBERED {
                break;
            }
            self.gone.pop_front();
            let container_left = self.containers.get(&id).is_some_and(|container| container.is_gone);
            let pod_left = self.pods.get(&id).is_some_and(|pod| pod.is_gone);
            if container_left {
                self.containers.remove(&id);
            }
            if pod_left {
                self.pods.remove(&id);
            }
            if container_left || pod_left {
                self.cgroups.remove(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, name: &str) -> PodNames {
        PodNames {
            uid: uid.into(),
            namespace: "shop".into(),
            name: name.into(),
            owner: Some(Owner { kind: "Deployment".into(), name: "cart".into() }),
            addresses: address_bytes("10.0.0.7").into_iter().collect(),
        }
    }

    fn container(id: &str, name: &str) -> ContainerNames {
        ContainerNames { id: id.into(), name: name.into(), image: "cart:1".into() }
    }

    fn described(directory: &Directory, id: &str) -> Entity {
        let mut entity = Entity::named(EntityKind::Container, entity_id(EntityKind::Container, id), "bare");
        directory.complete(&mut entity, &mut Vec::new());
        entity
    }

    #[test]
    fn names_are_completed_up_to_the_workload() {
        let directory = Directory::default();
        assert!(directory.update(pod("u1", "cart-1"), vec![container("c1", "web")], Instant::now()));
        let entity = described(&directory, "c1");
        assert_eq!((&*entity.name, &*entity.image), ("shop/cart-1/web", "cart:1"));
        let mut pod = Entity::named(EntityKind::Pod, entity.parent, "bare");
        let mut owners = Vec::new();
        assert!(directory.complete(&mut pod, &mut owners));
        assert_eq!((&*pod.name, &*pod.workload), ("shop/cart-1", "Deployment/cart"));
        assert_eq!(pod.addresses, [address_bytes("10.0.0.7").expect("an address")]);
        assert_eq!((owners.len(), owners[0].id, &*owners[0].name), (1, pod.parent, "Deployment shop/cart"));
    }

    #[test]
    fn only_a_change_makes_a_new_version() {
        let directory = Directory::default();
        directory.update(pod("u1", "cart-1"), vec![container("c1", "web")], Instant::now());
        let version = directory.version();
        assert!(!directory.update(pod("u1", "cart-1"), vec![container("c1", "web")], Instant::now()));
        assert_eq!(directory.version(), version);
        directory.update(pod("u1", "cart-1"), vec![container("c1", "web"), container("c2", "log")], Instant::now());
        assert!(directory.version() > version);
    }

    #[test]
    fn a_gone_container_keeps_its_name_for_a_while() {
        let directory = Directory::default();
        let start = Instant::now();
        directory.update(pod("u1", "cart-1"), vec![container("c1", "web")], start);
        directory.pod_gone(entity_id(EntityKind::Pod, "u1"), start);
        directory.update(pod("u2", "cart-2"), Vec::new(), start + REMEMBERED / 2);
        assert_eq!(described(&directory, "c1").name, "shop/cart-1/web");
        directory.update(pod("u3", "cart-3"), Vec::new(), start + REMEMBERED);
        assert_eq!(described(&directory, "c1").name, "bare");
    }

    #[test]
    fn it_stays_bounded_while_pods_come_and_go() {
        let directory = Directory::default();
        let now = Instant::now();
        for number in 0..2 * PODS_MAX {
            let uid = format!("u{number}");
            directory.update(pod(&uid, "cart"), vec![container(&format!("c{number}"), "web")], now);
            directory.pod_gone(entity_id(EntityKind::Pod, &uid), now);
        }
        let (pods, containers) = directory.len();
        assert!(pods <= PODS_MAX && containers <= CONTAINERS_MAX, "{pods} {containers}");
        assert_eq!(described(&directory, &format!("c{}", 2 * PODS_MAX - 1)).name, "shop/cart/web");
    }
}
