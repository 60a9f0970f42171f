//! Subjects that were resolved recently. The subject of an event is nearly always one of a few. A look here touches
//! half a cache line; the table of all cgroups takes four. A collector wakes to cold caches: waiting for them was a
//! tenth of its CPU at 10,000 events a second (`perf record` beside `tapio-perf load --nodes 1 --rate 10000`).
//!
//! What must hold: an answer is what the table would say now. Code that changes the meaning of an id, or makes
//! descriptions due, invalidates the ids here. A cgroup that the table evicted may stay here until its description is
//! due.

use tapio_ringbuf::prefetch;
use tapio_wire::event::{EntityId, Lane};

/// A power of two.
const CACHED_CGROUPS: usize = 2048;

/// An answer, by the low bits of the cgroup's id. Ids are inode numbers, of which those of one time are near each other.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
struct CachedCgroup {
    id: u64,
    entity: EntityId,
    /// Second from which each lane's description is due again, at first 0.
    due: [u32; 2],
    outcome: u32,
}

const _: () = assert!(size_of::<CachedCgroup>() == 32);

/// A small cache in front of the table of cgroups.
pub(super) struct Recent(Box<[CachedCgroup]>);

impl Default for Recent {
    fn default() -> Self {
        Self(vec![CachedCgroup::default(); CACHED_CGROUPS].into_boxed_slice())
    }
}

impl Recent {
    /// The entity and the outcome of a cgroup, if they are known and no description is due in this lane at `second`.
    #[inline]
    pub fn get(&self, id: u64, lane: Lane, second: u32) -> Option<(EntityId, usize)> {
        let cached = &self.0[id as usize % CACHED_CGROUPS];
        (cached.id == id && second < cached.due[lane as usize]).then_some((cached.entity, cached.outcome as usize))
    }

    /// Prefetches the entry of a cgroup that will be looked for soon.
    #[inline]
    pub fn fetch(&self, id: u64) {
        prefetch(&self.0[id as usize % CACHED_CGROUPS]);
    }

    /// Remembers an answer; until the second `due` nothing has to be described in this lane.
    pub fn put(&mut self, id: u64, lane: Lane, (entity, outcome): (EntityId, usize), due: u32) {
        let cached = &mut self.0[id as usize % CACHED_CGROUPS];
        let mut dues = if cached.id == id { cached.due } else { [0; 2] };
        dues[lane as usize] = due;
        *cached = CachedCgroup { id, entity, due: dues, outcome: outcome as u32 };
    }

    /// What was known of a cgroup no longer holds.
    pub fn forget(&mut self, id: u64) {
        self.0[id as usize % CACHED_CGROUPS] = CachedCgroup::default();
    }

    /// Nothing that was known holds any longer.
    pub fn forget_all(&mut self) {
        self.0.fill(CachedCgroup::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_holds_until_due_or_forgotten() {
        let mut recent = Recent::default();
        assert_eq!(recent.get(0, Lane::Bulk, 0), None);
        recent.put(7, Lane::Bulk, (70, 3), 60);
        assert_eq!(recent.get(7, Lane::Bulk, 59), Some((70, 3)));
        assert_eq!(recent.get(7, Lane::Bulk, 60), None);
        assert_eq!(recent.get(7, Lane::Lethal, 0), None);
        recent.put(7, Lane::Lethal, (70, 3), 61);
        assert_eq!((recent.get(7, Lane::Bulk, 59), recent.get(7, Lane::Lethal, 60)), (Some((70, 3)), Some((70, 3))));
        let same_place = 7 + CACHED_CGROUPS as u64;
        assert_eq!(recent.get(same_place, Lane::Bulk, 0), None);
        recent.put(same_place, Lane::Bulk, (71, 4), 60);
        assert_eq!((recent.get(7, Lane::Bulk, 0), recent.get(same_place, Lane::Bulk, 0)), (None, Some((71, 4))));
        recent.forget(same_place);
        assert_eq!(recent.get(same_place, Lane::Bulk, 0), None);
        recent.put(7, Lane::Bulk, (70, 3), 60);
        recent.forget_all();
        assert_eq!(recent.get(7, Lane::Bulk, 0), None);
    }
}
