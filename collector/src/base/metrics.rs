//! Helpers for metrics.

/// A histogram whose buckets double from `first` on.
pub fn doubling(name: &str, help: &str, first: f64, buckets: usize) -> prometheus::Histogram {
    let buckets = prometheus::exponential_buckets(first, 2.0, buckets).expect("it starts above 0 and grows");
    let options = prometheus::HistogramOpts::new(name, help).buckets(buckets);
    prometheus::Histogram::with_opts(options).expect("the name is valid")
}
