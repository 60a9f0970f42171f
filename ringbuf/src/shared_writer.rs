//! The producers of a memfd ring, when they are several threads of one process.
//!
//! In: records from any thread. Out: the ring, read by a [`crate::Reader`] in another process. Held: [`Producers`], in this
//! process's memory; a second process needs a ring of its own.
//!
//! As with the kernel's ring, a record is reserved under a short lock, marked busy, filled in place without the lock, and
//! committed by clearing the busy bit. Records arrive in the order in which they were reserved, so the reader stops at one that
//! is not committed yet: fill it without waiting for anything. A producer that panics meanwhile gives its record up, and the
//! reader skips it; one that never ends stalls the ring, as does a reservation that is leaked.
//!
//! What must hold:
//! - **S1** between [`Producers::take`] and [`Producers::give_back`] the bytes of a range are its reservation's alone (T1);
//! - **S2** `emitted` counts a record before the reader can see it committed, and a drop before `dropped` does. A record that
//!   is given up was never attempted.

use std::mem;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::slice;
use std::sync::Arc;

use crate::error::Error;
use crate::layout::{self, BUSY_BIT, DISCARD_BIT, HEADER_BYTES, MEMFD_RECORD_BYTES_MAX};
use crate::mapping::RingMapping;
use crate::memfd;
use crate::producers::{ProducerRange, Producers};
use crate::protocol;
use crate::sync::Ordering;
use crate::wakeup::EventFd;

/// Fills one ring from any number of threads of one process: clone it, or share a reference.
///
/// Records are at most [`MEMFD_RECORD_BYTES_MAX`] bytes, and at most [`crate::RESERVATIONS_MAX`] are reserved at the same time; what
/// goes beyond never fits. With one producer a [`crate::Writer`] is cheaper.
#[derive(Clone)]
pub struct SharedWriter {
    end: Arc<End>,
}

struct End {
    ring: RingMapping,
    eventfd: EventFd,
    producers: Producers,
}

impl SharedWriter {
    /// Makes a ring. Returns its writer and what its reader needs: the sealed memfd, and the eventfd that announces records.
    pub fn create(data_bytes: usize, name: &str) -> Result<(Self, OwnedFd, OwnedFd), Error> {
        let (ring, memfd) = memfd::create(data_bytes, name)?;
        let eventfd = EventFd::new()?;
        let peer_eventfd = eventfd.duplicate()?;
        let end = End { ring, eventfd, producers: Producers::default() };
        Ok((Self { end: Arc::new(end) }, memfd, peer_eventfd))
    }

