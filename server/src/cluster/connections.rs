//! What is logged of the connections to NATS.
//!
//! What enters: what happens to the connections of all threads. What leaves: one line for each change of state, so that a connection
//! that is made and closed every two seconds does not bury the line that says why. What must hold: the lines are limited in rate.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use async_nats::Event;
use tapio_wire::program::token_bucket::TokenBucket;

/// Lines at once, and seconds for each line after that.
const LINES_BURST: u32 = 8;
const LINE_SECONDS: f64 = 60.0;

/// Chooses what is logged of the connections to NATS.
pub(crate) struct Connections(Mutex<Logged>);

struct Logged {
    /// The last line.
    last: String,
    bucket: TokenBucket,
    /// Changes since then that were not logged.
    left_out: u64,
}

impl Default for Connections {
    fn default() -> Self {
        let bucket = TokenBucket::new(LINES_BURST, 1.0 / LINE_SECONDS, Instant::now());
        Self(Mutex::new(Logged { last: String::new(), bucket, left_out: 0 }))
    }
}

impl Connections {
    /// Takes in what happened to one of them.
    pub(super) fn note(&self, event: &Event) {
        // This server has closed it itself.
        if matches!(event, Event::Closed | Event::Draining) {
            tracing::debug!(%event, "NATS");
            return;
        }
        match (self.changed(&event.to_string(), Instant::now()), event) {
            (None, event) => tracing::debug!(%event, "NATS"),
            (Some(left_out), Event::Connected) => tracing::info!(left_out, "connected to NATS"),
            (Some(left_out), event) => tracing::warn!(%event, left_out, "NATS"),
        }
    }

    /// Whether it is to be logged, and how many changes were not since the last line.
    fn changed(&self, event: &str, now: Instant) -> Option<u64> {
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.last == event {
            return None;
        }
        if logged.bucket.take(1, now).is_err() {
            logged.left_out += 1;
            return None;
        }
        event.clone_into(&mut logged.last);
        Some(std::mem::take(&mut logged.left_out))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_change_of_a_connection_is_logged_once_rate_limited() {
        let (connections, start) = (Connections::default(), Instant::now());
        assert_eq!(connections.changed("connected", start), Some(0));
        for second in 0..3600 {
            assert_eq!(connections.changed("connected", start + Duration::from_secs(second)), None);
        }
        let start = start + Duration::from_secs(3600);
        let changes = (0..600).filter_map(|turn| {
            let event = if turn % 2 == 0 { "disconnected" } else { "connected" };
            connections.changed(event, start + Duration::from_secs(turn))
        });
        let lines: Vec<u64> = changes.collect();
        assert!((10..=LINES_BURST as usize + 10).contains(&lines.len()), "{lines:?}");
        assert!(lines.iter().any(|left_out| *left_out > 0), "{lines:?}");
    }
}
