//! The collector's metrics, brought up to date when they are read.
//!
//! In: the metrics of each part, which are registered beside the code that moves them. Out: the text format. What must hold: the hot path
//! moves plain counters, and a scrape copies them; labels have few values, all known beforehand.

use std::sync::{Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::{Encoder, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

/// Holds every metric of the collector and reads its counters on each scrape.
#[derive(Default)]
pub struct Metrics {
    registry: Registry,
    updates: Vec<Box<dyn Fn() + Send + Sync>>,
    /// One scrape at a time brings the counters up to date.
    updating: Mutex<()>,
}

impl Metrics {
    /// Registers a metric.
    ///
    /// # Errors
    /// When there is one of this name, as for all that follow.
    pub fn register<M: Collector + Clone + 'static>(&self, metric: M) -> Result<M, prometheus::Error> {
        self.registry.register(Box::new(metric.clone())).map(|()| metric)
    }

    /// Registers a counter.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.register(IntCounter::new(name, help)?)
    }

    /// Registers a counter with labels.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers a gauge.
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.register(IntGauge::new(name, help)?)
    }

    /// Registers a gauge with labels.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
        self.register(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    /// Calls `update` before each scrape, to copy plain counters into metrics.
    pub fn on_scrape(&mut self, update: impl Fn() + Send + Sync + 'static) {
        self.updates.push(Box::new(update));
    }

    /// The text format, with the numbers as of now.
    pub fn render(&self) -> Vec<u8> {
        let _one = self.updating.lock().unwrap_or_else(PoisonError::into_inner);
        for update in &self.updates {
            update();
        }
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics cannot be encoded");
        }
        text
    }
}

/// Raises a counter to a value that only grows.
pub fn raise(counter: &IntCounter, value: u64) {
    counter.inc_by(value.saturating_sub(counter.get()));
}

/// A histogram whose buckets double from `first` on.
pub fn doubling(name: &str, help: &str, first: f64, buckets: usize) -> prometheus::Histogram {
    let buckets = prometheus::exponential_buckets(first, 2.0, buckets).expect("it starts above 0 and grows");
    let options = prometheus::HistogramOpts::new(name, help).buckets(buckets);
    prometheus::Histogram::with_opts(options).expect("the name is valid")
}
