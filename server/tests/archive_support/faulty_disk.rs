//! The plain disk with faults, and a record of what was asked of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tapio_server::archive::{Disk, DiskKind, PlainDisk};

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    Create(PathBuf),
    Write(PathBuf, u64, usize),
    Sync(PathBuf),
    Rename(PathBuf),
    SyncDir,
    Unlink(PathBuf),
}

/// What goes wrong from now on.
#[derive(Default)]
pub struct Faults {
    /// Number of syncs that fail with EIO.
    pub failing_syncs: u32,
    /// Number of syncs of batches that fail with EIO: those of a file that was synced before.
    pub failing_batch_syncs: u32,
    /// Number of truncations that fail with EIO.
    pub failing_truncates: u32,
    /// Number of removals that fail with EIO.
    pub failing_unlinks: u32,
    /// Number of directory syncs that fail with EIO.
    pub failing_dir_syncs: u32,
    pub failing_renames: u32,
    /// Creations and writes fail with ENOSPC.
    pub full: bool,
    /// A write takes at most this many bytes, unless 0.
    pub write_bytes_max: usize,
    pub sync_delay: Duration,
    /// Number of operations after which the machine is gone: nothing works, and what no directory sync made durable is undone. Of
    /// what was written without a sync one part is there, one is torn in the middle, and one is as it was: zeros.
    pub crash_after: Option<u32>,
    /// The crash leaves what was written: the kernel wrote it back in time, whatever the sync said.
    pub keeps_writes: bool,
    unsynced: Vec<Unsynced>,
    /// Renames that are undone by a crash: an unlinked file is set aside until its directory is synced.
    pending: Vec<(PathBuf, PathBuf)>,
    pub log: Vec<Operation>,
}

/// A write that no sync made durable: to which file, where and how much.
struct Unsynced {
    file: File,
    path: PathBuf,
    offset: u64,
    bytes: usize,
}

#[derive(Clone, Default)]
pub struct FaultyDisk {
    pub faults: Arc<Mutex<Faults>>,
}

pub struct FaultyFile {
    file: File,
    path: PathBuf,
}

