//! The consumer of a ring, BPF or memfd.
//!
//! In: a mapped ring. Out: committed records in order, as borrowed bytes. Held: the consumer position, which is this side's
//! alone: it is published in the consumer page and, after attach, never read back from there.
//!
//! What must hold:
//! - **R1** `position` is a multiple of eight and `position <= end <= position + capacity` for every `end` that
//!   `check_producer` lets through, whatever the producer page holds;
//! - **R2** a record is handed out only if its header, loaded once, places it wholly below `end` with a length within
//!   the limit. The data's beginning is mapped once more behind the data, so the record is then inside the mapping;
//! - **R3** the stored position covers the records handed out (the one whose callback panicked included) and no other;
//! - **R4** a drain ends: each turn advances by eight or more towards an `end` that was loaded once.
//!
//! Copy or not. The kernel does not write a record between its commit and the moment when the consumer position passes
//! it. User space cannot write it at all. So records of a BPF ring are handed out in place. The peer of a memfd ring
//! can write any time, and a `&[u8]` whose bytes change is undefined behaviour, besides the invitation to check one
//! value and use another. Its records are therefore copied to private memory first, a stretch of many at once
//! (`stretch.rs`).

use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::slice;

use crate::error::{Corruption, Error};
use crate::layout::{self, DISCARD_BIT, HEADER_BYTES, LENGTH_MASK, RECORD_ALIGN};
use crate::mapping::RingMapping;
use crate::memfd::{self, Limits};
use crate::protocol;
use crate::stretch::{Step, Steps, Stop, Stretch};
use crate::sync::Ordering;

/// What one [`Reader::drain`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Records handed out.
    pub records: usize,
    /// Records skipped because their producer gave them up.
    pub discarded: usize,
    /// Bytes of the records handed out, headers not counted.
    pub bytes: usize,
    /// True if the drain stopped at a record that is reserved and not yet committed.
    pub stalled: bool,
    /// True if the drain stopped before the end for another reason: the bound, or the callback.
    pub more: bool,
}

/// What a memfd ring's producer says of itself; a hostile one can say anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProducerCounters {
    /// Records attempted, dropped ones included.
    pub emitted: u64,
    /// Records that did not fit.
    pub dropped: u64,
}

/// Drains one ring. At most one reader may drain a ring.
pub struct Reader {
    ring: RingMapping,
    position: u64,
    /// The last producer position that was let through.
    producer_seen: u64,
    consumed: u64,
    /// Where records are copied before they are handed out; `None` for BPF rings.
    scratch: Option<Stretch>,
    /// The records of a BPF ring that were drained last had equal headers for the most part.
    were_alike: bool,
    corrupt: Option<Error>,
}

impl Reader {
    /// Maps a `BPF_MAP_TYPE_RINGBUF` map; `data_bytes` is its `max_entries`, `record_bytes_max` the longest record that its
    /// programs write. One that is longer, by more than the rest of a page, makes the ring corrupt.
    pub fn from_bpf_map(map: BorrowedFd<'_>, data_bytes: usize, record_bytes_max: usize) -> Result<Self, Error> {
        let page_bytes = rustix::param::page_size();
        if !layout::is_data_size(data_bytes, page_bytes) {
            return Err(Error::DataSize { data_bytes, page_bytes });
        }
        let advice = "check that the descriptor is a BPF ring buffer map and data_bytes its max_entries";
        let ring = RingMapping::of_bpf_map(map, data_bytes, record_bytes_max)
            .map_err(Error::system("map the BPF ring buffer", advice))?;
        Self::attach(ring, None)
    }

    /// Maps a ring that a peer made, treated as hostile.
    ///
    /// Refused, before it is mapped, unless it is a memfd sealed with `F_SEAL_SHRINK`, `F_SEAL_GROW` and `F_SEAL_SEAL` whose
    /// size is that of a ring within `limits`. A reader that attaches to a ring with a past carries on where the last one
    /// stored its position.
    pub fn from_memfd(memfd: OwnedFd, limits: Limits) -> Result<Self, Error> {
        let ring = memfd::attach(memfd.as_fd(), &limits)?;
        let record_bytes_max = limits.record_bytes_max.min(ring.data_bytes()) as u32;
        Self::attach(ring, Some(Stretch::new(record_bytes_max)))
    }

