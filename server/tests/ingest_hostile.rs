//! Frames that no collector sends: out of place, changed, or no frames at all.

use crate::archive_support::*;
use crate::ingest_support::{Running, blamed_for, start};
use bytes::Bytes;
use tapio_server::archive::lock_books;
use tapio_wire::frame::HEADER_BYTES;
use tonic::{Code, Status};

/// Sends one good frame, then `bytes`; returns how the stream ended.
async fn ended_by(server: &Running, name: &str, bytes: impl FnOnce(&mut Frames) -> Bytes) -> Status {
    let mut frames = Frames::new(name, 1);
    let (mut client, _) = server.stream(name, 1).await;
    client.frame(frames.next()).await;
    client.acknowledged(1).await;
    client.frame(bytes(&mut frames)).await;
    client.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_out_of_place_are_refused_and_counted() {
    type Bad = fn(&mut Frames) -> Bytes;
    let cases: [(&str, Code, &str, Bad); 6] = [
        ("a", Code::PermissionDenied, "foreign_node", |_| Frames::new("other", 1).next()),
        ("b", Code::PermissionDenied, "foreign_epoch", |_| Frames::new("b", 2).next()),
        ("c", Code::InvalidArgument, "sequence_gap", |frames| {
            frames.seq += 1;
            frames.next()
        }),
        ("d", Code::InvalidArgument, "sequence_gap", |frames| {
            frames.seq = u64::MAX - 1;
            frames.next()
        }),
        ("e", Code::InvalidArgument, "sequence_zero", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[24..32].fill(0);
            fix_header(bytes)
        }),
        ("f", Code::InvalidArgument, "contradiction", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[52] += 1;
            bytes[80] += 1;
            fix_header(bytes)
        }),
    ];
    let server = start().await;
    for (name, code, reason, bad) in cases {
        let before = server.metrics.refused(reason);
        let status = ended_by(&server, name, bad).await;
        assert_eq!(status.code(), code, "{reason}: {status}");
        assert_eq!(server.metrics.refused(reason), before + 1, "{reason}");
        // A frame of another node or epoch is on the wrong stream: it is sound by itself.
        let blamed = (code == Code::InvalidArgument).then_some(reason);
        assert_eq!(blamed_for(&status), blamed, "{status}");
    }
    assert_eq!(lock_books(server.archive.books()).totals().frames, 6, "the good ones alone");
}

/// Makes a changed header match its checksum again.
fn fix_header(mut bytes: Vec<u8>) -> Bytes {
    let payload = u32::from_le_bytes(bytes[60..64].try_into().unwrap()) as usize;
    let crc = crc32c::crc32c(&bytes[HEADER_BYTES..HEADER_BYTES + payload]);
    bytes[64..68].copy_from_slice(&crc.to_le_bytes());
    bytes[68..72].fill(0);
    let crc = crc32c::crc32c(&bytes[..HEADER_BYTES]);
    let crc = crc32c::crc32c_append(crc, &bytes[HEADER_BYTES + payload..]);
    bytes[68..72].copy_from_slice(&crc.to_le_bytes());
    bytes.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_bytes_are_refused_before_they_are_archived() {
    type Bad = fn(&mut Frames) -> Bytes;
    let cases: [(&str, &str, Bad); 7] = [
        ("a", "magic", |_| vec![0x5a; 4096].into()),
        ("b", "truncated", |_| Bytes::new()),
        ("c", "truncated", |frames| frames.next().slice(..HEADER_BYTES)),
        ("d", "header_checksum", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[32] ^= 1;
            bytes.into()
        }),
        ("e", "payload_checksum", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[HEADER_BYTES] ^= 1;
            bytes.into()
        }),
        // It declares a body of 4 GiB.
        ("f", "declared_size", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[56..60].fill(0xff);
            fix_header(bytes)
        }),
        // A payload that is none of its compression, with checksums that are right.
        ("g", "compression", |frames| {
            let mut bytes = frames.next().to_vec();
            bytes[HEADER_BYTES..HEADER_BYTES + 8].fill(0xff);
            fix_header(bytes)
        }),
    ];
    let server = start().await;
    for (name, reason, bad) in cases {
        let before = server.metrics.refused(reason);
        let status = ended_by(&server, name, bad).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{reason}: {status}");
        assert_eq!(server.metrics.refused(reason), before + 1, "{reason}: {status}");
        assert_eq!(blamed_for(&status), Some(reason), "{status}");
    }
    assert_eq!(lock_books(server.archive.books()).totals().frames, 7, "the good ones alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_with_any_byte_changed_never_harms_the_server() {
    let server = start().await;
    let mut frames = Frames::new("node-1", 1);
    frames.events = 3;
    let good = frames.next();
    for at in (0..good.len()).step_by(3) {
        let mut bytes = good.to_vec();
        bytes[at] ^= 0x41;
        // With right checksums the change reaches the deeper checks.
        let bytes = if at < 60 || (64..72).contains(&at) { bytes.into() } else { fix_header_if(bytes) };
        let name = format!("node-{at}");
        let (client, _) = server.stream(&name, 1).await;
        client.frame(bytes).await;
        let status = client.end().await;
        assert_ne!(status.code(), Code::Ok, "byte {at}");
    }
    let (mut client, _) = server.stream("node-1", 1).await;
    client.frame(good).await;
    client.acknowledged(1).await;
}

fn fix_header_if(bytes: Vec<u8>) -> Bytes {
    let payload = u32::from_le_bytes(bytes[60..64].try_into().unwrap()) as usize;
    if HEADER_BYTES + payload <= bytes.len() { fix_header(bytes) } else { bytes.into() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_beyond_the_limit_is_refused() {
    let server = start().await;
    let (client, _) = server.stream("node-1", 1).await;
    client.frame(vec![0; 5 << 20]).await;
    assert_eq!(client.end().await.code(), Code::OutOfRange);
    assert_eq!(server.metrics.refused("message"), 1);
}
