//! The server's configuration: `server.yaml` of the deployment guide, and Tapio's own keys.
//!
//! What enters: a YAML file and command line flags. What leaves: a [`Config`] that was validated as a whole. What must hold:
//! an unknown key, a wrong type or an impossible value never becomes a default.

mod bounds;
mod relations;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use tapio_wire::program::config_file::ConfigError;
use tapio_wire::program::tls::ServerFiles;
use tapio_wire::program::{config_file, reference, units};

use crate::archive::DiskChoice;
use crate::auth::AuthSection;
use crate::budget::ResourcesSection;
use crate::cluster::ClusterSection;
use crate::deliver::DeliverSection;
use crate::remote::RemoteSection;

/// Keys that take effect while the server runs. Files that keys name (TLS, token) are read again by themselves.
const LIVE: [&str; 0] = [];

/// Everything that can be configured.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub server: ServerSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub correlation: CorrelationSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub metrics: MetricsSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub resources: ResourcesSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub logging: LoggingSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub archive: ArchiveSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub cluster: ClusterSection,
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub deliver: DeliverSection,
}

/// `server:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServerSection {
    /// The address that gRPC and HTTP listen on.
    pub address: IpAddr,
    /// The gRPC port: collectors and `tapioctl`.
    pub port: u16,
    /// Whether gRPC is served over TLS; then `server.tls.cert` and `server.tls.key` are needed.
    #[schemars(example = true)]
    pub tls_enabled: bool,
    /// PEM files; they may change at any time.
    pub tls: ServerFiles,
    /// Who may connect, beyond what TLS says.
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub auth: AuthSection,
    /// Nodes that may have a stream open at a time; one that comes back is not counted twice.
    pub max_concurrent_streams: u32,
    /// Over all streams, held by reading later and by less credit; lethal frames do not wait. 0 for none.
    pub max_events_per_sec: u64,
    /// Events in a frame that collectors are asked for; larger frames are taken all the same.
    pub max_batch_size: usize,
    /// Limit of each stream in bytes of frames a second, as `max_events_per_sec`.
    #[serde(deserialize_with = "units::bytes")]
    pub max_stream_bytes_per_sec: u64,
    /// Limit of each node in bytes of frames a second, as `max_events_per_sec`.
    #[serde(deserialize_with = "units::bytes")]
    pub max_node_bytes_per_sec: u64,
    /// A collector's stream is asked to move on after this, give or take a tenth; 0s for never.
    #[serde(deserialize_with = "units::duration")]
    pub max_connection_age: Duration,
}

impl Default for ServerSection {
    fn default() -> Self {
        Self {
            address: [0, 0, 0, 0].into(),
            port: 9090,
            tls_enabled: false,
            tls: ServerFiles::default(),
            auth: AuthSection::default(),
            max_concurrent_streams: 1000,
            max_events_per_sec: 0,
            max_batch_size: tapio_wire::limits::FRAME_EVENTS_MAX,
            max_stream_bytes_per_sec: 0,
            max_node_bytes_per_sec: 0,
            max_connection_age: Duration::from_secs(3600),
        }
    }
}

/// `correlation:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CorrelationSection {
    /// Whether there are findings; without, the server only archives.
    pub enabled: bool,
    /// Clues that wait for the finder.
    pub buffer_size: usize,
    /// How far back a pattern looks, and how much of the archive is replayed at the start.
    #[serde(deserialize_with = "units::duration")]
    pub analysis_window: Duration,
    /// The longest chain of findings that explain one another.
    pub max_correlation_depth: u32,
    /// Threads that correlate; default: as many as `resources.max_cpu_milli` comes to.
    #[schemars(example = 4)]
    pub shards: Option<usize>,
    /// Entities whose state is kept, as far as `resources.max_memory_mb` has room for them.
    pub max_entities: usize,
    /// A directory with patterns of the operator's, beside the built-in ones.
    #[schemars(example = "/etc/tapio/patterns")]
    pub patterns: Option<PathBuf>,
}

impl Default for CorrelationSection {
    fn default() -> Self {
        Self {
            enabled: true,
            buffer_size: 100_000,
            analysis_window: Duration::from_secs(300),
            max_correlation_depth: 10,
            shards: None,
            max_entities: 1_000_000,
            patterns: None,
        }
    }
}

/// `metrics:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsSection {
    /// Whether `/metrics` is served.
    pub prometheus_enabled: bool,
    /// The port of the HTTP side: `/healthz`, `/readyz`, `/metrics`, and the API.
    pub prometheus_port: u16,
    /// Whether `/api/v1` and the page are served in the clear too; default: only where neither TLS nor a token guards gRPC.
    /// Over TLS they are served unless it is false.
    #[schemars(example = true)]
    pub api: Option<bool>,
}

