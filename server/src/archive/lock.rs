//! One server per directory: an exclusive `flock` on `LOCK`, held while the archive is open and released by the kernel
//! however the process ends. The file names the process that holds it, for people.
//!
//! The lock belongs to the open file description, not to the descriptor: a child that another thread has just forked
//! shares it until it executes its program. Closing alone would leave the directory locked for that long, so that a
//! holder that goes unlocks first (flock(2)).

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::ArchiveError;

/// Holds the directory until it is dropped.
#[derive(Debug)]
pub struct DirectoryLock {
    file: File,
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
        Ok(Self { file })
    }
}

impl Drop for DirectoryLock {
    fn drop(&mut self) {
        // Closing the file still releases the lock where unlocking fails.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time_and_the_refusal_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let _held = DirectoryLock::take(dir.path()).unwrap();
        match DirectoryLock::take(dir.path()) {
            Err(ArchiveError::Locked { holder, .. }) => assert_eq!(holder, std::process::id().to_string()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_childs_descriptor_copy_does_not_outlive_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        let held = DirectoryLock::take(dir.path()).unwrap();
        // What fork(2) gives a child: another descriptor of the same open file description.
        let _in_the_child = held.file.try_clone().unwrap();
        drop(held);
        DirectoryLock::take(dir.path()).expect("the directory is free");
    }
}
