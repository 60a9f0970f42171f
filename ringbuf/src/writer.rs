//! The producer of a memfd ring.
//!
//! In: records of a local process. Out: the ring, read by a [`crate::Reader`] in another process. Held: the producer position
//! and counts, which are this side's alone, and the room that followed from the last consumer position seen.
//!
//! The kernel, with many producers, advances the producer position at reserve and marks the record busy. There is one
//! producer here, so the position is published at commit, and no header is ever seen busy. One release store covers a
//! whole batch. A writer that dies (or leaks a reservation) leaves nothing behind that stalls the reader.
//!
//! What must hold:
//! - **P1** bytes from the consumer position to `position` are the reader's. Those from there to a full ring are this
//!   writer's; a reader that follows the protocol does not read them;
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
use crate::sync::Ordering;
use crate::wakeup::EventFd;

/// Fills one ring, as its only producer.
///
/// Records are at most [`MEMFD_RECORD_BYTES_MAX`] bytes; a longer one never fits.
pub struct Writer {
    ring: RingMapping,
    eventfd: EventFd,
    position: u64,
    /// Bytes known to be free from `position` on, by a consumer position of the past: there may be more.
    room: u64,
    emitted: u64,
    dropped: u64,
}

impl Writer {
    /// Makes a ring. Returns its writer and what its reader needs: the sealed memfd, and the eventfd that announces records.
    pub fn create(data_bytes: usize, name: &str) -> Result<(Self, OwnedFd, OwnedFd), Error> {
        let (ring, memfd) = memfd::create(data_bytes, name)?;
        let eventfd = EventFd::new()?;
        let peer_eventfd = eventfd.duplicate()?;
        let writer = Self { ring, eventfd, position: 0, room: 0, emitted: 0, dropped: 0 };
        Ok((writer, memfd, peer_eventfd))
    }

    /// Room for a record, or `None` and a drop counted.
    #[inline]
    pub fn reserve(&mut self, bytes: usize) -> Option<Reservation<'_>> {
        if !self.batch().has_room(bytes) {
            self.count_dropped(1);
            return None;
        }
        self.try_reserve(bytes)
    }

    /// Reserves as [`Self::reserve`] without counting a failure: for callers that retry.
    #[inline]
    pub fn try_reserve(&mut self, bytes: usize) -> Option<Reservation<'_>> {
        let mut batch = self.batch();
        batch.push(bytes)?;
        Some(Reservation { batch, bytes })
    }

    /// Begins records that are published together.
    #[inline]
    pub fn batch(&mut self) -> Batch<'_> {
        let (position, room) = (self.position, self.room);
        Batch { writer: self, position, room, records: 0 }
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

    /// Writes as [`Self::write`] without counting a failure: for callers that retry.
    #[inline]
    pub fn try_write(&mut self, record: &[u8]) -> bool {
        let mut batch = self.batch();
        let written = batch.write(record);
        if written {
            batch.publish();
        }
        written
    }

    /// Writes records until one does not fit, then publishes them together and wakes the reader at most once.
    ///
    /// Returns how many were written. Those that did not fit are not counted as dropped: try them again, or say so by
    /// [`Self::count_dropped`].
    #[inline]
    pub fn write_batch<'a>(&mut self, records: impl IntoIterator<Item = &'a [u8]>) -> usize {
        let mut batch = self.batch();
        for record in records {
            if !batch.write(record) {
                break;
            }
        }
        batch.publish()
    }

    /// Counts records that were attempted and given up.
    pub fn count_dropped(&mut self, records: u64) {
        self.emitted += records;
        self.dropped += records;
        let page = self.ring.producer_page();
        page.emitted.0.store(self.emitted, Ordering::Relaxed);
        // D: a reader that sees these drops sees them attempted.
        protocol::publish(&page.dropped.0, self.dropped);
    }

    /// Wakes the reader if it asked for it; every publication does so already, and also when the ring fills.
    #[inline]
    pub fn notify(&self) {
        if protocol::take_wakeup(&self.ring.consumer_page().need_wakeup.0) {
            self.wake();
        }
    }

    /// Wakes the reader whether or not it asked: after a record that cannot wait until the reader looks by itself.
    #[inline]
    pub fn wake_reader(&self) {
        self.wake();
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
        self.room = self.look_for_room(self.position);
        self.room as usize
    }

    /// Bytes of the data area.
    pub fn capacity_bytes(&self) -> usize {
        self.ring.data_bytes()
    }

    /// The eventfd that announces records to the reader.
    pub fn eventfd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }

    /// Where the payload of the record at `position` goes.
    #[inline]
    fn payload(&self, position: u64) -> *mut u8 {
        // SAFETY: a record's eight bytes of header are mapped with it (M3).
        unsafe { self.ring.record(position).as_ptr().add(HEADER_BYTES) }
    }

    /// Bytes free behind `position` as of now; none when the consumer position makes no sense.
    #[inline]
    fn look_for_room(&self, position: u64) -> u64 {
        // B: what the reader read before it stored this position may be overwritten now.
        let consumer = protocol::observe(&self.ring.consumer_page().position.0);
        (self.ring.data_bytes() as u64).saturating_sub(position.wrapping_sub(consumer))
    }
}

