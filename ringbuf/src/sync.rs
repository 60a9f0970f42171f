//! The atomics and cells of the protocol and of the producers: those of std, or of loom when a model is checked.

#[cfg(loom)]
pub use loom::cell::UnsafeCell as SharedCell;
#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Waits a moment for another thread, which may need this processor when it was `long`.
#[inline]
pub fn pause(long: bool) {
    #[cfg(loom)]
    {
        let _ = long;
        loom::thread::yield_now();
    }
    #[cfg(not(loom))]
    if long {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

/// std's `UnsafeCell` by loom's interface.
#[cfg(not(loom))]
pub struct SharedCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> SharedCell<T> {
    pub fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    #[inline]
    pub fn with_mut<R>(&self, access: impl FnOnce(*mut T) -> R) -> R {
        access(self.0.get())
    }
}
