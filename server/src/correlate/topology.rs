//! What entities are called and how they hang together.
//!
//! What enters: the descriptions in frames, before the frame's events are looked at. What leaves: a shared description for
//! every clue. What must hold: bounded; a description is stored in few bytes ([`packed`]) and replaced only when it changed; the
//! ones that clues asked for lately are shared as they are.

mod packed;
mod shelf;

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use foldhash::fast::RandomState;
use rkyv::{Archive, Deserialize, Serialize};
use tapio_wire::event::{ArchivedEntity, EntityId, EntityKind};
use tapio_wire::service::EntityRef;

use super::clue::Address;
use super::generations::Generations;
use packed::{Description, Phrases};
use shelf::Shelf;

/// Bytes kept of each string of a description.
const TEXT_BYTES_MAX: usize = 512;
/// Addresses kept of a pod.
const ADDRESSES_MAX: usize = 4;
/// Descriptions kept as clues have them.
const UNPACKED_MAX: usize = 8192;
/// Nodes whose names are kept.
const NODES_MAX: usize = 65_536;
/// Entities described again that may wait for the finder by name; with more of them it looks at all that it remembers.
const RENAMED_MAX: usize = 65_536;

/// A node, shared by everything that was seen on it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq)]
pub struct NodeRef {
    /// Id as in the node's frames.
    pub id: u64,
    /// Name as the collector announced it.
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
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
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
    /// The first digits of a container's id, by which its cgroup is known; a text that no cgroup has where it is none.
    pub fn short_id(&self) -> &str {
        if self.container_id.is_empty() { "\0" } else { self.container_id.get(..12).unwrap_or(&self.container_id) }
    }

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

    fn of(node: NodeRef, id: EntityId, description: Description<String>) -> Self {
        let Description { kind, parent, addresses, texts, .. } = description;
        let [container_id, pod_uid, cgroup, name, namespace, pod, container, image, workload] = texts;
        Self {
            node,
            id,
            kind: KINDS.into_iter().find(|&known| known as u8 == kind),
            parent,
            workload_id: workload_id(&namespace, &workload),
            name,
            container_id,
            pod_uid,
            cgroup,
            namespace,
            pod,
            container,
            image,
            workload,
            addresses,
        }
    }

    /// How much is known of it, to choose the fuller of two descriptions.
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

    /// Makes the reference that the query service shows.
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

/// Shows an entity to people: `shop/web-0/web`, `web (container 3f2a9c01d4e7)`, `sshd.service`, `container
/// 3f2a9c01d4e7`.
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

const KINDS: [EntityKind; 6] = [
    EntityKind::Host,
    EntityKind::Container,
    EntityKind::Pod,
    EntityKind::Unit,
    EntityKind::Node,
    EntityKind::Workload,
];

/// The texts of a description, in the order of [`packed::TEXTS`]; archived and owned ones have the same fields.
macro_rules! texts_of {
    ($entity:expr) => {
        [
            &$entity.container_id,
            &$entity.pod_uid,
            &$entity.cgroup,
            &$entity.name,
            &$entity.namespace,
            &$entity.pod,
            &$entity.container,
            &$entity.image,
            &$entity.workload,
        ]
    };
}

/// An entity's description as a frame or another server reports it.
struct ReportedEntity<'a> {
    id: EntityId,
    kind: EntityKind,
    parent: EntityId,
    addresses: &'a [Address],
    texts: [&'a str; packed::TEXTS],
}

impl<'a> ReportedEntity<'a> {
    fn in_frame(entity: &'a ArchivedEntity) -> Self {
        Self {
            id: entity.id.to_native(),
            kind: entity.kind.get(),
            parent: entity.parent.to_native(),
            addresses: &entity.addresses,
            texts: texts_of!(entity),
        }
    }

