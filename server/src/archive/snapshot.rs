//! What the archive's own records hold: the books at the start of a segment, names of nodes, commit marks.
//!
//! ```text
//! 0      4                 length − 4      length
//! ├──────┼─────────────────┼───────────────┤
//! │ kind │ content         │ crc32c before │     no bytes at all: a commit mark
//! └──────┴─────────────────┴───────────────┘
//! ```
//!
//! A commit mark says that everything before it in its segment was synced. What comes after the last mark of a segment is a batch
//! whose sync did not return, and which was not reported durable: recovery may cut it.

use std::sync::Arc;

use tapio_wire::event::SOURCES;
use tapio_wire::ledger::{ENTRIES_MAX, ENTRY_BYTES};
use tapio_wire::limits::NODE_NAME_BYTES_MAX;

use super::books::{Acknowledged, Books, EPOCHS_MAX, EpochBooks, NODES_MAX, NodeBooks, Retired, Totals};

const KIND_BOOKS: u32 = 1;
const KIND_NAME: u32 = 2;
const KIND_RESUMED: u32 = 3;
const NO_NAME: u16 = u16::MAX;
const _: () = assert!(NODE_NAME_BYTES_MAX < NO_NAME as usize);
const _: () = assert!(EPOCHS_MAX <= u8::MAX as usize);
const _: () = assert!(ENTRIES_MAX * ENTRY_BYTES <= u16::MAX as usize);

/// A record that is no frame.
#[derive(Debug, PartialEq)]
pub enum Note {
    /// Everything before it in the segment was synced.
    Mark,
    /// The books when the segment was opened.
    Books(Box<Books>),
    /// What a node is called.
    Name { node: u64, name: Arc<str> },
    /// An epoch goes on behind frames that were acknowledged elsewhere.
    Resumed { node: u64, epoch: u64, acknowledged: Acknowledged },
    /// What is where in the segment: nothing that counts.
    Index,
}

/// The record of a node's name.
pub fn encode_name(node: u64, name: &str, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&KIND_NAME.to_le_bytes());
    out.extend_from_slice(&node.to_le_bytes());
    out.extend_from_slice(name.as_bytes());
    seal(out, start);
}

/// The record of an epoch that goes on behind frames that were acknowledged elsewhere.
pub fn encode_resumed(node: u64, epoch: u64, acknowledged: &Acknowledged, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&KIND_RESUMED.to_le_bytes());
    for value in [node, epoch, acknowledged.seq].iter().chain(&acknowledged.events) {
        out.extend_from_slice(&value.to_le_bytes());
    }
    seal(out, start);
}

/// The record of the books.
pub fn encode_books(books: &Books, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&KIND_BOOKS.to_le_bytes());
    let put = |out: &mut Vec<u8>, value: u64| out.extend_from_slice(&value.to_le_bytes());
    let totals = &books.totals;
    for value in [totals.frames, totals.events, totals.lethal_events, totals.duplicates, totals.quarantined] {
        put(out, value);
    }
    for retired in &books.retired {
        put(out, retired.emitted);
        put(out, retired.archived);
        out.extend_from_slice(&retired.unexplained.to_le_bytes());
        for &count in retired.dropped.iter().flatten() {
            put(out, count);
        }
    }
    out.extend_from_slice(&(books.nodes.len() as u32).to_le_bytes());
    for (&id, node) in &books.nodes {
        put(out, id);
        let length = node.name.as_ref().map_or(NO_NAME, |name| name.len() as u16);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(node.name.as_deref().unwrap_or_default().as_bytes());
        out.push(node.epochs.len() as u8);
        for epoch in &node.epochs {
            for value in [
                epoch.epoch,
                epoch.durable_seq,
                epoch.frames,
                epoch.missing_frames,
                epoch.lethal_events,
                epoch.boottime_ns,
                epoch.realtime_ns,
            ] {
                put(out, value);
            }
            for &count in epoch.archived.iter().chain(&epoch.elsewhere) {
                put(out, count);
            }
            out.push(u8::from(epoch.is_final));
            out.extend_from_slice(&(epoch.ledger.len() as u16).to_le_bytes());
            out.extend_from_slice(&epoch.ledger);
        }
    }
    seal(out, start);
}

