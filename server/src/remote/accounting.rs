//! Whether the remote archive has what nodes say was acknowledged elsewhere: what a lost disk took, and what it did not.
//!
//! What enters: the books, and the manifests of other lives. What leaves: how many of those events the remote archive has, and
//! how many it lacks. What must hold: an event counts once, whichever servers uploaded it; a manifest is read once.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use tokio::time::sleep;
use tracing::warn;

use super::listing::{self, Listed};
use super::manifest::Manifest;
use super::metrics::RemoteMetrics;
use super::store::Store;
use super::{RemoteError, life};
use crate::archive::{Books, lock_books};

/// How often the books are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How often the store is asked again: other servers upload meanwhile.
const ASK_INTERVAL: Duration = Duration::from_secs(300);
/// Manifests that are read at a time.
const AT_A_TIME: usize = 16;

/// Values by node and epoch.
type ByEpoch<T> = BTreeMap<(u64, u64), T>;

/// Frames of one segment: first and last sequence, and the events in them.
type Range = (u64, u64, u64);

pub(super) struct Accounting {
    pub store: Store,
    pub books: Arc<Mutex<Books>>,
    pub dir: std::path::PathBuf,
    pub cluster: String,
    pub metrics: RemoteMetrics,
    /// What manifests say, by the path of their segment.
    pub read: HashMap<String, ByEpoch<Range>>,
}

impl Accounting {
    /// Keeps the gauges right, for ever.
    pub async fn run(mut self) {
        let mut known = ByEpoch::new();
        let mut age = Duration::ZERO;
        loop {
            let claimed = self.claimed();
            if claimed != known || (age >= ASK_INTERVAL && !claimed.is_empty()) {
                match self.count(&claimed).await {
                    Ok((in_remote, missing)) => {
                        self.metrics.set_elsewhere(in_remote, missing);
                        (known, age) = (claimed, Duration::ZERO);
                    }
                    Err(error) => {
                        warn!(%error, "cannot check whether archive.remote has the events acknowledged elsewhere")
                    }
                }
            }
            sleep(LOOK_INTERVAL).await;
            age += LOOK_INTERVAL;
        }
    }

    /// Events that are elsewhere.
    fn claimed(&self) -> ByEpoch<u64> {
        let books = lock_books(&self.books);
        let epochs = books.nodes().flat_map(|(id, node)| node.epochs.iter().map(move |epoch| (id, epoch)));
        let events = |elsewhere: &[u64]| elsewhere.iter().fold(0_u64, |sum, &events| sum.saturating_add(events));
        let counted = epochs.map(|(id, epoch)| ((id, epoch.epoch), events(&epoch.elsewhere)));
        counted.filter(|(_, events)| *events > 0).collect()
    }

    async fn count(&mut self, claimed: &ByEpoch<u64>) -> Result<(u64, u64), RemoteError> {
        let local = |source| RemoteError::Local { path: self.dir.clone(), source };
        let own = life::of(&self.dir).map_err(local)?;
        let mut segments: Vec<Listed> = Vec::new();
        if !claimed.is_empty() {
            let below = self.store.root.clone().join(self.cluster.as_str());
            let others = listing::list(&self.store, &below).await?.into_iter().filter(|(label, _)| label.life != own);
            // An epoch is the moment when its collector started: what is older has nothing of it.
            let oldest = claimed.keys().map(|(_, epoch)| *epoch).min().unwrap_or(0);
            let all = others.flat_map(|(_, segments)| segments.into_values());
            segments = all.filter(|listed| listed.name.last_ns.saturating_add(1_000_000_000) >= oldest).collect();
        }
        self.read(&segments).await?;
        let mut ranges: ByEpoch<Vec<Range>> = ByEpoch::new();
        for of_segment in segments.iter().filter_map(|listed| self.read.get(listed.path.as_ref())) {
            for (epoch, &range) in of_segment.iter().filter(|(epoch, _)| claimed.contains_key(epoch)) {
                ranges.entry(*epoch).or_default().push(range);
            }
        }
        let (mut in_remote, mut missing) = (0_u64, 0_u64);
        for (epoch, &events) in claimed {
            let there = ranges.remove(epoch).map_or(0, covered).min(events);
            in_remote = in_remote.saturating_add(there);
            missing = missing.saturating_add(events - there);
        }
        Ok((in_remote, missing))
    }

    async fn read(&mut self, segments: &[Listed]) -> Result<(), RemoteError> {
        let unread = segments.iter().filter(|listed| !self.read.contains_key(listed.path.as_ref()));
        let store = &self.store;
        let reading = stream::iter(unread).map(|listed| async move {
            let manifest = listing::manifest(store, &listed.path, listed.name.number).await?;
            Ok::<_, RemoteError>((listed.path.to_string(), by_epoch(&manifest)))
        });
        let read: Vec<_> = reading.buffer_unordered(AT_A_TIME).try_collect().await?;
        self.read.extend(read);
        Ok(())
    }
}

fn by_epoch(manifest: &Manifest) -> ByEpoch<Range> {
    let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
    let counts = manifest.nodes.iter().filter_map(|count| {
        let epoch = (hexadecimal(&count.node)?, hexadecimal(&count.epoch)?);
        Some((epoch, (count.first_seq, count.last_seq, count.events)))
    });
    counts.collect()
}

/// Events of ranges that may overlap: of what is there already, a range counts for its other frames' share.
fn covered(mut ranges: Vec<Range>) -> u64 {
    ranges.sort_unstable();
    let (mut up_to, mut sum) = (0_u64, 0_u64);
    for (first, last, events) in ranges {
        let frames = last.saturating_sub(first).saturating_add(1);
        let fresh = last.saturating_sub(first.saturating_sub(1).max(up_to));
        let share = u128::from(events) * u128::from(fresh.min(frames)) / u128::from(frames);
        sum = sum.saturating_add(share as u64);
        up_to = up_to.max(last);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::covered;

    #[test]
    fn events_that_two_servers_uploaded_count_once() {
        assert_eq!(covered(vec![]), 0);
        assert_eq!(covered(vec![(1, 10, 100), (11, 20, 50)]), 150);
        assert_eq!(covered(vec![(1, 10, 100), (1, 10, 100)]), 100);
        assert_eq!(covered(vec![(6, 15, 100), (1, 10, 100)]), 150);
        assert_eq!(covered(vec![(5, 5, 7), (1, 2, 3)]), 10);
    }
}
