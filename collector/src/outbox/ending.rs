//! How an epoch ends while the process goes on, since a frame of it can never be delivered.
//!
//! What enters: that a server refused a frame, that a frame is damaged, or that the spool lost some. What leaves: a
//! closing frame of the ended epoch, and the frames behind the lost ones as those of the next epoch
//! (`crate::outbox::shift`). What must hold: everything before the lost frames is acknowledged first. Their events are
//! counted as `dropped{outbox, malformed}` in the closing frame, so that the ended epoch's ledger closes. Whole frames
//! are not lost with them. With a spool this happens on its thread.
//!
//! | how it comes | what ends the epoch |
//! |---|---|
//! | servers refuse the oldest frame, which is whole as far as can be seen here | [`REFUSALS_MAX`] refusals in a row |
//! | the oldest frame does not match its checksums | the first refusal, since it is checked before it is sent again |
//! | the spool cannot read frames back | that everything before them is acknowledged |

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};

use bytes::Bytes;
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Lane, SOURCES, Source};
use tapio_wire::frame::{Encoder, Header, Stamp};
use tapio_wire::ledger::{Ledger, Reason, Stage};
use tokio::sync::Notify;

use super::{FRAME_OVERHEAD_BYTES, Outbox, OutboxState, Sent};
use crate::base::clock::{boottime_ns, realtime_ns};
use crate::outbox::epochs::{Cause, EndedEpoch};
use crate::outbox::shift::{Shift, relative, sum};
use crate::outbox::spool::Spool;

/// Refusals in a row of one frame, by whatever servers, that end its epoch.
pub const REFUSALS_MAX: u32 = 5;

/// Why an epoch is to end, and what is known of the frames behind the lost ones.
pub(super) enum Ending {
    /// The oldest frame cannot be delivered.
    Oldest { cause: Cause, detail: String },
    /// The first frames on disk are lost; `next` is the first whole one.
    Disk { next: Option<Box<(Header, Ledger)>>, detail: String },
}

/// The last frame of an ended epoch.
#[derive(Clone)]
pub(super) struct Closing {
    bytes: Bytes,
    header: Header,
    /// Events that were acknowledged, by source.
    shipped: [u64; SOURCES],
}

impl Closing {
    /// `None` for bytes that are no whole frame with a place in a sequence.
    pub fn of(bytes: &Bytes) -> Option<Self> {
        let (header, ledger) = Header::check(bytes).ok().filter(|(header, _)| header.seq > 0)?;
        let shipped = Source::ALL.map(|source| ledger.account(source).shipped);
        Some(Self { bytes: bytes.clone(), header, shipped })
    }
}

/// What stood when the next epoch begins: the counters, and the clocks of the frame that states them.
struct Border {
    ledger: Ledger,
    boottime_ns: u64,
    realtime_ns: u64,
}

impl Border {
    fn at(header: &Header, ledger: &Ledger) -> Self {
        Self { ledger: *ledger, boottime_ns: header.boottime_ns, realtime_ns: header.realtime_ns }
    }
}

impl Outbox {
    /// A server has refused a frame of the present stream; `is_at_fault` when it says that the frame is what it refuses. True when
    /// the same one was refused [`REFUSALS_MAX`] times in a row: see [`Outbox::give_up`].
    pub fn refused(&self, is_at_fault: bool) -> bool {
        let mut state = self.state();
        let Some(last) = state.resent.checked_sub(1).and_then(|index| state.sent.get(index)).map(|sent| sent.seq)
        else {
            return false;
        };
        state.suspect_until = state.suspect_until.max(last);
        if !is_at_fault || state.resent != 1 {
            // Which one it was shows when they are sent one by one.
            return false;
        }
        let (seq, times) = state.refusals;
        state.refusals = (last, if seq == last { times + 1 } else { 1 });
        state.refusals.1 >= REFUSALS_MAX
    }

    /// What is wrong with the oldest frame, when it was checked before it was sent again.
    pub fn damage(&self) -> Option<String> {
        self.state().damage.take()
    }

