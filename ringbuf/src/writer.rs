//! The producer of a memfd ring.
//!
//! In: records of a local process. Out: the ring, read by a [`crate::Reader`] in another process. Held: the producer position
//! and counts, which are this side's alone, and the last consumer position seen.
//!
//! The kernel, with many producers, advances the producer position at reserve and marks the record busy. There is one
//! producer here, so the position is published at commit: no header is ever seen busy, one release store covers a whole
//! batch, and a writer that dies (or leaks a reservation) leaves nothing behind that stalls the reader.
//!
//! What must hold:
//! - **P1** bytes from the consumer position to `position` are the reader's; those from there to a full ring are this
//!   writer's, and a reader that keeps to the protocol does not look at them;
//! - **P2** `emitted = dropped + records published`, at every publication of a position.
//!
//! The consumer position is the peer's word: a wrong one can lose records, never reach memory outside of the data area.

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::slice;

use crate::error::Error;
use crate::layout::{self, HEADER_BYTES, MEMFD_RECORD_BYTES_MAX};
use crate::mapping::RingMapping;
use crate::memfd;
use crate::protocol;
use crate::sync::{AtomicU32, Ordering};
use crate::wakeup::EventFd;

/// Fills one ring, as its only producer.
///
/// Records are at most [`MEMFD_RECORD_BYTES_MAX`] bytes; a longer one never fits.
pub struct Writer {
    ring: RingMapping,
    eventfd: EventFd,
    position: u64,
    /// A consumer position of the past: the true one may be further, so room is at least what follows from it.
    consumer_seen: u64,
    emitted: u64,
    dropped: u64,
}

impl Writer {
    /// Makes a ring. Returns its writer and what its reader needs: the sealed memfd, and the eventfd that tells of records.
    pub fn create(data_bytes: usize, name: &str) -> Result<(Self, OwnedFd, OwnedFd), Error> {
        let (ring, memfd) = memfd::create(data_bytes, name)?;
        let eventfd = EventFd::new()?;
        let peer_eventfd = eventfd.duplicate()?;
        let writer = Self { ring, eventfd, position: 0, consumer_seen: 0, emitted: 0, dropped: 0 };
        Ok((writer, memfd, peer_eventfd))
    }

