//! What a server has archived, read from its files while it runs.

use std::fs;
use std::path::Path;

use tapio_wire::frame::Frame;
use tapio_wire::segment::{Found, SEGMENT_HEADER_BYTES, SegmentRecordKind, find_record, parse_segment_header};

/// Every frame of an archive, in order. A record that is being written ends what is read.
pub fn frames(folder: &Path) -> Vec<Frame> {
    let entries = fs::read_dir(folder).expect("the archive's folder");
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    paths.sort();
    let mut frames = Vec::new();
    for path in paths {
        let Ok(bytes) = fs::read(&path) else { continue };
        let Some(number) = parse_segment_header(&bytes) else { continue };
        let mut offset = SEGMENT_HEADER_BYTES;
        while let Found::Record { kind, bytes, size } = find_record(&bytes[offset..], number, offset as u64) {
            if kind == SegmentRecordKind::Frame
                && let Ok(frame) = Frame::decode(bytes)
            {
                frames.push(frame);
            }
            offset += size;
        }
    }
    frames
}
