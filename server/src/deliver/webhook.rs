//! Posts findings to a receiver as JSON, one request each. Its answer says what becomes of the delivery.
//!
//! ```text
//! POST <path>   idempotency-key: <id>   {"id", "revision", "cluster", "server", "term", "finding": as in the API}
//! 2xx           the receiver has it
//! 400 413 415 422   it refuses this delivery
//! all else      it is away: the same comes again
//! ```

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::json;
use tapio_wire::program::tls::{ClientFiles, TlsError, Watched};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::config::{Address, WebhookSection};
use super::{Delivering, Delivery, Sink, SinkError};
use crate::render::finding_value;

/// Why a webhook cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    #[error("deliver.webhook.url: {0}")]
    Url(String),
    #[error("deliver.webhook.tls: {0}")]
    Tls(#[from] TlsError),
}

/// Posts to one address.
pub struct Webhook {
    section: WebhookSection,
    address: Address,
    tls: Option<Watched<ClientFiles>>,
    /// The cluster's name and this server's, for the receiver.
    cluster: String,
    server: String,
}

impl Webhook {
    /// Reads the TLS files; nobody is connected to.
    ///
    /// # Errors
    /// When the address or the TLS files cannot be used.
    pub fn new(section: &WebhookSection, cluster: &str, server: &str) -> Result<Self, WebhookError> {
        let address = section.address().map_err(WebhookError::Url)?;
        let tls = section.tls.clone().map(Watched::load).transpose()?;
        Ok(Self { section: section.clone(), address, tls, cluster: cluster.into(), server: server.into() })
    }

    fn request(&self, delivery: &Delivery) -> Result<Request<String>, SinkError> {
        let body = json!({
            "id": delivery.id,
            "revision": delivery.revision,
            "cluster": self.cluster,
            "server": self.server,
            "term": delivery.term,
            "finding": finding_value(&delivery.finding),
        });
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(&self.address.path)
            .header(header::HOST, &self.address.authority)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::CONNECTION, "close")
            .header(header::USER_AGENT, concat!("tapio-server/", env!("CARGO_PKG_VERSION")))
            .header("idempotency-key", &delivery.id);
        if let Some(path) = &self.section.token_file {
            let token = std::fs::read_to_string(path);
            let token = token.map_err(|error| away(format_args!("deliver.webhook.token_file: {error}")))?;
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.trim()));
        }
        request.body(body.to_string()).map_err(away)
    }

    async fn post(&self, delivery: &Delivery) -> Result<(), SinkError> {
        let request = self.request(delivery)?;
        let stream = TcpStream::connect((self.address.host.as_str(), self.address.port)).await.map_err(away)?;
        stream.set_nodelay(true).map_err(away)?;
        let status = match &self.tls {
            Some(tls) => {
                let name = tls.files().server_name.clone().unwrap_or_else(|| self.address.host.clone());
                let name = ServerName::try_from(name).map_err(away)?;
                let mut config = (*tls.current()).clone();
                config.alpn_protocols = vec![b"http/1.1".to_vec()];
                let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
                let tls_failed = |error: io::Error| away(format_args!("TLS: {error}; see deliver.webhook.tls"));
                exchange(stream.map_err(tls_failed)?, request).await?
            }
            None => exchange(stream, request).await?,
        };
        match status {
            _ if status.is_success() => Ok(()),
            StatusCode::BAD_REQUEST
            | StatusCode::PAYLOAD_TOO_LARGE
            | StatusCode::UNSUPPORTED_MEDIA_TYPE
            | StatusCode::UNPROCESSABLE_ENTITY => Err(SinkError::Refused(format!("HTTP {status}"))),
            _ if status.is_redirection() => Err(away(format_args!("HTTP {status}: redirects are not followed"))),
            _ => Err(away(format_args!("HTTP {status}"))),
        }
    }
}

fn away(error: impl std::fmt::Display) -> SinkError {
    SinkError::Away(error.to_string())
}

/// Sends one request and reads the answer's head.
async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<String>,
) -> Result<StatusCode, SinkError> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(away)?;
    let answered = async {
        let answer = sender.send_request(request).await.map_err(away)?;
        Ok(answer.status())
    };
    // The connection ends with this: nothing runs on.
    let (mut answered, mut connection) = (Box::pin(answered), Box::pin(connection));
    tokio::select! {
        biased;
        answer = &mut answered => answer,
        // It has brought the answer, or there is none.
        _ = &mut connection => {
            drop(connection);
            answered.await
        }
    }
}

impl Sink for Webhook {
    fn name(&self) -> &'static str {
        "webhook"
    }

    fn timeout(&self) -> Duration {
        self.section.timeout
    }

    fn deliver<'a>(&'a self, delivery: &'a Delivery) -> Delivering<'a> {
        Box::pin(self.post(delivery))
    }
}
