//! What keys of a configuration demand of one another, and limits with a gap between "none" and the smallest value.

use tapio_wire::program::tls::ServerFiles;

use super::Config;
use crate::budget::MEMORY_MB_MIN;

/// The smallest limit of bytes a second.
const BYTES_PER_SEC_MIN: u64 = 64 << 10;

type Checked = Result<(), (&'static str, String)>;

impl Config {
    /// TLS has its files, and files have TLS.
    pub(super) fn tls_named(&self) -> Checked {
        let tls = &self.server.tls;
        if self.server.tls_enabled && (tls.cert.as_os_str().is_empty() || tls.key.as_os_str().is_empty()) {
            let problem = "name the files with the server's certificate chain (cert) and key (key)";
            return Err(("server.tls", problem.into()));
        }
        if !self.server.tls_enabled && *tls != ServerFiles::default() {
            return Err(("server.tls", "without server.tls_enabled: true it would have no effect".into()));
        }
        Ok(())
    }

    /// Limits leave room to work, and the two ports differ.
    pub(super) fn roomy(&self) -> Checked {
        for (key, limit) in [
            ("server.max_stream_bytes_per_sec", self.server.max_stream_bytes_per_sec),
            ("server.max_node_bytes_per_sec", self.server.max_node_bytes_per_sec),
        ] {
            if limit != 0 && limit < BYTES_PER_SEC_MIN {
                let problem = format!("{limit} would take minutes for one frame; 0 for none, or 64KiB and more");
                return Err((key, problem));
            }
        }
        let memory = self.resources.max_memory_mb;
        if memory != 0 && memory < MEMORY_MB_MIN {
            let problem = format!("{memory} is too little; 0 for no limit, or {MEMORY_MB_MIN} and more");
            return Err(("resources.max_memory_mb", problem));
        }
        if self.server.port != 0 && self.server.port == self.metrics.prometheus_port {
            return Err(("metrics.prometheus_port", format!("{} is server.port too", self.server.port)));
        }
        Ok(())
    }

    /// The archive's sizes fit one another.
    pub(super) fn archived(&self) -> Checked {
        let (segment, all, commit) = (self.archive.segment_bytes, self.archive.max_bytes, self.archive.commit_bytes);
        if !((8 << 20)..=(4 << 30)).contains(&segment) {
            return Err(("archive.segment_bytes", format!("{segment} is not from 8MiB to 4GiB")));
        }
        if all < 2 * segment {
            let problem = format!("{all} is less than two segments of {segment} bytes (archive.segment_bytes)");
            return Err(("archive.max_bytes", problem));
        }
        if !((64 << 10)..=(32 << 20)).contains(&commit) {
            return Err(("archive.commit_bytes", format!("{commit} is not from 64KiB to 32MiB")));
        }
        Ok(())
    }

    /// What is delivered is found.
    pub(super) fn delivered(&self) -> Checked {
        let delivers = self.deliver.webhook.is_some() || !self.deliver.chats.is_empty();
        if delivers && !self.correlation.enabled {
            return Err(("deliver", "without correlation.enabled nothing is found that could be sent".into()));
        }
        Ok(())
    }

    /// Servers that ask for TLS or a token can ask one another.
    pub(super) fn peered(&self) -> Checked {
        let (cluster, auth) = (&self.cluster, &self.server.auth);
        if cluster.token_without_tls && (self.server.tls_enabled || cluster.peer_tls.is_some()) {
            let problem = "servers with TLS pass tokens on by cluster.peer_tls";
            return Err(("cluster.token_without_tls", problem.into()));
        }
        if cluster.token_without_tls && (auth.token_review.is_none() || auth.token_file.is_some()) {
            return Err((
                "cluster.token_without_tls",
                "only tokens that Kubernetes reviews may travel in the clear, since they expire and admit to Tapio alone: set \
                 server.auth.token_review and no server.auth.token_file, or use server.tls_enabled and cluster.peer_tls"
                    .into(),
            ));
        }
        let token_wants_tls = auth.wants_token() && !cluster.token_without_tls;
        let is_guarded = self.server.tls_enabled || token_wants_tls;
        if cluster.is_on() && is_guarded && cluster.peer_tls.is_none() {
            return Err((
                "cluster.peer_tls",
                "servers that ask for TLS or a token ask one another the same: name at least ca, the CA of their certificates \
                 (reviewed tokens alone: or set cluster.token_without_tls: true, where nobody else reads the network)"
                    .into(),
            ));
        }
        Ok(())
    }
}
