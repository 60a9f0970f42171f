//! Reads cgroups of either version.
//!
//! What must hold: a number that cannot be read is 0, no limit is `u64::MAX`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tapio_probes::mountinfo;

/// Levels that are read on the way to the root.
const LEVELS_MAX: usize = 8;
/// Units of container runtimes and kubelet, as their packages name them, and what their processes' names begin with.
const RUNTIMES: [(&str, &str); 9] = [
    ("containerd.service", "containerd"),
    ("docker.service", "dockerd"),
    ("crio.service", "crio"),
    ("cri-o.service", "crio"),
    ("kubelet.service", "kubelet"),
    ("k3s.service", "k3s"),
    ("k3s-agent.service", "k3s"),
    ("rke2-server.service", "rke2"),
    ("rke2-agent.service", "rke2"),
];

/// What the name of a runtime's process begins with, by the path of its unit's cgroup; empty for other cgroups.
pub fn runtime_comm(path: &str) -> &'static str {
    let unit = path.rsplit_once('/').map_or(path, |(_, unit)| unit);
    RUNTIMES.iter().find(|(known, _)| *known == unit).map_or("", |(_, comm)| comm)
}

/// What a cgroup said. See `Observation`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    pub path: String,
    pub memory_limit_bytes: u64,
    pub memory_usage_bytes: u64,
    pub memory_peak_bytes: u64,
    pub oom_kills: u64,
    pub limit_hits: u64,
    pub pids: u64,
    pub pids_limit: u64,
    pub throttled: u64,
    pub throttled_us: u64,
    /// Hundredths of a percent.
    pub memory_pressure: u32,
    /// What the memory use consists of, from `memory.stat`.
    pub memory: Breakdown,
    /// `nr_periods` of `cpu.stat`.
    pub periods: u64,
    /// Levels above the process's own.
    pub height: u32,
    /// The folder that has the memory controller's files.
    pub folder: PathBuf,
}

/// What a cgroup's memory consists of, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Breakdown {
    pub anon: u64,
    /// Page cache, without what is in tmpfs and shared memory.
    pub file: u64,
    pub shmem: u64,
    pub kernel: u64,
}

impl Breakdown {
    /// Parses `memory.stat`. Version 2 counts shared memory in `file`; version 1 has totals of all that is below, and
    /// counts it in `cache`.
    pub(super) fn of(stat: &str) -> Self {
        let has = |name: &str| field(stat, name);
        let (cache, shmem) = (has("file").max(has("total_cache")), has("shmem").max(has("total_shmem")));
        Self {
            anon: has("anon").max(has("total_rss")),
            file: cache.saturating_sub(shmem),
            shmem,
            kernel: has("kernel"),
        }
    }
}

/// Where hierarchies are mounted; [`None`] where version 2 has the controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    pub(super) version_2: Option<PathBuf>,
    pub(super) memory: Option<PathBuf>,
    pub(super) pids: Option<PathBuf>,
    pub(super) cpu: Option<PathBuf>,
    pub(super) cpuacct: Option<PathBuf>,
}

impl Mounts {
    /// Returns the mounts of this mount namespace.
    pub fn of_this_machine() -> Self {
        Self::parse(&mountinfo::read(mountinfo::OF_THIS_PROCESS).unwrap_or_default())
    }

    fn parse(mounts: &str) -> Self {
        let mut found = Self::default();
        for mount in mountinfo::parse(mounts) {
            let slots = match mount.kind {
                "cgroup2" => vec![&mut found.version_2],
                "cgroup" => [
                    ("memory", &mut found.memory),
                    ("pids", &mut found.pids),
                    ("cpu", &mut found.cpu),
                    ("cpuacct", &mut found.cpuacct),
                ]
                .into_iter()
                .filter_map(|(controller, slot)| mount.has_controller(controller).then_some(slot))
                .collect(),
                _ => continue,
            };
            for slot in slots {
                slot.get_or_insert_with(|| PathBuf::from(&*mount.point));
            }
        }
        found
    }

