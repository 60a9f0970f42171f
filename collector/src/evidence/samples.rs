//! Earlier samples of cgroups' counters, so that evidence is a difference over the last minutes and not over a lifetime.
//!
//! What enters: a look at every container's counters each [`INTERVAL`]. What leaves: how the counters of one moved since the oldest
//! sample that is kept. What must hold: bounded in cgroups and in samples; a container that appeared since the last look began at 0.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;

/// How often the counters are looked at.
pub const INTERVAL: Duration = Duration::from_secs(30);
/// Samples kept: the oldest is two minutes old.
const SAMPLES_MAX: usize = 4;
/// Cgroups that are sampled.
const CGROUPS_MAX: usize = 4096;

/// Counters that only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub periods: u64,
    pub throttled: u64,
    pub throttled_us: u64,
    pub limit_hits: u64,
    pub oom_kills: u64,
}

impl Counters {
    fn since(self, earlier: Self) -> Self {
        Self {
            periods: self.periods.saturating_sub(earlier.periods),
            throttled: self.throttled.saturating_sub(earlier.throttled),
            throttled_us: self.throttled_us.saturating_sub(earlier.throttled_us),
            limit_hits: self.limit_hits.saturating_sub(earlier.limit_hits),
            oom_kills: self.oom_kills.saturating_sub(earlier.oom_kills),
        }
    }
}

/// The last readings of each container's counters, so that a later reading gives a difference.
#[derive(Debug, Default)]
pub struct Samples {
    of_cgroup: HashMap<String, VecDeque<(Instant, Counters)>, RandomState>,
    looked: Option<Instant>,
    /// The last look did not see every cgroup.
    is_partial: bool,
}

impl Samples {
    /// Whether it is time for another look.
    pub fn is_due(&self, now: Instant) -> bool {
        self.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= INTERVAL)
    }

    /// A look at all cgroups, by their paths.
    pub fn look(&mut self, now: Instant, counters: impl Iterator<Item = (String, Counters)>) {
        let mut seen = HashMap::with_hasher(RandomState::default());
        self.is_partial = false;
        for (path, counters) in counters {
            if seen.len() == CGROUPS_MAX {
                self.is_partial = true;
                break;
            }
            let mut samples = self.of_cgroup.remove(&path).unwrap_or_default();
            if samples.len() == SAMPLES_MAX {
                samples.pop_front();
            }
            samples.push_back((now, counters));
            seen.insert(path, samples);
        }
        self.of_cgroup = seen;
        self.looked = Some(now);
    }

    /// How the counters of a cgroup moved, and in which time; [`None`] while there is nothing to compare with.
    pub fn difference(&self, now: Instant, path: &str, counters: Counters) -> Option<(Duration, Counters)> {
        let (since, earlier) = match self.of_cgroup.get(path).and_then(VecDeque::front) {
            Some(&(since, earlier)) => (since, earlier),
            // Only containers are sampled.
            None if self.is_partial || !crate::identity::is_container(path) => return None,
            None => (self.looked?, Counters::default()),
        };
        Some((now.saturating_duration_since(since), counters.since(earlier)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: &str = "/docker/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    fn throttled(throttled: u64) -> Counters {
        Counters { throttled, ..Counters::default() }
    }

    #[test]
    fn what_was_long_ago_is_no_part_of_the_difference() {
        let (start, mut samples) = (Instant::now(), Samples::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(samples.difference(at(0), "/a", throttled(9)), None, "nothing to compare with");
        for (look, counted) in [100, 500, 500, 500, 500, 507].into_iter().enumerate() {
            samples.look(at(30 * look as u64), [("/a".to_owned(), throttled(counted))].into_iter());
        }
        let difference = samples.difference(at(155), "/a", throttled(510));
        assert_eq!(difference, Some((Duration::from_secs(95), throttled(10))));
        let of_new = samples.difference(at(155), NEW, throttled(3));
        assert_eq!(of_new, Some((Duration::from_secs(5), throttled(3))), "it began after the last look");
    }

    #[test]
    fn cgroups_that_are_gone_are_forgotten_and_the_rest_is_bounded() {
        let (now, mut samples) = (Instant::now(), Samples::default());
        let all = (0..CGROUPS_MAX + 5).map(|number| (format!("/{number}"), throttled(1)));
        samples.look(now, all);
        assert_eq!(samples.of_cgroup.len(), CGROUPS_MAX);
        assert_eq!(samples.difference(now, NEW, throttled(1)), None, "it may have been left out");
        samples.look(now, [("/1".to_owned(), throttled(1))].into_iter());
        assert_eq!(samples.of_cgroup.len(), 1);
    }
}
