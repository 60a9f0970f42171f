//! Latency distributions in microseconds.

use hdrhistogram::Histogram;
use serde::Serialize;

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

/// Microseconds for people.
pub fn human(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.2} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "p50 {}  p90 {}  p99 {}  p99.9 {}  max {}",
            human(self.p50),
            human(self.p90),
            human(self.p99),
            human(self.p999),
            human(self.max)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::{Latencies, Summary, human};

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

    #[test]
    fn people_read_units() {
        assert_eq!([900, 1500, 2_500_000].map(human), ["900 µs", "1.50 ms", "2.50 s"]);
    }
}