impl Default for MetricsSection {
    fn default() -> Self {
        Self { prometheus_enabled: true, prometheus_port: 9091, api: None }
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
    /// Who asked what of this server: lines of target `audit`, whatever the level.
    pub audit: bool,
}

impl Default for LoggingSection {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Json, audit: true }
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

/// `archive:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ArchiveSection {
    /// The directory of segments and of the journal of findings. One server at a time may have it.
    pub dir: PathBuf,
    /// What the segments hold together at the most; the oldest are deleted.
    #[serde(deserialize_with = "units::bytes")]
    pub max_bytes: u64,
    /// How long a segment is kept after it was closed; time counts while a server runs on it or the machine stays up.
    #[serde(deserialize_with = "units::duration")]
    pub max_age: Duration,
    /// The longest that a frame waits for others before it is synced. Findings do not wait for it.
    #[serde(deserialize_with = "units::duration")]
    pub commit_interval: Duration,
    /// What one commit writes at most, and one frame more.
    #[serde(deserialize_with = "units::bytes")]
    pub commit_bytes: u64,
    /// How the disk is reached.
    pub disk: DiskChoice,
    /// The size of a segment, which is reserved when it is begun.
    #[serde(deserialize_with = "units::bytes")]
    pub segment_bytes: u64,
    /// Where closed segments are uploaded too; default: nowhere. Retention then waits for that, up to `max_bytes`.
    #[serde(deserialize_with = "tapio_wire::program::yaml::named")]
    pub remote: Option<RemoteSection>,
}

impl Default for ArchiveSection {
    fn default() -> Self {
        Self {
            dir: "/var/lib/tapio".into(),
            max_bytes: 1 << 30,
            max_age: Duration::from_secs(24 * 3600),
            commit_interval: Duration::from_millis(5),
            commit_bytes: crate::archive::COMMIT_BYTES_DEFAULT as u64,
            disk: DiskChoice::Auto,
            segment_bytes: 64 << 20,
            remote: None,
        }
    }
}

