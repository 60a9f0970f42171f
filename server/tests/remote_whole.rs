//! Whole servers with a remote archive: one is killed under load, its volume is wiped, and another one takes its place.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::archive_support::{Frames, wait_until};
use crate::remote_support::*;
use crate::whole_server::{Stream, free_port, get, hello, sum};
use serde_json::Value;
use tonic::transport::Endpoint;

const NODE: &str = "node-1";
const EVENTS_A_FRAME: u64 = 20;

/// A server in a process of its own.
struct Process {
    child: Child,
    grpc: u16,
    http: u16,
}

impl Process {
    fn start(folder: &Path, dir: &Path, remote: &str, environment: &[(&str, String)]) -> Self {
        let (grpc, http) = (free_port(), free_port());
        let config = format!(
            "server: {{address: 127.0.0.1, port: {grpc}}}\nmetrics: {{prometheus_port: {http}}}\ncluster: {{name: test, server: \
             server-0}}\narchive:\n  dir: {}\n  segment_bytes: 8MiB\n  disk: plain\n  remote: {{{remote}, every: 1s}}\n",
            dir.display()
        );
        let file = folder.join("server.yaml");
        std::fs::write(&file, config).expect("written");
        let child = crate::programs::server(&["--config"])
            .arg(&file)
            .envs(environment.iter().map(|(name, value)| (*name, value.as_str())))
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        let server = Self { child, grpc, http };
        wait_until("it is ready", || {
            std::net::TcpStream::connect(("127.0.0.1", http)).is_ok() && server.get("/readyz").0 == 200
        });
        server
    }

    fn get(&self, path: &str) -> (u16, String) {
        get(([127, 0, 0, 1], self.http).into(), path, "")
    }

    fn metric(&self, name: &str) -> f64 {
        sum(&self.get("/metrics").1, &format!("tapio_server_{name}"), &[])
    }

    async fn stream(&self, acked: u64) -> Stream {
        let url = format!("http://127.0.0.1:{}", self.grpc);
        let channel = Endpoint::from_shared(url).expect("a URL").connect().await.expect("it listens");
        let mut hello = hello(NODE, 1);
        (hello.acked_seq, hello.acked_events) = (acked, vec![acked * EVENTS_A_FRAME]);
        let mut stream = Stream::open(channel, "", hello).await.expect("it is taken");
        stream.welcome().await.expect("welcome");
        stream
    }

    fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("waited for");
    }

    fn terminate(mut self) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        let status = Command::new("kill").args(["-TERM", &pid.to_string()]).status().expect("kill runs");
        assert!(status.success());
        assert!(self.child.wait().expect("waited for").success());
    }

    fn tapioctl(&self, arguments: &[&str]) -> String {
        let server = format!("127.0.0.1:{}", self.grpc);
        crate::programs::printed(crate::programs::tapioctl(server, arguments).output().expect("tapioctl runs"))
    }
}

fn rfc3339(seconds: u64) -> String {
    tapio_server::render::rfc3339(seconds * 1_000_000_000)
}

