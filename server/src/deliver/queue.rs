//! What is to be delivered to one sink: the latest version of each finding, the oldest publication first.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tapio_wire::service::{DeliveryItem, Finding};
use tokio::time::Instant;

use super::figures::queued;

/// A delivery that nobody answered so often lets others go first.
pub const UNANSWERED_MAX: u32 = 5;

/// A version of a finding that waits.
#[derive(Clone, Debug)]
pub struct Waiting {
    pub finding: Arc<Finding>,
    pub content: String,
    /// How often its receiver refused it, and when it is sent again.
    pub refusals: u32,
    /// How often nobody answered it.
    pub unanswered: u32,
    pub due: Instant,
}

/// Holds each finding once, and `max` of them at the most.
pub struct Queue {
    /// Waiting deliveries, by publication.
    waiting: BTreeMap<(u64, String), Waiting>,
    /// When each finding that waits was published.
    published: HashMap<String, u64>,
    max: usize,
}

impl Queue {
    pub fn new(max: usize) -> Self {
        Self { waiting: BTreeMap::new(), published: HashMap::new(), max }
    }

    /// Takes a version in, in the place of an earlier one. Returns what had to make room for it.
    pub fn put(&mut self, finding: Arc<Finding>, content: String) -> Option<Waiting> {
        self.remove(&finding.id);
        let key = (finding.published_ns, finding.id.clone());
        self.published.insert(finding.id.clone(), finding.published_ns);
        self.waiting.insert(key, Waiting { finding, content, refusals: 0, unanswered: 0, due: Instant::now() });
        if self.waiting.len() <= self.max {
            return None;
        }
        let ((_, id), oldest) = self.waiting.pop_first()?;
        self.published.remove(&id);
        Some(oldest)
    }

    pub fn remove(&mut self, id: &str) {
        if let Some((id, published_ns)) = self.published.remove_entry(id) {
            self.waiting.remove(&(published_ns, id));
        }
    }

    /// Takes out the first one that is due, of those that nobody answered so far before others.
    pub fn take(&mut self, now: Instant) -> Option<Waiting> {
        let due = || self.waiting.iter().filter(|(_, waiting)| waiting.due <= now);
        let fresh = due().find(|(_, waiting)| waiting.unanswered < UNANSWERED_MAX);
        let key = fresh.or_else(|| due().next())?.0.clone();
        self.published.remove(&key.1);
        self.waiting.remove(&key)
    }

    /// Puts back what was taken out and not delivered, unless a later version waits by now.
    pub fn put_back(&mut self, waiting: Waiting) {
        if self.published.contains_key(&waiting.finding.id) {
            return;
        }
        let key = (waiting.finding.published_ns, waiting.finding.id.clone());
        self.published.insert(key.1.clone(), key.0);
        self.waiting.insert(key, waiting);
    }

    /// When the next one is due.
    pub fn next_due(&self) -> Option<Instant> {
        self.waiting.values().map(|waiting| waiting.due).min()
    }

    /// The first ones, for the status.
    pub fn first(&self, max: usize) -> Vec<DeliveryItem> {
        self.waiting.keys().take(max).map(|(published_ns, id)| queued(id, *published_ns)).collect()
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(id: &str, published_ns: u64) -> Arc<Finding> {
        Arc::new(Finding { id: id.into(), published_ns, ..Finding::default() })
    }

    #[test]
    fn each_finding_waits_once_one_without_room_is_returned() {
        let mut queue = Queue::new(2);
        assert!(queue.put(version("a", 1), String::new()).is_none());
        assert!(queue.put(version("b", 2), String::new()).is_none());
        assert!(queue.put(version("a", 3), String::new()).is_none(), "a later version takes the place of the first");
        let lost = queue.put(version("c", 4), String::new()).expect("there is room for two");
        assert_eq!((lost.finding.id.as_str(), queue.len()), ("b", 2));
        let first = queue.take(Instant::now()).expect("it is due");
        assert_eq!((first.finding.id.as_str(), first.finding.published_ns), ("a", 3));
        queue.put_back(Waiting { due: Instant::now() + std::time::Duration::from_secs(60), ..first });
        assert_eq!(queue.take(Instant::now()).expect("it is due").finding.id, "c");
        assert!(queue.take(Instant::now()).is_none() && queue.next_due().is_some() && queue.len() == 1);
        queue.put(version("d", 6), String::new());
        let earlier = queue.take(Instant::now()).expect("it is due");
        queue.put(version("d", 7), String::new());
        queue.put_back(earlier);
        assert_eq!(queue.take(Instant::now()).expect("it is due").finding.published_ns, 7);
        assert_eq!(queue.len(), 1);
    }
}