impl Config {
    /// Reads and validates a file; without one, the defaults.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        config_file::load(path, Self::validate)
    }

    /// Checks values that the types cannot.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with the key and what it may be.
    pub fn validate(&self, path: &str) -> Result<(), ConfigError> {
        self.valid().map_err(|(key, problem)| ConfigError::Invalid { path: path.into(), key, problem })
    }

    fn valid(&self) -> Result<(), (&'static str, String)> {
        self.tls_named()?;
        self.server.auth.validate(self.server.tls.client_ca.is_some())?;
        self.bounded()?;
        self.pointed()?;
        self.roomy()?;
        self.archived()?;
        if let Some(remote) = &self.archive.remote {
            remote.validate(&self.cluster.server_name())?;
        }
        self.cluster.validate()?;
        self.deliver.validate()?;
        self.delivered()?;
        self.peered()?;
        config_file::known_log_level(&self.logging.level)
    }

    /// Every key, as Markdown.
    pub fn reference() -> String {
        reference::markdown(&reference::keys::<Self>(), &LIVE)
    }

    /// Every key at its default and what it means, as YAML.
    pub fn commented_defaults() -> String {
        reference::yaml_of_defaults(&reference::keys::<Self>())
    }

    /// Where gRPC listens.
    pub fn grpc_address(&self) -> SocketAddr {
        SocketAddr::new(self.server.address, self.server.port)
    }

    /// Whether findings and events are served over HTTP in the clear, to programs and as a page.
    pub fn serves_api(&self) -> bool {
        self.metrics.api.unwrap_or(!self.server.tls_enabled && !self.server.auth.wants_token())
    }

    /// Whether they are served to those who come over TLS.
    pub fn serves_api_over_tls(&self) -> bool {
        self.server.tls_enabled && self.metrics.api.unwrap_or(true)
    }

    /// Where HTTP listens.
    pub fn http_address(&self) -> SocketAddr {
        SocketAddr::new(self.server.address, self.metrics.prometheus_port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn parse(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), text).expect("written");
        Config::load(Some(file.path()))
    }

    #[test]
    fn the_deployment_guides_file_is_accepted() {
        let config = parse(
            "server:\n  address: 0.0.0.0\n  port: 9090\n  tls_enabled: false\n  max_concurrent_streams: 1000\n  \
             max_events_per_sec: 165000\n  max_batch_size: 1000\ncorrelation:\n  enabled: true\n  buffer_size: 100000\n  \
             analysis_window: 5m\n  max_correlation_depth: 10\nmetrics: {prometheus_enabled: true, prometheus_port: 9091}\n\
             resources: {max_memory_mb: 500, max_cpu_milli: 500}\nlogging: {level: info, format: json}\narchive: {dir: \
             /var/lib/tapio, max_bytes: 1GiB, max_age: 24h, commit_interval: 5ms, disk: auto}\n",
        )
        .expect("accepted");
        assert_eq!(config.archive.max_bytes, 1 << 30);
    }

    #[test]
    fn the_reference_states_the_defaults_and_every_example_is_accepted() {
        let keys = reference::keys::<Config>();
        for key in &keys {
            assert!(!key.meaning.is_empty(), "{}: say in a doc comment what it means", key.path);
            let sample = key.example.as_ref().or(key.default.as_ref());
            assert!(sample.is_some_and(|sample| sample != "[]"), "{}: give it a #[schemars(example)]", key.path);
        }
        let defaults = parse(&Config::commented_defaults()).expect("accepted");
        assert_eq!(format!("{defaults:?}"), format!("{:?}", Config::default()));
        let text = reference::yaml_of_examples(&keys);
        parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    }

    #[test]
    fn unknown_keys_and_wrong_types_are_refused_with_their_line() {
        let error = parse("archive:\n  dri: /tmp\n").unwrap_err().to_string();
        assert!(error.contains("dri") && error.contains("line 2"), "{error}");
        let error = parse("server:\n  port: high\n").unwrap_err().to_string();
        assert!(error.contains("port") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_guarded_port_forbids_findings_over_plain_http_unless_allowed() {
        for (text, serves) in [
            ("", true),
            ("metrics: {api: false}", false),
            ("server: {auth: {token_file: /token}}", false),
            ("server: {auth: {token_file: /token}}\nmetrics: {api: true}", true),
            ("server: {tls_enabled: true, tls: {cert: /cert.pem, key: /key.pem}}", false),
            ("server: {auth: {token_review: {}}}", false),
            ("server: {auth: {token_review: }}", false),
            ("server: {auth: {token_review: {}}}\ncluster: {token_without_tls: true}", false),
        ] {
            assert_eq!(parse(text).expect("accepted").serves_api(), serves, "{text}");
        }
        let tls = "server: {tls_enabled: true, tls: {cert: /cert.pem, key: /key.pem}}";
        for (text, serves) in [("", false), (tls, true), (&format!("{tls}\nmetrics: {{api: false}}"), false)] {
            assert_eq!(parse(text).expect("accepted").serves_api_over_tls(), serves, "{text}");
        }
    }

    #[test]
    fn impossible_values_are_refused_with_what_is_possible() {
        for (text, key) in [
            ("server: {port: 9091}", "prometheus_port"),
            ("archive: {max_bytes: 1MiB}", "max_bytes"),
            ("archive: {segment_bytes: 1}", "segment_bytes"),
            ("server: {tls_enabled: true}", "server.tls"),
            ("server: {tls: {cert: /cert.pem}}", "tls_enabled"),
            ("server: {auth: {token_review: {may_ship: [collector]}}}", "namespace/name"),
            ("server: {auth: {token_review: {may_ship: []}}}", "nobody would be let in"),
            ("server: {auth: {token_review: {audience: ''}}}", "audience"),
            ("server: {auth: {token_review: {ttl: 2h}}}", "ttl"),
            ("server: {auth: {node_identity: certificate}}", "client_ca"),
            ("server: {max_node_bytes_per_sec: 1}", "max_node_bytes_per_sec"),
            (
                "server: {max_connection_age: 1ms}",
                "server.max_connection_age: 1ms is not from 1s to 365d, or 0s for none",
            ),
            ("server: {max_stream_bytes_per_sec: 18446744073709551615}", "max_stream_bytes_per_sec"),
            ("cluster: {url: 'nats://nats:4222', server: ''}", "cluster.server"),
            ("resources: {max_memory_mb: 10}", "max_memory_mb"),
            ("server: {auth: {node_identity: token}}", "token_review"),
            ("correlation: {analysis_window: 1ms}", "analysis_window"),
            ("archive: {max_age: 0s}", "max_age"),
            ("archive: {commit_interval: 1m}", "commit_interval"),
            ("archive: {commit_bytes: 1}", "commit_bytes"),
            ("archive: {remote: {url: 'ftp://a'}}", "archive.remote.url"),
            ("logging: {level: loud}", "logging.level"),
            ("cluster: {name: 'a b'}", "cluster.name"),
            ("cluster: {url: 'not an address'}", "cluster.url"),
            ("cluster: {url: 'nats://nats:4222', server: 'a.b'}", "cluster.server"),
            ("cluster: {url: 'nats://nats:4222', user: tapio}", "cluster.password_file"),
            ("cluster: {url: 'nats://nats:4222', server: a, replicas: 2}", "cluster.replicas"),
            ("cluster: {url: 'nats://n:4222', server: a}\nserver: {auth: {token_file: /token}}", "cluster.peer_tls"),
            ("cluster: {url: 'nats://nats:4222', server: a, max_bytes: 1MiB}", "cluster.max_bytes"),
            ("cluster: {token_without_tls: true, peer_tls: {ca: /ca.pem}}", "cluster.token_without_tls"),
            ("cluster: {token_without_tls: true}", "server.auth.token_review"),
            ("cluster: {token_without_tls: true}\nserver: {auth: {token_file: /token}}", "server.auth.token_review"),
            (
                "cluster: {token_without_tls: true}\nserver: {auth: {token_file: /token, token_review: {}}}",
                "no server.auth.token_file",
            ),
            ("deliver: {webhook: {url: 'http://a/b'}}\ncorrelation: {enabled: false}", "correlation.enabled"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text}: {error}");
        }
    }
}
