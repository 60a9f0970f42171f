//! The clock of records and events.

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_BOOTTIME`, nanoseconds.
#[inline]
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
