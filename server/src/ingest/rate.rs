//! How fast frames are taken: limits that are held by reading later and by less credit, never by dropping.
//!
//! What must hold: lethal frames are counted and never wait. Streams that wait do so in turn, so that none starves. A limit is
//! met on average over [`BURST`], with one frame more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::{Counter, CounterVec, Opts, Registry};
use tapio_wire::program::token_bucket::TokenBucket;
use tokio::time::{Instant, sleep_until};

/// What may come at once after a quiet time, as a part of a second's allowance.
const BURST: Duration = Duration::from_millis(250);
/// How long lethal frames may make bulk ones wait.
const LETHAL_DEBT_MAX: Duration = Duration::from_secs(2);

/// Reads tokio's clock.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// One limit.
pub(super) struct Rate {
    bucket: Mutex<TokenBucket>,
    turn: tokio::sync::Mutex<()>,
    waited: Counter,
}

impl Rate {
    /// A limit; `None` for 0, which is none.
    pub fn new(per_second: u64, waited: &Counter) -> Option<Self> {
        (per_second > 0).then(|| Self {
            bucket: Mutex::new(TokenBucket::with_debt(per_second as f64, BURST, now())),
            turn: tokio::sync::Mutex::default(),
            waited: waited.clone(),
        })
    }

    fn bucket(&self) -> MutexGuard<'_, TokenBucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until what was taken before is paid for, and takes `amount`. Nothing is taken when the future is dropped.
    pub async fn take(&self, amount: u64) {
        let began = Instant::now();
        {
            let _turn = self.turn.lock().await;
            loop {
                let taken = self.bucket().take(amount, now());
                match taken {
                    Ok(()) => break,
                    Err(free_at) => sleep_until(free_at.into()).await,
                }
            }
        }
        let waited = began.elapsed();
        if waited >= Duration::from_millis(1) {
            self.waited.inc_by(waited.as_secs_f64());
        }
    }

    /// Takes `amount` at once, on account of those who wait.
    pub fn charge(&self, amount: u64) {
        self.bucket().charge(amount, LETHAL_DEBT_MAX, now());
    }

    /// Whether the next one would have to wait.
    pub fn is_behind(&self) -> bool {
        self.bucket().is_empty(now())
    }

    /// What may be taken within [`BURST`].
    pub fn burst(&self) -> u64 {
        self.bucket().burst()
    }
}

/// The limits of a server, 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Over all streams.
    pub events_per_second: u64,
    pub stream_bytes_per_second: u64,
    /// Over all streams that a node opens one after another.
    pub node_bytes_per_second: u64,
}

/// What the limits cost.
#[derive(Debug)]
pub(super) struct Waited {
    pub events: Counter,
    pub stream: Counter,
    pub node: Counter,
}

impl Waited {
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let waited = Opts::new(
            "tapio_server_ingest_throttled_seconds_total",
            "Time that bulk frames waited because of a rate limit, by limit: events (server.max_events_per_sec), stream \
             (server.max_stream_bytes_per_sec), node (server.max_node_bytes_per_sec).",
        );
        let waited = CounterVec::new(waited, &["limit"])?;
        registry.register(Box::new(waited.clone()))?;
        let of = |limit: &str| waited.with_label_values(&[limit]);
        Ok(Self { events: of("events"), stream: of("stream"), node: of("node") })
    }
}

/// The limits that one stream is under.
pub(super) struct Pace {
    pub stream: Option<Rate>,
    pub node: Option<Arc<Rate>>,
    pub events: Option<Arc<Rate>>,
}

impl Pace {
    /// Waits until a bulk frame may be taken.
    pub async fn take(&self, bytes: u64, events: u64) {
        if let Some(rate) = &self.stream {
            rate.take(bytes).await;
        }
        if let Some(rate) = &self.node {
            rate.take(bytes).await;
        }
        if let Some(rate) = &self.events {
            rate.take(events).await;
        }
    }

    /// Takes a lethal frame.
    pub fn charge(&self, bytes: u64, events: u64) {
        for rate in self.stream.iter().chain(self.node.as_deref()) {
            rate.charge(bytes);
        }
        if let Some(rate) = &self.events {
            rate.charge(events);
        }
    }

    /// Bytes that are worth having in flight under these limits; `None` when they do not matter. What is in flight stands
    /// before a lethal frame that comes next.
    pub fn credit_bytes(&self) -> Option<u64> {
        let of_bytes = self.stream.iter().chain(self.node.as_deref()).map(Rate::burst).min();
        let of_events = self.events.as_ref().filter(|rate| rate.is_behind()).map(|_| 0);
        of_bytes.into_iter().chain(of_events).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter() -> Counter {
        Counter::new("waited", "In tests.").expect("a name")
    }

    #[tokio::test]
    async fn whoever_gives_up_takes_nothing_and_waiting_is_counted() {
        let waited = counter();
        let rate = Rate::new(1000, &waited).expect("a limit");
        rate.take(300).await;
        let given_up = tokio::time::timeout(Duration::from_millis(1), rate.take(1_000_000)).await;
        assert!(given_up.is_err() && rate.is_behind());
        let taken = tokio::time::timeout(Duration::from_secs(20), rate.take(1)).await;
        taken.expect("1,000 s are not waited for");
        assert!(waited.get() > 0.0);
    }

    #[test]
    fn zero_is_unlimited_and_a_byte_rate_bounds_credit() {
        assert!(Rate::new(0, &counter()).is_none());
        let mut pace = Pace { stream: None, node: None, events: None };
        assert_eq!(pace.credit_bytes(), None);
        pace.stream = Rate::new(4 << 20, &counter());
        assert_eq!(pace.credit_bytes(), Some(1 << 20));
    }
}
