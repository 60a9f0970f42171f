//! What a server reports of events that were acknowledged, though not out of its archive.

use std::path::Path;

use crate::archive_support::Frames;
use crate::whole_server::{Stream, get, hello, sum};
use serde_json::Value;
use tapio_server::config::Config;
use tapio_server::pipeline::Pipeline;
use tonic::transport::Endpoint;

const METRIC: &str = "tapio_server_archive_elsewhere_events_total";

async fn start(dir: &Path) -> Pipeline {
    let mut config = Config::default();
    config.server.address = [127, 0, 0, 1].into();
    config.server.port = 0;
    config.metrics.prometheus_port = 0;
    config.archive.dir = dir.to_owned();
    Pipeline::start(&config).await.expect("the server starts")
}

/// A node that comes with `acked` frames of ten events that were acknowledged before, and ships one more.
async fn comes(server: &Pipeline, name: &str, acked: u64) -> Stream {
    let mut frames = Frames::new(name, 1);
    frames.events = 10;
    for _ in 0..acked {
        frames.next();
    }
    let url = format!("http://{}", server.grpc_address);
    let channel = Endpoint::from_shared(url).expect("a URL").connect().await.expect("it listens");
    let mut hello = hello(name, 1);
    (hello.acked_seq, hello.acked_events) = (acked, vec![acked * 10]);
    let mut stream = Stream::open(channel, "", hello).await.expect("it is taken");
    stream.welcome().await.expect("welcome");
    stream.frame(frames.next()).await;
    stream.acknowledged(acked + 1).await;
    stream
}

fn counted(server: &Pipeline, kind: &str, source: &str) -> f64 {
    let (_, text) = get(server.http_address, "/metrics", "");
    let labels = [format!("kind=\"{kind}\""), format!("source=\"{source}\"")];
    assert!(text.contains(METRIC), "{text}");
    sum(&text, METRIC, &labels.each_ref().map(String::as_str))
}

async fn tapioctl(server: &Pipeline, arguments: &[&str]) -> String {
    crate::programs::printed(crate::programs::output(crate::programs::tapioctl(server.grpc_address, arguments)).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_disk_is_distinguished_from_another_server() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = start(dir.path()).await;
    assert_eq!(counted(&server, "empty_archive", "ebpf"), 0.0, "the series are there from the start on");
    let text = tapioctl(&server, &["ledger"]).await;
    assert!(!text.contains("ELSEWHERE"), "{text}");
    // Every node had frames acknowledged, and the archive has none.
    let streams = (comes(&server, "node-1", 7).await, comes(&server, "node-2", 3).await);
    assert_eq!((counted(&server, "empty_archive", "ebpf"), counted(&server, "another_server", "ebpf")), (100.0, 0.0));
    let text = tapioctl(&server, &["ledger"]).await;
    assert!(text.contains("ELSEWHERE") && text.contains("100 events were acknowledged elsewhere"), "{text}");
    assert!(text.contains("100 since the start, empty_archive"), "{text}");
    let row: Value =
        serde_json::from_str(tapioctl(&server, &["ledger", "-o", "json", "--node", "node-1"]).await.trim())
            .expect("one row");
    let numbers = ["emitted", "archived", "elsewhere"].map(|key| row[key].as_u64());
    assert_eq!(numbers, [Some(10), Some(10), Some(70)]);
    drop(streams);
    server.shutdown().await.expect("it ends");

    // The same archive has a history now: whoever comes was with another server.
    let server = start(dir.path()).await;
    let stream = comes(&server, "node-3", 2).await;
    assert_eq!((counted(&server, "empty_archive", "ebpf"), counted(&server, "another_server", "ebpf")), (0.0, 20.0));
    let text = tapioctl(&server, &["ledger"]).await;
    assert!(text.contains("120 events were acknowledged elsewhere"), "{text}");
    assert!(text.contains("20 since the start, another_server") && !text.contains("empty_archive"), "{text}");
    let status: Value = serde_json::from_str(tapioctl(&server, &["status", "-o", "json"]).await.trim()).expect("JSON");
    let expected = serde_json::json!([{"kind": "another_server", "source": "ebpf", "events": 20}]);
    assert_eq!(status["elsewhere"], expected);
    drop(stream);
    server.shutdown().await.expect("it ends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nodes_claim_makes_no_count_go_round() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = start(dir.path()).await;
    let mut streams = Vec::new();
    for name in ["node-1", "node-2"] {
        let url = format!("http://{}", server.grpc_address);
        let channel = Endpoint::from_shared(url).expect("a URL").connect().await.expect("it listens");
        let mut hello = hello(name, 1);
        (hello.acked_seq, hello.acked_events) = (5, vec![u64::MAX; 100]);
        let mut stream = Stream::open(channel, "", hello).await.expect("it is taken");
        stream.welcome().await.expect("welcome");
        let mut frames = Frames::new(name, 1);
        frames.seq = 5;
        stream.frame(frames.next()).await;
        stream.acknowledged(6).await;
        streams.push(stream);
    }
    assert!(counted(&server, "empty_archive", "kube") >= u64::MAX as f64);
    let text = tapioctl(&server, &["ledger"]).await;
    assert!(text.contains(&format!("{} events were acknowledged elsewhere", u64::MAX)), "{text}");
    drop(streams);
    server.shutdown().await.expect("it ends");
}
