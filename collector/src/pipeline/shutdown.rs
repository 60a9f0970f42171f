//! The shutdown: from left to right, each step within what is left of the time.

use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use super::Pipeline;

/// How long a shutdown may take before what is left is given up.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);
/// Drain timeout if the server refuses this collector: no frame will be acknowledged, however long it waits.
const DRAIN_TIMEOUT_REFUSED: Duration = Duration::from_secs(1);
/// Drain timeout if a spool takes what is left, and the limit of that spooling: together within 25 s.
const DRAIN_TIMEOUT_SPOOL: Duration = Duration::from_secs(10);
const FLUSH_TIMEOUT: Duration = Duration::from_secs(8);

impl Pipeline {
    /// Drains and ends. True when everything was acknowledged.
    pub async fn shutdown(self) -> bool {
        let has_spool = self.outbox.has_spool();
        let limit = match (self.ship.is_refused(), has_spool) {
            (true, _) => DRAIN_TIMEOUT_REFUSED,
            (false, true) => DRAIN_TIMEOUT_SPOOL,
            (false, false) => DRAIN_TIMEOUT,
        };
        let deadline = tokio::time::Instant::now() + limit;
        self.sources.stop();
        let (sources, tasks, packer) = (self.sources.threads, self.sources.tasks, self.packer);
        let runtime = tokio::runtime::Handle::current();
        let (sources_ended, queues) = (self.sources_ended, self.queues);
        let drained = tokio::task::spawn_blocking(move || {
            for source in sources {
                join(source);
            }
            for task in tasks {
                if runtime.block_on(task).is_err_and(|error| error.is_panic()) {
                    tracing::error!("a source panicked");
                }
            }
            sources_ended.store(true, Ordering::Release);
            queues.wake_packer();
            join(packer);
        });
        let mut shipper = self.shipper;
        let finished = tokio::time::timeout_at(deadline, async {
            let drained = drained.await;
            let shipped = (&mut shipper).await;
            drained.is_ok() && shipped.is_ok()
        });
        let mut is_clean = finished.await.unwrap_or(false) && self.outbox.is_done();
        if is_clean && has_spool {
            // The spool's thread was woken by the last acknowledgement and deletes what is left.
            let end = tokio::time::Instant::now() + Duration::from_secs(1);
            while self.spool_bytes.load(Ordering::Relaxed) > 0 && tokio::time::Instant::now() < end {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        if !is_clean && has_spool {
            self.give_up.send_replace(true);
            self.outbox.flush();
            let end = tokio::time::Instant::now() + FLUSH_TIMEOUT;
            while !self.outbox.is_spooled() && tokio::time::Instant::now() < end {
                // The spool's thread sends a notice of each batch that it has written.
                let _ = tokio::time::timeout(Duration::from_millis(50), self.outbox.changed.notified()).await;
            }
            is_clean = self.outbox.is_spooled();
            if is_clean {
                tracing::info!("unacknowledged frames are in the spool; the next start sends them");
            }
        }
        if !is_clean {
            let (bytes, frames) = self.outbox.usage();
            tracing::warn!(bytes, frames, "stopped before a server had acknowledged every frame");
            self.give_up.send_replace(true);
        }
        if let Some((serving, end)) = self.health {
            end.send_replace(true);
            if tokio::time::timeout(Duration::from_secs(1), serving).await.is_err() {
                tracing::debug!("a health client kept its connection");
            }
        }
        is_clean
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a thread panicked");
    }
}
