//! From an address to a gRPC channel, with TLS where it is configured.
//!
//! tonic resolves a name by itself and picks an address. A collector chooses among all addresses of a name, and its TLS
//! files may change, so it dials by hand.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::program::tls::{ClientFiles, Watched};

/// No TCP connection was made.
#[derive(Debug, thiserror::Error)]
#[error("{address}: {error}")]
pub struct ConnectFailed {
    address: SocketAddr,
    error: io::Error,
}

/// A TCP connection was made, and no TLS session over it.
#[derive(Debug, thiserror::Error)]
#[error(
    "TLS with {address}: {error}; does the server speak TLS, is its certificate signed by tls.ca, and is its name \
     tls.server_name?"
)]
pub struct TlsFailed {
    address: SocketAddr,
    error: io::Error,
}

/// What carries a channel's bytes.
trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// An endpoint that stands for `host` in requests; give it timeouts and windows, then [`dial`] it.
///
/// # Errors
/// When `host` and `port` make no URI.
pub fn endpoint(host: &str, port: u16, has_tls: bool) -> Result<Endpoint, tonic::transport::Error> {
    // tonic is not to do TLS: its own URI stays http, and requests name the true scheme.
    let authority = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let endpoint = Endpoint::from_shared(format!("http://{authority}"))?;
    let origin = if has_tls { format!("https://{authority}").parse::<Uri>().ok() } else { None };
    Ok(match origin {
        Some(origin) => endpoint.origin(origin),
        None => endpoint,
    })
}

/// Connects to one address of an endpoint.
///
/// # Errors
/// What connecting or the handshake says.
pub async fn dial(
    endpoint: &Endpoint,
    address: SocketAddr,
    tls: Option<&Arc<Watched<ClientFiles>>>,
) -> Result<Channel, tonic::transport::Error> {
    let host = endpoint.uri().host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let tls = tls.cloned();
    let connector = tower::service_fn(move |_: Uri| connect(address, host.clone(), tls.clone()));
    endpoint.connect_with_connector(connector).await
}

async fn connect(
    address: SocketAddr,
    host: String,
    tls: Option<Arc<Watched<ClientFiles>>>,
) -> io::Result<TokioIo<Box<dyn Wire>>> {
    let stream = TcpStream::connect(address).await;
    let stream = stream.map_err(|error| io::Error::new(error.kind(), ConnectFailed { address, error }))?;
    stream.set_nodelay(true)?;
    let Some(tls) = tls else {
        return Ok(TokioIo::new(Box::new(stream)));
    };
    let name = tls.files().server_name.clone().unwrap_or(host);
    let name = ServerName::try_from(name.clone()).map_err(|_| {
        let error = io::Error::other(format!("`{name}` is no server name"));
        io::Error::new(io::ErrorKind::InvalidInput, TlsFailed { address, error })
    })?;
    let handshake = TlsConnector::from(tls.current()).connect(name, stream).await;
    let stream = handshake.map_err(|error| io::Error::new(error.kind(), TlsFailed { address, error }))?;
    Ok(TokioIo::new(Box::new(stream)))
}
