//! What entities are called and how they hang together.
//!
//! What enters: the descriptions in frames, before the frame's events are looked at. What leaves: a shared description for
//! every signal. What must hold: bounded; a description is stored once and shared, and replaced only when it changed.

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use foldhash::fast::RandomState;
use tapio_wire::event::{ArchivedEntity, EntityId, EntityKind};
use tapio_wire::service::EntityRef;

use super::generations::Generations;
use super::signal::Address;

/// Bytes kept of each string of a description.
const TEXT_BYTES_MAX: usize = 512;
/// Addresses kept of a pod.
const ADDRESSES_MAX: usize = 4;
/// Entities described anew that may wait for the finder by name; with more of them it looks at all that it remembers.
const RENAMED_MAX: usize = 65_536;

/// A node, shared by everything that was seen on it.
#[derive(Clone, PartialEq, Eq)]
pub struct NodeRef {
    /// As in its frames.
    pub id: u64,
    /// As its collector announced it.
    pub name: Arc<str>,
}

impl NodeRef {
    /// The node of this name.
    pub fn named(name: &str) -> Self {
        Self { id: tapio_wire::node_id(name), name: name.into() }
    }
}

impl fmt::Debug for NodeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:x})", self.name, self.id)
    }
}

/// What an entity is called.
#[derive(Debug, PartialEq, Eq)]
pub struct EntityInfo {
    pub node: NodeRef,
    pub id: EntityId,
    /// `None` while nothing described it.
    pub kind: Option<EntityKind>,
    /// The pod of a container, otherwise 0.
    pub parent: EntityId,
    pub name: String,
    pub container_id: String,
    pub pod_uid: String,
    pub cgroup: String,
    pub namespace: String,
    pub pod: String,
    pub container: String,
    pub image: String,
    /// `Deployment/nginx`
    pub workload: String,
    /// The entity of that workload, 0 while it is unknown.
    pub workload_id: EntityId,
    pub addresses: Vec<Address>,
}

impl EntityInfo {
    /// Stands for an entity that nothing described.
    pub fn unknown(node: &NodeRef, id: EntityId) -> Self {
        Self {
            node: node.clone(),
            id,
            kind: None,
            parent: 0,
            name: format!("entity {id:016x}"),
            container_id: String::new(),
            pod_uid: String::new(),
            cgroup: String::new(),
            namespace: String::new(),
            pod: String::new(),
            container: String::new(),
            image: String::new(),
            workload: String::new(),
            workload_id: 0,
            addresses: Vec::new(),
        }
    }

    fn of(node: &NodeRef, entity: &ArchivedEntity) -> Self {
        Self {
            node: node.clone(),
            id: entity.id.to_native(),
            kind: Some(entity.kind.get()),
            parent: entity.parent.to_native(),
            name: cut(&entity.name).to_owned(),
            container_id: cut(&entity.container_id).to_owned(),
            pod_uid: cut(&entity.pod_uid).to_owned(),
            cgroup: cut(&entity.cgroup).to_owned(),
            namespace: cut(&entity.namespace).to_owned(),
            pod: cut(&entity.pod).to_owned(),
            container: cut(&entity.container).to_owned(),
            image: cut(&entity.image).to_owned(),
            workload: cut(&entity.workload).to_owned(),
            workload_id: workload_id(cut(&entity.namespace), cut(&entity.workload)),
            addresses: entity.addresses.iter().take(ADDRESSES_MAX).copied().collect(),
        }
    }

    fn is(&self, node: &NodeRef, entity: &ArchivedEntity) -> bool {
        self.kind == Some(entity.kind.get())
            && self.parent == entity.parent.to_native()
            && self.name == cut(&entity.name)
            && self.container_id == cut(&entity.container_id)
            && self.pod_uid == cut(&entity.pod_uid)
            && self.cgroup == cut(&entity.cgroup)
            && self.namespace == cut(&entity.namespace)
            && self.pod == cut(&entity.pod)
            && self.container == cut(&entity.container)
            && self.image == cut(&entity.image)
            && self.workload == cut(&entity.workload)
            && self.addresses.iter().eq(entity.addresses.iter().take(ADDRESSES_MAX))
            && self.node == *node
    }

