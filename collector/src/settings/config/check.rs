//! What the types of a configuration cannot refuse.

use std::time::Duration;

use tapio_wire::limits::is_node_name;
use tapio_wire::program::config_file::{Times, known_log_level, numbers_within, times_within};
use tapio_wire::program::tls::ClientFiles;

use super::{Config, ConfigError};
use crate::settings::config::SPOOL_BYTES_MIN;
use crate::settings::errnos::errno_names;
use crate::settings::server_name::ServerName;

/// Events in a frame at the most: with names and descriptions of the greatest length they still fit the wire's limits.
const BATCH_EVENTS_MAX: u64 = 16_384;
/// Lines of a dead container that one event has room for.
const LOG_LINES_MAX: u64 = 50;

const HOUR_S: u64 = 3600;

const SOURCE_NAMES: [&str; 4] = ["ebpf", "k8s", "systemd", "shm"];

impl Config {
    /// Checks values that the types cannot.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with the key and what it may be.
    pub fn validate(&self, path: &str) -> Result<(), ConfigError> {
        let invalid = |key, problem: String| Err(ConfigError::Invalid { path: path.into(), key, problem });
        for name in &self.collector.enabled_collectors {
            if !SOURCE_NAMES.contains(&name.as_str()) {
                return invalid(
                    "collector.enabled_collectors",
                    format!("there is no source `{name}`; there are {}", SOURCE_NAMES.join(", ")),
                );
            }
        }
        if !SOURCE_NAMES.iter().any(|source| self.runs(source)) {
            return invalid(
                "collector.enabled_collectors",
                format!(
                    "nothing would be watched: list some of {} that `collectors` leaves on",
                    SOURCE_NAMES.join(", ")
                ),
            );
        }
        if self.collector.log_dir.as_os_str().is_empty() {
            return invalid("collector.log_dir", "it is empty: name a directory, or leave it out".into());
        }
        let rate = self.collector.sampling_rate;
        if !(rate > 0.0 && rate <= 1.0) {
            return invalid("collector.sampling_rate", format!("{rate} is not above 0 and up to 1"));
        }
        if let Err((key, problem)) = self.bounded().and_then(|()| self.connection()).and_then(|()| self.probes()) {
            return invalid(key, problem);
        }
        if self.collectors.k8s.exclude_namespaces.iter().any(|name| name.is_empty() || name.len() > 63) {
            return invalid("collectors.k8s.exclude_namespaces", "a namespace's name has 1 to 63 characters".into());
        }
        // As the servers check it, wherever the name is from.
        if !is_node_name(&self.node_name()) {
            return invalid(
                "collector.node_name",
                "a node's name has 1 to 253 bytes, none of them a control character (unset: NODE_NAME of the environment, or the \
                 host's name)"
                    .into(),
            );
        }
        match known_log_level(&self.logging.level) {
            Err((key, problem)) => invalid(key, problem),
            Ok(()) => Ok(()),
        }
    }