/// Records that follow each other and are published together. Dropped instead, none of them was attempted.
pub struct Batch<'a> {
    writer: &'a mut Writer,
    /// Behind the batch.
    position: u64,
    /// Free bytes behind the batch, as the writer has it.
    room: u64,
    records: usize,
}

impl Batch<'_> {
    /// Adds a record, unless it does not fit.
    #[inline]
    pub fn write(&mut self, record: &[u8]) -> bool {
        let Some(payload) = self.push(record.len()) else {
            return false;
        };
        // SAFETY: `push` gave this many bytes (P1). The record is no part of them: no reference to the ring leaves this crate
        // but those that borrow the writer.
        unsafe { payload.copy_from_nonoverlapping(record.as_ptr(), record.len()) };
        true
    }

    /// Adds a record that the caller fills in place, unless it does not fit. The bytes are whatever the ring held: write all.
    #[inline]
    pub fn reserve(&mut self, bytes: usize) -> Option<&mut [u8]> {
        let payload = self.push(bytes)?;
        // SAFETY: `push` gave this many bytes, this writer's alone (P1), and the slice borrows it.
        Some(unsafe { slice::from_raw_parts_mut(payload, bytes) })
    }

    /// Lets the reader have the records and wakes it if it asked. Returns how many they are.
    #[inline]
    pub fn publish(self) -> usize {
        let Self { writer, position, room, records } = self;
        writer.room = room;
        if records == 0 {
            return 0;
        }
        let from = std::mem::replace(&mut writer.position, position);
        writer.emitted += records as u64;
        let page = writer.ring.producer_page();
        // P2: a reader that sees the position (A) sees its records attempted.
        page.emitted.0.store(writer.emitted, Ordering::Relaxed);
        protocol::publish(&page.position.0, position);
        let consumer = &writer.ring.consumer_page().position.0;
        if protocol::has_filled(consumer, from, position, writer.ring.data_bytes() as u64) {
            writer.wake();
        } else {
            writer.notify();
        }
        records
    }

    /// Whether a record of `bytes` fits; looks at the consumer only when it seems not to.
    #[inline]
    fn has_room(&mut self, bytes: usize) -> bool {
        if bytes > MEMFD_RECORD_BYTES_MAX {
            return false;
        }
        let needed = layout::record_bytes(bytes as u32);
        if self.room < needed {
            self.room = self.writer.look_for_room(self.position);
        }
        self.room >= needed
    }

    /// Writes the header of a record that fits, and moves behind it. Returns where its payload of `bytes` goes.
    #[inline]
    fn push(&mut self, bytes: usize) -> Option<*mut u8> {
        if !self.has_room(bytes) {
            return None;
        }
        let needed = layout::record_bytes(bytes as u32);
        let header = self.writer.ring.record(self.position);
        let payload = self.writer.payload(self.position);
        // SAFETY: room for the record was found, at most the whole data area: inside, as the overlap is as long (M3), aligned to
        // eight, and this writer's alone (P1). The position's release (A) orders it before the reader's look.
        unsafe { header.cast().write(layout::header(bytes as u32)) };
        self.position = self.position.wrapping_add(needed);
        self.room -= needed;
        self.records += 1;
        Some(payload)
    }
}

/// Space for one record, filled in place. Dropping it gives the space back: the record was never attempted.
///
/// The bytes are whatever the ring held: write all of them.
pub struct Reservation<'a> {
    batch: Batch<'a>,
    bytes: usize,
}

impl Reservation<'_> {
    /// Publishes the record and wakes the reader if it asked.
    #[inline]
    pub fn commit(self) {
        self.batch.publish();
    }

    /// Gives the space back, as dropping does.
    pub fn discard(self) {}

    #[inline]
    fn payload(&self) -> *mut u8 {
        // A batch of one record: it starts where the writer is.
        self.batch.writer.payload(self.batch.writer.position)
    }
}

impl Deref for Reservation<'_> {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: `push` gave this many bytes: mapped (M3), this writer's alone (P1), which is borrowed meanwhile.
        unsafe { slice::from_raw_parts(self.payload(), self.bytes) }
    }
}

impl DerefMut for Reservation<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `&mut self` makes it exclusive.
        unsafe { slice::from_raw_parts_mut(self.payload(), self.bytes) }
    }
}
