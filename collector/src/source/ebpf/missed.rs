//! What the kernel skipped or found no room for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tapio_probes::Probes;

use crate::base::metrics::{Metrics, raise};

/// How often the kernel skipped each program because it was running on that CPU already. What it would have recorded is in no
/// other counter.
#[derive(Default)]
pub struct MissedRuns {
    programs: Vec<(&'static str, AtomicU64)>,
    /// Records of the lethal lane that found their ring full; the books count them together with the bulk lane's.
    lethal_dropped: AtomicU64,
}

impl MissedRuns {
    /// Each program and its count.
    pub fn get(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.programs.iter().map(|(program, count)| (*program, count.load(Ordering::Relaxed)))
    }

    /// Records of the lethal lane that found their ring full: there should never be any.
    pub fn lethal_dropped(&self) -> u64 {
        self.lethal_dropped.load(Ordering::Relaxed)
    }

    pub(super) fn new(programs: impl Iterator<Item = &'static str>) -> Self {
        let programs = programs.map(|program| (program, AtomicU64::new(0))).collect();
        Self { programs, lethal_dropped: AtomicU64::default() }
    }

    /// Notes how many records of the lethal lane found their ring full.
    pub(super) fn set_lethal_dropped(&self, count: u64) {
        self.lethal_dropped.store(count, Ordering::Relaxed);
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        let missed = metrics.counters(
            "tapio_collector_probe_missed_runs_total",
            "Runs of a probe that the kernel skipped because the probe was already running on that CPU",
            &["program"],
        )?;
        let lethal_dropped = metrics.counter(
            "tapio_collector_lethal_ring_full_total",
            "Records of the lethal lane lost because their ring was full; included in the events dropped at stage ring",
        )?;
        let runs = Arc::clone(self);
        metrics.on_scrape(move || {
            for (program, count) in runs.get() {
                raise(&missed.with_label_values(&[program]), count);
            }
            raise(&lethal_dropped, runs.lethal_dropped());
        });
        Ok(())
    }

    pub(super) fn read(&self, probes: &Probes) {
        for (program, count) in &self.programs {
            if let Some(missed) = probes.missed_runs(program) {
                count.store(missed, Ordering::Relaxed);
            }
        }
    }
}
