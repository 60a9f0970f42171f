//! A map with a bound: what was not written for long makes room for what is new.
//!
//! What enters: keys and values. What must hold: never more than `entries_max` entries, constant time on average, and every
//! entry that had to go is counted. Entries live in two generations; when the young one has filled its half it becomes the
//! old one, and what was still in the old one is dropped. Whatever is written or asked for by `entry` is young again.

use std::collections::hash_map::Entry;
use std::hash::Hash;

use foldhash::fast::RandomState;

type Map<K, V> = std::collections::HashMap<K, V, RandomState>;

/// A map of at most `entries_max` entries that evicts what was not written for longest.
#[derive(Clone)]
pub struct Generations<K, V> {
    young: Map<K, V>,
    old: Map<K, V>,
    entries_max: usize,
    evicted: u64,
}

impl<K: Eq + Hash, V> Generations<K, V> {
    /// An empty map of at most `entries_max` entries, at least 2.
    pub fn new(entries_max: usize) -> Self {
        Self { young: Map::default(), old: Map::default(), entries_max: entries_max.max(2), evicted: 0 }
    }

    /// Entries now.
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Entries that had to make room so far.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Looks an entry up without making it young.
    pub fn get(&self, key: &K) -> Option<&V> {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    /// Every value, in no order.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.young.values().chain(self.old.values())
    }

    /// Looks an entry up to change it, without making it young.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        match self.young.get_mut(key) {
            Some(value) => Some(value),
            None => self.old.get_mut(key),
        }
    }

    /// Inserts or replaces.
    pub fn insert(&mut self, key: K, value: V) {
        self.old.remove(&key);
        if self.is_full_for(&key) {
            self.turn();
        }
        self.young.insert(key, value);
    }

    /// Removes.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.young.remove(key).or_else(|| self.old.remove(key))
    }

    /// The entry of `key`, made by `make` when there is none.
    pub fn entry(&mut self, key: K, make: impl FnOnce() -> V) -> &mut V {
        // Taken out before there may be room to make: what is asked for survives.
        let kept = if self.is_full_for(&key) {
            let kept = self.old.remove(&key);
            self.turn();
            kept
        } else {
            None
        };
        match self.young.entry(key) {
            // Mostly so, hence one look in one map.
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let kept = kept.or_else(|| self.old.remove(entry.key()));
                entry.insert(kept.unwrap_or_else(make))
            }
        }
    }

    /// Removes what `keep` refuses.
    pub fn retain(&mut self, mut keep: impl FnMut(&K, &mut V) -> bool) {
        self.young.retain(&mut keep);
        self.old.retain(&mut keep);
    }

    fn is_full_for(&self, key: &K) -> bool {
        self.young.len() >= self.entries_max / 2 && !self.young.contains_key(key)
    }

    /// The young one becomes the old one. The memory of the one that goes is used again, so that the next need not grow again.
    fn turn(&mut self) {
        self.evicted += self.old.len() as u64;
        std::mem::swap(&mut self.young, &mut self.old);
        self.young.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::Generations;

    #[test]
    fn the_bound_holds_and_every_eviction_is_counted() {
        let mut map = Generations::new(100);
        for key in 0..10_000u32 {
            map.insert(key, key);
            assert!(map.len() <= 100);
            assert_eq!(map.get(&key), Some(&key));
        }
        assert_eq!(map.evicted() + map.len() as u64, 10_000);
    }

    #[test]
    fn what_is_used_survives() {
        let mut map = Generations::new(8);
        map.insert(u32::MAX, "kept");
        for key in 0..1000u32 {
            map.insert(key, "passing");
            assert_eq!(*map.entry(u32::MAX, || "made again"), "kept");
        }
    }
}
