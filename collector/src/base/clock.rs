//! The clocks that events and frames are stamped with.

use rustix::time::{ClockId, clock_gettime};
pub use tapio_probes::clock::boottime_ns;

/// `CLOCK_REALTIME`, nanoseconds.
pub fn realtime_ns() -> u64 {
    let time = clock_gettime(ClockId::Realtime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
