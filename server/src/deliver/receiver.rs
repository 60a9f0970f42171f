//! Posts to an HTTP receiver, one request a connection. Its answer says what becomes of the delivery.
//!
//! ```text
//! 2xx               the receiver has it
//! 400 413 415 422   it refuses this delivery
//! all else          it is away: the same comes again
//! ```

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use axum::body::{Body, to_bytes};
use bytes::Bytes;
use hyper::client::conn::http1;
use hyper::header::{self, HeaderMap};
use hyper::{Method, Request, StatusCode};
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

/// What this server calls itself.
pub(super) const USER_AGENT: &str = concat!("tapio-server/", env!("CARGO_PKG_VERSION"));

/// What carries a connection's bytes.
pub(super) trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// One request.
pub(super) struct Post<'a> {
    pub path: &'a str,
    pub content_type: &'static str,
    pub body: Bytes,
    pub headers: &'a [(&'a str, &'a str)],
    /// Size to which the answer's body is read; 0: its head says all.
    pub answer_bytes_max: usize,
}

/// What a receiver answers.
pub(super) struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

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

    fn request(&self, address: &Address, post: &Post<'_>) -> Result<Request<Body>, SinkError> {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(post.path)
            .header(header::HOST, &address.authority)
            .header(header::CONTENT_TYPE, post.content_type)
            .header(header::CONNECTION, "close")
            .header(header::USER_AGENT, USER_AGENT);
        for (name, value) in post.headers {
            request = request.header(*name, *value);
        }
        if let Some(authorization) = self.authorization()? {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request.body(Body::from(post.body.clone())).map_err(away)
    }

    /// Value of the header `authorization`, where there is a token.
    pub fn authorization(&self) -> Result<Option<String>, SinkError> {
        let Some(path) = &self.token_file else { return Ok(None) };
        let token = std::fs::read_to_string(path);
        let token = token.map_err(|error| away(format_args!("{}.token_file: {error}", self.section)))?;
        Ok(Some(format!("Bearer {}", token.trim())))
    }

    /// TLS that speaks one protocol, by its ALPN name.
    fn tls(&self, protocol: &[u8]) -> Result<Arc<ClientConfig>, SinkError> {
        let config = match (&self.tls, self.machine_tls.get()) {
            (Some(files), _) => files.current(),
            (None, Some(config)) => Arc::clone(config),
            (None, None) => {
                let config = Arc::new(machine_tls().map_err(|error| self.tls_failed(&error))?);
                Arc::clone(self.machine_tls.get_or_init(|| config))
            }
        };
        let mut config = (*config).clone();
        config.alpn_protocols = vec![protocol.to_vec()];
        Ok(Arc::new(config))
    }

    /// Connects, over TLS to an `https://` address.
    pub async fn connect(&self, address: &Address, protocol: &[u8]) -> Result<Box<dyn Wire>, SinkError> {
        let stream = TcpStream::connect((address.host.as_str(), address.port)).await.map_err(away)?;
        stream.set_nodelay(true).map_err(away)?;
        if !address.has_tls {
            return Ok(Box::new(stream));
        }
        let name = self.tls.as_ref().and_then(|tls| tls.files().server_name.clone());
        let name = ServerName::try_from(name.unwrap_or_else(|| address.host.clone())).map_err(away)?;
        let stream = TlsConnector::from(self.tls(protocol)?).connect(name, stream).await;
        Ok(Box::new(stream.map_err(|error| self.tls_failed(&error))?))
    }

    /// Posts once. What the answer means is the caller's to say.
    pub async fn send(&self, address: &Address, post: &Post<'_>) -> Result<Answer, SinkError> {
        let request = self.request(address, post)?;
        let stream = self.connect(address, b"http/1.1").await?;
        exchange(stream, request, post.answer_bytes_max).await
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
        let (content_type, body) = ("application/json", body.into());
        let post = Post { path, content_type, body, headers, answer_bytes_max: 0 };
        let status = self.send(address, &post).await?.status;
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
    trusting(machine_roots()?).map_err(|error| error.to_string())
}

pub(super) fn away(error: impl std::fmt::Display) -> SinkError {
    SinkError::Away(error.to_string())
}

/// Sends one request and reads the answer: its head, and its body to a limit.
async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Body>,
    body_bytes_max: usize,
) -> Result<Answer, SinkError> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(away)?;
    let answered = async {
        let (head, body) = sender.send_request(request).await.map_err(away)?.into_parts();
        let body = match body_bytes_max {
            0 => Bytes::new(),
            // What the status says holds without it.
            max => to_bytes(Body::new(body), max).await.unwrap_or_default(),
        };
        Ok(Answer { status: head.status, headers: head.headers, body })
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn answer_to(answer: &'static [u8]) -> Answer {
        let (near, mut far) = tokio::io::duplex(64 << 10);
        let receiver = tokio::spawn(async move {
            let mut request = [0; 1024];
            assert!(far.read(&mut request).await.expect("a request") > 0);
            far.write_all(answer).await.expect("written");
        });
        let request = Request::post("/v1/logs").body(Body::from("x")).expect("a request");
        let answer = exchange(near, request, 16).await.expect("a status came");
        receiver.await.expect("no panic");
        answer
    }

    /// The receiver has what it was sent: it is not sent again for what follows the status.
    #[tokio::test]
    async fn an_answer_counts_without_its_body() {
        let short = answer_to(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfine").await;
        assert_eq!((short.status.as_u16(), &short.body[..]), (200, &b"fine"[..]));
        let long = answer_to(b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\nfar more than wanted").await;
        let cut_off = answer_to(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nfine").await;
        for answer in [long, cut_off] {
            assert_eq!((answer.status.as_u16(), answer.body.len()), (200, 0));
        }
    }
}