    /// How much is known of it, to tell the fuller of two descriptions.
    fn fullness(&self) -> u32 {
        [!self.cgroup.is_empty(), !self.workload.is_empty(), self.parent != 0, !self.addresses.is_empty()]
            .map(u32::from)
            .iter()
            .sum()
    }

    /// The kind's name, `unknown` while nothing described it.
    pub fn kind_name(&self) -> &'static str {
        self.kind.map_or("unknown", EntityKind::name)
    }

    /// The pod that it belongs to or is, 0 for none.
    pub fn pod_id(&self) -> EntityId {
        match self.kind {
            Some(EntityKind::Pod) => self.id,
            Some(EntityKind::Container) => self.parent,
            _ => 0,
        }
    }

    /// `shop/web-0/web`, as far as it is known.
    fn path(&self) -> Option<String> {
        if self.pod.is_empty() {
            return None;
        }
        let mut path = format!("{}/{}", self.namespace, self.pod);
        if !self.container.is_empty() {
            path.push('/');
            path.push_str(&self.container);
        }
        Some(path)
    }

    /// As the query service shows it.
    pub fn to_ref(&self) -> EntityRef {
        EntityRef {
            id: self.id,
            kind: self.kind_name().into(),
            name: self.name.clone(),
            node: self.node.name.to_string(),
            pod_uid: self.pod_uid.clone(),
            container_id: self.container_id.clone(),
            cgroup: self.cgroup.clone(),
            namespace: self.namespace.clone(),
            pod: self.pod.clone(),
            container: self.container.clone(),
            image: self.image.clone(),
            workload: self.workload.clone(),
        }
    }
}

/// The entity of `Deployment/nginx` in a namespace.
fn workload_id(namespace: &str, workload: &str) -> EntityId {
    match workload.split_once('/') {
        Some((kind, name)) => tapio_wire::entity_id(EntityKind::Workload, &format!("{kind}/{namespace}/{name}")),
        None => 0,
    }
}

