//! Limits of the ingest: rates that are held without dropping, the age of streams, how many there may be.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::archive_support::*;
use crate::whole_server::*;
use bytes::Bytes;
use prometheus::Registry;
use tapio_server::ingest::{
    CREDIT_BYTES_HELD, FrameSink, IngestConfig, IngestMetrics, IngestService, Limits, settings,
};
use tapio_wire::event::Lane;
use tapio_wire::frame::Frame;
use tapio_wire::service::{Ack, ship_response};
use tonic::Code;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};

struct Nowhere;

impl FrameSink for Nowhere {
    async fn deliver(&self, _node: &Arc<str>, _frame: Arc<Frame>) {}
}

/// An ingest with limits, its metrics, and a way to it.
struct Limited {
    metrics: Arc<IngestMetrics>,
    address: std::net::SocketAddr,
    _archive: tapio_server::archive::Archive,
    _dir: tempfile::TempDir,
}

impl Limited {
    async fn start(config: IngestConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let archive = open(plain(dir.path()));
        let metrics = Arc::new(IngestMetrics::register(&Registry::new()).unwrap());
        let service = IngestService::with(&archive, Nowhere, Arc::clone(&metrics), config);
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = incoming.local_addr().unwrap();
        tokio::spawn(settings(Server::builder(), 100).add_service(service.server()).serve_with_incoming(incoming));
        Self { metrics, address, _archive: archive, _dir: dir }
    }

    async fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    async fn stream(&self, node: &str) -> Stream {
        let mut stream = Stream::open(self.channel().await, "", hello(node, 1)).await.unwrap();
        stream.welcome().await.unwrap();
        stream
    }
}

