//! Log lines of one place in the code are limited, so that a failure that repeats does not fill the disk or the budget.
//!
//! What must hold: each place has a bucket of its own, so that one cannot silence another. The number of lines left out
//! is logged from time to time, by place, and at the end: none is left out silently.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tapio_wire::program::token_bucket::TokenBucket;
use tracing::callsite::Identifier;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Lines of one place at once, and a second after that.
const BURST: u32 = 20;
const PER_SECOND: f64 = 1.0;

struct Bucket {
    place: &'static Metadata<'static>,
    tokens: TokenBucket,
    suppressed: u64,
}

/// Limits how often one place in the code logs. Clones share their buckets; there is one for each place in the code that has logged.
#[derive(Clone, Default)]
pub struct LogLimit(Arc<Mutex<HashMap<Identifier, Bucket>>>);

impl LogLimit {
    /// Logs what was left out since the last time.
    pub fn report(&self) {
        let mut suppressed = Vec::new();
        for bucket in self.0.lock().unwrap_or_else(PoisonError::into_inner).values_mut() {
            if bucket.suppressed > 0 {
                suppressed.push((bucket.place, std::mem::take(&mut bucket.suppressed)));
            }
        }
        for (place, lines) in suppressed {
            let (file, line) = (place.file().unwrap_or_default(), place.line().unwrap_or_default());
            tracing::warn!(target: REPORT, lines, file, line, "log lines of this place suppressed");
        }
    }

    fn admits(&self, place: &'static Metadata<'static>, now: Instant) -> bool {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Bucket { place, tokens: TokenBucket::new(BURST, PER_SECOND, now), suppressed: 0 };
        let bucket = buckets.entry(place.callsite()).or_insert_with(new);
        let is_admitted = bucket.tokens.take(1, now).is_ok();
        bucket.suppressed += u64::from(!is_admitted);
        is_admitted
    }
}

/// The reports themselves are not limited: there is one a place and interval.
const REPORT: &str = "tapio_collector::settings::log_limit::report";

impl<S: Subscriber> Layer<S> for LogLimit {
    fn event_enabled(&self, event: &Event<'_>, _context: Context<'_, S>) -> bool {
        event.metadata().target() == REPORT || self.admits(event.metadata(), Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no panic").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_repeated_line_is_limited_and_another_is_not() {
        let (lines, limit) = (Lines::default(), LogLimit::default());
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish().with(limit.clone());
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..1000 {
                tracing::warn!("again");
            }
            tracing::warn!("something else");
            limit.report();
            limit.report();
        });
        let text = String::from_utf8(lines.0.lock().expect("no panic").clone()).expect("text");
        let count = |what: &str| text.matches(what).count();
        assert!((20..=25).contains(&count("again")), "{}", count("again"));
        assert_eq!((count("something else"), count("suppressed")), (1, 1));
    }
}
