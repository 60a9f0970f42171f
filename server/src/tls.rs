//! The border of the gRPC side: connections with TLS.
//!
//! What enters: TCP connections. What leaves: those whose handshake succeeded. What must hold: each handshake uses the files as
//! they are by then, or the last good ones, and running connections keep theirs. A peer that is slow in its handshake delays
//! nobody else for longer than [`HANDSHAKE_PATIENCE`]. At most [`HANDSHAKES_MAX`] are under way at a time.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};
use tapio_wire::program::tls::{ServerFiles, Watched};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use crate::connection::Connection;

/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time after which a handshake may be closed in favour of another.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(1);
/// Handshakes under way at a time.
const HANDSHAKES_MAX: usize = 256;
/// How often the files are looked at when nobody connects.
const FILES_INTERVAL: Duration = Duration::from_secs(5);
/// A pause after a failed accept, which is mostly for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often failed accepts are logged while they last.
const ACCEPT_LOG_INTERVAL: Duration = Duration::from_secs(10);

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
        let handshakes = Opts::new(
            "tapio_server_tls_handshakes_total",
            "TLS handshakes, by result; given_up: closed because slow handshakes took all slots.",
        );
        let metrics = Self {
            handshakes: IntCounterVec::new(handshakes, &["result"])?,
            stale: IntGauge::new(
                "tapio_server_tls_stale",
                "1 while the TLS files are unusable and the server keeps using older ones.",
            )?,
            expires: IntGauge::new(
                "tapio_server_tls_expires_timestamp_seconds",
                "Unix time at which the certificate in use expires.",
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

/// What connections that could not be accepted move.
#[derive(Clone)]
pub struct AcceptMetrics {
    failures: IntCounter,
}

impl AcceptMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When another metric has one of their names.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let failures = IntCounter::new(
            "tapio_server_accept_failures_total",
            "Failed attempts to accept a connection, mostly because file descriptors ran out: the connection waits.",
        )?;
        registry.register(Box::new(failures.clone()))?;
        Ok(Self { failures })
    }
}

/// Connections in the clear, until `end` changes.
pub fn incoming_plain(
    listener: TcpListener,
    accepts: AcceptMetrics,
    connections_max: usize,
    end: watch::Receiver<bool>,
) -> ReceiverStream<io::Result<Connection<TcpStream>>> {
    let (ready, connections) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut end = end;
        let places = Arc::new(Semaphore::new(connections_max));
        loop {
            let accepted = tokio::select! {
                () = ended(&mut end) => return,
                accepted = accept_one(&listener, &places, &accepts) => accepted,
            };
            let Some((stream, place)) = accepted else { return };
            if ready.send(Ok(Connection::new(stream, place))).await.is_err() {
                return;
            }
        }
    });
    ReceiverStream::new(connections)
}

/// The next connection, when there is a place for it; until then it waits in the kernel's queue.
async fn accept_one(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    accepts: &AcceptMetrics,
) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    let mut last_logged: Option<Instant> = None;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Acknowledgements are small and must not wait for more of them.
                let _ = stream.set_nodelay(true);
                return Some((stream, place));
            }
            Err(error) => {
                accepts.failures.inc();
                if last_logged.is_none_or(|last_logged| last_logged.elapsed() >= ACCEPT_LOG_INTERVAL) {
                    last_logged = Some(Instant::now());
                    tracing::error!(%error, "cannot accept a connection, it waits: with too many open files, raise the \
                        limit of open files (LimitNOFILE, ulimit -n) or lower server.max_concurrent_streams");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Connections whose handshake has succeeded, until `end` changes.
pub fn incoming(
    listener: TcpListener,
    tls: Arc<Watched<ServerFiles>>,
    metrics: TlsMetrics,
    accepts: AcceptMetrics,
    connections_max: usize,
    end: watch::Receiver<bool>,
) -> ReceiverStream<io::Result<Connection<TlsStream<TcpStream>>>> {
    let (ready, connections) = mpsc::channel(1);
    let places = Arc::new(Semaphore::new(connections_max));
    tokio::spawn(accept(listener, tls, Arc::new(metrics), accepts, places, ready, end));
    ReceiverStream::new(connections)
}

async fn accept(
    listener: TcpListener,
    tls: Arc<Watched<ServerFiles>>,
    metrics: Arc<TlsMetrics>,
    accepts: AcceptMetrics,
    places: Arc<Semaphore>,
    ready: mpsc::Sender<io::Result<Connection<TlsStream<TcpStream>>>>,
    mut end: watch::Receiver<bool>,
) {
    let mut handshakes = Handshakes { slots: Arc::new(Semaphore::new(HANDSHAKES_MAX)), under_way: VecDeque::new() };
    let mut interval = tokio::time::interval(FILES_INTERVAL);
    loop {
        let (stream, place) = loop {
            tokio::select! {
                () = ended(&mut end) => return,
                _ = interval.tick() => {
                    tls.refresh();
                    metrics.state(&tls);
                }
                accepted = accept_one(&listener, &places, &accepts) => match accepted {
                    Some(accepted) => break accepted,
                    None => return,
                },
            }
        };
        let slot = tokio::select! {
            () = ended(&mut end) => return,
            slot = handshakes.slot(&metrics) => slot,
        };
        let Some(slot) = slot else { return };
        let acceptor = TlsAcceptor::from(tls.current());
        metrics.state(&tls);
        let (metrics, ready) = (Arc::clone(&metrics), ready.clone());
        let task = tokio::spawn(async move {
            let peer = stream.peer_addr().ok();
            let result = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    drop(slot);
                    // Not this task's end: a handshake that has succeeded cannot be given up for another any more.
                    tokio::spawn(async move {
                        // The server has ended when nobody takes it.
                        let _ = ready.send(Ok(Connection::new(stream, place))).await;
                    });
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
        handshakes.under_way.push_back((Instant::now(), task.abort_handle()));
    }
}

/// The handshakes under way, oldest first.
struct Handshakes {
    slots: Arc<Semaphore>,
    under_way: VecDeque<(Instant, AbortHandle)>,
}

impl Handshakes {
    /// A slot for one more. When all are taken by peers that take their time, the one that has taken the most is given up: a
    /// sound handshake takes milliseconds.
    async fn slot(&mut self, metrics: &TlsMetrics) -> Option<OwnedSemaphorePermit> {
        self.under_way.retain(|(_, task)| !task.is_finished());
        loop {
            let oldest = self.under_way.front().map(|(since, _)| *since + HANDSHAKE_PATIENCE);
            let too_long = async {
                match oldest {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                slot = Arc::clone(&self.slots).acquire_owned() => return slot.ok(),
                () = too_long => {
                    if let Some((_, task)) = self.under_way.pop_front().filter(|(_, task)| !task.is_finished()) {
                        task.abort();
                        metrics.handshakes.with_label_values(&["given_up"]).inc();
                    }
                }
            }
        }
    }
}

async fn ended(end: &mut watch::Receiver<bool>) {
    // An error means that the other side is gone, which is an end too.
    let _ = end.wait_for(|end| *end).await;
}
