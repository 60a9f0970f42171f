//! Where the hierarchies of cgroups are mounted, and what is below them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tapio_probes::mountinfo;
use tapio_probes::record::CGROUP_V1_MEMORY;

/// The mount points of the version 2 hierarchy and of the version 1 memory hierarchy, with the marks of their ids.
pub fn hierarchies() -> Vec<(PathBuf, u64)> {
    let Ok(mounts) = mountinfo::read(mountinfo::OF_THIS_PROCESS) else {
        return Vec::new();
    };
    let mut found: Vec<(PathBuf, u64)> = Vec::new();
    for mount in mountinfo::parse(&mounts) {
        let mark = match mount.kind {
            "cgroup2" => 0,
            _ if mount.has_controller("memory") => CGROUP_V1_MEMORY,
            _ => continue,
        };
        if !found.iter().any(|(_, known)| *known == mark) {
            found.push((mount.point.into_owned().into(), mark));
        }
    }
    found
}

/// Hands each cgroup below a hierarchy's root to `each`, with its id and its path.
pub fn scan_below(root: &Path, directory: &Path, each: &mut dyn FnMut(u64, &str)) {
    let Ok(metadata) = std::fs::metadata(directory) else { return };
    let below = directory.strip_prefix(root).map(|path| path.to_string_lossy()).unwrap_or_default();
    each(metadata.ino(), &format!("/{below}"));
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            scan_below(root, &entry.path(), each);
        }
    }
}
