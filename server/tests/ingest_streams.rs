//! Streams over a real gRPC server on the loopback: what is accepted, what is refused, and what is acknowledged when.

use std::sync::Arc;
use std::time::Duration;

use crate::archive_support::*;
use crate::ingest_support::{Recorder, Running, blamed_for, start};
use crate::whole_server::{Stream, hello};
use prometheus::Registry;
use tapio_server::archive::{QUEUE_BYTES_MAX, lock_books};
use tapio_server::ingest::{CREDIT_BYTES, CREDIT_BYTES_MIN, IngestMetrics, IngestService};
use tapio_wire::event::{Lane, Source};
use tapio_wire::frame::VERSION;
use tapio_wire::service::{Hello, ship_response};
use tonic::Code;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_are_archived_delivered_and_then_acknowledged() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 3);
    frames.events = 10;
    let (mut client, welcome) = server.stream("node-1", 3).await;
    assert_eq!((welcome.durable_seq, welcome.credit_bytes, welcome.version), (0, CREDIT_BYTES, u32::from(VERSION)));
    for _ in 0..50 {
        client.frame(frames.next()).await;
    }
    frames.lane = Lane::Lethal;
    client.frame(frames.next()).await;
    let ack = client.acknowledged(51).await;
    assert_eq!(ack.durable_seq, 51);
    assert_eq!(server.durable(&frames), 51);
    assert_eq!(server.recorder.seqs(), (1..=51).collect::<Vec<_>>());
    assert_eq!(&*server.recorder.frames.lock().unwrap()[0].0, "node-1");
    assert_eq!(server.metrics.events(Source::Ebpf, Lane::Bulk), 500);
    assert_eq!(server.metrics.events(Source::Ebpf, Lane::Lethal), 10);
    assert!(server.service.is_connected(frames.node()));
    let books = lock_books(server.archive.books());
    assert_eq!(books.unexplained_total(), 0);
    assert_eq!(books.name(frames.node()).map(|name| &**name), Some("node-1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acks_wait_for_durability_and_credit_shrinks_meanwhile() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (mut client, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.full = true);
    client.frame(frames.next()).await;
    // The acknowledgement that announces less credit.
    let Ok(ship_response::Kind::Ack(ack)) = client.response().await else {
        panic!("no acknowledgement");
    };
    assert_eq!((ack.durable_seq, ack.credit_bytes), (0, CREDIT_BYTES_MIN));
    assert_eq!(server.recorder.seqs(), [1], "correlation does not wait for the disk");
    server.disk.set(|faults| faults.full = false);
    client.acknowledged(1).await;
}

/// FAULTS 9.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_disk_shrinks_credit_and_its_queue_is_bounded() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    frames.events = 60_000;
    let (mut client, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.sync_delay = Duration::from_millis(300));
    let (mut least, mut most) = (CREDIT_BYTES, 0);
    for _ in 0..60 {
        client.frame(frames.next()).await;
        most = most.max(server.archive.stats().backlog_bytes);
    }
    loop {
        let Ok(ship_response::Kind::Ack(ack)) = client.response().await else { panic!("no acknowledgement") };
        least = least.min(ack.credit_bytes);
        most = most.max(server.archive.stats().backlog_bytes);
        if ack.durable_seq == frames.seq {
            break;
        }
    }
    assert!((CREDIT_BYTES_MIN..CREDIT_BYTES).contains(&least), "{least}");
    assert!(most > 0 && most <= QUEUE_BYTES_MAX as u64, "{most}");
    server.disk.set(|faults| faults.sync_delay = Duration::ZERO);
    wait_until("nothing waits any more", || server.archive.stats().backlog_bytes == 0);
    let (_other, welcome) = server.stream("node-2", 1).await;
    assert_eq!(welcome.credit_bytes, CREDIT_BYTES, "it grows again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_closed_stream_is_acknowledged_to_its_end() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (client, _) = server.stream("node-1", 1).await;
    for _ in 0..20 {
        client.frame(frames.next()).await;
    }
    let Stream { requests, mut responses } = client;
    drop(requests);
    let mut last = 0;
    while let Some(response) = responses.message().await.unwrap() {
        if let Some(ship_response::Kind::Ack(ack)) = response.kind {
            last = ack.durable_seq;
        }
    }
    assert_eq!(last, 20);
    wait_until("the node is disconnected", || !server.service.is_connected(frames.node()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_duplicate_is_dropped_and_acknowledged_again() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (first, second) = (frames.next(), frames.next());
    let (mut client, _) = server.stream("node-1", 1).await;
    client.frame(first.clone()).await;
    client.frame(second.clone()).await;
    client.acknowledged(2).await;
    client.frame(second).await;
    client.acknowledged(2).await;
    drop(client);
    // The acknowledgement was lost: a new stream sends everything again.
    let (mut client, welcome) = server.stream("node-1", 1).await;
    assert_eq!(welcome.durable_seq, 2);
    client.frame(first).await;
    client.acknowledged(2).await;
    assert_eq!(server.metrics.duplicates(), 2);
    assert_eq!(server.recorder.seqs(), [1, 2]);
    assert_eq!(lock_books(server.archive.books()).totals().frames, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nodes_later_stream_continues_where_the_earlier_was() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (first, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.full = true);
    first.frame(frames.next()).await;
    wait_until("the frame is accepted", || server.recorder.seqs() == [1]);
    let (mut second, welcome) = server.stream("node-1", 1).await;
    assert_eq!(welcome.durable_seq, 0);
    assert_eq!(first.end().await.code(), Code::Aborted);
    second.frame(frames.next()).await;
    server.disk.set(|faults| faults.full = false);
    // The first stream's frame is acknowledged to the second.
    second.acknowledged(2).await;
    assert_eq!(server.recorder.seqs(), [1, 2]);
    assert!(server.service.is_connected(frames.node()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takeover_works_while_the_earlier_stream_waits_for_room() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    frames.events = 60_000;
    let (client, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.full = true);
    while let Ok(()) = tokio::time::timeout(Duration::from_millis(500), client.frame(frames.next())).await {}
    let backlog = server.archive.stats().backlog_bytes;
    assert!(backlog > QUEUE_BYTES_MAX as u64 / 2, "{backlog} wait");
    let accepted = server.recorder.seqs().len() as u64;
    let (mut second, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.full = false);
    let mut again = Frames::new("node-1", 1);
    again.events = 60_000;
    for _ in 0..=accepted {
        second.frame(again.next()).await;
    }
    second.acknowledged(accepted + 1).await;
    let seqs = server.recorder.seqs();
    assert!(seqs.is_sorted() && seqs.windows(2).all(|pair| pair[0] < pair[1]), "{seqs:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hellos_that_do_not_hold_are_refused() {
    let server = start().await;
    let long = "n".repeat(254);
    let cases = [
        (hello("", 1), Code::InvalidArgument, "node_name"),
        (hello(&long, 1), Code::InvalidArgument, "node_name"),
        (hello("a\nb", 1), Code::InvalidArgument, "node_name"),
        (Hello { node_id: 1, ..hello("node-1", 1) }, Code::FailedPrecondition, "node_id"),
        (Hello { version: 0, ..hello("node-1", 1) }, Code::FailedPrecondition, "hello_version"),
        (Hello { version: u32::from(VERSION) + 1, ..hello("node-1", 1) }, Code::FailedPrecondition, "hello_version"),
    ];
    for (hello, code, reason) in cases {
        let before = server.metrics.refused(reason);
        let client = server.connect().await;
        client.hello(hello).await;
        let status = client.end().await;
        assert_eq!(status.code(), code, "{status}");
        assert_eq!(server.metrics.refused(reason), before + 1, "{reason}");
    }
    let client = server.connect().await;
    client.frame(Frames::new("node-1", 1).next()).await;
    let status = client.end().await;
    assert_eq!((status.code(), blamed_for(&status)), (Code::InvalidArgument, None));
    assert_eq!(server.metrics.refused("no_hello"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_epoch_is_refused_a_newer_starts_over() {
    let server = start().await;
    let mut newer = Frames::new("node-1", 9);
    let (mut client, _) = server.stream("node-1", 9).await;
    client.frame(newer.next()).await;
    client.acknowledged(1).await;
    let old = server.connect().await;
    old.hello(hello("node-1", 8)).await;
    let status = old.end().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(server.metrics.refused("old_epoch"), 1);
    assert!(server.service.is_connected(newer.node()), "the newer one stays");
    let (mut client, welcome) = server.stream("node-1", 10).await;
    assert_eq!(welcome.durable_seq, 0);
    client.frame(Frames::new("node-1", 10).next()).await;
    client.acknowledged(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_server_resumes_after_the_last_durable_frame() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (mut client, _) = server.stream("node-1", 1).await;
    for _ in 0..5 {
        client.frame(frames.next()).await;
    }
    client.acknowledged(5).await;
    let Running { archive, dir, .. } = server;
    archive.shutdown();
    let archive = open(plain(dir.path()));
    let metrics = Arc::new(IngestMetrics::register(&Registry::new()).unwrap());
    let recorder = Arc::new(Recorder::default());
    let service = IngestService::new(&archive, Arc::clone(&recorder), Arc::clone(&metrics));
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    tokio::spawn(Server::builder().add_service(service.server()).serve_with_incoming(incoming));
    let server = Running { disk: FaultyDisk::default(), archive, service, recorder, metrics, address, dir };
    let (mut client, welcome) = server.stream("node-1", 1).await;
    assert_eq!(welcome.durable_seq, 5);
    client.frame(frames.next()).await;
    client.acknowledged(6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_acknowledges_what_was_accepted_and_ends_every_stream() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    let (mut client, _) = server.stream("node-1", 1).await;
    server.disk.set(|faults| faults.sync_delay = Duration::from_millis(100));
    for _ in 0..3 {
        client.frame(frames.next()).await;
    }
    wait_until("the frames are accepted", || server.recorder.seqs().len() == 3);
    let drain = tokio::time::timeout(PATIENCE, server.service.drain());
    let read = async {
        client.acknowledged(3).await;
        client.end().await
    };
    let (drained, status) = tokio::join!(drain, read);
    drained.expect("it drains");
    assert_eq!(status.code(), Code::Unavailable);
    server.archive.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_epoch_goes_on_behind_what_another_server_acknowledged() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    frames.events = 10;
    for _ in 0..7 {
        frames.next();
    }
    let mut client = server.connect().await;
    let acked_events = vec![70];
    client.hello(Hello { acked_seq: 7, acked_events, ..hello("node-1", 1) }).await;
    assert_eq!(client.welcome().await.expect("welcome").durable_seq, 7);
    for _ in 0..3 {
        client.frame(frames.next()).await;
    }
    client.acknowledged(10).await;
    let before = lock_books(server.archive.books()).clone();
    assert_eq!(before.totals().events, 30);
    assert_eq!(before.unexplained_total(), 0);
    let (_, balances) = before.balances(frames.node(), 1).unwrap();
    assert_eq!((balances[0].emitted, balances[0].archived), (30, 30));
    let epoch = before.epoch(frames.node(), 1).unwrap();
    assert_eq!((epoch.missing_frames, epoch.elsewhere[0]), (0, 70));
    // A recovery that has only frames and notes to go by comes to the same.
    let Running { archive, dir, .. } = server;
    archive.shutdown();
    let segment = segments(dir.path()).pop().unwrap();
    let file = std::fs::File::options().write(true).open(segment).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"damage", 64 + 40).unwrap();
    let archive = open(plain(dir.path()));
    let books = lock_books(archive.books());
    assert_eq!(books.epoch(frames.node(), 1), before.epoch(frames.node(), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_of_the_highest_sequence_harms_nobody_else() {
    let server = start().await;
    let mut client = server.connect().await;
    client.hello(Hello { acked_seq: u64::MAX, acked_events: vec![u64::MAX; 100], ..hello("node-1", 1) }).await;
    client.welcome().await.expect("welcome");
    client.frame(Frames::new("node-1", 1).next()).await;
    client.acknowledged(u64::MAX).await;
    assert_eq!(server.metrics.duplicates(), 1);
    let (mut other, _) = server.stream("node-2", 1).await;
    other.frame(Frames::new("node-2", 1).next()).await;
    other.acknowledged(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_frames_is_listed_by_its_hello() {
    let server = start().await;
    let (client, _) = server.stream("silent", 5).await;
    let silent = || {
        let mut nodes = Vec::new();
        server.service.add_connected(&mut nodes);
        // One that is listed already is not listed twice.
        server.service.add_connected(&mut nodes);
        nodes
    };
    let listed = silent();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!((listed[0].node.as_str(), listed[0].connected, listed[0].epochs.len()), ("silent", true, 0));
    drop(client);
    wait_until("it is not listed any more", || silent().is_empty());
}
