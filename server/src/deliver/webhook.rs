//! Posts findings to a receiver as JSON, one request each.
//!
//! ```text
//! POST <path>   idempotency-key: <id>   {"id", "revision", "cluster", "server", "term", "finding": as in the API}
//! ```

use std::time::Duration;

use serde_json::json;
use tapio_wire::program::tls::TlsError;

use super::config::WebhookSection;
use super::receiver::Receiver;
use super::{Delivering, Delivery, Sink};
use crate::render::finding_value;

/// Why a sink cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SinkConfigError {
    #[error("{key}: {problem}")]
    Url { key: &'static str, problem: String },
    #[error("{key}: {source}")]
    Tls { key: &'static str, source: TlsError },
}

/// Posts to one address.
pub struct Webhook {
    receiver: Receiver,
    timeout: Duration,
    /// The cluster's name and this server's, for the receiver.
    cluster: String,
    server: String,
}

impl Webhook {
    /// Reads the TLS files; nobody is connected to.
    ///
    /// # Errors
    /// When the address or the TLS files cannot be used.
    pub fn new(section: &WebhookSection, cluster: &str, server: &str) -> Result<Self, SinkConfigError> {
        let url = |problem| SinkConfigError::Url { key: "deliver.webhook.url", problem };
        let tls = |source| SinkConfigError::Tls { key: "deliver.webhook.tls", source };
        let address = section.address().map_err(url)?;
        let receiver =
            Receiver::new("deliver.webhook", address, section.token_file.clone(), section.tls.clone()).map_err(tls)?;
        Ok(Self { receiver, timeout: section.timeout, cluster: cluster.into(), server: server.into() })
    }
}

impl Sink for Webhook {
    fn name(&self) -> &'static str {
        "webhook"
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn deliver<'a>(&'a self, delivery: &'a Delivery) -> Delivering<'a> {
        let body = json!({
            "id": delivery.id,
            "revision": delivery.revision,
            "cluster": self.cluster,
            "server": self.server,
            "term": delivery.term,
            "finding": finding_value(&delivery.finding),
        });
        let body = body.to_string();
        Box::pin(async move { self.receiver.post("", body, &[("idempotency-key", &delivery.id)]).await })
    }
}
