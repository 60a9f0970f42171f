//! Reads a segment that may be damaged anywhere, through a window, so that memory does not grow with the segment.
//!
//! What enters: a file that nobody writes to, though it may be cut meanwhile. What leaves: checked frames and notes in order,
//! and the ranges between them that are neither. What must hold: every byte is reported once, as part of an item or of the
//! tail; zeros in front of a sound record are damage, not the end.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use tapio_wire::frame::Header;
use tapio_wire::segment::{
    Found, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, SegmentRecordKind, find_record, record_bytes,
};

use super::index;
use super::snapshot::{self, Note};

/// Bytes that are read at once, unless a record is longer.
const WINDOW_BYTES: usize = 1 << 20;
/// Zeros are skipped in blocks of this size.
const BLOCK_BYTES: usize = 4096;

/// What was found.
#[derive(Debug)]
pub enum Item<'a> {
    /// A frame whose header and checksums are right.
    Frame {
        header: Header,
        bytes: &'a [u8],
    },
    Note(Note),
    /// Bytes that are no record, in front of one.
    Damaged(Range<u64>),
    /// The rest: no record follows.
    Tail {
        from: u64,
        tail: Tail,
    },
}

/// How a segment ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Where its file ends, or in zeros.
    Clean,
    /// The end is in a record that the file cuts off.
    Torn,
    /// The end is in something else.
    Damaged,
}

/// Goes through a segment once.
pub struct Scanner<'a> {
    file: &'a File,
    number: u64,
    file_bytes: u64,
    window: Vec<u8>,
    window_start: u64,
    next: u64,
    ended: bool,
}

enum Sound {
    Frame(Header),
    Note(Note),
}

/// What a record's content is; `None` when it is not what its kind says.
fn sound(kind: SegmentRecordKind, bytes: &[u8]) -> Option<Sound> {
    match kind {
        SegmentRecordKind::Frame => Header::check(bytes).ok().map(|(header, _)| Sound::Frame(header)),
        SegmentRecordKind::Snapshot => snapshot::decode(bytes).map(Sound::Note),
        SegmentRecordKind::Index => index::is_sound(bytes).then_some(Sound::Note(Note::Index)),
    }
}

/// Whether a record's content is what its kind says, by its checksums.
pub(super) fn is_sound(kind: SegmentRecordKind, bytes: &[u8]) -> bool {
    sound(kind, bytes).is_some()
}

impl<'a> Scanner<'a> {
    /// Starts behind the segment's header.
    pub fn new(file: &'a File, number: u64) -> io::Result<Self> {
        Ok(Self {
            file,
            number,
            file_bytes: file.metadata()?.len(),
            window: Vec::new(),
            window_start: 0,
            next: SEGMENT_HEADER_BYTES as u64,
            ended: false,
        })
    }

    /// Only the items of a range, which must start at a record.
    pub fn within(file: &'a File, number: u64, range: Range<u64>) -> io::Result<Self> {
        let file_bytes = file.metadata()?.len().min(range.end);
        Ok(Self { file_bytes, next: range.start, ..Self::new(file, number)? })
    }

