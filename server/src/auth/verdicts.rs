//! What the API server said about tokens, for a while.
//!
//! What must hold: tokens themselves are not kept, only their SHA-256. Both shelves are bounded, each by its own bound, so that a
//! flood of bad tokens never makes the server ask about good ones again.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;

use super::Account;

/// Verdicts of either kind that are kept.
pub const VERDICTS_MAX: usize = 16_384;

/// A token, as it is remembered.
pub type Key = [u8; 32];

/// The key of a token.
pub fn key(token: &str) -> Key {
    let digest = ring::digest::digest(&ring::digest::SHA256, token.as_bytes());
    let mut key = Key::default();
    key.copy_from_slice(digest.as_ref());
    key
}

/// Entries that all live equally long, so that the oldest is the next to expire.
struct Shelf<T> {
    lifetime: Duration,
    entries: HashMap<Key, (T, Instant), RandomState>,
    order: VecDeque<(Key, Instant)>,
}

impl<T: Clone> Shelf<T> {
    fn new(lifetime: Duration) -> Self {
        Self { lifetime, entries: HashMap::default(), order: VecDeque::new() }
    }

    fn get(&mut self, key: &Key, now: Instant) -> Option<T> {
        self.expire(now);
        self.entries.get(key).map(|(verdict, _)| verdict.clone())
    }

    fn put(&mut self, key: Key, verdict: T, now: Instant) {
        self.expire(now);
        while self.order.len() >= VERDICTS_MAX {
            self.drop_oldest();
        }
        let until = now + self.lifetime;
        self.entries.insert(key, (verdict, until));
        self.order.push_back((key, until));
    }

    fn expire(&mut self, now: Instant) {
        while self.order.front().is_some_and(|(_, until)| *until <= now) {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        let Some((key, until)) = self.order.pop_front() else { return };
        // It may have been put again since, with a later end.
        if self.entries.get(&key).is_some_and(|(_, latest)| *latest == until) {
            self.entries.remove(&key);
        }
    }
}

/// Caches the API server's verdicts about tokens.
pub(super) struct Verdicts {
    good: Shelf<Arc<Account>>,
    bad: Shelf<()>,
}

impl Verdicts {
    pub fn new(good: Duration, bad: Duration) -> Self {
        Self { good: Shelf::new(good), bad: Shelf::new(bad) }
    }

    /// Returns the account of a token; an inner `None` if it belongs to no account.
    pub fn get(&mut self, key: &Key, now: Instant) -> Option<Option<Arc<Account>>> {
        match self.good.get(key, now) {
            Some(account) => Some(Some(account)),
            None => self.bad.get(key, now).map(|()| None),
        }
    }

    pub fn put(&mut self, key: Key, verdict: Option<Arc<Account>>, now: Instant) {
        match verdict {
            Some(account) => self.good.put(key, account, now),
            None => self.bad.put(key, (), now),
        }
    }

    /// Good and bad ones.
    pub fn len(&self) -> (usize, usize) {
        (self.good.entries.len(), self.bad.entries.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account() -> Option<Arc<Account>> {
        Some(Arc::new(Account { username: "a".into(), groups: Vec::new(), node: None }))
    }

    #[test]
    fn each_verdict_expires_in_its_time_a_later_one_later() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut verdicts = Verdicts::new(Duration::from_secs(60), Duration::from_secs(10));
        let (good, bad) = (key("good"), key("bad"));
        verdicts.put(good, account(), start);
        verdicts.put(bad, None, start);
        assert!(matches!(verdicts.get(&good, at(9)), Some(Some(_))));
        assert!(matches!(verdicts.get(&bad, at(9)), Some(None)));
        assert!(verdicts.get(&bad, at(10)).is_none());
        verdicts.put(good, account(), at(30));
        assert!(verdicts.get(&good, at(89)).is_some(), "the later one holds");
        assert!(verdicts.get(&good, at(90)).is_none());
        assert_eq!(verdicts.len(), (0, 0));
    }

    #[test]
    fn a_bounded_flood_of_bad_tokens_evicts_no_good_one() {
        let now = Instant::now();
        let mut verdicts = Verdicts::new(Duration::from_secs(60), Duration::from_secs(60));
        let good = key("good");
        verdicts.put(good, account(), now);
        for number in 0..VERDICTS_MAX + 1000 {
            verdicts.put(key(&number.to_string()), None, now);
        }
        assert_eq!(verdicts.len(), (1, VERDICTS_MAX));
        assert_eq!(verdicts.bad.order.len(), VERDICTS_MAX);
        assert!(verdicts.get(&good, now).is_some());
        assert!(verdicts.get(&key("0"), now).is_none(), "the oldest went first");
    }
}
