//! Builds a segment's index while the segment is written.
//!
//! What must hold: the same records in the same order give the same bytes, so that a check can build the index again and compare.
//! Memory is bounded by the index's own bound and one block's entities.

use std::collections::{BTreeMap, HashSet};

use foldhash::fast::RandomState;
use tapio_wire::frame::Header;
use tapio_wire::segment::record_bytes;

use super::{
    BLOCK_BYTES, BlockEntry, FLAG_DIRECTORY_WHOLE, FLAG_KINDS_WHOLE, HEADER_BYTES, INDEX_BYTES_MAX, INDEX_MAGIC,
    INDEX_VERSION, KIND_SLOTS, NodeEntry, Summary, bloom, times_ns,
};

/// Bytes of descriptions kept, uncompressed.
const DIRECTORY_BYTES_MAX: usize = 4 << 20;
const _: () = assert!(DIRECTORY_BYTES_MAX <= super::DIRECTORY_RAW_MAX);
/// Different entities after which a block is closed early.
const BLOCK_ENTITIES_MAX: usize = 65_536;
const FILTER_BYTES_MAX: usize = 32 << 20;
const NODES_MAX: usize = 20_000;
const _: () = assert!(FILTER_BYTES_MAX + super::DIRECTORY_RAW_MAX + NODES_MAX * super::NODE_BYTES < INDEX_BYTES_MAX);

#[derive(Default)]
struct OpenBlock {
    offset: u64,
    end: u64,
    frames: u32,
    events: u32,
    first_ns: u64,
    last_ns: u64,
    kinds: u64,
    keys: HashSet<u64, RandomState>,
    /// A frame is in it of which nothing is known.
    is_open: bool,
}

/// Keys that the open block got a moment ago, by their low bits. Frame after frame names the same entities, and a look here costs
/// a tenth of one into the set.
struct Recent(Box<[u64]>);

/// A power of two.
const RECENT_KEYS: usize = 4096;

impl Default for Recent {
    fn default() -> Self {
        let mut recent = Self(vec![0; RECENT_KEYS].into_boxed_slice());
        recent.clear();
        recent
    }
}

impl Recent {
    fn clear(&mut self) {
        // No key of a place is like what stands there then.
        self.0.iter_mut().enumerate().for_each(|(place, key)| *key = place as u64 ^ 1);
    }

    /// Whether a key is new here; it no longer is afterwards.
    fn enter(&mut self, key: u64) -> bool {
        std::mem::replace(&mut self.0[key as usize % RECENT_KEYS], key) != key
    }
}

struct Kinds([u64; KIND_SLOTS]);

impl Default for Kinds {
    fn default() -> Self {
        Self([0; KIND_SLOTS])
    }
}

/// Builds a segment's index while the segment is written.
#[derive(Default)]
pub struct IndexBuilder {
    block: OpenBlock,
    recent: Recent,
    blocks: Vec<BlockEntry>,
    filters: Vec<u8>,
    nodes: BTreeMap<u64, NodeEntry>,
    /// Descriptions by node and entity, as they are written.
    directory: BTreeMap<(u64, u64), Box<[u8]>>,
    directory_bytes: usize,
    directory_cut: bool,
    kinds_unknown: bool,
    kinds: Kinds,
    frames: u64,
    events: u64,
    raw_bytes: u64,
    frame_bytes: u64,
}

impl IndexBuilder {
    /// Whether no frame was added.
    pub fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// Events of the frames that were added.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Takes in a frame whose record stands at `offset`. Offsets rise.
    pub fn add(&mut self, offset: u64, frame_bytes: usize, header: &Header, summary: Option<&Summary>) {
        if self.block.frames > 0
            && (offset - self.block.offset >= BLOCK_BYTES || self.block.keys.len() >= BLOCK_ENTITIES_MAX)
        {
            self.close_block();
        }
        let (first_ns, last_ns) = times_ns(header);
        let block = &mut self.block;
        if block.frames == 0 {
            (block.offset, block.first_ns, block.last_ns) = (offset, first_ns, last_ns);
        }
        block.end = offset + record_bytes(frame_bytes) as u64;
        block.frames += 1;
        block.events = block.events.saturating_add(header.events());
        block.first_ns = block.first_ns.min(first_ns);
        block.last_ns = block.last_ns.max(last_ns);
        match summary {
            Some(summary) => {
                for (kind, &count) in summary.kinds.iter().enumerate() {
                    block.kinds |= u64::from(count > 0) << kind;
                    self.kinds.0[kind] += u64::from(count);
                }
                for key in summary.entities.iter().map(|&entity| bloom::key(header.node, entity)) {
                    if self.recent.enter(key) {
                        block.keys.insert(key);
                    }
                }
                for (entity, described) in summary.described.iter() {
                    self.describe((header.node, entity), described);
                }
            }
            None => {
                block.kinds = u64::MAX;
                block.is_open = true;
                self.kinds_unknown = true;
                self.directory_cut = true;
            }
        }
        let is_known = self.nodes.contains_key(&header.node);
        if is_known || self.nodes.len() < NODES_MAX {
            let new = NodeEntry { id: header.node, first_ns, last_ns, events: 0 };
            let node = self.nodes.entry(header.node).or_insert(new);
            node.first_ns = node.first_ns.min(first_ns);
            node.last_ns = node.last_ns.max(last_ns);
            node.events += u64::from(header.events());
        }
        self.frames += 1;
        self.events += u64::from(header.events());
        self.raw_bytes += u64::from(header.raw_bytes);
        self.frame_bytes += frame_bytes as u64;
    }

