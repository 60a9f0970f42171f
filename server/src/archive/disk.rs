//! What the archive's writer needs from a file system, so that io_uring, plain writes and a faulty disk are the same to it.
//!
//! What must hold for an implementation: pieces come back whatever happened; nothing is synced but what
//! [`Disk::sync_data`] was asked for; an error of `sync_data` is reported, never retried inside. All futures are awaited on
//! the archive's own thread, one at a time, and need not be `Send`.

use std::fmt;
use std::io;
use std::path::Path;

use bytes::{Buf, Bytes};

/// How the archive reaches its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskKind {
    /// io_uring.
    Uring,
    /// `pwrite` and `fdatasync`.
    Plain,
}

impl DiskKind {
    /// The name that status and logs use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uring => "uring",
            Self::Plain => "plain",
        }
    }
}

impl fmt::Display for DiskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Files and the directory that holds them.
#[allow(async_fn_in_trait, reason = "static dispatch on one thread: no caller needs to name or send these futures")]
pub trait Disk: 'static {
    /// An open file.
    type File: 'static;

    /// What it is.
    fn kind(&self) -> DiskKind;

    /// Creates a file (an older one of this name is emptied) and reserves `bytes` of zeros for it.
    async fn create(&self, path: &Path, bytes: u64) -> io::Result<Self::File>;

    /// Writes up to [`PIECES_MAX`] pieces one behind another to `offset`; fewer bytes than asked for may be written. The pieces
    /// come back as they were.
    async fn write_at(&self, file: &Self::File, pieces: Vec<Bytes>, offset: u64) -> (io::Result<usize>, Vec<Bytes>);

    /// `fdatasync`.
    async fn sync_data(&self, file: &Self::File) -> io::Result<()>;

    /// Cuts the file to `bytes`.
    async fn truncate(&self, file: &Self::File, bytes: u64) -> io::Result<()>;

    /// Closes the file, without a sync.
    async fn close(&self, file: Self::File) -> io::Result<()>;

    /// Renames within the directory.
    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    async fn unlink(&self, path: &Path) -> io::Result<()>;

    /// Makes creations, renames and removals in a directory durable.
    async fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// The most pieces of one write: Linux's `IOV_MAX`, see writev(2).
pub const PIECES_MAX: usize = 1024;

/// Writes pieces one behind another to `offset`, in as many writes as it takes. None may be empty.
pub async fn write_all<D: Disk>(disk: &D, file: &D::File, pieces: Vec<Bytes>, mut offset: u64) -> io::Result<()> {
    let mut pieces = pieces.into_iter();
    while pieces.len() > 0 {
        let mut left: Vec<_> = pieces.by_ref().take(PIECES_MAX).collect();
        while !left.is_empty() {
            let (result, returned) = disk.write_at(file, left, offset).await;
            left = returned;
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    skip(&mut left, written);
                    offset += written as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Takes the first `bytes` bytes away.
fn skip(pieces: &mut Vec<Bytes>, mut bytes: usize) {
    let mut whole = 0;
    while let Some(piece) = pieces.get(whole)
        && piece.len() <= bytes
    {
        bytes -= piece.len();
        whole += 1;
    }
    pieces.drain(..whole);
    if let Some(first) = pieces.first_mut() {
        first.advance(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::super::plain::PlainDisk;
    use super::*;

    #[test]
    fn more_pieces_than_one_write_takes_keep_their_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        let pieces: Vec<_> = (0..PIECES_MAX * 2 + 10).map(|index| Bytes::from(format!("{index}\n"))).collect();
        let written = async {
            let file = PlainDisk.create(&path, 1 << 20).await?;
            write_all(&PlainDisk, &file, pieces.clone(), 5).await
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(written).expect("it is written");
        let content = std::fs::read(&path).expect("it is there");
        let expected = pieces.concat();
        assert_eq!(content[..5], [0; 5]);
        assert!(content[5..5 + expected.len()] == expected);
    }

    #[test]
    fn a_partial_write_is_continued_from_within_a_piece() {
        let pieces = || [&b"abc"[..], b"d", b"efg"].map(Bytes::from_static).to_vec();
        for (written, left) in [(0, "abcdefg"), (1, "bcdefg"), (3, "defg"), (4, "efg"), (6, "g"), (7, "")] {
            let mut pieces = pieces();
            skip(&mut pieces, written);
            assert_eq!(pieces.concat(), left.as_bytes(), "after {written}");
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
        }
    }
}
