//! Latency from an event to its durable acknowledgement, measured without a cost per event.
//!
//! A frame keeps the times of a few of its events, evenly spread and none of the API server's
//! (`outbox/frame_times.rs`). When the frame is acknowledged each stands for its share of the frame. The histograms
//! resolve three significant digits. Frames are recorded a few dozen at once: each value touches a cold cache line of a
//! histogram.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hdrhistogram::Histogram;

use crate::base::metrics::{Metrics, doubling};
use crate::outbox::frame_times::{FrameTimes, share};

/// Acknowledged frames that are not in the histograms yet.
const WAITING_MAX: usize = 64;

/// An acknowledged frame.
struct Measured {
    times: FrameTimes,
    sent_ns: u64,
    acknowledged_ns: u64,
}

/// The histograms, microseconds, of events and of frames, and what is not in them yet.
struct Histograms {
    events: Histogram<u64>,
    frames: Histogram<u64>,
    waiting: Vec<Measured>,
}

/// Measures the time from an event to its durable acknowledgement.
pub struct Latencies {
    histograms: Mutex<Histograms>,
    /// Latencies for scrapes, by frame: seconds from its first sending to its acknowledgement, and from its first event
    /// to its first sending. Up to date after [`Self::counts`] or [`Self::event_quantile_us`]: call one of them before
    /// a scrape.
    pub ack_seconds: prometheus::Histogram,
    pub send_seconds: prometheus::Histogram,
}

impl Default for Latencies {
    fn default() -> Self {
        let new = || Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("the bounds are valid");
        Self {
            histograms: Mutex::new(Histograms {
                events: new(),
                frames: new(),
                waiting: Vec::with_capacity(WAITING_MAX),
            }),
            ack_seconds: doubling(
                "tapio_collector_frame_to_ack_seconds",
                "Time from a frame's first send to its durable acknowledgement",
                0.001,
                18,
            ),
            send_seconds: doubling(
                "tapio_collector_event_to_send_seconds",
                "Time from a frame's first sampled event, except Kubernetes API events, to the frame's first send",
                0.000_25,
                20,
            ),
        }
    }
}

/// Values and how often each was counted.
pub type Counts = Vec<(u64, u64)>;

impl Latencies {
    /// Counts an acknowledged frame: `now_ns` is the acknowledgement, `sent_ns` its first sending, `CLOCK_BOOTTIME`.
    pub fn record(&self, times: &FrameTimes, sent_ns: u64, now_ns: u64) {
        let mut histograms = self.histograms.lock().unwrap_or_else(PoisonError::into_inner);
        histograms.waiting.push(Measured { times: *times, sent_ns, acknowledged_ns: now_ns });
        if histograms.waiting.len() >= WAITING_MAX {
            self.enter(&mut histograms);
        }
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        metrics.register(self.ack_seconds.clone())?;
        metrics.register(self.send_seconds.clone())?;
        let ack = metrics.gauges(
            "tapio_collector_event_to_ack_latency_microseconds",
            "Time from an event to its durable acknowledgement since the start, by quantile",
            &["quantile"],
        )?;
        let latencies = Arc::clone(self);
        metrics.on_scrape(move || {
            for (label, quantile) in [("0.5", 0.5), ("0.99", 0.99), ("0.999", 0.999)] {
                ack.with_label_values(&[label]).set(latencies.event_quantile_us(quantile) as i64);
            }
        });
        Ok(())
    }

    /// What was counted: event to acknowledgement, frame to acknowledgement.
    pub fn counts(&self) -> (Counts, Counts) {
        let histograms = self.entered();
        let all = |histogram: &Histogram<u64>| {
            histogram
                .iter_recorded()
                .map(|value| (value.value_iterated_to(), value.count_since_last_iteration()))
                .collect()
        };
        (all(&histograms.events), all(&histograms.frames))
    }

    /// The value that a share of the events stays below, microseconds.
    pub fn event_quantile_us(&self, quantile: f64) -> u64 {
        self.entered().events.value_at_quantile(quantile)
    }