    fn attach(ring: RingMapping, scratch: Option<Stretch>) -> Result<Self, Error> {
        let page = ring.consumer_page();
        let position = protocol::observe(&page.position.0);
        let consumed = if scratch.is_some() { page.consumed.0.load(Ordering::Relaxed) } else { 0 };
        let mut reader =
            Self { ring, position, producer_seen: position, consumed, scratch, were_alike: true, corrupt: None };
        if !position.is_multiple_of(RECORD_ALIGN as u64) {
            return Err(reader.poison(Corruption::Misaligned));
        }
        reader.check_producer()?;
        Ok(reader)
    }

    /// Hands up to `max_records` committed records to `each`, in order, and stores the consumer position once, at the end.
    ///
    /// Discarded records are skipped and count towards the bound. It stops at a busy record: [`Drained::stalled`]. A reader
    /// that found its ring corrupt hands out nothing more and repeats its error; records handed out before that are consumed.
    /// If `each` panics, its record is consumed and those behind it are not.
    #[inline]
    pub fn drain(&mut self, max_records: usize, mut each: impl FnMut(&[u8])) -> Result<Drained, Error> {
        self.drain_while(max_records, |record| {
            each(record);
            ControlFlow::Continue(())
        })
    }

    /// Drains as [`Self::drain`]; `ahead` sees each record some time before `each` does, in the same order, so that it
    /// can prefetch memory. Records of BPF rings are not shown ahead: nothing has read their headers yet.
    #[inline]
    pub fn drain_ahead<T>(
        &mut self,
        max_records: usize,
        taker: &mut T,
        ahead: impl Fn(&T, &[u8]),
        each: impl Fn(&mut T, &[u8]),
    ) -> Result<Drained, Error> {
        self.drain_with::<true>(max_records, |turn, record| {
            match turn {
                Turn::Ahead => ahead(taker, record),
                Turn::Own => each(taker, record),
            }
            ControlFlow::Continue(())
        })
    }

    /// Drains as [`Self::drain`], and stops after the record for which `each` returns `Break`.
    #[inline]
    pub fn drain_while(
        &mut self,
        max_records: usize,
        mut each: impl FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<Drained, Error> {
        self.drain_with::<false>(max_records, |_, record| each(record))
    }

    #[inline]
    fn drain_with<const AHEAD: bool>(
        &mut self,
        max_records: usize,
        mut show: impl FnMut(Turn, &[u8]) -> ControlFlow<()>,
    ) -> Result<Drained, Error> {
        if let Some(error) = &self.corrupt {
            return Err(error.clone());
        }
        let end = self.check_producer()?;
        let progress = Progress {
            ring: &self.ring,
            start: self.position,
            position: self.position,
            records: 0,
            copied: self.scratch.is_some(),
            stored_position: &mut self.position,
            stored_consumed: &mut self.consumed,
        };
        // Two loops, so that neither asks at each record which kind of ring it is.
        let drained = match self.scratch.as_mut() {
            None => drain_in_place(progress, end, max_records, &mut self.were_alike, |record| show(Turn::Own, record)),
            Some(scratch) => drain_copied::<AHEAD>(progress, end, max_records, scratch, show),
        };
        drained.map_err(|what| self.poison(what))
    }

    /// Whether nothing was produced that is not consumed. A corrupt ring is empty: nothing more will come from it.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.pending_bytes() == 0
    }

    /// Bytes produced and not consumed, headers and busy records included; at most the capacity, whatever the peer says.
    #[inline]
    pub fn pending_bytes(&self) -> usize {
        if self.corrupt.is_some() {
            return 0;
        }
        let end = protocol::observe(&self.ring.producer_page().position.0);
        // A wrong position is reported as something pending, so that the next drain finds out.
        end.wrapping_sub(self.position).min(self.ring.data_bytes() as u64) as usize
    }

