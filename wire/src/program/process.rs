//! What this process itself uses.

use rustix::time::{ClockId, clock_gettime};

/// Resident memory in bytes: the second field of `/proc/self/statm`, in pages (proc(5)). 0 where it cannot be read.
pub fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|field| field.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// CPU time of all threads, milliseconds.
pub fn cpu_ms() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}
