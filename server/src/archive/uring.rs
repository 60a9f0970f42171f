//! io_uring: writes and syncs go through the ring. The rare calls (create, rename, unlink, directory sync) are plain: they happen
//! once a segment, on a thread that has nothing else to do meanwhile.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use bytes::Bytes;

use super::disk::{Disk, DiskKind};
use super::plain::create_reserved;

/// Entries of the submission queue: one write or sync is in flight at a time.
const RING_ENTRIES: u32 = 8;

/// A ring of this thread, or why there is none.
pub fn start_ring() -> io::Result<tokio_uring::Runtime> {
    let mut builder = tokio_uring::builder();
    builder.entries(RING_ENTRIES);
    let runtime = tokio_uring::Runtime::new(&builder)?;
    runtime.block_on(tokio_uring::no_op())?;
    Ok(runtime)
}

/// Writes through io_uring. To be used within a runtime from [`start_ring`].
#[derive(Clone, Copy, Debug, Default)]
pub struct UringDisk;

/// One file by two descriptors: the ring's, and one for the calls that the ring is not used for.
pub struct UringFile {
    ring: tokio_uring::fs::File,
    plain: File,
}

impl Disk for UringDisk {
    type File = UringFile;

    fn kind(&self) -> DiskKind {
        DiskKind::Uring
    }

    async fn create(&self, path: &Path, bytes: u64) -> io::Result<UringFile> {
        let plain = create_reserved(path, bytes)?;
        let ring = tokio_uring::fs::File::from_std(plain.try_clone()?);
        Ok(UringFile { ring, plain })
    }

    async fn write_at(&self, file: &UringFile, pieces: Vec<Bytes>, offset: u64) -> (io::Result<usize>, Vec<Bytes>) {
        file.ring.writev_at(pieces, offset).await
    }

    async fn sync_data(&self, file: &UringFile) -> io::Result<()> {
        file.ring.sync_data().await
    }

    async fn truncate(&self, file: &UringFile, bytes: u64) -> io::Result<()> {
        file.plain.set_len(bytes)
    }

    async fn close(&self, file: UringFile) -> io::Result<()> {
        file.ring.close().await
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
