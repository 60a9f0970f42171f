use std::io::Write;

use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Detail, Entity, Event, Kind, Lane, Source};
use tapio_wire::frame::{Encoder, Frame, Stamp};
use tapio_wire::ledger::Ledger;
use tapio_wire::segment::{append_record, segment_header};

use super::*;

const SECOND: u64 = 1_000_000_000;
const BOOTED: u64 = 1_700_000_000 * SECOND;

fn frame(seq: u64, entity: u64, is_described: bool) -> Vec<u8> {
    let mut body = Body::default();
    body.events.push(Event {
        time_ns: seq * SECOND,
        entity,
        pid: 1,
        source: Source::Ebpf,
        body: Detail::RunQueue { wait_ns: seq },
    });
    if is_described {
        body.entities.push(Entity::named(EntityKind::Container, entity, format!("web-{entity}")));
    }
    let sealed = Encoder::default().seal(&body, Lane::Bulk, Compression::Lz4).expect("a small body fits");
    let stamp = Stamp {
        node: 3,
        epoch: 1,
        seq,
        boottime_ns: seq * SECOND + 5,
        realtime_ns: BOOTED + seq * SECOND + 5,
        is_final: false,
    };
    sealed.stamp(&stamp, &Ledger::default()).to_vec()
}

fn add(builder: &mut IndexBuilder, offset: u64, bytes: &[u8]) {
    let frame = Frame::decode(bytes).expect("a frame as it was packed");
    builder.add(offset, bytes.len(), frame.header(), Some(&Summary::of(&frame)));
}

#[test]
fn what_was_added_is_found_where_it_is() {
    let mut builder = IndexBuilder::default();
    for entity in 1..=100u64 {
        add(&mut builder, 64 + (entity - 1) * BLOCK_BYTES, &frame(entity, entity, entity <= 10));
    }
    let content = builder.finish(9, 100 * BLOCK_BYTES);
    let index = Index::decode(&content, 9).expect("a sound index");
    assert_eq!((index.frames, index.events, index.blocks.len()), (100, 100, 100));
    assert_eq!((index.first_ns, index.last_ns), (BOOTED + SECOND, BOOTED + 100 * SECOND));
    assert_eq!(index.kinds[Kind::RunQueue as usize], 100);
    assert!(index.kinds_whole && index.directory_whole);
    assert_eq!(index.directory.len(), 10);
    assert_eq!(index.directory[1].name, "web-2");
    for (at, block) in index.blocks.iter().enumerate() {
        assert_eq!(block.kinds, kind_mask([Kind::RunQueue]));
        assert!(index.may_hold(block, &[key(3, at as u64 + 1)]));
        assert_eq!(block.offset, 64 + at as u64 * BLOCK_BYTES);
    }
    let wrong = index.blocks.iter().filter(|block| index.may_hold(block, &[key(3, 1000)])).count();
    assert!(wrong < 10, "{wrong}");
    assert_eq!(Index::decode(&content, 10), None, "of another segment");
}

#[test]
fn an_unknown_frame_leaves_its_block_open() {
    let mut builder = IndexBuilder::default();
    let bytes = frame(1, 7, true);
    let header = *Frame::decode(&bytes).expect("a frame").header();
    builder.add(64, bytes.len(), &header, None);
    let index = Index::decode(&builder.finish(1, 4096), 1).expect("a sound index");
    assert!(!index.kinds_whole && !index.directory_whole);
    assert!(index.may_hold(&index.blocks[0], &[key(1, 2)]));
    assert_eq!(index.blocks[0].kinds, u64::MAX);
}

#[test]
fn every_flipped_bit_is_noticed() {
    let mut builder = IndexBuilder::default();
    add(&mut builder, 64, &frame(1, 7, true));
    let content = builder.finish(1, 4096);
    for bit in 0..content.len() * 8 {
        let mut damaged = content.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Index::decode(&damaged, 1), None, "bit {bit}");
    }
}

#[test]
fn the_index_is_found_by_the_end_of_its_file() {
    let mut segment = segment_header(4).to_vec();
    let mut builder = IndexBuilder::default();
    let bytes = frame(1, 7, true);
    let at = segment.len() as u64;
    append_record(&mut segment, 4, at, SegmentRecordKind::Frame, &bytes);
    add(&mut builder, at, &bytes);
    let at = segment.len() as u64;
    append_record(&mut segment, 4, at, SegmentRecordKind::Index, &builder.finish(4, at));
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(&segment).expect("written");
    let index = Index::read(&file, 4).expect("readable").expect("an index");
    assert_eq!(index.offset, at);
    assert_eq!(Index::read(&file, 5).expect("readable"), None);
    file.write_all(&[0; 8]).expect("written");
    assert_eq!(Index::read(&file, 4).expect("readable"), None, "zeros behind it: it is scanned");
}

/// The layout, byte for byte: `TAPIO_WRITE_GOLDEN=1` rewrites it.
#[test]
fn the_layout_does_not_change_unnoticed() {
    let mut builder = IndexBuilder::default();
    add(&mut builder, 64, &frame(1, 7, true));
    let content = builder.finish(1, 4096);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/segment-index.bin");
    if std::env::var_os("TAPIO_WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).expect("the directory");
        std::fs::write(path, &content).expect("written");
    }
    let golden = std::fs::read(path).expect("the golden bytes");
    assert!(golden == content, "the index's layout has changed: its version must, too");
}