fn seal(out: &mut Vec<u8>, start: usize) {
    let crc = crc32c::crc32c(&out[start..]);
    out.extend_from_slice(&crc.to_le_bytes());
}

/// Reads a record as the functions above wrote it; `None` when it is damaged.
pub fn decode(bytes: &[u8]) -> Option<Note> {
    if bytes.is_empty() {
        return Some(Note::Mark);
    }
    let (content, crc) = bytes.split_last_chunk::<4>()?;
    if crc32c::crc32c(content) != u32::from_le_bytes(*crc) {
        return None;
    }
    let mut reader = Reader(content);
    match reader.u32()? {
        KIND_BOOKS => decode_books(&mut reader).map(|books| Note::Books(Box::new(books))),
        KIND_NAME => {
            let node = reader.u64()?;
            let name = std::str::from_utf8(reader.0).ok()?;
            (name.len() <= NODE_NAME_BYTES_MAX).then(|| Note::Name { node, name: name.into() })
        }
        KIND_RESUMED => {
            let (node, epoch) = (reader.u64()?, reader.u64()?);
            let mut acknowledged = Acknowledged { seq: reader.u64()?, ..Acknowledged::default() };
            for events in &mut acknowledged.events {
                *events = reader.u64()?;
            }
            Some(Note::Resumed { node, epoch, acknowledged })
        }
        _ => None,
    }
}

fn decode_books(reader: &mut Reader<'_>) -> Option<Books> {
    let totals = Totals {
        frames: reader.u64()?,
        events: reader.u64()?,
        lethal_events: reader.u64()?,
        duplicates: reader.u64()?,
        quarantined: reader.u64()?,
    };
    let mut retired: [Retired; SOURCES] = Default::default();
    for retired in &mut retired {
        retired.emitted = reader.u64()?;
        retired.archived = reader.u64()?;
        retired.unexplained = reader.u64()?.cast_signed();
        for count in retired.dropped.iter_mut().flatten() {
            *count = reader.u64()?;
        }
    }
    let count = reader.u32()? as usize;
    if count > NODES_MAX {
        return None;
    }
    let mut books = Books { totals, retired, ..Books::default() };
    for _ in 0..count {
        let (id, node) = decode_node(reader)?;
        books.nodes.insert(id, node);
    }
    reader.0.is_empty().then_some(books)
}

fn decode_node(reader: &mut Reader<'_>) -> Option<(u64, NodeBooks)> {
    let id = reader.u64()?;
    let name = match reader.u16()? {
        NO_NAME => None,
        length => {
            let name = reader.take(usize::from(length))?;
            Some(Arc::from(std::str::from_utf8(name).ok()?))
        }
    };
    let count = usize::from(reader.u8()?);
    if count == 0 || count > EPOCHS_MAX {
        return None;
    }
    let mut epochs = Vec::with_capacity(count);
    for _ in 0..count {
        let mut epoch = EpochBooks {
            epoch: reader.u64()?,
            durable_seq: reader.u64()?,
            frames: reader.u64()?,
            missing_frames: reader.u64()?,
            lethal_events: reader.u64()?,
            boottime_ns: reader.u64()?,
            realtime_ns: reader.u64()?,
            ..EpochBooks::default()
        };
        for sum in epoch.archived.iter_mut().chain(&mut epoch.elsewhere) {
            *sum = reader.u64()?;
        }
        epoch.is_final = reader.u8()? != 0;
        let length = usize::from(reader.u16()?);
        epoch.ledger.extend_from_slice(reader.take(length)?);
        epochs.push(epoch);
    }
    Some((id, NodeBooks { name, epochs }))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}
