//! `collectors:`, the sections of the sources.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tapio_wire::program::units;

use super::STUCK_AFTER;

/// `collectors:`
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SourcesSection {
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub ebpf: EbpfSection,
    pub k8s: K8sSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub systemd: SystemdSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub shm: ShmSection,
}

/// `collectors.ebpf:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EbpfSection {
    /// Whether the probes run, where `collector.enabled_collectors` lists `ebpf`.
    pub enabled: bool,
    /// Connections, dropped packets, DNS.
    pub enable_network: bool,
    /// OOM kills and stalls in memory reclaim.
    pub enable_memory: bool,
    /// Starts and ends of processes, and signals.
    pub enable_process: bool,
    /// The kernel's type information; default `/sys/kernel/btf/vmlinux`.
    #[schemars(example = "/sys/kernel/btf/vmlinux")]
    pub btf: Option<PathBuf>,
    /// The shortest nap of the reader between looks at the rings while there is traffic.
    #[serde(deserialize_with = "units::duration")]
    pub linger: Duration,
    /// Records of process starts and ends, signals and cgroup changes that one cgroup may cause a second. A finding names a cgroup
    /// beyond it. OOM kills always pass. 0: unlimited.
    pub cgroup_records_per_second: u32,
    /// How often what the kernel sums up (histograms, counts) is fetched.
    #[serde(deserialize_with = "units::duration")]
    pub flush_interval: Duration,
    /// Histograms of waiting for a CPU, by cgroup, and an event for a long wait. Its hooks are among the kernel's hottest.
    pub enable_scheduler: bool,
    /// System calls that fail because something has run out or is broken. Its hook is every system call's end.
    pub enable_syscall_errors: bool,
    /// Audits who opens secrets, config maps and what is below `audited_paths`. Its hook is every system call's end.
    pub enable_file_audit: bool,
    /// Prefixes of paths whose opening is reported, besides kubelet's volumes of secrets, config maps and projections.
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub audited_paths: Vec<String>,
    /// What is reported of programs that processes start.
    pub exec_arguments: ExecArguments,
    /// Names of what is secret among arguments, besides the built-in ones; `*` stands for anything.
    #[schemars(example = ["*_pin", "licence"])]
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub redact: Vec<String>,
    /// Waits for a CPU of at least this length are reported.
    #[serde(deserialize_with = "units::duration")]
    pub run_queue_slow: Duration,
    /// Block I/O that took at least this long is reported.
    #[serde(deserialize_with = "units::duration")]
    pub block_io_slow: Duration,
    /// A cgroup's stalls in memory reclaim are reported when they add up to this.
    #[serde(deserialize_with = "units::duration")]
    pub reclaim_burst: Duration,
    /// DNS lookups that took at least this long are reported; failed ones always are.
    #[serde(deserialize_with = "units::duration")]
    pub dns_slow: Duration,
    /// When a DNS query counts as unanswered.
    #[serde(deserialize_with = "units::duration")]
    pub dns_timeout: Duration,
    /// Names of the errors that `enable_syscall_errors` counts; EAGAIN counts only where a process should have been made.
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub syscall_errors: Vec<String>,
}

/// How much is reported of the programs that processes start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ExecArguments {
    /// The name that the kernel gives them, 15 bytes.
    #[default]
    Off,
    /// The path too.
    Path,
    /// The path and the first arguments, redacted.
    Full,
}

impl Default for EbpfSection {
    fn default() -> Self {
        Self {
            enabled: true,
            enable_network: true,
            enable_memory: true,
            enable_process: true,
            btf: None,
            cgroup_records_per_second: tapio_probes::DEFAULT_CGROUP_RECORDS_PER_SECOND,
            linger: Duration::from_millis(1),
            flush_interval: Duration::from_secs(10),
            enable_scheduler: false,
            enable_syscall_errors: false,
            enable_file_audit: false,
            audited_paths: tapio_probes::DEFAULT_AUDITED_PATHS.iter().map(|&path| path.into()).collect(),
            exec_arguments: ExecArguments::Off,
            redact: Vec::new(),
            run_queue_slow: Duration::from_millis(100),
            block_io_slow: Duration::from_millis(100),
            reclaim_burst: Duration::from_millis(1),
            dns_slow: Duration::from_secs(1),
            dns_timeout: Duration::from_secs(5),
            syscall_errors: ["EIO", "EAGAIN", "ENOMEM", "ENFILE", "EMFILE", "ENOSPC", "EROFS", "ECONNREFUSED"]
                .map(String::from)
                .into(),
        }
    }
}

