//! The limit of open files: each stream is a connection, and a server that starts with little room makes itself more.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Fewer than the streams that come.
const SOFT: u64 = 256;
const STREAMS: usize = 400;
const LIMIT: Duration = Duration::from_secs(30);

use crate::whole_server::{Stream, free_port, hello, sum};

struct Started {
    child: Child,
    grpc: u16,
    http: u16,
    _dir: tempfile::TempDir,
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// The real server, with these limits of open files.
fn start(soft: u64, hard: u64) -> Started {
    let dir = tempfile::tempdir().expect("a directory");
    let (grpc, http) = (free_port(), free_port());
    let config = dir.path().join("server.yaml");
    let text = format!(
        "server: {{address: 127.0.0.1, port: {grpc}}}\nmetrics: {{prometheus_port: {http}}}\narchive: {{dir: \"{}\"}}\n\
         logging: {{format: text}}\n",
        dir.path().join("archive").display()
    );
    std::fs::write(&config, text).expect("written");
    let log = std::fs::File::create(dir.path().join("log")).expect("a log");
    let script = format!("ulimit -Sn {soft} && ulimit -Hn {hard} && exec \"$0\" --config \"$1\"");
    let child = Command::new("/bin/bash")
        .args(["-c", &script, crate::programs::SERVER])
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("it starts");
    let started = Started { child, grpc, http, _dir: dir };
    let deadline = Instant::now() + LIMIT;
    while !get(http, "/readyz").is_some_and(|answer| answer.contains("200 OK")) {
        assert!(Instant::now() < deadline, "not ready: {}", started.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    started
}

impl Started {
    fn log(&self) -> String {
        std::fs::read_to_string(self._dir.path().join("log")).unwrap_or_default()
    }

    async fn stream(&self, index: usize) -> Result<Stream, String> {
        let url = format!("http://127.0.0.1:{}", self.grpc);
        let endpoint = tonic::transport::Endpoint::from_shared(url).expect("a URL");
        let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
        let node = format!("n{index}");
        let mut stream = Stream::open(channel, "", hello(&node, 1)).await.map_err(|error| error.to_string())?;
        stream.welcome().await.map_err(|error| error.to_string())?;
        Ok(stream)
    }
}

#[tokio::test]
async fn a_soft_limit_of_256_is_raised_for_400_streams() {
    tapio_wire::program::descriptors::raise_limit().expect("raised: this process has the other ends");
    let server = start(SOFT, 4096);
    let mut streams = Vec::new();
    for index in 0..STREAMS {
        let stream = server.stream(index).await;
        streams.push(stream.unwrap_or_else(|error| panic!("stream {index}: {error}\n{}", server.log())));
    }
    let log = server.log();
    assert!(log.contains("the limit of open files") && log.contains("4096"), "{log}");
    assert!(!log.contains('\x1b'), "colours are for a terminal: {log}");
}

#[tokio::test]
async fn a_server_without_free_descriptors_says_so_and_goes_on() {
    tapio_wire::program::descriptors::raise_limit().expect("raised: this process has the other ends");
    let server = start(120, 120);
    let mut connections = Vec::new();
    let deadline = Instant::now() + LIMIT;
    while !server.log().contains("cannot accept a connection") {
        assert!(Instant::now() < deadline, "{}", server.log());
        if connections.len() < 300 {
            connections.push(TcpStream::connect(("127.0.0.1", server.grpc)).expect("the kernel's queue has room"));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(connections);
    // Room again: it takes streams as before, and the failures are counted.
    let stream = tokio::time::timeout(LIMIT, server.stream(0)).await.expect("in time");
    stream.unwrap_or_else(|error| panic!("{error}\n{}", server.log()));
    let metrics = get(server.http, "/metrics").expect("answered");
    assert!(sum(&metrics, "tapio_server_accept_failures_total", &[]) >= 1.0, "{metrics}");
}