    /// `None` while nothing described it.
    fn by_server(entity: &'a EntityInfo) -> Option<Self> {
        Some(Self {
            id: entity.id,
            kind: entity.kind?,
            parent: entity.parent,
            addresses: &entity.addresses,
            texts: texts_of!(entity),
        })
    }

    fn pack(&self, node: Option<u64>, phrases: &mut Phrases, out: &mut Vec<u8>) {
        let description = Description {
            kind: self.kind as u8,
            node,
            parent: self.parent,
            addresses: self.addresses.iter().take(ADDRESSES_MAX).copied().collect(),
            texts: self.texts.map(cut),
        };
        out.clear();
        packed::pack(&description, phrases, out);
    }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_BYTES_MAX)]
}

/// Every described entity, bounded.
///
/// A pod or workload has the same id on every node. Whoever watches Kubernetes for all nodes describes it with fewer words than
/// the node that runs it, so the fuller description is kept for all.
pub struct Topology {
    described: RwLock<Described>,
    /// Taken while `described` is held, so that nothing outdated is entered.
    unpacked: Mutex<Generations<(u64, EntityId), Arc<EntityInfo>>>,
    pods_by_address: RwLock<Generations<Address, EntityId>>,
    renamed: Mutex<HashSet<(u64, EntityId), RandomState>>,
    has_renamed: AtomicBool,
    /// Changed under the lock of `renamed` alone.
    has_overflowed: AtomicBool,
}

struct Described {
    shelf: Shelf,
    phrases: Phrases,
    nodes: Generations<u64, Arc<str>>,
    scratch: Vec<u8>,
}

impl Described {
    fn get(&self, key: &(u64, EntityId)) -> Option<EntityInfo> {
        let description = packed::unpack(self.shelf.get(key)?, &self.phrases)?;
        let node = description.node.unwrap_or(key.0);
        let name = self.nodes.get(&node).map_or_else(|| format!("{node:016x}").into(), Arc::clone);
        Some(EntityInfo::of(NodeRef { id: node, name }, key.1, description))
    }

    /// Takes a description in; whether it says anything new.
    fn take(&mut self, key: (u64, EntityId), node: &NodeRef, reported: &ReportedEntity<'_>) -> bool {
        let is_global = key.0 == 0;
        let Self { shelf, phrases, scratch, .. } = self;
        reported.pack(is_global.then_some(node.id), phrases, scratch);
        let known = shelf.get(&key);
        let is_new = known != Some(scratch.as_slice());
        if !is_new && shelf.is_young(&key) {
            return false;
        }
        let is_known = known.is_some();
        if is_new && is_known && self.says_less(&key, node) {
            return false;
        }
        self.shelf.insert(key, &self.scratch);
        is_new
    }

    /// Whether what is known says more than what is to be taken in. A container or pod keeps Kubernetes' names for life: a source
    /// that sees only cgroups' paths, or that starts before the API server has answered, must not take them away. Of what is the
    /// same on all nodes, another node's fuller description stays.
    fn says_less(&self, key: &(u64, EntityId), node: &NodeRef) -> bool {
        let Some(known) = self.get(key) else { return false };
        let Some(offered) = packed::unpack(&self.scratch, &self.phrases) else { return true };
        let offered = EntityInfo::of(node.clone(), key.1, offered);
        let loses_its_name = offered.pod.is_empty() && !known.pod.is_empty();
        let is_anothers = key.0 == 0 && known.node.id != node.id;
        // Of two nodes that say the same it does not matter which one said it first.
        let says_the_same = || EntityInfo { node: known.node.clone(), ..offered.clone() } == known;
        let says_no_more = || known.fullness() > offered.fullness() || known.node.id < node.id && says_the_same();
        loses_its_name || is_anothers && says_no_more()
    }
}