    /// Servers, TLS, the token, the spool.
    fn connection(&self) -> Result<(), (&'static str, String)> {
        let invalid = |key, problem| Err((key, problem));
        if self.grpc.tls_enabled && self.grpc.tls.ca.as_os_str().is_empty() {
            return invalid(
                "grpc.tls.ca",
                "name the file with the certificates of the CA that signs the servers'".into(),
            );
        }
        if self.grpc.tls.cert.is_some() != self.grpc.tls.key.is_some() {
            return invalid("grpc.tls", "cert and key are given together or not at all".into());
        }
        if !self.grpc.tls_enabled && self.grpc.tls != ClientFiles::default() {
            return invalid("grpc.tls", "without grpc.tls_enabled: true it would have no effect".into());
        }
        if let Some(spool) = &self.grpc.spool
            && (spool.max_bytes < SPOOL_BYTES_MIN || spool.dir.as_os_str().is_empty())
        {
            return invalid("grpc.spool", format!("name a dir, and max_bytes of at least {SPOOL_BYTES_MIN}"));
        }
        if self.grpc.server_endpoints.is_empty() {
            return invalid("grpc.server_endpoints", "name at least one server, like tapio-server:9090".into());
        }
        if self.grpc.token_without_tls && self.grpc.tls_enabled {
            return invalid("grpc.token_without_tls", "with grpc.tls_enabled: true it would have no effect".into());
        }
        let needs_tls = self.grpc.token_file.is_some() && !self.grpc.tls_enabled && !self.grpc.token_without_tls;
        for endpoint in &self.grpc.server_endpoints {
            match endpoint.parse::<ServerName>() {
                Err(problem) => return invalid("grpc.server_endpoints", problem),
                Ok(name) if needs_tls && !name.is_loopback() => {
                    return invalid(
                        "grpc.token_file",
                        format!(
                            "a token is not sent to {} in the clear; set grpc.tls_enabled: true, or grpc.token_without_tls: true \
                             where nobody else reads the network",
                            name.host
                        ),
                    );
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// Lists of the kernel's source.
    fn probes(&self) -> Result<(), (&'static str, String)> {
        let invalid = |key, problem| Err((key, problem));
        if let Some(name) =
            self.collectors.ebpf.syscall_errors.iter().find(|name| errno_names().all(|known| known != name.as_str()))
        {
            let known = errno_names().collect::<Vec<_>>().join(", ");
            return invalid("collectors.ebpf.syscall_errors", format!("`{name}` is none of {known}"));
        }
        let (paths, bytes) = (tapio_probes::AUDITED_PATHS_MAX, tapio_probes::AUDITED_PATH_BYTES_MAX);
        let audited = &self.collectors.ebpf.audited_paths;
        if audited.len() > paths || audited.iter().any(|path| !path.starts_with('/') || path.len() > bytes) {
            return invalid(
                "collectors.ebpf.audited_paths",
                format!("there may be {paths} of them, which begin with / and have at most {bytes} bytes"),
            );
        }
        if self.collectors.ebpf.redact.iter().any(|name| name.trim().is_empty()) {
            return invalid("collectors.ebpf.redact", "an empty name says nothing; `*` redacts every value".into());
        }
        Ok(())
    }

    /// Numbers and times: what they size is allocated, and what they pace is done again and again.
    fn bounded(&self) -> Result<(), (&'static str, String)> {
        let (collector, ebpf, shm) = (&self.collector, &self.collectors.ebpf, &self.collectors.shm);
        numbers_within(&[
            ("collector.max_events_per_sec", collector.max_events_per_sec, 0..=1_000_000_000),
            ("collector.buffer_size", collector.buffer_size as u64, 1..=1_000_000),
            ("collector.log_lines", collector.log_lines as u64, 0..=LOG_LINES_MAX),
            ("grpc.max_batch_size", self.grpc.max_batch_size as u64, 1..=BATCH_EVENTS_MAX),
            ("resources.max_memory_mb", self.resources.max_memory_mb, 16..=1 << 20),
            ("resources.max_cpu_milli", self.resources.max_cpu_milli, 0..=1_024_000),
            ("collectors.ebpf.cgroup_records_per_second", ebpf.cgroup_records_per_second.into(), 0..=1_000_000),
            ("collectors.shm.max_peers", shm.max_peers as u64, 1..=1024),
            ("collectors.shm.max_ring_bytes", shm.max_ring_bytes, 4 << 10..=1 << 30),
        ])?;
        let times = |least_us, most_s, may_be_off| {
            let (least, most) = (Duration::from_micros(least_us), Duration::from_secs(most_s));
            Times { least, most, may_be_off }
        };
        times_within(&[
            ("collector.conntrack_interval", collector.conntrack_interval, times(100_000, HOUR_S, true)),
            ("collector.watch_interval", collector.watch_interval, times(1_000_000, HOUR_S, true)),
            // Less would only load the name server.
            ("grpc.resolve_interval", self.grpc.resolve_interval, times(100_000, 24 * HOUR_S, false)),
            // More would make findings late.
            ("grpc.batch_timeout", self.grpc.batch_timeout, times(1000, 10, false)),
            ("collectors.ebpf.linger", ebpf.linger, times(100, 1, false)),
            ("collectors.ebpf.flush_interval", ebpf.flush_interval, times(100_000, HOUR_S, false)),
            ("collectors.ebpf.dns_timeout", ebpf.dns_timeout, times(100_000, 300, false)),
            ("collectors.k8s.stuck_after", self.collectors.k8s.stuck_after, times(1_000_000, 720 * HOUR_S, false)),
        ])
    }
}