    /// Bytes of the data area.
    pub fn capacity_bytes(&self) -> usize {
        self.ring.data_bytes()
    }

    /// Records handed out. For memfd rings the count carries on from the last reader's.
    pub fn consumed(&self) -> u64 {
        self.consumed
    }

    /// The producer's own counts; `None` for BPF rings, whose counts are in a map ([`crate::CounterArray`]).
    ///
    /// With an honest producer, `emitted - dropped - consumed()` records are still in the ring.
    pub fn producer_counters(&self) -> Option<ProducerCounters> {
        self.scratch.as_ref()?;
        let page = self.ring.producer_page();
        // D: first `dropped`, so that `emitted` includes them.
        let dropped = protocol::observe(&page.dropped.0);
        let emitted = page.emitted.0.load(Ordering::Relaxed);
        Some(ProducerCounters { emitted, dropped })
    }

    /// Drops that a reader of this ring has already declared; `None` for BPF rings.
    ///
    /// It is kept in the ring so that it outlives the reader; the peer can change it.
    pub fn accounted_dropped(&self) -> Option<u64> {
        self.scratch.as_ref()?;
        Some(self.ring.consumer_page().accounted_dropped.0.load(Ordering::Relaxed))
    }

    /// Remembers in the ring how many drops have been declared. Does nothing for BPF rings.
    pub fn set_accounted_dropped(&self, dropped: u64) {
        if self.scratch.is_some() {
            self.ring.consumer_page().accounted_dropped.0.store(dropped, Ordering::Relaxed);
        }
    }

    /// Asks the writer of a memfd ring for a wakeup, or no longer. After asking, look at [`Self::is_empty`] before sleeping.
    ///
    /// Does nothing for BPF rings: their flag is a [`crate::WakeupFlag`].
    pub fn set_need_wakeup(&self, wanted: bool) {
        if self.scratch.is_some() {
            protocol::request_wakeup(&self.ring.consumer_page().need_wakeup.0, wanted);
        }
    }

    /// Whether the writer of a memfd ring declares that it wakes the reader before three eighths of the ring are
    /// unread. False for BPF rings, whose programs do as they were written. A peer that breaks its declaration loses
    /// only its own records.
    pub fn is_woken_when_filling(&self) -> bool {
        self.scratch.is_some() && self.ring.producer_page().identity.0.wakes.load(Ordering::Relaxed) == 1
    }

    /// Loads the producer position and lets it through if R1 holds.
    #[inline]
    fn check_producer(&mut self) -> Result<u64, Error> {
        let end = protocol::observe(&self.ring.producer_page().position.0);
        let ahead = end.wrapping_sub(self.position);
        let what = if ahead > self.ring.data_bytes() as u64 {
            Corruption::OutOfReach
        } else if !ahead.is_multiple_of(RECORD_ALIGN as u64) {
            Corruption::Misaligned
        } else if ahead < self.producer_seen.wrapping_sub(self.position) {
            Corruption::Rewound
        } else {
            self.producer_seen = end;
            return Ok(end);
        };
        Err(self.poison(what))
    }

    #[cold]
    fn poison(&mut self, what: Corruption) -> Error {
        let error = Error::Corrupt { position: self.position, what };
        self.corrupt = Some(error.clone());
        error
    }
}

/// Why a record is shown.
enum Turn {
    /// The record will be handed out soon.
    Ahead,
    /// The record is handed out.
    Own,
}

/// How far a drain has come. Its drop stores the position, also when a callback panics: R3.
struct Progress<'a> {
    ring: &'a RingMapping,
    start: u64,
    position: u64,
    records: u64,
    /// A memfd ring: the count of consumed records is shared as well.
    copied: bool,
    stored_position: &'a mut u64,
    stored_consumed: &'a mut u64,
}

