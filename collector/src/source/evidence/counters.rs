//! A cgroup's counters over the last minutes, so that evidence is a difference and not a lifetime's sum.
//!
//! In: the counters of a cgroup, twice a minute. Out: how they moved since the oldest ones that are kept. What must hold: bounded.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::read::Reading;

/// Time between two kept samples: a little less than half a minute, since samples are not exactly on time.
const INTERVAL: Duration = Duration::from_secs(28);
/// How many are kept: the oldest is two minutes old.
const KEPT_MAX: usize = 4;

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
    /// How they moved since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            periods: self.periods.saturating_sub(earlier.periods),
            throttled: self.throttled.saturating_sub(earlier.throttled),
            throttled_us: self.throttled_us.saturating_sub(earlier.throttled_us),
            limit_hits: self.limit_hits.saturating_sub(earlier.limit_hits),
            oom_kills: self.oom_kills.saturating_sub(earlier.oom_kills),
        }
    }
}

impl From<&Reading> for Counters {
    fn from(reading: &Reading) -> Self {
        Self {
            periods: reading.periods,
            throttled: reading.throttled,
            throttled_us: reading.throttled_us,
            limit_hits: reading.limit_hits,
            oom_kills: reading.oom_kills,
        }
    }
}

/// The last readings of one cgroup's counters.
#[derive(Debug, Default)]
pub struct History {
    kept: VecDeque<(Instant, Counters)>,
}

impl History {
    /// Whether another reading is due.
    pub fn is_due(&self, now: Instant) -> bool {
        self.kept.back().is_none_or(|(last, _)| now.saturating_duration_since(*last) >= INTERVAL)
    }

    /// Keeps a reading.
    pub fn push(&mut self, now: Instant, counters: Counters) {
        if self.kept.len() == KEPT_MAX {
            self.kept.pop_front();
        }
        self.kept.push_back((now, counters));
    }

    /// How the counters moved since the oldest reading that is kept, and in which time; [`None`] where there is none.
    pub fn difference(&self, now: Instant, counters: Counters) -> Option<(Duration, Counters)> {
        let &(since, earlier) = self.kept.front()?;
        Some((now.saturating_duration_since(since), counters.since(earlier)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_long_ago_is_no_part_of_the_difference() {
        let throttled = |throttled| Counters { throttled, ..Counters::default() };
        let (start, mut history) = (Instant::now(), History::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(history.difference(at(0), throttled(9)), None, "nothing to compare with");
        for (look, counted) in [100, 500, 500, 500, 500, 507].into_iter().enumerate() {
            let now = at(30 * look as u64);
            assert!(history.is_due(now));
            history.push(now, throttled(counted));
            assert!(!history.is_due(now + Duration::from_secs(10)));
        }
        let difference = history.difference(at(155), throttled(510));
        assert_eq!(difference, Some((Duration::from_secs(95), throttled(10))));
    }
}
