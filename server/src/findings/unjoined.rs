//! Entities with clues that a not yet reported Service may explain.
//!
//! What enters: what a clue would be joined by, and whose it is; what is known by now. What leaves: the entities to look at again.
//! What must hold: bounded. An entity that is left out for want of room only stays as it was.

use tapio_wire::event::EntityId;

use crate::correlate::Generations;
use crate::correlate::clue::Address;

/// Things that are lacked, and entities that lack one of them.
const LACKS_MAX: usize = 32_768;
const ENTITIES_OF_LACK_MAX: usize = 64;

/// What a clue is joined to a Service by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lack {
    /// The Service, or its backend, at this address.
    At(Address),
    /// The Services behind which this pod stands.
    OfPod(EntityId),
    /// The Services that answer DNS.
    Dns,
}

/// An entity, with the node of its history.
pub type Holder = (u64, EntityId);

/// Remembers which entities lack what.
pub struct Unjoined {
    waiting: Generations<Lack, Vec<Holder>>,
    /// What they lacked is known by now.
    ready: Vec<Holder>,
}

impl Default for Unjoined {
    fn default() -> Self {
        Self { waiting: Generations::new(LACKS_MAX), ready: Vec::new() }
    }
}

impl Unjoined {
    /// An entity has a clue that lacks this. Of many entities the latest are remembered.
    pub fn note(&mut self, lack: Lack, holder: Holder) {
        let holders = self.waiting.entry(lack, Vec::new);
        if holders.contains(&holder) {
            return;
        }
        if holders.len() == ENTITIES_OF_LACK_MAX {
            holders.remove(0);
        }
        holders.push(holder);
    }

    /// Marks what was lacking as known.
    pub fn resolve(&mut self, lack: Lack) {
        if !self.waiting.is_empty() {
            self.ready.extend(self.waiting.remove(&lack).into_iter().flatten());
        }
    }

    /// Whether no entity lacks anything.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The entities that lack something no longer, each once, in an order that does not depend on chance.
    pub fn take_ready(&mut self) -> Vec<Holder> {
        if self.ready.is_empty() {
            return Vec::new();
        }
        let mut ready = std::mem::take(&mut self.ready);
        ready.sort_unstable();
        ready.dedup();
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::{ENTITIES_OF_LACK_MAX, Lack, Unjoined};

    #[test]
    fn what_is_known_is_handed_out_once_the_latest_first() {
        let mut unjoined = Unjoined::default();
        let many = ENTITIES_OF_LACK_MAX as u64 + 5;
        for entity in (0..many).chain(0..many) {
            unjoined.note(Lack::OfPod(1), (9, entity));
        }
        unjoined.note(Lack::Dns, (9, many - 1));
        unjoined.resolve(Lack::OfPod(2));
        assert!(unjoined.take_ready().is_empty());
        unjoined.resolve(Lack::Dns);
        unjoined.resolve(Lack::OfPod(1));
        let ready = unjoined.take_ready();
        assert_eq!(ready.len(), ENTITIES_OF_LACK_MAX);
        assert!(ready.contains(&(9, many - 1)) && unjoined.is_empty() && unjoined.take_ready().is_empty());
    }
}
