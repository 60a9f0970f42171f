//! Room in the table of cgroups. Those below others have a holder: a container that makes some below itself, or else the folder that
//! they are in.
//!
//! What enters: ids that the table learns. What leaves: which of them goes when a holder has too many. What must hold: a holder that
//! makes cgroups without end takes no place from the containers of others.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::time::Duration;

use tapio_wire::entity_id;
use tapio_wire::event::{EntityId, EntityKind};

use super::known::Known;
use super::path::{Named, name_of};
use super::{CGROUPS_MAX, Identity, REMEMBERED, UNNAMED};

/// Cgroups of one holder, at the most.
pub(super) const BELOW_MAX: usize = 4096;

/// How many cgroups of a holder with too many are looked for on the disk, for each that it makes.
const LOOKED_AT_MAX: usize = 8;
/// How often a large table is looked through at the most.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Where a cgroup is, by what is above it.
pub(super) struct Place {
    /// Whose room it takes; `None` of pods and containers, except for containers within containers.
    pub holder: Option<EntityId>,
    /// Whether it is a container's own cgroup, not one that the container made below it.
    pub is_container_itself: bool,
}

impl Place {
    pub fn of(named: &Named, path: &str) -> Self {
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        // The outermost: what is below it may have any name, also that of a pod or of a container.
        let of_path =
            |(end, _): (usize, &str)| Some(name_of(&path[..end])).filter(|above| above.kind == EntityKind::Container);
        let container = path.match_indices('/').skip(1).find_map(of_path);
        let holder = match (&container, named.kind) {
            (Some(container), _) => Some(entity_id(EntityKind::Container, &container.key)),
            (None, EntityKind::Container | EntityKind::Pod) => None,
            (None, _) => Some(entity_id(EntityKind::Host, folder)),
        };
        let is_container = named.kind == EntityKind::Container;
        Self { holder, is_container_itself: is_container && (container.is_none() || name_of(folder).key != named.key) }
    }
}

/// Ids by their holder, the first that was learned first.
#[derive(Default)]
pub(super) struct Below(HashMap<EntityId, VecDeque<u64>, foldhash::fast::RandomState>);

impl Below {
    /// Notes an id that was learned.
    pub fn push(&mut self, holder: EntityId, id: u64) {
        self.0.entry(holder).or_default().push_back(id);
    }

    /// Takes the first id of a holder that has too many.
    pub fn pop_of_too_many(&mut self, holder: EntityId) -> Option<u64> {
        self.0.get_mut(&holder).filter(|ids| ids.len() > BELOW_MAX)?.pop_front()
    }

    /// Keeps the ids that the table still has.
    pub fn retain(&mut self, is_known: impl Fn(u64) -> bool) {
        self.0.retain(|_, ids| {
            ids.retain(|id| is_known(*id));
            !ids.is_empty()
        });
    }
}

impl Identity {
    /// Forgets a cgroup of a holder that has too many: the first one that is not there any more.
    pub(super) fn bound(&mut self, holder: EntityId, newest: u64) {
        for rest in (0..LOOKED_AT_MAX).rev() {
            let Some(id) = self.below.pop_of_too_many(holder) else { return };
            let known = self.cgroups.get(&id).filter(|known| known.place.holder == Some(holder));
            // The table has none of it any more, which is room enough.
            let Some(known) = known else { return };
            let is_used = id == newest || known.removed.is_none() && self.is_there(known);
            if rest > 0 && is_used {
                self.below.push(holder, id);
                continue;
            }
            return self.forget(id);
        }
    }

    pub(super) fn forget(&mut self, id: u64) {
        self.cgroups.remove(&id);
        self.recent.forget(id);
        if let Some(exclusion) = &mut self.exclusion {
            exclusion.set(id, false);
        }
    }

    fn is_there(&self, known: &Known) -> bool {
        let is_below = |(root, _): &(PathBuf, u64)| root.join(known.path.trim_start_matches('/')).exists();
        !known.path.starts_with(UNNAMED) && (self.roots.is_empty() || self.roots.iter().any(is_below))
    }

    /// Forgets what was removed long ago, and, where the table is full, all that is not there any more. Once in a while: for each
    /// cgroup that comes or goes in a flood it would take too long.
    pub(super) fn make_room(&mut self) {
        if self.now.saturating_duration_since(self.looked_through) < LOOK_INTERVAL {
            return;
        }
        self.looked_through = self.now;
        self.forget_removed(REMEMBERED);
        if self.cgroups.len() >= CGROUPS_MAX {
            self.forget_removed(Duration::ZERO);
        }
        if self.cgroups.len() >= CGROUPS_MAX {
            self.forget_gone();
        }
        let cgroups = &self.cgroups;
        self.below.retain(|id| cgroups.contains_key(&id));
    }

    /// Forgets what is there no more, though nothing said that it went: a flood's records are left out. Those that have no name are
    /// easily made up again.
    fn forget_gone(&mut self) {
        let gone = self.cgroups.iter().filter(|(_, known)| !self.is_there(known)).map(|(id, _)| *id);
        for id in gone.collect::<Vec<_>>() {
            self.forget(id);
        }
    }

    fn forget_removed(&mut self, older_than: Duration) {
        let now = self.now;
        self.cgroups.retain(|_, known| known.removed.is_none_or(|at| now.saturating_duration_since(at) < older_than));
    }
}
