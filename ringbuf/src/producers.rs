//! How producers in several threads share the end of one ring.
//!
//! In: a record's bytes. Out: a [`ProducerRange`] in the ring that is one producer's until it gives it back. Held, in this process's
//! memory alone: a short spin lock, the producer position, and where the ranges start that are not given back.
//!
//! This is the kernel's `__bpf_ringbuf_reserve`: under the lock, look for room, mark the record busy, let the reader see the
//! position behind it. Nothing is waited for inside, so the lock is held for a few stores. A thread that is scheduled away
//! there keeps the others spinning; they yield the processor to it after [`SPINS`] looks.
//!
//! What must hold:
//! - **T1** ranges in use never overlap, whatever the consumer page says. The peer can write that page, and two ranges
//!   on the same bytes would be two `&mut` to them. Each range's start is therefore kept here, and room counts from the
//!   oldest one. (The kernel has its `pending_pos`, which it can read off headers that its peer cannot write.)
//!
//! Pairs, by label, in addition to those of `protocol.rs`; both ends are in this file:
//!
//! | label | release side | acquire side | protects |
//! |---|---|---|---|
//! | L | unlock | lock | [`Ends`] |
//! | P | the range's start at [`Producers::give_back`] | the starts at [`Producers::take`] | the bytes of a range: its last write comes before the next use |

use crate::protocol;
use crate::sync::{AtomicU32, AtomicU64, Ordering, SharedCell, pause};

/// Ranges that can be in use at the same time.
pub const RESERVATIONS_MAX: usize = 64;
/// The start of a range that is not in use: no position, as those are multiples of eight.
const FREE: u64 = u64::MAX;
/// Looks at a lock that is taken before the processor is yielded.
const SPINS: u32 = 64;

/// A range of the ring that is one producer's.
#[derive(Debug)]
pub struct ProducerRange {
    /// The producer position at which its record starts.
    pub position: u64,
    /// Where its start is kept.
    index: usize,
}

/// What the lock guards.
struct Ends {
    /// Behind the last range taken.
    position: u64,
    /// A consumer position of the past: the true one may be further, so room is at least what follows from it.
    consumer_seen: u64,
    /// No range in use starts before it.
    oldest: u64,
    /// The last range taken.
    index: usize,
}

/// The producers' side of one ring.
pub struct Producers {
    locked: AtomicU32,
    ends: SharedCell<Ends>,
    /// Where the ranges in use start; written under the lock when taken, by its producer when given back.
    starts: [AtomicU64; RESERVATIONS_MAX],
}

// SAFETY: `ends` is reached in `take` alone, under the lock (L).
unsafe impl Sync for Producers {}

impl Default for Producers {
    fn default() -> Self {
        let ends = Ends { position: 0, consumer_seen: 0, oldest: 0, index: 0 };
        let starts = std::array::from_fn(|_| AtomicU64::new(FREE));
        Self { locked: AtomicU32::new(0), ends: SharedCell::new(ends), starts }
    }
}

impl Producers {
    /// Takes `bytes` of a ring of `capacity_bytes`, or nothing: no room, or [`RESERVATIONS_MAX`] ranges are in use.
    ///
    /// `mark_busy` writes the header at the position it is given, before the reader can see it. It must not panic.
    #[inline]
    pub fn take(
        &self,
        bytes: u64,
        capacity_bytes: u64,
        consumer: &AtomicU64,
        producer: &AtomicU64,
        mark_busy: impl FnOnce(u64),
    ) -> Option<ProducerRange> {
        self.lock();
        let range = self.ends.with_mut(|ends| {
            // SAFETY: the lock is held, and `take` has the only access (L).
            let ends = unsafe { &mut *ends };
            let index = self.find(ends, bytes, capacity_bytes, consumer)?;
            let position = ends.position;
            // Relaxed: starts of ranges in use are looked at under the lock alone.
            self.starts[index].store(position, Ordering::Relaxed);
            ends.index = index;
            ends.position = position.wrapping_add(bytes);
            mark_busy(position);
            protocol::publish(producer, ends.position);
            Some(ProducerRange { position, index })
        });
        // L
        self.locked.store(0, Ordering::Release);
        range
    }

    /// Ends a range's use, after the last write to it.
    #[inline]
    pub fn give_back(&self, range: &ProducerRange) {
        // P
        self.starts[range.index].store(FREE, Ordering::Release);
    }

    /// A free range's index if `bytes` fit; looks at the consumer, and at the ranges in use, only when they seem not to.
    #[inline]
    fn find(&self, ends: &mut Ends, bytes: u64, capacity_bytes: u64, consumer: &AtomicU64) -> Option<usize> {
        let fits = |from: u64, position: u64| capacity_bytes.saturating_sub(position.wrapping_sub(from)) >= bytes;
        if !fits(ends.consumer_seen, ends.position) {
            // B: what the reader read before it stored this position may be overwritten now.
            ends.consumer_seen = protocol::observe(consumer);
            if !fits(ends.consumer_seen, ends.position) {
                return None;
            }
        }
        if !fits(ends.oldest, ends.position) {
            // P: what was given back may be used again.
            let starts = self.starts.iter().map(|start| start.load(Ordering::Acquire)).filter(|start| *start != FREE);
            // Positions wrap: the oldest is the one furthest behind.
            let behind = starts.map(|start| ends.position.wrapping_sub(start)).max().unwrap_or(0);
            ends.oldest = ends.position.wrapping_sub(behind);
            if !fits(ends.oldest, ends.position) {
                return None;
            }
        }
        // The one behind the last is free, unless its producer is slow. P: the next to give it back says so for those before.
        (1..=RESERVATIONS_MAX)
            .map(|next| (ends.index + next) % RESERVATIONS_MAX)
            .find(|index| self.starts[*index].load(Ordering::Acquire) == FREE)
    }

    #[inline]
    fn lock(&self) {
        let mut looks = 0;
        // L
        while self.locked.compare_exchange_weak(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            pause(looks >= SPINS);
            looks = looks.saturating_add(1);
        }
    }
}
