//! What a reader of the archive wants, and which segments and blocks may have it.

use std::collections::HashSet;

use foldhash::fast::RandomState;

use super::damage::Damage;
use super::index::{BlockEntry, Index, key};

/// Above this many wanted entities, asking every block's filter costs more than it saves.
const FILTER_KEYS_MAX: usize = 4096;
/// A node table that long may have been cut.
const NODES_TRUSTED_MAX: usize = 10_000;

/// What is wanted. What is `None` or the widest leaves open.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Nanoseconds since 1970, both included.
    pub since_ns: u64,
    pub until_ns: u64,
    pub nodes: Option<HashSet<u64, RandomState>>,
    /// Node and id.
    pub entities: Option<HashSet<(u64, u64), RandomState>>,
    /// A bit for each kind.
    pub kinds: u64,
    /// Segments before this one are left out.
    pub first_segment: u64,
}

impl Default for Selection {
    fn default() -> Self {
        Self { since_ns: 0, until_ns: u64::MAX, nodes: None, entities: None, kinds: u64::MAX, first_segment: 0 }
    }
}

impl Selection {
    pub(super) fn overlaps(&self, first_ns: u64, last_ns: u64) -> bool {
        first_ns <= self.until_ns && last_ns >= self.since_ns
    }

    /// Whether what is missing there may be wanted.
    pub(super) fn may_lack(&self, gap: &Damage) -> bool {
        gap.may_be_of(self.since_ns, self.until_ns)
            && (gap.lost.is_empty() || gap.lost.iter().any(|lost| self.wants_node(lost.node)))
    }

    pub(super) fn wants_node(&self, node: u64) -> bool {
        self.nodes.as_ref().is_none_or(|nodes| nodes.contains(&node))
    }

    /// Hashes of the wanted entities, for the filters of blocks; none where all are wanted, or too many to ask for.
    pub(crate) fn keys(&self) -> Vec<u64> {
        let entities = self.entities.iter().filter(|entities| entities.len() <= FILTER_KEYS_MAX).flatten();
        entities.map(|&(node, entity)| key(node, entity)).collect()
    }

    /// Whether a segment may hold what is wanted.
    pub(crate) fn wants_segment(&self, index: &Index) -> bool {
        let has_node = index.nodes.len() > NODES_TRUSTED_MAX
            || index.nodes.iter().any(|node| self.wants_node(node.id) && self.overlaps(node.first_ns, node.last_ns));
        has_node && self.overlaps(index.first_ns, index.last_ns)
    }

    /// Whether a block of that segment may; `keys` are [`Selection::keys`].
    pub(crate) fn wants_block(&self, index: &Index, block: &BlockEntry, keys: &[u64]) -> bool {
        self.overlaps(block.first_ns, block.last_ns)
            && block.kinds & self.kinds != 0
            && (keys.is_empty() || index.may_hold(block, keys))
    }
}
