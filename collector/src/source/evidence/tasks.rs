//! Tasks of the node that wait and cannot be interrupted, and its file systems.
//!
//! What must hold: no process is read where the machine's load shows that no task can have been blocked for a while.
//! File systems that may hang are not asked.

use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

use tapio_probes::mountinfo;

use crate::base::host;
use crate::intake::identity::scan::Stat;

/// Tasks reported at once.
const TASKS_MAX: usize = 16;
/// Flag of kernel threads among a task's flags (proc(5), include/linux/sched.h).
const PF_KTHREAD: u64 = 0x0020_0000;
/// Processes looked at in one round.
const PROCESSES_MAX: usize = 4_096;
/// Threads looked at in one round beside the first of each process.
const THREADS_MAX: usize = 4_096;
/// A task that is blocked for half a minute adds 0.4 to the load of the last minute; proc(5): such tasks count as if they ran.
const LOAD_MIN: f64 = 0.25;

/// A thread that waits without being interruptible. Two are the same when it has not run in between, wherever it waits.
#[derive(Clone, Debug)]
pub struct Task {
    /// The id of the thread, which is the process's where it is its first.
    pub pid: u32,
    pub start_time_ns: u64,
    /// How often it was switched to another: one that makes progress, as a database on a slow disk, is.
    pub switches: u64,
    pub comm: String,
    /// The kernel's function that it waits in; empty where that may not be read.
    pub place: String,
    /// The path of its cgroup.
    pub cgroup: String,
}

impl Task {
    fn key(&self) -> (u32, u64, u64) {
        (self.pid, self.start_time_ns, self.switches)
    }
}

impl PartialEq for Task {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Task {}

impl Hash for Task {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// Threads that are blocked now, one of each process.
pub fn blocked() -> Vec<Task> {
    let load = read(&host::proc_root().join("loadavg")).unwrap_or_default();
    if load.split(' ').next().and_then(|load| load.parse().ok()).is_none_or(|load: f64| load < LOAD_MIN) {
        return Vec::new();
    }
    let mut threads_left = THREADS_MAX;
    let processes = numbered(host::proc_root()).take(PROCESSES_MAX);
    processes.filter_map(|(pid, folder)| blocked_of(pid, &folder, &mut threads_left)).take(TASKS_MAX).collect()
}

/// The folders below one that are called by a number.
fn numbered(folder: &Path) -> impl Iterator<Item = (u32, PathBuf)> + use<> {
    let paths = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    paths.filter_map(|path| Some((path.file_name()?.to_str()?.parse().ok()?, path)))
}

/// The first thread of a process if it is blocked, or one of the others, of which at most `threads_left` are looked at.
fn blocked_of(pid: u32, folder: &Path, threads_left: &mut usize) -> Option<Task> {
    // proc(5): the state follows the name.
    let text = read(&folder.join("stat"))?;
    let fields = text.rsplit_once(") ")?.1;
    let number = |place: usize| fields.split(' ').nth(place)?.parse::<u64>().ok();
    // Kernel threads wait like that by nature.
    if number(6)? & PF_KTHREAD != 0 {
        return None;
    }
    if fields.starts_with('D') {
        return task(pid, folder);
    }
    if number(17)? < 2 {
        return None;
    }
    let others = numbered(&folder.join("task")).filter(|(thread, _)| *thread != pid);
    let looked_at = others.take_while(|_| {
        *threads_left = threads_left.saturating_sub(1);
        *threads_left > 0
    });
    let is_blocked = |path: &Path| {
        read(&path.join("stat"))
            .is_some_and(|text| text.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D')))
    };
    let mut blocked = looked_at.filter(|(_, path)| is_blocked(path));
    blocked.find_map(|(thread, path)| task(thread, &path))
}

fn task(pid: u32, folder: &Path) -> Option<Task> {
    let status = read(&folder.join("status"))?;
    let count = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    let switches = count("voluntary_ctxt_switches:")?.saturating_add(count("nonvoluntary_ctxt_switches:")?);
    let stat = Stat::of(folder)?;
    let cgroups = read(&folder.join("cgroup"))?;
    let path = |start: &str| cgroups.lines().find_map(|line| line.split_once(start).map(|(_, path)| path.to_owned()));
    // A path from another cgroup namespace leads up out of ours: then it names no cgroup here.
    let names = |path: &String| path.len() > 1 && !path.split('/').any(|part| part == "..");
    let cgroup = path("::").filter(names).or_else(|| path(":memory:")).filter(names)?;
    let place = read(&folder.join("wchan")).map(|text| text.trim().to_owned()).filter(|text| text != "0");
    Some(Task {
        pid,
        start_time_ns: stat.start_time_ns,
        switches,
        comm: stat.comm,
        place: place.unwrap_or_default(),
        cgroup,
    })
}

/// Whether SIGKILL waits for a process.
pub fn is_killed(pid: u32) -> bool {
    const SIGKILL_BIT: u64 = 1 << 8;
    let folder = host::process(pid);
    let status = folder.and_then(|folder| read(&folder.join("status"))).unwrap_or_default();
    let pending =
        |name: &str| status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix(name)?.trim(), 16).ok());
    ["SigPnd:", "ShdPnd:"].into_iter().filter_map(pending).any(|signals| signals & SIGKILL_BIT != 0)
}

/// How full a file system is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    pub mount: String,
    pub used_percent: u64,
    pub inodes_percent: u64,
}

