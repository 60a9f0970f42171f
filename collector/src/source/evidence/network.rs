//! Packets that a container's own table of connections has no room for.
//!
//! In: a process of a container, each minute. Out: its network namespace, and how many packets the kernel has dropped
//! there because the table was full. What must hold: one small file of one process is read. That file's inode number
//! identifies the namespace, and needs no privilege. Nothing stays open, since an open file would keep the namespace.
//!
//! A pod tracks connections itself where a mesh or a nested runtime has rules in it. The node's own table is [`crate::source::conntrack`]'s.

use std::path::Path;

use crate::base::host;
use crate::source::conntrack::{self, Fill};

/// What the kernel counts in a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The number of the namespace's file in procfs.
    pub id: u64,
    pub fill: Fill,
}

/// The network namespace of a process; [`None`] where nothing is counted, or the process is gone.
pub fn of_process(pid: u32) -> Option<Network> {
    below(&host::process(pid)?)
}

/// The node's own network namespace.
pub fn of_node() -> Option<u64> {
    below(&host::proc_root().join("1")).map(|network| network.id)
}

/// The most connections that any table may have; [`None`] where there is none.
pub fn entries_max() -> Option<u64> {
    let text = std::fs::read_to_string(host::proc_root().join("sys/net/netfilter/nf_conntrack_max"));
    text.ok()?.trim().parse().ok()
}

fn below(process: &Path) -> Option<Network> {
    let path = process.join("net/stat/nf_conntrack");
    let id = rustix::fs::stat(&path).ok()?.st_ino;
    Some(Network { id, fill: conntrack::counters(&std::fs::read_to_string(&path).ok()?)? })
}
