//! The ledger: where every event that a source emitted has gone.
//!
//! ```text
//! emitted = archived + Σ dropped{stage, reason} + held        for each source, exactly
//! ```
//!
//! A collector states, in every frame, the cumulative counters of its epoch: `emitted`, `dropped{stage, reason}` and
//! `shipped` (events in this frame and the ones before it). The server counts what it archived by itself, so a frame that
//! was lost shows as `shipped ≠ archived`. `held = emitted − dropped − shipped` is what the collector still has in its rings,
//! queues and outbox; in an epoch's final frame it must be 0.
//!
//! ```text
//!  0        1         2       3        4           8                16
//!  ├────────┼─────────┼───────┼────────┼───────────┼────────────────┤   one entry; a frame carries those that are not 0
//!  │ source │ counter │ stage │ reason │ reserved 0│ count          │
//!  └────────┴─────────┴───────┴────────┴───────────┴────────────────┘
//! ```

use crate::event::{SOURCES, Source};

/// Bytes of an entry on the wire.
pub const ENTRY_BYTES: usize = 16;
/// Entries that one frame can carry.
pub const ENTRIES_MAX: usize = 64;

macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident, $count:ident { $($(#[$variant_meta:meta])* $variant:ident = $number:literal => $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum $name { $($(#[$variant_meta])* $variant = $number,)* }
        impl $name {
            /// Every variant, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
            /// The variant that a number names.
            pub fn from_u8(value: u8) -> Option<Self> {
                match value { $($number => Some(Self::$variant),)* _ => None }
            }
            /// The name that metrics and people use.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
        /// How many variants there are.
        pub const $count: usize = $name::ALL.len();
    };
}

numbered! {
    /// Where an event was lost.
    Stage, STAGES {
        /// The shared-memory ring had no room.
        Ring = 0 => "ring",
        /// The record could not be understood.
        Decode = 1 => "decode",
        /// A filter of the configuration.
        Filter = 2 => "filter",
        /// The event was lost between a source and its frame.
        Queue = 3 => "queue",
        /// The frames that wait for an acknowledgement.
        Outbox = 4 => "outbox",
        /// The collector's process ended.
        Collector = 5 => "collector",
    }
}

numbered! {
    /// Why it was lost.
    Reason, REASONS {
        /// The ring, queue or table was full.
        Full = 0 => "full",
        /// The record broke the layout; at stage `outbox`: its frame was damaged, refused for good, or lost by the
        /// spool.
        Malformed = 1 => "malformed",
        /// Sampling.
        Sampled = 2 => "sampled",
        /// The rate limit.
        RateLimited = 3 => "rate_limited",
        /// Below the minimum severity, or excluded by name.
        Excluded = 4 => "excluded",
        /// The process was shut down before it could be sent.
        Shutdown = 5 => "shutdown",
        /// The process was killed.
        Killed = 6 => "killed",
    }
}

/// Cumulative counters of one source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Events that the source produced, including undelivered ones.
    pub emitted: u64,
    /// Events put into frames up to this one.
    pub shipped: u64,
    /// What earlier epochs of the same rings had consumed or dropped when this epoch took them over.
    pub inherited: u64,
    /// Losses by stage and reason.
    pub dropped: [[u64; REASONS]; STAGES],
}

impl Account {
    /// All losses together.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.iter().flatten().sum()
    }

    /// What the collector still has in its rings, queues and outbox. Negative only when the books are wrong.
    pub fn held(&self) -> i64 {
        self.emitted as i64 - self.dropped_total() as i64 - self.shipped as i64
    }

    /// Counts a loss.
    pub fn drop_events(&mut self, stage: Stage, reason: Reason, count: u64) {
        self.dropped[stage as usize][reason as usize] += count;
    }

    /// Every loss that is not 0.
    pub fn losses(&self) -> impl Iterator<Item = (Stage, Reason, u64)> + '_ {
        Stage::ALL.iter().flat_map(move |&stage| {
            Reason::ALL.iter().filter_map(move |&reason| {
                let count = self.dropped[stage as usize][reason as usize];
                (count > 0).then_some((stage, reason, count))
            })
        })
    }
}

/// The accounts of all sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    pub accounts: [Account; SOURCES],
}

const EMITTED: u8 = 0;
const SHIPPED: u8 = 1;
const INHERITED: u8 = 2;
const DROPPED: u8 = 3;

