//! One segment, or findings, to files.
//!
//! What enters: a segment that is not written to any more. What leaves: the files of its tables. What must hold: what could not be
//! read is counted in the ledger, and the rest is exported.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ring::digest::{SHA256, digest};
use tapio_wire::frame::{Frame, Header};
use tapio_wire::segment::SEGMENT_HEADER_BYTES;
use tapio_wire::service::Finding;

use super::curves::Curves;
use super::deaths::Deaths;
use super::events::Events;
use super::ledger::Ledger;
use super::names::Catalog;
use super::pages::ChunkEncoder;
use super::schema::{SCHEMA_VERSION, TABLES};
use super::table::{FileTarget, Partitions, Texts, Written};
use super::{ExportError, SegmentTables, findings};
use crate::archive::index::Index;
use crate::archive::reader::SegmentFile;
use crate::archive::scan::{Item, Scanner};
use crate::archive::snapshot::Note;

/// A segment's name in the export: its number, and a hash of how it begins, which later frames do not change.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentId(String);

impl SegmentId {
    /// Reads what identifies a segment; `None` when it has no frame. One whose frames are all damaged is named by what
    /// its index counts. The segment's header does not matter: every record says of which segment it is.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn of(file: &File, number: u64) -> io::Result<Option<Self>> {
        let mut scanner = Scanner::new(file, number)?;
        while let Some(item) = scanner.next_item()? {
            if matches!(item, Item::Frame { .. }) {
                let mut begin = vec![0; (scanner.position() - SEGMENT_HEADER_BYTES as u64) as usize];
                file.read_exact_at(&mut begin, SEGMENT_HEADER_BYTES as u64)?;
                return Ok(Some(Self::new(number, &begin)));
            }
        }
        let index = Index::read(file, number)?.filter(|index| index.events > 0);
        Ok(index.map(|Index { offset, events, first_ns, last_ns, .. }| {
            Self::new(number, format!("{offset} {events} {first_ns} {last_ns}").as_bytes())
        }))
    }

    fn new(number: u64, content: &[u8]) -> Self {
        let sum = digest(&SHA256, content);
        let sum: String = sum.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        Self(format!("{number:020}-{sum}"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What an export of a segment came to.
#[derive(Clone, Debug, Default)]
pub struct Exported {
    pub files: Vec<Written>,
    pub frames: u64,
    pub events: u64,
    /// Events that the segment had and that cannot be read.
    pub damaged: u64,
    /// Frames that this archive had before.
    pub duplicates: u64,
    pub took: Duration,
}

impl Exported {
    /// Adds what another segment came to.
    pub fn add(&mut self, other: Self) {
        self.files.extend(other.files);
        self.frames += other.frames;
        self.events += other.events;
        self.damaged += other.damaged;
        self.duplicates += other.duplicates;
        self.took += other.took;
    }
}

/// Exports segments of one archive, one after another.
pub struct Exporter {
    cluster: String,
    server: String,
    catalog: Catalog,
}

impl Exporter {
    /// Makes an exporter for an archive of this cluster and server.
    pub fn new(cluster: &str, server: &str) -> Self {
        Self { cluster: cluster.to_owned(), server: server.to_owned(), catalog: Catalog::default() }
    }

    /// Exports a segment to files below a folder. `read` hears how many bytes were read since its last call.
    ///
    /// # Errors
    /// [`ExportError`]; files may be left in the folder, without an end.
    pub fn segment(
        &mut self,
        segment: &SegmentFile,
        id: &SegmentId,
        dir: &Path,
        read: &mut dyn FnMut(u64),
    ) -> Result<Exported, ExportError> {
        let started = Instant::now();
        let failed = |source| ExportError::Read { path: segment.path.clone(), source };
        let file = File::open(&segment.path).map_err(failed)?;
        let index = Index::read(&file, segment.number).map_err(failed)?;
        self.catalog.begin_segment();
        let indexed =
            index.as_ref().map(|index| Indexed { events: index.events, times_ns: (index.first_ns, index.last_ns) });
        index.into_iter().flat_map(|index| index.directory).for_each(|described| self.catalog.learn(described));
        let mut pass = Pass::new(self, id, dir, indexed)?;
        let mut scanner = Scanner::new(&file, segment.number).map_err(failed)?;
        let mut position = scanner.position();
        while let Some(item) = scanner.next_item().map_err(failed)? {
            pass.item(item)?;
            read(scanner.position().saturating_sub(position));
            position = scanner.position();
        }
        let (exported, catalog) = pass.finish()?;
        self.catalog = catalog;
        Ok(Exported { took: started.elapsed(), ..exported })
    }

    /// Exports findings to files below a folder.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn findings(&self, found: &[Arc<Finding>], name: &str, dir: &Path) -> Result<Vec<Written>, ExportError> {
        let mut shared = self.shared(name, dir, Catalog::default())?;
        findings::write(&mut shared, found)
    }

    /// Writes a file without rows for each table, so that every table can be read before it has any.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn empty(&self, dir: &Path) -> Result<Vec<Written>, ExportError> {
        let mut shared = self.shared(&format!("schema-{SCHEMA_VERSION}"), dir, Catalog::default())?;
        let mut files = Vec::new();
        for table in TABLES {
            let mut partitions = Partitions::new(table)?;
            partitions.batch(&shared.place, 0)?;
            files.extend(partitions.finish(&shared.place, &shared.texts, &mut shared.encoder)?);
        }
        Ok(files)
    }

    fn shared(&self, name: &str, dir: &Path, catalog: Catalog) -> Result<SegmentTables, ExportError> {
        let encoder = ChunkEncoder::new().map_err(|source| ExportError::Write { path: dir.to_owned(), source })?;
        let notes = [("tapio.server", self.server.as_str()), ("tapio.segment", name)];
        let place = FileTarget {
            dir: dir.to_owned(),
            cluster: self.cluster.clone(),
            name: name.to_owned(),
            notes: notes.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec(),
        };
        let mut texts = Texts::default();
        let segment = texts.number(name);
        Ok(SegmentTables { place, texts, catalog, encoder, segment })
    }
}

/// What a segment's index states of it.
struct Indexed {
    events: u64,
    /// Times of the first event and the last.
    times_ns: (u64, u64),
}

/// One segment on its way through.
struct Pass {
    shared: SegmentTables,
    events: Events,
    deaths: Deaths,
    curves: Curves,
    ledger: Ledger,
    exported: Exported,
    undecodable: u64,
    indexed: Option<Indexed>,
    /// A frame of a node whose name is not known yet.
    held: Option<(Header, Vec<u8>)>,
}

impl Pass {
    fn new(exporter: &mut Exporter, id: &SegmentId, dir: &Path, indexed: Option<Indexed>) -> Result<Self, ExportError> {
        let catalog = std::mem::take(&mut exporter.catalog);
        Ok(Self {
            shared: exporter.shared(id.as_str(), dir, catalog)?,
            events: Events::new()?,
            deaths: Deaths::new()?,
            curves: Curves::new()?,
            ledger: Ledger::new(&exporter.server)?,
            exported: Exported::default(),
            undecodable: 0,
            indexed,
            held: None,
        })
    }

    fn item(&mut self, item: Item<'_>) -> Result<(), ExportError> {
        if let Item::Note(Note::Name { node, name }) = &item {
            self.shared.catalog.learn_node(*node, name);
        }
        if let Some((header, bytes)) = self.held.take() {
            self.frame(&header, &bytes)?;
        }
        match item {
            // What its node is called stands behind its first frame.
            Item::Frame { header, bytes } if !self.shared.catalog.knows_node(header.node) => {
                self.held = Some((header, bytes.to_vec()));
            }
            Item::Frame { header, bytes } => self.frame(&header, bytes)?,
            Item::Note(Note::Books(books)) => {
                for (node, known) in books.nodes() {
                    if let Some(name) = &known.name {
                        self.shared.catalog.learn_node(node, name);
                    }
                }
                self.ledger.begin(*books);
            }
            Item::Note(Note::Name { node, name }) => self.ledger.books_mut().learn_name(node, &name),
            Item::Note(Note::Resumed { node, epoch, acknowledged }) => {
                self.ledger.resume(&mut self.shared, node, epoch, &acknowledged)?;
            }
            Item::Damaged(_) if self.indexed.is_some() => self.ledger.note_damage(),
            Item::Note(_) | Item::Damaged(_) | Item::Tail { .. } => {}
        }
        Ok(())
    }

    fn frame(&mut self, header: &Header, bytes: &[u8]) -> Result<(), ExportError> {
        let shared = &mut self.shared;
        if !self.ledger.frame(shared, header, bytes)? {
            self.exported.duplicates += 1;
            // They are in the index's count, and not missing.
            self.exported.events += u64::from(header.events());
            return Ok(());
        }
        let Ok(frame) = Frame::decode(bytes) else {
            self.undecodable += u64::from(header.events());
            return Ok(());
        };
        shared.catalog.learn_frame(&frame);
        self.exported.frames += 1;
        self.exported.events += u64::from(header.events());
        self.events.frame(shared, &frame)?;
        self.deaths.frame(shared, &frame)?;
        self.curves.frame(shared, &frame)
    }

    fn finish(mut self) -> Result<(Exported, Catalog), ExportError> {
        if let Some((header, bytes)) = self.held.take() {
            self.frame(&header, &bytes)?;
        }
        let readable = self.exported.events;
        let missing = self.indexed.as_ref().map_or(self.undecodable, |indexed| indexed.events.saturating_sub(readable));
        let shared = &mut self.shared;
        self.exported.damaged = missing;
        self.exported.events = self.events.events;
        let mut files = self.events.finish(shared)?;
        files.extend(self.deaths.finish(shared)?);
        files.extend(self.curves.finish(shared)?);
        files.extend(self.ledger.finish(shared, missing, self.indexed.map(|indexed| indexed.times_ns))?);
        self.exported.files = files;
        Ok((self.exported, self.shared.catalog))
    }
}
