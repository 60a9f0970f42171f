//! Cgroups of excluded namespaces: what happens in them is left out by the probes, before it reaches a ring.
//!
//! What enters: cgroups with what the directory says of them. What leaves: entries of the probes' set. What must hold:
//! only the bulk lane is left out. The set is bounded, and a cgroup that finds no room is reported as before. A cgroup
//! that is gone leaves the set.

use std::collections::HashSet;
use std::sync::Arc;

use tapio_probes::Controls;

/// Keeps the probes' set of excluded cgroups up to date.
pub struct Exclusion {
    controls: Arc<Controls>,
    excluded: HashSet<u64, foldhash::fast::RandomState>,
}

impl Exclusion {
    /// Nothing is left out yet.
    pub fn new(controls: Arc<Controls>) -> Self {
        Self { controls, excluded: HashSet::default() }
    }

    /// Whether a cgroup is left out: what the probes reported before they knew, and what is summed up, still arrives.
    #[inline]
    pub fn contains(&self, id: u64) -> bool {
        !self.excluded.is_empty() && self.excluded.contains(&id)
    }

    /// Leaves a cgroup out, or in.
    pub fn set(&mut self, id: u64, is_excluded: bool) {
        if is_excluded == self.excluded.contains(&id) {
            return;
        }
        let done = match is_excluded {
            true => self.controls.exclude_cgroup(id),
            false => self.controls.include_cgroup(id),
        };
        match (done, is_excluded) {
            (Ok(()), true) => drop(self.excluded.insert(id)),
            (Ok(()), false) => drop(self.excluded.remove(&id)),
            (Err(error), _) => {
                tracing::warn!(%error, cgroup = id, is_excluded, "the probes' table of excluded cgroups is full")
            }
        }
    }
}
