//! Frames as a whole: round trips, golden bytes, and bytes of a hostile or broken peer.

mod every_kind;

use std::path::Path;

use proptest::prelude::*;
use tapio_wire::compress::Compression;
use tapio_wire::error::FrameError;
use tapio_wire::event::{Body, Lane, Source};
use tapio_wire::frame::{Encoder, Frame, HEADER_BYTES, Header, Stamp, restamp};
use tapio_wire::ledger::{Ledger, Reason, Stage};
use tapio_wire::node_id;

use every_kind::{every_kind, every_kind_of_version_2, every_kind_of_version_3};

fn stamp() -> Stamp {
    Stamp {
        node: node_id("node-1"),
        epoch: 1_700_000_000_000_000_000,
        seq: 3,
        boottime_ns: 100,
        realtime_ns: 200,
        is_final: false,
    }
}

fn ledger() -> Ledger {
    let mut ledger = Ledger::default();
    let account = ledger.account_mut(Source::Ebpf);
    account.emitted = 20;
    account.shipped = 13;
    account.drop_events(Stage::Ring, Reason::Full, 5);
    ledger
}

const COMPRESSIONS: [Compression; 3] = [Compression::Rows, Compression::Lz4, Compression::None];

fn frame(body: &Body, compression: Compression) -> Vec<u8> {
    let sealed = Encoder::default().seal(body, Lane::Lethal, compression).expect("within the limits");
    sealed.stamp(&stamp(), &ledger()).to_vec()
}

#[test]
fn a_restamped_frame_has_another_place_and_the_same_content() {
    let mut bytes = frame(&every_kind(), Compression::Rows);
    let moved = restamp(&bytes, 9, 1, |ledger| {
        let mut ledger = *ledger;
        ledger.account_mut(Source::Ebpf).drop_events(Stage::Outbox, Reason::Malformed, 2);
        ledger
    });
    let moved = Frame::decode(&moved.expect("a sound frame")).expect("a sound frame");
    let before = Frame::decode(&bytes).expect("sound");
    assert_eq!((moved.header().epoch, moved.header().seq), (9, 1));
    assert_eq!(moved.header().boottime_ns, before.header().boottime_ns);
    assert_eq!(moved.ledger().account(Source::Ebpf).dropped_total(), 7);
    let read = |frame: &Frame| rkyv::deserialize::<Body, rkyv::rancor::Error>(frame.body()).expect("deserialised");
    assert_eq!(read(&moved), read(&before));
    bytes[HEADER_BYTES] ^= 1;
    let legible = Header::check_without_payload(&bytes).expect("the header is sound");
    assert_eq!((legible.0, legible.1), (*before.header(), *before.ledger()));
    bytes[HEADER_BYTES] ^= 1;
    // A damaged one must not get a sound checksum.
    for (at, error) in [(32, FrameError::HeaderChecksum), (HEADER_BYTES, FrameError::PayloadChecksum)] {
        bytes[at] ^= 1;
        assert_eq!(restamp(&bytes, 9, 1, |ledger| *ledger), Err(error));
        bytes[at] ^= 1;
    }
}

#[test]
fn every_kind_of_event_survives_the_wire() {
    let body = every_kind();
    for compression in COMPRESSIONS {
        let decoded = Frame::decode(&frame(&body, compression)).expect("sound");
        let read = rkyv::deserialize::<Body, rkyv::rancor::Error>(decoded.body()).expect("deserialised");
        assert_eq!(read, body);
        assert_eq!(*decoded.ledger(), ledger());
        let header = decoded.header();
        assert_eq!((header.node, header.seq, header.lethal_events), (node_id("node-1"), 3, 30));
        assert_eq!((header.first_time_ns, header.last_time_ns, header.source_events[0]), (1, 30, 30));
    }
}

/// The bytes of older versions, as the archive of an older server holds them: this build must go on reading them.
#[test]
fn the_golden_frames_of_older_versions_are_read() {
    let bodies: [(u8, fn() -> Body); 2] = [(1, every_kind), (2, every_kind_of_version_2)];
    for (version, body) in bodies {
        for ending in ["", "-rows"] {
            let file = format!("tests/golden/frame-v{version}{ending}.bin");
            let golden = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(&file));
            let golden = golden.expect("the golden frames are part of the repository");
            let decoded = Frame::decode(&golden).expect("sound");
            assert_eq!(rkyv::deserialize::<Body, rkyv::rancor::Error>(decoded.body()).expect("deserialised"), body());
        }
    }
}

