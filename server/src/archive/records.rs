//! Records that will be written one behind another, as pieces: a frame is not copied to stand between its header and its padding.

use bytes::{BufMut, Bytes, BytesMut};
use tapio_wire::segment::{RECORD_HEADER_BYTES, SegmentRecordKind, record_bytes, record_header};

/// Collects records for one vectored write without copying frames.
#[derive(Default)]
pub(super) struct Records {
    /// Number of the segment.
    number: u64,
    /// Where the first byte goes.
    start: u64,
    bytes: u64,
    pieces: Vec<Bytes>,
    /// What is between frames. Its memory is used again once no piece of it is left.
    small: BytesMut,
}

impl Records {
    /// Resets itself to `offset` of segment `number`.
    pub fn begin(&mut self, number: u64, offset: u64) {
        self.pieces.clear();
        self.small.clear();
        (self.number, self.start, self.bytes) = (number, offset, 0);
    }

    /// Where the next record goes.
    pub fn offset(&self) -> u64 {
        self.start + self.bytes
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds bytes that are no record: the header of a segment.
    pub fn push_raw(&mut self, raw: &[u8]) {
        self.small.put_slice(raw);
        self.bytes += raw.len() as u64;
    }

    /// Adds a record with a copy of its content.
    pub fn push(&mut self, kind: SegmentRecordKind, content: &[u8]) {
        self.put_header(kind, content.len());
        self.small.put_slice(content);
        self.put_padding(content.len());
    }

    /// Adds a record whose content is not copied.
    pub fn push_shared(&mut self, kind: SegmentRecordKind, content: Bytes) {
        let length = content.len();
        self.put_header(kind, length);
        self.pieces.push(self.small.split().freeze());
        if length > 0 {
            self.pieces.push(content);
        }
        self.put_padding(length);
    }

    /// What is to be written. None is empty, and nothing of it is kept here.
    pub fn take_pieces(&mut self) -> Vec<Bytes> {
        if !self.small.is_empty() {
            self.pieces.push(self.small.split().freeze());
        }
        std::mem::take(&mut self.pieces)
    }

    fn put_header(&mut self, kind: SegmentRecordKind, length: usize) {
        self.small.put_slice(&record_header(self.number, self.offset(), kind, length));
        self.bytes += record_bytes(length) as u64;
    }

    fn put_padding(&mut self, length: usize) {
        self.small.put_bytes(0, record_bytes(length) - RECORD_HEADER_BYTES - length);
    }
}

#[cfg(test)]
mod tests {
    use tapio_wire::segment::{append_record, segment_header};

    use super::*;

    #[test]
    fn pieces_are_the_bytes_of_the_records_one_behind_another() {
        let mut records = Records::default();
        for number in [7, 8] {
            let mut expected = segment_header(number).to_vec();
            records.begin(number, 0);
            records.push_raw(&segment_header(number));
            for content in [&b""[..], b"a", b"12345678", b"123456789"] {
                let at = expected.len() as u64;
                append_record(&mut expected, number, at, SegmentRecordKind::Snapshot, content);
                records.push(SegmentRecordKind::Snapshot, content);
                let at = expected.len() as u64;
                assert_eq!(records.offset(), at);
                append_record(&mut expected, number, at, SegmentRecordKind::Frame, content);
                records.push_shared(SegmentRecordKind::Frame, Bytes::from_static(content));
            }
            assert_eq!(records.bytes(), expected.len() as u64);
            let pieces = records.take_pieces();
            assert_eq!(pieces.concat(), expected);
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
        }
    }

    #[test]
    fn a_frame_is_not_copied() {
        let frame = Bytes::from(vec![1; 100]);
        let mut records = Records::default();
        records.begin(1, 64);
        records.push_shared(SegmentRecordKind::Frame, frame.clone());
        assert!(records.take_pieces().iter().any(|piece| piece.as_ptr() == frame.as_ptr()));
    }
}
