//! Reads an archive beside the server that writes it, or without one: nothing is locked, nothing is changed.
//!
//! What enters: a directory and what is wanted. What leaves: whole frames that may have it, in the order of the archive (each
//! node's in the order of its sequence), each once. What must hold: no matching frame is left out, except those in damage;
//! memory does not grow with the archive; a segment that retention deletes meanwhile is skipped.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use foldhash::fast::RandomState;
use tapio_wire::frame::{Frame, Header};
use tapio_wire::segment::{SEGMENT_HEADER_BYTES, parse_segment_header};

use super::books::Books;
use super::damage::{self, Damage, DamagePlace, Missing};
use super::index::{Described, Index, times_ns};
use super::merge;
use super::scan::{Item, Scanner};
use super::segments;
use super::snapshot::Note;
use super::sparse::{self, Ahead, Sparse};

pub use super::selection::Selection;

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("{} is no archive: {source}. Give the directory that archive.dir names", dir.display())]
    Directory { dir: PathBuf, source: io::Error },
    #[error("{} holds no segment. Give the directory that archive.dir names", dir.display())]
    Empty { dir: PathBuf },
    #[error("{} cannot be read: {source}", path.display())]
    Segment { path: PathBuf, source: io::Error },
}

/// What reading cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effort {
    pub segments: u64,
    /// Segments without an index.
    pub scanned: u64,
    /// Left out by their index: whole segments, and blocks of others.
    pub segments_skipped: u64,
    pub blocks_skipped: u64,
    pub bytes: u64,
    pub frames: u64,
    /// Where frames that may match are missing.
    pub damages: Vec<Damage>,
    /// Frames whose checksums are right and whose content is not.
    pub undecodable: u64,
}

/// One segment file.
#[derive(Clone, Debug)]
pub struct SegmentFile {
    pub number: u64,
    pub path: PathBuf,
    pub bytes: u64,
}

/// Reads an archive without locking or changing it; or several of different servers as one ([`super::merge`]).
#[derive(Clone, Debug)]
pub struct Reader {
    pub(super) parts: Vec<Part>,
    /// Brings what is wanted of sparse parts before it is read.
    ahead: Option<Arc<dyn Ahead>>,
}

/// One archive's directory.
#[derive(Clone, Debug)]
pub(super) struct Part {
    dir: PathBuf,
    /// Segments of which this disk has the index and what was asked for.
    sparse: Sparse,
}

impl Reader {
    /// Opens a directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self::over([dir.into()])
    }

    /// Opens several directories: a frame that is in more than one of them counts once.
    pub fn over(dirs: impl IntoIterator<Item = PathBuf>) -> Self {
        let part = |dir| Part { dir, sparse: Sparse::default() };
        Self { parts: dirs.into_iter().map(part).collect(), ahead: None }
    }

    /// Adds directories whose named segments are sparse: `ahead` brings what a selection wants of them.
    pub fn with_sparse(mut self, parts: impl IntoIterator<Item = (PathBuf, Sparse)>, ahead: Arc<dyn Ahead>) -> Self {
        self.parts.splice(0..0, parts.into_iter().map(|(dir, sparse)| Part { dir, sparse }));
        self.ahead = Some(ahead);
        self
    }

    /// Lists the segments, oldest first; with several archives, one archive after the other.
    pub fn segments(&self) -> Result<Vec<SegmentFile>, ReadError> {
        let mut found = Vec::new();
        for part in &self.parts {
            found.extend(part.segments()?);
        }
        Ok(found)
    }

    /// Whether it is one archive: numbers of segments mean something.
    pub fn is_one(&self) -> bool {
        self.parts.len() == 1
    }

    /// The books: from the newest sound snapshot, and what came after it. Of several archives, the last one's.
    pub fn books(&self) -> Result<Books, ReadError> {
        self.parts.last().map_or_else(|| Ok(Books::default()), Part::books)
    }

    /// What nodes are called.
    pub fn node_names(&self) -> Result<HashMap<u64, Arc<str>, RandomState>, ReadError> {
        let mut names = self.ahead.as_ref().map_or_else(HashMap::default, |ahead| ahead.node_names());
        for part in self.parts.iter().filter(|part| part.sparse.is_empty()) {
            names.extend(part.books()?.nodes().filter_map(|(id, node)| Some((id, node.name.clone()?))));
        }
        Ok(names)
    }

    /// Calls `each` with every frame that may have what is wanted, until it breaks.
    pub fn frames(
        &self,
        wanted: &Selection,
        each: &mut dyn FnMut(&Frame) -> ControlFlow<()>,
    ) -> Result<Effort, ReadError> {
        let mut undecodable = 0;
        let effort = self.whole_frames(wanted, &mut |_, bytes| match Frame::decode(bytes) {
            Ok(frame) => each(&frame),
            // Its checksums are right, so a collector packed it so; `verify` names it.
            Err(_) => {
                undecodable += 1;
                ControlFlow::Continue(())
            }
        })?;
        Ok(Effort { undecodable, ..effort })
    }

    /// Like [`Reader::frames`], with the frame's bytes, of which only the checksums were checked.
    pub fn whole_frames(
        &self,
        wanted: &Selection,
        each: &mut dyn FnMut(&Header, &[u8]) -> ControlFlow<()>,
    ) -> Result<Effort, ReadError> {
        if let Some(ahead) = &self.ahead {
            ahead.bring(wanted);
        }
        match self.parts.as_slice() {
            [only] => only.whole_frames(wanted, each),
            parts => merge::whole_frames(parts, wanted, each),
        }
    }

    /// Segments that were cut or deleted and may have held something of this selection.
    pub fn gaps(&self, wanted: &Selection) -> Result<Vec<Damage>, ReadError> {
        let mut gaps = Vec::new();
        for part in &self.parts {
            gaps.extend(part.gaps_of(&part.segments()?, wanted)?);
        }
        Ok(gaps)
    }

    /// What the entities are called that were described between two moments; a description that is cut off by an index's
    /// bound is left out.
    pub fn described(&self, since_ns: u64, until_ns: u64, each: &mut dyn FnMut(Described)) -> Result<(), ReadError> {
        self.parts.iter().try_for_each(|part| part.described(since_ns, until_ns, each))
    }
}

