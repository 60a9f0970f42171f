//! The collector's side of the ledger: counters that sources and the packer move, read when a frame is stamped.
//!
//! What must hold: a source stores `emitted` and its drops before it hands the events on. So whoever sees an event also
//! sees it counted. `shipped` moves under the outbox's lock, together with the stamp that states it.

use std::sync::atomic::{AtomicU64, Ordering};

use tapio_wire::event::{SOURCES, Source};
use tapio_wire::ledger::{Account, Ledger, REASONS, Reason, STAGES, Stage};

/// Cumulative counters of one source.
#[derive(Default)]
pub struct SourceBooks {
    emitted: AtomicU64,
    inherited: AtomicU64,
    dropped: [[AtomicU64; REASONS]; STAGES],
}

impl SourceBooks {
    /// States how many events the source has produced so far. Release: pairs with the Acquire in [`Books::snapshot`].
    pub fn set_emitted(&self, count: u64) {
        self.emitted.store(count, Ordering::Release);
    }

    /// Counts events that the source produced.
    pub fn add_emitted(&self, count: u64) {
        self.emitted.fetch_add(count, Ordering::AcqRel);
    }

    /// Counts what earlier epochs of a ring had taken from it.
    pub fn add_inherited(&self, count: u64) {
        self.inherited.fetch_add(count, Ordering::AcqRel);
    }

    /// States a loss that is counted elsewhere, as a whole.
    pub fn set_dropped(&self, stage: Stage, reason: Reason, count: u64) {
        self.dropped[stage as usize][reason as usize].store(count, Ordering::Release);
    }

    /// Counts a loss.
    pub fn drop_events(&self, stage: Stage, reason: Reason, count: u64) {
        self.dropped[stage as usize][reason as usize].fetch_add(count, Ordering::AcqRel);
    }
}

/// The counters of every source.
#[derive(Default)]
pub struct Books {
    sources: [SourceBooks; SOURCES],
}

impl Books {
    /// One source's counters.
    pub fn source(&self, source: Source) -> &SourceBooks {
        &self.sources[source as usize]
    }

    /// The ledger as of now, with `shipped` as the caller counts it.
    ///
    /// Drops are read before `emitted`, which only grows: `emitted` covers everything that was dropped or shipped.
    pub fn snapshot(&self, shipped: &[u64; SOURCES]) -> Ledger {
        let mut ledger = Ledger::default();
        for source in Source::ALL {
            let books = self.source(source);
            let mut account = Account { shipped: shipped[source as usize], ..Account::default() };
            for (row, counters) in account.dropped.iter_mut().zip(&books.dropped) {
                for (count, counter) in row.iter_mut().zip(counters) {
                    *count = counter.load(Ordering::Acquire);
                }
            }
            account.inherited = books.inherited.load(Ordering::Acquire);
            account.emitted = books.emitted.load(Ordering::Acquire);
            *ledger.account_mut(source) = account;
        }
        ledger
    }
}