/// Where kubelet, runtimes and logs write; each file system once.
const PLACES: [&str; 5] = ["/", "/var/lib/kubelet", "/var/lib/containerd", "/var/lib/containers", "/var/log"];

/// Where kubelet mounts the volumes of pods, and how many of them are looked at.
const VOLUMES: &str = "/var/lib/kubelet/pods/";
const VOLUMES_MAX: usize = 64;
/// File systems that are on a block device of the node: a server of files that is away does not make these hang.
const LOCAL: [&str; 5] = ["ext4", "xfs", "btrfs", "ext3", "f2fs"];

/// Volumes of pods in a `mountinfo` that are local file systems and can be written to.
fn volumes(mountinfo: &str) -> Vec<String> {
    let is_volume = |mount: &mountinfo::Mount<'_>| {
        mount.point.strip_prefix(VOLUMES).is_some_and(|rest| rest.contains("/volumes/"))
            && LOCAL.contains(&mount.kind)
            && !mount.is_read_only()
    };
    mountinfo::parse(mountinfo).filter(is_volume).map(|mount| mount.point.into_owned()).take(VOLUMES_MAX).collect()
}

/// What an overlay says of itself is that of the file system with its upper layer, which the runtime keeps.
const OWN_ROOT: &str = "the file system of images and containers";

/// The node's file systems, as seen through the root of its first process. That takes the right to trace it (ptrace);
/// without it, the one file system that the collector's own container is on.
pub fn file_systems() -> Vec<FileSystem> {
    let root = host::proc_root().join("1/root");
    let mut seen: Vec<u64> = Vec::new();
    let mut found = Vec::new();
    let volumes =
        mountinfo::read(host::proc_root().join("1/mountinfo")).map_or_else(|_| Vec::new(), |text| volumes(&text));
    for place in PLACES.into_iter().chain(volumes.iter().map(String::as_str)) {
        let path = root.join(place.trim_start_matches('/'));
        // A mount below that hangs is none of these: they are directories of local file systems on any node, or such themselves.
        let Ok(stat) = rustix::fs::statvfs(&path) else { continue };
        if stat.f_blocks == 0 || seen.contains(&stat.f_fsid) {
            continue;
        }
        seen.push(stat.f_fsid);
        found.push(file_system(place, &stat));
    }
    if found.is_empty()
        && let Ok(stat) = rustix::fs::statvfs("/")
    {
        found.push(file_system(OWN_ROOT, &stat));
    }
    found
}

fn file_system(mount: &str, stat: &rustix::fs::StatVfs) -> FileSystem {
    let percent = |free: u64, all: u64| (all - free.min(all)).saturating_mul(100).checked_div(all).unwrap_or(0);
    FileSystem {
        mount: mount.to_owned(),
        // As df(1): what only root may use does not count.
        used_percent: percent(stat.f_bavail, stat.f_blocks - (stat.f_bfree - stat.f_bavail.min(stat.f_bfree))),
        inodes_percent: percent(stat.f_ffree, stat.f_files),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_those_of_pods_on_local_file_systems() {
        let uid = "/var/lib/kubelet/pods/0a1b";
        let lines = [
            ("kubernetes.io~csi/pvc-1/mount", "rw,relatime", "ext4"),
            // Such a server may be away; what cannot be written to does not fill up; a secret is memory.
            ("kubernetes.io~nfs/share", "rw,relatime", "nfs4"),
            ("kubernetes.io~csi/pvc-2/mount", "ro,relatime", "xfs"),
            ("kubernetes.io~secret/keys", "rw,relatime", "tmpfs"),
        ];
        let mut text = String::from("22 1 8:1 / /var/lib/kubelet rw,relatime shared:1 - ext4 /dev/sda1 rw\n");
        for (path, options, kind) in lines {
            text += &format!("23 22 8:2 / {uid}/volumes/{path} {options} shared:2 - {kind} /dev/sdb rw\n");
        }
        text += &format!("24 22 8:2 / {uid}/volume-subpaths/pvc-1/web/0 rw shared:2 - ext4 /dev/sdb rw\n");
        assert_eq!(volumes(&text), [format!("{uid}/volumes/kubernetes.io~csi/pvc-1/mount")]);
        assert_eq!(volumes(&text.repeat(200)).len(), VOLUMES_MAX);
    }
}