impl Part {
    fn segments(&self) -> Result<Vec<SegmentFile>, ReadError> {
        let failed = |source| ReadError::Directory { dir: self.dir.clone(), source };
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Some(number) = segments::number_of(&entry.file_name()) else {
                continue;
            };
            match entry.metadata() {
                Ok(metadata) if metadata.is_file() => {
                    found.push(SegmentFile { number, path: entry.path(), bytes: metadata.len() });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(ReadError::Segment { path: entry.path(), source }),
            }
        }
        found.sort_by_key(|segment| segment.number);
        if found.is_empty() && !self.dir.join("LOCK").exists() {
            return Err(ReadError::Empty { dir: self.dir.clone() });
        }
        Ok(found)
    }

    fn books(&self) -> Result<Books, ReadError> {
        let segments = self.segments()?;
        let mut base = Books::default();
        let mut first = segments.len();
        while first > 0 {
            first -= 1;
            let Some(file) = open(&segments[first].path)? else { continue };
            let failed = |source| ReadError::Segment { path: segments[first].path.clone(), source };
            let mut scanner = Scanner::new(&file, segments[first].number).map_err(failed)?;
            if let Some(Item::Note(Note::Books(books))) = scanner.next_item().map_err(failed)? {
                base = *books;
                break;
            }
        }
        for segment in &segments[first..] {
            let Some(file) = open(&segment.path)? else { continue };
            let failed = |source| ReadError::Segment { path: segment.path.clone(), source };
            let mut scanner = Scanner::new(&file, segment.number).map_err(failed)?;
            while let Some(item) = scanner.next_item().map_err(failed)? {
                match item {
                    Item::Frame { header, bytes } => {
                        base.record(&header, bytes);
                    }
                    Item::Note(Note::Name { node, name }) => base.learn_name(node, &name),
                    Item::Note(Note::Resumed { node, epoch, acknowledged }) => {
                        base.resume(node, epoch, &acknowledged);
                    }
                    _ => {}
                }
            }
        }
        Ok(base)
    }

