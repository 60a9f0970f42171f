//! How long a source that reads rings may leave them alone.
//!
//! What enters: what each look at the rings has found. What leaves: the length of the next nap. What must hold: at the
//! rate seen, no ring is more than a quarter full when the nap ends. No event is later than its batch. A burst beyond
//! the rate seen ends the nap: writers wake their reader when a ring is about a quarter full. The probes do so, and
//! writers of memfd rings that say so. Beside any other memfd ring no nap lasts longer than [`BURST_BYTES_PER_SECOND`]
//! takes to fill most of it ([`beside_memfd`]). Urgent records need no bound here: their writer wakes the reader.
//!
//! Each look costs some 20 µs whatever it finds, as much as a hundred events. So a nap lasts until a frame's worth of
//! events has come, at any rate of events.

use std::time::{Duration, Instant};

/// What is remembered of earlier rates fades with this.
const MEMORY: Duration = Duration::from_millis(50);
/// How full a ring may become meanwhile.
const FILL: f64 = 0.25;
/// What a peer may write into a memfd ring all at once: some 700,000 records a second.
const BURST_BYTES_PER_SECOND: f64 = 64.0 * 1_048_576.0;
/// How full such a burst may make it: the reader is many times as fast as that once it looks, and may first have to pack.
const BURST_FILL: f64 = 0.8;
const BURST_FILL_SMALL: f64 = 0.5;
/// Rings from this size on leave enough time to pack a frame while their rest fills.
const LARGE_RING_BYTES: usize = 1 << 20;
/// Below this many records in a batch's time, a wakeup for each is cheaper.
const RECORDS_MIN: f64 = 4.0;

/// Calculates how long a source may sleep before it reads its rings again.
pub struct Nap {
    shortest: Duration,
    looked: Instant,
    records_per_second: f64,
    /// Records kept, a second.
    events_per_second: f64,
    /// Fill rate of the ring that fills fastest, as a share of its capacity.
    fill_per_second: f64,
}

impl Nap {
    /// Nothing was seen yet. However much comes, no nap is shorter than `shortest`.
    pub fn new(shortest: Duration) -> Self {
        Self { shortest, looked: Instant::now(), records_per_second: 0.0, events_per_second: 0.0, fill_per_second: 0.0 }
    }

    /// Events kept recently.
    pub fn events_per_second(&self) -> f64 {
        self.events_per_second
    }

    /// The shortest nap.
    pub fn shortest(&self) -> Duration {
        self.shortest
    }

    /// Takes what a look at `now` has found: records, the events that were kept of them, and how full the fullest ring was.
    pub fn saw(&mut self, now: Instant, records: usize, events: u64, fullest: f64) {
        // Those of two looks in the same moment count all the same, as those of a short time.
        let elapsed = now.saturating_duration_since(self.looked).as_secs_f64().max(1e-6);
        self.looked = now;
        let weight = (elapsed / MEMORY.as_secs_f64()).min(1.0);
        let take = |rate: &mut f64, seen: f64| *rate += (seen / elapsed - *rate) * weight;
        take(&mut self.records_per_second, records as f64);
        take(&mut self.events_per_second, events as f64);
        take(&mut self.fill_per_second, fullest);
    }

    /// How long, when a batch wants `missing` more events and is due in `due` at the latest. [`None`] when so few come that
    /// the next one should wake.
    pub fn length(&self, missing: usize, due: Duration, is_waiting: bool) -> Option<Duration> {
        if !is_waiting && self.records_per_second * due.as_secs_f64() < RECORDS_MIN {
            return None;
        }
        let until =
            |amount: f64, per_second: f64| Duration::try_from_secs_f64(amount / per_second).unwrap_or(Duration::MAX);
        let worth = until(missing as f64, self.events_per_second);
        let filled = until(FILL, self.fill_per_second);
        Some(due.min(worth).min(filled).max(self.shortest))
    }
}

/// The longest nap beside a memfd ring of this size whose writer does not wake the reader when it fills.
pub fn beside_memfd(capacity_bytes: usize) -> Duration {
    let fill = if capacity_bytes < LARGE_RING_BYTES { BURST_FILL_SMALL } else { BURST_FILL };
    Duration::from_secs_f64(capacity_bytes as f64 * fill / BURST_BYTES_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINGER: Duration = Duration::from_millis(1);
    const DUE: Duration = Duration::from_millis(100);

    /// Returns the naps of a reader at this rate, each event the 1000th part of a ring.
    fn naps(events_per_second: f64, worth: usize) -> Vec<Duration> {
        let mut nap = Nap::new(LINGER);
        let mut now = nap.looked;
        let (mut length, mut carried) = (LINGER, 0.0);
        let next = |_| {
            now += length;
            carried += events_per_second * length.as_secs_f64();
            let events = carried as usize;
            carried -= events as f64;
            nap.saw(now, events, events as u64, events as f64 / 1000.0);
            length = nap.length(worth, DUE, true).expect("something waits");
            length
        };
        (0..200).map(next).collect()
    }

    #[test]
    fn a_nap_lasts_until_a_batch_is_worth_a_frame() {
        for (rate, expected_ms) in [(100.0, 100.0), (10_000.0, 25.6), (40_000.0, 6.4), (1e6, 1.0)] {
            let settled = naps(rate, 256)[199].as_secs_f64() * 1e3;
            // A quarter of the ring are 250 events.
            assert!((settled - expected_ms).abs() <= expected_ms * 0.1, "{rate}: {settled} ms");
        }
    }

    #[test]
    fn at_the_rate_seen_rings_stay_three_quarters_empty() {
        for rate in [5_000.0, 50_000.0, 200_000.0] {
            let longest = naps(rate, 4096).into_iter().skip(100).max().expect("naps");
            assert!(longest.as_secs_f64() * rate <= 250.0 * 1.01, "{rate}: {longest:?}");
        }
    }

    #[test]
    fn when_idle_the_next_event_wakes() {
        let mut nap = Nap::new(LINGER);
        let start = nap.looked;
        nap.saw(start + DUE, 1, 1, 0.001);
        assert_eq!(nap.length(256, DUE, false), None);
        assert_eq!(nap.length(255, DUE, true), Some(DUE));
        nap.saw(start + 2 * DUE, 100, 0, 0.1);
        assert_eq!(nap.length(256, DUE, false), Some(DUE), "none is kept, and yet each would wake");
    }

    #[test]
    fn a_small_memfd_ring_is_looked_at_often() {
        assert!(beside_memfd(64 << 10) < LINGER);
        assert!(beside_memfd(8 << 20) >= DUE, "no nap ends for its sake");
    }
}