    /// Ends the epoch, since the oldest frame cannot be delivered. It is done when [`Outbox::is_ending`] is false.
    pub fn give_up(&self, cause: Cause, detail: String) {
        let mut state = self.state();
        if self.is_closing {
            tracing::warn!(
                epoch = self.epoch(),
                detail,
                "no server takes the closing frame: the epoch counts as killed"
            );
            clear(&mut state);
            return;
        }
        state.ending = Some(Ending::Oldest { cause, detail });
        state.is_ending = true;
        drop(state);
        if self.has_spool() {
            self.wake_spool();
        } else {
            self.end_when_due(None);
        }
    }

    /// Whether the epoch is to end, and what is to be sent next is not known yet.
    pub fn is_ending(&self) -> bool {
        self.state().is_ending
    }

    /// The spool has lost what was on it from `from_seq` on; `next` is the first whole frame behind that.
    pub fn lost(&self, from_seq: u64, next: Option<(Header, Ledger)>, detail: String) {
        let mut state = self.state();
        let Some((first, last)) = state.on_disk.filter(|&(first, _)| first == from_seq) else { return };
        let next = next.filter(|(header, _)| (first..=last).contains(&header.seq));
        let lost_until = next.as_ref().map_or(last, |(header, _)| header.seq - 1);
        if state.durable_seq >= lost_until {
            // The server has all of it.
            let behind = next.or_else(|| Header::check(&state.spooling.front()?.bytes).ok());
            state.on_disk = next.map(|(header, _)| (header.seq, last));
            state.acked_seq = lost_until;
            state.acked_events = match (behind, &state.end) {
                (Some((header, ledger)), _) => Shift::before(&header, &ledger, 0).shipped(),
                (None, Some(end)) => Source::ALL.map(|source| end.1.account(source).shipped),
                (None, None) => Source::ALL.map(|source| self.stated(&state).account(source).shipped),
            };
            self.go_on_without_disk(&mut state);
            drop(state);
            self.wake_shipper();
            return;
        }
        state.ending = Some(Ending::Disk { next: next.map(Box::new), detail });
    }

    /// Ends the epoch where that is due. Whether it was.
    pub fn end_when_due(&self, mut spool: Option<&mut Spool>) -> bool {
        let mut state = self.state();
        let is_due = match &state.ending {
            None => false,
            Some(Ending::Oldest { .. }) => true,
            Some(Ending::Disk { .. }) => state.sent.is_empty(),
        };
        let Some(ending) = state.ending.take_if(|_| is_due) else { return false };
        state.is_ending = true;
        let (cause, detail, mut next) = match ending {
            Ending::Oldest { cause, detail } => {
                self.drop_oldest(&mut state);
                (cause, detail, None)
            }
            Ending::Disk { next, detail } => (Cause::Spool, detail, Some(next)),
        };
        // The next epoch's counters begin before its first frame, which must be whole for that.
        while state.sent.front().is_some_and(|sent| Header::check(&sent.bytes).is_err()) {
            self.drop_oldest(&mut state);
        }
        if state.sent.is_empty()
            && next.is_none()
            && let Some((first, _)) = state.on_disk
        {
            drop(state);
            next = Some(spool.as_mut().and_then(|spool| spool.next_whole(self.epoch(), first)).map(Box::new));
            state = self.state();
        }
        if let Some(next) = next {
            state.on_disk = state.on_disk.and_then(|(_, last)| next.as_ref().map(|next| (next.0.seq, last)));
            if let Some(next) = next {
                self.end(state, spool, (cause, detail), Some(*next));
                return true;
            }
        }
        if state.on_disk.is_none() {
            while state.spooling.front().is_some_and(|sent| Header::check(&sent.bytes).is_err()) {
                let dropped = state.spooling.pop_front().map_or(0, |sent| sent.bytes.len() + FRAME_OVERHEAD_BYTES);
                state.bytes -= dropped;
            }
        }
        let next = state.sent.front().or(state.spooling.front()).and_then(|sent| Header::check(&sent.bytes).ok());
        self.end(state, spool, (cause, detail), next);
        true
    }

