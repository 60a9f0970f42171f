//! Reads frames back, from where reading stopped.

use std::fs::File;
use std::io;

use bytes::Bytes;
use tapio_wire::frame::Header;
use tapio_wire::ledger::Ledger;
use tapio_wire::segment::SEGMENT_HEADER_BYTES;

use super::records::{Step, behind_unreadable, search, step};
use super::segment::Segment;
use super::{FramePosition, Spool};

impl Spool {
    /// Frames of an epoch from `from_seq` on, up to `max_bytes` or one, or to the first that is not whole.
    ///
    /// # Errors
    /// What the disk says, [`io::ErrorKind::InvalidData`] when the first is damaged or missing, [`io::ErrorKind::NotFound`] when
    /// its file is. [`Spool::next_whole`] returns what follows then.
    pub fn read(&mut self, epoch: u64, from_seq: u64, max_bytes: usize) -> io::Result<Vec<Bytes>> {
        let mut frames: Vec<Bytes> = Vec::new();
        let result = self.read_into(&mut frames, epoch, from_seq, max_bytes);
        match result {
            Err(error) if frames.is_empty() => Err(error),
            // What was read is whole; the next call meets the error again.
            _ => Ok(frames),
        }
    }

    fn read_into(&mut self, frames: &mut Vec<Bytes>, epoch: u64, from_seq: u64, max_bytes: usize) -> io::Result<()> {
        let (mut wanted, mut bytes) = (from_seq, 0);
        while bytes < max_bytes
            && let Some(segment) =
                self.segments.iter().find(|s| s.epoch == epoch && s.first_seq <= wanted && wanted <= s.last_seq)
        {
            let (file, end) = self.open_segment(segment)?;
            let written_seq = wanted + segment.seq_before();
            let known =
                self.cursor.filter(|position| position.segment == segment.number && position.seq <= written_seq);
            let mut offset = known.map_or(SEGMENT_HEADER_BYTES as u64, |position| position.offset);
            while wanted <= segment.last_seq && (bytes < max_bytes || frames.is_empty()) {
                match step(&file, segment.number, offset, end)? {
                    Step::Whole(whole) => match segment.seq_of(&whole.header) {
                        Some(seq) if seq > wanted => break,
                        seq => {
                            offset = whole.next;
                            self.cursor =
                                Some(FramePosition { segment: segment.number, offset, seq: whole.header.seq + 1 });
                            if seq == Some(wanted) {
                                wanted += 1;
                                bytes += whole.frame.len();
                                frames.push(segment.frame(whole)?);
                            }
                        }
                    },
                    Step::Damaged { next, .. } => offset = next,
                    Step::End => break,
                }
            }
            if wanted <= segment.last_seq {
                break;
            }
        }
        if frames.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame is damaged or missing"));
        }
        Ok(())
    }

    /// The first frame of an epoch that is whole, from `from_seq` on, and where [`Spool::read`] goes on.
    pub fn next_whole(&mut self, epoch: u64, from_seq: u64) -> Option<(Header, Ledger)> {
        for segment in self.segments.iter().filter(|s| s.epoch == epoch && s.last_seq >= from_seq) {
            let Ok((file, end)) = self.open_segment(segment) else { continue };
            let mut offset = SEGMENT_HEADER_BYTES as u64;
            loop {
                match step(&file, segment.number, offset, end) {
                    Ok(Step::Whole(whole)) => {
                        if segment.seq_of(&whole.header).is_some_and(|seq| seq >= from_seq) {
                            let seq = whole.header.seq;
                            let checked = segment.frame(whole).ok().and_then(|frame| Header::check(&frame).ok())?;
                            self.cursor = Some(FramePosition { segment: segment.number, offset, seq });
                            return Some(checked);
                        }
                        offset = whole.next;
                    }
                    Ok(Step::Damaged { next, .. }) => offset = next,
                    Ok(Step::End) => break,
                    Err(_) => match search(&file, segment.number, behind_unreadable(offset), end) {
                        Some(next) => offset = next,
                        None => break,
                    },
                }
            }
        }
        None
    }

    /// A segment's file, and how far it is to be read.
    fn open_segment(&self, segment: &Segment) -> io::Result<(File, u64)> {
        let file = File::open(self.path(segment.number))?;
        let end = file.metadata()?.len().min(segment.bytes);
        Ok((file, end))
    }
}
