//! One server per directory: an exclusive `flock` on `LOCK`, held while the archive is open and released by the kernel
//! however the process ends. The file names the process that holds it, for people.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::ArchiveError;

/// Holds the directory until it is dropped.
#[derive(Debug)]
pub struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    /// Creates the directory where needed, and takes it.
    pub fn take(dir: &Path) -> Result<Self, ArchiveError> {
        let refused = |source: io::Error| ArchiveError::Directory { dir: dir.to_owned(), source };
        fs::create_dir_all(dir).map_err(refused)?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join("LOCK"))
            .map_err(refused)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                // An unreadable LOCK still means that somebody holds it.
                let _ = file.take(20).read_to_string(&mut holder);
                let holder = holder.trim();
                return Err(ArchiveError::Locked {
                    dir: dir.to_owned(),
                    holder: if holder.is_empty() { "unknown" } else { holder }.to_owned(),
                });
            }
            Err(error) => return Err(refused(error.into())),
        }
        // The process id is for people; a full disk must not keep the server from starting.
        let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Self { _file: file })
    }
}
