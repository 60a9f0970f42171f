//! Latency distributions in microseconds.

use hdrhistogram::Histogram;
use serde::Serialize;
use tapio_wire::program::units::human_duration;

/// The longest latency with a bucket of its own: ten minutes.
const MAX_US: u64 = 600_000_000;

/// A distribution that is being collected.
pub struct Latencies {
    histogram: Histogram<u64>,
}

/// What is said about a distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p999: u64,
    pub max: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { histogram: Histogram::new_with_bounds(1, MAX_US, 3).expect("the bounds are valid") }
    }
}

impl Latencies {
    /// Adds `count` values of `us`; what is beyond the bound counts as the bound.
    pub fn record(&mut self, us: u64, count: u64) {
        self.histogram.saturating_record_n(us.min(MAX_US), count);
    }

    /// Adds the values of another distribution.
    pub fn add(&mut self, other: &Self) {
        self.histogram += &other.histogram;
    }

    /// How many values there are.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The percentiles; all 0 when there is no value.
    pub fn summary(&self) -> Summary {
        if self.histogram.is_empty() {
            return Summary::default();
        }
        let at = |quantile| self.histogram.value_at_quantile(quantile);
        Summary { p50: at(0.5), p90: at(0.9), p99: at(0.99), p999: at(0.999), max: self.histogram.max() }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "p50 {}  p90 {}  p99 {}  p99.9 {}  max {}",
            human_duration(self.p50 * 1000),
            human_duration(self.p90 * 1000),
            human_duration(self.p99 * 1000),
            human_duration(self.p999 * 1000),
            human_duration(self.max * 1000)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::{Latencies, Summary};

    #[test]
    fn percentiles_count_every_value() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.summary(), Summary::default());
        for us in 1..=1000 {
            latencies.record(us, 2);
        }
        latencies.record(u64::MAX, 1);
        let summary = latencies.summary();
        assert_eq!(latencies.count(), 2001);
        assert!(summary.p50.abs_diff(500) <= 1 && summary.p99.abs_diff(990) <= 1);
        assert!(summary.max >= super::MAX_US);
    }
}
