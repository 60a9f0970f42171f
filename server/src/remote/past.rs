//! The past in a remote archive, for one request: the indexes of its time, and then only the blocks that may have what is wanted.
//!
//! What enters: a time. What leaves: folders of sparse segments for the archive's reader, the blocks that it asks for, and how many
//! bytes came from the store. What must hold: what could not be read is named, and the rest is read. The cache keeps within its
//! bound.
//!
//! ```text
//!  names of objects ──► ends of segments: indexes ──► names that people use ──► blocks that may match ──► frames
//! ```

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::fast::RandomState;
use futures::{StreamExt, stream};
use tapio_wire::program::units::human_bytes;
use tokio::runtime::Runtime;

use super::RemoteError;
use super::cache::{self, SPARSE_SUFFIX, View};
use super::listing::{self, Label, Listed, Segments};
use super::ranges::{self, Run, TailHint};
use super::store::Store;
use super::{config::RemoteSection, fetch};
use crate::archive::index::Index;
use crate::archive::reader::Selection;
use crate::archive::scan::{Item, Scanner};
use crate::archive::snapshot::Note;
use crate::archive::sparse::{Ahead, Sparse};

/// Descriptions of what is wanted are repeated every minute, and clocks differ.
const MARGIN_NS: u64 = 140_000_000_000;
/// Requests to the store at a time.
const AT_A_TIME: usize = 16;
/// Segments of which one request reads the index; the newest.
const SEGMENTS_MAX: usize = 4096;
/// Problems that are named.
const PROBLEMS_MAX: usize = 5;

/// What a request read of a remote archive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// Bytes that came from the store for it.
    pub read_bytes: u64,
    /// The segments of its time, and all bytes of them.
    pub segments: u64,
    pub archive_bytes: u64,
}

/// What a request is about.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub since_ns: u64,
    pub until_ns: u64,
    /// It names a pod or the like: every description must be known.
    pub is_named: bool,
    /// Left out: of this life the segments from this number on, which are on this disk.
    pub besides: Option<(String, u64)>,
}

/// Where what was fetched is kept, by one request at a time.
#[derive(Debug)]
pub(super) struct Kept {
    pub cache: PathBuf,
    pub cache_bytes: u64,
    pub turn: Mutex<()>,
    pub hint: TailHint,
    /// Views of a process that was killed are gone.
    pub is_clean: AtomicBool,
}

impl Kept {
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A segment of the wanted time.
#[derive(Clone, Debug)]
struct Segment {
    listed: Listed,
    /// Its file in the cache.
    path: PathBuf,
    is_sparse: bool,
}

#[derive(Debug, Default)]
struct State {
    read: Read,
    problems: Vec<String>,
    more_problems: u64,
    /// The store does not answer: it is not asked again.
    is_dead: bool,
}

impl State {
    fn problem(&mut self, problem: String) {
        match self.problems.len() {
            PROBLEMS_MAX.. => self.more_problems += 1,
            _ if self.problems.contains(&problem) => {}
            _ => self.problems.push(problem),
        }
    }

