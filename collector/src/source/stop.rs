//! Ends a source that waits on rings.

use std::sync::atomic::{AtomicBool, Ordering};

use tapio_ringbuf::EventFd;

/// Asks a source to end, and wakes it.
pub struct Stop {
    is_set: AtomicBool,
    eventfd: EventFd,
}

impl Stop {
    /// Makes a signal that is not set yet.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new() -> Result<Self, tapio_ringbuf::Error> {
        Ok(Self { is_set: AtomicBool::new(false), eventfd: EventFd::new()? })
    }

    /// Sets it. Release: pairs with the Acquire in [`Stop::is_set`].
    pub fn set(&self) {
        self.is_set.store(true, Ordering::Release);
        if let Err(error) = self.eventfd.notify() {
            tracing::warn!(%error, "cannot wake a source: it ends after its nap");
        }
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }

    /// What becomes readable when it is set.
    pub fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }
}
