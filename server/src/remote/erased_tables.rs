//! The tables of a segment from which something was erased.

use std::fs::File;
use std::path::Path;

use super::RemoteError;
use super::tables::{Mark, TableStore};
use crate::archive::index::Index;
use crate::archive::reader::SegmentFile;
use crate::parquet::{Exporter, SegmentId, below};

/// Writes the tables of `new` in the place of those of `old`, where there are some. Whether there were.
///
/// The old segment keeps a mark without files: a server that still has it on its disk must not write its tables once more.
///
/// # Errors
/// [`RemoteError`]; a repeated run goes on.
pub fn rewrite(
    (old, new): (&File, &Path),
    number: u64,
    (cluster, server): (&str, &str),
    tables: &TableStore,
    exporter: &mut Exporter,
    work: &Path,
) -> Result<bool, RemoteError> {
    let local = |source| RemoteError::Local { path: new.to_owned(), source };
    let file = File::open(new).map_err(local)?;
    let (before, after) = (SegmentId::of(old, number).map_err(local)?, SegmentId::of(&file, number).map_err(local)?);
    let (Some(before), Some(after)) = (before, after) else { return Ok(false) };
    let Some(mark) = tables.mark(cluster, &before)? else { return Ok(false) };
    let bytes = file.metadata().map_err(local)?.len();
    let is_closed = Index::read(&file, number).map_err(local)?.is_some();
    let segment = SegmentFile { number, path: new.to_owned(), bytes };
    let exported = exporter.segment(&segment, &after, work, &mut |_| {})?;
    tables.put(work, &exported.files)?;
    for written in &exported.files {
        let path = below(work, written);
        std::fs::remove_file(&path).map_err(|source| RemoteError::Local { path, source })?;
    }
    let is_same = before == after;
    let of_new = Mark::of(&after, server, bytes, is_closed, &exported);
    tables.put_mark(cluster, &of_new, is_same.then_some(&mark))?;
    if !is_same {
        let emptied = Mark { files: Vec::new(), events: 0, damaged_events: 0, ..mark.clone() };
        tables.put_mark(cluster, &emptied, Some(&mark))?;
    }
    Ok(true)
}
