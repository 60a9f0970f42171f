//! What the spool remembers beside frames: small files in the format of a segment, whose records are empty frames.
//!
//! In: frames and where to. Out: a file that is whole or not there, and what it says. What must hold: the file is synced before
//! [`write`] returns.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use bytes::Bytes;
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Lane};
use tapio_wire::frame::{Encoder, Stamp};
use tapio_wire::ledger::Ledger;
use tapio_wire::segment::{SEGMENT_HEADER_BYTES, SegmentRecordKind, append_record, segment_header};

use super::records::{Step, Whole, step};

/// The ending of a file that is being written.
pub(super) const UNFINISHED: &str = "new";

/// An empty frame that says this.
pub(super) fn frame(node: u64, epoch: u64, seq: u64, ledger: &Ledger) -> io::Result<Bytes> {
    let empty = Encoder::default().seal(&Body::default(), Lane::Bulk, Compression::None).map_err(io::Error::other)?;
    Ok(empty.stamp(&Stamp { node, epoch, seq, boottime_ns: 0, realtime_ns: 0, is_final: false }, ledger))
}

/// Writes frames to a file, as a whole; `number` is repeated in it. Its length.
pub(super) fn write(path: &Path, number: u64, frames: &[Bytes]) -> io::Result<u64> {
    let mut out = segment_header(number).to_vec();
    for frame in frames {
        let offset = out.len() as u64;
        append_record(&mut out, number, offset, SegmentRecordKind::Frame, frame);
    }
    let unfinished = path.with_extension(UNFINISHED);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    file.write_all(&out)?;
    file.sync_data()?;
    fs::rename(&unfinished, path)?;
    if let Some(dir) = path.parent() {
        File::open(dir)?.sync_all()?;
    }
    Ok(out.len() as u64)
}

/// The whole frames of a file, and its length.
pub(super) fn read(path: &Path, number: u64) -> io::Result<(Vec<Whole>, u64)> {
    let file = File::open(path)?;
    let end = file.metadata()?.len();
    let mut frames = Vec::new();
    let mut offset = SEGMENT_HEADER_BYTES as u64;
    loop {
        match step(&file, number, offset, end)? {
            Step::Whole(whole) => {
                offset = whole.next;
                frames.push(*whole);
            }
            Step::Damaged { next, .. } => offset = next,
            Step::End => return Ok((frames, end)),
        }
    }
}

/// Deletes a file that may be gone already.
pub(super) fn delete(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "cannot delete a file of the spool");
    }
}
