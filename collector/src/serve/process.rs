//! What the process itself uses.

use tapio_wire::program::process;

use crate::base::metrics::{Metrics, raise};

/// Registers the metrics of the process.
///
/// # Errors
/// When two metrics have the same name.
pub fn register(metrics: &mut Metrics) -> Result<(), prometheus::Error> {
    let cpu_ms = metrics.counter("tapio_collector_cpu_milliseconds_total", "CPU time of this process")?;
    let rss_bytes = metrics.gauge("tapio_collector_resident_bytes", "Resident memory of this process")?;
    metrics.on_scrape(move || {
        raise(&cpu_ms, process::cpu_ms());
        rss_bytes.set(process::resident_bytes() as i64);
    });
    Ok(())
}
