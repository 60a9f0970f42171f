//! What the source counts, for metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::name::Skip;
use crate::base::metrics::{Metrics, raise};

/// Counters, for metrics. What is counted here never became an event.
#[derive(Default)]
pub struct SystemdCounts {
    /// Skipped changes, by [`Skip`].
    skipped: [AtomicU64; 3],
    pub(super) coalesced: AtomicU64,
    pub(super) reconnects: AtomicU64,
    pub(super) units: AtomicU64,
}

impl SystemdCounts {
    /// Counts a change that is left out.
    pub(super) fn count_skipped(&self, skip: Skip) {
        self.skipped[skip as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Changes of units that the configuration leaves out, by reason.
    pub fn skipped_by_reason(&self) -> [(&'static str, u64); 3] {
        let get = |skip: Skip| self.skipped[skip as usize].load(Ordering::Relaxed);
        [("system", get(Skip::System)), ("excluded", get(Skip::Excluded)), ("not_selected", get(Skip::NotSelected))]
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        let skipped = metrics.counters(
            "tapio_collector_systemd_skipped_total",
            "Changes of units that the configuration excludes; they never become events",
            &["reason"],
        )?;
        let coalesced = metrics.counter(
            "tapio_collector_systemd_coalesced_total",
            "Changes merged into a later event of the same unit, and jobs beyond their rate limit",
        )?;
        let reconnects =
            metrics.counter("tapio_collector_systemd_reconnects_total", "Attempts to reconnect to the bus")?;
        let units = metrics.gauge("tapio_collector_systemd_units", "Units in the collector's table")?;
        let counts = Arc::clone(self);
        metrics.on_scrape(move || {
            for (reason, count) in counts.skipped_by_reason() {
                raise(&skipped.with_label_values(&[reason]), count);
            }
            raise(&coalesced, counts.coalesced());
            raise(&reconnects, counts.reconnects());
            units.set(counts.units() as i64);
        });
        Ok(())
    }

    /// Changes merged into a later event of the same unit, and jobs beyond their rate limit.
    pub fn coalesced(&self) -> u64 {
        self.coalesced.load(Ordering::Relaxed)
    }

    /// Connections after the first.
    pub fn reconnects(&self) -> u64 {
        self.reconnects.load(Ordering::Relaxed)
    }

    /// Units in the table.
    pub fn units(&self) -> u64 {
        self.units.load(Ordering::Relaxed)
    }
}
