//! What the archive wants to know of a frame without decompressing it: made where the frame is decoded anyway.

use tapio_wire::event::{ArchivedEntity, EntityKind, KINDS, Kind};
use tapio_wire::frame::{Frame, Header};

/// Entities seen lately, so that the list of a frame stays short: a power of two.
const RECENT: usize = 512;
/// Bytes kept of each text of a description.
const TEXT_BYTES_MAX: usize = 256;

/// What an entity is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    pub node: u64,
    pub id: u64,
    pub parent: u64,
    /// `None` where this build does not know the kind.
    pub kind: Option<EntityKind>,
    pub name: String,
    pub container_id: String,
    pub pod_uid: String,
    pub cgroup: String,
    pub namespace: String,
    pub pod: String,
    pub container: String,
    pub workload: String,
}

impl Described {
    /// Takes the summary from a frame's description.
    pub fn of(node: u64, entity: &ArchivedEntity) -> Self {
        Self {
            node,
            id: entity.id.to_native(),
            parent: entity.parent.to_native(),
            kind: Some(entity.kind.get()),
            name: cut(&entity.name).to_owned(),
            container_id: cut(&entity.container_id).to_owned(),
            pod_uid: cut(&entity.pod_uid).to_owned(),
            cgroup: cut(&entity.cgroup).to_owned(),
            namespace: cut(&entity.namespace).to_owned(),
            pod: cut(&entity.pod).to_owned(),
            container: cut(&entity.container).to_owned(),
            workload: cut(&entity.workload).to_owned(),
        }
    }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_BYTES_MAX)]
}

/// The descriptions of a frame as the directory has them on disk, one behind the other. A frame that introduces thousands of
/// entities waits for its commit, and one allocation for all takes less memory than eight for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptions {
    bytes: Vec<u8>,
    /// The entity of each, and where it ends.
    ends: Vec<(u64, u32)>,
}

impl Descriptions {
    fn push(&mut self, node: u64, entity: &ArchivedEntity) {
        for value in [node, entity.id.to_native(), entity.parent.to_native()] {
            self.bytes.extend_from_slice(&value.to_le_bytes());
        }
        self.bytes.push(entity.kind.get() as u8);
        for text in [
            &entity.name,
            &entity.container_id,
            &entity.pod_uid,
            &entity.cgroup,
            &entity.namespace,
            &entity.pod,
            &entity.container,
            &entity.workload,
        ] {
            let text = cut(text);
            self.bytes.extend_from_slice(&(text.len() as u16).to_le_bytes());
            self.bytes.extend_from_slice(text.as_bytes());
        }
        self.ends.push((entity.id.to_native(), self.bytes.len() as u32));
    }

    /// Each entity with its bytes.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let mut start = 0;
        self.ends.iter().map(move |&(entity, end)| {
            let bytes = &self.bytes[start..end as usize];
            start = end as usize;
            (entity, bytes)
        })
    }
}

/// The parts of a decoded frame that the archive's index needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Events by kind.
    pub kinds: [u32; KINDS],
    /// Every entity that an event is about, some more than once.
    pub entities: Vec<u64>,
    pub described: Descriptions,
}

impl Summary {
    /// Sums up a frame.
    pub fn of(frame: &Frame) -> Self {
        let body = frame.body();
        let mut kinds = [0; KINDS];
        let mut entities = Vec::new();
        let mut recent = [0u64; RECENT];
        for event in body.events.iter() {
            kinds[event.kind() as usize] += 1;
            let entity = event.entity.to_native();
            let place = (entity.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 55) as usize % RECENT;
            if recent[place] != entity || entity == 0 {
                recent[place] = entity;
                entities.push(entity);
            }
        }
        let mut described = Descriptions::default();
        for entity in body.entities.iter() {
            described.push(frame.header().node, entity);
        }
        Self { kinds, entities, described }
    }
}

/// The kinds of a set, as a block's mask has them.
pub fn kind_mask(kinds: impl IntoIterator<Item = Kind>) -> u64 {
    kinds.into_iter().fold(0, |mask, kind| mask | 1 << kind as u32)
}

/// A moment of a node's `CLOCK_BOOTTIME` as nanoseconds since 1970, by the clocks of a frame.
pub fn realtime_ns(header: &Header, boottime_ns: u64) -> u64 {
    let ahead = i128::from(boottime_ns) - i128::from(header.boottime_ns);
    (i128::from(header.realtime_ns) + ahead).clamp(0, i128::from(u64::MAX)) as u64
}

/// The earliest and the latest event of a frame, nanoseconds since 1970.
pub fn times_ns(header: &Header) -> (u64, u64) {
    if header.events() == 0 {
        return (header.realtime_ns, header.realtime_ns);
    }
    (realtime_ns(header, header.first_time_ns), realtime_ns(header, header.last_time_ns))
}
