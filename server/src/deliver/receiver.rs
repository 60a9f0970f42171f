//! Posts to an HTTP receiver, one request a connection. Its answer says what becomes of the delivery.
//!
//! ```text
//! 2xx               the receiver has it
//! 400 413 415 422   it refuses this delivery
//! all else          it is away: the same comes again
//! ```

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tapio_wire::program::tls::{ClientFiles, TlsError, Watched};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::SinkError;
use super::config::Address;

/// Where to post, and as whom.
pub(super) struct Receiver {
    /// The section of the configuration, for messages.
    section: &'static str,
    address: Address,
    token_file: Option<PathBuf>,
    tls: Option<Watched<ClientFiles>>,
}

impl Receiver {
    /// Reads the TLS files; nobody is connected to.
    pub fn new(
        section: &'static str,
        address: Address,
        token_file: Option<PathBuf>,
        tls: Option<ClientFiles>,
    ) -> Result<Self, TlsError> {
        Ok(Self { section, address, token_file, tls: tls.map(Watched::load).transpose()? })
    }

    fn request(&self, path: &str, body: String, headers: &[(&str, &str)]) -> Result<Request<String>, SinkError> {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(header::HOST, &self.address.authority)
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

    /// Posts JSON to the address, or to a path below it.
    pub async fn post(&self, below: &str, body: String, headers: &[(&str, &str)]) -> Result<(), SinkError> {
        let path = match below {
            "" => self.address.path.clone(),
            below => format!("{}{below}", self.address.path.trim_end_matches('/')),
        };
        let request = self.request(&path, body, headers)?;
        let stream = TcpStream::connect((self.address.host.as_str(), self.address.port)).await.map_err(away)?;
        stream.set_nodelay(true).map_err(away)?;
        let status = match &self.tls {
            Some(tls) => {
                let name = tls.files().server_name.clone().unwrap_or_else(|| self.address.host.clone());
                let name = ServerName::try_from(name).map_err(away)?;
                let mut config = (*tls.current()).clone();
                config.alpn_protocols = vec![b"http/1.1".to_vec()];
                let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
                let tls_failed = |error: io::Error| away(format_args!("TLS: {error}; see {}.tls", self.section));
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
