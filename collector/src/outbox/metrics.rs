//! The metrics of the outbox and of the ledger that it states.

use std::sync::Arc;

use tapio_wire::event::Source;

use crate::base::metrics::{Metrics, raise};
use crate::outbox::Outbox;

/// Registers them.
///
/// # Errors
/// When two metrics have the same name.
pub fn register(outbox: &Arc<Outbox>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
    let emitted = metrics.counters(
        "tapio_collector_events_emitted_total",
        "Events that sources produced, including undelivered ones",
        &["source"],
    )?;
    let shipped = metrics.counters("tapio_collector_events_shipped_total", "Events sent in frames", &["source"])?;
    let dropped = metrics.counters(
        "tapio_collector_events_dropped_total",
        "Events lost, by stage (where) and reason (why)",
        &["source", "stage", "reason"],
    )?;
    let held = metrics.gauges("tapio_collector_events_held", "Events held in rings, queues and outbox", &["source"])?;
    let outbox_bytes =
        metrics.gauge("tapio_collector_outbox_bytes", "Bytes of frames in the outbox, not yet acknowledged")?;
    let outbox_frames = metrics.gauge("tapio_collector_outbox_frames", "Frames in the outbox, not yet acknowledged")?;
    let outbox = Arc::clone(outbox);
    metrics.on_scrape(move || {
        let ledger = outbox.ledger();
        for source in Source::ALL {
            let account = ledger.account(source);
            raise(&emitted.with_label_values(&[source.name()]), account.emitted);
            raise(&shipped.with_label_values(&[source.name()]), account.shipped);
            held.with_label_values(&[source.name()]).set(account.held());
            for (stage, reason, count) in account.losses() {
                raise(&dropped.with_label_values(&[source.name(), stage.name(), reason.name()]), count);
            }
        }
        let (bytes, frames) = outbox.usage();
        outbox_bytes.set(bytes as i64);
        outbox_frames.set(frames as i64);
    });
    Ok(())
}
