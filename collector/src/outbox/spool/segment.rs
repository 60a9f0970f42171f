//! One segment of the spool: which frames it holds, of which epoch they are, and what was left of one by an earlier run.

use std::fs::File;
use std::io;

use bytes::Bytes;
use tapio_wire::event::{SOURCES, Source};
use tapio_wire::frame::Header;
use tapio_wire::ledger::Ledger;
use tapio_wire::segment::SEGMENT_HEADER_BYTES;

use super::records::{Step, Whole, behind_unreadable, search, step};
use crate::outbox::shift::{Shift, relative};

/// One segment file of the spool.
pub(super) struct Segment {
    pub number: u64,
    pub node: u64,
    /// The epoch that its frames bear on disk.
    pub written_epoch: u64,
    /// The epoch that they are of, and their places in it; see `shift`.
    pub epoch: u64,
    pub first_seq: u64,
    pub last_seq: u64,
    pub bytes: u64,
    pub acked_events: [u64; SOURCES],
    /// How its frames come into `epoch`, where that is another than they bear.
    pub shift: Option<Box<Shift>>,
    /// Header and counters of its last frame, where it is of an earlier run.
    pub end: Option<Box<(Header, Ledger)>>,
}

impl Segment {
    /// Makes the entry of a segment whose first frame is this one.
    pub fn beginning_with(number: u64, header: &Header, ledger: &Ledger) -> Self {
        Self {
            number,
            node: header.node,
            written_epoch: header.epoch,
            epoch: header.epoch,
            first_seq: header.seq,
            last_seq: header.seq,
            bytes: SEGMENT_HEADER_BYTES as u64,
            acked_events: Source::ALL.map(|source| {
                let events = u64::from(header.source_events[source as usize]);
                ledger.account(source).shipped.saturating_sub(events)
            }),
            shift: None,
            end: None,
        }
    }

    /// What stands before the first frame of `epoch`, by the epoch that the frames bear.
    pub fn seq_before(&self) -> u64 {
        self.shift.as_ref().map_or(0, |shift| shift.seq)
    }

    /// The place of a frame in `epoch`; `None` when it is not of that epoch.
    pub fn seq_of(&self, header: &Header) -> Option<u64> {
        let seq = header.seq.checked_sub(self.seq_before()).filter(|&seq| seq > 0)?;
        (header.epoch == self.written_epoch).then_some(seq)
    }

    /// A frame as it is in `epoch`.
    pub fn frame(&self, whole: Box<Whole>) -> io::Result<Bytes> {
        match &self.shift {
            Some(shift) => shift.apply(&whole.frame).map_err(io::Error::other),
            None => Ok(whole.frame),
        }
    }

    /// Counts the frames behind the start of the next epoch to that epoch. Returns false if there are none.
    pub fn shift(&mut self, shift: &Shift) -> bool {
        if self.last_seq <= shift.seq {
            return false;
        }
        for (acked, shipped) in self.acked_events.iter_mut().zip(shift.shipped()) {
            *acked = acked.saturating_sub(shipped);
        }
        if self.first_seq <= shift.seq {
            self.acked_events = [0; SOURCES];
        }
        self.epoch = shift.epoch;
        self.first_seq = self.first_seq.saturating_sub(shift.seq).max(1);
        self.last_seq -= shift.seq;
        if let Some((header, ledger)) = self.end.as_deref_mut() {
            (header.epoch, header.seq) = (shift.epoch, self.last_seq);
            *ledger = relative(ledger, &shift.base);
        }
        self.shift = Some(Box::new(self.shift.as_ref().map_or_else(|| shift.clone(), |first| first.then(shift))));
        true
    }
}

/// What a segment of an earlier run holds, up to the last frame whose header is whole; frames before that may be missing.
pub(super) fn scan(number: u64, file: &File) -> io::Result<Option<Segment>> {
    let end = file.metadata()?.len();
    let mut offset = SEGMENT_HEADER_BYTES as u64;
    let mut segment: Option<Segment> = None;
    loop {
        let (header, ledger, next) = match step(file, number, offset, end) {
            Ok(Step::Whole(whole)) => (whole.header, whole.ledger, whole.next),
            // The reader finds that it is damaged; which one it is, is known.
            Ok(Step::Damaged { next, head: Some(head) }) => (head.0, head.1, next),
            Ok(Step::Damaged { next, head: None }) => {
                offset = next;
                continue;
            }
            Ok(Step::End) => return Ok(segment),
            Err(_) => match search(file, number, behind_unreadable(offset), end) {
                Some(next) => {
                    offset = next;
                    continue;
                }
                None => return Ok(segment),
            },
        };
        match &mut segment {
            None => segment = Some(Segment::beginning_with(number, &header, &ledger)),
            Some(known) if header.epoch == known.epoch && header.seq > known.last_seq => known.last_seq = header.seq,
            Some(_) => return Ok(segment),
        }
        offset = next;
        if let Some(known) = &mut segment {
            known.bytes = offset;
            known.end = Some(Box::new((header, ledger)));
        }
    }
}