impl FaultyDisk {
    pub fn set(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.faults.lock().unwrap());
    }

    /// Counts an operation; an error once the machine is gone.
    fn operate(&self) -> io::Result<()> {
        let mut faults = self.faults.lock().unwrap();
        match &mut faults.crash_after {
            None => Ok(()),
            Some(0) => {
                let kept = faults.keeps_writes;
                for (turn, write) in faults.unsynced.drain(..).enumerate().filter(|_| !kept) {
                    let lost = [write.bytes, write.bytes / 2, 0][turn % 3];
                    let from = write.offset + (write.bytes - lost) as u64;
                    write.file.write_all_at(&vec![0; lost], from).expect("the crash undoes a write");
                }
                for (from, to) in faults.pending.drain(..).rev() {
                    std::fs::rename(&to, &from).expect("the crash undoes a rename");
                }
                Err(eio())
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    pub fn has_crashed(&self) -> bool {
        self.faults.lock().unwrap().crash_after == Some(0)
    }

    pub fn log(&self) -> Vec<Operation> {
        self.faults.lock().unwrap().log.clone()
    }
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())
}

fn fail(count: &mut u32) -> io::Result<()> {
    if *count > 0 {
        *count -= 1;
        return Err(eio());
    }
    Ok(())
}

impl Disk for FaultyDisk {
    type File = FaultyFile;

    fn kind(&self) -> DiskKind {
        DiskKind::Plain
    }

    async fn create(&self, path: &Path, bytes: u64) -> io::Result<FaultyFile> {
        self.operate()?;
        self.set(|faults| faults.log.push(Operation::Create(path.to_owned())));
        if self.faults.lock().unwrap().full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = PlainDisk.create(path, bytes).await?;
        Ok(FaultyFile { file, path: path.to_owned() })
    }

    async fn write_at(&self, file: &FaultyFile, pieces: Vec<Bytes>, offset: u64) -> (io::Result<usize>, Vec<Bytes>) {
        let bytes = pieces.iter().map(Bytes::len).sum();
        let (full, limit) = {
            let mut faults = self.faults.lock().unwrap();
            faults.log.push(Operation::Write(file.path.clone(), offset, bytes));
            (faults.full, faults.write_bytes_max)
        };
        if let Err(error) = self.operate() {
            return (Err(error), pieces);
        }
        if full {
            return (Err(io::ErrorKind::StorageFull.into()), pieces);
        }
        let mut room = if limit == 0 { bytes } else { limit };
        let cut = pieces.iter().map(|piece| {
            let taken = piece.len().min(room);
            room -= taken;
            piece.slice(..taken)
        });
        let (result, _) = PlainDisk.write_at(&file.file, cut.collect(), offset).await;
        if let Ok(bytes) = result {
            let (handle, path) = (file.file.try_clone().expect("a descriptor"), file.path.clone());
            self.set(|faults| {
                if faults.crash_after.is_some() {
                    faults.unsynced.push(Unsynced { file: handle, path, offset, bytes });
                }
            });
        }
        (result, pieces)
    }

    async fn sync_data(&self, file: &FaultyFile) -> io::Result<()> {
        self.operate()?;
        let (result, delay) = {
            let mut faults = self.faults.lock().unwrap();
            let is_batch = faults.log.contains(&Operation::Sync(file.path.clone()));
            faults.log.push(Operation::Sync(file.path.clone()));
            let of_batch = if is_batch { fail(&mut faults.failing_batch_syncs) } else { Ok(()) };
            (of_batch.and_then(|()| fail(&mut faults.failing_syncs)), faults.sync_delay)
        };
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        result?;
        PlainDisk.sync_data(&file.file).await?;
        self.set(|faults| faults.unsynced.retain(|write| write.path != file.path));
        Ok(())
    }

    async fn truncate(&self, file: &FaultyFile, bytes: u64) -> io::Result<()> {
        self.operate()?;
        fail(&mut self.faults.lock().unwrap().failing_truncates)?;
        PlainDisk.truncate(&file.file, bytes).await
    }

    async fn close(&self, file: FaultyFile) -> io::Result<()> {
        PlainDisk.close(file.file).await
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operate()?;
        let result = {
            let mut faults = self.faults.lock().unwrap();
            faults.log.push(Operation::Rename(from.to_owned()));
            fail(&mut faults.failing_renames)
        };
        result?;
        PlainDisk.rename(from, to).await?;
        self.set(|faults| faults.pending.push((from.to_owned(), to.to_owned())));
        Ok(())
    }

    async fn unlink(&self, path: &Path) -> io::Result<()> {
        self.operate()?;
        let result = {
            let mut faults = self.faults.lock().unwrap();
            faults.log.push(Operation::Unlink(path.to_owned()));
            fail(&mut faults.failing_unlinks)
        };
        result?;
        if self.faults.lock().unwrap().crash_after.is_none() {
            PlainDisk.unlink(path).await?;
            self.set(|faults| faults.pending.retain(|(_, to)| to != path));
            return Ok(());
        }
        let aside = path.with_extension("unlinked");
        PlainDisk.rename(path, &aside).await?;
        self.set(|faults| faults.pending.push((path.to_owned(), aside)));
        Ok(())
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.operate()?;
        let result = {
            let mut faults = self.faults.lock().unwrap();
            faults.log.push(Operation::SyncDir);
            fail(&mut faults.failing_dir_syncs)
        };
        result?;
        PlainDisk.sync_dir(dir).await?;
        let done = std::mem::take(&mut self.faults.lock().unwrap().pending);
        for (_, to) in done.iter().filter(|(_, to)| to.extension().is_some_and(|end| end == "unlinked")) {
            std::fs::remove_file(to)?;
        }
        Ok(())
    }
}
