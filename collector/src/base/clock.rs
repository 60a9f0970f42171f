//! The clocks that events and frames are stamped with.

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_BOOTTIME`, nanoseconds.
pub fn boottime_ns() -> u64 {
    clock_ns(ClockId::Boottime)
}

/// `CLOCK_REALTIME`, nanoseconds.
pub fn realtime_ns() -> u64 {
    clock_ns(ClockId::Realtime)
}

fn clock_ns(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
