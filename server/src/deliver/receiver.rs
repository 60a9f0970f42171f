//! Posts to an HTTP receiver, one request a connection. Its answer says what becomes of the delivery.
//!
//! ```text
//! 2xx               the receiver has it
//! 400 413 415 422   it refuses this delivery
//! all else          it is away: the same comes again
//! ```

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tapio_wire::program::tls::{ClientFiles, TlsError, Watched};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::SinkError;
use super::config::Address;
use crate::remote::{machine_roots, trusting};

/// How to post, and as whom.
pub(super) struct Client {
    /// The section of the configuration, for messages.
    section: &'static str,
    token_file: Option<PathBuf>,
    /// Without files the machine's CAs are trusted, which are read when they are needed first.
    tls: Option<Watched<ClientFiles>>,
    machine_tls: OnceLock<Arc<ClientConfig>>,
}

/// Where to post, and how.
pub(super) struct Receiver {
    address: Address,
    client: Client,
}

impl Receiver {
    /// Reads the TLS files; nobody is connected to.
    pub fn new(
        section: &'static str,
        address: Address,
        token_file: Option<PathBuf>,
        tls: Option<ClientFiles>,
    ) -> Result<Self, TlsError> {
        Ok(Self { address, client: Client::new(section, token_file, tls)? })
    }

    /// Posts JSON to the address, or to a path below it.
    pub async fn post(&self, below: &str, body: String, headers: &[(&str, &str)]) -> Result<(), SinkError> {
        let path = match below {
            "" => self.address.path.clone(),
            below => format!("{}{below}", self.address.path.trim_end_matches('/')),
        };
        self.client.post(&self.address, &path, body, headers).await
    }
}

impl Client {
    /// Reads the TLS files; nobody is connected to.
    pub fn new(section: &'static str, token_file: Option<PathBuf>, tls: Option<ClientFiles>) -> Result<Self, TlsError> {
        let tls = tls.map(Watched::load).transpose()?;
        Ok(Self { section, token_file, tls, machine_tls: OnceLock::new() })
    }

    fn request(
        &self,
        address: &Address,
        path: &str,
        body: String,
        headers: &[(&str, &str)],
    ) -> Result<Request<String>, SinkError> {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(header::HOST, &address.authority)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::CONNECTION, "close")
            .header(header::USER_AGENT, concat!("tapio-server/", env!("CARGO_PKG_VERSION")));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(path) = &self.token_file {
            let token = std::fs::read_to_string(path);
            let token = token.map_err(|error| away(format_args!("{}.token_file: {error}", self.section)))?;
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.trim()));
        }
        request.body(body).map_err(away)
    }

    fn tls(&self) -> Result<Arc<ClientConfig>, SinkError> {
        match &self.tls {
            Some(files) => {
                let mut config = (*files.current()).clone();
                config.alpn_protocols = vec![b"http/1.1".to_vec()];
                Ok(Arc::new(config))
            }
            None => match self.machine_tls.get() {
                Some(config) => Ok(Arc::clone(config)),
                None => {
                    let config = Arc::new(machine_tls().map_err(|error| self.tls_failed(&error))?);
                    Ok(Arc::clone(self.machine_tls.get_or_init(|| config)))
                }
            },
        }
    }

    fn tls_failed(&self, error: &dyn std::fmt::Display) -> SinkError {
        away(format_args!("TLS: {error}; see {}.tls", self.section))
    }

    /// Posts JSON to a path of an address.
    pub async fn post(
        &self,
        address: &Address,
        path: &str,
        body: String,
        headers: &[(&str, &str)],
    ) -> Result<(), SinkError> {
        let request = self.request(address, path, body, headers)?;
        let stream = TcpStream::connect((address.host.as_str(), address.port)).await.map_err(away)?;
        stream.set_nodelay(true).map_err(away)?;
        let status = if address.has_tls {
            let name = self.tls.as_ref().and_then(|tls| tls.files().server_name.clone());
            let name = ServerName::try_from(name.unwrap_or_else(|| address.host.clone())).map_err(away)?;
            let stream = TlsConnector::from(self.tls()?).connect(name, stream).await;
            exchange(stream.map_err(|error| self.tls_failed(&error))?, request).await?
        } else {
            exchange(stream, request).await?
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

/// Trusts the machine's CAs.
fn machine_tls() -> Result<ClientConfig, String> {
    let mut config = trusting(machine_roots()?).map_err(|error| error.to_string())?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
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
