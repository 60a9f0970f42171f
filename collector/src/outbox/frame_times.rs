//! When the events of a frame happened, as far as a frame keeps it.

use tapio_wire::event::{Body, Source};

/// Events of a frame whose times are kept.
pub const SAMPLES: usize = 8;

/// Times of some of a frame's events.
#[derive(Clone, Copy, Debug, Default)]
pub struct FrameTimes {
    pub(crate) times_ns: [u64; SAMPLES],
    pub(crate) samples: usize,
    pub(crate) events: u64,
}

impl FrameTimes {
    /// Samples a body.
    ///
    /// An event of the API server carries the time at which another program saw something, seconds or minutes
    /// before this collector could read it. That time says nothing of how fast Tapio is, so such events are not measured.
    pub fn of(body: &Body) -> Self {
        let events = body.events.len();
        let samples = events.min(SAMPLES);
        let mut times = Self::default();
        for sample in 0..samples {
            let event = &body.events[sample * events / samples];
            if event.source == Source::Kube {
                continue;
            }
            times.times_ns[times.samples] = event.time_ns;
            times.samples += 1;
            times.events += share(events as u64, samples as u64, sample as u64);
        }
        times
    }
}

/// How many of `events` the sample at `index` of `samples` stands for.
pub(crate) fn share(events: u64, samples: u64, index: u64) -> u64 {
    events * (index + 1) / samples - events * index / samples
}
