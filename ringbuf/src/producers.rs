//! How producers in several threads share the end of one ring.
//!
//! In: a record's bytes. Out: a [`Place`] in the ring that is one producer's until it gives it back. Held, in this process's
//! memory alone: a short spin lock, the producer position, and where the places start that are not given back.
//!
//! This is the kernel's `__bpf_ringbuf_reserve`: under the lock, look for room, mark the record busy, let the reader see the
//! position behind it. Nothing is waited for inside, so the lock is held for a few stores. A thread that is scheduled away
//! there keeps the others spinning; they yield the processor to it after [`SPINS`] looks.
//!
//! What must hold:
//! - **T1** places in use never overlap, whatever the consumer page says: the peer can write that page, and two places on the
//!   same bytes would be two `&mut` to them. Each place's start is therefore kept here (the kernel's `pending_pos`, which it
//!   can read off headers that its peer cannot write), and room counts from the oldest one.
//!
//! Pairs, by label, in addition to those of `protocol.rs`; both ends are in this file:
//!
//! | label | release side | acquire side | protects |
//! |---|---|---|---|
//! | L | unlock | lock | [`Ends`] |
//! | P | `in_use` at [`Producers::give_back`] | `in_use` at [`Producers::take`] | the bytes of a place: its last write comes before the next use |

use crate::protocol;
use crate::sync::{AtomicU32, AtomicU64, Ordering, SharedCell, pause};

/// Places that can be in use at the same time.
pub const PLACES_MAX: usize = u64::BITS as usize;
/// Looks at a lock that is taken before the processor is yielded.
const SPINS: u32 = 64;

/// A range of the ring that is one producer's.
#[derive(Debug)]
pub struct Place {
    /// The producer position at which its record starts.
    pub position: u64,
    /// Its bit in `in_use`.
    index: usize,
}

/// What the lock guards.
struct Ends {
    /// Behind the last place taken.
    position: u64,
    /// A consumer position of the past: the true one may be further, so room is at least what follows from it.
    consumer_seen: u64,
    /// No place in use starts before it.
    oldest: u64,
    /// Where the places of `in_use` start.
    starts: [u64; PLACES_MAX],
}

/// The producers' side of one ring.
pub struct Producers {
    locked: AtomicU32,
    ends: SharedCell<Ends>,
    /// One bit a place.
    in_use: AtomicU64,
}

// SAFETY: `ends` is reached in `take` alone, under the lock (L).
unsafe impl Sync for Producers {}

impl Default for Producers {
    fn default() -> Self {
        let ends = Ends { position: 0, consumer_seen: 0, oldest: 0, starts: [0; PLACES_MAX] };
        Self { locked: AtomicU32::new(0), ends: SharedCell::new(ends), in_use: AtomicU64::new(0) }
    }
}

impl Producers {
    /// Takes `bytes` of a ring of `capacity_bytes`, or nothing: no room, or [`PLACES_MAX`] places are in use.
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
    ) -> Option<Place> {
        self.lock();
        let place = self.ends.with_mut(|ends| {
            // SAFETY: the lock is held, and `take` has the only access (L).
            let ends = unsafe { &mut *ends };
            let index = self.find(ends, bytes, capacity_bytes, consumer)?;
            let position = ends.position;
            ends.starts[index] = position;
            ends.position = position.wrapping_add(bytes);
            // Relaxed: bits are set under the lock.
            self.in_use.fetch_or(1 << index, Ordering::Relaxed);
            mark_busy(position);
            protocol::publish(producer, ends.position);
            Some(Place { position, index })
        });
        // L
        self.locked.store(0, Ordering::Release);
        place
    }

    /// Ends a place's use, after the last write to it.
    #[inline]
    pub fn give_back(&self, place: &Place) {
        // P
        self.in_use.fetch_and(!(1 << place.index), Ordering::Release);
    }

    /// A free place's index if `bytes` fit; looks at the consumer, and at the places in use, only when they seem not to.
    #[inline]
    fn find(&self, ends: &mut Ends, bytes: u64, capacity_bytes: u64, consumer: &AtomicU64) -> Option<usize> {
        let fits = |from: u64, position: u64| capacity_bytes.saturating_sub(position.wrapping_sub(from)) >= bytes;
        // P: what was given back may be used again.
        let in_use = self.in_use.load(Ordering::Acquire);
        if !fits(ends.consumer_seen, ends.position) {
            // B: what the reader read before it stored this position may be overwritten now.
            ends.consumer_seen = protocol::observe(consumer);
            if !fits(ends.consumer_seen, ends.position) {
                return None;
            }
        }
        if !fits(ends.oldest, ends.position) {
            let starts = ends.starts.iter().enumerate().filter(|(index, _)| in_use & (1 << index) != 0);
            // Positions wrap: the oldest is the one furthest behind.
            let behind = starts.map(|(_, start)| ends.position.wrapping_sub(*start)).max().unwrap_or(0);
            ends.oldest = ends.position.wrapping_sub(behind);
            if !fits(ends.oldest, ends.position) {
                return None;
            }
        }
        let index = in_use.trailing_ones() as usize;
        (index < PLACES_MAX).then_some(index)
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
