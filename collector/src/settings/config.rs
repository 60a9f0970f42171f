//! The collector's configuration: `collector.yaml` of the deployment guide, and Tapio's own keys.
//!
//! What enters: a YAML file and command line flags. What leaves: a [`Config`] that was validated as a whole. What must hold:
//! an unknown key, a wrong type or an impossible value never becomes a default.

mod check;
mod sources;

use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tapio_wire::compress::Compression;
pub use tapio_wire::program::config_file::ConfigError;
use tapio_wire::program::tls::ClientFiles;
use tapio_wire::program::{config_file, reference, units};

use crate::settings::severity::Severity;

pub use self::sources::{
    EbpfSection, ExecArguments, K8sSection, SYSTEM_NAMESPACES, ShmSection, SourcesSection, SystemdSection,
};

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
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub collector: CollectorSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub grpc: GrpcSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub resources: ResourcesSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub pipeline: PipelineSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub collectors: SourcesSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub health: HealthSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub logging: LoggingSection,
}

/// `collector:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CollectorSection {
    /// Sources to run: `ebpf`, `k8s`, `systemd`, `shm`.
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
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
    /// Whether a sender's arguments are reported too; they may be secrets.
    pub evidence_arguments: bool,
    /// How often the fill of the kernel's table of connections is looked at; 0 for never.
    #[serde(deserialize_with = "units::duration")]
    pub conntrack_interval: Duration,
    /// How often each living container is sampled for curves and troubles, where `evidence` is on; 0 for never. Troubles begin
    /// and end after six samples; curves reach 180 samples back.
    #[serde(deserialize_with = "units::duration")]
    pub watch_interval: Duration,
    /// Number of last lines read of a container that did not end with code 0, at most 50; 0 for none. Recognised secrets are
    /// removed, as from arguments.
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
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
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
    /// Whether the token may travel in the clear, where TLS is off; whoever reads it can use it until it expires. By default it
    /// does so to this machine only.
    pub token_without_tls: bool,
    /// Events in a frame.
    pub max_batch_size: usize,
    /// The longest that an event waits for others of its frame; a frame with a few hundred leaves sooner. OOM kills, signals and
    /// deaths do not wait.
    #[serde(deserialize_with = "units::duration")]
    pub batch_timeout: Duration,
    /// Whether a stream that broke is opened again.
    pub reconnect_enabled: bool,
    /// Where frames go that memory has no room for; without it they wait in the rings.
    #[serde(deserialize_with = "tapio_wire::program::yaml::named")]
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
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
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
    /// Text for people.
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
    fn the_reference_shows_the_defaults_and_examples_are_accepted() {
        reference::verify(&LIVE, parse).unwrap_or_else(|problem| panic!("{problem}"));
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
            ("collector: {enabled_collectors: []}", "collector.enabled_collectors: nothing would be watched"),
            ("collector:\n  enabled_collectors:\n", "nothing would be watched"),
            (
                "collector: {enabled_collectors: [ebpf]}\ncollectors: {ebpf: {enabled: false}}",
                "nothing would be watched",
            ),
            ("grpc:\n  spool:\n", "grpc.spool: it has no keys"),
            ("grpc: {server_endpoints: [\"server:0\"]}", "server_endpoints"),
            ("collector: {log_dir: 5}", "`5` is no text"),
            ("collector: {log_dir: ''}", "collector.log_dir"),
            ("grpc: {server_endpoints: [nowhere]}", "server_endpoints"),
            ("grpc: {max_batch_size: 0}", "max_batch_size"),
            ("collector: {node_name: \"a\\nb\"}", "collector.node_name"),
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

    /// The last value that is accepted, and the next one, which is not.
    #[test]
    fn what_sizes_or_paces_something_is_bounded_on_both_sides() {
        for (section, key, accepted, refused) in [
            ("collector", "max_events_per_sec", ["0", "1000000000"], ["-1", "1000000001"]),
            ("collector", "buffer_size", ["1", "1000000"], ["0", "18446744073709551615"]),
            ("collector", "log_lines", ["0", "50"], ["-1", "51"]),
            ("collector", "conntrack_interval", ["100ms", "1h"], ["99ms", "61m"]),
            ("collector", "watch_interval", ["1s", "1h"], ["999ms", "61m"]),
            ("grpc", "max_batch_size", ["1", "16384"], ["0", "16385"]),
            ("grpc", "batch_timeout", ["1ms", "10s"], ["0s", "10001ms"]),
            ("grpc", "resolve_interval", ["100ms", "24h"], ["99ms", "25h"]),
            ("resources", "max_memory_mb", ["16", "1048576"], ["15", "1048577"]),
            ("resources", "max_cpu_milli", ["0", "1024000"], ["-1", "1024001"]),
            ("collectors.ebpf", "cgroup_records_per_second", ["0", "1000000"], ["-1", "1000001"]),
            ("collectors.ebpf", "linger", ["100us", "1s"], ["99us", "1001ms"]),
            ("collectors.ebpf", "flush_interval", ["100ms", "1h"], ["99ms", "61m"]),
            ("collectors.ebpf", "dns_timeout", ["100ms", "5m"], ["99ms", "301s"]),
            ("collectors.k8s", "stuck_after", ["1s", "720h"], ["999ms", "721h"]),
            ("collectors.shm", "max_peers", ["1", "1024"], ["0", "1025"]),
            ("collectors.shm", "max_ring_bytes", ["4KiB", "1GiB"], ["1", "1073741825"]),
        ] {
            let of = |value: &str| {
                let mut names: Vec<&str> = section.split('.').collect();
                names.push(key);
                let lines = names.iter().enumerate().map(|(depth, name)| format!("\n{}{name}:", "  ".repeat(depth)));
                parse(&format!("# a file{} {value}\n", lines.collect::<String>()))
            };
            let line = format!("line {}", section.split('.').count() + 2);
            for value in accepted {
                of(value).unwrap_or_else(|error| panic!("{error}"));
            }
            for value in refused {
                let error = of(value).expect_err(value).to_string();
                assert!(error.contains(&format!("{section}.{key}: ")) && error.contains(&line), "{error}");
            }
        }
    }
}