    fn entered(&self) -> MutexGuard<'_, Histograms> {
        let mut histograms = self.histograms.lock().unwrap_or_else(PoisonError::into_inner);
        self.enter(&mut histograms);
        histograms
    }

    /// Enters what waits into the histograms.
    fn enter(&self, Histograms { events, frames, waiting }: &mut Histograms) {
        for Measured { times, sent_ns, acknowledged_ns } in waiting.drain(..) {
            let since_us = |from_ns: u64| (acknowledged_ns.saturating_sub(from_ns) / 1000).max(1);
            let samples = times.samples as u64;
            for (sample, &time_ns) in (0..).zip(&times.times_ns[..times.samples]) {
                events.saturating_record_n(since_us(time_ns), share(times.events, samples, sample));
            }
            frames.saturating_record(since_us(sent_ns));
            self.ack_seconds.observe(acknowledged_ns.saturating_sub(sent_ns) as f64 / 1e9);
            if times.samples > 0 {
                self.send_seconds.observe(sent_ns.saturating_sub(times.times_ns[0]) as f64 / 1e9);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tapio_wire::event::{Body, Detail, Event, Source};

    use super::*;
    use crate::outbox::frame_times::SAMPLES;

    #[test]
    fn every_event_of_a_frame_counts_and_the_oldest_shows() {
        for events in [1, SAMPLES - 1, SAMPLES, 1000] {
            let event = |time_ns| Event {
                time_ns,
                entity: 1,
                pid: 1,
                source: Source::Shm,
                body: Detail::RunQueue { wait_ns: 1 },
            };
            let body =
                Body { events: (0..events as u64).map(|i| event(1_000_000 + i * 1000)).collect(), ..Body::default() };
            let latencies = Latencies::default();
            latencies.record(&FrameTimes::of(&body), 1_900_000, 3_000_000);
            let (counts, frames) = latencies.counts();
            assert_eq!(counts.iter().map(|(_, count)| count).sum::<u64>(), events as u64);
            let longest = counts.last().expect("counted").0;
            assert!((1999..=2003).contains(&longest), "{longest}");
            assert_eq!(frames, [(1100, 1)]);
            assert_eq!((latencies.ack_seconds.get_sample_count(), latencies.send_seconds.get_sample_count()), (1, 1));
        }
    }

    #[test]
    fn a_late_event_of_the_api_server_is_not_measured() {
        let event =
            |source, time_ns| Event { time_ns, entity: 1, pid: 1, source, body: Detail::RunQueue { wait_ns: 1 } };
        let late = event(Source::Kube, 1);
        let recent = event(Source::Ebpf, 60_000_000_000);
        for (events, measured) in [(vec![late.clone(); 20], 0), (vec![recent.clone(), late], 1), (vec![recent; 20], 20)]
        {
            let latencies = Latencies::default();
            latencies.record(&FrameTimes::of(&Body { events, ..Body::default() }), 60_001_000_000, 60_002_000_000);
            let (counts, frames) = latencies.counts();
            assert_eq!(counts.iter().map(|(_, count)| count).sum::<u64>(), measured);
            assert!(counts.iter().all(|(us, _)| *us < 3_000), "{counts:?}");
            assert_eq!(frames.len(), 1);
        }
    }

    #[test]
    fn frames_are_counted_each_however_many_wait() {
        let latencies = Latencies::default();
        let frames = WAITING_MAX as u64 * 2 + 3;
        for sent_us in 0..frames {
            latencies.record(&FrameTimes::default(), sent_us * 1000, 10_000_000);
        }
        assert_eq!(latencies.ack_seconds.get_sample_count(), WAITING_MAX as u64 * 2);
        assert_eq!(latencies.counts().1.iter().map(|(_, count)| count).sum::<u64>(), frames);
        assert_eq!((latencies.ack_seconds.get_sample_count(), latencies.send_seconds.get_sample_count()), (frames, 0));
    }
}
