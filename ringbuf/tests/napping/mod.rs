//! A reader that asks for nothing, whichever writer fills its ring.

use std::time::Duration;

use tapio_ringbuf::{Poller, Reader};

/// Writes until the poller is woken, which must be between a quarter and three eighths of the ring, then drains it.
pub fn fill_until_woken(reader: &mut Reader, poller: &mut Poller, mut write: impl FnMut() -> bool) {
    while poller.wait(Some(Duration::ZERO)).unwrap().is_empty() {
        assert!(write(), "the ring is full, and nobody was woken");
    }
    let (unread, capacity) = (reader.pending_bytes(), reader.capacity_bytes());
    assert!((capacity / 4..=capacity * 3 / 8).contains(&unread), "woken with {unread} of {capacity} bytes unread");
    reader.drain(usize::MAX, |_| {}).unwrap();
}