    /// Reads the cgroup of a process, and those above it that limit something; nothing where only the root is left. `path` is
    /// what its cgroup is known by, for when the process is gone already.
    pub fn read(&self, pid: u32, path: &str, path_is_version_1: bool) -> Vec<Reading> {
        let of_process =
            crate::base::host::process(pid).and_then(|folder| text(&folder.join("cgroup"))).unwrap_or_default();
        self.read_at(&ProcessPaths::of(&of_process, path, path_is_version_1))
    }

    /// The cgroups of containers and of their pods, by the path that readings have.
    pub fn container_paths(&self) -> Paths {
        let mut containers = Vec::new();
        // Only what has a memory cgroup can be sampled.
        if let Some(root) = self.memory.as_ref().or(self.version_2.as_ref()) {
            containers_below(root, root, &mut containers);
        }
        containers.sort_unstable();
        containers.dedup();
        let above = containers.iter().filter_map(|path| path.rsplit_once('/').map(|(above, _)| above));
        let mut pods: Vec<String> =
            above.filter(|path| crate::intake::identity::is_pod(path)).map(str::to_owned).collect();
        pods.dedup();
        let root = self.memory.as_ref().or(self.version_2.as_ref());
        let is_there = |path: &String| root.is_some_and(|root| root.join(path.trim_start_matches('/')).is_dir());
        let runtimes = RUNTIMES.map(|(unit, _)| format!("/system.slice/{unit}")).into_iter().filter(is_there).collect();
        Paths { containers, pods, runtimes }
    }

    fn read_at(&self, paths: &ProcessPaths) -> Vec<Reading> {
        let known_by = if paths.version_2.len() > 1 { &paths.version_2 } else { &paths.memory };
        let memory_path = if self.memory.is_some() { &paths.memory } else { &paths.version_2 };
        let mut readings = Vec::new();
        for level in 0..LEVELS_MAX {
            let memory_path = above(memory_path, level);
            let Some(known_by) = above(known_by, level).or(memory_path) else { break };
            let mut reading = Reading { path: known_by.to_owned(), height: level as u32, ..Reading::default() };
            let at = |root: &Option<PathBuf>, path: &str| {
                let (root, path) = (root.as_ref()?, above(path, level)?);
                Some(root.join(path.trim_start_matches('/')))
            };
            match (at(&self.memory, &paths.memory), at(&self.version_2, &paths.version_2)) {
                (Some(folder), _) => {
                    reading.memory_version_1(&folder);
                    // The limit's cgroup is called as in the hierarchy that has the limit.
                    reading.path = memory_path.unwrap_or(known_by).to_owned();
                }
                (None, Some(folder)) => reading.memory_version_2(&folder),
                (None, None) => {}
            }
            if let Some(folder) = at(&self.pids, &paths.pids).or_else(|| at(&self.version_2, &paths.version_2)) {
                reading.pids = number(&folder.join("pids.current"));
                reading.pids_limit = number(&folder.join("pids.max"));
            }
            let cpu = at(&self.cpu, &paths.cpu).or_else(|| at(&self.version_2, &paths.version_2));
            if let Some(stat) = cpu.and_then(|folder| text(&folder.join("cpu.stat"))) {
                reading.cpu(&stat);
            }
            if (level == 0 && reading.says_something()) || (level > 0 && reading.limits()) {
                readings.push(reading);
            }
        }
        readings
    }
}

/// The containers below a folder of a hierarchy.
fn containers_below(root: &Path, folder: &Path, found: &mut Vec<String>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        let below = entry.path();
        let path = format!("/{}", below.strip_prefix(root).unwrap_or(&below).to_string_lossy());
        // A folder without others has two links: what is in a container that made none need not be read.
        let has_folders =
            !crate::intake::identity::is_container(&path) || entry.metadata().is_ok_and(|is| is.nlink() > 2);
        if crate::intake::identity::is_container_itself(&path) {
            found.push(path);
        }
        if has_folders {
            containers_below(root, &below, found);
        }
    }
}

