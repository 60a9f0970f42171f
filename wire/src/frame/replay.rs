//! A packed frame that is sent again and again, each time at another place in a sequence and at another time.
//!
//! What enters: a frame that was packed once, as rows. What leaves: frames that differ from it only in header, ledger and times.
//! What must hold: nothing is packed again. Rows say each time as the difference from the one before, so the first time moves all.

use bytes::Bytes;

use super::{FIRST_TIME, HEADER_BYTES, LAST_TIME, SealedFrame, Stamp};
use crate::compress::Compression;
use crate::event::{Body, Lane};
use crate::ledger::{ENTRIES_MAX, ENTRY_BYTES, Ledger};
use crate::{error::FrameError, rows};

/// When a frame's first event is, while it waits to be sent: 4.9 hours after a boot.
///
/// Rows write a number with as few bytes as it needs. From here on times need no more for 34 hours.
pub const REPLAY_BASE_NS: u64 = (1 << 44) + (1 << 30);

/// A frame to be sent many times.
pub struct ReplayFrame {
    sealed: SealedFrame,
    span_ns: u64,
    first: rows::FirstTime,
}

impl ReplayFrame {
    /// Packs a body. Its first event is the earliest, and moves to [`REPLAY_BASE_NS`]; the others keep their distance to it.
    ///
    /// # Errors
    /// When the body has no event, or exceeds the limits of a frame.
    pub fn pack(encoder: &mut super::Encoder, body: &mut Body, lane: Lane) -> Result<Self, FrameError> {
        let times = || body.events.iter().map(|event| event.time_ns);
        let (Some(earliest), Some(latest)) = (times().min(), times().max()) else {
            return Err(FrameError::Contradiction { what: "a frame without events has no time to be moved" });
        };
        let span_ns = latest - earliest;
        for event in &mut body.events {
            event.time_ns = event.time_ns - earliest + REPLAY_BASE_NS;
        }
        let sealed = encoder.seal(body, lane, Compression::Rows)?;
        let first = rows::first_time(&sealed.bytes[HEADER_BYTES..], body.events.len());
        let first = first.ok_or(FrameError::Compression)?;
        Ok(Self { sealed, span_ns, first })
    }

    /// Events in it.
    pub fn events(&self) -> u64 {
        self.sealed.source_events.iter().map(|&events| u64::from(events)).sum()
    }

    /// Events by source.
    pub fn source_events(&self) -> &[u32; crate::event::SOURCES] {
        &self.sealed.source_events
    }

    /// The frame at its place in the sequence. Its last event is at the time of the stamp.
    ///
    /// # Errors
    /// When that time does not fit where the old one stood.
    pub fn stamp(&self, stamp: &Stamp, ledger: &Ledger) -> Result<Bytes, FrameError> {
        let SealedFrame { bytes, lane, source_events, raw_bytes } = &self.sealed;
        let mut copy = Vec::with_capacity(bytes.len() + ENTRIES_MAX * ENTRY_BYTES);
        copy.extend_from_slice(bytes);
        let first_ns = stamp.boottime_ns.saturating_sub(self.span_ns);
        self.first.put(&mut copy[HEADER_BYTES..], first_ns).ok_or(FrameError::Contradiction {
            what: "a time that needs another number of bytes than the one in its place",
        })?;
        copy[FIRST_TIME..FIRST_TIME + 8].copy_from_slice(&first_ns.to_le_bytes());
        copy[LAST_TIME..LAST_TIME + 8].copy_from_slice(&(first_ns + self.span_ns).to_le_bytes());
        let payload_crc = crc32c::crc32c(&copy[HEADER_BYTES..]);
        copy[64..68].copy_from_slice(&payload_crc.to_le_bytes());
        let (lane, source_events, raw_bytes) = (*lane, *source_events, *raw_bytes);
        Ok(SealedFrame { bytes: copy, lane, source_events, raw_bytes }.stamp(stamp, ledger))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Detail, Event, Source};
    use crate::frame::{Encoder, Frame};

    fn body(times: &[u64]) -> Body {
        let event = |(number, &time_ns): (usize, &u64)| Event {
            time_ns,
            entity: 0x9e37_79b9_7f4a_7c15 + number as u64,
            pid: 7,
            source: Source::Shm,
            body: Detail::RunQueue { wait_ns: 1_000_000 + number as u64 },
        };
        Body { events: times.iter().enumerate().map(event).collect(), ..Body::default() }
    }

    #[test]
    fn a_restamped_frame_differs_only_in_its_times() {
        let times = [500_u64, 1_500, 1_400, 9_000_000];
        let frame = ReplayFrame::pack(&mut Encoder::default(), &mut body(&times), Lane::Bulk).expect("it fits");
        assert_eq!(frame.events(), 4);
        for (seq, at) in [(1, REPLAY_BASE_NS + 9_000_000), (2, REPLAY_BASE_NS * 5), (3, (1 << 46) - 1)] {
            let stamp = Stamp { node: 3, epoch: 4, seq, boottime_ns: at, realtime_ns: 6, is_final: false };
            let bytes = frame.stamp(&stamp, &Ledger::default()).expect("it fits");
            let read = Frame::decode(&bytes).expect("a sound frame");
            assert_eq!((read.header().seq, read.header().last_time_ns), (seq, at));
            assert_eq!(read.header().first_time_ns, at - (9_000_000 - 500));
            let moved: Vec<u64> = read.body().events.iter().map(|event| event.time_ns.to_native()).collect();
            assert_eq!(moved, times.map(|time| at - 9_000_000 + time));
            let entities: Vec<u64> = read.body().events.iter().map(|event| event.entity.to_native()).collect();
            assert_eq!(entities, [0, 1, 2, 3].map(|number| 0x9e37_79b9_7f4a_7c15 + number));
        }
    }

    #[test]
    fn a_time_that_does_not_fit_is_refused() {
        let frame = ReplayFrame::pack(&mut Encoder::default(), &mut body(&[1]), Lane::Bulk).expect("it fits");
        let at = |boottime_ns| Stamp { node: 3, epoch: 4, seq: 1, boottime_ns, realtime_ns: 6, is_final: false };
        assert!(frame.stamp(&at(1 << 60), &Ledger::default()).is_err());
        assert!(frame.stamp(&at(1_000), &Ledger::default()).is_ok(), "a smaller one has room");
        assert!(ReplayFrame::pack(&mut Encoder::default(), &mut body(&[]), Lane::Bulk).is_err());
    }
}
