//! Packed descriptions by key, bounded as [`super::Generations`] is: in two generations, each with its bytes side by side.
//!
//! What must hold: never more than `entries_max` entries; every one that had to go is counted. Bytes that were replaced are freed
//! when they are as many as those in use. The table has only the places of records, which have their keys with them. For a table
//! that has just grown is more than half empty, and its free places are as large as the taken ones.
//!
//! ```text
//! record = node u64 · entity u64 · length u16 · the packed description
//! ```

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use tapio_wire::event::{EntityId, EntityKind};

/// The node, 0 for what is the same on all of them, and the entity. A node stands under itself.
pub type Key = (u64, EntityId);

/// Where an entity that `node` describes is kept. Whoever watches Kubernetes speaks of other nodes, and cannot rename them.
pub fn key_of(kind: EntityKind, id: EntityId, name: &str, node: u64) -> Key {
    match kind {
        kind if super::is_global(kind) => (0, id),
        EntityKind::Node if id == tapio_wire::node_id(name) => (id, id),
        _ => (node, id),
    }
}

/// Size of a chunk: as large as what glibc maps by itself (`HEAP` of the server's `main.rs`), and so frees when a
/// generation goes.
const CHUNK_BYTES: usize = 1 << 20;
/// Below it nothing is tidied up.
const WASTE_BYTES_MIN: usize = 1 << 20;
/// Maximum number of chunks: as many as the places of a generation can address.
const CHUNKS_MAX: usize = (u32::MAX as usize + 1) / CHUNK_BYTES;
const KEY_BYTES: usize = size_of::<Key>();
const LENGTH_BYTES: usize = 2;

/// One generation: where the record of a key begins, and the records.
#[derive(Default)]
struct Generation {
    hasher: RandomState,
    places: HashTable<u32>,
    records: Records,
    in_use: usize,
    wasted: usize,
}

#[derive(Default)]
struct Records {
    chunks: Vec<Vec<u8>>,
}

impl Records {
    fn at(&self, place: u32) -> Option<(Key, &[u8])> {
        let (chunk, at) = (place as usize / CHUNK_BYTES, place as usize % CHUNK_BYTES);
        let (node, rest) = self.chunks.get(chunk)?.get(at..)?.split_first_chunk()?;
        let (entity, rest) = rest.split_first_chunk()?;
        let (length, rest) = rest.split_first_chunk()?;
        let record = rest.get(..usize::from(u16::from_le_bytes(*length)))?;
        Some(((u64::from_le_bytes(*node), u64::from_le_bytes(*entity)), record))
    }

    /// Returns the key at a place that [`Records::push`] returned.
    fn key(&self, place: u32) -> Key {
        self.at(place).map_or_else(Key::default, |(key, _)| key)
    }

    fn push(&mut self, (node, entity): Key, record: &[u8]) -> u32 {
        let bytes = KEY_BYTES + LENGTH_BYTES + record.len();
        if self.chunks.last().is_none_or(|chunk| chunk.len() + bytes > CHUNK_BYTES) {
            self.chunks.push(Vec::with_capacity(CHUNK_BYTES));
        }
        let number = self.chunks.len() - 1;
        let chunk = &mut self.chunks[number];
        let place = number * CHUNK_BYTES + chunk.len();
        chunk.extend_from_slice(&node.to_le_bytes());
        chunk.extend_from_slice(&entity.to_le_bytes());
        chunk.extend_from_slice(&(record.len() as u16).to_le_bytes());
        chunk.extend_from_slice(record);
        place as u32
    }
}

impl Generation {
    fn get(&self, key: &Key) -> Option<&[u8]> {
        let place = self.places.find(self.hasher.hash_one(key), |&place| self.records.key(place) == *key)?;
        self.records.at(*place).map(|(_, record)| record)
    }

    fn insert(&mut self, key: Key, record: &[u8]) {
        self.remove(&key);
        // Descriptions are cut long before.
        let record = &record[..record.len().min(usize::from(u16::MAX))];
        let place = self.records.push(key, record);
        let Self { hasher, places, records, .. } = self;
        places.insert_unique(hasher.hash_one(key), place, |&place| hasher.hash_one(records.key(place)));
        self.in_use += KEY_BYTES + LENGTH_BYTES + record.len();
        if self.wasted >= WASTE_BYTES_MIN.max(self.in_use) {
            self.tidy();
        }
    }

    fn remove(&mut self, key: &Key) {
        let Self { hasher, places, records, .. } = self;
        let Ok(entry) = places.find_entry(hasher.hash_one(key), |&place| records.key(place) == *key) else { return };
        let (place, _) = entry.remove();
        let bytes = KEY_BYTES + LENGTH_BYTES + self.records.at(place).map_or(0, |(_, record)| record.len());
        self.in_use = self.in_use.saturating_sub(bytes);
        self.wasted += bytes;
    }

    fn tidy(&mut self) {
        let old = std::mem::take(self);
        for &place in &old.places {
            if let Some((key, record)) = old.records.at(place) {
                self.insert(key, record);
            }
        }
    }

    fn clear(&mut self) {
        self.places.clear();
        self.records.chunks.clear();
        (self.in_use, self.wasted) = (0, 0);
    }
}

/// A bounded map of packed descriptions.
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
        let is_full = self.young.places.len() >= self.entries_max / 2 || self.young.records.chunks.len() >= CHUNKS_MAX;
        if is_full && !self.is_young(&key) {
            self.evicted += self.old.places.len() as u64;
            std::mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
        }
        self.young.insert(key, record);
    }

    /// Whether the entry is young: it need not be inserted again to survive.
    pub fn is_young(&self, key: &Key) -> bool {
        self.young.get(key).is_some()
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
        let bytes: usize = shelf.young.records.chunks.iter().map(Vec::capacity).sum();
        assert!(bytes <= 3 * WASTE_BYTES_MIN, "{bytes}");
    }
}