/// The paths of containers' cgroups, and of those of their pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    pub containers: Vec<String>,
    pub pods: Vec<String>,
    /// Units of container runtimes and kubelet.
    pub runtimes: Vec<String>,
}

/// A process's cgroup in each hierarchy.
#[derive(Debug, Default, PartialEq, Eq)]
struct ProcessPaths {
    version_2: String,
    memory: String,
    pids: String,
    cpu: String,
}

impl ProcessPaths {
    /// Parses `/proc/PID/cgroup`; where that says nothing, every hierarchy names the cgroup alike.
    fn of(text: &str, path: &str, path_is_version_1: bool) -> Self {
        let mut paths = Self::default();
        for line in text.lines() {
            // cgroups(7): hierarchy, controllers, path.
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            if controllers.is_empty() {
                path.clone_into(&mut paths.version_2);
            }
            for controller in controllers.split(',') {
                match controller {
                    "memory" => path.clone_into(&mut paths.memory),
                    "pids" => path.clone_into(&mut paths.pids),
                    "cpu" => path.clone_into(&mut paths.cpu),
                    _ => {}
                }
            }
        }
        // A dead process is moved to the root, and a zombie's text ends with a mark.
        // From a cgroup namespace that the process is not in, its path begins at the namespace's root and leads up from there.
        let is_known = |slot: &String| {
            slot.len() > 1 && !slot.ends_with(" (deleted)") && !slot.split('/').any(|part| part == "..")
        };
        let named = if path_is_version_1 { &mut paths.memory } else { &mut paths.version_2 };
        if !path.is_empty() {
            path.clone_into(named);
        }
        for slot in [&mut paths.version_2, &mut paths.memory, &mut paths.pids, &mut paths.cpu] {
            if !is_known(slot) {
                path.clone_into(slot);
            }
        }
        paths
    }
}

/// `path` without its last `levels` parts; [`None`] for the root, which has neither limits nor events.
fn above(path: &str, levels: usize) -> Option<&str> {
    let mut path = path.trim_end_matches('/');
    for _ in 0..levels {
        path = path.rsplit_once('/')?.0;
    }
    (!path.is_empty()).then_some(path)
}

impl Reading {
    fn cpu(&mut self, stat: &str) {
        self.periods = field(stat, "nr_periods");
        self.throttled = field(stat, "nr_throttled");
        self.throttled_us = throttled_us(stat);
    }

    fn counters_version_2(&mut self, folder: &Path) {
        let events = text(&folder.join("memory.events")).unwrap_or_default();
        self.oom_kills = field(&events, "oom_kill");
        self.limit_hits = field(&events, "max");
    }

    fn counters_version_1(&mut self, folder: &Path) {
        self.oom_kills = field(&text(&folder.join("memory.oom_control")).unwrap_or_default(), "oom_kill");
        // With swap limited alike, as by container runtimes, it is that limit which is hit; newer kernels count that nowhere.
        let hits = ["memory.failcnt", "memory.memsw.failcnt"].map(|file| number(&folder.join(file)));
        self.limit_hits = hits[0].max(hits[1]);
    }

    fn memory_version_2(&mut self, folder: &Path) {
        self.memory_limit_bytes = number(&folder.join("memory.max"));
        self.memory_usage_bytes = number(&folder.join("memory.current"));
        self.memory_peak_bytes = number(&folder.join("memory.peak"));
        self.counters_version_2(folder);
        self.memory_pressure = pressure(&text(&folder.join("memory.pressure")).unwrap_or_default());
        self.memory = Breakdown::of(&text(&folder.join("memory.stat")).unwrap_or_default());
        folder.clone_into(&mut self.folder);
    }

    fn memory_version_1(&mut self, folder: &Path) {
        self.memory_limit_bytes = limit_version_1(folder);
        self.memory_usage_bytes = number(&folder.join("memory.usage_in_bytes"));
        self.memory_peak_bytes = number(&folder.join("memory.max_usage_in_bytes"));
        self.counters_version_1(folder);
        self.memory = Breakdown::of(&text(&folder.join("memory.stat")).unwrap_or_default());
        // `rss` and `cache` leave the kernel's own out, and version 1 counts that by itself.
        self.memory.kernel = number(&folder.join("memory.kmem.usage_in_bytes"));
        folder.clone_into(&mut self.folder);
    }

