//! When something was.
//!
//! In: clues, the clocks of nodes. Out: which of two was before the other. What must hold: a clock of day that is set back or forth
//! changes no order within one run of a collector, which is within one boot of its node.

use super::matching::SKEW_NS;
use crate::correlate::NodeClock;
use crate::correlate::clue::{Clue, EvidenceId};

/// A moment of a node that orders clues of one collector's run by the clock since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    node: u64,
    epoch: u64,
    boottime_ns: u64,
    /// Since 1970.
    pub realtime_ns: u64,
}

impl Moment {
    /// When a clue was.
    pub fn of(clue: &Clue) -> Self {
        let EvidenceId { node, epoch, .. } = clue.evidence;
        Self { node, epoch, boottime_ns: clue.boottime_ns, realtime_ns: clue.realtime_ns }
    }

    /// Now, by the clock of a node.
    pub fn by(clock: &NodeClock) -> Self {
        let (boottime_ns, realtime_ns) = (clock.boottime_ns, clock.realtime_ns);
        Self { node: clock.node.id, epoch: clock.epoch, boottime_ns, realtime_ns }
    }

    /// The times by which two are ordered.
    fn times(self, other: Self) -> (u64, u64) {
        match (self.node, self.epoch) == (other.node, other.epoch) {
            true => (self.boottime_ns, other.boottime_ns),
            false => (self.realtime_ns, other.realtime_ns),
        }
    }

    /// How far the two are apart, nanoseconds.
    pub fn apart(self, other: Self) -> u64 {
        let (own, others) = self.times(other);
        own.abs_diff(others)
    }

    /// Whether it was before the other.
    pub fn is_before(self, other: Self) -> bool {
        let (own, others) = self.times(other);
        own < others
    }

    /// Whether what was at `other` may be over by this; clocks of different nodes may differ.
    pub fn may_end(self, other: Self) -> bool {
        let skew = if self.node == other.node { 0 } else { SKEW_NS };
        let (own, others) = self.times(other);
        own.saturating_add(skew) >= others
    }
}
