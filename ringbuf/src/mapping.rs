//! Memory shared with the kernel or with another process.
//!
//! In: a descriptor. Out: atomics, typed pages, and pointers into the data area. Held: the address ranges, unmapped on drop.
//!
//! What must hold, and all that the `unsafe` of this crate rests on:
//! - **M1** a [`Mapping`] owns `[base, base + bytes)`, page-aligned and mapped from its creation to its drop;
//! - **M2** the file behind it cannot shrink meanwhile: BPF maps have a fixed size, memfds are sealed before they are mapped;
//! - **M3** behind the data area of a [`RingMapping`] its first `overlap_bytes` (a page or more) are mapped once more.
//!   So that many bytes from any offset below `data_bytes` are inside the mapping;
//! - **M4** memory that another process may write is accessed by atomics alone, except where the ring's protocol gives the
//!   range to this side.

use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::slice;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::layout::{ConsumerPage, HEADER_BYTES, ProducerPage, RECORD_ALIGN};
use crate::sync::{AtomicU32, AtomicU64};

/// What the mapped memory is used for.
#[derive(Clone, Copy)]
pub(crate) enum Access {
    Read,
    Write,
}

impl Access {
    fn protection(self) -> ProtFlags {
        match self {
            Self::Read => ProtFlags::READ,
            Self::Write => ProtFlags::READ | ProtFlags::WRITE,
        }
    }
}

/// An owned range of mapped pages.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; M1 holds wherever it is dropped.
unsafe impl Send for Mapping {}
// SAFETY: shared references give out atomics alone (M4); other access is unsafe and argued where it happens.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` of `fd` from `offset`, shared.
    pub fn shared(fd: BorrowedFd<'_>, offset: u64, bytes: usize, access: Access) -> Result<Self, Errno> {
        // SAFETY: no address is asked for, so the kernel picks a free range: no memory in use is replaced.
        let base =
            unsafe { rustix::mm::mmap(ptr::null_mut(), bytes, access.protection(), MapFlags::SHARED, fd, offset) }?;
        Self::own(base, bytes)
    }

    /// Reserves addresses that [`Self::place`] fills.
    fn reserve(bytes: usize) -> Result<Self, Errno> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: as in `shared`.
        let base = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), bytes, ProtFlags::empty(), flags) }?;
        Self::own(base, bytes)
    }

    fn own(base: *mut c_void, bytes: usize) -> Result<Self, Errno> {
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { base, bytes })
    }

    /// Maps a file over the part of this range that starts at `at`.
    fn place(&mut self, at: usize, fd: BorrowedFd<'_>, offset: u64, bytes: usize, access: Access) -> Result<(), Errno> {
        assert!(at.checked_add(bytes).is_some_and(|end| end <= self.bytes));
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the assertion keeps `at` inside of the range that this value owns (M1).
        let address = unsafe { self.base.as_ptr().add(at) };
        // SAFETY: only pages that this value owns are replaced, and `&mut self` says that none is borrowed.
        unsafe { rustix::mm::mmap(address.cast(), bytes, access.protection(), flags, fd, offset) }?;
        Ok(())
    }

    /// The u32 at a byte offset. Panics when it is outside or misaligned.
    pub fn word32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: `word` checked bounds and alignment; any bits are a valid AtomicU32, borrowed no longer than the mapping.
        unsafe { self.word::<AtomicU32>(offset).as_ref() }
    }

    /// The u64 at a byte offset. Panics when it is outside or misaligned.
    pub fn word64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as for `word32`.
        unsafe { self.word::<AtomicU64>(offset).as_ref() }
    }

    #[inline]
    fn word<T>(&self, offset: usize) -> NonNull<T> {
        let fits = offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.bytes);
        assert!(fits && offset.is_multiple_of(align_of::<T>()), "offset {offset} of {} bytes", self.bytes);
        // SAFETY: `fits` keeps it inside of the range that this value owns (M1).
        unsafe { self.base.add(offset) }.cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is owned (M1) and references to it have ended with the borrow of this value.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of an owned range");
    }
}

/// A ring's consumer page, producer page, data area and overlap: the data area's beginning, or all of it, once more.
pub(crate) struct RingMapping {
    consumer: Mapping,
    /// Producer page, data, overlap.
    producer: Mapping,
    page_bytes: usize,
    data_bytes: usize,
    overlap_bytes: usize,
}