    /// Takes in why something could not be fetched.
    fn failed(&mut self, error: &RemoteError, unread: &str) {
        if let RemoteError::Object { name, source: object_store::Error::NotFound { .. } } = error {
            return self.problem(format!("{name} is no longer there{unread}"));
        }
        self.is_dead |= matches!(error, RemoteError::Object { .. } | RemoteError::Store { .. });
        self.problem(format!("{error}{unread}"));
    }
}

/// The past in a remote archive, as one request sees it.
#[derive(Debug)]
pub struct Past {
    runtime: Runtime,
    store: Store,
    kept: Arc<Kept>,
    views: Vec<(View, Sparse)>,
    segments: Vec<Segment>,
    names: HashMap<u64, Arc<str>, RandomState>,
    state: Mutex<State>,
}

impl Past {
    /// Fetches the indexes of the wanted time; `None` where the remote archive has nothing of it. Blocking.
    ///
    /// # Errors
    /// When the store cannot be listed, or this disk fails. What else fails is a problem of the answer.
    pub(super) fn look(section: &RemoteSection, kept: Arc<Kept>, asked: &Asked) -> Result<Option<Self>, RemoteError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(RemoteError::Thread)?;
        let store = Store::open(section)?;
        store.check_folder()?;
        let listed = runtime.block_on(listing::list(&store, &store.root))?;
        let turn = Arc::clone(&kept);
        let _turn = turn.turn();
        if !kept.is_clean.swap(true, Ordering::Relaxed) {
            cache::remove_views(&kept.cache);
        }
        // Half of the cache is for what this request reads.
        cache::make_room(&kept.cache, kept.cache_bytes / 2, &HashSet::new())?;
        let mut past = Self {
            runtime,
            store,
            kept,
            views: Vec::new(),
            segments: Vec::new(),
            names: HashMap::default(),
            state: Mutex::default(),
        };
        let times = (asked.since_ns.saturating_sub(MARGIN_NS), asked.until_ns.saturating_add(MARGIN_NS));
        let mut wanted = Vec::new();
        for (label, mut segments) in listed {
            if let Some((life, number)) = &asked.besides
                && label.life == *life
            {
                segments.split_off(number);
            }
            wanted.push((label, listing::of_time(segments, times)));
        }
        past.bound(&mut wanted);
        for (label, wanted) in wanted.into_iter().filter(|(_, segments)| !segments.is_empty()) {
            let folder = cache::folder(&past.kept.cache, &label)?;
            let view = View::new(&past.kept.cache, label)?;
            let mut found = past.index_all(&folder, wanted, asked.is_named)?;
            for segment in &mut found {
                // From here on by the view's own link: another request may remove the cache's, and begin a new file there.
                segment.path = view.link(segment.listed.name.number, &segment.path)?;
            }
            past.heads(&found)?;
            past.learn_names(&found)?;
            let mut sparse = Sparse::default();
            for segment in &found {
                if segment.is_sparse {
                    sparse.insert(segment.listed.name.number);
                }
            }
            past.segments.extend(found);
            past.views.push((view, sparse));
        }
        let nothing = past.views.is_empty() && past.unread().is_none();
        Ok((!nothing).then_some(past))
    }

    /// The folders to read, and which of their segments are sparse.
    pub fn parts(&self) -> Vec<(PathBuf, Sparse)> {
        self.views.iter().map(|(view, sparse)| (view.dir.clone(), sparse.clone())).collect()
    }

    /// How much was read.
    pub fn read(&self) -> Read {
        self.state().read
    }

