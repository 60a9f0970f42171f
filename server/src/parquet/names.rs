//! What nodes and entities are called, as numbers of texts.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use tapio_wire::event::EntityKind;
use tapio_wire::frame::Frame;

use super::table::{NONE, Texts};
use crate::archive::index::Described;

/// Entities whose descriptions are kept from one segment to the next.
const ENTITIES_MAX: usize = 500_000;

/// The texts of an entity.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub kind: u32,
    pub name: u32,
    pub namespace: u32,
    pub workload: u32,
    pub pod: u32,
    pub container: u32,
    pub pod_uid: u32,
    pub container_id: u32,
}

struct Entry {
    id: u64,
    described: Option<Arc<Described>>,
    /// Names as of this segment; read when first asked for.
    known: Option<Known>,
}

/// Names of nodes and entities.
#[derive(Default)]
pub(super) struct Catalog {
    nodes: HashMap<u64, Arc<str>, RandomState>,
    slots: HashMap<(u64, u64), u32, RandomState>,
    entries: Vec<Entry>,
}

impl Catalog {
    /// Texts get other numbers with each segment.
    pub fn begin_segment(&mut self) {
        if self.entries.len() > ENTITIES_MAX {
            self.slots.clear();
            self.entries.clear();
        }
        self.entries.iter_mut().for_each(|entry| entry.known = None);
    }

    pub fn learn_node(&mut self, node: u64, name: &Arc<str>) {
        self.nodes.insert(node, Arc::clone(name));
    }

    pub fn knows_node(&self, node: u64) -> bool {
        self.nodes.contains_key(&node)
    }

    pub fn node_name(&self, node: u64) -> String {
        self.nodes.get(&node).map_or_else(|| format!("{node:016x}"), |name| name.to_string())
    }

    pub fn node_text(&self, texts: &mut Texts, node: u64) -> u32 {
        texts.number(&self.node_name(node))
    }

    /// Remembers a description; a later one counts.
    pub fn learn(&mut self, described: Described) {
        let slot = self.slot(described.node, described.id);
        let entry = &mut self.entries[slot as usize];
        if entry.described.as_deref() != Some(&described) {
            entry.described = Some(Arc::new(described));
            entry.known = None;
        }
    }

    pub fn learn_frame(&mut self, frame: &Frame) {
        let node = frame.header().node;
        frame.body().entities.iter().for_each(|entity| self.learn(Described::of(node, entity)));
    }

    /// Where an entity's texts are; it may be described later.
    pub fn slot(&mut self, node: u64, id: u64) -> u32 {
        let entries = &mut self.entries;
        *self.slots.entry((node, id)).or_insert_with(|| {
            entries.push(Entry { id, described: None, known: None });
            (entries.len() - 1) as u32
        })
    }

    /// The texts of an entity.
    pub fn named(&mut self, texts: &mut Texts, slot: u32) -> Known {
        let entry = &mut self.entries[slot as usize];
        *entry.known.get_or_insert_with(|| match &entry.described {
            Some(described) => known(texts, described),
            None if entry.id == 0 => known_by(texts, ""),
            None => known_by(texts, &format!("entity {:016x}", entry.id)),
        })
    }
}

fn known_by(texts: &mut Texts, name: &str) -> Known {
    Known {
        kind: NONE,
        name: texts.number(name),
        namespace: NONE,
        workload: NONE,
        pod: NONE,
        container: NONE,
        pod_uid: NONE,
        container_id: NONE,
    }
}

fn known(texts: &mut Texts, described: &Described) -> Known {
    // Before Kubernetes has said more, the name says where it belongs.
    let is_path = matches!(described.kind, Some(EntityKind::Pod | EntityKind::Container));
    let mut parts = described.name.split('/').filter(|_| is_path && described.name.contains('/'));
    let (namespace, pod) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let or = |known: &str, otherwise: &str| if known.is_empty() { otherwise.to_owned() } else { known.to_owned() };
    Known {
        kind: texts.number(described.kind.map_or("unknown", EntityKind::name)),
        name: texts.number(&described.name),
        namespace: texts.number(&or(&described.namespace, namespace)),
        workload: texts.number(&described.workload),
        pod: texts.number(&or(&described.pod, pod)),
        container: texts.number(&described.container),
        pod_uid: texts.number(&described.pod_uid),
        container_id: texts.number(&described.container_id),
    }
}
