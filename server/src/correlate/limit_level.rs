//! Which level of the hierarchy of cgroups has the memory limit that was reached.
//!
//! What enters: the path of the cgroup with the limit, and the victim. What must hold: only paths decide; kubelet's two drivers and
//! plain container runtimes are known.

use rkyv::{Archive, Deserialize, Serialize};
use tapio_wire::event::EntityKind;

use super::topology::EntityInfo;

/// What sort of cgroup has a memory limit.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitLevel {
    /// The victim's container or unit.
    Own,
    /// A cgroup that the container or unit made inside of its own.
    Inner,
    Pod,
    /// Burstable or best effort: kubelet limits them where memory QoS or reservations are on.
    Qos,
    /// All pods of the node together: what kubelet may hand out.
    Allocatable,
    /// A slice of systemd.
    Slice,
    /// A unit, seen from a container or process below it.
    Unit,
    /// Another cgroup above it.
    Other,
}

/// Whether a cgroup, by its path, is that of a whole pod.
pub fn is_pod_cgroup(path: &str) -> bool {
    let last = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let bare = last.strip_suffix(".slice").unwrap_or(last);
    let uid = bare.rsplit_once("-pod").map(|(_, uid)| uid).or_else(|| bare.strip_prefix("pod"));
    uid.is_some_and(|uid| uid.len() >= 32)
}

impl LimitLevel {
    /// Every level.
    pub const ALL: [Self; 8] =
        [Self::Own, Self::Inner, Self::Pod, Self::Qos, Self::Allocatable, Self::Slice, Self::Unit, Self::Other];

    /// The level of a cgroup with a limit, by its path, and whether it is the victim's own entity.
    pub fn of(limit: &str, victim: &EntityInfo, height: u32) -> Self {
        let last = limit.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        let inside = limit.strip_prefix(&*victim.cgroup).filter(|_| !victim.cgroup.is_empty());
        match inside {
            Some("") => return Self::Own,
            Some(rest) if rest.starts_with('/') => return Self::Inner,
            _ if height == 0 => return Self::Own,
            _ => {}
        }
        let is_kubelets = limit.contains("kubepods") || last.starts_with("kubepods");
        match last {
            last if is_pod_cgroup(last) => Self::Pod,
            "kubepods" | "kubepods.slice" | "kubelet-kubepods.slice" => Self::Allocatable,
            "burstable" | "besteffort" if is_kubelets => Self::Qos,
            last if last.ends_with("kubepods-burstable.slice") || last.ends_with("kubepods-besteffort.slice") => {
                Self::Qos
            }
            last if last.ends_with(".slice") => Self::Slice,
            last if last.ends_with(".service") => Self::Unit,
            // The container's own, where the process made cgroups below it.
            _ if victim.kind == Some(EntityKind::Container) && last.contains(victim.short_id()) => Self::Own,
            _ => Self::Other,
        }
    }

    /// The name that patterns use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Inner => "inner",
            Self::Pod => "pod",
            Self::Qos => "qos",
            Self::Allocatable => "allocatable",
            Self::Slice => "slice",
            Self::Unit => "unit",
            Self::Other => "other",
        }
    }

    /// What it is, for people.
    pub fn describe(self, cgroup: &str) -> String {
        let last = cgroup.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        match self {
            Self::Own => "its own limit".into(),
            Self::Inner => format!("the limit of a cgroup inside of it ({last})"),
            Self::Pod => "the limit of its pod".into(),
            Self::Qos => {
                let class = if last.contains("besteffort") { "best-effort" } else { "burstable" };
                format!("the limit of all {class} pods of the node ({last})")
            }
            Self::Allocatable => format!("the limit of all pods of the node ({last}, kubelet's node allocatable)"),
            Self::Slice => format!("the limit of the slice {last}"),
            Self::Unit => format!("the limit of the unit {last}"),
            Self::Other => format!("the limit of the cgroup {cgroup}"),
        }
    }
}
