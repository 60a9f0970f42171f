//! The segment: one file of the archive (and of a collector's spool).
//!
//! ```text
//!  segment header, 64 bytes            record, repeated; starts at a multiple of 8
//!  0       8        16       24   60   64       0     4       8        16       24     28
//!  ├───────┼────────┼────────┼────┼────┤        ├─────┼───────┼────────┼────────┼──────┼───────────────┬───────┐
//!  │ magic │version │ number │ 0  │crc │        │magic│ kind  │ number │ offset │ size │ crc32c │ bytes│ pad 0 │
//!  └───────┴────────┴────────┴────┴────┘        └─────┴───────┴────────┴────────┴──────┴────────┴──────┴───────┘
//! ```
//!
//! A record repeats the number of its segment and its own offset. So a block that was written to the wrong place, or an
//! older file's bytes in a reused block, are not taken for records. Its crc32c covers its 28 bytes before the checksum;
//! the bytes have checksums of their own (a frame's, or the trailing crc32c of a snapshot). A segment is preallocated
//! with zeros, and zeros are no record: they are the end.

/// The first eight bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"TPIOSEG1";
/// Bytes of the segment header.
pub const SEGMENT_HEADER_BYTES: usize = 64;
/// Bytes of a record's header.
pub const RECORD_HEADER_BYTES: usize = 32;
const RECORD_MAGIC: u32 = 0x5245_4354;
const SEGMENT_VERSION: u64 = 1;

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SegmentRecordKind {
    /// A frame as it was received.
    Frame = 1,
    /// The archive's books when the segment was opened.
    Snapshot = 2,
    /// What is where in the segment, written when it was closed.
    Index = 3,
}

/// The header of segment `number`.
pub fn segment_header(number: u64) -> [u8; SEGMENT_HEADER_BYTES] {
    let mut header = [0; SEGMENT_HEADER_BYTES];
    header[..8].copy_from_slice(&SEGMENT_MAGIC);
    header[8..16].copy_from_slice(&SEGMENT_VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&number.to_le_bytes());
    let crc = crc32c::crc32c(&header[..60]);
    header[60..].copy_from_slice(&crc.to_le_bytes());
    header
}

/// The number of the segment that `bytes` start, or `None` when they are no segment header of this version.
pub fn parse_segment_header(bytes: &[u8]) -> Option<u64> {
    let header = bytes.first_chunk::<SEGMENT_HEADER_BYTES>()?;
    let number = u64::from_le_bytes(header[16..24].try_into().ok()?);
    (*header == segment_header(number)).then_some(number)
}

/// Bytes that a record with a content of `bytes` bytes occupies.
pub const fn record_bytes(bytes: usize) -> usize {
    (RECORD_HEADER_BYTES + bytes).next_multiple_of(8)
}

/// Appends a record to `out`, which will be written to `offset` of segment `number`.
pub fn append_record(out: &mut Vec<u8>, number: u64, offset: u64, kind: SegmentRecordKind, bytes: &[u8]) {
    let start = out.len();
    out.extend_from_slice(&record_header(number, offset, kind, bytes.len()));
    out.extend_from_slice(bytes);
    out.resize(start + record_bytes(bytes.len()), 0);
}

/// The header of a record of `bytes` bytes, which will be written to `offset` of segment `number`. The bytes follow, then
/// zeros up to [`record_bytes`].
pub fn record_header(number: u64, offset: u64, kind: SegmentRecordKind, bytes: usize) -> [u8; RECORD_HEADER_BYTES] {
    let mut header = [0; RECORD_HEADER_BYTES];
    header[..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
    header[4..8].copy_from_slice(&(kind as u32).to_le_bytes());
    header[8..16].copy_from_slice(&number.to_le_bytes());
    header[16..24].copy_from_slice(&offset.to_le_bytes());
    header[24..28].copy_from_slice(&(bytes as u32).to_le_bytes());
    let crc = crc32c::crc32c(&header[..28]);
    header[28..].copy_from_slice(&crc.to_le_bytes());
    header
}

/// What stands at one offset of a segment.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// A record; the next one starts `size` bytes further.
    Record { kind: SegmentRecordKind, bytes: &'a [u8], size: usize },
    /// A record whose header is whole but whose bytes reach past the end: a torn tail.
    Torn,
    /// Zeros, or the end of the bytes.
    End,
    /// Anything else: damage. The next record, if any, is to be searched for at the multiples of 8 that follow.
    Damaged,
}

/// Looks at `offset` of a segment whose bytes from there on are `rest`.
pub fn find_record(rest: &[u8], number: u64, offset: u64) -> Found<'_> {
    let Some(header) = rest.first_chunk::<RECORD_HEADER_BYTES>() else {
        return if rest.iter().all(|&byte| byte == 0) { Found::End } else { Found::Torn };
    };
    if header.iter().all(|&byte| byte == 0) {
        return Found::End;
    }
    let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let sound = u32_at(0) == RECORD_MAGIC
        && u64_at(8) == number
        && u64_at(16) == offset
        && crc32c::crc32c(&header[..28]) == u32_at(28);
    let kind = match u32_at(4) {
        1 => SegmentRecordKind::Frame,
        2 => SegmentRecordKind::Snapshot,
        3 => SegmentRecordKind::Index,
        _ => return Found::Damaged,
    };
    if !sound {
        return Found::Damaged;
    }
    let length = u32_at(24) as usize;
    match rest.get(RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + length) {
        Some(bytes) => Found::Record { kind, bytes, size: record_bytes(length) },
        None => Found::Torn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_found_where_they_were_appended() {
        let mut file = segment_header(7).to_vec();
        assert_eq!(parse_segment_header(&file), Some(7));
        let first = file.len();
        append_record(&mut file, 7, first as u64, SegmentRecordKind::Frame, b"abc");
        let second = file.len();
        append_record(&mut file, 7, second as u64, SegmentRecordKind::Snapshot, &[]);
        file.resize(file.len() + 100, 0);
        let Found::Record { kind, bytes, size } = find_record(&file[first..], 7, first as u64) else { panic!() };
        assert_eq!((kind, bytes, first + size), (SegmentRecordKind::Frame, &b"abc"[..], second));
        let end = second + RECORD_HEADER_BYTES;
        assert_eq!(find_record(&file[end..], 7, end as u64), Found::End);
    }

    #[test]
    fn a_record_in_the_wrong_place_or_segment_is_damage() {
        let mut record = Vec::new();
        append_record(&mut record, 7, 64, SegmentRecordKind::Frame, b"abc");
        assert_eq!(find_record(&record, 7, 72), Found::Damaged);
        assert_eq!(find_record(&record, 8, 64), Found::Damaged);
    }

    #[test]
    fn every_flipped_bit_of_a_record_header_is_noticed() {
        let mut record = Vec::new();
        append_record(&mut record, 7, 64, SegmentRecordKind::Frame, b"abc");
        for bit in 0..RECORD_HEADER_BYTES * 8 {
            let mut damaged = record.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(find_record(&damaged, 7, 64), Found::Damaged, "bit {bit}");
        }
    }

    #[test]
    fn a_cut_record_is_torn() {
        let mut record = Vec::new();
        append_record(&mut record, 7, 64, SegmentRecordKind::Frame, b"abcdefgh");
        for length in 1..RECORD_HEADER_BYTES + 8 {
            assert_eq!(find_record(&record[..length], 7, 64), Found::Torn, "cut to {length}");
        }
    }
}
