//! The index at the end of a closed segment: what is where, so that a query for one pod and ten minutes reads little.
//!
//! What enters: the frames of a segment, as they are written. What leaves: one record behind the last frame. What must hold: an
//! index never hides a frame that matches; what it does not know it leaves open. A segment without a sound index (the active one,
//! one of a killed server, a poisoned one) is scanned instead. So the index is not synced: a crash costs time only.
//!
//! ```text
//! 0       8         12     16       24        32       40      48      56         64           72
//! ├───────┼─────────┼──────┼────────┼─────────┼────────┼───────┼───────┼──────────┼────────────┤
//! │ magic │ version │flags │ number │first_ns │last_ns │frames │events │raw_bytes │frame_bytes │
//! ├───────┼────────┬┴──────┴──┬─────┴─────────┼────────┴──────┬┴───────┴──────────┴────────────┘
//! │ nodes │ blocks │ entities │ filter blocks │ directory raw │ directory bytes │
//! 72      76       80         84              88              92                96
//! events by kind, 64 × u64
//! node, repeated, 32 bytes:      0 id · 8 first_ns · 16 last_ns · 24 events
//! block, repeated, 56 bytes:     0 offset · 8 bytes u32 · 12 frames u32 · 16 first_ns · 24 last_ns · 32 kinds, a bit each ·
//!                                40 first filter block u32 · 44 filter blocks u32 · 48 events u32 · 52 entities u32
//! filter block, repeated, 32 bytes (see `bloom`)
//! directory, lz4: entity, repeated: node · id · parent · kind u8 · 8 texts, each u16 length and bytes
//! zeros up to a multiple of 8
//! trailer, 24 bytes:             0 offset of the index's record · 8 crc32c of all before u32 · 12 0 · 16 magic
//! ```
//!
//! Little endian; moments are nanoseconds since 1970. The trailer ends the file, which is how the index is found. A block is
//! [`BLOCK_BYTES`] of records or a little more; one without a filter block may hold any entity.

mod bloom;
mod builder;
mod summary;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use tapio_wire::event::EntityKind;
use tapio_wire::segment::{Found, RECORD_HEADER_BYTES, SegmentRecordKind, find_record};

pub use bloom::{key, may_hold};
pub use builder::IndexBuilder;
pub use summary::{Described, Summary, kind_mask, realtime_ns, times_ns};

/// A block is closed when it has this many bytes of records.
pub const BLOCK_BYTES: u64 = 256 << 10;
/// The last, and the first, eight bytes of an index.
pub const INDEX_MAGIC: [u8; 8] = *b"TPIOIDX1";
const INDEX_VERSION: u32 = 1;
const HEADER_BYTES: usize = 96;
const KIND_SLOTS: usize = 64;
const NODE_BYTES: usize = 32;
const BLOCK_ENTRY_BYTES: usize = 56;
const TRAILER_BYTES: usize = 24;
/// The directory has every entity that was described in the segment.
const FLAG_DIRECTORY_WHOLE: u32 = 1;
/// The counts by kind cover every frame.
const FLAG_KINDS_WHOLE: u32 = 2;
/// An index has at most this many bytes; one that would have more has blocks without filters.
pub const INDEX_BYTES_MAX: usize = 64 << 20;
const DIRECTORY_RAW_MAX: usize = 8 << 20;

const _: () = assert!(tapio_wire::event::KINDS <= KIND_SLOTS);
const _: () = assert!(HEADER_BYTES == 8 + 4 + 4 + 7 * 8 + 6 * 4);
const _: () = assert!(NODE_BYTES == 4 * 8);
const _: () = assert!(BLOCK_ENTRY_BYTES == 8 + 2 * 4 + 3 * 8 + 4 * 4);
// The file must end with the trailer: no padding may follow it.
const _: () = assert!(TRAILER_BYTES.is_multiple_of(8) && RECORD_HEADER_BYTES.is_multiple_of(8));
const _: () = assert!(INDEX_BYTES_MAX <= u32::MAX as usize);

