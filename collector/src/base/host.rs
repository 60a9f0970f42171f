//! Where the node's processes are seen.
//!
//! A pod has a `/proc` of its own, without them; there `HOST_PROC` names the place where the node's is mounted. What a process
//! says of itself stays `/proc/self`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The folder of a process, by the id that the kernel's events have. None where procfs belongs to another pid namespace
/// than the kernel's own, as in a node that is itself a container: the same number is another process there.
pub fn process(pid: u32) -> Option<PathBuf> {
    is_of_the_kernel().then(|| proc_root().join(pid.to_string()))
}

/// Returns this process's id as the kernel's events have it; [`None`] where only another pid namespace is seen.
pub fn own_pid() -> Option<u32> {
    let own = std::process::id();
    if is_initial("/proc/self/ns/pid".as_ref()) {
        return Some(own);
    }
    is_of_the_kernel().then(|| own_pid_below(proc_root(), own)).flatten()
}

/// Looks for this process in the kernel's procfs: the innermost of its ids and its pid namespace are its own.
fn own_pid_below(root: &Path, own: u32) -> Option<u32> {
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
    let pids = std::fs::read_dir(root).ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.into_iter().find(|pid: &u32| {
        let folder = root.join(pid.to_string());
        let status = std::fs::read_to_string(folder.join("status")).unwrap_or_default();
        let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        ids.split_whitespace().next_back().is_some_and(|id| id == own.to_string())
            && std::fs::read_link(folder.join("ns/pid")).is_ok_and(|theirs| theirs == namespace)
    })
}

/// `PROC_PID_INIT_INO` of the kernel: the number of the pid namespace that it begins with.
const INITIAL_NAMESPACE: &str = "pid:[4026531836]";

fn is_initial(link: &Path) -> bool {
    std::fs::read_link(link).is_ok_and(|target| target.as_os_str() == INITIAL_NAMESPACE)
}

/// Whether the ids of [`proc_root`] are those of the kernel's events.
fn is_of_the_kernel() -> bool {
    static IS: OnceLock<bool> = OnceLock::new();
    *IS.get_or_init(|| {
        let root = proc_root();
        match std::fs::read_link(root.join("1/ns/pid")) {
            Ok(target) => target.as_os_str() == INITIAL_NAMESPACE,
            // Not readable without privileges: then it is this process's own, where nothing else was named.
            Err(_) if root == Path::new("/proc") => is_initial("/proc/self/ns/pid".as_ref()),
            Err(_) => true,
        }
    })
}

/// Where the node's `/proc` is.
pub fn proc_root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| root(std::env::var_os("HOST_PROC")))
}

fn root(named: Option<OsString>) -> PathBuf {
    named.filter(|named| !named.is_empty()).map_or_else(|| "/proc".into(), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_looked_for_where_the_environment_says() {
        assert_eq!(root(Some("/host/proc".into())), PathBuf::from("/host/proc"));
        assert_eq!(root(Some("".into())), PathBuf::from("/proc"));
        assert_eq!(root(None), PathBuf::from("/proc"));
    }
}
