//! How the two sides of a ring talk: every shared word that orders anything is loaded and stored here.
//!
//! In: references to the shared words. Out: positions and the answer to "must I wake the reader?". Held: nothing; the
//! functions are the protocol, so that the loom model (`tests/loom.rs`) checks the code that runs.
//!
//! Pairs, by label; what comes before the release is seen after the acquire:
//!
//! | label | release side | acquire side | protects |
//! |---|---|---|---|
//! | A | producer position, [`publish`] by the writer, `smp_store_release` in the kernel's `__bpf_ringbuf_reserve` | [`observe`] by the reader | headers (and, in memfd rings, payloads) below the position |
//! | B | consumer position, [`publish`] by the reader | [`observe`] by the writer, `smp_load_acquire` in the kernel's `__bpf_ringbuf_reserve` | the space below the position: it is reused only after the last read of it |
//! | C | header length, [`publish_header`] by one of many producers, `xchg` in the kernel's `bpf_ringbuf_commit` | [`observe_header`] by the reader | the payload of that record |
//! | D | `dropped`, [`publish`] by the writer, [`add`] by one of many producers | [`observe`] by the reader | `emitted`: a drop that is seen was seen attempted |
//! | W | SeqCst fence in [`request_wakeup`], reader | SeqCst fence in [`take_wakeup`], writer | no lost wakeup, see below |
//!
//! `producers.rs` explains how many producers share a ring's end, with the labels L and P.
//!
//! Wakeups. The reader stores the flag, fences, and looks at the producer position once more before it sleeps. The
//! writer stores the producer position (one of many: the header), fences, and looks at the flag. One of two SeqCst
//! fences is first. If it is the reader's, the writer sees the flag and wakes. If it is the writer's, the reader sees
//! the position and does not sleep.
//!
//! A reader that naps does not set the flag, and is woken when the ring fills. Each publication wakes it that brings
//! the producer position past another eighth of the ring while at least a quarter is unread ([`has_filled`]). So it is
//! woken before three eighths are unread.

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// Lets the other side see `value` and what was done before: release of A, B and D.
#[inline]
pub fn publish(word: &AtomicU64, value: u64) {
    word.store(value, Ordering::Release);
}

/// What the other side last published: acquire of A, B and D.
#[inline]
pub fn observe(word: &AtomicU64) -> u64 {
    word.load(Ordering::Acquire)
}

/// Adds to a count that several producers share: release of D. An addition that is seen shows those before it as well.
#[inline]
pub fn add(word: &AtomicU64, value: u64) {
    word.fetch_add(value, Ordering::Release);
}

/// Lets the reader have a record of many producers, or skip it: release of C.
#[inline]
pub fn publish_header(word: &AtomicU32, header: u32) {
    word.store(header, Ordering::Release);
}

/// The length word of a record's header: acquire of C.
#[inline]
pub fn observe_header(word: &AtomicU32) -> u32 {
    word.load(Ordering::Acquire)
}

/// Reader: asks to be woken, or no longer. After asking, the caller must look for records again before it sleeps (W).
#[inline]
pub fn request_wakeup(flag: &AtomicU32, wanted: bool) {
    flag.store(u32::from(wanted), Ordering::Relaxed);
    if wanted {
        // W: the store above comes before the caller's next look at the producer position.
        fence(Ordering::SeqCst);
    }
}

/// Writer, after it has moved the producer position from `from` to `to`: whether a reader that naps is to be woken, since enough is
/// unread. `consumer` is looked at once every eighth of the ring.
#[inline]
pub fn has_filled(consumer: &AtomicU64, from: u64, to: u64, capacity_bytes: u64) -> bool {
    // A power of two of at least a page.
    let eighth = capacity_bytes / 8;
    // One of many producers may find itself overtaken by the reader.
    (from ^ to) & !(eighth - 1) != 0 && (2 * eighth..=capacity_bytes).contains(&to.wrapping_sub(observe(consumer)))
}

/// Writer, after [`publish`]: whether the reader asked to be woken; takes the request, so one publication answers it.
#[inline]
pub fn take_wakeup(flag: &AtomicU32) -> bool {
    // W: the publication comes before this look at the flag.
    fence(Ordering::SeqCst);
    if flag.load(Ordering::Relaxed) == 0 {
        return false;
    }
    // A store suffices: should it overtake a newer request, the wakeup that follows answers that one too. It comes before
    // the wakeup, so a request made after waking stays.
    flag.store(0, Ordering::Relaxed);
    true
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{AtomicU64, has_filled};

    #[test]
    fn a_producer_that_the_reader_has_overtaken_wakes_nobody() {
        let (consumer, eighth) = (AtomicU64::new(5000), 512);
        assert!(has_filled(&consumer, 6100, 6200, 8 * eighth), "1,200 of 4,096 bytes, past the twelfth eighth");
        assert!(!has_filled(&consumer, 6150, 6200, 8 * eighth), "past none");
        assert!(!has_filled(&consumer, 5600, 5700, 8 * eighth), "700 bytes");
        assert!(!has_filled(&consumer, 4600, 4700, 8 * eighth), "read already");
    }
}
