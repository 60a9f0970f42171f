//! Requests about the past read the parts of remote segments that they need, and say what they could not read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tapio_server::archive::ArchiveConfig;
use tapio_server::archive::reader::Reader;
use tapio_server::events::{self, Choice, Outcome};
use tapio_server::query::EventSource;
use tapio_server::remote::{History, Names, Past, Read, RemoteMetrics, RemoteSection};
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Detail, Entity, EntityKind, Event, Lane, Source, Tcp};
use tapio_wire::frame::{Encoder, Stamp};
use tapio_wire::ledger::Ledger;

use crate::archive_support::*;
use crate::remote_support::*;
use crate::whole_server::Whole;

const SECOND_NS: u64 = 1_000_000_000;
const BEGIN_NS: u64 = 1_700_000_000 * SECOND_NS;
/// Events of a frame, frames of a pod, and pods one after another.
const FRAME: u64 = 500;
const FRAMES: u64 = 12;
const PODS: u64 = 40;
const NODE: &str = "node-1";

/// A frame of connections, which do not compress; its pod is described in it.
fn frame(encoder: &mut Encoder, ledger: &mut Ledger, random: &mut u64, seq: u64) -> Vec<u8> {
    let entity = 1000 + (seq - 1) / FRAMES;
    let name = format!("web-{}", entity - 1000);
    let mut body = Body::default();
    body.entities.push(Entity {
        namespace: "shop".into(),
        pod: name.clone(),
        pod_uid: format!("8f1c2d3e-4a5b-6c7d-8e9f-{entity:012x}"),
        ..Entity::named(EntityKind::Pod, entity, format!("shop/{name}"))
    });
    let mut next = || {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u128::from(*random ^ (*random >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
    };
    for index in 0..FRAME {
        let tcp = Tcp {
            source: next().to_le_bytes(),
            destination: next().to_le_bytes(),
            duration_us: next() as u32,
            kib_sent: next() as u32,
            kib_received: next() as u32,
            source_port: next() as u16,
            destination_port: next() as u16,
            change: 4,
            active: true,
        };
        let time_ns = seq * SECOND_NS + index;
        body.events.push(Event { time_ns, entity, pid: 1, source: Source::Ebpf, body: Detail::Tcp(tcp) });
    }
    let account = ledger.account_mut(Source::Ebpf);
    account.emitted += FRAME;
    account.shipped += FRAME;
    let sealed = encoder.seal(&body, Lane::Bulk, Compression::Lz4).expect("a small body fits");
    let (boottime_ns, realtime_ns) = (seq * SECOND_NS + FRAME, BEGIN_NS + seq * SECOND_NS + FRAME);
    let stamp = Stamp { node: tapio_wire::node_id(NODE), epoch: 1, seq, boottime_ns, realtime_ns, is_final: false };
    sealed.stamp(&stamp, ledger).to_vec()
}

fn config(dir: &Path) -> ArchiveConfig {
    ArchiveConfig { segment_bytes: 2 << 20, ..plain(dir) }
}

/// Appends all frames to an archive that is uploaded.
fn upload(dir: &Path, section: &RemoteSection) {
    let uploaded = Uploaded::open(config(dir), section);
    let (mut encoder, mut ledger, mut random) = (Encoder::default(), Ledger::default(), 7);
    let receiver = Arc::new(Receiver::default());
    for seq in 1..=PODS * FRAMES {
        let bytes = frame(&mut encoder, &mut ledger, &mut random, seq).into();
        append(&uploaded.archive, append_of(&bytes, &NODE.into(), &receiver));
        receiver.wait_for(seq);
    }
    uploaded.end(GRACE);
}

/// A server's history, whose own disk is empty.
fn history(dir: &Path, section: &RemoteSection) -> History {
    let own = open(plain(dir));
    own.shutdown();
    let metrics = RemoteMetrics::register(&prometheus::Registry::new()).expect("registered");
    let names = Names { cluster: "test".into(), server: "server-9".into() };
    History::new(section, &names, dir, &metrics).expect("a cache")
}

fn choice(pod: &str) -> Choice {
    let (since_ns, limit) = (BEGIN_NS - 1, 1_000_000);
    Choice { since_ns, limit, pod: pod.into(), reads_remote: true, tells_remote: true, ..Choice::default() }
}

/// Events of the pod, by sequence, what was read, and what the answer says it lacks.
fn asked(dir: &Path, section: &RemoteSection, choice: Choice) -> (Vec<u64>, Read, Option<String>) {
    let source = EventSource::new(dir).with_history(Some(history(dir, section)));
    let (mut found, mut incomplete) = (Vec::new(), None);
    let ended = block_on(async {
        let (mut events, ended) = source.stream(choice).expect("nobody else reads");
        while let Some(event) = events.recv().await {
            let event = event.unwrap_or_else(|error| panic!("{error}"));
            if let Some(part) = event.incomplete.first() {
                incomplete = Some(part.reason.clone());
            }
            if !event.id.is_empty() {
                assert_eq!(event.entity.as_ref().map(|entity| entity.node.as_str()), Some(NODE));
                found.push(event.id.split(':').nth(2).and_then(|seq| seq.parse().ok()).expect("a sequence"));
            }
        }
        ended
    });
    let outcome: Outcome = ended.lock().expect("no panic").take().unwrap_or_default();
    (found, outcome.remote.unwrap_or_default(), incomplete)
}

/// The sequences of a pod's events.
fn expected(pod: u64) -> Vec<u64> {
    (pod * FRAMES + 1..=(pod + 1) * FRAMES).flat_map(|seq| std::iter::repeat_n(seq, FRAME as usize)).collect()
}

fn reads_little(section: &RemoteSection) -> Read {
    let dir = tempfile::tempdir().expect("a folder");
    let (found, read, incomplete) = asked(dir.path(), section, choice("shop/web-7"));
    assert_eq!(found, expected(7));
    assert_eq!(incomplete, None);
    assert!(read.archive_bytes > 12 << 20 && read.segments >= 6, "{read:?}");
    assert!(read.read_bytes > 0 && read.read_bytes < read.archive_bytes / 10, "{read:?}");
    // What was read is here now. Another pod's blocks are not, and the indexes are.
    let (found, again, _) = asked(dir.path(), section, choice("shop/web-7"));
    assert_eq!((found, again.read_bytes), (expected(7), 0));
    let (found, other, incomplete) = asked(dir.path(), section, choice("web-30"));
    assert_eq!((found, incomplete), (expected(30), None));
    assert!(other.read_bytes > 0 && other.read_bytes < read.read_bytes, "{other:?}");
    read
}

#[test]
fn one_pods_blocks_are_read_of_a_folder() {
    let (dir, remote) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let section = folder(remote.path());
    upload(dir.path(), &section);
    reads_little(&section);
    // A minute of everything reads that minute.
    let dir = tempfile::tempdir().expect("a folder");
    let minute = Choice { until_ns: Some(BEGIN_NS + 60 * SECOND_NS - 1), ..choice("") };
    let (found, read, incomplete) = asked(dir.path(), &section, minute);
    assert_eq!((found.len() as u64, incomplete), (59 * FRAME, None));
    assert!(read.read_bytes < read.archive_bytes / 2, "{read:?}");
}

#[test]
fn one_pods_blocks_are_read_of_s3() {
    let Some(server) = S3::start() else { return };
    let (dir, keys) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    upload(dir.path(), &s3(server.port(), keys.path()));
    let gate = Gate::start(server.port(), Fault::None);
    let read = reads_little(&s3(gate.port, keys.path()));
    // The reported bytes are those on the wire, but for heads, lists and manifests.
    let (reported, went) = (read.read_bytes, gate.sent_back());
    assert!(went >= reported && went < read.archive_bytes / 8, "{reported} reported, {went} sent");
}

/// The path of the object that has a sequence, and where in it a byte of that frame stands.
fn place_of(remote: &Path, seq: u64) -> (PathBuf, usize) {
    for name in objects(remote).into_iter().filter(|name| name.ends_with(".segment")) {
        let path = remote.join(name);
        let bytes = std::fs::read(&path).expect("readable");
        let head = [tapio_wire::node_id(NODE), 1, seq].map(u64::to_le_bytes).concat();
        if let Some(at) = bytes.windows(head.len()).position(|window| window == head) {
            return (path, at + 300);
        }
    }
    panic!("no object has frame {seq}");
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).expect("readable");
    bytes[at] ^= 1;
    std::fs::write(path, bytes).expect("written");
}

#[test]
fn a_damaged_range_is_named_and_the_rest_is_answered() {
    let (dir, remote) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let section = folder(remote.path());
    upload(dir.path(), &section);
    let (path, at) = place_of(remote.path(), 7 * FRAMES + 4);
    flip(&path, at);
    // Who does not need it does not notice.
    let own = tempfile::tempdir().expect("a folder");
    let (found, _, incomplete) = asked(own.path(), &section, choice("shop/web-20"));
    assert_eq!((found, incomplete), (expected(20), None));
    let (found, _, incomplete) = asked(own.path(), &section, choice("shop/web-7"));
    let mut rest = expected(7);
    rest.retain(|seq| *seq != 7 * FRAMES + 4);
    assert_eq!(found, rest);
    let said = incomplete.expect("a part is missing");
    assert!(said.contains(".segment is damaged between bytes") && said.contains("events are missing"), "{said}");
    // It is asked for again, and mended there it is whole.
    flip(&path, at);
    let (found, _, incomplete) = asked(own.path(), &section, choice("shop/web-7"));
    assert_eq!((found, incomplete), (expected(7), None));
    // So is a cache that a disk damaged.
    for name in objects(&own.path().join("remote-cache")).into_iter().filter(|name| name.ends_with(".sparse")) {
        let path = own.path().join("remote-cache").join(name);
        if std::fs::metadata(&path).expect("there").len() > at as u64 {
            flip(&path, at);
        }
    }
    let (found, read, incomplete) = asked(own.path(), &section, choice("shop/web-7"));
    assert_eq!((found, incomplete), (expected(7), None));
    assert!(read.read_bytes > 0);
}

#[test]
fn a_segment_without_sound_index_is_read_whole_or_named() {
    let (dir, remote) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let section = folder(remote.path());
    upload(dir.path(), &section);
    let (path, _) = place_of(remote.path(), 7 * FRAMES + 4);
    let bytes = std::fs::metadata(&path).expect("there").len();
    // The index's own checksum.
    flip(&path, bytes as usize - 12);
    let own = tempfile::tempdir().expect("a folder");
    let (found, _, incomplete) = asked(own.path(), &section, choice("shop/web-7"));
    assert!(found.len() < expected(7).len());
    let said = incomplete.expect("a part is missing");
    assert!(said.contains("another checksum"), "{said}");
    flip(&path, bytes as usize - 12);

    // A killed server leaves a segment without one, and the next start uploads it.
    let (killed, copy, remote) = (
        tempfile::tempdir().expect("a folder"),
        tempfile::tempdir().expect("a folder"),
        tempfile::tempdir().expect("a folder"),
    );
    let archive = open(config(killed.path()));
    let (mut encoder, mut ledger, mut random) = (Encoder::default(), Ledger::default(), 7);
    let receiver = Arc::new(Receiver::default());
    for seq in 1..=2 * FRAMES {
        let bytes = frame(&mut encoder, &mut ledger, &mut random, seq).into();
        append(&archive, append_of(&bytes, &NODE.into(), &receiver));
        receiver.wait_for(seq);
    }
    for path in segments(killed.path()) {
        std::fs::copy(&path, copy.path().join(path.file_name().expect("a name"))).expect("copied");
    }
    archive.shutdown();
    let section = folder(remote.path());
    Uploaded::open(config(copy.path()), &section).end(GRACE);
    let own = tempfile::tempdir().expect("a folder");
    let (found, read, incomplete) = asked(own.path(), &section, choice("shop/web-1"));
    assert_eq!((found, incomplete), (expected(1), None));
    assert!(read.read_bytes >= read.archive_bytes, "{read:?}");
}

#[test]
fn a_segment_that_vanishes_is_named() {
    let (dir, remote) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let section = folder(remote.path());
    upload(dir.path(), &section);
    let (path, _) = place_of(remote.path(), 7 * FRAMES + 4);
    let own = tempfile::tempdir().expect("a folder");
    let history = history(own.path(), &section);
    let past = history.before(BEGIN_NS, u64::MAX, true).expect("listed").expect("something");
    // After its index was read, and before its blocks are.
    std::fs::remove_file(&path).expect("removed");
    let reader = Reader::new(own.path()).with_sparse(past.parts(), Arc::<Past>::clone(&past));
    let mut found = 0;
    let outcome = events::select_from(&reader, &choice("shop/web-7"), &mut |_| {
        found += 1;
        std::ops::ControlFlow::Continue(())
    });
    assert!(outcome.is_ok() && found < expected(7).len());
    let said = past.unread().expect("a part is missing");
    assert!(said.contains("is no longer there: up to") && said.contains("events are missing"), "{said}");
    drop((reader, past));
    // Later it is a hole that the snapshots around it count.
    std::fs::remove_dir_all(own.path().join("remote-cache")).expect("removed");
    let (_, _, incomplete) = asked(own.path(), &section, choice("shop/web-20"));
    let said = incomplete.expect("a part is missing");
    assert!(said.contains("is absent") && said.contains("events in"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn why_reads_a_predecessors_segments_and_says_how_much() {
    let (dir, remote) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let section = folder(remote.path());
    let of_upload = (dir.path().to_owned(), section.clone());
    tokio::task::spawn_blocking(move || upload(&of_upload.0, &of_upload.1)).await.expect("uploaded");
    let whole = Whole::start(|config| {
        config.cluster.name = "test".into();
        config.archive.remote = Some(section);
    })
    .await;
    let server = whole.pipeline.grpc_address.to_string();
    let why = |arguments: &'static [&'static str]| {
        let command = crate::programs::tapioctl(server.clone(), arguments);
        tokio::task::spawn_blocking(move || {
            let mut command = command;
            crate::programs::printed(command.output().expect("tapioctl runs"))
        })
    };
    let text = why(&["why", "pod/shop/web-7", "-o", "json"]).await.expect("answered");
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let last = value["last_events"].as_array().expect("a list");
    assert_eq!(last.len(), 20, "{text}");
    assert!(last.iter().all(|event| event["entity"]["pod"] == "web-7"), "{text}");
    let (came, all) = (&value["remote"]["read_bytes"], &value["remote"]["archive_bytes"]);
    assert!(came.as_u64() > Some(0) && came.as_u64() < all.as_u64().map(|all| all / 10), "{came} of {all}");
    let text = why(&["why", "pod/shop/web-7"]).await.expect("answered");
    assert!(text.contains("from archive.remote, which has"), "{text}");
}