fn frames(node: &str, events: usize, count: usize) -> Vec<Bytes> {
    let mut frames = Frames::new(node, 1);
    frames.events = events;
    (0..count).map(|_| frames.next()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_event_rate_delays_without_drops_and_lethal_events_pass() {
    let server = Whole::start(|config| config.server.max_events_per_sec = 2000).await;
    let mut stream = Stream::open(server.channel().await, "", hello("busy", 1)).await.unwrap();
    stream.welcome().await.unwrap();
    let began = Instant::now();
    for frame in frames("busy", 500, 8) {
        stream.frame(frame).await;
    }
    // Another node's death, while four seconds' worth of bulk waits.
    let mut lethal = Stream::open(server.channel().await, "", hello("dying", 1)).await.unwrap();
    lethal.welcome().await.unwrap();
    let mut death = Frames::new("dying", 1);
    death.lane = Lane::Lethal;
    lethal.frame(death.next()).await;
    lethal.acknowledged(1).await;
    assert!(server.metric("tapio_server_ingest_events_total", &["lane=\"bulk\""]) < 4000.0, "it did not wait for them");

    let mut credits = Vec::new();
    loop {
        match stream.response().await.unwrap() {
            ship_response::Kind::Ack(Ack { durable_seq, credit_bytes, .. }) => {
                credits.push(credit_bytes);
                if durable_seq == 8 {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    // 4,000 events at 2,000 a second; the burst of 500 and the last frame are not waited for.
    assert!(began.elapsed() >= Duration::from_millis(1400), "{:?}", began.elapsed());
    assert!(credits.contains(&CREDIT_BYTES_HELD), "{credits:?}");
    assert_eq!(server.metric("tapio_server_ingest_events_total", &["lane=\"bulk\""]), 4000.0, "all of them came");
    let waited = server.metric("tapio_server_ingest_throttled_seconds_total", &["limit=\"events\""]);
    assert!(waited >= 1.0, "{waited}");
    assert_eq!(server.metric("tapio_ledger_unexplained_events", &[]), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nodes_byte_rate_holds_across_reconnects() {
    let frames = frames("node-1", 100, 40);
    let (sum, longest) = (frames.iter().map(Bytes::len).sum::<usize>(), frames.iter().map(Bytes::len).max().unwrap());
    // Two seconds for all of them.
    let per_second = sum as u64 / 2;
    let limits = Limits { node_bytes_per_second: per_second, ..Limits::default() };
    let server = Limited::start(IngestConfig { limits, ..IngestConfig::default() }).await;
    let began = Instant::now();
    for (index, part) in frames.chunks(10).enumerate() {
        let mut stream = server.stream("node-1").await;
        for frame in part {
            stream.frame(frame.clone()).await;
        }
        stream.acknowledged(10 * (index as u64 + 1)).await;
    }
    // The burst of a quarter of a second and the last frame are not waited for.
    let least = (sum - longest) as f64 / per_second as f64 - 0.25;
    assert!(began.elapsed().as_secs_f64() >= least - 0.01, "{sum} bytes within {:?}", began.elapsed());
    assert_eq!(server.metrics.duplicates(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_stream_is_asked_to_move_then_cut() {
    let config = IngestConfig {
        connection_age: Duration::from_millis(300),
        move_on_grace: Duration::from_millis(500),
        ..IngestConfig::default()
    };
    let server = Limited::start(config).await;
    let frames = frames("node-1", 1, 4);
    let mut stream = server.stream("node-1").await;
    stream.frame(frames[0].clone()).await;
    loop {
        match stream.response().await.unwrap() {
            ship_response::Kind::Ack(ack) if ack.move_on => break,
            _ => {}
        }
    }
    // What was under way is taken and acknowledged, and the stream ends well.
    stream.frame(frames[1].clone()).await;
    let Stream { requests, mut responses } = stream;
    drop(requests);
    let mut last = 0;
    while let Some(response) = responses.message().await.expect("it ends well") {
        if let Some(ship_response::Kind::Ack(ack)) = response.kind {
            last = ack.durable_seq;
        }
    }
    assert_eq!(last, 2);

    // One that goes on is cut; what was accepted is acknowledged before.
    let mut stubborn = server.stream("node-1").await;
    stubborn.frame(frames[2].clone()).await;
    stubborn.acknowledged(3).await;
    let status = stubborn.end().await;
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("max_connection_age"), "{status}");
    let mut after = server.stream("node-1").await;
    after.frame(frames[3].clone()).await;
    after.acknowledged(4).await;
    assert_eq!(server.metrics.duplicates(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_are_limited_and_a_node_may_always_return() {
    let server = Whole::start(|config| {
        config.server.max_concurrent_streams = 2;
        config.server.max_batch_size = 1000;
    })
    .await;
    let open = async |node: &str| Stream::open(server.channel().await, "", hello(node, 1)).await;
    let mut one = open("one").await.unwrap();
    assert_eq!(one.welcome().await.unwrap().frame_events, 1000, "max_batch_size is announced");
    let mut two = open("two").await.unwrap();
    two.welcome().await.unwrap();
    let mut three = open("three").await.unwrap();
    let status = three.welcome().await.expect_err("there are two");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("max_concurrent_streams"), "{status}");
    assert_eq!(server.metric("tapio_server_ingest_refused_total", &["reason=\"too_many_streams\""]), 1.0);
    let mut again = open("one").await.unwrap();
    again.welcome().await.expect("its old stream does not stand in its way");
    assert_eq!(one.end().await.code(), Code::Aborted);
    drop(two);
    server.until_metric("tapio_server_ingest_streams", &[], |streams| streams <= 1.0).await;
    let mut three = open("three").await.unwrap();
    three.welcome().await.expect("there is room");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_metric_has_help_and_the_needed_ones_exist() {
    let server = Whole::start(|_| {}).await;
    let mut stream = Stream::open(server.channel().await, "", hello("node-1", 1)).await.unwrap();
    stream.welcome().await.unwrap();
    stream.frame(Frames::new("node-1", 1).next()).await;
    stream.acknowledged(1).await;
    server.until_metric("tapio_server_correlate_frame_seconds_count", &[], |count| count >= 1.0).await;
    let (_, text) = server.get("/metrics", "");
    let mut names = Vec::new();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("# HELP ") else { continue };
        let (name, help) = rest.split_once(' ').expect("a help text");
        assert!(help.len() > 10 && help.ends_with('.'), "{line}");
        names.push(name.to_owned());
    }
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').expect("a type");
        match kind {
            "counter" => assert!(name.ends_with("_total"), "{line}"),
            "histogram" => assert!(name.ends_with("_seconds") || name.ends_with("_bytes"), "{line}"),
            _ => assert!(!name.ends_with("_total"), "{line}"),
        }
    }
    for wanted in [
        "tapio_server_ingest_accept_seconds",
        "tapio_server_archive_commit_seconds",
        "tapio_server_archive_backlog_bytes",
        "tapio_server_correlate_frame_seconds",
        "tapio_server_correlate_queue_frames",
        "tapio_server_correlate_events_total",
        "tapio_server_correlate_entities",
        "tapio_server_correlate_evicted_entities_total",
        "tapio_server_described_entities",
        "tapio_server_finder_clue_seconds",
        "tapio_server_finder_queue_clues",
        "tapio_server_kernel_to_finding_seconds",
        "tapio_server_findings",
        "tapio_server_ingest_throttled_seconds_total",
        "tapio_server_ingest_streams",
        "tapio_server_memory_short",
        "tapio_ledger_unexplained_events",
    ] {
        assert!(names.iter().any(|name| name == wanted), "{wanted} of {names:?}");
    }
}