    /// The file's length.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Where the item after this one starts.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// The next item; `None` after the tail.
    pub fn next_item(&mut self) -> io::Result<Option<Item<'_>>> {
        if self.ended {
            return Ok(None);
        }
        let at = self.next;
        if let Some((sound, length)) = self.sound_record(at)? {
            self.next = at + record_bytes(length) as u64;
            return Ok(Some(match sound {
                Sound::Frame(header) => Item::Frame { header, bytes: self.content(at, length) },
                Sound::Note(note) => Item::Note(note),
            }));
        }
        let tail = match find_record(self.rest(at), self.number, at) {
            Found::Torn => Tail::Torn,
            Found::End => Tail::Clean,
            Found::Record { .. } | Found::Damaged => Tail::Damaged,
        };
        let (next, all_zero) = self.search(at)?;
        if let Some(next) = next {
            self.next = next;
            return Ok(Some(Item::Damaged(at..next)));
        }
        self.ended = true;
        let tail = if all_zero {
            Tail::Clean
        } else if tail == Tail::Clean {
            Tail::Damaged
        } else {
            tail
        };
        Ok(Some(Item::Tail { from: at.min(self.file_bytes), tail }))
    }

    /// Looks for the next record after `at`, and returns whether everything up to it, or to the end, is zero.
    fn search(&mut self, at: u64) -> io::Result<(Option<u64>, bool)> {
        let mut all_zero = true;
        let mut here = at;
        while here < self.file_bytes {
            self.fill(here, BLOCK_BYTES)?;
            let rest = self.rest(here);
            let block = &rest[..rest.len().min(BLOCK_BYTES)];
            if block.iter().all(|&byte| byte == 0) {
                here += BLOCK_BYTES as u64;
                continue;
            }
            all_zero = false;
            let end = here + BLOCK_BYTES as u64;
            while here < end && here < self.file_bytes {
                if here > at && self.sound_record(here)?.is_some() {
                    return Ok((Some(here), all_zero));
                }
                here += 8;
            }
        }
        Ok((None, all_zero))
    }

    fn sound_record(&mut self, at: u64) -> io::Result<Option<(Sound, usize)>> {
        self.fill(at, RECORD_HEADER_BYTES)?;
        if find_record(self.rest(at), self.number, at) == Found::Torn {
            // The header is sound, so its length is to be believed, and `fill` stops at the file's end.
            let length = self
                .rest(at)
                .get(24..28)
                .map_or(0, |bytes| u32::from_le_bytes(std::array::from_fn(|i| bytes[i])) as usize);
            self.fill(at, RECORD_HEADER_BYTES + length)?;
        }
        let Found::Record { kind, bytes, .. } = find_record(self.rest(at), self.number, at) else {
            return Ok(None);
        };
        let sound = sound(kind, bytes);
        Ok(sound.map(|sound| (sound, bytes.len())))
    }

    fn content(&self, at: u64, length: usize) -> &[u8] {
        &self.rest(at)[RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + length]
    }

    fn rest(&self, at: u64) -> &[u8] {
        let start = at.saturating_sub(self.window_start) as usize;
        self.window.get(start..).unwrap_or_default()
    }

    /// Makes the window cover `at .. at + bytes`, as far as the file reaches.
    fn fill(&mut self, at: u64, bytes: usize) -> io::Result<()> {
        let wanted_end = (at + bytes as u64).min(self.file_bytes);
        let window_end = self.window_start + self.window.len() as u64;
        if at >= self.window_start && wanted_end <= window_end {
            return Ok(());
        }
        let read_end = (at + bytes.max(WINDOW_BYTES) as u64).min(self.file_bytes);
        let kept = if at >= self.window_start && at < window_end {
            self.window.drain(..(at - self.window_start) as usize);
            self.window.len()
        } else {
            self.window.clear();
            0
        };
        self.window_start = at;
        self.window.resize(read_end.saturating_sub(at) as usize, 0);
        let mut filled = kept;
        while filled < self.window.len() {
            match self.file.read_at(&mut self.window[filled..], at + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if filled < self.window.len() {
            // The writer has given the rest back meanwhile: it closed the segment or gave it up.
            self.window.truncate(filled);
            self.file_bytes = at + filled as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tapio_wire::segment::{append_record, segment_header};

    use super::*;

    #[test]
    fn a_segment_that_is_cut_while_read_ends_there() {
        let mut bytes = segment_header(7).to_vec();
        let mut content = Vec::new();
        snapshot::encode_name(1, "node-1", &mut content);
        let records = 2 * WINDOW_BYTES / record_bytes(content.len());
        for _ in 0..records {
            let at = bytes.len() as u64;
            append_record(&mut bytes, 7, at, SegmentRecordKind::Snapshot, &content);
        }
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&bytes).expect("written");
        let mut scanner = Scanner::new(&file, 7).expect("readable");
        assert!(matches!(scanner.next_item(), Ok(Some(Item::Note(_)))));
        // Behind what was read at once: records are lost, and the last one is torn.
        let end = (WINDOW_BYTES + WINDOW_BYTES / 2) as u64;
        file.set_len(end).expect("cut");
        let mut read = 1;
        let last = loop {
            match scanner.next_item().expect("readable") {
                Some(Item::Note(_)) => read += 1,
                item => break format!("{item:?}"),
            }
        };
        assert_eq!(read, (end as usize - SEGMENT_HEADER_BYTES) / record_bytes(content.len()));
        assert!(last.contains("Tail") && !last.contains("Damaged"), "{last}");
    }
}
