//! An HTTP/1 port that a stranger cannot keep busy.
//!
//! What enters: a listener, and what answers a request. What leaves: answers, until the end is set. What must hold: a connection
//! that sends no whole request head in time is closed. Connections are bounded, in all and for each peer. Where there is no room,
//! a new one takes the place of the one that has made the server wait longest for a request. So half-sent requests keep nobody
//! else out, not even who shares their address. A peer that does not read its answer is dropped.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::error::Error;
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
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

/// A request whose body is still to come.
pub type Incoming = hyper::Request<hyper::body::Incoming>;

/// Bytes of a request's head, and of what is read ahead. A bearer token and a query fit.
const HEAD_BYTES_MAX: usize = 16 << 10;

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

/// Serves until `end` is set, then waits for the answers that have begun.
pub async fn serve<A, F, B>(listener: TcpListener, bounds: Bounds, answer: A, end: watch::Receiver<bool>)
where
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
            Ok::<_, std::io::Error>((stream, peer, places.enter(peer.ip(), &bounds).await))
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
        connections.spawn(attend(stream, peer, place, bounds, answer.clone(), end.clone()));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn attend<A, F, B>(
    stream: TcpStream,
    peer: SocketAddr,
    place: ConnectionSlot,
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
    let service = service_fn(|request| {
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
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    async fn begin(bounds: Bounds) -> (SocketAddr, watch::Sender<bool>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (end, ended) = watch::channel(false);
        let answer = |_, _| async { Ok(Response::new("well\n".to_owned())) };
        tokio::spawn(serve(listener, bounds, answer, ended));
        (address, end)
    }

    async fn opened(address: SocketAddr, sent: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        // A server that has no room may have closed already.
        let _ = stream.write_all(sent.as_bytes()).await;
        stream
    }

    /// What comes until the other side closes.
    async fn rest(stream: &mut TcpStream) -> String {
        let mut bytes = Vec::new();
        let read = tokio::time::timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("it is closed");
        // A reset is an end too.
        read.map_or(String::new(), |_| String::from_utf8_lossy(&bytes).into_owned())
    }

    #[tokio::test]
    async fn idle_or_half_sent_connections_are_closed_in_time() {
        let bounds = Bounds { head_timeout: Duration::from_millis(200), ..Bounds::default() };
        let (address, _end) = begin(bounds).await;
        for (sent, answered) in [("", false), ("GET / HT", false), ("GET / HTTP/1.1\r\nhost: a\r\n\r\n", true)] {
            let said = rest(&mut opened(address, sent).await).await;
            assert_eq!(said.contains("well"), answered, "{sent:?}: {said}");
        }
    }

    #[tokio::test]
    async fn idle_connections_that_crowd_a_port_are_closed_sooner() {
        let (head_timeout, crowded_head_timeout) = (Duration::from_secs(3600), Duration::from_millis(200));
        let (address, _end) =
            begin(Bounds { connections_max: 4, head_timeout, crowded_head_timeout, ..Bounds::default() }).await;
        let held = [opened(address, "").await, opened(address, "").await];
        assert_eq!(rest(&mut opened(address, "").await).await, "");
        drop(held);
    }

    #[tokio::test]
    async fn a_head_that_does_not_end_is_refused_early() {
        let (address, _end) = begin(Bounds::default()).await;
        let said = rest(&mut opened(address, &format!("GET / HTTP/1.1\r\na: {}", "b".repeat(20_000))).await).await;
        assert!(!said.contains("well"), "{said}");
        let fits = format!("GET / HTTP/1.1\r\nconnection: close\r\nauthorization: {}\r\n\r\n", "b".repeat(8_000));
        assert!(rest(&mut opened(address, &fits).await).await.contains("well"));
    }

    const REQUEST: &str = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

    #[tokio::test]
    async fn half_sent_requests_keep_nobody_out() {
        let patient = Bounds { head_timeout: Duration::from_secs(3600), ..Bounds::default() };
        let patient = Bounds { crowded_head_timeout: patient.head_timeout, ..patient };
        // All places of one address, then all places of the port.
        for bounds in [Bounds { connections_max_of_peer: 4, ..patient }, Bounds { connections_max: 4, ..patient }] {
            let (address, _end) = begin(bounds).await;
            let mut held = Vec::new();
            for sent in ["GET /", "", "GET / HTTP/1.1\r\nhost: a\r\n\r\nGET /", "GET /"] {
                held.push(opened(address, sent).await);
            }
            // So that the third has its answer, and is half-sent again.
            let mut answer = [0; 15];
            held[2].read_exact(&mut answer).await.expect("an answer");
            assert_eq!(&answer, b"HTTP/1.1 200 OK");
            for nth in 1..=3 {
                let said = rest(&mut opened(address, REQUEST).await).await;
                assert!(said.contains("well"), "request {nth}: {said}");
            }
            assert_eq!(rest(&mut held[0]).await, "", "the one that owed a request for longest made room");
        }
    }

    #[tokio::test]
    async fn one_address_cannot_take_all_connections() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (end, ended) = watch::channel(false);
        let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
        let (release, released) = watch::channel(false);
        let answer = move |_, _| {
            let (begun, mut released) = (begun.clone(), released.clone());
            async move {
                begun.send(()).expect("the test waits");
                let _ = released.wait_for(|released| *released).await;
                Ok(Response::new("well\n".to_owned()))
            }
        };
        let bounds = Bounds { connections_max_of_peer: 2, connections_max: 3, ..Bounds::default() };
        tokio::spawn(serve(listener, bounds, answer, ended));
        let mut held = [opened(address, REQUEST).await, opened(address, REQUEST).await];
        for _ in &held {
            begins.recv().await.expect("a request is being answered");
        }
        assert_eq!(rest(&mut opened(address, REQUEST).await).await, "", "the third is closed at once");
        // None of the first lost its place.
        release.send_replace(true);
        for stream in &mut held {
            assert!(rest(stream).await.contains("well"));
        }
        // The end closes what is idle.
        let mut idle = opened(address, "").await;
        end.send_replace(true);
        assert_eq!(rest(&mut idle).await, "");
    }
}
