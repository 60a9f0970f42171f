//! The collector's configuration: `collector.yaml` of the deployment guide, and Tapio's own keys.
//!
//! What enters: a YAML file and command line flags. What leaves: a [`Config`] that was validated as a whole. What must hold:
//! an unknown key, a wrong type or an impossible value never becomes a default.

mod check;

use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tapio_wire::compress::Compression;
pub use tapio_wire::config_file::ConfigError;
use tapio_wire::tls::ClientFiles;
use tapio_wire::{config_file, reference, units};

use crate::settings::severity::Severity;

/// How often containers are sampled by default.
pub const WATCH_INTERVAL: Duration = Duration::from_secs(10);
/// How long a pod's condition lasts before it is reported, by default.
pub const STUCK_AFTER: Duration = Duration::from_secs(180);
/// The least that a spool may be bounded to: some segments of at least one frame each.
pub const SPOOL_BYTES_MIN: u64 = 32 << 20;

/// Keys that take effect at once.
pub const LIVE: [&str; 11] = [
    "logging.level",
    "collector.sampling_rate",
    "collector.max_events_per_sec",
    "pipeline.enable_filtering",
    "pipeline.filter_config.min_severity",
    "collectors.ebpf.run_queue_slow",
    "collectors.ebpf.block_io_slow",
    "collectors.ebpf.reclaim_burst",
    "collectors.ebpf.dns_slow",
    "collectors.ebpf.dns_timeout",
    "collectors.ebpf.exec_arguments",
];

/// Everything that can be configured.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub collector: CollectorSection,
    pub grpc: GrpcSection,
    pub resources: ResourcesSection,
    pub pipeline: PipelineSection,
    pub collectors: SourcesSection,
    pub health: HealthSection,
    pub logging: LoggingSection,
}

/// `collector:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CollectorSection {
    /// Sources to run: `ebpf`, `k8s`, `systemd`, `shm`.
    pub enabled_collectors: Vec<String>,
    /// Share of bulk events that is kept, above 0 and up to 1.
    pub sampling_rate: f64,
    /// Bulk events a second of each source; 0 for no limit.
    pub max_events_per_sec: u64,
    /// Events that wait between sources and frames, each lane.
    pub buffer_size: usize,
    /// This node's name; default: `NODE_NAME` of the environment, else the host name.
    #[schemars(example = "worker-7")]
    pub node_name: Option<String>,
    /// Whether limits, usage and a signal's sender are read when something lethal arrives.
    pub evidence: bool,
    /// Whether a sender's arguments are told as well; they may be secrets.
    pub evidence_arguments: bool,
    /// How often the fill of the kernel's table of connections is looked at; 0 for never.
    #[serde(deserialize_with = "units::duration")]
    pub conntrack_interval: Duration,
    /// How often each container is sampled for the curve of its use and for what is wrong with it while it lives, where
    /// `evidence` is on. A trouble begins and ends after six samples; curves reach 180 samples back. 0
    /// for never.
    #[serde(deserialize_with = "units::duration")]
    pub watch_interval: Duration,
    /// How many of its last lines are read of a container that died otherwise than with code 0, at most 50; 0 for none. They may hold
    /// what is secret: what is recognised as such is taken out, as from arguments.
    pub log_lines: usize,
    /// Kubelet's folder of logs, as the collector sees it.
    pub log_dir: PathBuf,
}

impl Default for CollectorSection {
    fn default() -> Self {
        Self {
            enabled_collectors: vec!["ebpf".into(), "shm".into()],
            sampling_rate: 1.0,
            max_events_per_sec: 10_000,
            buffer_size: 32_768,
            node_name: None,
            evidence: true,
            evidence_arguments: false,
            conntrack_interval: Duration::from_secs(5),
            watch_interval: WATCH_INTERVAL,
            log_lines: 0,
            log_dir: "/var/log/pods".into(),
        }
    }
}