impl RingMapping {
    /// Maps a BPF ring buffer: the kernel allows writing to the consumer page alone and doubles the data by itself.
    ///
    /// Maps only as much of the second half as a record of `record_bytes_max` at the end of the first one needs. The
    /// kernel fills the page table at once, and counts a page as resident as often as it is mapped.
    pub fn of_bpf_map(map: BorrowedFd<'_>, data_bytes: usize, record_bytes_max: usize) -> Result<Self, Errno> {
        let page_bytes = rustix::param::page_size();
        let record_bytes_max = record_bytes_max.min(data_bytes - HEADER_BYTES);
        let overlap_bytes = (HEADER_BYTES + record_bytes_max).next_multiple_of(page_bytes);
        let consumer = Mapping::shared(map, 0, page_bytes, Access::Write)?;
        let bytes = page_bytes + data_bytes + overlap_bytes;
        let producer = Mapping::shared(map, page_bytes as u64, bytes, Access::Read)?;
        Ok(Self { consumer, producer, page_bytes, data_bytes, overlap_bytes })
    }

    /// Maps a memfd whose size, two pages and `data_bytes`, is checked and sealed (M2).
    pub fn of_memfd(memfd: BorrowedFd<'_>, data_bytes: usize, producer_access: Access) -> Result<Self, Errno> {
        let page_bytes = rustix::param::page_size();
        let consumer = Mapping::shared(memfd, 0, page_bytes, Access::Write)?;
        let mut producer = Mapping::reserve(page_bytes + 2 * data_bytes)?;
        producer.place(0, memfd, page_bytes as u64, page_bytes + data_bytes, producer_access)?;
        producer.place(page_bytes + data_bytes, memfd, 2 * page_bytes as u64, data_bytes, producer_access)?;
        Ok(Self { consumer, producer, page_bytes, data_bytes, overlap_bytes: data_bytes })
    }

    /// The longest record that is handed out in place: wherever it starts, it is inside.
    pub fn record_bytes_max(&self) -> u32 {
        (self.overlap_bytes - HEADER_BYTES) as u32
    }

    pub fn data_bytes(&self) -> usize {
        self.data_bytes
    }

    #[inline]
    pub fn consumer_page(&self) -> &ConsumerPage {
        // SAFETY: a page, aligned to one, holds the struct, which is all atomics: any bits are valid (M1, M4).
        unsafe { self.consumer.word::<ConsumerPage>(0).as_ref() }
    }

    #[inline]
    pub fn producer_page(&self) -> &ProducerPage {
        // SAFETY: as for the consumer page.
        unsafe { self.producer.word::<ProducerPage>(0).as_ref() }
    }

    /// The first byte of the data area; it and the overlap follow (M3).
    #[inline]
    pub fn data(&self) -> NonNull<u8> {
        // SAFETY: every constructor maps the producer page, the data area and the overlap here (M1).
        unsafe { self.producer.base.add(self.page_bytes) }
    }

    /// The record at `position`, rounded down to eight: as many bytes as the overlap has follow (M3).
    #[inline]
    pub fn record(&self, position: u64) -> NonNull<u8> {
        // The size is a power of two and a multiple of eight.
        let offset = (position & (self.data_bytes as u64 - RECORD_ALIGN as u64)) as usize;
        // SAFETY: `offset` is below `data_bytes`, and so inside (M3).
        unsafe { self.data().add(offset) }
    }

    /// The length and the page offset of the record at `position`.
    #[inline]
    pub fn header(&self, position: u64) -> &[AtomicU32; 2] {
        // SAFETY: it is aligned to eight and the overlap, a page or more, follows (M3); atomics take any bits (M4).
        unsafe { self.record(position).cast().as_ref() }
    }

    /// The words from `position` on, `bytes` or as many as the overlap has: the whole data area of a memfd ring.
    #[inline]
    pub fn words(&self, position: u64, bytes: u64) -> &[AtomicU64] {
        let words = bytes.min(self.overlap_bytes as u64) as usize / size_of::<AtomicU64>();
        // SAFETY: the overlap's size follows a record's start, mapped (M3) and aligned to eight; atomics take any bits (M4).
        unsafe { slice::from_raw_parts(self.record(position).as_ptr().cast(), words) }
    }
}