    fn says_something(&self) -> bool {
        *self != Self { path: self.path.clone(), folder: self.folder.clone(), height: self.height, ..Self::default() }
    }

    fn limits(&self) -> bool {
        [self.memory_limit_bytes, self.pids_limit].into_iter().any(|limit| limit != 0 && limit != u64::MAX)
    }
}

/// One of the biggest below a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Below the folder that was asked.
    pub path: String,
    pub usage_bytes: u64,
    /// 0 for none.
    pub limit_bytes: u64,
    pub oom_score_adj: i16,
}

/// Cgroups looked at below a full one.
const MEMBERS_LOOKED_AT_MAX: usize = 1024;
/// Maximum number of the biggest cgroups below a full one that go into its event.
const MEMBERS_MAX: usize = 5;
/// Levels below it: QoS level, pod, container.
const MEMBER_LEVELS_MAX: usize = 3;

/// The biggest cgroups below one, of those that have processes, the biggest first.
pub fn members(folder: &Path) -> Vec<Member> {
    let mut found = Vec::new();
    let mut looked_at = 0;
    collect_members(folder, folder, 0, &mut looked_at, &mut found);
    found.sort_by(|a, b| b.usage_bytes.cmp(&a.usage_bytes).then_with(|| a.path.cmp(&b.path)));
    found.truncate(MEMBERS_MAX);
    found
}

fn collect_members(root: &Path, folder: &Path, level: usize, looked_at: &mut usize, found: &mut Vec<Member>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        if *looked_at == MEMBERS_LOOKED_AT_MAX {
            return;
        }
        *looked_at += 1;
        let below = entry.path();
        if let Some(pid) = text(&below.join("cgroup.procs")).and_then(|pids| pids.lines().next()?.parse().ok()) {
            let adjustment = crate::base::host::process(pid).and_then(|process| text(&process.join("oom_score_adj")));
            let limit = number(&below.join("memory.max")).max(number(&below.join("memory.limit_in_bytes")));
            found.push(Member {
                path: below.strip_prefix(root).map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
                usage_bytes: number(&below.join("memory.current")).max(number(&below.join("memory.usage_in_bytes"))),
                limit_bytes: if limit >= 1 << 62 { 0 } else { limit },
                oom_score_adj: adjustment.and_then(|text| text.trim().parse().ok()).unwrap_or(0),
            });
        }
        if level + 1 < MEMBER_LEVELS_MAX {
            collect_members(root, &below, level + 1, looked_at, found);
        }
    }
}

pub(super) fn text(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

pub(super) fn number(path: &Path) -> u64 {
    match text(path).as_deref().map(str::trim) {
        Some("max") => u64::MAX,
        Some(digits) => digits.parse().unwrap_or(0),
        None => 0,
    }
}

/// The memory limit of a version 1 cgroup: no limit is the greatest number of whole pages there.
pub(super) fn limit_version_1(folder: &Path) -> u64 {
    let limit = number(&folder.join("memory.limit_in_bytes"));
    if limit >= 1 << 62 { u64::MAX } else { limit }
}

pub(super) fn field(text: &str, name: &str) -> u64 {
    let values = text.lines().filter_map(|line| line.split_once(' '));
    values.filter(|(field, _)| *field == name).find_map(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
}

/// Reads the throttled time from `cpu.stat`, either version's.
pub(super) fn throttled_us(stat: &str) -> u64 {
    field(stat, "throttled_usec").max(field(stat, "throttled_time") / 1000)
}

/// `full avg10` of a pressure file, hundredths of a percent; it is written with two decimals.
pub(super) fn pressure(text: &str) -> u32 {
    let full = text.lines().find_map(|line| line.strip_prefix("full avg10=")).unwrap_or_default();
    let digits: String = full.split(' ').next().unwrap_or_default().chars().filter(|digit| *digit != '.').collect();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests;