/// `grpc:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GrpcSection {
    /// `host:port` of the servers. Every address behind every name is a candidate; a hash picks one for this node.
    #[schemars(example = ["tapio-server:9090"])]
    pub server_endpoints: Vec<String>,
    /// How often the names are resolved again while a stream is up, and the preferred server is tried again.
    #[serde(deserialize_with = "units::duration")]
    pub resolve_interval: Duration,
    /// Whether frames travel over TLS; then `grpc.tls.ca` is needed.
    #[schemars(example = true)]
    pub tls_enabled: bool,
    /// PEM files; they may change at any time.
    pub tls: ClientFiles,
    /// A bearer token for the server, like a projected service account's; it may change at any time.
    #[schemars(example = "/var/run/secrets/tokens/tapio")]
    pub token_file: Option<PathBuf>,
    /// Whether the token may travel in the clear, where TLS is off: whoever reads the wire can use it until it expires. Without
    /// this a token goes in the clear to this machine only.
    pub token_without_tls: bool,
    /// Events in a frame.
    pub max_batch_size: usize,
    /// How long an event may wait for others of its frame at the most: once there are a few hundred they leave. An urgent one
    /// does not wait: an OOM kill, a signal, a death.
    #[serde(deserialize_with = "units::duration")]
    pub batch_timeout: Duration,
    /// Whether a stream that broke is opened again.
    pub reconnect_enabled: bool,
    /// Where frames go that memory has no room for; without it they wait in the rings.
    pub spool: Option<SpoolSection>,
    /// How frames are compressed.
    pub compression: Compression,
}

impl Default for GrpcSection {
    fn default() -> Self {
        Self {
            server_endpoints: vec!["127.0.0.1:9090".into()],
            resolve_interval: Duration::from_secs(30),
            tls_enabled: false,
            tls: ClientFiles::default(),
            token_file: None,
            token_without_tls: false,
            max_batch_size: 4096,
            batch_timeout: Duration::from_millis(200),
            reconnect_enabled: true,
            spool: None,
            compression: Compression::Rows,
        }
    }
}

/// `grpc.spool:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SpoolSection {
    /// A folder of this collector's own, which outlives it: a hostPath volume.
    #[schemars(example = "/var/lib/tapio-collector")]
    pub dir: PathBuf,
    /// What its files hold together at the most.
    #[serde(deserialize_with = "units::bytes")]
    #[schemars(example = 268_435_456)]
    pub max_bytes: u64,
}

/// `resources:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ResourcesSection {
    /// What rings, queues and outbox are sized by, MiB.
    pub max_memory_mb: u64,
    /// Thousandths of a core, the probes' time in the kernel included; 0 for no limit. Held by keeping less of the bulk lane.
    pub max_cpu_milli: u64,
}

impl Default for ResourcesSection {
    fn default() -> Self {
        Self { max_memory_mb: 100, max_cpu_milli: 10 }
    }
}

/// `pipeline:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PipelineSection {
    /// Whether `pipeline.filter_config` holds.
    pub enable_filtering: bool,
    pub filter_config: FilterSection,
}

impl Default for PipelineSection {
    fn default() -> Self {
        Self { enable_filtering: true, filter_config: FilterSection::default() }
    }
}

/// `pipeline.filter_config:`
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FilterSection {
    /// Bulk events below it are dropped and counted.
    pub min_severity: Severity,
}

