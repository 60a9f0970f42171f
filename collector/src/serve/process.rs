//! What the process itself uses.

use crate::base::metrics::{Metrics, raise};

/// Registers the metrics of the process.
///
/// # Errors
/// When two metrics have the same name.
pub fn register(metrics: &mut Metrics) -> Result<(), prometheus::Error> {
    let cpu_ms = metrics.counter("tapio_collector_cpu_milliseconds_total", "CPU time of this process")?;
    let rss_bytes = metrics.gauge("tapio_collector_resident_bytes", "Resident memory of this process")?;
    metrics.on_scrape(move || {
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        raise(&cpu_ms, cpu.tv_sec as u64 * 1000 + cpu.tv_nsec as u64 / 1_000_000);
        rss_bytes.set(resident_bytes() as i64);
    });
    Ok(())
}

/// Resident memory of this process: the second field of `/proc/self/statm`, in pages (proc(5)).
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|field| field.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
