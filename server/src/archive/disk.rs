//! What the archive's writer needs from a file system, so that io_uring, its plain twin and a faulty disk are the same to it.
//!
//! What must hold for an implementation: buffers come back whatever happened; nothing is synced but what
//! [`Disk::sync_data`] was asked for; an error of `sync_data` is reported, never retried inside. All futures are awaited on
//! the archive's own thread, one at a time, and need not be `Send`.

use std::fmt;
use std::io;
use std::path::Path;

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

    /// Writes `buffer[start..]` to `offset`; fewer bytes than asked for may be written.
    async fn write_at(
        &self,
        file: &Self::File,
        buffer: Vec<u8>,
        start: usize,
        offset: u64,
    ) -> (io::Result<usize>, Vec<u8>);

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

/// Writes all of `buffer` to `offset`, in as many writes as it takes.
pub async fn write_all<D: Disk>(
    disk: &D,
    file: &D::File,
    mut buffer: Vec<u8>,
    offset: u64,
) -> (io::Result<()>, Vec<u8>) {
    let mut start = 0;
    while start < buffer.len() {
        let (result, returned) = disk.write_at(file, buffer, start, offset + start as u64).await;
        buffer = returned;
        match result {
            Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), buffer),
            Ok(written) => start += written,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (Err(error), buffer),
        }
    }
    (Ok(()), buffer)
}
