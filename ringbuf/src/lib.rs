//! Shared-memory rings with the layout of the kernel's BPF ring buffer.
//!
//! In: a BPF ring buffer map, or a memfd that a local process fills. Out: records, opaque bytes, in the order in which they
//! were reserved. Held: the mappings; no thread, no queue.
//!
//! [`Reader`] drains either kind; [`Writer`] is the one producer of a memfd ring, a [`SharedWriter`] its many. [`Poller`],
//! [`EventFd`] and [`WakeupFlag`] are how a reader sleeps without a wakeup per record; [`CounterArray`] reads the probes' own
//! counts.
//!
//! To sleep and lose nothing, a reader in this order: raises the flag ([`Reader::set_need_wakeup`], for BPF rings
//! [`WakeupFlag::set`]), finds [`Reader::is_empty`] true, waits with a timeout, lowers the flag, drains. Why that
//! suffices is explained in `protocol.rs`, which also labels every pair of memory orderings.
//!
//! Trust. The kernel is trusted. The producer of a memfd ring is hostile until proven otherwise: it can change any byte
//! of the file at any time. So each shared word is loaded once and checked on that copy, loops are bounded by checked
//! values, and records are copied out before they are handed on. A [`Writer`] trusts its reader with its data, never
//! with its memory.

#[cfg(not(loom))]
mod counters;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
pub mod handover;
#[cfg(not(loom))]
pub mod layout;
#[cfg(not(loom))]
mod mapping;
#[cfg(not(loom))]
mod memfd;
#[cfg(not(loom))]
mod prefetch;
#[doc(hidden)]
pub mod producers;
#[doc(hidden)]
pub mod protocol;
#[cfg(not(loom))]
mod reader;
#[cfg(not(loom))]
mod shared_writer;
#[cfg(not(loom))]
mod stretch;
#[doc(hidden)]
pub mod sync;
#[cfg(not(loom))]
mod wakeup;
#[cfg(not(loom))]
mod writer;

#[cfg(not(loom))]
pub use {
    counters::CounterArray,
    error::{Corruption, Error, Refusal},
    memfd::Limits,
    prefetch::prefetch,
    producers::RESERVATIONS_MAX,
    reader::{Drained, ProducerCounters, Reader},
    shared_writer::{SharedReservation, SharedWriter},
    wakeup::{EventFd, Poller, WakeupFlag},
    writer::{Batch, Reservation, Writer},
};