/// What a segment has of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeEntry {
    pub id: u64,
    pub first_ns: u64,
    pub last_ns: u64,
    pub events: u64,
}

/// A run of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockEntry {
    pub offset: u64,
    pub bytes: u32,
    pub frames: u32,
    pub first_ns: u64,
    pub last_ns: u64,
    /// A bit for each kind of event that may be in it.
    pub kinds: u64,
    filter_first: u32,
    filter_blocks: u32,
    pub events: u32,
    /// Different entities; 0 where they were not counted.
    pub entities: u32,
}

/// A segment's index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    pub first_ns: u64,
    pub last_ns: u64,
    pub frames: u64,
    pub events: u64,
    pub raw_bytes: u64,
    pub frame_bytes: u64,
    /// Whether `kinds` covers every frame, and `directory` every description.
    pub kinds_whole: bool,
    pub directory_whole: bool,
    /// Events by the number of their kind.
    pub kinds: Vec<u64>,
    pub nodes: Vec<NodeEntry>,
    pub blocks: Vec<BlockEntry>,
    pub directory: Vec<Described>,
    filters: Vec<u8>,
    /// Bytes of its record.
    pub bytes: u64,
    /// Where its record stands: the records before it are what it covers.
    pub offset: u64,
}

impl Index {
    /// The index of a segment; `None` when it has none, or a damaged one.
    pub fn read(file: &File, number: u64) -> io::Result<Option<Self>> {
        let file_bytes = file.metadata()?.len();
        let mut trailer = [0; TRAILER_BYTES];
        let Some(trailer_at) = file_bytes.checked_sub(TRAILER_BYTES as u64) else {
            return Ok(None);
        };
        file.read_exact_at(&mut trailer, trailer_at)?;
        let offset = u64::from_le_bytes(std::array::from_fn(|i| trailer[i]));
        let Some(length) = file_bytes.checked_sub(offset) else {
            return Ok(None);
        };
        let limit = (INDEX_BYTES_MAX + RECORD_HEADER_BYTES) as u64;
        if trailer[16..] != INDEX_MAGIC || length > limit || length < TRAILER_BYTES as u64 {
            return Ok(None);
        }
        let mut record = vec![0; length as usize];
        file.read_exact_at(&mut record, offset)?;
        match find_record(&record, number, offset) {
            Found::Record { kind: SegmentRecordKind::Index, bytes, .. } => Ok(Self::decode(bytes, number)),
            _ => Ok(None),
        }
    }