    /// The next epoch begins with `next`, or with what has no place yet.
    fn end(
        &self,
        mut state: MutexGuard<'_, OutboxState>,
        spool: Option<&mut Spool>,
        (cause, detail): (Cause, String),
        next: Option<(Header, Ledger)>,
    ) {
        let (epoch, first_seq) = (self.epoch(), state.acked_seq + 1);
        let goes_on = epoch + 1 < self.epoch_limit && (next.is_some() || !self.is_replay);
        let (shift, border, is_final) = match (&next, &state.end) {
            (Some((header, ledger)), _) if goes_on => {
                (Shift::before(header, ledger, epoch + 1), Border::at(header, ledger), true)
            }
            (_, Some(end)) => (Shift::after(end.0.seq, &end.1, epoch + 1), Border::at(&end.0, &end.1), end.0.is_final),
            (_, None) => {
                let ledger = self.stated(&state);
                let border = Border { ledger, boottime_ns: boottime_ns(), realtime_ns: realtime_ns() };
                (Shift::after(state.next_seq - 1, &ledger, epoch + 1), border, true)
            }
        };
        let shipped = shift.shipped();
        let lost = std::array::from_fn(|index| shipped[index].saturating_sub(state.acked_events[index]));
        let ended = EndedEpoch {
            cause,
            detail,
            epoch,
            next_epoch: goes_on.then_some(shift.epoch),
            first_seq,
            last_seq: shift.seq,
            events: lost.iter().sum(),
            from_ns: state.acked_ns,
            until_ns: border.boottime_ns,
        };
        // Where a server knows of more frames than were acknowledged, their events are not known here: it settles the epoch by what
        // the next one inherits.
        let is_known = state.durable_seq <= state.acked_seq;
        let mut stated = if goes_on { shift.base } else { border.ledger };
        for source in Source::ALL {
            let account = stated.account_mut(source);
            account.shipped = state.acked_events[source as usize];
            account.inherited = border.ledger.account(source).inherited;
            account.drop_events(Stage::Outbox, Reason::Malformed, lost[source as usize]);
        }
        let stamp = Stamp {
            node: self.node,
            epoch,
            seq: first_seq,
            boottime_ns: border.boottime_ns,
            realtime_ns: border.realtime_ns,
            is_final,
        };
        let closing = is_known.then(|| closing_frame(&stamp, &stated)).flatten();
        state.closings.extend(closing.as_ref().and_then(Closing::of));
        if goes_on {
            self.go_on(&mut state, &shift, &lost);
        } else {
            clear(&mut state);
        }
        self.go_on_without_disk(&mut state);
        let is_packer_waiting = state.is_packer_waiting;
        drop(state);
        if let Some(spool) = spool {
            // Before the next epoch's first frame is sent: a server that knows it takes the ended one no more.
            if let Err(error) = spool.end_epoch(epoch, goes_on.then_some(shift), closing, self.node) {
                tracing::warn!(%error, epoch, "cannot note the end of the epoch: its spooled frames are not delivered after a restart");
            }
        }
        self.ended.record(ended);
        self.state().is_ending = false;
        if is_packer_waiting {
            self.queues.wake_packer();
        }
        self.wake_shipper();
    }

