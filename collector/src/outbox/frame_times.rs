//! When the events of a frame happened, as far as a frame keeps it.

use tapio_wire::event::Body;

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
    pub fn of(body: &Body) -> Self {
        let events = body.events.len();
        let mut times = Self { events: events as u64, samples: events.min(SAMPLES), ..Self::default() };
        for (sample, time_ns) in times.times_ns[..times.samples].iter_mut().enumerate() {
            *time_ns = body.events[sample * events / times.samples].time_ns;
        }
        times
    }
}
