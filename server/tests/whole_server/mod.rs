//! What the tests of a whole server share: the server in this process, streams to it, and its HTTP side.

#![allow(dead_code, reason = "every test program uses its part of this module")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use bytes::Bytes;
use tapio_server::config::Config;
use tapio_server::pipeline::Pipeline;
use tapio_wire::frame::VERSION;
use tapio_wire::service::ingest_client::IngestClient;
use tapio_wire::service::{Ack, Hello, ShipRequest, ShipResponse, Welcome, ship_request, ship_response};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A server, and the folder that it writes to.
pub struct Whole {
    pub pipeline: Pipeline,
    pub dir: tempfile::TempDir,
}

impl Whole {
    pub async fn start(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = Config::default();
        config.server.address = [127, 0, 0, 1].into();
        config.server.port = 0;
        config.metrics.prometheus_port = 0;
        config.archive.dir = dir.path().to_owned();
        change(&mut config);
        config.validate("test").expect("a good configuration");
        let pipeline = Pipeline::start(&config).await.expect("the server starts");
        Self { pipeline, dir }
    }

    pub async fn channel(&self) -> Channel {
        let url = format!("http://{}", self.pipeline.grpc_address);
        Endpoint::from_shared(url).expect("a URL").connect().await.expect("it listens")
    }

    /// Status code and body.
    pub fn get(&self, path: &str, headers: &str) -> (u16, String) {
        get(self.pipeline.http_address, path, headers)
    }

    /// The sum of a metric's series that have all of `labels`.
    pub fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let (_, text) = self.get("/metrics", "");
        sum(&text, name, labels)
    }

    /// Waits for a metric.
    pub async fn until_metric(&self, name: &str, labels: &[&str], wanted: impl Fn(f64) -> bool) {
        let deadline = std::time::Instant::now() + LIMIT;
        loop {
            let value = self.metric(name, labels);
            if wanted(value) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{name} {labels:?} stays {value}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Writes a kubeconfig that leads to an API server of the test.
pub fn write_kubeconfig(dir: &std::path::Path, address: SocketAddr) {
    let kubeconfig = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "test", "user": {"token": "the-servers-own"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    });
    std::fs::write(dir.join("kubeconfig"), kubeconfig.to_string()).expect("written");
}

pub fn get(address: SocketAddr, path: &str, headers: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(LIMIT)).expect("set");
    write!(stream, "GET {path} HTTP/1.0\r\nHost: tapio\r\n{headers}\r\n").expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("answered");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    (head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a code"), body.to_owned())
}

pub fn sum(text: &str, name: &str, labels: &[&str]) -> f64 {
    let of_name = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
    let wanted = of_name.filter(|line| labels.iter().all(|label| line.contains(label)));
    wanted.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

pub fn hello(name: &str, epoch: u64) -> Hello {
    Hello {
        version: u32::from(VERSION),
        node: name.to_owned(),
        node_id: tapio_wire::node_id(name),
        epoch,
        revision: "test".to_owned(),
        ..Hello::default()
    }
}

/// A stream to a server.
#[derive(Debug)]
pub struct Stream {
    pub requests: mpsc::Sender<ShipRequest>,
    pub responses: Streaming<ShipResponse>,
}

impl Stream {
    /// Opens it and says hello; a token where there is one.
    pub async fn open(channel: Channel, token: &str, hello: Hello) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(64);
        requests.try_send(ShipRequest { kind: Some(ship_request::Kind::Hello(hello)) }).expect("room");
        let mut request = Request::new(ReceiverStream::new(receiver));
        if !token.is_empty() {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("ASCII"));
        }
        let responses = IngestClient::new(channel).ship(request).await?.into_inner();
        Ok(Self { requests, responses })
    }

    pub async fn hello(&self, hello: Hello) {
        self.send(ship_request::Kind::Hello(hello)).await;
    }

    pub async fn frame(&self, bytes: impl Into<Bytes>) {
        self.send(ship_request::Kind::Frame(bytes.into())).await;
    }

    pub async fn send(&self, kind: ship_request::Kind) {
        // A stream that was refused meanwhile shows in its responses.
        let _ = self.requests.send(ShipRequest { kind: Some(kind) }).await;
    }

    pub async fn response(&mut self) -> Result<ship_response::Kind, Status> {
        match tokio::time::timeout(LIMIT, self.responses.message()).await {
            Ok(Ok(Some(response))) => Ok(response.kind.expect("a kind")),
            Ok(Ok(None)) => Err(Status::ok("the stream ended")),
            Ok(Err(status)) => Err(status),
            Err(_) => panic!("no response within {LIMIT:?}"),
        }
    }

    pub async fn welcome(&mut self) -> Result<Welcome, Status> {
        match self.response().await? {
            ship_response::Kind::Welcome(welcome) => Ok(welcome),
            other => panic!("no welcome but {other:?}"),
        }
    }

    /// Reads acknowledgements until one reaches `seq`.
    pub async fn acknowledged(&mut self, seq: u64) -> Ack {
        loop {
            match self.response().await {
                Ok(ship_response::Kind::Ack(ack)) if ack.durable_seq >= seq => return ack,
                Ok(_) => {}
                Err(status) => panic!("no acknowledgement but {status}"),
            }
        }
    }

    /// Reads until the server ends the stream.
    pub async fn end(mut self) -> Status {
        loop {
            if let Err(status) = self.response().await {
                return status;
            }
        }
    }
}

/// A port of 127.0.0.1 that is free now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}
