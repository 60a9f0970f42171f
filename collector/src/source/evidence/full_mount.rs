//! Which file system had no room, when a process met a bus error.
//!
//! In: the processes that may see the same mounts. Out: the smallest one that is full. What must hold: nothing is asked that may
//! hang, as a server of the network that is gone does.

use std::borrow::Cow;
use std::path::Path;

use tapio_probes::mountinfo;

/// A file system without room: where the process sees it, and its size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FullMount {
    pub mount: String,
    pub size_bytes: u64,
}

/// Mounts looked at for one that is full.
const MOUNTS_MAX: usize = 512;

/// The smallest file system without room that the first of `candidates` sees which still runs and sees one.
pub fn full_mount(candidates: impl Iterator<Item = u32>) -> Option<FullMount> {
    candidates.filter_map(crate::base::host::process).find_map(|folder| full_mount_of(&folder))
}

fn full_mount_of(process: &Path) -> Option<FullMount> {
    let mounts = mountinfo::read(process.join("mountinfo")).ok()?;
    let root = process.join("root");
    let mut full: Vec<FullMount> = Vec::new();
    for mount in written_mounts(&mounts) {
        let Ok(stat) = rustix::fs::statvfs(root.join(mount.trim_start_matches('/'))) else { continue };
        // Less than a page is no room.
        if stat.f_blocks > 0 && stat.f_bavail.saturating_mul(stat.f_frsize) < 4096 {
            full.push(FullMount { mount: mount.into_owned(), size_bytes: stat.f_blocks.saturating_mul(stat.f_frsize) });
        }
    }
    full.into_iter().min_by_key(|mount| mount.size_bytes)
}

/// Where a process can write to a file system of this machine, from the text of a mountinfo. To look at a mount below one of the
/// network or of another program could take for ever: such a one is left out.
fn written_mounts(mounts: &str) -> Vec<Cow<'_, str>> {
    const WRITTEN: [&str; 6] = ["tmpfs", "ext4", "xfs", "btrfs", "overlay", "hugetlbfs"];
    const REMOTE: [&str; 13] = [
        "nfs", "cifs", "smb", "ceph", "9p", "fuse", "virtiofs", "autofs", "afs", "lustre", "gpfs", "beegfs", "orangefs",
    ];
    let (mut written, mut remote) = (Vec::new(), Vec::new());
    for mount in mountinfo::parse(mounts).take(MOUNTS_MAX) {
        match WRITTEN.contains(&mount.kind) {
            true if !mount.is_read_only() => written.push(mount.point),
            true => {}
            false if REMOTE.iter().any(|remote| mount.kind.starts_with(remote)) => remote.push(mount.point),
            false => {}
        }
    }
    written.retain(|mount| !remote.iter().any(|above| Path::new(&**mount).starts_with(&**above)));
    written
}

#[cfg(test)]
mod tests {
    use super::written_mounts;

    #[test]
    fn a_mount_below_one_that_may_hang_is_skipped() {
        let mountinfo = "\
21 1 0:20 / / rw - overlay overlay rw
22 21 0:21 / /proc rw - proc proc rw
23 21 0:22 / /dev rw - tmpfs tmpfs rw
24 23 0:23 / /dev/shm rw - tmpfs shm rw
25 21 0:24 / /data rw - nfs4 server:/data rw
26 25 0:25 / /data/cache rw - tmpfs cache rw
27 21 0:26 / /database rw - ext4 /dev/sda rw
27 21 0:26 / /with\\040space rw - ext4 /dev/sdb rw
28 21 0:27 / /etc/hosts ro - ext4 /dev/sda rw
29 21 0:28 / /remote rw - fuse.sshfs host: rw";
        assert_eq!(written_mounts(mountinfo), ["/", "/dev", "/dev/shm", "/database", "/with space"]);
    }
}