    fn describe(&mut self, key: (u64, u64), described: &[u8]) {
        if let Some(known) = self.directory.get_mut(&key) {
            if **known != *described {
                self.directory_bytes -= known.len();
                self.directory_bytes += described.len();
                *known = described.into();
            }
            return;
        }
        if self.directory_bytes + described.len() > DIRECTORY_BYTES_MAX {
            self.directory_cut = true;
            return;
        }
        self.directory_bytes += described.len();
        self.directory.insert(key, described.into());
    }

    fn close_block(&mut self) {
        let block = std::mem::take(&mut self.block);
        let filter = match block.is_open {
            true => Vec::new(),
            false => bloom::build(block.keys.iter().copied()),
        };
        let filter = if self.filters.len() + filter.len() > FILTER_BYTES_MAX { Vec::new() } else { filter };
        self.blocks.push(BlockEntry {
            offset: block.offset,
            bytes: (block.end - block.offset).min(u64::from(u32::MAX)) as u32,
            frames: block.frames,
            first_ns: block.first_ns,
            last_ns: block.last_ns,
            kinds: block.kinds,
            filter_first: (self.filters.len() / bloom::BLOCK_BYTES) as u32,
            filter_blocks: (filter.len() / bloom::BLOCK_BYTES) as u32,
            events: block.events,
            entities: if block.is_open { 0 } else { block.keys.len() as u32 },
        });
        self.filters.extend_from_slice(&filter);
        self.block.keys = block.keys;
        self.block.keys.clear();
        self.recent.clear();
    }

    /// The content of the index's record, which will stand at `record_offset` of segment `number`.
    pub fn finish(mut self, number: u64, record_offset: u64) -> Vec<u8> {
        if self.block.frames > 0 {
            self.close_block();
        }
        let mut raw = Vec::with_capacity(self.directory_bytes);
        self.directory.values().for_each(|described| raw.extend_from_slice(described));
        let directory = lz4_flex::block::compress(&raw);
        let mut out = Vec::with_capacity(HEADER_BYTES + self.filters.len() + directory.len() + (64 << 10));
        let whole = if self.directory_cut { 0 } else { FLAG_DIRECTORY_WHOLE };
        let flags = whole | if self.kinds_unknown { 0 } else { FLAG_KINDS_WHOLE };
        out.extend_from_slice(&INDEX_MAGIC);
        for value in [INDEX_VERSION, flags] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        let first_ns = self.blocks.iter().map(|block| block.first_ns).min().unwrap_or(0);
        let last_ns = self.blocks.iter().map(|block| block.last_ns).max().unwrap_or(0);
        for value in [number, first_ns, last_ns, self.frames, self.events, self.raw_bytes, self.frame_bytes] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        for count in [
            self.nodes.len(),
            self.blocks.len(),
            self.directory.len(),
            self.filters.len() / bloom::BLOCK_BYTES,
            raw.len(),
            directory.len(),
        ] {
            out.extend_from_slice(&(count as u32).to_le_bytes());
        }
        debug_assert_eq!(out.len(), HEADER_BYTES);
        for count in self.kinds.0 {
            out.extend_from_slice(&count.to_le_bytes());
        }
        for node in self.nodes.values() {
            for value in [node.id, node.first_ns, node.last_ns, node.events] {
                out.extend_from_slice(&value.to_le_bytes());
            }
        }
        for block in &self.blocks {
            out.extend_from_slice(&block.offset.to_le_bytes());
            out.extend_from_slice(&block.bytes.to_le_bytes());
            out.extend_from_slice(&block.frames.to_le_bytes());
            for value in [block.first_ns, block.last_ns, block.kinds] {
                out.extend_from_slice(&value.to_le_bytes());
            }
            for value in [block.filter_first, block.filter_blocks, block.events, block.entities] {
                out.extend_from_slice(&value.to_le_bytes());
            }
        }
        out.extend_from_slice(&self.filters);
        out.extend_from_slice(&directory);
        out.resize(out.len().next_multiple_of(8), 0);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out), &record_offset.to_le_bytes());
        out.extend_from_slice(&record_offset.to_le_bytes());
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&INDEX_MAGIC);
        out
    }
}
