//! The settings of the bulk lane that may change while the collector runs.
//!
//! In: the configuration, from `reload.rs`. Out: a [`Filter`] for each intake, when it has changed. What must hold: an intake that asks
//! pays one load while nothing has changed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tapio_probes::record::RecordKind;

use crate::base::metrics::{Metrics, raise};
use crate::settings::config::Config;
use crate::settings::severity::{Severity, severity};

/// What may be dropped of the bulk lane, by configuration.
#[derive(Clone, Debug)]
pub struct Filter {
    pub(crate) min_severity: Severity,
    pub(crate) sampling_rate: f64,
    pub(crate) events_per_second: u64,
}

impl Filter {
    /// Takes the settings from the configuration.
    pub fn of(config: &Config) -> Self {
        let filter = &config.pipeline.filter_config;
        Self {
            min_severity: if config.pipeline.enable_filtering { filter.min_severity } else { Severity::Low },
            sampling_rate: config.collector.sampling_rate,
            events_per_second: config.collector.max_events_per_sec,
        }
    }

    /// Whether bulk events of this kind matter enough to be kept.
    #[inline]
    pub fn admits(&self, kind: RecordKind) -> bool {
        severity(kind) >= self.min_severity
    }
}

/// The limits of the bulk lane as they are now.
pub struct Live {
    filter: Mutex<Filter>,
    /// When a DNS query counts as unanswered.
    dns_timeout_ns: AtomicU64,
    version: AtomicU64,
    /// Whether the file cannot be used, and what it said before still holds.
    pub is_stale: AtomicBool,
    pub reloads: AtomicU64,
}

impl Live {
    /// Starts with the configuration of the start.
    pub fn new(config: &Config) -> Self {
        Self {
            filter: Mutex::new(Filter::of(config)),
            dns_timeout_ns: AtomicU64::new(config.collectors.ebpf.dns_timeout.as_nanos() as u64),
            version: AtomicU64::new(0),
            is_stale: AtomicBool::default(),
            reloads: AtomicU64::default(),
        }
    }

    /// The limits, when they have changed since `version`, which is brought up to date.
    pub fn newer(&self, version: &mut u64) -> Option<Filter> {
        let now = self.version.load(Ordering::Acquire);
        if now == *version {
            return None;
        }
        *version = now;
        Some(self.filter.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        let stale = metrics.gauge(
            "tapio_collector_config_stale",
            "1 while the collector refuses the configuration file and keeps the previous configuration",
        )?;
        let reloads = metrics
            .counter("tapio_collector_config_reloads_total", "Changed configurations that the collector has applied")?;
        let live = Arc::clone(self);
        metrics.on_scrape(move || {
            stale.set(i64::from(live.is_stale.load(Ordering::Relaxed)));
            raise(&reloads, live.reloads.load(Ordering::Relaxed));
        });
        Ok(())
    }

    /// When a DNS query counts as unanswered.
    pub fn dns_timeout(&self) -> Duration {
        Duration::from_nanos(self.dns_timeout_ns.load(Ordering::Relaxed))
    }

    pub(super) fn set(&self, config: &Config) {
        self.dns_timeout_ns.store(config.collectors.ebpf.dns_timeout.as_nanos() as u64, Ordering::Relaxed);
        *self.filter.lock().unwrap_or_else(PoisonError::into_inner) = Filter::of(config);
        self.version.fetch_add(1, Ordering::Release);
    }
}
