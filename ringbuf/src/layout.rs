//! The bytes of a ring, as `kernel/bpf/ringbuf.c` lays them out, and what memfd rings add in bytes the kernel leaves unused.
//!
//! In memory, for a data area of `n` bytes (a power of two, a multiple of the page), mapped twice so that no record wraps:
//!
//! ```text
//!  ├── page ───┼── page ───┼── n ──────────────┼── n ──────────────┤
//!  │ consumer  │ producer  │ data              │ the same data     │
//!  └───────────┴───────────┴───────────────────┴───────────────────┘
//! ```
//!
//! A memfd holds the first three; a BPF map offers all four by mmap, and its reader takes of the fourth what the longest record
//! needs.
//!
//! Consumer page (a BPF ring has the position alone):    Producer page (likewise):
//!
//! ```text
//!    0  position           u64  bytes consumed             0  position    u64  bytes produced
//!   64  need_wakeup        u32  1: wake the reader        64  emitted     u64  records attempted, dropped ones included
//!  128  consumed           u64  records consumed         128  dropped     u64  records that did not fit
//!  192  accounted_dropped  u64  drops already declared   192  magic       u64  ┐
//!  256  unused                                           200  version     u32  │ written once, before
//!                                                        204  wakes       u32  │ the memfd is handed over
//!                                                        208  data_bytes  u64  ┘
//!                                                        216  unused
//! ```
//!
//! `wakes` is 1 where the writer wakes the reader, unasked, when the ring fills (`protocol.rs`), else 0.
//!
//! Words that are written at different rates sit on cache lines of their own.
//!
//! A record starts at a multiple of eight; the next one starts where it ends, rounded up to eight:
//!
//! ```text
//!  0     30 31     32              64
//!  ├──────┬──┬──┬───┼───────────────┼────────── … ──┬───────────┤
//!  │ len  │D │B │   │ page offset   │ payload, len  │ 0–7 bytes │
//!  └──────┴──┴──┘   └───────────────┴────────── … ──┴───────────┘
//!   bits: len 0–29, D discard 30, B busy 31; the page offset serves the kernel alone
//! ```
//!
//! Positions count bytes and only grow; the offset of a position is its remainder by `n`.

use std::mem::{offset_of, size_of};
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Set in a header's length while the record is reserved and not yet committed: `BPF_RINGBUF_BUSY_BIT`.
pub const BUSY_BIT: u32 = 1 << 31;
/// Set in a header's length when the record was given up: `BPF_RINGBUF_DISCARD_BIT`.
pub const DISCARD_BIT: u32 = 1 << 30;
/// The bits of a header's length that are the length.
pub const LENGTH_MASK: u32 = !(BUSY_BIT | DISCARD_BIT);
/// Bytes before each payload: `BPF_RINGBUF_HDR_SZ`.
pub const HEADER_BYTES: usize = 8;
/// Records start at multiples of this.
pub const RECORD_ALIGN: usize = 8;
/// The largest record that a [`crate::Writer`] takes: the reader copies records of memfd rings, into a buffer of this size
/// unless its [`crate::Limits`] say less.
pub const MEMFD_RECORD_BYTES_MAX: usize = 4096;
/// First word of a memfd ring's identity.
pub const MAGIC: u64 = u64::from_le_bytes(*b"tapioRB\0");
/// Version of the layout of a memfd ring.
pub const VERSION: u32 = 1;

/// A word alone on its cache line.
#[repr(C, align(64))]
pub(crate) struct Line<T>(pub T);

/// The page that the reader writes.
#[repr(C)]
pub(crate) struct ConsumerPage {
    pub position: Line<AtomicU64>,
    pub need_wakeup: Line<AtomicU32>,
    pub consumed: Line<AtomicU64>,
    pub accounted_dropped: Line<AtomicU64>,
}

/// The page that the writer writes.
#[repr(C)]
pub(crate) struct ProducerPage {
    pub position: Line<AtomicU64>,
    pub emitted: Line<AtomicU64>,
    pub dropped: Line<AtomicU64>,
    pub identity: Line<Identity>,
}

/// Marks a memfd as a ring.
#[repr(C)]
pub(crate) struct Identity {
    pub magic: AtomicU64,
    pub version: AtomicU32,
    pub wakes: AtomicU32,
    pub data_bytes: AtomicU64,
}

const _: () = {
    assert!(offset_of!(ConsumerPage, position) == 0);
    assert!(offset_of!(ConsumerPage, need_wakeup) == 64);
    assert!(offset_of!(ConsumerPage, consumed) == 128);
    assert!(offset_of!(ConsumerPage, accounted_dropped) == 192);
    assert!(size_of::<ConsumerPage>() == 256);
    assert!(offset_of!(ProducerPage, position) == 0);
    assert!(offset_of!(ProducerPage, emitted) == 64);
    assert!(offset_of!(ProducerPage, dropped) == 128);
    assert!(offset_of!(ProducerPage, identity) == 192);
    assert!(offset_of!(Identity, magic) == 0);
    assert!(offset_of!(Identity, version) == 8);
    assert!(offset_of!(Identity, wakes) == 12);
    assert!(offset_of!(Identity, data_bytes) == 16);
    assert!(size_of::<ProducerPage>() == 256);
    assert!(HEADER_BYTES == size_of::<u64>() && RECORD_ALIGN == HEADER_BYTES);
    assert!(MEMFD_RECORD_BYTES_MAX.is_multiple_of(RECORD_ALIGN) && MEMFD_RECORD_BYTES_MAX <= LENGTH_MASK as usize);
    // The kernel's positions are `unsigned long`; this crate loads them as u64.
    assert!(size_of::<usize>() == size_of::<u64>());
};

/// Bytes that a payload of `length` bytes takes in the ring, its header included.
#[inline]
pub(crate) const fn record_bytes(length: u32) -> u64 {
    // Without the question whether it is a multiple already.
    (length as u64 + (HEADER_BYTES + RECORD_ALIGN - 1) as u64) & !(RECORD_ALIGN as u64 - 1)
}

/// The header of a committed record, as it lies in memory.
#[inline]
pub(crate) const fn header(length: u32) -> u64 {
    let [a, b, c, d] = length.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0])
}

/// The half of a header that is its length.
#[inline]
pub(crate) fn length_word(header: &AtomicU64) -> &AtomicU32 {
    // SAFETY: the first four of eight bytes, which a u32 may be at; atomics take any bits (M4).
    unsafe { &*ptr::from_ref(header).cast() }
}

/// Whether a ring can have a data area of this size.
pub(crate) const fn is_data_size(data_bytes: usize, page_bytes: usize) -> bool {
    data_bytes.is_power_of_two() && data_bytes >= page_bytes && data_bytes <= LENGTH_MASK as usize + 1
}

#[cfg(test)]
mod tests {
    use super::{is_data_size, record_bytes};

    #[test]
    fn records_are_rounded_up_to_eight_with_their_header() {
        assert_eq!([0, 1, 8, 9, 64].map(record_bytes), [8, 16, 16, 24, 72]);
        assert_eq!(record_bytes(super::LENGTH_MASK), (1 << 30) + 8);
    }

    #[test]
    fn data_areas_are_powers_of_two_from_a_page() {
        assert!(is_data_size(4096, 4096) && is_data_size(1 << 30, 4096));
        for wrong in [0, 1, 2048, 4097, 12288, 1 << 31] {
            assert!(!is_data_size(wrong, 4096), "{wrong}");
        }
    }
}
