//! What the types of a configuration cannot refuse.

use std::time::Duration;

use tapio_wire::program::tls::ClientFiles;

use super::{Config, ConfigError};
use crate::settings::config::SPOOL_BYTES_MIN;
use crate::settings::errnos::errno_names;
use crate::settings::server_name::ServerName;

/// Events in a frame at the most: with names and descriptions of the greatest length they still fit the wire's limits.
const BATCH_EVENTS_MAX: usize = 16_384;

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
        let rate = self.collector.sampling_rate;
        if !(rate > 0.0 && rate <= 1.0) {
            return invalid("collector.sampling_rate", format!("{rate} is not above 0 and up to 1"));
        }
        if !(1..=BATCH_EVENTS_MAX).contains(&self.grpc.max_batch_size) {
            return invalid(
                "grpc.max_batch_size",
                format!("{} is not between 1 and {BATCH_EVENTS_MAX}", self.grpc.max_batch_size),
            );
        }
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
        if self.grpc.resolve_interval < Duration::from_millis(100) {
            return invalid("grpc.resolve_interval", "less than 100ms would only load the name server".into());
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
        if self.grpc.batch_timeout > Duration::from_secs(10) {
            return invalid("grpc.batch_timeout", "more than 10s would make findings late".into());
        }
        if self.collectors.ebpf.flush_interval < Duration::from_millis(100) {
            return invalid("collectors.ebpf.flush_interval", "less than 100ms costs more than it tells".into());
        }
        if self.collectors.ebpf.dns_timeout < Duration::from_millis(100) {
            return invalid("collectors.ebpf.dns_timeout", "less than 100ms is no time for an answer".into());
        }
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
        if self.collectors.k8s.exclude_namespaces.iter().any(|name| name.is_empty() || name.len() > 63) {
            return invalid("collectors.k8s.exclude_namespaces", "a namespace's name has 1 to 63 characters".into());
        }
        if self.resources.max_memory_mb < 16 {
            return invalid(
                "resources.max_memory_mb",
                format!("{} is too little; the least is 16", self.resources.max_memory_mb),
            );
        }
        if self.collector.buffer_size == 0 {
            return invalid("collector.buffer_size", "0 leaves no room for an event".into());
        }
        if let Some(name) = &self.collector.node_name
            && (name.is_empty() || name.len() > tapio_wire::limits::NODE_NAME_BYTES_MAX)
        {
            return invalid("collector.node_name", "a node's name has 1 to 253 characters".into());
        }
        if self.logging.level.parse::<tracing::level_filters::LevelFilter>().is_err() {
            return invalid(
                "logging.level",
                format!("`{}` is none of error, warn, info, debug, trace, off", self.logging.level),
            );
        }
        Ok(())
    }
}
