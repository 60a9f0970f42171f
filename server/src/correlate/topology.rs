//! What entities are called and how they hang together.
//!
//! What enters: the descriptions in frames, before the frame's events are looked at. What leaves: a shared description for
//! every signal. What must hold: bounded; a description is stored once and shared, and replaced only when it changed.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use tapio_wire::event::{ArchivedEntity, EntityId, EntityKind};
use tapio_wire::service::EntityRef;

use super::generations::Generations;

/// Bytes kept of each string of a description.
const TEXT_BYTES_MAX: usize = 512;

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
        }
    }

    fn is(&self, node: &NodeRef, entity: &ArchivedEntity) -> bool {
        self.kind == Some(entity.kind.get())
            && self.parent == entity.parent.to_native()
            && self.name == cut(&entity.name)
            && self.container_id == cut(&entity.container_id)
            && self.pod_uid == cut(&entity.pod_uid)
            && self.cgroup == cut(&entity.cgroup)
            && self.node == *node
    }

    /// The kind's name, `unknown` while nothing described it.
    pub fn kind_name(&self) -> &'static str {
        self.kind.map_or("unknown", EntityKind::name)
    }

    /// The pod that it belongs to, otherwise itself.
    pub fn pod_or_self(&self) -> EntityId {
        if self.parent == 0 { self.id } else { self.parent }
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
        }
    }
}

/// For people: `web (container 3f2a9c01d4e7)`, `sshd.service`, `container 3f2a9c01d4e7`.
impl fmt::Display for EntityInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
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
pub struct Topology {
    entities: RwLock<Generations<(u64, EntityId), Arc<EntityInfo>>>,
}

impl Topology {
    /// An empty one of at most `entities_max` entities.
    pub fn new(entities_max: usize) -> Self {
        Self { entities: RwLock::new(Generations::new(entities_max)) }
    }

    /// Takes descriptions in.
    pub fn learn(&self, node: &NodeRef, described: &[ArchivedEntity]) {
        if described.is_empty() {
            return;
        }
        let mut entities = self.entities.write().unwrap_or_else(PoisonError::into_inner);
        for entity in described {
            let key = (node.id, entity.id.to_native());
            let known = entities.entry(key, || Arc::new(EntityInfo::of(node, entity)));
            if !known.is(node, entity) {
                *known = Arc::new(EntityInfo::of(node, entity));
            }
        }
    }

    /// The description of an entity, or a stand-in.
    pub fn describe(&self, node: &NodeRef, id: EntityId) -> Arc<EntityInfo> {
        self.get(node.id, id).unwrap_or_else(|| Arc::new(EntityInfo::unknown(node, id)))
    }

    /// The description of an entity.
    pub fn get(&self, node: u64, id: EntityId) -> Option<Arc<EntityInfo>> {
        let entities = self.entities.read().unwrap_or_else(PoisonError::into_inner);
        entities.get(&(node, id)).cloned()
    }

    /// Entities known, and entities forgotten to keep the bound.
    pub fn counts(&self) -> (usize, u64) {
        let entities = self.entities.read().unwrap_or_else(PoisonError::into_inner);
        (entities.len(), entities.evicted())
    }
}
