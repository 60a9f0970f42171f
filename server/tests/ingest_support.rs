//! An ingest service on the loopback whose disk can fail, and a client of its streams.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::archive_support::*;
use crate::whole_server::{Stream, hello};
use prometheus::Registry;
use tapio_server::archive::{Archive, lock_books};
use tapio_server::ingest::{FrameSink, IngestMetrics, IngestService, settings};
use tapio_wire::frame::Frame;
use tapio_wire::limits::REFUSED_FRAME_KEY;
use tapio_wire::service::Welcome;
use tapio_wire::service::ingest_client::IngestClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

#[derive(Default)]
pub struct Recorder {
    pub frames: Mutex<Vec<(Arc<str>, Arc<Frame>)>>,
}

impl Recorder {
    pub fn seqs(&self) -> Vec<u64> {
        let frames = self.frames.lock().unwrap();
        frames.iter().map(|(_, frame)| frame.header().seq).collect()
    }
}

impl FrameSink for Recorder {
    async fn deliver(&self, node: &Arc<str>, frame: Arc<Frame>) {
        self.frames.lock().unwrap().push((Arc::clone(node), frame));
    }
}

pub struct Running {
    pub disk: FaultyDisk,
    pub archive: Archive,
    pub service: IngestService<Arc<Recorder>>,
    pub recorder: Arc<Recorder>,
    pub metrics: Arc<IngestMetrics>,
    pub address: std::net::SocketAddr,
    pub dir: tempfile::TempDir,
}

pub async fn start() -> Running {
    let dir = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let archive = Archive::open_on(plain(dir.path()), disk.clone(), Duration::ZERO, &mut |_, _| {}).unwrap();
    let metrics = Arc::new(IngestMetrics::register(&Registry::new()).unwrap());
    let recorder = Arc::new(Recorder::default());
    let service = IngestService::new(&archive, Arc::clone(&recorder), Arc::clone(&metrics));
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let server = settings(Server::builder(), 1000).add_service(service.server());
    tokio::spawn(server.serve_with_incoming(incoming));
    Running { disk, archive, service, recorder, metrics, address, dir }
}

impl Running {
    pub async fn connect(&self) -> Stream {
        let endpoint = format!("http://{}", self.address);
        let mut client = IngestClient::connect(endpoint).await.unwrap();
        let (requests, receiver) = mpsc::channel(64);
        let responses = client.ship(ReceiverStream::new(receiver)).await.unwrap();
        Stream { requests, responses: responses.into_inner() }
    }

    /// A stream that has been welcomed.
    pub async fn stream(&self, name: &str, epoch: u64) -> (Stream, Welcome) {
        let mut client = self.connect().await;
        client.hello(hello(name, epoch)).await;
        let welcome = client.welcome().await.expect("welcome");
        (client, welcome)
    }

    pub fn durable(&self, frames: &Frames) -> u64 {
        lock_books(self.archive.books()).durable_seq(frames.node(), frames.epoch)
    }
}

/// What a status says is wrong with the frame itself.
pub fn blamed_for(status: &Status) -> Option<&str> {
    status.metadata().get(REFUSED_FRAME_KEY).and_then(|reason| reason.to_str().ok())
}