/// `collectors:`
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SourcesSection {
    pub ebpf: EbpfSection,
    pub k8s: K8sSection,
    pub systemd: SystemdSection,
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
    /// Records of process starts and ends, signals and cgroup changes that one cgroup may cause in a second, on average; a quarter
    /// of them at once. The collector counts the rest without recording it, and a finding names the cgroup. So one workload cannot
    /// hide the deaths of another. OOM kills are always recorded. 0 means no limit.
    pub cgroup_records_per_second: u32,
    /// How often what the kernel sums up (histograms, counts) is fetched.
    #[serde(deserialize_with = "units::duration")]
    pub flush_interval: Duration,
    /// Histograms of waiting for a CPU, by cgroup, and an event for a long wait. Its hooks are among the kernel's hottest.
    pub enable_scheduler: bool,
    /// System calls that fail because something has run out or is broken. Its hook is every system call's end.
    pub enable_syscall_errors: bool,
    /// Who opens secrets, config maps and what is below `audited_paths`. Its hook is every system call's end.
    pub enable_file_audit: bool,
    /// How the paths begin whose opening is told, besides kubelet's volumes of secrets, config maps and projections.
    pub audited_paths: Vec<String>,
    /// What is told of the programs that processes start.
    pub exec_arguments: ExecArguments,
    /// Names of what is secret among arguments, besides the built-in ones; `*` stands for anything.
    #[schemars(example = ["*_pin", "licence"])]
    pub redact: Vec<String>,
    /// A wait for a CPU of at least this length is told.
    #[serde(deserialize_with = "units::duration")]
    pub run_queue_slow: Duration,
    /// A block I/O that took at least this long is told.
    #[serde(deserialize_with = "units::duration")]
    pub block_io_slow: Duration,
    /// A cgroup's stalls in memory reclaim are told when they add up to this.
    #[serde(deserialize_with = "units::duration")]
    pub reclaim_burst: Duration,
    /// A DNS lookup that took at least this long is told; a failed one always is.
    #[serde(deserialize_with = "units::duration")]
    pub dns_slow: Duration,
    /// When a DNS query counts as unanswered.
    #[serde(deserialize_with = "units::duration")]
    pub dns_timeout: Duration,
    /// Names of the errors that `enable_syscall_errors` counts; EAGAIN counts only where a process should have been made.
    pub syscall_errors: Vec<String>,
}

/// How much is told of the programs that processes start.
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
    /// What happens in `kube-system`, `kube-public` and `kube-node-lease` is not told; names are known all the same.
    pub exclude_system_namespaces: bool,
    /// Namespaces whose pods' bulk events the probes leave out; deaths and what Kubernetes says of them are told.
    #[schemars(example = ["batch", "ci"])]
    pub exclude_namespaces: Vec<String>,
    /// How long a pod may run without being ready, an init container may run, or a deleted pod may outlast its grace period, before
    /// a finding says so.
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
    pub units: Vec<String>,
    /// Patterns of units to leave out.
    #[schemars(example = ["apt-*", "session-*.scope"])]
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

/// `health:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HealthSection {
    /// Whether `/healthz`, `/readyz` and `/metrics` are served.
    pub enabled: bool,
    /// The address they are served on.
    pub address: std::net::IpAddr,
    /// The port they are served on.
    pub port: u16,
    /// Whether `/metrics` is among them.
    pub metrics_enabled: bool,
}

impl Default for HealthSection {
    fn default() -> Self {
        Self { enabled: true, address: [0, 0, 0, 0].into(), port: 8081, metrics_enabled: true }
    }
}

/// `logging:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoggingSection {
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: String,
    /// How log lines are written, to standard error.
    pub format: LogFormat,
}

impl Default for LoggingSection {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Json }
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