impl Drop for Progress<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.position == self.start {
            return;
        }
        *self.stored_position = self.position;
        *self.stored_consumed = self.stored_consumed.wrapping_add(self.records);
        let page = self.ring.consumer_page();
        if self.copied {
            page.consumed.0.store(*self.stored_consumed, Ordering::Relaxed);
        }
        // B: the space is the producer's again, after the last read of it.
        protocol::publish(&page.position.0, self.position);
    }
}

impl Progress<'_> {
    /// Moves behind a record of `bytes`, its header included; whether it is to be handed out.
    #[inline(always)]
    fn pass(&mut self, header: u32, bytes: u64, drained: &mut Drained) -> bool {
        self.position = self.position.wrapping_add(bytes);
        if header & DISCARD_BIT != 0 {
            drained.discarded += 1;
            return false;
        }
        self.records += 1;
        drained.bytes += (header & LENGTH_MASK) as usize;
        true
    }

    fn finish(&self, mut drained: Drained, end: u64, stalled: bool) -> Drained {
        drained.records = self.records as usize;
        drained.stalled = stalled;
        drained.more = self.position != end && !stalled;
        drained
    }
}

#[inline]
fn drain_in_place(
    mut progress: Progress<'_>,
    end: u64,
    max_records: usize,
    were_alike: &mut bool,
    mut each: impl FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<Drained, Corruption> {
    let mut drained = Drained::default();
    let mut steps = Steps::new(progress.ring.record_bytes_max(), *were_alike);
    let mut stalled = false;
    for _ in 0..max_records {
        if progress.position == end {
            break;
        }
        let place = progress.ring.record(progress.position);
        let [word, _] = progress.ring.header(progress.position);
        let (header, bytes) = match steps.check(word, end.wrapping_sub(progress.position))? {
            Step::Busy => {
                stalled = true;
                break;
            }
            Step::Whole { header, bytes } => (header, bytes),
        };
        if !progress.pass(header, bytes, &mut drained) {
            continue;
        }
        // SAFETY: R2 puts the header and the payload inside of the data area and its overlap (M3).
        let payload = unsafe { place.add(HEADER_BYTES) };
        // SAFETY: the record is committed (C). The kernel, its only writer, does not touch it until the consumer
        // position passes it, which happens after the loop.
        let record = unsafe { slice::from_raw_parts(payload.as_ptr(), (header & LENGTH_MASK) as usize) };
        if each(record).is_break() {
            break;
        }
    }
    *were_alike = steps.were_alike(progress.records as usize + drained.discarded);
    Ok(progress.finish(drained, end, stalled))
}

#[inline]
fn drain_copied<const AHEAD: bool>(
    mut progress: Progress<'_>,
    end: u64,
    max_records: usize,
    stretch: &mut Stretch,
    mut show: impl FnMut(Turn, &[u8]) -> ControlFlow<()>,
) -> Result<Drained, Corruption> {
    let mut drained = Drained::default();
    let mut left = max_records;
    loop {
        let words = progress.ring.words(progress.position, end.wrapping_sub(progress.position));
        let (taken, stop) = stretch.copy(words, left);
        left -= taken;
        if AHEAD {
            let _ = stretch.each(|header, _, record| {
                if header & DISCARD_BIT == 0 { show(Turn::Ahead, record) } else { ControlFlow::Continue(()) }
            });
        }
        let handed_out = stretch.each(|header, bytes, record| {
            if progress.pass(header, bytes, &mut drained) { show(Turn::Own, record) } else { ControlFlow::Continue(()) }
        });
        if handed_out.is_break() {
            return Ok(progress.finish(drained, end, false));
        }
        match stop {
            Stop::Bound if left > 0 && progress.position != end => {}
            Stop::Bound => return Ok(progress.finish(drained, end, false)),
            Stop::Busy => return Ok(progress.finish(drained, end, true)),
            Stop::Corrupt(what) => return Err(what),
        }
    }
}
