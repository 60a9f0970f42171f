//! The shift: how frames that were stamped for an epoch that has ended become frames of the next one.
//!
//! What enters: a frame of the ended epoch, and what that epoch accounts for. What leaves: the same frame in the next epoch. What
//! must hold, for each source: what both epochs together say was emitted, dropped and shipped is what the ended one alone would
//! have said without the loss.
//!
//! ```text
//!  ended epoch   1 … n acknowledged │ n+1 lost │ n+2  n+3 …
//!                                                 │    │   epoch, seq − (n+1), counters − base
//!                closing frame at n+1             ▼    ▼
//!  next epoch                                     1    2  …
//! ```
//!
//! Only header and ledger of a frame are rewritten; its payload and the payload's checksum stay.

use bytes::Bytes;
use tapio_wire::error::FrameError;
use tapio_wire::event::{SOURCES, Source};
use tapio_wire::frame::{Header, restamp};
use tapio_wire::ledger::Ledger;

/// Renumbers the frames of an ended epoch for the next one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shift {
    /// The epoch that goes on.
    pub epoch: u64,
    /// The frames before its first one, by the ended epoch's count.
    pub seq: u64,
    /// What the ended epoch accounts for: `emitted` is `shipped` and all drops together. Its `shipped` includes the lost frames.
    pub base: Ledger,
}

impl Shift {
    /// The next epoch begins with the frame that has this header and ledger.
    pub fn before(header: &Header, ledger: &Ledger, epoch: u64) -> Self {
        let mut shift = Self::after(header.seq - 1, ledger, epoch);
        for source in Source::ALL {
            let events = u64::from(header.source_events[source as usize]);
            let account = shift.base.account_mut(source);
            account.shipped = account.shipped.saturating_sub(events);
            account.emitted = account.emitted.saturating_sub(events);
        }
        shift
    }

    /// The next epoch begins behind the frame `seq`, when the counters were these.
    pub fn after(seq: u64, ledger: &Ledger, epoch: u64) -> Self {
        let mut base = *ledger;
        for account in &mut base.accounts {
            account.emitted = account.shipped.saturating_add(account.dropped_total());
            account.inherited = 0;
        }
        Self { epoch, seq, base }
    }

    /// Events of each source in the frames of the ended epoch.
    pub fn shipped(&self) -> [u64; SOURCES] {
        Source::ALL.map(|source| self.base.account(source).shipped)
    }

    /// A frame of the ended epoch as one of the next.
    ///
    /// # Errors
    /// What is wrong with the frame.
    pub fn apply(&self, frame: &[u8]) -> Result<Bytes, FrameError> {
        let (header, _) = Header::check(frame)?;
        restamp(frame, self.epoch, header.seq.saturating_sub(self.seq), |ledger| relative(ledger, &self.base))
    }

    /// Combines this shift with a later one.
    pub fn then(&self, next: &Self) -> Self {
        Self { epoch: next.epoch, seq: self.seq + next.seq, base: sum(&self.base, &next.base) }
    }
}

/// What is left of the counters when an ended epoch accounts for `base`: what that emitted is inherited.
pub fn relative(ledger: &Ledger, base: &Ledger) -> Ledger {
    let mut rest = *ledger;
    for (account, base) in rest.accounts.iter_mut().zip(&base.accounts) {
        account.inherited = account.inherited.saturating_add(base.emitted);
        account.emitted = account.emitted.saturating_sub(base.emitted);
        account.shipped = account.shipped.saturating_sub(base.shipped);
        for (count, gone) in account.dropped.iter_mut().flatten().zip(base.dropped.iter().flatten()) {
            *count = count.saturating_sub(*gone);
        }
    }
    rest
}

/// Both together.
pub fn sum(first: &Ledger, second: &Ledger) -> Ledger {
    let mut sum = *first;
    for (account, more) in sum.accounts.iter_mut().zip(&second.accounts) {
        account.emitted = account.emitted.saturating_add(more.emitted);
        account.shipped = account.shipped.saturating_add(more.shipped);
        for (count, more) in account.dropped.iter_mut().flatten().zip(more.dropped.iter().flatten()) {
            *count = count.saturating_add(*more);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use tapio_wire::compress::Compression;
    use tapio_wire::event::{Body, Detail, Event, Lane};
    use tapio_wire::frame::{Encoder, Stamp};
    use tapio_wire::ledger::{Reason, Stage};

    use super::*;

    /// A frame of 10 events, after `seq − 1` others of 10; of each ten emitted, one more was dropped and one is held.
    fn frame(seq: u64) -> Bytes {
        let event = Event { time_ns: 1, entity: 1, pid: 1, source: Source::Shm, body: Detail::RunQueue { wait_ns: 1 } };
        let body = Body { events: vec![event; 10], ..Body::default() };
        let sealed = Encoder::default().seal(&body, Lane::Bulk, Compression::None).expect("within the limits");
        let mut ledger = Ledger::default();
        let account = ledger.account_mut(Source::Shm);
        (account.emitted, account.shipped, account.inherited) = (12 * seq, 10 * seq, 5);
        account.drop_events(Stage::Ring, Reason::Full, seq);
        sealed.stamp(&Stamp { node: 7, epoch: 3, seq, boottime_ns: 1, realtime_ns: 1, is_final: false }, &ledger)
    }

    fn account(frame: &Bytes) -> (Header, tapio_wire::ledger::Account) {
        let (header, ledger) = Header::check(frame).expect("a whole frame");
        (header, *ledger.account(Source::Shm))
    }

    #[test]
    fn the_next_epoch_holds_what_was_held() {
        let (header, ledger) = Header::check(&frame(4)).expect("whole");
        let shift = Shift::before(&header, &ledger, 9);
        assert_eq!((shift.seq, shift.shipped()[Source::Shm as usize]), (3, 30));
        assert_eq!(shift.base.account(Source::Shm).held(), 0);
        let (first, account_of_first) = account(&shift.apply(&frame(4)).expect("sound"));
        assert_eq!((first.epoch, first.seq), (9, 1));
        assert_eq!((account_of_first.shipped, account_of_first.dropped_total(), account_of_first.held()), (10, 0, 4));
        let (second, account_of_second) = account(&shift.apply(&frame(5)).expect("sound"));
        assert_eq!((second.seq, account_of_second.shipped, account_of_second.dropped_total()), (2, 20, 1));
        let whole = account(&frame(5)).1;
        let base = shift.base.account(Source::Shm);
        assert_eq!(base.emitted + account_of_second.emitted, whole.emitted);
        assert_eq!(account_of_second.inherited, whole.inherited + base.emitted);
    }

    #[test]
    fn two_shifts_are_one() {
        let shift_to = |first: &Bytes, epoch| {
            let (header, ledger) = Header::check(first).expect("whole");
            Shift::before(&header, &ledger, epoch)
        };
        let one = shift_to(&frame(4), 9);
        let two = shift_to(&one.apply(&frame(6)).expect("sound"), 10);
        let both = one.then(&two);
        for seq in 6..9 {
            let twice = two.apply(&one.apply(&frame(seq)).expect("sound")).expect("sound");
            assert_eq!(both.apply(&frame(seq)).expect("sound"), twice);
        }
    }

    #[test]
    fn a_damaged_frame_is_not_made_sound() {
        let shift = Shift::after(0, &Ledger::default(), 9);
        let mut damaged = frame(1).to_vec();
        damaged[200] ^= 1;
        assert_eq!(shift.apply(&damaged), Err(FrameError::PayloadChecksum));
    }
}
