//! What is known about the stream.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tapio_wire::program::tls::{ClientFiles, Watched};

use super::broken::Broken;
use crate::base::metrics::{Metrics, raise};

/// What is known about the stream, for `/readyz` and metrics.
#[derive(Default)]
pub struct ShipState {
    pub is_connected: AtomicBool,
    pub streams: AtomicU64,
    /// Attempts that brought no stream and streams that broke, by [`FAILURES`].
    failures: [AtomicU64; FAILURES.len()],
    pub moves: AtomicU64,
    pub frames_sent: AtomicU64,
    pub acked_seq: AtomicU64,
    pub credit_bytes: AtomicU64,
    /// The server of the present stream, or of the last one.
    pub(super) server: Mutex<String>,
    /// Why there is no stream, and whether a server refuses this collector; `None` while there is one.
    trouble: Mutex<Option<(String, bool)>>,
}

/// Why there is no stream, as metrics label it.
pub const FAILURES: [&str; 10] =
    ["resolve", "connect", "tls", "http2", "refused", "status", "lost", "silent", "closed", "protocol"];

impl ShipState {
    /// Each of [`FAILURES`] and its count.
    pub fn failures(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        FAILURES.into_iter().zip(self.failures.iter().map(|count| count.load(Ordering::Relaxed)))
    }

    /// Why there is no stream; `None` while there is one, and before the first attempt.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(text, _)| text.clone())
    }

    /// Whether the last attempt was refused: a server answered, and does not take what this collector sends.
    pub fn is_refused(&self) -> bool {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|(_, is_refused)| *is_refused)
    }

    /// Counts a failure. True when its text differs from the one before.
    pub(super) fn failed(&self, error: &Broken) -> bool {
        if let Some(index) = FAILURES.iter().position(|name| *name == error.name()) {
            self.failures[index].fetch_add(1, Ordering::Relaxed);
        }
        let trouble = (error.to_string(), error.is_refusal());
        let mut known = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = known.as_ref() != Some(&trouble);
        *known = Some(trouble);
        is_new
    }

    pub(super) fn streams(&self) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.streams.fetch_add(1, Ordering::Relaxed);
        self.is_connected.store(true, Ordering::Relaxed);
    }

    /// The address of the present stream's server, or of the last one's; empty before the first.
    pub fn server(&self) -> String {
        self.server.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        let connected = metrics.gauge("tapio_collector_connected", "1 while the collector has a stream to a server")?;
        let streams = metrics.counter("tapio_collector_streams_total", "Streams that the collector has opened")?;
        let failures = metrics.counters(
            "tapio_collector_stream_failures_total",
            "Streams that broke or could not be opened, by reason",
            &["reason"],
        )?;
        let moves = metrics.counter(
            "tapio_collector_stream_moves_total",
            "Streams that the collector moved back to its preferred server",
        )?;
        let state = Arc::clone(self);
        metrics.on_scrape(move || {
            connected.set(i64::from(state.is_connected.load(Ordering::Relaxed)));
            raise(&streams, state.streams.load(Ordering::Relaxed));
            for (reason, count) in state.failures() {
                raise(&failures.with_label_values(&[reason]), count);
            }
            raise(&moves, state.moves.load(Ordering::Relaxed));
        });
        Ok(())
    }
}

/// Registers the metrics of the TLS files; without any they stay 0.
///
/// # Errors
/// When two metrics have the same name.
pub fn register_tls(tls: Option<Arc<Watched<ClientFiles>>>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
    let stale = metrics.gauge(
        "tapio_collector_tls_stale",
        "1 while the TLS files are unusable and the collector keeps using older ones",
    )?;
    let expires = metrics.gauge(
        "tapio_collector_tls_expires_timestamp_seconds",
        "Unix time at which the client certificate in use expires; 0 without one",
    )?;
    let changes =
        metrics.counter("tapio_collector_tls_changes_total", "Changed TLS files that the collector has loaded")?;
    metrics.on_scrape(move || {
        if let Some(tls) = &tls {
            stale.set(i64::from(tls.is_stale()));
            expires.set(tls.expires().unwrap_or(0) as i64);
            raise(&changes, tls.changes());
        }
    });
    Ok(())
}
