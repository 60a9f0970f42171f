//! Anchors whose findings are in doubt: servers are silent, or frames are missing.
//!
//! What enters: each anchor when its finding is published, and whether that may lack something. What leaves: which anchors are to be
//! looked at again when it is known what was missing. What must hold: at most `anchors_max`. An anchor that the clue store still has
//! is never forgotten here, since the store remembers no more clues than that.

use std::collections::BTreeSet;

use crate::correlate::clue::{Clue, EvidenceId};

/// An anchor's clue, in the order of time.
pub type Anchor = (u64, EvidenceId, u8);

/// The key of an anchor's clue.
pub fn key(clue: &Clue) -> Anchor {
    (clue.realtime_ns, clue.evidence, clue.kind() as u8)
}

/// Remembers the anchors whose findings are in doubt.
pub struct Doubts {
    anchors: BTreeSet<Anchor>,
    anchors_max: usize,
}

impl Doubts {
    /// Makes a table of at most `anchors_max` anchors.
    pub fn new(anchors_max: usize) -> Self {
        Self { anchors: BTreeSet::new(), anchors_max: anchors_max.max(1) }
    }

    /// Takes in whether what an anchor's finding says is in doubt. True when [`Self::keep`] must make room.
    pub fn note(&mut self, anchor: &Clue, is_in_doubt: bool) -> bool {
        if is_in_doubt {
            self.anchors.insert(key(anchor));
        } else {
            self.anchors.remove(&key(anchor));
        }
        self.anchors.len() > self.anchors_max
    }

    /// Whether an anchor's finding is in doubt.
    pub fn has(&self, anchor: &Clue) -> bool {
        self.anchors.contains(&key(anchor))
    }

    /// Whether nothing is in doubt.
    pub fn is_empty(&self) -> bool {
        self.anchors.is_empty()
    }

    /// Keeps those of these clues, the latest `anchors_max` of them. Returns how many others there were.
    pub fn keep(&mut self, clues: impl Iterator<Item = Anchor>) -> usize {
        let before = self.anchors.len();
        self.anchors = clues.filter(|anchor| self.anchors.contains(anchor)).collect();
        while self.anchors.len() > self.anchors_max {
            self.anchors.pop_first();
        }
        before - self.anchors.len()
    }
}
