//! How each sink stands: metrics, and what the status says.

use std::sync::{Mutex, PoisonError};

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use tapio_wire::service::DeliveryStatus;

use super::marks::now_seconds;

/// The sinks that there are: their series are there before anything is delivered.
const SINKS: [&str; 4] = ["webhook", "alertmanager", "kubernetes-events", "otlp"];

/// What deliveries move, by sink.
#[derive(Clone)]
pub struct DeliverMetrics {
    delivered: IntCounterVec,
    repeated: IntCounterVec,
    failed: IntCounterVec,
    refused: IntCounterVec,
    lost: IntCounterVec,
    waiting: IntGaugeVec,
}

impl DeliverMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When one of the names is taken.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| {
            let counter = IntCounterVec::new(Opts::new(name, help), &["sink"])?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let waiting = Opts::new(
            "tapio_server_deliveries_waiting",
            "Versions of findings that wait to be delivered, on the server that leads.",
        );
        let waiting = IntGaugeVec::new(waiting, &["sink"])?;
        registry.register(Box::new(waiting.clone()))?;
        let metrics = Self {
            delivered: counter(
                "tapio_server_deliveries_total",
                "Versions of findings that a receiver has accepted, repeated ones included.",
            )?,
            repeated: counter(
                "tapio_server_deliveries_repeated_total",
                "Deliveries sent again under the same id; the receiver may have them twice.",
            )?,
            failed: counter(
                "tapio_server_delivery_failures_total",
                "Attempts to deliver that failed or whose outcome is unknown; the server retries them.",
            )?,
            refused: counter(
                "tapio_server_deliveries_refused_total",
                "Deliveries abandoned because the receiver refused them.",
            )?,
            lost: counter(
                "tapio_server_deliveries_lost_total",
                "Deliveries dropped because the queue was full while the receiver was unreachable; the oldest are dropped first.",
            )?,
            waiting,
        };
        SINKS.iter().for_each(|sink| drop(metrics.of(sink)));
        Ok(metrics)
    }

    pub(super) fn of(&self, sink: &str) -> Figures {
        let labels = [sink];
        Figures {
            sink: sink.to_owned(),
            delivered: self.delivered.with_label_values(&labels),
            repeated: self.repeated.with_label_values(&labels),
            failed: self.failed.with_label_values(&labels),
            refused: self.refused.with_label_values(&labels),
            lost: self.lost.with_label_values(&labels),
            waiting: self.waiting.with_label_values(&labels),
            standing: Mutex::default(),
        }
    }
}

#[derive(Default)]
struct Standing {
    trouble: Option<String>,
    delivered_at: u64,
}

/// Figures of one sink.
pub(super) struct Figures {
    sink: String,
    pub delivered: IntCounter,
    pub repeated: IntCounter,
    pub failed: IntCounter,
    pub refused: IntCounter,
    pub lost: IntCounter,
    pub waiting: IntGauge,
    standing: Mutex<Standing>,
}

impl Figures {
    /// A delivery was made.
    pub fn delivered(&self, is_repeat: bool) {
        self.delivered.inc();
        if is_repeat {
            self.repeated.inc();
        }
        self.standing.lock().unwrap_or_else(PoisonError::into_inner).delivered_at = now_seconds();
        self.set_trouble(None);
    }

    /// Why nothing is delivered now; it is logged when it is another reason than before.
    pub fn set_trouble(&self, trouble: Option<String>) {
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        if standing.trouble == trouble {
            return;
        }
        match &trouble {
            Some(error) => tracing::warn!(sink = self.sink, error, "cannot deliver findings: retrying"),
            None => tracing::info!(sink = self.sink, "delivering findings again"),
        }
        standing.trouble = trouble;
    }

    pub fn status(&self) -> DeliveryStatus {
        let standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        DeliveryStatus {
            sink: self.sink.clone(),
            delivered: self.delivered.get(),
            repeated: self.repeated.get(),
            failed: self.failed.get(),
            refused: self.refused.get(),
            lost: self.lost.get(),
            waiting: self.waiting.get().max(0) as u64,
            trouble: standing.trouble.clone().unwrap_or_default(),
            delivered_ns: standing.delivered_at * 1_000_000_000,
            server: String::new(),
        }
    }
}