impl Ledger {
    /// One source's account.
    pub fn account(&self, source: Source) -> &Account {
        &self.accounts[source as usize]
    }

    /// One source's account, to be changed.
    pub fn account_mut(&mut self, source: Source) -> &mut Account {
        &mut self.accounts[source as usize]
    }

    /// Appends the entries that are not 0, at most [`ENTRIES_MAX`], and returns how many they are.
    ///
    /// Were there ever more, the smallest losses would be added to another reason of their stage rather than left out: the
    /// sum must hold.
    pub fn encode(&self, out: &mut Vec<u8>) -> usize {
        let mut entries = 0;
        let mut push = |source: Source, counter: u8, stage: u8, reason: u8, count: u64| {
            if count > 0 {
                out.extend_from_slice(&[source as u8, counter, stage, reason, 0, 0, 0, 0]);
                out.extend_from_slice(&count.to_le_bytes());
                entries += 1;
            }
        };
        for source in Source::ALL {
            let account = self.account(source);
            push(source, EMITTED, 0, 0, account.emitted);
            push(source, SHIPPED, 0, 0, account.shipped);
            push(source, INHERITED, 0, 0, account.inherited);
        }
        let mut room = ENTRIES_MAX - 3 * SOURCES;
        for source in Source::ALL {
            let mut rest = 0;
            for (stage, reason, count) in self.account(source).losses() {
                // One place for each source that follows, and one for this source's rest, stays free.
                if room > SOURCES {
                    room -= 1;
                    push(source, DROPPED, stage as u8, reason as u8, count);
                } else {
                    rest += count;
                }
            }
            if rest > 0 {
                push(source, DROPPED, Stage::Collector as u8, Reason::Excluded as u8, rest);
            }
        }
        entries
    }

    /// Reads entries as [`Ledger::encode`] wrote them; `None` when one names an unknown source, counter, stage or reason.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut ledger = Self::default();
        for entry in bytes.chunks_exact(ENTRY_BYTES) {
            let account = ledger.account_mut(Source::from_u8(entry[0])?);
            let count = u64::from_le_bytes(entry[8..16].try_into().ok()?);
            match entry[1] {
                EMITTED => account.emitted = count,
                SHIPPED => account.shipped = count,
                INHERITED => account.inherited = count,
                DROPPED => {
                    let (stage, reason) = (Stage::from_u8(entry[2])?, Reason::from_u8(entry[3])?);
                    let sum = &mut account.dropped[stage as usize][reason as usize];
                    *sum = sum.checked_add(count)?;
                }
                _ => return None,
            }
        }
        Some(ledger)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_the_wire() {
        let mut ledger = Ledger::default();
        ledger.account_mut(Source::Ebpf).emitted = 10;
        ledger.account_mut(Source::Ebpf).shipped = 7;
        ledger.account_mut(Source::Ebpf).drop_events(Stage::Ring, Reason::Full, 2);
        ledger.account_mut(Source::Shm).inherited = u64::MAX;
        let mut bytes = Vec::new();
        assert_eq!(ledger.encode(&mut bytes), 4);
        assert_eq!(bytes.len(), 4 * ENTRY_BYTES);
        assert_eq!(Ledger::decode(&bytes), Some(ledger));
        assert_eq!(ledger.account(Source::Ebpf).held(), 1);
    }

    #[test]
    fn the_sum_holds_when_there_are_more_losses_than_entries() {
        let mut ledger = Ledger::default();
        for account in &mut ledger.accounts {
            account.emitted = 1000;
            account.shipped = 1;
            account.inherited = 1;
            account.dropped = [[3; REASONS]; STAGES];
        }
        let mut bytes = Vec::new();
        assert!(ledger.encode(&mut bytes) <= ENTRIES_MAX);
        let read = Ledger::decode(&bytes).expect("entries are well formed");
        for source in Source::ALL {
            assert_eq!(read.account(source).dropped_total(), ledger.account(source).dropped_total());
        }
    }

    #[test]
    fn an_unknown_entry_is_refused() {
        for entry in [[99, 0, 0, 0], [0, 99, 0, 0], [0, DROPPED, 99, 0], [0, DROPPED, 0, 99]] {
            let mut bytes = entry.to_vec();
            bytes.resize(ENTRY_BYTES, 0);
            assert_eq!(Ledger::decode(&bytes), None);
        }
    }
}
