//! What the spool's thread does with an outbox: takes frames to write, and brings back what is on disk.
//!
//! What enters: frames that were read from the disk, and what became of those that were to be written. What leaves: frames in
//! sequence. What must hold is in `outbox/mod.rs`.

use bytes::Bytes;
use tapio_wire::frame::Header;

use super::{FRAME_OVERHEAD_BYTES, Outbox, OutboxState, Sent};
use crate::outbox::spool::SPOOL_BATCH_BYTES;

impl Outbox {
    pub(super) fn wake_spool(&self) {
        if let Some(unparker) = &self.spool {
            unparker.unpark();
        }
    }

    /// Whether memory runs short, so that unsent frames belong on disk.
    pub(super) fn is_short(&self, state: &OutboxState) -> bool {
        let is_due = state.is_flushing || state.on_disk.is_some() || state.bytes >= self.limit_bytes / 2;
        self.spool.is_some() && is_due && (state.unsent() > 0 || state.is_flushing)
    }

    /// Frames to write to the spool now, in sequence. [`Outbox::spooled`] must follow.
    pub fn take_for_spool(&self, room_bytes: usize) -> Vec<Bytes> {
        let mut state = self.state();
        if state.is_ending || (!self.is_short(&state) && state.spooling.is_empty()) {
            return Vec::new();
        }
        let mut frames: Vec<Bytes> = Vec::new();
        let mut bytes = 0;
        // What is stamped cannot be shed for a lethal frame any more: no more is than there is room for.
        let limit = SPOOL_BATCH_BYTES.min(room_bytes);
        // The copy on disk begins with the oldest frame that is not acknowledged.
        for sent in state.sent.iter().filter(|sent| sent.seq > state.spooled_seq) {
            bytes += sent.bytes.len();
            frames.push(sent.bytes.clone());
        }
        // Nor while the disk refuses what is stamped already: a disk may be full before the spool's bound is reached.
        let is_refused = state.is_spool_full && !frames.is_empty();
        if state.spooling.is_empty() && !is_refused {
            while state.next_len().is_some_and(|next| bytes + next + FRAME_OVERHEAD_BYTES <= limit)
                && let Some(sent) = self.stamp_next(&mut state)
            {
                bytes += sent.bytes.len();
                state.spooling.push_back(sent);
            }
        }
        frames.extend(state.spooling.iter().map(|sent| sent.bytes.clone()));
        state.taken_seq = state.spooling.back().or(state.sent.back()).map_or(state.taken_seq, |sent| sent.seq);
        frames
    }

    /// What was taken for the spool is on disk, or is not.
    pub fn spooled(&self, is_written: bool) {
        let mut state = self.state();
        let state = &mut *state;
        state.is_spool_full = !is_written;
        if is_written {
            state.spooled_seq = state.spooled_seq.max(state.taken_seq);
            while let Some(sent) = state.spooling.pop_front() {
                state.bytes -= sent.bytes.len() + FRAME_OVERHEAD_BYTES;
                state.spooled_seq = sent.seq;
                state.on_disk = Some((state.on_disk.map_or(sent.seq, |(first, _)| first), sent.seq));
            }
            self.queues.wake_packer();
        } else if state.on_disk.is_none() {
            // They follow what is in memory, so they can be sent from there.
            state.sent.append(&mut state.spooling);
        }
        self.wake_shipper();
    }

    /// The first frame to load from the spool now, if one is wanted.
    pub fn wants_loaded(&self) -> Option<u64> {
        let state = self.state();
        let (first, _) = state.on_disk.filter(|_| state.is_streaming && !state.is_ending && state.ending.is_none())?;
        let in_memory: usize = state.sent.iter().map(|sent| sent.bytes.len()).sum();
        (in_memory < (self.limit_bytes / 4).max(SPOOL_BATCH_BYTES)).then_some(first)
    }

    /// Takes frames that were asked for.
    pub fn loaded(&self, frames: Vec<Bytes>) {
        let mut state = self.state();
        for bytes in frames {
            let (Ok((header, _)), Some((first, last))) = (Header::peek(&bytes), state.on_disk) else { continue };
            if header.seq != first {
                continue;
            }
            state.on_disk = (first < last).then_some((first + 1, last));
            state.bytes += bytes.len() + FRAME_OVERHEAD_BYTES;
            state.sent.push_back(Sent::again(&header, bytes));
        }
        self.go_on_without_disk(&mut state);
        let durable_seq = state.durable_seq;
        drop(state);
        self.acknowledge(self.epoch(), durable_seq);
        self.wake_shipper();
    }

    /// What could not be written follows what is in memory, once nothing is on disk.
    pub(super) fn go_on_without_disk(&self, state: &mut OutboxState) {
        if state.on_disk.is_none() && state.is_spool_full {
            let OutboxState { sent, spooling, .. } = state;
            sent.append(spooling);
        }
    }

    /// Whether there is a spool.
    pub fn has_spool(&self) -> bool {
        self.spool.is_some()
    }

    /// Moves everything that is not acknowledged to the spool, since the process ends.
    pub fn flush(&self) {
        self.state().is_flushing = true;
        self.wake_spool();
    }

    /// Whether everything that is not acknowledged is on disk.
    pub fn is_spooled(&self) -> bool {
        let state = self.state();
        let in_memory = state.sent.iter().all(|sent| sent.seq <= state.spooled_seq);
        self.spool.is_some() && state.is_finished && state.unsent() == 0 && state.spooling.is_empty() && in_memory
    }
}
