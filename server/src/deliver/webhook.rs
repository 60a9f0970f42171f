//! Posts findings to a receiver as JSON, one request each.
//!
//! ```text
//! POST <path>   idempotency-key: <id>   tapio-signature: t=<seconds>,v1=<hex>   {"id", "revision", "cluster", "server", "term", "finding": as in the API}
//! ```
//!
//! The signature is there where a key is configured: HMAC-SHA-256 of `<seconds>.<body>`, in the form that Stripe's webhooks made
//! common: <https://docs.stripe.com/webhooks#verify-manually>.

use std::time::Duration;

use ring::hmac;
use serde_json::json;
use tapio_wire::program::tls::TlsError;
use tapio_wire::service::Finding;

use super::config::WebhookSection;
use super::marks::now_seconds;
use super::receiver::Receiver;
use super::{Delivering, Delivery, Sink, SinkError};
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
    section: WebhookSection,
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
        Ok(Self { receiver, section: section.clone(), cluster: cluster.into(), server: server.into() })
    }

    /// The header that signs a request which is made now.
    fn signature(&self, body: &str, seconds: u64) -> Result<Option<String>, SinkError> {
        let Some(path) = &self.section.signing_key_file else { return Ok(None) };
        let away = |why: &dyn std::fmt::Display| SinkError::Away(format!("deliver.webhook.signing_key_file: {why}"));
        let key = std::fs::read_to_string(path).map_err(|error| away(&error))?;
        match key.trim() {
            "" => Err(away(&"the file is empty")),
            key => Ok(Some(signature(key, body, seconds))),
        }
    }
}

fn signature(key: &str, body: &str, seconds: u64) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes());
    let tag = hmac::sign(&key, format!("{seconds}.{body}").as_bytes());
    let hex: String = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("t={seconds},v1={hex}")
}

impl Sink for Webhook {
    fn name(&self) -> &str {
        "webhook"
    }

    fn timeout(&self) -> Duration {
        self.section.timeout
    }

    fn wants(&self, finding: &Finding) -> bool {
        self.section.only.names(finding)
    }

    fn takes_unknown_withdrawals(&self) -> bool {
        true
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
        Box::pin(async move {
            let signature = self.signature(&body, now_seconds())?;
            let mut headers = vec![("idempotency-key", delivery.id.as_str())];
            headers.extend(signature.as_deref().map(|signature| ("tapio-signature", signature)));
            self.receiver.post("", body, &headers).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed by `printf '1700000000.{}' | openssl dgst -sha256 -hmac key`.
    #[test]
    fn a_signature_is_what_others_compute() {
        let hex = "9d713ed406bb7076d4123f0dc2c39d2df5c654ed4b0cd56b52c8b4c940bd63ae";
        assert_eq!(signature("key", "{}", 1_700_000_000), format!("t=1700000000,v1={hex}"));
    }

    #[test]
    fn without_its_key_nothing_is_sent_unsigned() {
        let section = WebhookSection {
            url: "http://127.0.0.1:9/".into(),
            signing_key_file: Some("/nonexistent".into()),
            ..WebhookSection::default()
        };
        let webhook = Webhook::new(&section, "c", "s").expect("a good address");
        let refused = webhook.signature("{}", 1).expect_err("no key");
        assert!(refused.to_string().contains("deliver.webhook.signing_key_file"), "{refused}");
    }
}
