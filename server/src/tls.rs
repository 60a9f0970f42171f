//! The border of the gRPC side: connections with TLS, and requests with a token.
//!
//! What enters: TCP connections. What leaves: those whose handshake succeeded. What must hold: each handshake uses the files as
//! they are by then, or the last good ones, and running connections keep theirs; a peer that is slow in its handshake holds
//! up nobody else, and no more than [`HANDSHAKES_MAX`] are under way at a time.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use prometheus::{IntCounterVec, IntGauge, Opts, Registry};
use tapio_wire::tls::{ServerFiles, Watched};
use tapio_wire::token::TokenFile;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes under way at a time; further connections wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 256;
/// How often the files are looked at when nobody connects.
const FILES_INTERVAL: Duration = Duration::from_secs(5);
/// A pause after a failed accept, which is mostly for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the handshakes move.
pub struct TlsMetrics {
    handshakes: IntCounterVec,
    stale: IntGauge,
    expires: IntGauge,
}

impl TlsMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When another metric has one of their names.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let handshakes = Opts::new("tapio_server_tls_handshakes_total", "TLS handshakes, by how they ended");
        let metrics = Self {
            handshakes: IntCounterVec::new(handshakes, &["result"])?,
            stale: IntGauge::new("tapio_server_tls_stale", "1 while the TLS files cannot be used and older ones are")?,
            expires: IntGauge::new(
                "tapio_server_tls_expires_timestamp_seconds",
                "When the certificate in use expires",
            )?,
        };
        registry.register(Box::new(metrics.handshakes.clone()))?;
        registry.register(Box::new(metrics.stale.clone()))?;
        registry.register(Box::new(metrics.expires.clone()))?;
        Ok(metrics)
    }

    fn state(&self, tls: &Watched<ServerFiles>) {
        self.stale.set(i64::from(tls.is_stale()));
        self.expires.set(tls.expires().unwrap_or(0) as i64);
    }
}

/// Connections whose handshake has succeeded, until `end` changes.
pub fn incoming(
    listener: TcpListener,
    tls: Arc<Watched<ServerFiles>>,
    metrics: TlsMetrics,
    end: watch::Receiver<bool>,
) -> ReceiverStream<io::Result<TlsStream<TcpStream>>> {
    let (ready, connections) = mpsc::channel(1);
    tokio::spawn(accept(listener, tls, Arc::new(metrics), ready, end));
    ReceiverStream::new(connections)
}

async fn accept(
    listener: TcpListener,
    tls: Arc<Watched<ServerFiles>>,
    metrics: Arc<TlsMetrics>,
    ready: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
    mut end: watch::Receiver<bool>,
) {
    let under_way = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let mut interval = tokio::time::interval(FILES_INTERVAL);
    loop {
        let Ok(permit) = Arc::clone(&under_way).acquire_owned().await else { return };
        let stream = loop {
            tokio::select! {
                () = ended(&mut end) => return,
                _ = interval.tick() => {
                    tls.refresh();
                    metrics.state(&tls);
                }
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => break stream,
                    Err(error) => {
                        tracing::debug!(%error, "a connection was not accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        };
        let acceptor = TlsAcceptor::from(tls.current());
        metrics.state(&tls);
        let (metrics, ready) = (Arc::clone(&metrics), ready.clone());
        tokio::spawn(async move {
            let peer = stream.peer_addr().ok();
            // Acknowledgements are small and must not wait for more of them.
            let _ = stream.set_nodelay(true);
            let result = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    drop(permit);
                    // The server has ended when nobody takes it.
                    let _ = ready.send(Ok(stream)).await;
                    "ok"
                }
                Ok(Err(error)) => {
                    tracing::warn!(?peer, %error, "TLS handshake failed");
                    "failed"
                }
                Err(_) => "timeout",
            };
            metrics.handshakes.with_label_values(&[result]).inc();
        });
    }
}

async fn ended(end: &mut watch::Receiver<bool>) {
    // An error means that the other side is gone, which is an end too.
    let _ = end.wait_for(|end| *end).await;
}

/// Lets requests with the right token in; all of them where none is configured.
#[derive(Clone)]
pub struct Admission(pub Option<Arc<TokenFile>>);

impl tonic::service::Interceptor for Admission {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        match &self.0 {
            Some(token)
                if !token.admits(request.metadata().get("authorization").map(|value| value.as_encoded_bytes())) =>
            {
                Err(Status::unauthenticated(
                    "the token is missing or wrong; set grpc.token_file of the collector (tapioctl: --token-file) to a file \
                     with the content of server.auth.token_file",
                ))
            }
            _ => Ok(request),
        }
    }
}
