use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::program::tls;

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

/// A certificate of the name tapio for itself, in `dir`.
fn handshakes(dir: &std::path::Path) -> Handshakes {
    let key = rcgen::KeyPair::generate().expect("a key");
    let params = rcgen::CertificateParams::new(vec!["tapio".into()]).expect("a name");
    let cert = params.self_signed(&key).expect("a certificate");
    let path = |name: &str| dir.join(name);
    std::fs::write(path("cert.pem"), cert.pem()).expect("written");
    std::fs::write(path("key.pem"), key.serialize_pem()).expect("written");
    let files = tls::ServerFiles { cert: path("cert.pem"), key: path("key.pem"), client_ca: None };
    let watched = tls::Watched::load(files).expect("a good pair");
    Arc::new(move || over_http1(&watched.current()))
}

#[tokio::test]
async fn a_silent_connection_does_not_delay_the_end() {
    let dir = tempfile::tempdir().expect("a folder");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (end, ended) = watch::channel(false);
    let answer = |_, _| async { Ok(Response::new("well\n".to_owned())) };
    let bounds = Bounds { head_timeout: Duration::from_secs(3600), ..Bounds::default() };
    let served = tokio::spawn(serve_with(listener, Some(handshakes(dir.path())), bounds, answer, ended));
    let held = [opened(address, "").await, opened(address, "\u{16}\u{3}\u{1}").await];
    // They were accepted before this one.
    assert!(rest(&mut opened(address, REQUEST).await).await.contains("well"));
    end.send_replace(true);
    tokio::time::timeout(SOON, served).await.expect("it ends").expect("no panic");
    drop(held);
}

#[tokio::test]
async fn with_a_certificate_one_port_speaks_both() {
    let dir = tempfile::tempdir().expect("a folder");
    let handshakes = handshakes(dir.path());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (_end, ended) = watch::channel(false);
    let answer = |request: Incoming, _| async move {
        Ok(Response::new(format!("tls: {}\n", request.extensions().get::<OverTls>().is_some())))
    };
    let bounds = Bounds { head_timeout: Duration::from_millis(500), ..Bounds::default() };
    tokio::spawn(serve_with(listener, Some(handshakes), bounds, answer, ended));

    assert!(rest(&mut opened(address, REQUEST).await).await.contains("tls: false"));
    let client = tls::ClientFiles { ca: dir.path().join("cert.pem"), ..tls::ClientFiles::default() };
    let mut config = (*tls::Watched::load(client).expect("a CA").current()).clone();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(address).await.expect("connected");
    let name = "tapio".try_into().expect("a name");
    let mut stream = connector.connect(name, stream).await.expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    stream.write_all(REQUEST.as_bytes()).await.expect("sent");
    let mut said = Vec::new();
    stream.read_to_end(&mut said).await.expect("answered");
    assert!(String::from_utf8_lossy(&said).contains("tls: true"));
    // Who begins a handshake and does not go on, or says nothing at all, is closed in time.
    for sent in ["\u{16}\u{3}\u{1}", ""] {
        assert_eq!(rest(&mut opened(address, sent).await).await, "");
    }
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
