//! Walks the records of a segment's file, past what is damaged.
//!
//! What enters: a file and an offset. What leaves: the frame that stands there, or where the next record is. What must hold: every
//! whole frame is found, whatever stands between; a walk ends, since each step goes forward.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use tapio_wire::frame::Header;
use tapio_wire::ledger::Ledger;
use tapio_wire::limits::FRAME_BYTES_MAX;
use tapio_wire::segment::{Found, RECORD_HEADER_BYTES, find_record, record_bytes};

/// Bytes that are searched at once.
const BLOCK_BYTES: usize = 64 << 10;
/// What a disk that cannot read a place cannot read at least.
const PAGE_BYTES: usize = 4096;

/// A frame that matches its checksums.
pub(super) struct Whole {
    pub frame: Bytes,
    pub header: Header,
    pub ledger: Ledger,
    /// Where the next record begins.
    pub next: u64,
}

/// What stands at an offset.
pub(super) enum Step {
    Whole(Box<Whole>),
    /// No whole frame; a record may stand at `next`. Header and ledger are those of the frame that stood here, where they are sound.
    Damaged {
        next: u64,
        head: Option<Box<(Header, Ledger)>>,
    },
    End,
}

/// Looks at `offset` of segment `number`, which is `end` bytes long.
///
/// # Errors
/// What the disk says.
pub(super) fn step(file: &File, number: u64, offset: u64, end: u64) -> io::Result<Step> {
    let mut head = [0; RECORD_HEADER_BYTES];
    if offset + RECORD_HEADER_BYTES as u64 > end {
        return Ok(Step::End);
    }
    file.read_exact_at(&mut head, offset)?;
    let length = u32::from_le_bytes([head[24], head[25], head[26], head[27]]) as usize;
    if !is_record(&head, number, offset) || length > FRAME_BYTES_MAX {
        return Ok(search(file, number, offset + 8, end).map_or(Step::End, |next| Step::Damaged { next, head: None }));
    }
    let next = offset + record_bytes(length) as u64;
    if next > end {
        // A torn tail: nothing was written behind it.
        return Ok(Step::End);
    }
    let mut frame = vec![0; length];
    file.read_exact_at(&mut frame, offset + RECORD_HEADER_BYTES as u64)?;
    Ok(match Header::check(&frame) {
        Ok((header, ledger)) => Step::Whole(Box::new(Whole { frame: frame.into(), header, ledger, next })),
        Err(_) => Step::Damaged { next, head: Header::check_without_payload(&frame).ok().map(Box::new) },
    })
}

/// The first record at or behind `from`; places that cannot be read are passed over.
pub(super) fn search(file: &File, number: u64, from: u64, end: u64) -> Option<u64> {
    let mut block = vec![0; BLOCK_BYTES];
    let (mut offset, mut length_max) = (from.next_multiple_of(8), BLOCK_BYTES);
    while offset + RECORD_HEADER_BYTES as u64 <= end {
        let length = length_max.min((end - offset) as usize);
        if file.read_exact_at(&mut block[..length], offset).is_err() {
            if length > PAGE_BYTES {
                length_max = PAGE_BYTES;
            } else {
                offset = (offset + 1).next_multiple_of(PAGE_BYTES as u64);
                length_max = BLOCK_BYTES;
            }
            continue;
        }
        let last = length - RECORD_HEADER_BYTES;
        let found = (0..=last).step_by(8).find(|&at| is_record(&block[at..], number, offset + at as u64));
        if let Some(at) = found {
            return Some(offset + at as u64);
        }
        offset += (last / 8 + 1) as u64 * 8;
    }
    None
}

/// The first place behind one that cannot be read.
pub(super) fn behind_unreadable(offset: u64) -> u64 {
    (offset + 1).next_multiple_of(PAGE_BYTES as u64)
}

/// Whether a sound record header stands at the start of `bytes`.
fn is_record(bytes: &[u8], number: u64, offset: u64) -> bool {
    bytes.first_chunk::<RECORD_HEADER_BYTES>().is_some_and(|head| {
        // The bytes of the record are not looked at here, so it seems torn.
        matches!(find_record(head, number, offset), Found::Torn | Found::Record { .. })
    })
}