    pub(super) fn whole_frames(
        &self,
        wanted: &Selection,
        each: &mut dyn FnMut(&Header, &[u8]) -> ControlFlow<()>,
    ) -> Result<Effort, ReadError> {
        let mut pass = Pass { wanted, keys: wanted.keys(), last_seq: HashMap::default(), effort: Effort::default() };
        let segments = self.segments()?;
        let mut last = u64::MAX;
        for segment in segments.iter().filter(|segment| segment.number >= wanted.first_segment) {
            let Some(file) = open(&segment.path)? else { continue };
            let failed = |source| ReadError::Segment { path: segment.path.clone(), source };
            if pass.segment(&file, segment.number, each).map_err(failed)?.is_break() {
                last = segment.number;
                break;
            }
        }
        let mut gaps = self.gaps_of(&segments, wanted)?;
        gaps.retain(|gap| gap.segment < last);
        // A hole there is what could not be brought, and whoever brings reports it.
        let is_hole = |damage: &Damage| self.sparse.contains(&damage.segment);
        pass.effort.damages.retain(|damage| !is_hole(damage));
        pass.effort.damages = damage::joined(gaps, pass.effort.damages);
        Ok(pass.effort)
    }

    fn gaps_of(&self, segments: &[SegmentFile], wanted: &Selection) -> Result<Vec<Damage>, ReadError> {
        let gaps = match self.sparse.is_empty() {
            true => damage::gaps(segments),
            false => sparse::gaps(segments),
        };
        let mut gaps = gaps.map_err(|source| ReadError::Directory { dir: self.dir.clone(), source })?;
        gaps.retain(|gap| gap.segment >= wanted.first_segment && wanted.may_lack(gap));
        Ok(gaps)
    }

    fn described(&self, since_ns: u64, until_ns: u64, each: &mut dyn FnMut(Described)) -> Result<(), ReadError> {
        let wanted = Selection { since_ns, until_ns, ..Selection::default() };
        for segment in self.segments()? {
            let Some(file) = open(&segment.path)? else { continue };
            let failed = |source| ReadError::Segment { path: segment.path.clone(), source };
            if let Some(index) = Index::read(&file, segment.number).map_err(failed)?
                && (index.directory_whole
                    || self.sparse.contains(&segment.number)
                    || !wanted.overlaps(index.first_ns, index.last_ns))
            {
                if wanted.overlaps(index.first_ns, index.last_ns) {
                    index.directory.into_iter().for_each(&mut *each);
                }
                continue;
            }
            if !is_segment(&file, segment.number).map_err(failed)? {
                continue;
            }
            let mut scanner = Scanner::new(&file, segment.number).map_err(failed)?;
            while let Some(item) = scanner.next_item().map_err(failed)? {
                let Item::Frame { header, bytes } = item else { continue };
                let (first_ns, last_ns) = times_ns(&header);
                if wanted.overlaps(first_ns, last_ns)
                    && let Ok(frame) = Frame::decode(bytes)
                {
                    frame.body().entities.iter().for_each(|entity| each(Described::of(header.node, entity)));
                }
            }
        }
        Ok(())
    }
}

struct Pass<'a> {
    wanted: &'a Selection,
    keys: Vec<u64>,
    /// A poisoned segment's frames were written again, or will be when their collector sends them again.
    last_seq: HashMap<(u64, u64), u64, RandomState>,
    effort: Effort,
}

type Each<'a> = dyn FnMut(&Header, &[u8]) -> ControlFlow<()> + 'a;