    /// What could not be read, and why.
    pub fn unread(&self) -> Option<String> {
        let state = self.state();
        let mut problems = state.problems.clone();
        if state.more_problems > 0 {
            problems.push(format!("{} more problems", state.more_problems));
        }
        (!problems.is_empty()).then(|| problems.join("; "))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves out the oldest of too many segments.
    fn bound(&self, wanted: &mut [(Label, Segments)]) {
        let mut ends: Vec<u64> =
            wanted.iter().flat_map(|(_, segments)| segments.values()).map(|listed| listed.name.last_ns).collect();
        if ends.len() <= SEGMENTS_MAX {
            return;
        }
        ends.sort_unstable();
        let left_out = ends.len() - SEGMENTS_MAX;
        let first_ns = ends[left_out];
        wanted.iter_mut().for_each(|(_, segments)| segments.retain(|_, listed| listed.name.last_ns >= first_ns));
        let moment = super::names::moment(first_ns);
        self.state().problem(format!(
            "{left_out} segments that ended before {moment} were not looked at: name a time with --since and --until"
        ));
    }

    /// Brings the index of each segment; a segment without one comes whole.
    fn index_all(&self, folder: &Path, wanted: Segments, is_named: bool) -> Result<Vec<Segment>, RemoteError> {
        let (store, hint) = (&self.store, &self.kept.hint);
        let one = |listed: Listed| async move {
            let path = folder.join(listed.name.file() + SPARSE_SUFFIX);
            if self.state().is_dead {
                return (listed, path, None);
            }
            let outcome = ranges::indexed(store, &listed, &path, hint).await;
            (listed, path, Some(outcome))
        };
        let all = stream::iter(wanted.into_values()).map(one).buffered(AT_A_TIME);
        let all: Vec<_> = self.runtime.block_on(all.collect());
        let mut found = Vec::new();
        for (listed, path, outcome) in all {
            let mut state = self.state();
            state.read.segments += 1;
            state.read.archive_bytes += listed.bytes;
            match outcome {
                Some(Ok((Some(index), came))) => {
                    state.read.read_bytes += came;
                    drop(state);
                    match index.directory_whole || !is_named {
                        true => found.push(Segment { listed, path, is_sparse: true }),
                        false => found.extend(self.whole(folder, listed)?),
                    }
                }
                Some(Ok((None, came))) => {
                    state.read.read_bytes += came;
                    drop(state);
                    found.extend(self.whole(folder, listed)?);
                }
                Some(Err(error @ RemoteError::Local { .. })) => return Err(error),
                Some(Err(error)) => state.failed(&error, ""),
                None => state.problem(format!("{} was not asked for", listed.path)),
            }
        }
        Ok(found)
    }

    /// Brings a segment that has no index, or whose index lacks descriptions.
    fn whole(&self, folder: &Path, listed: Listed) -> Result<Option<Segment>, RemoteError> {
        let held = cache::held(&self.kept.cache)?;
        if held.saturating_add(listed.bytes) > self.kept.cache_bytes {
            let (bytes, allowed) = (human_bytes(listed.bytes), human_bytes(self.kept.cache_bytes));
            let problem = format!(
                "{} has no whole index, and its {bytes} do not fit beside what archive.remote.cache_bytes ({allowed}) holds",
                listed.path
            );
            self.state().problem(problem);
            return Ok(None);
        }
        let path = folder.join(listed.name.file());
        let came = self.runtime.block_on(fetch::ensure(&self.store, &listed, &path, &mut |_| {}));
        match came {
            Ok(came) => {
                self.state().read.read_bytes += came;
                Ok(Some(Segment { listed, path, is_sparse: false }))
            }
            Err(error @ RemoteError::Local { .. }) => Err(error),
            Err(error) => {
                self.state().failed(&error, "");
                Ok(None)
            }
        }
    }

    /// Brings the snapshots that are needed: the last one, for names, and those beside absent and unindexed segments.
    fn heads(&self, found: &[Segment]) -> Result<(), RemoteError> {
        let number = |segment: &Segment| segment.listed.name.number;
        for (place, segment) in found.iter().enumerate().filter(|(_, segment)| segment.is_sparse) {
            let before = place.checked_sub(1).map(|before| &found[before]);
            let is_needed = found.get(place + 1).is_none_or(|next| number(next) > number(segment) + 1)
                || before.is_some_and(|before| number(before) + 1 < number(segment) || !before.is_sparse);
            if !is_needed || self.state().is_dead {
                continue;
            }
            let local = |source| RemoteError::Local { path: segment.path.clone(), source };
            let file = File::options().read(true).write(true).open(&segment.path).map_err(local)?;
            let Some(index) = Index::read(&file, number(segment)).map_err(local)? else { continue };
            if ranges::has_head(&file, number(segment), &index).map_err(local)? {
                continue;
            }
            let head = ranges::head(&index);
            let came = self.runtime.block_on(ranges::bring(&self.store, &segment.listed, &file, head));
            match came {
                Ok(came) => self.state().read.read_bytes += came,
                Err(error) => self.state().failed(&error, ": what its snapshot counts is not checked"),
            }
        }
        Ok(())
    }

    /// Learns what nodes are called: from the last snapshot, and from the manifest of that segment.
    fn learn_names(&mut self, found: &[Segment]) -> Result<(), RemoteError> {
        let Some(last) = found.last() else { return Ok(()) };
        let local = |source| RemoteError::Local { path: last.path.clone(), source };
        let number = last.listed.name.number;
        let file = File::open(&last.path).map_err(local)?;
        let head = Index::read(&file, number).map_err(local)?.map(|index| ranges::head(&index));
        let mut scanner = match head {
            Some(head) => Scanner::within(&file, number, head),
            None => Scanner::new(&file, number),
        }
        .map_err(local)?;
        if let Some(Item::Note(Note::Books(books))) = scanner.next_item().map_err(local)? {
            self.names.extend(books.nodes().filter_map(|(id, node)| Some((id, node.name.clone()?))));
        }
        if self.state().is_dead {
            return Ok(());
        }
        match self.runtime.block_on(listing::manifest(&self.store, &last.listed.path, number)) {
            Ok(manifest) => {
                let named = manifest.nodes.into_iter().filter(|count| !count.name.is_empty());
                let named = named.filter_map(|count| Some((u64::from_str_radix(&count.node, 16).ok()?, count.name)));
                self.names.extend(named.map(|(id, name)| (id, name.into())));
            }
            Err(error) => self.state().failed(&error, ": names of nodes may be missing"),
        }
        Ok(())
    }

    /// The blocks that a selection wants and this disk lacks, by segment.
    fn lacking(&self, wanted: &Selection) -> Result<BTreeMap<usize, Vec<Run>>, RemoteError> {
        let keys = wanted.keys();
        let mut lacking = BTreeMap::new();
        for (place, segment) in self.segments.iter().enumerate().filter(|(_, segment)| segment.is_sparse) {
            let local = |source| RemoteError::Local { path: segment.path.clone(), source };
            let number = segment.listed.name.number;
            // Memory does not grow with the archive: each index is read again.
            let file = File::open(&segment.path).map_err(local)?;
            let Some(index) = Index::read(&file, number).map_err(local)? else { continue };
            if !wanted.wants_segment(&index) {
                continue;
            }
            let mut blocks = Vec::new();
            for block in index.blocks.iter().filter(|block| wanted.wants_block(&index, block, &keys)) {
                if !ranges::is_sound(&file, number, block).map_err(local)? {
                    blocks.push(*block);
                }
            }
            if !blocks.is_empty() {
                lacking.insert(place, ranges::runs(blocks));
            }
        }
        Ok(lacking)
    }

    fn bring_all(&self, wanted: &Selection) -> Result<(), RemoteError> {
        let _turn = self.kept.turn();
        let lacking = self.lacking(wanted)?;
        let needed: u64 = lacking.values().flatten().map(|run| run.range.end - run.range.start).sum();
        if needed == 0 {
            return Ok(());
        }
        let names = lacking.keys().map(|&place| self.segments[place].listed.name.file()).collect();
        cache::make_room(&self.kept.cache, self.kept.cache_bytes.saturating_sub(needed), &names)?;
        if cache::held(&self.kept.cache)?.saturating_add(needed) > self.kept.cache_bytes {
            let (needed, allowed) = (human_bytes(needed), human_bytes(self.kept.cache_bytes));
            self.state().problem(format!(
                "{needed} of it may match, more than archive.remote.cache_bytes ({allowed}) has room for: ask for less \
                 time, one pod or fewer kinds"
            ));
            return Ok(());
        }
        let mut jobs = Vec::new();
        for (place, runs) in &lacking {
            let segment = &self.segments[*place];
            let local = |source| RemoteError::Local { path: segment.path.clone(), source };
            let file = File::options().read(true).write(true).open(&segment.path).map_err(local)?;
            let file = Arc::new(file);
            jobs.extend(runs.iter().map(|run| (segment, Arc::clone(&file), run)));
        }
        let jobs = stream::iter(jobs).map(|(segment, file, run)| self.bring_run(segment, file, run));
        self.runtime.block_on(jobs.buffer_unordered(AT_A_TIME).for_each(|()| async {}));
        Ok(())
    }

    /// Brings one run and checks it; what is wrong is a problem of the answer.
    async fn bring_run(&self, segment: &Segment, file: Arc<File>, run: &Run) {
        let events = |blocks: &mut dyn Iterator<Item = u32>| blocks.map(u64::from).sum::<u64>();
        if self.state().is_dead {
            let events = events(&mut run.blocks.iter().map(|block| block.events));
            let problem = format!("{} was not asked for: up to {events} events are missing", segment.listed.path);
            return self.state().problem(problem);
        }
        match ranges::bring(&self.store, &segment.listed, &file, run.range.clone()).await {
            Ok(came) => self.state().read.read_bytes += came,
            Err(error) => {
                let events = events(&mut run.blocks.iter().map(|block| block.events));
                return self.state().failed(&error, &format!(": up to {events} events are missing"));
            }
        }
        for block in &run.blocks {
            if !ranges::is_sound(&file, segment.listed.name.number, block).unwrap_or(false) {
                let (from, to, events) = (block.offset, block.offset + u64::from(block.bytes), block.events);
                let path = &segment.listed.path;
                self.state().problem(format!(
                    "{path} is damaged between bytes {from} and {to}: up to {events} events are missing"
                ));
            }
        }
    }
}

impl Ahead for Past {
    fn node_names(&self) -> HashMap<u64, Arc<str>, RandomState> {
        self.names.clone()
    }

    fn bring(&self, wanted: &Selection) {
        if let Err(error) = self.bring_all(wanted) {
            self.state().problem(error.to_string());
        }
    }
}