    /// Reads a record's content; `None` when it is damaged or not of this segment.
    pub fn decode(bytes: &[u8], number: u64) -> Option<Self> {
        if !is_sound(bytes) {
            return None;
        }
        let mut rest = Reading { rest: &bytes[8..bytes.len() - TRAILER_BYTES] };
        let offset = u64::from_le_bytes(bytes[bytes.len() - TRAILER_BYTES..][..8].try_into().ok()?);
        let (version, flags) = (rest.u32()?, rest.u32()?);
        if version != INDEX_VERSION || rest.u64()? != number {
            return None;
        }
        let (first_ns, last_ns, frames, events) = (rest.u64()?, rest.u64()?, rest.u64()?, rest.u64()?);
        let (raw_bytes, frame_bytes) = (rest.u64()?, rest.u64()?);
        let (node_count, block_count, entity_count) = (rest.u32()?, rest.u32()?, rest.u32()?);
        let (filter_blocks, directory_raw, directory_bytes) = (rest.u32()?, rest.u32()?, rest.u32()?);
        let mut kinds = Vec::with_capacity(KIND_SLOTS);
        for _ in 0..KIND_SLOTS {
            kinds.push(rest.u64()?);
        }
        let mut nodes = Vec::new();
        for _ in 0..node_count {
            nodes.push(NodeEntry { id: rest.u64()?, first_ns: rest.u64()?, last_ns: rest.u64()?, events: rest.u64()? });
        }
        let mut blocks = Vec::new();
        for _ in 0..block_count {
            let block = BlockEntry {
                offset: rest.u64()?,
                bytes: rest.u32()?,
                frames: rest.u32()?,
                first_ns: rest.u64()?,
                last_ns: rest.u64()?,
                kinds: rest.u64()?,
                filter_first: rest.u32()?,
                filter_blocks: rest.u32()?,
                events: rest.u32()?,
                entities: rest.u32()?,
            };
            if block.filter_first.checked_add(block.filter_blocks)? > filter_blocks {
                return None;
            }
            blocks.push(block);
        }
        let filters = rest.take((filter_blocks as usize).checked_mul(bloom::BLOCK_BYTES)?)?.to_vec();
        let packed = rest.take(directory_bytes as usize)?;
        if directory_raw as usize > DIRECTORY_RAW_MAX {
            return None;
        }
        let raw = lz4_flex::block::decompress(packed, directory_raw as usize).ok()?;
        let mut reading = Reading { rest: &raw };
        let mut directory = Vec::new();
        for _ in 0..entity_count {
            directory.push(reading.described()?);
        }
        Some(Self {
            first_ns,
            last_ns,
            frames,
            events,
            raw_bytes,
            frame_bytes,
            kinds_whole: flags & FLAG_KINDS_WHOLE != 0,
            directory_whole: flags & FLAG_DIRECTORY_WHOLE != 0,
            kinds,
            nodes,
            blocks,
            directory,
            filters,
            bytes: bytes.len() as u64,
            offset,
        })
    }

    /// Whether a block may have events of one of these entities, given by their keys.
    pub fn may_hold(&self, block: &BlockEntry, keys: &[u64]) -> bool {
        let from = block.filter_first as usize * bloom::BLOCK_BYTES;
        let filter = &self.filters[from..from + block.filter_blocks as usize * bloom::BLOCK_BYTES];
        keys.iter().any(|&key| may_hold(filter, key))
    }
}

/// Whether a record's content is an index whose checksum is right.
pub fn is_sound(bytes: &[u8]) -> bool {
    let Some((head, trailer)) = bytes.split_last_chunk::<TRAILER_BYTES>() else {
        return false;
    };
    let crc = u32::from_le_bytes(std::array::from_fn(|i| trailer[8 + i]));
    head.len() >= HEADER_BYTES
        && head[..8] == INDEX_MAGIC
        && trailer[12..16] == [0; 4]
        && trailer[16..] == INDEX_MAGIC
        && crc32c::crc32c_append(crc32c::crc32c(head), &trailer[..8]) == crc
}

struct Reading<'a> {
    rest: &'a [u8],
}

impl<'a> Reading<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4).map(|bytes| u32::from_le_bytes(std::array::from_fn(|i| bytes[i])))
    }

    fn u64(&mut self) -> Option<u64> {
        self.take(8).map(|bytes| u64::from_le_bytes(std::array::from_fn(|i| bytes[i])))
    }

    fn text(&mut self) -> Option<String> {
        let length = self.take(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]))?;
        Some(std::str::from_utf8(self.take(usize::from(length))?).ok()?.to_owned())
    }

    fn described(&mut self) -> Option<Described> {
        let (node, id, parent) = (self.u64()?, self.u64()?, self.u64()?);
        let kind = self.take(1)?[0];
        let kind = ENTITY_KINDS.into_iter().find(|&known| known as u8 == kind);
        Some(Described {
            node,
            id,
            parent,
            kind,
            name: self.text()?,
            container_id: self.text()?,
            pod_uid: self.text()?,
            cgroup: self.text()?,
            namespace: self.text()?,
            pod: self.text()?,
            container: self.text()?,
            workload: self.text()?,
        })
    }
}

const ENTITY_KINDS: [EntityKind; 6] = [
    EntityKind::Host,
    EntityKind::Container,
    EntityKind::Pod,
    EntityKind::Unit,
    EntityKind::Node,
    EntityKind::Workload,
];

#[cfg(test)]
mod tests;