/// Namespaces of Kubernetes itself.
pub const SYSTEM_NAMESPACES: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];

/// `collectors.k8s:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct K8sSection {
    /// Whether Kubernetes is watched, where `collector.enabled_collectors` lists `k8s`.
    pub enabled: bool,
    /// Use the pod's service account; otherwise a kubeconfig.
    pub in_cluster: bool,
    /// Leaves out what happens in `kube-system`, `kube-public` and `kube-node-lease`; names are known all the same.
    pub exclude_system_namespaces: bool,
    /// Namespaces whose pods' bulk events the probes leave out; deaths and what Kubernetes says of them are reported.
    #[schemars(example = ["batch", "ci"])]
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub exclude_namespaces: Vec<String>,
    /// How long a pod or node may be unready, a container may take to start, an init container may run, or a deleted pod may stay,
    /// before a finding.
    #[serde(deserialize_with = "units::duration")]
    pub stuck_after: Duration,
    /// Outside of a cluster; default: `KUBECONFIG` of the environment, else `~/.kube/config`.
    #[schemars(example = "/root/.kube/config")]
    pub kubeconfig: Option<PathBuf>,
    /// Where the election's Lease is; default: `POD_NAMESPACE` of the environment, else the credentials' namespace.
    #[schemars(example = "tapio-system")]
    pub lease_namespace: Option<String>,
}

impl Default for K8sSection {
    fn default() -> Self {
        Self {
            enabled: true,
            in_cluster: true,
            exclude_system_namespaces: false,
            exclude_namespaces: Vec::new(),
            stuck_after: STUCK_AFTER,
            kubeconfig: None,
            lease_namespace: None,
        }
    }
}

impl K8sSection {
    /// What is left out of the bulk lane.
    pub fn excluded_namespaces(&self) -> Vec<String> {
        let mut namespaces = self.exclude_namespaces.clone();
        if self.exclude_system_namespaces {
            namespaces.extend(SYSTEM_NAMESPACES.map(String::from));
        }
        namespaces
    }
}

/// `collectors.systemd:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SystemdSection {
    /// Whether systemd is watched, where `collector.enabled_collectors` lists `systemd`.
    pub enabled: bool,
    /// Leaves out units of systemd itself and those that every system has.
    pub exclude_system: bool,
    /// The bus; default: `DBUS_SYSTEM_BUS_ADDRESS` of the environment, else the usual socket.
    #[schemars(example = "unix:path=/run/dbus/system_bus_socket")]
    pub bus: Option<String>,
    /// Patterns of the units to watch, `*` and `?` as in a shell; none for all.
    #[schemars(example = ["*.service"])]
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub units: Vec<String>,
    /// Patterns of units to leave out.
    #[schemars(example = ["apt-*", "session-*.scope"])]
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub exclude_units: Vec<String>,
}

impl Default for SystemdSection {
    fn default() -> Self {
        Self { enabled: true, exclude_system: false, bus: None, units: Vec::new(), exclude_units: Vec::new() }
    }
}

/// `collectors.shm:` rings of local processes.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ShmSection {
    /// Whether rings of local processes are taken, where `collector.enabled_collectors` lists `shm`.
    pub enabled: bool,
    /// The Unix socket on which rings are handed over; only root may connect.
    pub socket: PathBuf,
    /// Rings at the same time.
    pub max_peers: usize,
    /// Data bytes of one ring at the most.
    #[serde(deserialize_with = "units::bytes")]
    pub max_ring_bytes: u64,
}

impl Default for ShmSection {
    fn default() -> Self {
        Self { enabled: true, socket: "/run/tapio/collector.sock".into(), max_peers: 16, max_ring_bytes: 16 << 20 }
    }
}
