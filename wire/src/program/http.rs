//! An HTTP/1 port that a stranger cannot keep busy.
//!
//! What enters: a listener, and what answers a request. What leaves: answers, until the end is set. What must hold: a connection
//! that sends no whole request head in time is closed. Connections are bounded, in all and for each peer. A peer that does not
//! read its answer is dropped.

use std::collections::HashMap;
use std::convert::Infallible;
use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::Response;
use hyper::body::Body;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
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
    /// The same while more than half of all connections are in use.
    pub crowded_head_timeout: Duration,
    /// Time that sent bytes may stay without the peer's acknowledgement.
    pub write_timeout: Duration,
    /// Connections at a time; others wait in the listener's backlog.
    pub connections_max: usize,
    /// Connections of one address; others are closed at once.
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
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let room = Arc::new(Semaphore::new(bounds.connections_max));
    let peers = Peers::default();
    let mut connections = JoinSet::new();
    let mut ending = end.clone();
    let mut ending = pin!(ended(&mut ending));
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = async {
            let permit = Arc::clone(&room).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut ending => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(counted) = peers.enter(peer.ip(), bounds.connections_max_of_peer) else {
            tracing::debug!(%peer, "too many HTTP connections of one address");
            continue;
        };
        let (answer, end) = (answer.clone(), end.clone());
        let is_crowded = room.available_permits() < bounds.connections_max / 2;
        let head_timeout = if is_crowded { bounds.crowded_head_timeout } else { bounds.head_timeout };
        let bounds = Bounds { head_timeout, ..bounds };
        connections.spawn(async move {
            let _held = (permit, counted);
            attend(stream, peer, bounds, answer, end).await;
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn attend<A, F, B>(stream: TcpStream, peer: SocketAddr, bounds: Bounds, answer: A, mut end: watch::Receiver<bool>)
where
    A: Fn(Incoming, SocketAddr) -> F,
    F: Future<Output = Result<Response<B>, Infallible>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let timeout_ms = u32::try_from(bounds.write_timeout.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = stream.set_nodelay(true).and_then(|()| Ok(set_tcp_user_timeout(&stream, timeout_ms)?)) {
        tracing::debug!(%peer, %error, "an HTTP connection has gone already");
        return;
    }
    let service = service_fn(|request| answer(request, peer));
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(bounds.head_timeout)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
    );
    let mut outcome = tokio::select! {
        outcome = connection.as_mut() => Some(outcome),
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

/// Connections by address; bounded by the connections that there are.
#[derive(Clone, Default)]
struct Peers(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// A connection that counts for its address.
struct CountedConnection(Peers, IpAddr);

impl Peers {
    fn enter(&self, peer: IpAddr, most: usize) -> Option<CountedConnection> {
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = peers.entry(peer).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        drop(peers);
        Some(CountedConnection(self.clone(), peer))
    }
}

impl Drop for CountedConnection {
    fn drop(&mut self) {
        let mut peers = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = peers.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                peers.remove(&self.1);
            }
        }
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

    #[tokio::test]
    async fn one_address_cannot_take_all_connections() {
        let bounds = Bounds { connections_max_of_peer: 2, connections_max: 3, ..Bounds::default() };
        let (address, end) = begin(bounds).await;
        let held = [opened(address, "").await, opened(address, "").await];
        assert_eq!(rest(&mut opened(address, "").await).await, "", "the third is closed at once");
        drop(held);
        // Once the first are gone there is room again.
        let request = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        let mut said = String::new();
        for _ in 0..1000 {
            said = rest(&mut opened(address, request).await).await;
            if said.contains("well") {
                break;
            }
        }
        assert!(said.contains("well"), "{said}");
        // The end closes what is idle.
        let mut idle = opened(address, "").await;
        end.send_replace(true);
        assert_eq!(rest(&mut idle).await, "");
    }
}
