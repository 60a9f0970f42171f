//! Plain writes: blocking calls on the archive's own thread. Its futures are ready at once.

use std::fs::{self, File};
use std::io::{self, IoSlice};
use std::path::Path;

use bytes::Bytes;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, pwritev};

use super::disk::{Disk, DiskKind};

/// Writes with blocking calls on the archive's own thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlainDisk;

impl Disk for PlainDisk {
    type File = File;

    fn kind(&self) -> DiskKind {
        DiskKind::Plain
    }

    async fn create(&self, path: &Path, bytes: u64) -> io::Result<File> {
        create_reserved(path, bytes)
    }

    async fn write_at(&self, file: &File, pieces: Vec<Bytes>, offset: u64) -> (io::Result<usize>, Vec<Bytes>) {
        let slices: Vec<_> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let result = pwritev(file, &slices, offset).map_err(io::Error::from);
        (result, pieces)
    }

    async fn sync_data(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    async fn truncate(&self, file: &File, bytes: u64) -> io::Result<()> {
        file.set_len(bytes)
    }

    async fn close(&self, file: File) -> io::Result<()> {
        drop(file);
        Ok(())
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    async fn unlink(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
}

/// Creates a file of `bytes` zeros. Where the file system cannot reserve blocks the file is sparse, and a full disk shows at
/// the write instead.
pub(super) fn create_reserved(path: &Path, bytes: u64) -> io::Result<File> {
    let file = File::options().write(true).create(true).truncate(true).open(path)?;
    match fallocate(&file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => {}
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(bytes)?,
        Err(error) => {
            drop(file);
            // Best effort: the caller gets the error that made the file useless.
            let _ = fs::remove_file(path);
            return Err(error.into());
        }
    }
    Ok(file)
}
