//! The spool's thread: moves frames between outboxes and disk.
//!
//! In: outboxes, of earlier epochs and of the present one. Out: the same, with frames written or loaded. What must
//! hold: an epoch whose frames are on disk ends on this thread alone, so that nothing is written or read meanwhile. A
//! failed read is retried before its frames are given up.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::sync::Parker;

use super::Outbox;
use crate::base::metrics::Metrics;
use crate::outbox::spool::{SPOOL_BATCH_BYTES, Spool};

/// How often the thread looks when nobody wakes it.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long reading may fail before what is on disk is given up.
const READ_FAILURE_MAX: Duration = Duration::from_secs(30);

/// Moves frames between outboxes and disk for as long as the process lives. `bytes` is how much is on disk.
pub fn run(mut spool: Spool, outboxes: Vec<Arc<Outbox>>, parker: &Parker, bytes: &AtomicU64) {
    let mut failing_since: Option<Instant> = None;
    loop {
        let mut has_moved = false;
        let mut pending = Vec::new();
        for outbox in &outboxes {
            has_moved |= outbox.end_when_due(Some(&mut spool));
            let (epoch, seq, events) = outbox.standing();
            spool.acknowledged(epoch, seq, events);
            pending.extend(outbox.pending_closings());
            has_moved |= write(&mut spool, outbox);
            if let Some(from_seq) = outbox.wants_loaded() {
                has_moved |= load(&mut spool, outbox, from_seq, &mut failing_since);
            }
        }
        spool.forget_endings(&pending);
        bytes.store(spool.bytes(), Ordering::Relaxed);
        if !has_moved {
            parker.park_timeout(LOOK_INTERVAL);
        }
    }
}

/// Registers the metric of `bytes`.
///
/// # Errors
/// When two metrics have the same name.
pub fn register(bytes: &Arc<AtomicU64>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
    let gauge = metrics.gauge("tapio_collector_spool_bytes", "Bytes of the spool's files on disk")?;
    let bytes = Arc::clone(bytes);
    metrics.on_scrape(move || gauge.set(bytes.load(Ordering::Relaxed) as i64));
    Ok(())
}

/// Writes what belongs on disk. Whether anything was written.
fn write(spool: &mut Spool, outbox: &Outbox) -> bool {
    let frames = outbox.take_for_spool(spool.room_bytes());
    if frames.is_empty() {
        return false;
    }
    let written = if spool.has_room(&frames) { spool.append(&frames) } else { Err(io::ErrorKind::StorageFull.into()) };
    if let Err(error) = &written
        && error.kind() != io::ErrorKind::StorageFull
    {
        tracing::error!(%error, "cannot write the spool");
    }
    outbox.spooled(written.is_ok());
    written.is_ok()
}

/// Loads what the stream goes on with. Whether there was anything, or it is lost.
fn load(spool: &mut Spool, outbox: &Outbox, from_seq: u64, failing_since: &mut Option<Instant>) -> bool {
    match spool.read(outbox.epoch(), from_seq, SPOOL_BATCH_BYTES) {
        Ok(frames) => {
            *failing_since = None;
            outbox.loaded(frames);
            true
        }
        // A shortage of descriptors or memory passes; a file that is gone or damaged stays so.
        Err(error)
            if !matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::NotFound)
                && failing_since.is_none_or(|since| since.elapsed() < READ_FAILURE_MAX) =>
        {
            if failing_since.is_none() {
                tracing::warn!(%error, "cannot read the spool: retrying");
            }
            failing_since.get_or_insert_with(Instant::now);
            false
        }
        Err(error) => {
            *failing_since = None;
            let next = spool.next_whole(outbox.epoch(), from_seq);
            outbox.lost(from_seq, next, error.to_string());
            true
        }
    }
}