/// The bytes of version 3, which this build writes.
#[test]
fn golden_frames_of_version_3_are_written_and_read() {
    for (compression, file) in [(Compression::None, "frame-v3.bin"), (Compression::Rows, "frame-v3-rows.bin")] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
        let written = frame(&every_kind_of_version_3(), compression);
        if std::env::var_os("TAPIO_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, &written).expect("written");
        }
        let golden = std::fs::read(&path).expect("the golden frames are part of the repository");
        assert_eq!(written, golden, "{file}: the layout changed: raise frame::VERSION and keep reading the old one");
        let decoded = Frame::decode(&golden).expect("sound");
        assert_eq!(
            rkyv::deserialize::<Body, rkyv::rancor::Error>(decoded.body()).expect("deserialised"),
            every_kind_of_version_3()
        );
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    for compression in [Compression::Rows, Compression::Lz4] {
        let good = frame(&every_kind(), compression);
        for bit in 0..good.len() * 8 {
            let mut damaged = good.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Frame::decode(&damaged).is_err(), "bit {bit}");
        }
    }
}

#[test]
fn every_cut_and_every_extension_is_refused() {
    for compression in COMPRESSIONS {
        let good = frame(&every_kind(), compression);
        for length in 0..good.len() {
            assert!(Frame::decode(&good[..length]).is_err(), "cut to {length}");
        }
        let mut longer = good;
        longer.push(0);
        assert!(matches!(Frame::decode(&longer), Err(FrameError::Truncated { .. })));
    }
}

/// Recomputes the checksums, as a hostile peer would.
fn resign(bytes: &mut [u8]) {
    let payload = u32::from_le_bytes(bytes[60..64].try_into().expect("four bytes")) as usize;
    let end = (HEADER_BYTES + payload).min(bytes.len());
    let crc = crc32c::crc32c(&bytes[HEADER_BYTES..end]);
    bytes[64..68].copy_from_slice(&crc.to_le_bytes());
    bytes[68..72].fill(0);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..HEADER_BYTES]), &bytes[end..]);
    bytes[68..72].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn a_declared_size_beyond_the_limits_is_refused_without_allocation() {
    for compression in COMPRESSIONS {
        for raw in [u32::MAX, 9 << 20, 1 << 20] {
            let mut bomb = frame(&Body::default(), compression);
            bomb[56..60].copy_from_slice(&raw.to_le_bytes());
            resign(&mut bomb);
            assert!(matches!(Frame::decode(&bomb), Err(FrameError::DeclaredSize { .. })), "{compression:?} {raw}");
        }
    }
    let mut long = frame(&Body::default(), Compression::Lz4);
    long[60..64].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(Frame::decode(&long), Err(FrameError::TooLong { .. })));
}

#[test]
fn a_header_that_contradicts_its_body_is_refused() {
    let lying = |compression| {
        let mut lying = frame(&every_kind(), compression);
        lying[48..52].copy_from_slice(&12u32.to_le_bytes());
        lying[80..84].copy_from_slice(&12u32.to_le_bytes());
        resign(&mut lying);
        Frame::decode(&lying)
    };
    assert!(matches!(lying(Compression::Lz4), Err(FrameError::Contradiction { .. })));
    // Rows cannot even be distinguished by a wrong number of them.
    assert!(matches!(lying(Compression::Rows), Err(FrameError::Compression)));
    let mut two_ways = frame(&every_kind(), Compression::Lz4);
    two_ways[6] |= 8;
    resign(&mut two_ways);
    assert!(matches!(Frame::decode(&two_ways), Err(FrameError::Compression)));
    let mut unbalanced = frame(&every_kind(), Compression::Lz4);
    unbalanced[48..52].copy_from_slice(&12u32.to_le_bytes());
    resign(&mut unbalanced);
    assert!(matches!(Frame::decode(&unbalanced), Err(FrameError::Contradiction { .. })));
}

#[test]
fn an_unknown_version_says_what_to_do() {
    let mut newer = frame(&Body::default(), Compression::Lz4);
    newer[4..6].copy_from_slice(&(tapio_wire::frame::VERSION + 1).to_le_bytes());
    resign(&mut newer);
    let error = Frame::decode(&newer).err().expect("refused");
    assert!(error.to_string().contains("upgrade the servers first"), "{error}");
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        prop_assert!(Frame::decode(&bytes).is_err());
        let _ = Header::peek(&bytes);
    }

    /// Payloads that pass every checksum, but are not what the archive's types demand.
    #[test]
    fn resigned_mutations_are_refused_or_read_within_bounds(
        flips in proptest::collection::vec((0usize..4096, any::<u8>()), 1..8),
        compression in proptest::sample::select(&COMPRESSIONS[..]),
    ) {
        let mut bytes = frame(&every_kind(), compression);
        let end = bytes.len();
        for (at, value) in flips {
            bytes[HEADER_BYTES + at % (end - HEADER_BYTES)] = value;
        }
        resign(&mut bytes);
        if let Ok(frame) = Frame::decode(&bytes) {
            // What was let through can be walked to its last byte.
            let body = frame.body();
            let names: usize = body.names.iter().map(|name| name.len()).sum();
            let sum = body.events.iter().fold(names as u64, |sum, event| {
                sum.wrapping_add(event.time_ns.to_native()).wrapping_add(event.kind() as u64)
            });
            std::hint::black_box(sum);
        }
    }
}