    /// Room for a record, or `None` and a drop counted.
    #[inline]
    pub fn reserve(&mut self, bytes: usize) -> Option<Reservation<'_>> {
        match self.make_room(self.position, bytes) {
            Some(length) => Some(Reservation { writer: self, length }),
            None => {
                self.count_dropped(1);
                None
            }
        }
    }

    /// As [`Self::reserve`], counting nothing: for callers that will try again.
    #[inline]
    pub fn try_reserve(&mut self, bytes: usize) -> Option<Reservation<'_>> {
        let length = self.make_room(self.position, bytes)?;
        Some(Reservation { writer: self, length })
    }

    /// Writes one record and wakes the reader if it asked. False: it did not fit, and a drop is counted.
    #[inline]
    pub fn write(&mut self, record: &[u8]) -> bool {
        let written = self.try_write(record);
        if !written {
            self.count_dropped(1);
        }
        written
    }

    /// As [`Self::write`], counting nothing when it does not fit: for callers that will try again.
    #[inline]
    pub fn try_write(&mut self, record: &[u8]) -> bool {
        let Some(length) = self.make_room(self.position, record.len()) else {
            return false;
        };
        let position = self.put(self.position, record, length);
        self.publish(position, 1);
        true
    }

    /// Writes records until one does not fit, then publishes them together and wakes the reader at most once.
    ///
    /// Returns how many were written. Those that did not fit are not counted as dropped: try them again, or say so by
    /// [`Self::count_dropped`].
    #[inline]
    pub fn write_batch<'a>(&mut self, records: impl IntoIterator<Item = &'a [u8]>) -> usize {
        let mut position = self.position;
        let mut written = 0;
        for record in records {
            let Some(length) = self.make_room(position, record.len()) else {
                break;
            };
            position = self.put(position, record, length);
            written += 1;
        }
        if written > 0 {
            self.publish(position, written as u64);
        }
        written
    }

    /// Counts records that were attempted and given up.
    pub fn count_dropped(&mut self, records: u64) {
        self.emitted += records;
        self.dropped += records;
        let page = self.ring.producer_page();
        page.emitted.0.store(self.emitted, Ordering::Relaxed);
        // D: whoever sees these drops sees them attempted.
        protocol::publish(&page.dropped.0, self.dropped);
    }

    /// Wakes the reader if it asked for it; every publication does so already.
    #[inline]
    pub fn notify(&self) {
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

    /// Records attempted, dropped ones included.
    pub fn emitted(&self) -> u64 {
        self.emitted
    }

    /// Records that did not fit.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Records that the reader says it has consumed.
    pub fn consumed(&self) -> u64 {
        self.ring.consumer_page().consumed.0.load(Ordering::Relaxed)
    }

    /// Bytes free, as of now; a record takes its length and eight, rounded up to eight.
    pub fn room_bytes(&mut self) -> usize {
        self.consumer_seen = protocol::observe(&self.ring.consumer_page().position.0);
        self.room_after(self.position) as usize
    }

    /// Bytes of the data area.
    pub fn capacity_bytes(&self) -> usize {
        self.ring.data_bytes()
    }

    /// The eventfd that tells the reader of records.
    pub fn eventfd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }

    /// Bytes free behind `position`, by the consumer position last seen; none when that one makes no sense.
    #[inline]
    fn room_after(&self, position: u64) -> u64 {
        (self.ring.data_bytes() as u64).saturating_sub(position.wrapping_sub(self.consumer_seen))
    }

    /// The length for the header if a record of `bytes` fits at `position`; looks at the consumer only when it seems not to.
    #[inline]
    fn make_room(&mut self, position: u64, bytes: usize) -> Option<u32> {
        if bytes > MEMFD_RECORD_BYTES_MAX {
            return None;
        }
        let length = bytes as u32;
        let needed = layout::record_bytes(length);
        if self.room_after(position) < needed {
            // B: what the reader read before it stored this position may be overwritten now.
            self.consumer_seen = protocol::observe(&self.ring.consumer_page().position.0);
            if self.room_after(position) < needed {
                return None;
            }
        }
        Some(length)
    }

    /// Where the payload of the record at `position` goes.
    #[inline]
    fn payload(&self, position: u64) -> *mut u8 {
        let offset = (position & (self.ring.data_bytes() as u64 - 1)) as usize;
        // SAFETY: `offset` is below `data_bytes` and eight more are mapped behind (M3).
        unsafe { self.ring.data().as_ptr().add(offset + HEADER_BYTES) }
    }

    /// Writes the header of the record at `position` and returns the position behind it.
    #[inline]
    fn put_header(&mut self, position: u64, length: u32) -> u64 {
        // SAFETY: the header is right before its payload.
        let header = unsafe { self.payload(position).sub(HEADER_BYTES) }.cast::<AtomicU32>();
        // SAFETY: positions are multiples of eight and two u32 fit there, mapped (M3); atomics take any bits (M4).
        let [word, page_offset] = unsafe { &*header.cast::<[AtomicU32; 2]>() };
        // Relaxed: the position's release (A) orders it.
        word.store(length, Ordering::Relaxed);
        page_offset.store(0, Ordering::Relaxed);
        position.wrapping_add(layout::record_bytes(length))
    }

    /// Writes a record at `position`, where `make_room` found room, and returns the position behind it.
    #[inline]
    fn put(&mut self, position: u64, record: &[u8], length: u32) -> u64 {
        let payload = self.payload(position);
        // SAFETY: room for the record was found, at most the whole data area: inside of the doubled mapping (M3) and this
        // writer's alone (P1). The record is no part of it: no reference to the ring leaves this crate but a reservation,
        // which borrows the writer.
        unsafe { payload.copy_from_nonoverlapping(record.as_ptr(), record.len()) };
        self.put_header(position, length)
    }

    /// Makes everything below `position`, `records` more than before, the reader's.
    #[inline]
    fn publish(&mut self, position: u64, records: u64) {
        self.position = position;
        self.emitted += records;
        let page = self.ring.producer_page();
        // P2: whoever sees the position (A) sees its records attempted.
        page.emitted.0.store(self.emitted, Ordering::Relaxed);
        protocol::publish(&page.position.0, position);
        self.notify();
    }
}

/// Space for one record, filled in place. Dropping it gives the space back: the record was never attempted.
///
/// The bytes are whatever the ring held: write all of them.
pub struct Reservation<'a> {
    writer: &'a mut Writer,
    length: u32,
}

impl Reservation<'_> {
    /// Publishes the record and wakes the reader if it asked.
    #[inline]
    pub fn commit(self) {
        let position = self.writer.put_header(self.writer.position, self.length);
        self.writer.publish(position, 1);
    }

    /// Gives the space back, as dropping does.
    pub fn discard(self) {}
}

impl Deref for Reservation<'_> {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        let payload = self.writer.payload(self.writer.position);
        // SAFETY: room for `length` bytes was found: mapped (M3), this writer's alone (P1), which is borrowed meanwhile.
        unsafe { slice::from_raw_parts(payload, self.length as usize) }
    }
}

impl DerefMut for Reservation<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        let payload = self.writer.payload(self.writer.position);
        // SAFETY: as for `deref`, and `&mut self` makes it exclusive.
        unsafe { slice::from_raw_parts_mut(payload, self.length as usize) }
    }
}