/// The sequences of the node's frames that a remote archive has.
fn sequences(cache: &Path, environment: &[(&str, String)], url: &str) -> Vec<u64> {
    let (output, text) = command(cache, environment, &["archive", "cat", "--json", url]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut sequences: Vec<u64> = text
        .lines()
        .map(|line| {
            let event: Value = serde_json::from_str(line).expect("JSON");
            let id = event["id"].as_str().expect("an id").to_owned();
            id.split(':').nth(2).and_then(|seq| seq.parse().ok()).expect("a sequence")
        })
        .collect();
    sequences.dedup();
    sequences
}

async fn ship(stream: &mut Stream, frames: &mut Frames, until: impl Fn() -> bool) {
    while !until() {
        for _ in 0..8 {
            stream.frame(frames.next()).await;
        }
        stream.acknowledged(frames.seq).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn a_server_is_replaced(remote: &str, url: &str, environment: &[(&str, String)]) {
    let folder = tempfile::tempdir().expect("a folder");
    let (dir, cache) = (folder.path().join("archive"), folder.path().join("cache"));
    let mut frames = Frames::new(NODE, 1);
    frames.events = EVENTS_A_FRAME as usize;
    let first = Process::start(folder.path(), &dir, remote, environment);
    let mut stream = first.stream(0).await;
    ship(&mut stream, &mut frames, || first.metric("remote_uploaded_segments_total") >= 2.0).await;
    // A segment was just closed: what comes now is acknowledged, and nobody has it but this disk.
    for _ in 0..8 {
        stream.frame(frames.next()).await;
    }
    stream.acknowledged(frames.seq).await;
    first.kill();
    std::fs::remove_dir_all(&dir).expect("wiped");
    let acknowledged = frames.seq;
    let there = sequences(&cache, environment, url);
    let uploaded = there.len() as u64;
    assert!(
        there.iter().copied().eq(1..=uploaded) && uploaded > 0 && uploaded < acknowledged,
        "{uploaded} of {acknowledged}"
    );

    // The node comes to the one that takes its place.
    let second = Process::start(folder.path(), &dir, remote, environment);
    let mut stream = second.stream(acknowledged).await;
    let begun = frames.seq;
    for _ in 0..8 {
        stream.frame(frames.next()).await;
    }
    stream.acknowledged(frames.seq).await;
    let (in_remote, lost) = (uploaded * EVENTS_A_FRAME, (acknowledged - uploaded) * EVENTS_A_FRAME);
    wait_until("the new server knows what the remote archive has", || {
        second.metric("remote_elsewhere_uploaded_events") == in_remote as f64
            && second.metric("remote_elsewhere_missing_events") == lost as f64
    });
    let text = second.tapioctl(&["ledger"]);
    assert!(text.contains(&format!("{in_remote} of them archive.remote has")), "{text}");
    assert!(text.contains(&format!("{lost} of them archive.remote lacks")), "{text}");
    // It answers for what its predecessor uploaded, and reads that once. What is on its own disk costs the store nothing.
    let events = |since: &str| {
        let arguments = ["events", "--since", since, "--limit", "1000000", "-o", "json"];
        second.tapioctl(&arguments).lines().count() as u64
    };
    let newest = 1_700_000_000 + begun + 2;
    assert_eq!(events(&rfc3339(newest)), 7 * EVENTS_A_FRAME);
    assert_eq!(second.metric("remote_read_bytes_total"), 0.0);
    for _ in 0..2 {
        assert_eq!(events(&rfc3339(1_700_000_000)), (uploaded + 8) * EVENTS_A_FRAME);
    }
    let read = second.metric("remote_read_bytes_total");
    assert!(read > 0.0 && read <= 2.0 * (8 << 20) as f64, "{read}");
    drop(stream);
    second.terminate();
    // Everything that was acknowledged and is not stated as lost is there, once, in two lives of one server.
    let there = sequences(&cache, environment, url);
    assert!(there.iter().copied().eq((1..=uploaded).chain(begun + 1..=frames.seq)), "{there:?}");
    let (output, text) = command(&cache, environment, &["archive", "verify", url]);
    assert!(output.status.success(), "{text}");
    assert_eq!(text.matches("archive test/server-0/").count(), 2, "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_servers_successor_counts_what_was_only_local() {
    let remote = tempfile::tempdir().expect("a folder");
    let url = format!("file://{}", remote.path().display());
    a_server_is_replaced(&format!("url: '{url}'"), &url, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_server_on_s3_is_replaced_alike() {
    let Some(server) = S3::start() else { return };
    let url = "s3://archive/tapio";
    let keys = tempfile::tempdir().expect("a folder");
    let file = s3(server.port(), keys.path()).credentials_file.expect("a file");
    let remote = format!(
        "url: '{url}', endpoint: 'http://127.0.0.1:{}', allow_http: true, credentials_file: {}",
        server.port(),
        file.display()
    );
    a_server_is_replaced(&remote, url, &s3_environment(server.port())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_server_on_azure_is_replaced_alike() {
    let Some(server) = Azure::start() else { return };
    let url = "az://archive/tapio";
    let remote = format!("url: '{url}', endpoint: '{}', allow_http: true", server.endpoint());
    a_server_is_replaced(&remote, url, &server.environment()).await;
}
