//! Records checked by their headers, and stretches of them copied out of memory that a peer can write.
//!
//! In: the words of a ring between the consumer and the producer position. Out: runs of whole records, and private bytes. Held:
//! the private memory.
//!
//! A stretch is taken in two passes over the shared memory. The first loads each header once and stores its content, by
//! runs of equal headers. The second copies all bytes. The copy is walked by these runs, never by the headers in the
//! copy, which the peer may have changed in between.
//!
//! What must hold:
//! - **H1** the runs are of committed records, and what they span is no more than the words given and than the private memory;
//! - **H2** each header that is looked at moves eight bytes or more through the private memory, so a stretch ends.

use std::ops::{ControlFlow, Range};
use std::slice;

use crate::error::Corruption;
use crate::layout::{self, BUSY_BIT, HEADER_BYTES, LENGTH_MASK};
use crate::prefetch::prefetch;
use crate::protocol;
use crate::sync::{AtomicU32, AtomicU64};

/// Bytes copied at once: they and their originals stay in the first-level cache.
const STRETCH_BYTES: usize = 12 << 10;
/// Runs of equal headers copied at once; where every record is unlike the one before, this many records.
const RUNS_MAX: usize = 256;

/// How far ahead of the current header to prefetch, in words. Walking so far over unlike records takes about as long as
/// a line takes to come from another processor.
const PREFETCH_WORDS: usize = 64;

/// Words left free before the copies, so that they lie in their cache lines as the originals do.
const SKEW_MAX: usize = 7;

/// What a header says.
pub(crate) enum Step {
    /// A record, committed or given up, with its size including its header.
    Whole { header: u32, bytes: u64 },
    /// A record is reserved and not yet committed.
    Busy,
}

/// Checks one header after the other.
///
/// Where the next header is follows from this one, so a walk waits for each load in turn: ten cycles a record. A processor does
/// not wait for a branch, so while records are mostly alike, a header that equals the last one is answered by what is known of
/// that one. Where they are not, the branch would be guessed wrong, which costs more than the wait.
pub(crate) struct Steps {
    record_bytes_max: u32,
    are_alike: bool,
    /// The last header; wider than one at first.
    last: u64,
    last_bytes: u64,
    changes: usize,
}

impl Steps {
    /// `are_alike` is what [`Self::were_alike`] said of the records before.
    pub fn new(record_bytes_max: u32, are_alike: bool) -> Self {
        Self { record_bytes_max, are_alike, last: u64::MAX, last_bytes: 0, changes: 0 }
    }

    /// Loads the header once; `ahead` bytes were produced from it on.
    #[inline(always)]
    pub fn check(&mut self, word: &AtomicU32, ahead: u64) -> Result<Step, Corruption> {
        let header = protocol::observe_header(word);
        let changed = u64::from(header) != self.last;
        if !self.are_alike | changed {
            if header & BUSY_BIT != 0 {
                return Ok(Step::Busy);
            }
            let length = header & LENGTH_MASK;
            self.last_bytes = layout::record_bytes(length);
            if self.last_bytes <= ahead && length > self.record_bytes_max {
                return Err(Corruption::OverLimit);
            }
            self.last = header.into();
            self.changes += usize::from(changed);
        }
        if self.last_bytes > ahead {
            return Err(Corruption::Overlong);
        }
        Ok(Step::Whole { header, bytes: self.last_bytes })
    }

    /// True if at most a quarter of these records changed the header.
    #[inline]
    pub fn were_alike(&self, records: usize) -> bool {
        // The first is always a change.
        self.changes.saturating_sub(1) * 4 <= records
    }
}

/// Why a stretch ends where it does.
pub(crate) enum Stop {
    /// Nothing more was produced, asked for, or would have fitted.
    Bound,
    /// The next record is reserved and not yet committed.
    Busy,
    /// The next record violates the layout.
    Corrupt(Corruption),
}

/// Records with equal headers that follow each other.
#[derive(Clone, Copy, Default)]
struct Run {
    header: u32,
    records: u32,
}

/// Private copies of records that follow each other.
pub(crate) struct Stretch {
    words: Box<[u64]>,
    runs: Box<[Run]>,
    record_bytes_max: u32,
    are_alike: bool,
    run_count: usize,
    /// Where the copies are in `words`.
    copied: Range<usize>,
}

impl Stretch {
    /// One that takes records of up to `record_bytes_max` bytes.
    pub fn new(record_bytes_max: u32) -> Self {
        let bytes = STRETCH_BYTES.max(layout::record_bytes(record_bytes_max) as usize);
        Self {
            words: vec![0; bytes / HEADER_BYTES + SKEW_MAX].into_boxed_slice(),
            runs: vec![Run::default(); RUNS_MAX].into_boxed_slice(),
            record_bytes_max,
            are_alike: true,
            run_count: 0,
            copied: 0..0,
        }
    }