    /// Room for a record, or `None` and a drop counted.
    #[inline]
    pub fn reserve(&self, bytes: usize) -> Option<SharedReservation<'_>> {
        let reservation = self.try_reserve(bytes);
        if reservation.is_none() {
            self.count_dropped(1);
        }
        reservation
    }

    /// Reserves as [`Self::reserve`] without counting a failure: for callers that retry.
    #[inline]
    pub fn try_reserve(&self, bytes: usize) -> Option<SharedReservation<'_>> {
        if bytes > MEMFD_RECORD_BYTES_MAX {
            return None;
        }
        let End { ring, producers, .. } = &*self.end;
        let length = bytes as u32;
        let range = producers.take(
            layout::record_bytes(length),
            ring.data_bytes() as u64,
            &ring.consumer_page().position.0,
            &ring.producer_page().position.0,
            |position| {
                let [word, page_offset] = ring.header(position);
                // Relaxed: the position's release (A) orders it.
                word.store(length | BUSY_BIT, Ordering::Relaxed);
                page_offset.store(0, Ordering::Relaxed);
            },
        )?;
        Some(SharedReservation { end: &self.end, range, length })
    }

    /// Writes one record and wakes the reader if it asked. False: it did not fit, and a drop is counted.
    #[inline]
    pub fn write(&self, record: &[u8]) -> bool {
        let written = self.try_write(record);
        if !written {
            self.count_dropped(1);
        }
        written
    }

    /// Writes as [`Self::write`] without counting a failure: for callers that retry.
    #[inline]
    pub fn try_write(&self, record: &[u8]) -> bool {
        let Some(mut reservation) = self.try_reserve(record.len()) else {
            return false;
        };
        reservation.copy_from_slice(record);
        reservation.commit();
        true
    }

    /// Counts records that were attempted and given up.
    pub fn count_dropped(&self, records: u64) {
        let page = self.end.ring.producer_page();
        page.emitted.0.fetch_add(records, Ordering::Relaxed);
        // D: a reader that sees these drops, or later ones, sees them attempted.
        protocol::add(&page.dropped.0, records);
    }

    /// Wakes the reader whether or not it asked: after a record that cannot wait until the reader looks by itself.
    pub fn wake_reader(&self) {
        self.end.wake();
    }

    /// Records attempted, dropped ones included, by all producers.
    pub fn emitted(&self) -> u64 {
        self.end.ring.producer_page().emitted.0.load(Ordering::Relaxed)
    }

    /// Records that did not fit.
    pub fn dropped(&self) -> u64 {
        self.end.ring.producer_page().dropped.0.load(Ordering::Relaxed)
    }

    /// Records that the reader says it has consumed.
    pub fn consumed(&self) -> u64 {
        self.end.ring.consumer_page().consumed.0.load(Ordering::Relaxed)
    }

    /// Bytes of the data area.
    pub fn capacity_bytes(&self) -> usize {
        self.end.ring.data_bytes()
    }

    /// The eventfd that announces records to the reader.
    pub fn eventfd(&self) -> BorrowedFd<'_> {
        self.end.eventfd.as_fd()
    }
}

impl End {
    #[inline]
    fn notify(&self) {
        if protocol::take_wakeup(&self.ring.consumer_page().need_wakeup.0) {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        // Adding one to an open eventfd fails only when its counter is full, which is a wakeup as well.
        let woken = self.eventfd.notify();
        debug_assert!(woken.is_ok());
    }
}

/// Space for one record, filled in place. Dropping it, also by a panic, gives the record up.
///
/// The bytes are whatever the ring held: write all of them.
pub struct SharedReservation<'a> {
    end: &'a End,
    range: ProducerRange,
    length: u32,
}

impl SharedReservation<'_> {
    /// Lets the reader have the record, once it has those before, and wakes it if it asked.
    #[inline]
    pub fn commit(self) {
        // S2: the header's release (C) orders it.
        self.end.ring.producer_page().emitted.0.fetch_add(1, Ordering::Relaxed);
        self.finish(self.length);
        mem::forget(self);
    }

    /// Gives the record up, as dropping does.
    pub fn discard(self) {}

    /// Writes the final header; the range is not touched any more.
    #[inline]
    fn finish(&self, header: u32) {
        let [word, _] = self.end.ring.header(self.range.position);
        protocol::publish_header(word, header);
        self.end.producers.give_back(&self.range);
        let End { ring, .. } = self.end;
        let (from, bytes) = (self.range.position, layout::record_bytes(self.length));
        let consumer = &ring.consumer_page().position.0;
        if protocol::has_filled(consumer, from, from.wrapping_add(bytes), ring.data_bytes() as u64) {
            self.end.wake();
        } else {
            self.end.notify();
        }
    }

    #[inline]
    fn payload(&self) -> *mut u8 {
        // SAFETY: a record's eight bytes of header are mapped with it (M3).
        unsafe { self.end.ring.record(self.range.position).as_ptr().add(HEADER_BYTES) }
    }
}

impl Drop for SharedReservation<'_> {
    fn drop(&mut self) {
        self.finish(self.length | DISCARD_BIT);
    }
}

impl Deref for SharedReservation<'_> {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the range has `length` bytes behind the header, at most the data area: mapped (M3), this reservation's (S1).
        unsafe { slice::from_raw_parts(self.payload(), self.length as usize) }
    }
}

impl DerefMut for SharedReservation<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `&mut self` makes it exclusive.
        unsafe { slice::from_raw_parts_mut(self.payload(), self.length as usize) }
    }
}
