//! Where the node's processes are seen.
//!
//! A pod has a `/proc` of its own, without them; there `HOST_PROC` names the place where the node's is mounted. What a process
//! says of itself stays `/proc/self`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The folder of a process, by the id that the kernel's events have.
pub fn process(pid: u32) -> PathBuf {
    proc_root().join(pid.to_string())
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
