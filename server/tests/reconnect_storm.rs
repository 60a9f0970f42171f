//! A thousand collectors at once, against the real server: when it starts, and again after it was killed.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::archive_support::Frames;
use crate::whole_server::*;
use bytes::Bytes;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;
use tokio::sync::Barrier;
use tonic::Status;
use tonic::transport::Endpoint;

const NODES: u64 = 1000;
/// What the server may take for it, archive and correlation included.
const RESIDENT_BYTES_MAX: f64 = 300.0 * 1024.0 * 1024.0;

pub struct Running {
    pub child: Child,
    pub grpc: SocketAddr,
    http: SocketAddr,
}

impl Running {
    fn start(dir: &std::path::Path) -> Self {
        Self::start_with(dir, "")
    }

    /// Starts it on ports of the kernel's choice, which it logs, with more sections in its configuration.
    pub fn start_with(dir: &std::path::Path, extra: &str) -> Self {
        let config = dir.join("server.yaml");
        let text = format!(
            "server: {{address: 127.0.0.1, port: 0, max_concurrent_streams: {NODES}}}\nmetrics: {{prometheus_port: 0}}\n\
             archive: {{dir: \"{}\"}}\nlogging: {{level: info}}\n{extra}",
            dir.join("archive").display()
        );
        std::fs::write(&config, text).unwrap();
        let mut child =
            crate::programs::server(&["--config"]).arg(&config).stderr(Stdio::piped()).spawn().expect("it starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let serving = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let line: Value = serde_json::from_str(&line).ok()?;
            let address = |name: &str| line[name].as_str()?.parse::<SocketAddr>().ok();
            Some((address("grpc_address")?, address("http_address")?))
        });
        // The rest is read, so that the pipe does not fill.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        let (grpc, http) = serving.expect("it says where it serves");
        Self { child, grpc, http }
    }

    pub fn metric(&self, name: &str) -> f64 {
        sum(&get(self.http, "/metrics", "").1, name, &[])
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One collector's way back: until its frame is acknowledged. How many attempts it took, and its stream.
async fn ship(server: SocketAddr, name: &str, seq: u64, frame: &Bytes) -> (u32, Stream) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut attempts = 0;
    loop {
        attempts += 1;
        match attempt(server, name, seq, frame).await {
            Ok(stream) => return (attempts, stream),
            Err(status) => assert!(Instant::now() < deadline, "{name}, attempt {attempts}: {status}"),
        }
        // A collector's back-off: from half to one and a half of its pause.
        let spread = tapio_wire::node_id(name).rotate_left(attempts) % 100;
        tokio::time::sleep(Duration::from_millis(50 + spread)).await;
    }
}

async fn attempt(server: SocketAddr, name: &str, seq: u64, frame: &Bytes) -> Result<Stream, Status> {
    let unreachable = |error: tonic::transport::Error| Status::unavailable(error.to_string());
    let channel = Endpoint::from_shared(format!("http://{server}")).map_err(unreachable)?;
    let channel = channel.connect_timeout(Duration::from_secs(5)).connect().await.map_err(unreachable)?;
    let mut stream = Stream::open(channel, "", hello(name, 1)).await?;
    let welcome = stream.welcome().await?;
    assert_eq!(welcome.durable_seq, seq - 1, "{name} goes on where it was");
    stream.frame(frame.clone()).await;
    stream.acknowledged(seq).await;
    Ok(stream)
}

/// All nodes at the same moment. Their streams, and the attempts that they took.
async fn storm(server: SocketAddr, frames: Vec<(String, u64, Bytes)>) -> (Vec<Stream>, u32) {
    let start = Arc::new(Barrier::new(frames.len()));
    let tasks: Vec<_> = frames
        .into_iter()
        .map(|(name, seq, frame)| {
            let start = Arc::clone(&start);
            tokio::spawn(async move {
                start.wait().await;
                ship(server, &name, seq, &frame).await
            })
        })
        .collect();
    let (mut streams, mut attempts) = (Vec::new(), 0);
    for task in tasks {
        let (taken, stream) = task.await.expect("it ships");
        attempts += taken;
        streams.push(stream);
    }
    (streams, attempts)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_collectors_connect_and_reconnect_at_once() {
    let limit = getrlimit(Resource::Nofile);
    if limit.maximum.is_some_and(|most| most < 2 * NODES) {
        let text = format!("SKIP a thousand collectors: needs {} open files, the hard limit is {limit:?}", 2 * NODES);
        assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "{text}");
        eprintln!("{text}");
        return;
    }
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).expect("raised");
    let dir = tempfile::tempdir().unwrap();
    let mut nodes: Vec<(String, Frames)> = (0..NODES)
        .map(|number| {
            let name = format!("node-{number}");
            let mut frames = Frames::new(&name, 1);
            frames.events = 100;
            (name, frames)
        })
        .collect();
    let mut next = || -> Vec<(String, u64, Bytes)> {
        nodes.iter_mut().map(|(name, frames)| (name.clone(), frames.seq + 1, frames.next())).collect()
    };

    let server = Running::start(dir.path());
    let (streams, attempts) = storm(server.grpc, next()).await;
    assert_eq!(streams.len() as u64, NODES);
    assert_eq!(server.metric("tapio_server_ingest_streams"), NODES as f64);
    let resident = server.metric("tapio_server_resident_bytes");
    eprintln!("first: {attempts} attempts, {:.1} MiB resident", resident / 1_048_576.0);
    assert!(resident < RESIDENT_BYTES_MAX, "{resident} bytes");

    drop(server);
    drop(streams);
    let server = Running::start(dir.path());
    let (streams, attempts) = storm(server.grpc, next()).await;
    let resident = server.metric("tapio_server_resident_bytes");
    eprintln!("second: {attempts} attempts, {:.1} MiB resident", resident / 1_048_576.0);
    assert!(resident < RESIDENT_BYTES_MAX, "{resident} bytes");
    assert_eq!(streams.len() as u64, NODES);
    assert_eq!(server.metric("tapio_ledger_unexplained_events"), 0.0);
    assert_eq!(server.metric("tapio_server_ingest_duplicates_total"), 0.0);
    assert_eq!(server.metric("tapio_server_ingest_frames_total"), NODES as f64);
}
