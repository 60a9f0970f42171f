//! Counts of what the intake takes and drops.
//!
//! In: plain counters of one pass. Out: the books, and counters for metrics. What must hold: drops are published before the events that
//! came with them are handed on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tapio_wire::event::{KINDS, Kind, SOURCES, Source};
use tapio_wire::ledger::{Reason, Stage};

use crate::base::books::SourceBooks;
use crate::base::metrics::{Metrics, raise};
use crate::intake::identity::OUTCOMES;

/// What a pass has dropped so far, by reason.
#[derive(Default)]
pub(super) struct Drops {
    pub(super) malformed: u64,
    pub(super) no_room: u64,
    pub(super) excluded: u64,
    pub(super) sampled: u64,
    pub(super) rate_limited: u64,
}

impl Drops {
    /// Enters them into the books and begins at 0 again.
    pub(super) fn publish(&mut self, books: &SourceBooks) {
        for (stage, reason, count) in [
            (Stage::Decode, Reason::Malformed, &mut self.malformed),
            (Stage::Queue, Reason::Full, &mut self.no_room),
            (Stage::Filter, Reason::Excluded, &mut self.excluded),
            (Stage::Filter, Reason::Sampled, &mut self.sampled),
            (Stage::Filter, Reason::RateLimited, &mut self.rate_limited),
        ] {
            if *count > 0 {
                books.drop_events(stage, reason, std::mem::take(count));
            }
        }
    }
}

/// Counts of events by source and kind, for metrics.
pub struct KindCounts {
    counts: [[AtomicU64; KINDS]; SOURCES],
}

impl Default for KindCounts {
    fn default() -> Self {
        Self { counts: [const { [const { AtomicU64::new(0) }; KINDS] }; SOURCES] }
    }
}

impl KindCounts {
    /// Counts events of a source, by kind.
    pub(crate) fn add(&self, source: Source, counts: [u32; KINDS]) {
        add(&self.counts[source as usize], counts);
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        let decoded = metrics.counters(
            "tapio_collector_events_decoded_total",
            "Events that sources decoded",
            &["source", "lane", "kind"],
        )?;
        let counts = Arc::clone(self);
        metrics.on_scrape(move || {
            for (source, kind) in Source::ALL.into_iter().flat_map(|source| Kind::ALL.map(|kind| (source, kind))) {
                let count = counts.get(source, kind);
                if count > 0 {
                    raise(&decoded.with_label_values(&[source.name(), kind.lane().name(), kind.name()]), count);
                }
            }
        });
        Ok(())
    }

    /// Events of a source and kind so far.
    pub fn get(&self, source: Source, kind: Kind) -> u64 {
        self.counts[source as usize][kind as usize].load(Ordering::Relaxed)
    }
}

fn add<const N: usize>(counters: &[AtomicU64; N], counts: [u32; N]) {
    for (counter, count) in counters.iter().zip(counts) {
        if count > 0 {
            counter.fetch_add(u64::from(count), Ordering::Relaxed);
        }
    }
}

/// Events by outcome of resolving their subject ([`OUTCOMES`]), for metrics.
#[derive(Default)]
pub struct IdentityCounts([AtomicU64; OUTCOMES.len()]);

impl IdentityCounts {
    pub(crate) fn add(&self, counts: [u32; OUTCOMES.len()]) {
        add(&self.0, counts);
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        let identity = metrics.counters(
            "tapio_collector_events_identity_total",
            "Kernel events by identity-resolution outcome",
            &["outcome"],
        )?;
        let counts = Arc::clone(self);
        metrics.on_scrape(move || {
            for (outcome, count) in counts.get() {
                raise(&identity.with_label_values(&[outcome]), count);
            }
        });
        Ok(())
    }

    /// Each outcome and its count.
    pub fn get(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        OUTCOMES.into_iter().zip(self.0.iter().map(|count| count.load(Ordering::Relaxed)))
    }
}