    /// What is in memory and on disk is of the next epoch.
    fn go_on(&self, state: &mut OutboxState, shift: &Shift, lost: &[u64; SOURCES]) {
        if !self.is_replay {
            let mut base = state.base.as_ref().map_or(shift.base, |base| sum(base, &shift.base));
            for source in Source::ALL {
                let (account, lost) = (base.account_mut(source), lost[source as usize]);
                self.books.source(source).drop_events(Stage::Outbox, Reason::Malformed, lost);
                account.drop_events(Stage::Outbox, Reason::Malformed, lost);
                account.shipped -= lost.min(account.shipped);
                state.shipped[source as usize] -= lost.min(state.shipped[source as usize]);
            }
            state.base = Some(Box::new(base));
        }
        self.epoch.store(shift.epoch, Ordering::Relaxed);
        let OutboxState { sent, spooling, bytes, suspect_until, .. } = &mut *state;
        *suspect_until = 0;
        for sent in sent.iter_mut().chain(spooling) {
            sent.seq -= shift.seq;
            match shift.apply(&sent.bytes) {
                Ok(moved) => {
                    *bytes = *bytes - sent.bytes.len() + moved.len();
                    sent.bytes = moved;
                }
                // It is damaged too, and ends the next epoch when its turn has come.
                Err(_) => *suspect_until = sent.seq,
            }
        }
        state.on_disk = state.on_disk.map(|(first, last)| (first - shift.seq, last - shift.seq));
        state.spooled_seq = state.spooled_seq.saturating_sub(shift.seq);
        state.taken_seq = state.taken_seq.saturating_sub(shift.seq);
        state.next_seq -= shift.seq;
        if let Some(end) = &mut state.end {
            (end.0.epoch, end.0.seq) = (shift.epoch, end.0.seq - shift.seq);
            end.1 = relative(&end.1, &shift.base);
        }
        (state.resent, state.in_flight_bytes) = (0, 0);
        (state.acked_seq, state.acked_events, state.durable_seq) = (0, [0; SOURCES], 0);
        state.refusals = (0, 0);
        // The next epoch states its counters even if no event follows.
        state.last_stated = Ledger::default();
    }

    /// What is to be sent before anything else, as an outbox of its own: the last frame of an epoch that has ended.
    pub fn closing(&self) -> Option<Arc<Self>> {
        let state = self.state();
        if state.is_ending {
            return None;
        }
        let Closing { bytes, header, shipped } = state.closings.front()?.clone();
        let sent = Sent::again(&header, bytes);
        let state = OutboxState {
            next_seq: header.seq + 1,
            acked_seq: header.seq - 1,
            acked_events: shipped,
            spooled_seq: header.seq,
            bytes: sent.bytes.len() + FRAME_OVERHEAD_BYTES,
            sent: VecDeque::from([sent]),
            is_finished: true,
            ..OutboxState::default()
        };
        Some(Arc::new(Self {
            state: state.into(),
            books: Arc::clone(&self.books),
            queues: Arc::clone(&self.queues),
            node: self.node,
            epoch: header.epoch.into(),
            limit_bytes: self.limit_bytes,
            spool: None,
            is_replay: true,
            is_closing: true,
            epoch_limit: 0,
            generation: Arc::clone(&self.generation),
            ended: Arc::clone(&self.ended),
            changed: Notify::new(),
        }))
    }

    /// The closing frame was delivered, or no server wants it.
    pub fn closing_delivered(&self) {
        self.state().closings.pop_front();
        self.wake_spool();
    }

    /// The ended epochs whose closing frames are to be sent.
    pub fn pending_closings(&self) -> Vec<u64> {
        self.state().closings.iter().map(|closing| closing.header.epoch).collect()
    }

    fn drop_oldest(&self, state: &mut OutboxState) {
        if let Some(sent) = state.sent.pop_front() {
            state.bytes -= sent.bytes.len() + FRAME_OVERHEAD_BYTES;
        }
    }
}

/// Nothing of an earlier run's epoch can go on.
fn clear(state: &mut OutboxState) {
    state.sent.clear();
    state.on_disk = None;
    (state.resent, state.in_flight_bytes) = (0, 0);
    state.acked_seq = state.spooled_seq;
}

fn closing_frame(stamp: &Stamp, ledger: &Ledger) -> Option<Bytes> {
    Some(Encoder::default().seal(&Body::default(), Lane::Bulk, Compression::None).ok()?.stamp(stamp, ledger))
}

#[cfg(test)]
mod tests;