impl Config {
    /// Reads and validates a file; without one, the defaults.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        config_file::load(path, Self::validate)
    }

    /// Every key, as Markdown.
    pub fn reference() -> String {
        reference::markdown(&reference::keys::<Self>(), &LIVE)
    }

    /// Every key at its default and what it means, as YAML.
    pub fn commented_defaults() -> String {
        reference::yaml_of_defaults(&reference::keys::<Self>())
    }

    /// Whether a source runs: it is listed, and its section does not turn it off.
    pub fn runs(&self, source: &str) -> bool {
        let listed = self.collector.enabled_collectors.iter().any(|name| name == source);
        listed
            && match source {
                "ebpf" => self.collectors.ebpf.enabled,
                "k8s" => self.collectors.k8s.enabled,
                "systemd" => self.collectors.systemd.enabled,
                "shm" => self.collectors.shm.enabled,
                _ => false,
            }
    }

    /// The node's name: configured, else from the environment, else the host's.
    pub fn node_name(&self) -> String {
        self.collector
            .node_name
            .clone()
            .or_else(|| std::env::var("NODE_NAME").ok().filter(|name| !name.is_empty()))
            .unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), text).expect("written");
        Config::load(Some(file.path()))
    }

    #[test]
    fn the_deployment_guides_file_is_accepted() {
        let config = parse(
            "collector:\n  enabled_collectors: [\"ebpf\",\"k8s\",\"systemd\"]\n  sampling_rate: 1.0\n  \
             max_events_per_sec: 10000\n  buffer_size: 10000\ngrpc:\n  server_endpoints: [\"tapio-server:9090\"]\n  \
             tls_enabled: false\n  max_batch_size: 100\n  batch_timeout: 100ms\n  reconnect_enabled: true\n  \
             compression: lz4\nresources: {max_memory_mb: 100, max_cpu_milli: 10}\npipeline:\n  enable_filtering: true\n  \
             filter_config: {min_severity: low}\ncollectors:\n  ebpf: {enabled: true, enable_network: true, \
             enable_memory: true, enable_process: true}\n  k8s: {enabled: true, in_cluster: true, \
             exclude_system_namespaces: false}\n  systemd: {enabled: true, exclude_system: false}\nhealth: {enabled: true, \
             port: 8081, metrics_enabled: true}\nlogging: {level: info, format: json}\n",
        )
        .expect("accepted");
        assert_eq!(config.grpc.batch_timeout, Duration::from_millis(100));
        assert!(config.runs("ebpf") && !config.runs("shm"));
    }

    #[test]
    fn the_reference_tells_the_defaults_and_every_example_is_accepted() {
        let keys = reference::keys::<Config>();
        for key in &keys {
            assert!(!key.meaning.is_empty(), "{}: say in a doc comment what it means", key.path);
            let sample = key.example.as_ref().or(key.default.as_ref());
            assert!(sample.is_some_and(|sample| sample != "[]"), "{}: give it a #[schemars(example)]", key.path);
        }
        for live in LIVE {
            assert!(keys.iter().any(|key| key.path == live), "{live} is no key");
        }
        let defaults = parse(&Config::commented_defaults()).expect("accepted");
        assert_eq!(format!("{defaults:?}"), format!("{:?}", Config::default()));
        let text = reference::yaml_of_examples(&keys);
        parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_name_and_line() {
        let error = parse("collector:\n  sampling_rat: 1.0\n").unwrap_err().to_string();
        assert!(error.contains("sampling_rat") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_wrong_type_is_refused_with_its_key_and_line() {
        let error = parse("grpc:\n  max_batch_size: many\n").unwrap_err().to_string();
        assert!(error.contains("max_batch_size") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn impossible_values_are_refused_with_what_is_possible() {
        for (text, key) in [
            ("collector: {sampling_rate: 0}", "sampling_rate"),
            ("collector: {enabled_collectors: [ebfp]}", "enabled_collectors"),
            ("grpc: {server_endpoints: [nowhere]}", "server_endpoints"),
            ("grpc: {max_batch_size: 0}", "max_batch_size"),
            ("grpc: {spool: {dir: /tmp/spool, max_bytes: 1MiB}}", "grpc.spool"),
            ("grpc: {tls_enabled: true}", "grpc.tls.ca"),
            ("grpc: {tls: {ca: /ca.pem}}", "tls_enabled"),
            ("grpc: {tls_enabled: true, tls: {ca: /ca.pem, key: /key.pem}}", "grpc.tls"),
            ("grpc: {server_endpoints: [\"server:9090\"], token_file: /token}", "token_file"),
            (
                "grpc: {token_file: /token, token_without_tls: true, tls_enabled: true, tls: {ca: /ca.pem}}",
                "token_without_tls",
            ),
            ("logging: {level: loud}", "logging.level"),
            ("resources: {max_memory_mb: 1}", "max_memory_mb"),
            ("collectors: {ebpf: {flush_interval: 1ms}}", "flush_interval"),
            ("collectors: {ebpf: {audited_paths: [etc/secrets]}}", "audited_paths"),
            ("collectors: {ebpf: {exec_arguments: all}}", "exec_arguments"),
            ("collectors: {ebpf: {redact: [\"\"]}}", "redact"),
            ("collectors: {ebpf: {dns_timeout: 1ms}}", "dns_timeout"),
            ("collectors: {ebpf: {syscall_errors: [ENOTHING]}}", "syscall_errors"),
            ("collectors: {k8s: {exclude_namespaces: [\"\"]}}", "exclude_namespaces"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text}: {error}");
        }
    }
}
