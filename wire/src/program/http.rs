//! An HTTP/1 port that a stranger cannot keep busy, with TLS where there is a certificate.
//!
//! What enters: a listener, and what answers a request. What leaves: answers, until the end is set. What must hold: a connection
//! that sends no whole request head in time is closed. Connections are bounded, in all and for each peer. Where there is no room,
//! a new one takes the place of the one that has made the server wait longest for a request. So half-sent requests keep nobody
//! else out, not even who shares their address. A peer that does not read its answer is dropped.
//!
//! With a certificate the port speaks both: the first byte of a connection says which. A request that came over TLS carries [`OverTls`].

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Response;
use hyper::body::{Body, Frame, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt::set_tcp_user_timeout;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// A request whose body is still to come.
pub type Incoming = hyper::Request<hyper::body::Incoming>;

/// Bytes of a request's head, and of what is read ahead. A bearer token and a query fit.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// The first byte of a TLS connection: a record of a handshake (RFC 8446, 5.1). No method of HTTP begins so.
const HANDSHAKE: u8 = 0x16;

/// Time without accepting after an error such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the connections of a port may take.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Time for a request's head, from the connection's beginning or the end of the last answer.
    pub head_timeout: Duration,
    /// Head timeout while more than half of all connections are in use.
    pub crowded_head_timeout: Duration,
    /// Time that sent bytes may stay without the peer's acknowledgement.
    pub write_timeout: Duration,
    /// Connections at a time. While all of them are being answered, others wait in the listener's backlog.
    pub connections_max: usize,
    /// Connections of one address. While all of them are being answered, others are closed at once.
    pub connections_max_of_peer: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            head_timeout: Duration::from_secs(20),
            crowded_head_timeout: Duration::from_secs(2),
            write_timeout: Duration::from_secs(30),
            connections_max: 1024,
            connections_max_of_peer: 512,
        }
    }
}

/// An extension of a request that came over TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverTls;

/// What the next handshake shall use.
pub type Handshakes = Arc<dyn Fn() -> Arc<ServerConfig> + Send + Sync>;

/// What a handshake of HTTP/1 uses, made of what one of gRPC would use.
pub fn over_http1(config: &ServerConfig) -> Arc<ServerConfig> {
    let mut config = config.clone();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

/// Serves in the clear until `end` is set, then waits for the answers that have begun.
pub async fn serve<A, F, B>(listener: TcpListener, bounds: Bounds, answer: A, end: watch::Receiver<bool>)
where
    A: Fn(Incoming, SocketAddr) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Response<B>, Infallible>> + Send + 'static,
    B: Body + Unpin + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    serve_with(listener, None, bounds, answer, end).await;
}

