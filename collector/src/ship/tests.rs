use tonic::{Code, Status};

use super::*;

async fn to(host: &str, address: std::net::SocketAddr, tls: Option<&Arc<Watched<ClientFiles>>>) -> Broken {
    let endpoint = dial::endpoint(host, address.port(), tls.is_some()).expect("a name");
    let endpoint = endpoint.connect_timeout(Duration::from_secs(2));
    let channel = match dial::dial(&endpoint, address, tls).await {
        Ok(channel) => channel,
        Err(error) => return error.into(),
    };
    let request = Request::new(tokio_stream::empty());
    Broken::before_welcome(IngestClient::new(channel).ship(request).await.expect_err("no server"))
}

/// Answers every connection with `bytes` and closes it.
async fn no_server(bytes: &'static [u8]) -> std::net::SocketAddr {
    use tokio::io::AsyncWriteExt;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(bytes).await;
        }
    });
    address
}

#[tokio::test]
async fn reasons_why_a_stream_does_not_open_are_distinguished() {
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");
    let error = to("tapio", free, None).await;
    assert_eq!(error.name(), "connect", "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
    let http1 = no_server(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    let error = to("tapio", http1, None).await;
    assert_eq!(error.name(), "http2", "{error}");
    let folder = tempfile::tempdir().expect("a folder");
    let ca = folder.path().join("ca.pem");
    let signed = rcgen::generate_simple_self_signed(vec!["tapio".into()]).expect("a certificate");
    std::fs::write(&ca, signed.cert.pem()).expect("written");
    let tls = Arc::new(Watched::load(ClientFiles { ca, ..ClientFiles::default() }).expect("a CA"));
    let error = to("tapio", http1, Some(&tls)).await;
    assert_eq!(error.name(), "tls", "{error}");
    assert!(error.to_string().contains("tls.ca"), "{error}");
    for (code, name) in [
        (Code::PermissionDenied, "refused"),
        (Code::Unauthenticated, "refused"),
        (Code::ResourceExhausted, "status"),
        (Code::Unavailable, "status"),
    ] {
        assert_eq!(Broken::from(Status::new(code, "said by the server")).name(), name);
    }
    let error = Broken::Resolve("cannot resolve tapio-server: NXDOMAIN".into());
    assert!(!error.to_string().contains("the server"), "no server said anything: {error}");
}