impl Topology {
    /// An empty one of at most `entities_max` entities.
    pub fn new(entities_max: usize) -> Self {
        Self {
            described: RwLock::new(Described {
                shelf: Shelf::new(entities_max),
                phrases: Phrases::default(),
                nodes: Generations::new(NODES_MAX),
                scratch: Vec::new(),
            }),
            unpacked: Mutex::new(Generations::new(UNPACKED_MAX)),
            pods_by_address: RwLock::new(Generations::new(entities_max)),
            renamed: Mutex::default(),
            has_renamed: AtomicBool::new(false),
            has_overflowed: AtomicBool::new(false),
        }
    }

    /// Takes descriptions in; returns the entities of which they say anything new.
    pub fn learn(&self, node: &NodeRef, described: &[ArchivedEntity]) -> Vec<EntityId> {
        if described.is_empty() {
            return Vec::new();
        }
        self.take(node, described.iter().map(ReportedEntity::in_frame))
    }

    /// Takes a description in as another server, or another part of this one, has it.
    pub fn learn_info(&self, entity: &EntityInfo) {
        if let Some(reported) = ReportedEntity::by_server(entity) {
            self.take(&entity.node, [reported].into_iter());
        }
    }

    fn take<'a>(&self, node: &NodeRef, described: impl Iterator<Item = ReportedEntity<'a>>) -> Vec<EntityId> {
        let mut new = Vec::new();
        let mut known = self.described.write().unwrap_or_else(PoisonError::into_inner);
        let name = known.nodes.get(&node.id);
        if name != Some(&node.name) {
            // A replay may learn late what a node is called.
            if name.is_some() {
                *self.unpacked() = Generations::new(UNPACKED_MAX);
                self.note_all_renamed();
            }
            known.nodes.insert(node.id, Arc::clone(&node.name));
        }
        for reported in described {
            let key = shelf::key_of(reported.kind, reported.id, reported.texts[3], node.id);
            if key.0 == key.1 {
                known.nodes.entry(key.0, || reported.texts[3].into());
            }
            if !known.take(key, node, &reported) {
                continue;
            }
            self.unpacked().remove(&key);
            if reported.kind == EntityKind::Pod && !reported.addresses.is_empty() {
                let mut pods = self.pods_by_address.write().unwrap_or_else(PoisonError::into_inner);
                for address in reported.addresses.iter().take(ADDRESSES_MAX) {
                    pods.insert(*address, reported.id);
                }
            }
            self.note_renamed(key);
            new.push(reported.id);
        }
        new
    }

    fn unpacked(&self) -> MutexGuard<'_, Generations<(u64, EntityId), Arc<EntityInfo>>> {
        self.unpacked.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn note_all_renamed(&self) {
        let _renamed = self.renamed.lock().unwrap_or_else(PoisonError::into_inner);
        self.has_overflowed.store(true, Ordering::Relaxed);
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
        // What is the same on all nodes stands under 0, and a node under itself.
        let keys = [(node, id), (0, id), (id, id)];
        {
            let unpacked = self.unpacked();
            if let Some(info) = keys.iter().find_map(|key| unpacked.get(key)) {
                return Some(Arc::clone(info));
            }
        }
        let known = self.described.read().unwrap_or_else(PoisonError::into_inner);
        let (key, info) = keys.into_iter().find_map(|key| Some((key, Arc::new(known.get(&key)?))))?;
        self.unpacked().insert(key, Arc::clone(&info));
        Some(info)
    }

    /// The pod that has, or had last, an address.
    pub fn pod_at(&self, address: &Address) -> Option<EntityId> {
        self.pods_by_address.read().unwrap_or_else(PoisonError::into_inner).get(address).copied()
    }

    /// Entities known, and entities forgotten to keep the bound.
    pub fn counts(&self) -> (usize, u64) {
        let known = self.described.read().unwrap_or_else(PoisonError::into_inner);
        (known.shelf.len(), known.shelf.evicted())
    }
}

/// Whether an entity of this kind has the same id on every node.
pub(crate) fn is_global(kind: EntityKind) -> bool {
    matches!(kind, EntityKind::Pod | EntityKind::Workload)
}