/// The same, and over TLS to those who begin with a handshake.
pub async fn serve_with<A, F, B>(
    listener: TcpListener,
    tls: Option<Handshakes>,
    bounds: Bounds,
    answer: A,
    end: watch::Receiver<bool>,
) where
    A: Fn(Incoming, SocketAddr) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Response<B>, Infallible>> + Send + 'static,
    B: Body + Unpin + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let places = Places::default();
    let mut connections = JoinSet::new();
    let mut ending = end.clone();
    let mut ending = pin!(ended(&mut ending));
    loop {
        while connections.try_join_next().is_some() {}
        let next = async {
            let (stream, peer) = listener.accept().await?;
            Ok::<_, io::Error>((stream, peer, places.enter(peer.ip(), &bounds).await))
        };
        let next = tokio::select! {
            next = next => next,
            () = &mut ending => break,
        };
        let (stream, peer, place) = match next {
            Ok(next) => next,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(place) = place else {
            tracing::debug!(%peer, "too many HTTP connections of one address");
            continue;
        };
        let is_crowded = places.lock().open.len() > bounds.connections_max / 2;
        let head_timeout = if is_crowded { bounds.crowded_head_timeout } else { bounds.head_timeout };
        let bounds = Bounds { head_timeout, ..bounds };
        connections.spawn(attend(stream, tls.clone(), (peer, place), bounds, answer.clone(), end.clone()));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn attend<A, F, B>(
    stream: TcpStream,
    tls: Option<Handshakes>,
    (peer, place): (SocketAddr, ConnectionSlot),
    bounds: Bounds,
    answer: A,
    mut end: watch::Receiver<bool>,
) where
    A: Fn(Incoming, SocketAddr) -> F,
    F: Future<Output = Result<Response<B>, Infallible>>,
    B: Body + Unpin + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let timeout_ms = u32::try_from(bounds.write_timeout.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = stream.set_nodelay(true).and_then(|()| Ok(set_tcp_user_timeout(&stream, timeout_ms)?)) {
        tracing::debug!(%peer, %error, "the HTTP connection has already closed");
        return;
    }
    let Some(tls) = tls else { return speak(stream, false, (peer, place), bounds, answer, end).await };
    let evicted = Arc::clone(&place.evicted);
    let handshake = async {
        let mut first = [0];
        match stream.peek(&mut first).await? {
            1 if first[0] == HANDSHAKE => Ok(Opened::Tls(Box::new(TlsAcceptor::from(tls()).accept(stream).await?))),
            _ => Ok::<_, io::Error>(Opened::Plain(stream)),
        }
    };
    let opened = tokio::select! {
        opened = tokio::time::timeout(bounds.head_timeout, handshake) => opened.unwrap_or(Err(io::ErrorKind::TimedOut.into())),
        () = evicted.notified() => Err(io::Error::other("closed to accept another")),
        () = ended(&mut end) => return,
    };
    match opened {
        Ok(Opened::Plain(stream)) => speak(stream, false, (peer, place), bounds, answer, end).await,
        Ok(Opened::Tls(stream)) => speak(*stream, true, (peer, place), bounds, answer, end).await,
        Err(error) => tracing::debug!(%peer, %error, "TLS handshake failed"),
    }
}

/// A connection whose first byte was looked at.
enum Opened {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

async fn speak<A, F, B>(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    is_tls: bool,
    (peer, place): (SocketAddr, ConnectionSlot),
    bounds: Bounds,
    answer: A,
    mut end: watch::Receiver<bool>,
) where
    A: Fn(Incoming, SocketAddr) -> F,
    F: Future<Output = Result<Response<B>, Infallible>>,
    B: Body + Unpin + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let service = service_fn(|mut request: Incoming| {
        if is_tls {
            request.extensions_mut().insert(OverTls);
        }
        let (answering, response) = (place.begin_answer(), answer(request, peer));
        async move { Ok::<_, Infallible>(response.await?.map(|body| Answer { body, _answering: answering })) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(bounds.head_timeout)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
    );
    let mut outcome = tokio::select! {
        outcome = connection.as_mut() => Some(outcome),
        () = place.evicted.notified() => {
            tracing::debug!(%peer, "closed an idle HTTP connection to accept another");
            return;
        }
        () = ended(&mut end) => None,
    };
    if outcome.is_none() {
        connection.as_mut().graceful_shutdown();
        outcome = Some(connection.await);
    }
    if let Some(Err(error)) = outcome {
        tracing::debug!(%peer, %error, "an HTTP connection ended");
    }
}

async fn ended(end: &mut watch::Receiver<bool>) {
    // An error means that the other side is gone, which is an end too.
    let _ = end.wait_for(|end| *end).await;
}

/// Who has a place among the connections of a port.
#[derive(Clone, Default)]
struct Places {
    table: Arc<Mutex<Table>>,
    /// Told when a place may have become free. Only the accepting loop waits for it.
    freed: Arc<Notify>,
}

#[derive(Default)]
struct Table {
    /// A clock that ticks once with each connection and once with each answer that ends.
    now: u64,
    /// Open connections by the tick of their arrival.
    open: BTreeMap<u64, Open>,
}

struct Open {
    peer: IpAddr,
    /// Since when it owes the server a request; `None` while it is being answered.
    owes_since: Option<u64>,
    evicted: Arc<Notify>,
}

impl Table {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// Takes the place of the connection that has owed a request for longest. False where each is being answered.
    fn evict(&mut self, peer: Option<IpAddr>) -> bool {
        let of_peer = self.open.iter().filter(|(_, open)| peer.is_none_or(|peer| peer == open.peer));
        let oldest = of_peer.filter_map(|(&id, open)| Some((open.owes_since?, id))).min();
        let Some(evicted) = oldest.and_then(|(_, id)| self.open.remove(&id)) else {
            return false;
        };
        evicted.evicted.notify_one();
        true
    }
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection, or `None` where its address has too many that are being answered.
    async fn enter(&self, peer: IpAddr, bounds: &Bounds) -> Option<ConnectionSlot> {
        loop {
            {
                let mut table = self.lock();
                let of_peer = table.open.values().filter(|open| open.peer == peer).count();
                if of_peer >= bounds.connections_max_of_peer && !table.evict(Some(peer)) {
                    return None;
                }
                if table.open.len() < bounds.connections_max || table.evict(None) {
                    let (id, evicted) = (table.tick(), Arc::new(Notify::new()));
                    table.open.insert(id, Open { peer, owes_since: Some(id), evicted: Arc::clone(&evicted) });
                    return Some(ConnectionSlot { places: self.clone(), id, evicted });
                }
            }
            self.freed.notified().await;
        }
    }
}

/// The place of one connection, free again when this is dropped.
struct ConnectionSlot {
    places: Places,
    id: u64,
    evicted: Arc<Notify>,
}

impl ConnectionSlot {
    fn begin_answer(&self) -> Answering {
        if let Some(open) = self.places.lock().open.get_mut(&self.id) {
            open.owes_since = None;
        }
        Answering { places: self.places.clone(), id: self.id }
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.places.lock().open.remove(&self.id);
        self.places.freed.notify_one();
    }
}

/// While it lives, its connection is being answered and keeps its place.
struct Answering {
    places: Places,
    id: u64,
}

impl Drop for Answering {
    fn drop(&mut self) {
        let mut table = self.places.lock();
        let now = table.tick();
        if let Some(open) = table.open.get_mut(&self.id) {
            open.owes_since = Some(now);
        }
        self.places.freed.notify_one();
    }
}

/// A body that says when it has been handed over.
struct Answer<B> {
    body: B,
    _answering: Answering,
}

impl<B: Body + Unpin> Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests;