    /// Replaces the stretch by up to `max_records` records from the front of `ahead`; says how many, and why no more.
    #[inline]
    pub fn copy(&mut self, ahead: &[AtomicU64], max_records: usize) -> (usize, Stop) {
        let within = &ahead[..ahead.len().min(self.words.len() - SKEW_MAX)];
        let mut steps = Steps::new(self.record_bytes_max, self.are_alike);
        let (mut at, mut left, mut run_count) = (0, max_records, 0);
        let mut stop = Stop::Bound;
        for run in &mut self.runs {
            let Some(word) = within.get(at).filter(|_| left > 0) else { break };
            // Records that are alike are loaded many at a time by guessing; others one after the other.
            if !steps.are_alike
                && let Some(soon) = ahead.get(at + PREFETCH_WORDS)
            {
                prefetch(soon);
            }
            let (header, step) =
                match steps.check(layout::length_word(word), ((ahead.len() - at) * HEADER_BYTES) as u64) {
                    Ok(Step::Whole { header, bytes }) => (header, bytes as usize / HEADER_BYTES),
                    Ok(Step::Busy) => {
                        stop = Stop::Busy;
                        break;
                    }
                    Err(what) => {
                        stop = Stop::Corrupt(what);
                        break;
                    }
                };
            // What is behind the next record when there is one; those of the same header need no further check.
            let mut behind = at + step;
            if behind > within.len() {
                break;
            }
            let before = left;
            loop {
                at = behind;
                left -= 1;
                behind += step;
                if !steps.are_alike || left == 0 || behind > within.len() {
                    break;
                }
                if protocol::observe_header(layout::length_word(&within[at])) != header {
                    break;
                }
            }
            *run = Run { header, records: (before - left) as u32 };
            run_count += 1;
        }
        // C: the payloads are loaded after the headers that say they are committed.
        self.copied = copy_from(&mut self.words, &within[..at]);
        self.run_count = run_count;
        self.are_alike = steps.were_alike(max_records - left);
        (max_records - left, stop)
    }

    /// Shows the records in order, until asked to stop: each header as it was checked, the bytes that the record takes in the ring,
    /// and its own.
    #[inline(always)]
    pub fn each(&self, mut show: impl FnMut(u32, u64, &[u8]) -> ControlFlow<()>) -> ControlFlow<()> {
        let mut rest = self.bytes();
        for run in &self.runs[..self.run_count] {
            let length = (run.header & LENGTH_MASK) as usize;
            let bytes = layout::record_bytes(length as u32);
            for _ in 0..run.records {
                let (record, behind) = rest.split_at(bytes as usize);
                rest = behind;
                show(run.header, bytes, &record[HEADER_BYTES..][..length])?;
            }
        }
        ControlFlow::Continue(())
    }

    /// The bytes of the records; those of their headers are not to be trusted.
    #[inline]
    fn bytes(&self) -> &[u8] {
        let words = &self.words[self.copied.clone()];
        // SAFETY: any bytes are valid, and these are private and borrowed as long as the slice.
        unsafe { slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
    }
}

/// Copies words that a peer may be writing, and returns the range that they take in `to`. It starts as far into a cache
/// line as in `from`, so that loads and stores of whole lines match. There must be room for [`SKEW_MAX`] more.
#[inline(always)]
fn copy_from(to: &mut [u64], from: &[AtomicU64]) -> Range<usize> {
    let apart = from.as_ptr().addr().wrapping_sub(to.as_ptr().addr()) / size_of::<u64>();
    let copied = apart & SKEW_MAX..(apart & SKEW_MAX) + from.len();
    copy_words(&mut to[copied.clone()], from);
    copied
}

/// Copies words that a peer may be writing. Slices are of the same length.
#[inline(always)]
#[cfg(target_arch = "x86_64")]
fn copy_words(to: &mut [u64], from: &[AtomicU64]) {
    assert_eq!(to.len(), from.len());
    // SAFETY: both ranges are as long as the count says and valid by their references; they do not overlap, since `to`
    // is exclusive. Compilers take atomic loads one by one; this instruction moves a cache line at a time. Each byte
    // that it loads was stored by the peer at some time, as with atomic loads. Nothing is assumed of it, since the
    // compiler does not see the access. The direction flag is clear at every `asm!`.
    unsafe {
        std::arch::asm!(
            "rep movsq",
            inout("rcx") to.len() => _,
            inout("rdi") to.as_mut_ptr() => _,
            inout("rsi") from.as_ptr() => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Copies words that a peer may be writing, eight a turn: compilers do not unroll atomic loads by themselves. Slices are of the
/// same length.
#[inline(always)]
#[cfg(not(target_arch = "x86_64"))]
fn copy_words(to: &mut [u64], from: &[AtomicU64]) {
    use crate::sync::Ordering;
    assert_eq!(to.len(), from.len());
    let (to_blocks, to_rest) = to.as_chunks_mut::<8>();
    let (from_blocks, from_rest) = from.as_chunks::<8>();
    for (to, from) in to_blocks.iter_mut().zip(from_blocks) {
        *to = std::array::from_fn(|word| from[word].load(Ordering::Relaxed));
    }
    for (to, from) in to_rest.iter_mut().zip(from_rest) {
        *to = from.load(Ordering::Relaxed);
    }
}
