//! Packed descriptions by key, bounded as [`super::Generations`] is: in two generations, each with its bytes side by side.
//!
//! What must hold: never more than `entries_max` entries, every one that had to go is counted; bytes that were replaced are given
//! back when they are as many as those in use.

use std::collections::HashMap;

use foldhash::fast::RandomState;
use tapio_wire::event::EntityId;

/// The node, 0 for what is the same on all of them, and the entity.
pub type Key = (u64, EntityId);

const CHUNK_BYTES: usize = 256 << 10;
/// Below it nothing is tidied up.
const WASTE_BYTES_MIN: usize = 1 << 20;
/// A record's length goes before it.
const LENGTH_BYTES: usize = 2;

/// One generation: where the record of a key begins, and the records.
#[derive(Default)]
struct Generation {
    places: HashMap<Key, u32, RandomState>,
    chunks: Vec<Vec<u8>>,
    in_use: usize,
    wasted: usize,
}

impl Generation {
    fn get(&self, key: &Key) -> Option<&[u8]> {
        self.record(*self.places.get(key)?)
    }

    fn record(&self, place: u32) -> Option<&[u8]> {
        let (chunk, at) = (place as usize / CHUNK_BYTES, place as usize % CHUNK_BYTES);
        let (length, rest) = self.chunks.get(chunk)?.get(at..)?.split_first_chunk::<LENGTH_BYTES>()?;
        rest.get(..usize::from(u16::from_le_bytes(*length)))
    }

    fn insert(&mut self, key: Key, record: &[u8]) {
        self.remove(&key);
        // Descriptions are cut long before.
        let record = &record[..record.len().min(usize::from(u16::MAX))];
        let needed = LENGTH_BYTES + record.len();
        if self.chunks.last().is_none_or(|chunk| chunk.len() + needed > CHUNK_BYTES) {
            self.chunks.push(Vec::with_capacity(CHUNK_BYTES));
        }
        let number = self.chunks.len() - 1;
        let chunk = &mut self.chunks[number];
        let place = number * CHUNK_BYTES + chunk.len();
        chunk.extend_from_slice(&(record.len() as u16).to_le_bytes());
        chunk.extend_from_slice(record);
        self.places.insert(key, place as u32);
        self.in_use += needed;
        if self.wasted >= WASTE_BYTES_MIN.max(self.in_use) {
            self.tidy();
        }
    }

    fn remove(&mut self, key: &Key) -> bool {
        let Some(place) = self.places.remove(key) else { return false };
        let bytes = LENGTH_BYTES + self.record(place).map_or(0, <[u8]>::len);
        self.in_use = self.in_use.saturating_sub(bytes);
        self.wasted += bytes;
        true
    }

    fn tidy(&mut self) {
        let old = std::mem::take(self);
        self.places.reserve(old.places.len());
        for (&key, &place) in &old.places {
            if let Some(record) = old.record(place) {
                self.insert(key, record);
            }
        }
    }

    fn clear(&mut self) {
        self.places.clear();
        self.chunks.clear();
        (self.in_use, self.wasted) = (0, 0);
    }
}

/// See the module.
pub struct Shelf {
    young: Generation,
    old: Generation,
    entries_max: usize,
    evicted: u64,
}

impl Shelf {
    /// An empty one of at most `entries_max` entries, at least 2.
    pub fn new(entries_max: usize) -> Self {
        Self { young: Generation::default(), old: Generation::default(), entries_max: entries_max.max(2), evicted: 0 }
    }

    /// Entries now.
    pub fn len(&self) -> usize {
        self.young.places.len() + self.old.places.len()
    }

    /// Entries that had to make room so far.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// The record of a key.
    pub fn get(&self, key: &Key) -> Option<&[u8]> {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    /// Inserts or replaces; the entry is young again.
    pub fn insert(&mut self, key: Key, record: &[u8]) {
        self.old.remove(&key);
        if self.young.places.len() >= self.entries_max / 2 && !self.young.places.contains_key(&key) {
            self.evicted += self.old.places.len() as u64;
            std::mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
        }
        self.young.insert(key, record);
    }

    /// Whether the entry is young: it need not be inserted again to survive.
    pub fn is_young(&self, key: &Key) -> bool {
        self.young.places.contains_key(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_and_every_eviction_is_counted() {
        let mut shelf = Shelf::new(100);
        for number in 0..10_000u64 {
            shelf.insert((1, number), &number.to_le_bytes());
            assert!(shelf.len() <= 100);
            assert_eq!(shelf.get(&(1, number)), Some(&number.to_le_bytes()[..]));
        }
        assert_eq!(shelf.evicted() + shelf.len() as u64, 10_000);
    }

    #[test]
    fn what_is_inserted_again_survives() {
        let mut shelf = Shelf::new(8);
        for number in 0..1000u64 {
            shelf.insert((1, number), b"passing");
            shelf.insert((0, 7), b"kept");
            assert!(shelf.is_young(&(0, 7)));
        }
        assert_eq!(shelf.get(&(0, 7)), Some(&b"kept"[..]));
    }

    #[test]
    fn replaced_bytes_are_given_back() {
        let mut shelf = Shelf::new(1000);
        let record = |turn: u64| vec![turn as u8; 500 + turn as usize % 3000];
        for turn in 0..20_000u64 {
            shelf.insert((2, turn % 50), &record(turn));
        }
        for key in 0..50 {
            assert_eq!(shelf.get(&(2, key)), Some(&*record(19_950 + key)));
        }
        let bytes: usize = shelf.young.chunks.iter().map(Vec::capacity).sum();
        assert!(bytes <= 3 * WASTE_BYTES_MIN, "{bytes}");
    }
}
