//! Where the hierarchies of cgroups are mounted, and what is below them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tapio_probes::record::CGROUP_V1_MEMORY;

/// The mount points of the version 2 hierarchy and of the version 1 memory hierarchy, with the marks of their ids.
pub fn hierarchies() -> Vec<(PathBuf, u64)> {
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mountinfo") else {
        return Vec::new();
    };
    let mut found: Vec<(PathBuf, u64)> = Vec::new();
    for line in mounts.lines() {
        // proc(5): the fields before " - " start with id, parent, device, root, mount point; after it type, source, options.
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let Some(mount_point) = before.split(' ').nth(4) else { continue };
        let mut after = after.split(' ');
        let mark = match (after.next(), after.nth(1)) {
            (Some("cgroup2"), _) => 0,
            (Some("cgroup"), Some(options)) if options.split(',').any(|option| option == "memory") => CGROUP_V1_MEMORY,
            _ => continue,
        };
        if !found.iter().any(|(_, known)| *known == mark) {
            found.push((mount_point.into(), mark));
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