/// For people: `shop/web-0/web`, `web (container 3f2a9c01d4e7)`, `sshd.service`, `container 3f2a9c01d4e7`.
impl fmt::Display for EntityInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Some(EntityKind::Container | EntityKind::Pod) if !self.pod.is_empty() => {
                f.write_str(&self.path().unwrap_or_default())
            }
            Some(EntityKind::Container) => {
                let id = self.container_id.get(..12).unwrap_or(&self.container_id);
                if self.name.is_empty() || self.name.starts_with(id) && !id.is_empty() {
                    write!(f, "container {id}")
                } else if id.is_empty() {
                    write!(f, "{} (container)", self.name)
                } else {
                    write!(f, "{} (container {id})", self.name)
                }
            }
            Some(EntityKind::Pod) => write!(f, "pod {}", self.name),
            Some(EntityKind::Node) => write!(f, "node {}", self.name),
            Some(EntityKind::Unit | EntityKind::Workload) => f.write_str(&self.name),
            Some(EntityKind::Host) => write!(f, "host group {}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

fn cut(text: &str) -> &str {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Every described entity, bounded.
///
/// A pod or workload has the same id on every node, and whoever watches Kubernetes for all nodes describes it with fewer
/// words than the node that runs it: the fuller description is kept for all.
pub struct Topology {
    entities: RwLock<Generations<(u64, EntityId), Arc<EntityInfo>>>,
    pods_by_address: RwLock<Generations<Address, EntityId>>,
    renamed: Mutex<HashSet<(u64, EntityId), RandomState>>,
    has_renamed: AtomicBool,
    /// Changed under the lock of `renamed` alone.
    has_overflowed: AtomicBool,
}

impl Topology {
    /// An empty one of at most `entities_max` entities.
    pub fn new(entities_max: usize) -> Self {
        Self {
            entities: RwLock::new(Generations::new(entities_max)),
            pods_by_address: RwLock::new(Generations::new(entities_max)),
            renamed: Mutex::default(),
            has_renamed: AtomicBool::new(false),
            has_overflowed: AtomicBool::new(false),
        }
    }

    /// Takes descriptions in.
    pub fn learn(&self, node: &NodeRef, described: &[ArchivedEntity]) {
        if described.is_empty() {
            return;
        }
        let mut entities = self.entities.write().unwrap_or_else(PoisonError::into_inner);
        for entity in described {
            let id = entity.id.to_native();
            let is_global = is_global(entity.kind.get());
            let key = if is_global { (0, id) } else { (node.id, id) };
            let mut is_new = false;
            let known = entities.entry(key, || {
                is_new = true;
                Arc::new(EntityInfo::of(node, entity))
            });
            if !is_new {
                if known.is(node, entity) {
                    continue;
                }
                let told = EntityInfo::of(node, entity);
                if is_global && known.node != told.node && known.fullness() > told.fullness() {
                    continue;
                }
                *known = Arc::new(told);
            }
            let known = Arc::clone(known);
            if known.kind == Some(EntityKind::Pod) && !known.addresses.is_empty() {
                let mut pods = self.pods_by_address.write().unwrap_or_else(PoisonError::into_inner);
                for address in &known.addresses {
                    pods.insert(*address, known.id);
                }
            }
            self.note_renamed(key);
        }
    }

    fn note_renamed(&self, key: (u64, EntityId)) {
        let mut renamed = self.renamed.lock().unwrap_or_else(PoisonError::into_inner);
        if renamed.len() < RENAMED_MAX {
            renamed.insert(key);
        } else if !renamed.contains(&key) {
            self.has_overflowed.store(true, Ordering::Relaxed);
        }
        // Release: whoever sees it takes the lock and sees the entry.
        self.has_renamed.store(true, Ordering::Release);
    }

    /// Whether entities were described, or described otherwise, since they were last taken.
    pub fn has_renamed(&self) -> bool {
        self.has_renamed.load(Ordering::Acquire)
    }

    /// Takes the entities that were described since; a pod or workload stands under node 0. `None` when there were too many.
    pub fn take_renamed(&self) -> Option<HashSet<(u64, EntityId), RandomState>> {
        let mut renamed = self.renamed.lock().unwrap_or_else(PoisonError::into_inner);
        self.has_renamed.store(false, Ordering::Release);
        let taken = std::mem::take(&mut *renamed);
        (!self.has_overflowed.swap(false, Ordering::Relaxed)).then_some(taken)
    }

    /// The description of an entity, or a stand-in.
    pub fn describe(&self, node: &NodeRef, id: EntityId) -> Arc<EntityInfo> {
        self.get(node.id, id).unwrap_or_else(|| Arc::new(EntityInfo::unknown(node, id)))
    }

    /// The description of an entity.
    pub fn get(&self, node: u64, id: EntityId) -> Option<Arc<EntityInfo>> {
        let entities = self.entities.read().unwrap_or_else(PoisonError::into_inner);
        entities.get(&(node, id)).or_else(|| entities.get(&(0, id))).cloned()
    }

    /// The pod that has, or had last, an address.
    pub fn pod_at(&self, address: &Address) -> Option<EntityId> {
        self.pods_by_address.read().unwrap_or_else(PoisonError::into_inner).get(address).copied()
    }

    /// Entities known, and entities forgotten to keep the bound.
    pub fn counts(&self) -> (usize, u64) {
        let entities = self.entities.read().unwrap_or_else(PoisonError::into_inner);
        (entities.len(), entities.evicted())
    }
}

/// Whether an entity of this kind has the same id on every node.
fn is_global(kind: EntityKind) -> bool {
    matches!(kind, EntityKind::Pod | EntityKind::Workload)
}
