//! What a manifest says: what one segment holds, so that a reader need not open it to know whether it wants it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use super::names::SegmentName;
use crate::archive::index::{Index, times_ns};
use crate::archive::scan::{Item, Scanner};
use crate::archive::snapshot::Note;

/// The version of this form; a reader refuses others.
const FORMAT: u32 = 1;
/// Epochs that a manifest counts one by one.
const NODES_MAX: usize = 10_000;
const READ_BYTES: usize = 1 << 20;

/// A segment's manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub cluster: String,
    pub server: String,
    /// The archive directory that it comes from.
    pub life: String,
    pub segment: u64,
    /// The last part of its object's path.
    pub object: String,
    pub bytes: u64,
    pub sha256: String,
    /// Nanoseconds since 1970.
    pub first_ns: u64,
    pub last_ns: u64,
    pub frames: u64,
    pub events: u64,
    pub lethal_events: u64,
    /// Whether an index ends it; without one it is scanned.
    pub indexed: bool,
    /// Events that were erased from it later; a gap stands in the place of each.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub erased_events: u64,
    /// Event counts by node and epoch; empty when there are too many.
    pub nodes: Vec<NodeCount>,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What a segment has of one epoch of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeCount {
    /// Hexadecimal, as everywhere.
    pub node: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    pub epoch: String,
    pub frames: u64,
    pub events: u64,
    pub first_seq: u64,
    pub last_seq: u64,
}

impl Manifest {
    /// Reads a closed segment from end to end. `None` when no frame is in it.
    pub fn of(file: &File, number: u64, cluster: &str, server: &str, life: &str) -> io::Result<Option<Self>> {
        let bytes = file.metadata()?.len();
        let mut nodes: BTreeMap<(u64, u64), NodeCount> = BTreeMap::new();
        let mut names = BTreeMap::new();
        let (mut frames, mut events, mut lethal_events, mut first, mut last) = (0, 0, 0, u64::MAX, 0);
        let mut scanner = Scanner::new(file, number)?;
        while let Some(item) = scanner.next_item()? {
            match item {
                Item::Frame { header, .. } => {
                    let (first_ns, last_ns) = times_ns(&header);
                    (first, last) = (first.min(first_ns), last.max(last_ns));
                    frames += 1;
                    events += u64::from(header.events());
                    lethal_events += u64::from(header.lethal_events);
                    let count = nodes.entry((header.node, header.epoch)).or_insert_with(|| NodeCount {
                        node: format!("{:016x}", header.node),
                        name: String::new(),
                        epoch: format!("{:x}", header.epoch),
                        frames: 0,
                        events: 0,
                        first_seq: header.seq,
                        last_seq: header.seq,
                    });
                    count.frames += 1;
                    count.events += u64::from(header.events());
                    count.first_seq = count.first_seq.min(header.seq);
                    count.last_seq = count.last_seq.max(header.seq);
                }
                Item::Note(Note::Books(books)) => {
                    names.extend(books.nodes().filter_map(|(id, node)| Some((id, node.name.as_deref()?.to_owned()))));
                }
                Item::Note(Note::Name { node, name }) => {
                    names.insert(node, name.to_string());
                }
                _ => {}
            }
        }
        if frames == 0 {
            return Ok(None);
        }
        for ((node, _), count) in &mut nodes {
            count.name = names.get(node).cloned().unwrap_or_default();
        }
        if nodes.len() > NODES_MAX {
            nodes.clear();
        }
        let sha256 = sha256(file)?;
        let object = SegmentName::new(number, first, last, &sha256).file();
        Ok(Some(Self {
            format: FORMAT,
            cluster: cluster.to_owned(),
            server: server.to_owned(),
            life: life.to_owned(),
            segment: number,
            object,
            bytes,
            sha256,
            first_ns: first,
            last_ns: last,
            frames,
            events,
            lethal_events,
            indexed: Index::read(file, number)?.is_some(),
            erased_events: 0,
            nodes: nodes.into_values().collect(),
        }))
    }

    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        match manifest.format {
            FORMAT => Ok(manifest),
            other => Err(format!("its format is {other}, and {FORMAT} is known")),
        }
    }

    /// Encodes the manifest as an object's content.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }
}

/// A file's SHA-256, in hexadecimal.
pub fn sha256(file: &File) -> io::Result<String> {
    let mut context = Context::new(&SHA256);
    let mut window = vec![0; READ_BYTES];
    let mut at = 0;
    loop {
        match file.read_at(&mut window, at) {
            Ok(0) => break,
            Ok(read) => {
                context.update(&window[..read]);
                at += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}
