//! What an outbox holds, under its lock.

use std::collections::VecDeque;

use bytes::Bytes;
use tapio_wire::event::SOURCES;
use tapio_wire::frame::{Frame, Header, SealedFrame};
use tapio_wire::ledger::Ledger;

use super::ending::{Closing, Ending};
use crate::base::clock::boottime_ns;
use crate::outbox::frame_times::FrameTimes;

/// A frame that has no `seq` yet.
pub(super) struct Unsent {
    pub(super) frame: SealedFrame,
    pub(super) times: FrameTimes,
}

/// A frame that has a `seq` and is not acknowledged.
pub(super) struct Sent {
    pub(super) seq: u64,
    pub(super) source_events: [u32; SOURCES],
    pub(super) bytes: Bytes,
    pub(super) times: FrameTimes,
    /// `CLOCK_BOOTTIME` when it was first sent, or loaded from the disk.
    pub(super) sent_ns: u64,
    /// `CLOCK_BOOTTIME` when it was stamped.
    pub(super) stamped_ns: u64,
}

impl Sent {
    /// A frame that was stamped before, and is sent from here for the first time.
    pub(super) fn again(header: &Header, bytes: Bytes) -> Self {
        Self {
            seq: header.seq,
            source_events: header.source_events,
            bytes,
            times: FrameTimes::default(),
            sent_ns: boottime_ns(),
            stamped_ns: header.boottime_ns,
        }
    }

    /// Whether these bytes are still the frame that was stamped.
    pub(super) fn check(&self, epoch: u64) -> Result<(), String> {
        let frame = Frame::decode(&self.bytes).map_err(|error| error.to_string())?;
        let Header { epoch: of, seq, .. } = *frame.header();
        match (of, seq) == (epoch, self.seq) {
            true => Ok(()),
            false => Err(format!("it says that it is frame {seq} of epoch {of}")),
        }
    }
}

#[derive(Default)]
pub(super) struct OutboxState {
    pub(super) unsent_lethal: VecDeque<Unsent>,
    pub(super) unsent_bulk: VecDeque<Unsent>,
    /// The epoch's last frame, which goes when all others have gone.
    pub(super) unsent_last: Option<Unsent>,
    /// Sent and not acknowledged, in sequence; the first `resent` of them went out on the present stream.
    pub(super) sent: VecDeque<Sent>,
    pub(super) resent: usize,
    /// First and last `seq` of what is on disk and not in memory.
    pub(super) on_disk: Option<(u64, u64)>,
    /// Stamped, and being written.
    pub(super) spooling: VecDeque<Sent>,
    /// The last `seq` that was ever written.
    pub(super) spooled_seq: u64,
    /// The last `seq` that the spool's thread took to write; frames stamped since then come after it.
    pub(super) taken_seq: u64,
    /// The spool had no room, or the disk failed, a moment ago.
    pub(super) is_spool_full: bool,
    /// Everything is to go to the spool, since the process ends.
    pub(super) is_flushing: bool,
    pub(super) is_streaming: bool,
    /// What a server said is durable, though it was not loaded from the spool yet.
    pub(super) durable_seq: u64,
    pub(super) bytes: usize,
    pub(super) in_flight_bytes: usize,
    pub(super) next_seq: u64,
    pub(super) shipped: [u64; SOURCES],
    pub(super) acked_seq: u64,
    pub(super) acked_events: [u64; SOURCES],
    /// `CLOCK_BOOTTIME` when the last acknowledged frame was stamped.
    pub(super) acked_ns: u64,
    pub(super) last_stated: Ledger,
    /// What earlier epochs of this process account for.
    pub(super) base: Option<Box<Ledger>>,
    /// A server has refused a frame, which may be any up to this one: each is checked, and sent when those before it are
    /// acknowledged.
    pub(super) suspect_until: u64,
    /// The frame that was refused last, and how often in a row.
    pub(super) refusals: (u64, u32),
    /// What is wrong with the oldest frame.
    pub(super) damage: Option<String>,
    /// Why the epoch is to end.
    pub(super) ending: Option<Ending>,
    pub(super) is_ending: bool,
    /// The last frames of ended epochs, which go before everything else; oldest first.
    pub(super) closings: VecDeque<Closing>,
    /// Header and counters of the last frame of an earlier run's epoch.
    pub(super) end: Option<Box<(Header, Ledger)>>,
    pub(super) is_finished: bool,
    /// The packer was refused room, and wants to know when there is some.
    pub(super) is_packer_waiting: bool,
}

impl OutboxState {
    /// Bytes of the frame that would be stamped next.
    pub(super) fn next_len(&self) -> Option<usize> {
        let next = self.unsent_lethal.front().or(self.unsent_bulk.front()).or(self.unsent_last.as_ref());
        next.map(|unsent| unsent.frame.len())
    }

    /// Nothing that was stamped waits for an acknowledgement.
    pub(super) fn is_all_acknowledged(&self) -> bool {
        self.sent.is_empty() && self.on_disk.is_none() && self.spooling.is_empty()
    }

    /// Frames that were never sent.
    pub(super) fn unsent(&self) -> usize {
        self.unsent_lethal.len() + self.unsent_bulk.len() + usize::from(self.unsent_last.is_some())
    }
}
