//! Frames out of an archive, to be sent again.

use std::fs;
use std::path::{Path, PathBuf};

use tapio_wire::event::Lane;
use tapio_wire::frame::{Encoder, Frame, ReplayFrame};
use tapio_wire::segment::{Found, SEGMENT_HEADER_BYTES, SegmentRecordKind, find_record, parse_segment_header};

use super::body::SOURCE;
use crate::error::{Context, Error};

/// The first frames with events in the segments of a folder, at most `most`.
///
/// # Errors
/// When the folder cannot be read, or holds no frame with events.
pub(super) fn frames(dir: &Path, most: usize, encoder: &mut Encoder) -> Result<Vec<ReplayFrame>, Error> {
    let entries = fs::read_dir(dir).context(|| format!("read the folder {}", dir.display()))?;
    let mut segments: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    segments.sort();
    let mut frames = Vec::new();
    for path in segments {
        if frames.len() == most {
            break;
        }
        let bytes = fs::read(&path).context(|| format!("read {}", path.display()))?;
        add(&bytes, most, encoder, &mut frames);
    }
    match frames.is_empty() {
        true => Err(Error::Invalid(format!("{} holds no segment with events", dir.display()))),
        false => Ok(frames),
    }
}

/// Adds the frames of a segment; what is no segment, or damaged, has none.
fn add(segment: &[u8], most: usize, encoder: &mut Encoder, frames: &mut Vec<ReplayFrame>) {
    let Some(number) = parse_segment_header(segment) else { return };
    let mut at = SEGMENT_HEADER_BYTES;
    while frames.len() < most {
        let Found::Record { kind, bytes, size } = find_record(&segment[at..], number, at as u64) else { return };
        at += size;
        if kind == SegmentRecordKind::Frame {
            frames.extend(again(bytes, encoder));
        }
    }
}

/// The frame, to be sent under another name; `None` without events.
fn again(bytes: &[u8], encoder: &mut Encoder) -> Option<ReplayFrame> {
    let frame = Frame::decode(bytes).ok()?;
    let lane = if frame.header().lethal_events > 0 { Lane::Lethal } else { Lane::Bulk };
    let mut body = frame.to_body().ok()?;
    body.events.iter_mut().for_each(|event| event.source = SOURCE);
    ReplayFrame::pack(encoder, &mut body, lane).ok()
}
