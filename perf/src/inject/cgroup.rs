//! Throw-away cgroups: where the hierarchies are mounted, and folders that are gone again when their guard is.
//!
//! What must hold: only folders that were made here are removed, the last one that uses such a folder removes it, and no process is left
//! in them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tapio_probes::mountinfo;
use tapio_wire::complain;

use crate::error::{Context, Error};

/// How long the kernel may take to empty a cgroup whose processes were killed.
const EMPTY_LIMIT: Duration = Duration::from_secs(3);

/// Where cgroups are mounted on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchies {
    /// The unified hierarchy.
    pub v2: PathBuf,
    /// The version 1 hierarchy of the memory controller, where there is one.
    pub v1_memory: Option<PathBuf>,
}

/// What limits memory here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryControl {
    V2,
    V1,
}

impl Hierarchies {
    /// Finds the hierarchies of this process's mount namespace.
    pub fn find() -> Result<Self, Error> {
        let path = mountinfo::OF_THIS_PROCESS;
        let mounts = mountinfo::read(path).context(|| format!("read {path}"))?;
        Self::parse(&mounts).ok_or(Error::NoCgroupV2)
    }

    /// Parses a mountinfo.
    fn parse(mounts: &str) -> Option<Self> {
        let (mut v2, mut v1_memory) = (None, None);
        for mount in mountinfo::parse(mounts) {
            let slot = match mount.kind {
                "cgroup2" => &mut v2,
                _ if mount.has_controller("memory") => &mut v1_memory,
                _ => continue,
            };
            // Another root than the hierarchy's own is a part of it that was mounted into a container.
            if slot.is_none() && (mount.root == "/" || mount.root.starts_with("/..")) {
                *slot = Some(PathBuf::from(&*mount.point));
            }
        }
        Some(Self { v2: v2?, v1_memory })
    }

    /// Which of them can limit memory.
    pub fn memory_control(&self) -> Result<MemoryControl, Error> {
        let controllers = fs::read_to_string(self.v2.join("cgroup.controllers")).unwrap_or_default();
        if controllers.split_whitespace().any(|name| name == "memory") {
            Ok(MemoryControl::V2)
        } else if self.v1_memory.is_some() {
            Ok(MemoryControl::V1)
        } else {
            Err(Error::NoMemoryController)
        }
    }
}

/// The folders that this process has made, and how many guards use each.
static MADE: Mutex<BTreeMap<PathBuf, usize>> = Mutex::new(BTreeMap::new());

fn made() -> MutexGuard<'static, BTreeMap<PathBuf, usize>> {
    MADE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cgroup and those above it that were made here; they go with the last guard that uses them.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// Folders made, from the top down.
    made: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes `relative` under the hierarchy at `root`; with `delegate_memory`, the memory controller is switched on down to it.
    pub fn create(root: &Path, relative: &str, delegate_memory: bool) -> Result<Self, Error> {
        let mut cgroup = Self { path: root.to_owned(), made: Vec::new() };
        for component in relative.split('/') {
            if delegate_memory {
                cgroup.write("cgroup.subtree_control", "+memory")?;
            }
            cgroup.path.push(component);
            match fs::create_dir(&cgroup.path) {
                Ok(()) => cgroup.hold(),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if made().contains_key(&cgroup.path) {
                        cgroup.hold();
                    }
                }
                Err(source) => {
                    let what = format!("make the cgroup {}", cgroup.path.display());
                    return Err(Error::Io { what, source });
                }
            }
        }
        Ok(cgroup)
    }

    /// Takes over a cgroup that a process made by its own means: it goes with this guard.
    pub fn adopt(path: PathBuf) -> Self {
        let mut cgroup = Self { path, made: Vec::new() };
        cgroup.hold();
        cgroup
    }

    /// Notes that this guard made the folder and uses it.
    fn hold(&mut self) {
        *made().entry(self.path.clone()).or_default() += 1;
        self.made.push(self.path.clone());
    }

    /// Path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one of its files.
    pub fn write(&self, file: &str, text: &str) -> Result<(), Error> {
        let path = self.path.join(file);
        fs::write(&path, text).context(|| format!("write {text:?} to {}", path.display()))
    }

    /// Limits its memory, swap included.
    pub fn limit_memory(&self, control: MemoryControl, bytes: u64) -> Result<(), Error> {
        let bytes = bytes.to_string();
        let (limit, swap, swap_value) = match control {
            MemoryControl::V2 => ("memory.max", "memory.swap.max", "0"),
            MemoryControl::V1 => ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", &*bytes),
        };
        self.write(limit, &bytes)?;
        // Not every kernel accounts for swap.
        if self.path.join(swap).exists() {
            self.write(swap, swap_value)?;
        }
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            let mut made = made();
            let Some(users) = made.get_mut(path) else { continue };
            *users -= 1;
            if *users == 0 {
                made.remove(path);
                drop(made);
                remove(path);
            }
        }
    }
}

/// Kills what is in a cgroup that was made here and removes it. One that others use by now stays.
fn remove(path: &Path) {
    let end = Instant::now() + EMPTY_LIMIT;
    loop {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            // Gone, or not to be removed by anybody.
            _ => return,
        }
        let has_children = fs::read_dir(path).is_ok_and(|entries| entries.flatten().any(|entry| entry.path().is_dir()));
        if has_children || Instant::now() >= end {
            complain!("tapio-perf: the cgroup {} is in use and stays", path.display());
            return;
        }
        let processes = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines().filter_map(|line| line.parse().ok()).filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::{Cgroup, Hierarchies};
    use std::path::Path;

    #[test]
    fn hybrid_and_unified_hosts_are_understood() {
        let hybrid = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
99 31 0:38 /a /run/elsewhere rw,relatime - cgroup2 cgroup2 rw";
        let expected =
            Hierarchies { v2: "/sys/fs/cgroup/unified".into(), v1_memory: Some("/sys/fs/cgroup/memory".into()) };
        assert_eq!(Hierarchies::parse(hybrid), Some(expected));
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw";
        let found = Hierarchies::parse(unified).expect("a hierarchy");
        assert_eq!((found.v2.as_path(), found.v1_memory), (Path::new("/sys/fs/cgroup"), None));
        assert_eq!(Hierarchies::parse("35 31 0:32 / /m rw - cgroup cgroup rw,memory"), None);
    }

    #[test]
    fn what_several_use_goes_with_the_last_of_them() {
        let root = tempfile::tempdir().expect("a folder");
        let [first, second] =
            ["kubepods/a", "kubepods/b"].map(|path| Cgroup::create(root.path(), path, false).expect("it is made"));
        drop(first);
        assert!(second.path().is_dir() && !root.path().join("kubepods/a").exists());
        drop(second);
        assert!(!root.path().join("kubepods").exists());
    }

    #[test]
    fn only_what_was_made_is_removed() {
        let root = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(root.path().join("kubepods.slice")).expect("a folder");
        let cgroup = Cgroup::create(root.path(), "kubepods.slice/a/b", false).expect("it is made");
        assert!(cgroup.path().ends_with("kubepods.slice/a/b") && cgroup.path().is_dir());
        drop(cgroup);
        assert!(root.path().join("kubepods.slice").is_dir());
        assert!(!root.path().join("kubepods.slice/a").exists());
    }
}
