//! What is known of a cgroup.

use std::time::Instant;

use tapio_wire::entity_id;
use tapio_wire::event::{Entity, EntityId, EntityKind};

use super::directory::Directory;
use super::path::Named;
use super::room::Place;

/// The outcomes of resolving an event's subject: the only list of them.
pub const OUTCOMES: [&str; 6] = ["container", "container_unnamed", "pod", "unit", "host", "unknown_cgroup"];
pub(super) const CONTAINER: usize = 0;
pub(super) const CONTAINER_UNNAMED: usize = 1;
pub(super) const POD: usize = 2;
pub(super) const UNIT: usize = 3;
pub(super) const HOST: usize = 4;
pub(super) const UNKNOWN_CGROUP: usize = 5;

/// When an entity was described last: on which stream, when, and with which version of its names.
pub(super) type Description = (u64, Instant, u64);

pub(super) struct Known {
    pub(super) entity: EntityId,
    pub(super) named: Named,
    pub(super) path: String,
    pub(super) place: Place,
    /// When each lane last described the entity. One lane's batch may arrive after the other's.
    pub(super) described: [Option<Description>; 2],
    pub(super) removed: Option<Instant>,
    /// One of [`OUTCOMES`].
    pub(super) outcome: usize,
    /// The version of its names in the directory, and the directory's when that was looked up.
    pub(super) names: u64,
    pub(super) looked_up: u64,
}

impl Known {
    pub(super) fn look_up(&mut self, directory: &Directory, version: u64) {
        self.looked_up = version;
        match self.named.kind {
            EntityKind::Container => {
                let (names, is_listed) = directory.container_version(self.entity, pod_entity(&self.named));
                self.names = names;
                self.outcome = match (is_listed, names > 0) {
                    (true, _) => CONTAINER,
                    (false, true) => POD,
                    (false, false) => CONTAINER_UNNAMED,
                };
            }
            EntityKind::Pod => self.names = directory.pod_version(self.entity),
            _ => {}
        }
    }

    pub(super) fn is_excluded(&self, directory: &Directory) -> bool {
        matches!(self.named.kind, EntityKind::Container | EntityKind::Pod)
            && directory.is_excluded(self.entity, pod_entity(&self.named))
    }
}

pub(super) fn pod_entity(named: &Named) -> EntityId {
    if named.pod_uid.is_empty() { 0 } else { entity_id(EntityKind::Pod, &named.pod_uid) }
}

/// Adds the description of a cgroup's entity, and of its pod.
pub(super) fn describe(known: &Known, directory: &Directory, described: &mut Vec<Entity>) {
    let named = &known.named;
    let pod = pod_entity(named);
    let is_container = named.kind == EntityKind::Container;
    let mut entity = Entity {
        parent: if is_container { pod } else { 0 },
        container_id: named.container_id.clone(),
        pod_uid: named.pod_uid.clone(),
        cgroup: known.path.clone(),
        ..Entity::named(named.kind, known.entity, named.name.clone())
    };
    if matches!(named.kind, EntityKind::Container | EntityKind::Pod) {
        directory.complete(&mut entity, described);
    }
    described.push(entity);
    if is_container && pod != 0 {
        let mut entity = Entity {
            pod_uid: named.pod_uid.clone(),
            cgroup: known.path.rsplit_once('/').map_or("", |(pod, _)| pod).into(),
            ..Entity::named(EntityKind::Pod, pod, named.pod_uid.clone())
        };
        directory.complete(&mut entity, described);
        described.push(entity);
    }
}