impl Pass<'_> {
    fn segment(&mut self, file: &File, number: u64, each: &mut Each<'_>) -> io::Result<ControlFlow<()>> {
        self.effort.segments += 1;
        let Some(index) = Index::read(file, number)? else {
            self.effort.scanned += 1;
            return self.unindexed(file, number, each);
        };
        if !self.wanted.wants_segment(&index) {
            self.effort.segments_skipped += 1;
            return Ok(ControlFlow::Continue(()));
        }
        let (mut ranges, mut missing) = (Vec::new(), Missing::default());
        let (mut flow, mut is_counted) = (ControlFlow::Continue(()), true);
        for block in &index.blocks {
            if !self.wanted.wants_block(&index, block, &self.keys) {
                self.effort.blocks_skipped += 1;
                continue;
            }
            let range = block.offset..block.offset + u64::from(block.bytes);
            let mut found = Missing::default();
            let damaged_before = ranges.len();
            flow = self.range(file, number, range, &mut found, &mut ranges, each)?;
            if flow.is_break() {
                // What the rest of this block holds was not counted.
                is_counted = ranges.len() == damaged_before;
                break;
            }
            missing.frames += u64::from(block.frames).saturating_sub(found.frames);
            missing.events += u64::from(block.events).saturating_sub(found.events);
        }
        if !ranges.is_empty() || missing != Missing::default() {
            self.effort.damages.push(Damage::of_bytes(number, ranges, is_counted.then_some(missing)));
        }
        Ok(flow)
    }

    /// Scans a segment without an index. A server may be writing it.
    fn unindexed(&mut self, file: &File, number: u64, each: &mut Each<'_>) -> io::Result<ControlFlow<()>> {
        let mut found: Vec<Damage> = Vec::new();
        let place = |range: Range<u64>| Damage::of_bytes(number, vec![range], None);
        if !is_segment(file, number)? {
            found.push(place(0..SEGMENT_HEADER_BYTES as u64));
        }
        let mut flow = ControlFlow::Continue(());
        let mut scanner = Scanner::new(file, number)?;
        let (mut at, mut last_mark, mut last_ns) = (scanner.position(), 0, 0);
        while let Some(item) = scanner.next_item()? {
            match item {
                Item::Frame { header, bytes } => {
                    last_ns = header.realtime_ns;
                    found
                        .iter_mut()
                        .filter(|damage| damage.before_ns == u64::MAX)
                        .for_each(|damage| damage.before_ns = last_ns);
                    self.effort.bytes += bytes.len() as u64;
                    flow = self.frame(&header, bytes, each);
                }
                Item::Damaged(range) if found.len() < damage::DAMAGES_MAX => {
                    found.push(Damage { after_ns: last_ns, ..place(range) });
                }
                Item::Note(Note::Mark | Note::Index) => last_mark = at,
                Item::Note(_) | Item::Damaged(_) | Item::Tail { .. } => {}
            }
            if flow.is_break() {
                break;
            }
            at = scanner.position();
        }
        let mut ranges = Vec::new();
        for damage in found {
            let DamagePlace::Bytes(places) = &damage.place else { continue };
            for range in places {
                // Behind the last commit nothing was acknowledged.
                let is_lost = range.start <= last_mark
                    && self.wanted.may_lack(&damage)
                    && !(range.start > 0 && damage::is_written_by_now(file, number, range.start)?);
                if is_lost {
                    ranges.push(range.clone());
                }
            }
        }
        if !ranges.is_empty() {
            self.effort.damages.push(Damage::of_bytes(number, ranges, None));
        }
        Ok(flow)
    }

    fn range(
        &mut self,
        file: &File,
        number: u64,
        range: Range<u64>,
        found: &mut Missing,
        damaged: &mut Vec<Range<u64>>,
        each: &mut Each<'_>,
    ) -> io::Result<ControlFlow<()>> {
        let end = range.end;
        let mut scanner = Scanner::within(file, number, range)?;
        let mut at = scanner.position();
        while let Some(item) = scanner.next_item()? {
            match item {
                Item::Frame { header, bytes } => {
                    found.frames += 1;
                    found.events += u64::from(header.events());
                    self.effort.bytes += bytes.len() as u64;
                    if self.frame(&header, bytes, each).is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                Item::Damaged(range) => damage::push(damaged, range),
                Item::Tail { from, .. } if from < end => damage::push(damaged, from..end),
                Item::Tail { .. } | Item::Note(_) => {}
            }
            let next = scanner.position();
            debug_assert!(next >= at);
            at = next;
        }
        Ok(ControlFlow::Continue(()))
    }

    fn frame(&mut self, header: &Header, bytes: &[u8], each: &mut Each<'_>) -> ControlFlow<()> {
        let (first_ns, last_ns) = times_ns(header);
        if !self.wanted.wants_node(header.node) || !self.wanted.overlaps(first_ns, last_ns) {
            return ControlFlow::Continue(());
        }
        let last = self.last_seq.entry((header.node, header.epoch)).or_default();
        if header.seq <= *last {
            return ControlFlow::Continue(());
        }
        *last = header.seq;
        self.effort.frames += 1;
        each(header, bytes)
    }
}

/// Opens a segment; `None` when retention was faster.
fn open(path: &Path) -> Result<Option<File>, ReadError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ReadError::Segment { path: path.to_owned(), source }),
    }
}

/// Whether a file begins as this segment.
pub(crate) fn is_segment(file: &File, number: u64) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let mut header = [0; SEGMENT_HEADER_BYTES];
    match file.read_exact_at(&mut header, 0) {
        Ok(()) => Ok(parse_segment_header(&header) == Some(number)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}
