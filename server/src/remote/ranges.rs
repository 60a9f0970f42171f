//! Parts of remote segments, brought into sparse files: the index at a segment's end, its head, and blocks.
//!
//! What must hold: a part counts as brought when its own checksums are right. What a crash left half written, or a disk damaged, is
//! fetched again.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use futures::TryStreamExt;
use object_store::{GetOptions, GetRange, ObjectStore};
use tapio_wire::segment::SEGMENT_HEADER_BYTES;

use super::RemoteError;
use super::listing::Listed;
use super::store::Store;
use crate::archive::index::{BlockEntry, Index};
use crate::archive::scan::{Item, Scanner};
use crate::archive::snapshot::Note;

/// Blocks that lie at most so far apart are one request.
const GAP_BYTES: u64 = 128 << 10;
/// A request is for at most this much, or one block.
const RUN_BYTES_MAX: u64 = 4 << 20;
/// The least that is fetched of a segment's end, where its index stands.
const TAIL_BYTES_MIN: u64 = 16 << 10;
const TAIL_BYTES_MAX: u64 = 4 << 20;
/// The trailer of an index says where it begins.
const TRAILER_BYTES: u64 = 24;

/// How long indexes are here: the next one is fetched at once then.
#[derive(Debug)]
pub(super) struct TailHint(AtomicU64);

impl Default for TailHint {
    fn default() -> Self {
        Self(AtomicU64::new(4 * TAIL_BYTES_MIN))
    }
}

/// Blocks that one request brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub range: Range<u64>,
    pub blocks: Vec<BlockEntry>,
}

/// The end of a block.
fn end(block: &BlockEntry) -> u64 {
    block.offset + u64::from(block.bytes)
}

/// Merges blocks that lie close. `blocks` are in order.
pub(super) fn runs(blocks: impl IntoIterator<Item = BlockEntry>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for block in blocks {
        let range = block.offset..end(&block);
        match runs.last_mut() {
            Some(run)
                if range.start.saturating_sub(run.range.end) <= GAP_BYTES
                    && range.end - run.range.start <= RUN_BYTES_MAX =>
            {
                run.range.end = range.end;
                run.blocks.push(block);
            }
            _ => runs.push(Run { range, blocks: vec![block] }),
        }
    }
    runs
}

/// Whether a file has all frames of a block, by their checksums.
pub(super) fn is_sound(file: &File, number: u64, block: &BlockEntry) -> io::Result<bool> {
    let mut scanner = Scanner::within(file, number, block.offset..end(block))?;
    let mut frames = 0;
    while let Some(item) = scanner.next_item()? {
        match item {
            Item::Frame { .. } => frames += 1,
            Item::Damaged(_) => return Ok(false),
            Item::Note(_) | Item::Tail { .. } => {}
        }
    }
    Ok(frames == block.frames)
}

/// Whether a file has the snapshot that a segment begins with.
pub(super) fn has_head(file: &File, number: u64, index: &Index) -> io::Result<bool> {
    let mut scanner = Scanner::within(file, number, head(index))?;
    Ok(matches!(scanner.next_item()?, Some(Item::Note(Note::Books(_)))))
}

/// What stands before a segment's first frame, without the segment's header.
pub(super) fn head(index: &Index) -> Range<u64> {
    let end = index.blocks.first().map_or(index.offset, |block| block.offset);
    SEGMENT_HEADER_BYTES as u64..end.max(SEGMENT_HEADER_BYTES as u64)
}

/// Fetches a part of an object into its place in a file. Returns how many bytes came.
pub(super) async fn bring(store: &Store, listed: &Listed, file: &File, range: Range<u64>) -> Result<u64, RemoteError> {
    let name = || listed.path.to_string();
    let failed = |source| RemoteError::Object { name: name(), source };
    let damaged = |problem: String| RemoteError::Damaged { name: name(), problem };
    let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
    let found = store.objects.get_opts(&listed.path, options).await.map_err(failed)?;
    if found.meta.size != listed.bytes || found.range != range {
        let (there, sent) = (found.meta.size, found.range);
        let bytes = listed.bytes;
        return Err(damaged(format!("of {bytes} bytes {range:?} were asked for, and {sent:?} of {there} came")));
    }
    let mut stream = found.into_stream();
    let mut at = range.start;
    while let Some(bytes) = stream.try_next().await.map_err(failed)? {
        let local = |source| RemoteError::Local { path: listed.name.file().into(), source };
        file.write_all_at(&bytes, at).map_err(local)?;
        at += bytes.len() as u64;
    }
    match at == range.end {
        true => Ok(at - range.start),
        false => Err(damaged(format!("bytes {range:?} were asked for, and they ended at {at}"))),
    }
}

/// A sparse file of a segment with its index, and how many bytes came; `None` where the segment ends with no sound index.
pub(super) async fn indexed(
    store: &Store,
    listed: &Listed,
    path: &Path,
    hint: &TailHint,
) -> Result<(Option<Index>, u64), RemoteError> {
    let local = |source| RemoteError::Local { path: path.to_owned(), source };
    let number = listed.name.number;
    if let Ok(file) = File::options().read(true).write(true).open(path)
        && file.metadata().is_ok_and(|metadata| metadata.len() == listed.bytes)
        && let Some(index) = Index::read(&file, number).map_err(local)?
    {
        // So that it is not the first to go.
        let _ = file.set_modified(SystemTime::now());
        return Ok((Some(index), 0));
    }
    // Readers may have links to what is there.
    let _ = fs::remove_file(path);
    let file = File::options().read(true).write(true).create_new(true).open(path).map_err(local)?;
    file.set_len(listed.bytes).map_err(local)?;
    let tail = hint.0.load(Ordering::Relaxed).min(listed.bytes);
    let start = listed.bytes - tail;
    let mut came = bring(store, listed, &file, start..listed.bytes).await?;
    let mut trailer = [0; TRAILER_BYTES as usize];
    if listed.bytes >= TRAILER_BYTES {
        file.read_exact_at(&mut trailer, listed.bytes - TRAILER_BYTES).map_err(local)?;
    }
    let offset = u64::from_le_bytes(std::array::from_fn(|i| trailer[i]));
    if trailer[16..] == crate::archive::index::INDEX_MAGIC && offset < start {
        came += bring(store, listed, &file, offset..start).await?;
    }
    let index = Index::read(&file, number).map_err(local)?;
    match &index {
        Some(index) => {
            let wanted = (listed.bytes - index.offset).clamp(TAIL_BYTES_MIN, TAIL_BYTES_MAX);
            hint.0.fetch_max(wanted, Ordering::Relaxed);
        }
        None => fs::remove_file(path).map_err(local)?,
    }
    Ok((index, came))
}
