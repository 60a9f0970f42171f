//! Rewrites segments without what belongs to a namespace or a pod.
//!
//! What enters: a segment, and whom to erase. What leaves: another segment with the same frames under the same sequence numbers. In
//! the place of an erased event stands a gap whose reason is [`ERASED`]: the ledger still closes, and the ids of other events stay.
//! What must hold: the new segment is whole and synced before it takes the old one's place; a repeated run goes on.

use std::collections::HashSet;
use std::fs::{self, File, Metadata};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use foldhash::fast::RandomState;
use rkyv::rancor::Failure;
use serde_json::Value;
use tapio_wire::event::{
    ArchivedDetail, ArchivedEvent, Body, Detail, EntityId, Event, FieldValue, Gap, Lane, NO_NAME, Name,
};
use tapio_wire::frame::{Encoder, Frame, Header, Stamp};
use tapio_wire::segment::{RECORD_HEADER_BYTES, SegmentRecordKind, append_record, segment_header};

use super::holds::Hold;
use super::index::{IndexBuilder, Summary, realtime_ns};
use super::scan::{Item, Scanner};
use super::snapshot::Note;

pub use tapio_wire::event::ERASED;

/// Whom to erase.
#[derive(Clone, Debug, Default)]
pub struct Erasure {
    pub namespace: String,
    /// One pod of it; all without one.
    pub pod: Option<String>,
    /// Nanoseconds since 1970, both included.
    pub since_ns: u64,
    pub until_ns: u64,
    /// Node and id of the namespace's or the pod's entities.
    pub entities: HashSet<(u64, u64), RandomState>,
}

/// What a rewritten segment came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Erased {
    /// Events in whose place a gap stands now, and descriptions that are gone.
    pub events: u64,
    pub descriptions: u64,
    /// References of other events, as the sender of a signal.
    pub references: u64,
    /// Events that were erased before.
    pub before: u64,
    /// Bytes that are no records: nobody knows what is in them, so they are left out.
    pub damaged_bytes: u64,
    /// Frames that cannot be decoded; they are left out too.
    pub undecodable: u64,
}

impl Erased {
    /// Whether the new segment differs from the old one.
    fn is_changed(&self) -> bool {
        self.events + self.descriptions + self.references + self.damaged_bytes + self.undecodable > 0
    }

    /// Whether the new segment is to take the old one's place. What cannot be read may be what a legal hold keeps: alone it is no
    /// reason then.
    ///
    /// # Errors
    /// The hold, where there is something to erase beside what cannot be read.
    pub fn replaces<'a>(&self, holds: &'a [Hold]) -> Result<bool, &'a Hold> {
        match holds.first().filter(|_| self.damaged_bytes + self.undecodable > 0) {
            None => Ok(self.is_changed()),
            Some(_) if self.events + self.descriptions + self.references == 0 => Ok(false),
            Some(hold) => Err(hold),
        }
    }

    /// Adds what another segment came to.
    pub fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.descriptions += other.descriptions;
        self.references += other.references;
        self.before += other.before;
        self.damaged_bytes += other.damaged_bytes;
        self.undecodable += other.undecodable;
    }
}

impl Erasure {
    fn is_of_time(&self, ns: u64) -> bool {
        (self.since_ns..=self.until_ns).contains(&ns)
    }

    /// Whether descriptions go too. Events outside of a named time keep theirs: a later erasure finds them by it.
    fn takes_descriptions(&self) -> bool {
        (self.since_ns, self.until_ns) == (0, u64::MAX)
    }

    fn is_meant(&self, node: u64, entity: EntityId) -> bool {
        entity != 0 && self.entities.contains(&(node, entity))
    }

    /// Whether an event belongs to whom is erased: its subject does, or it names them.
    fn takes(&self, frame: &Frame, event: &ArchivedEvent) -> bool {
        if self.is_meant(frame.header().node, event.entity.to_native()) {
            return true;
        }
        let name = |index: Name| frame.body().name(index);
        let (mut is_of_namespace, mut is_of_pod) = (false, self.pod.is_none());
        event.each_field(&mut |field, value| {
            let FieldValue::Name(index) = value else { return };
            is_of_namespace |= field == "namespace" && name(index) == Some(&self.namespace);
            is_of_pod |= field == "name" && name(index) == self.pod.as_deref();
        });
        is_of_namespace && is_of_pod
    }

    /// Whether a finding's or another document's JSON is about whom is erased.
    pub fn mentions(&self, value: &Value) -> bool {
        match value {
            Value::Object(fields) => {
                let text = |name: &str| fields.get(name).and_then(Value::as_str);
                let is_it = text("namespace") == Some(&self.namespace)
                    && self.pod.as_deref().is_none_or(|pod| text("pod") == Some(pod) || text("name") == Some(pod));
                is_it || fields.values().any(|value| self.mentions(value))
            }
            Value::Array(values) => values.iter().any(|value| self.mentions(value)),
            _ => false,
        }
    }
}

/// Calls `each` with every name that an event refers to, in lists too.
fn names_of(event: &ArchivedEvent, each: &mut dyn FnMut(Name)) {
    event.each_field(&mut |_, value| {
        if let FieldValue::Name(name) = value {
            each(name);
        }
    });
    match &event.body {
        // Plus one: 0 is unknown.
        ArchivedDetail::Signal(signal) => each(signal.sender_parent.to_native().wrapping_sub(1)),
        ArchivedDetail::LogLines(log) => log.lines.iter().for_each(|line| each(line.to_native())),
        ArchivedDetail::CgroupUse(seen) => seen.members.iter().for_each(|member| each(member.cgroup.to_native())),
        _ => {}
    }
}

/// Takes what is erased out of another subject's event. Whether there was something.
fn forget(detail: &mut Detail, is_meant: &dyn Fn(EntityId) -> bool) -> bool {
    match detail {
        Detail::Signal(signal) if is_meant(signal.sender_entity) => {
            (signal.sender_entity, signal.sender_pid) = (0, 0);
            (signal.sender_comm, signal.sender_parent) = (NO_NAME, 0);
            true
        }
        Detail::Oom(oom) if is_meant(oom.allocator_entity) => {
            (oom.allocator_entity, oom.allocator_pid, oom.allocator_comm) = (0, 0, NO_NAME);
            true
        }
        Detail::Observation(seen) if is_meant(seen.process_entity) => {
            (seen.process_entity, seen.process, seen.process_uid) = (0, 0, 0);
            (seen.process_comm, seen.process_command) = (NO_NAME, NO_NAME);
            true
        }
        Detail::CgroupUse(seen) => {
            let before = seen.members.len();
            seen.members.retain(|member| !is_meant(member.entity));
            seen.members.len() < before
        }
        Detail::Endpoints(service) => {
            let before = service.backends.len();
            service.backends.retain(|backend| !is_meant(backend.pod));
            service.backends.len() < before
        }
        Detail::ConfigChange(change) => {
            let before = change.used_by.len();
            change.used_by.retain(|&entity| !is_meant(entity));
            change.used_by.len() < before
        }
        _ => false,
    }
}

/// The frame without whom is erased; `None` where it stays as it is.
fn frame_without(
    frame: &Frame,
    erasure: &Erasure,
    encoder: &mut Encoder,
    erased: &mut Erased,
) -> io::Result<Option<Vec<u8>>> {
    let (header, archived) = (frame.header(), frame.body());
    let is_erased = |event: &ArchivedEvent| match &event.body {
        ArchivedDetail::Gap(gap) => archived.name(gap.reason.to_native()) == Some(ERASED),
        _ => false,
    };
    let of_time = |event: &ArchivedEvent| erasure.is_of_time(realtime_ns(header, event.time_ns.to_native()));
    let takes: Vec<bool> = archived.events.iter().map(|event| of_time(event) && erasure.takes(frame, event)).collect();
    erased.before += archived.events.iter().filter(|event| is_erased(event)).count() as u64;
    let invalid = |problem: &str| io::Error::new(io::ErrorKind::InvalidData, problem.to_owned());
    let mut body: Body =
        rkyv::deserialize::<Body, Failure>(archived).map_err(|_| invalid("a frame's body cannot be read"))?;
    let is_meant = |entity: EntityId| erasure.is_meant(header.node, entity);
    let (described, events) = (body.entities.len(), takes.iter().filter(|takes| **takes).count() as u64);
    if erasure.takes_descriptions() {
        body.entities.retain(|entity| !is_meant(entity.id));
    }
    let descriptions = (described - body.entities.len()) as u64;
    let mut references = 0;
    for ((event, archived), takes) in body.events.iter_mut().zip(archived.events.iter()).zip(&takes) {
        references += u64::from(!takes && of_time(archived) && forget(&mut event.body, &is_meant));
    }
    if events + descriptions + references == 0 {
        return Ok(None);
    }
    let (what, reason) = (body.names.len() as Name, body.names.len() as Name + 1);
    body.names.extend(["events", ERASED].map(str::to_owned));
    for (event, _) in body.events.iter_mut().zip(&takes).filter(|(_, takes)| **takes) {
        let (time_ns, source) = (event.time_ns, event.source);
        let gap = Gap { what, reason, from_ns: time_ns, until_ns: time_ns, found_gone: 0 };
        *event = Event { time_ns, entity: 0, pid: 0, source, body: Detail::Gap(Box::new(gap)) };
    }
    let lane = if header.lethal_events > 0 { Lane::Lethal } else { Lane::Bulk };
    let mut seal = |body: &Body| {
        let sealed = encoder.seal(body, lane, header.compression).map_err(|error| invalid(&error.to_string()))?;
        Ok::<_, io::Error>(sealed.stamp(&stamp_of(header), frame.ledger()).to_vec())
    };
    // Names that no event refers to any more are those of what was erased.
    let bytes = seal(&body)?;
    let new = Frame::decode(&bytes).map_err(|error| invalid(&error.to_string()))?;
    let mut used = HashSet::<Name, RandomState>::default();
    new.body().events.iter().for_each(|event| names_of(event, &mut |name| used.extend([name])));
    let unused = body.names.iter_mut().enumerate().filter(|(index, _)| !used.contains(&(*index as Name)));
    unused.for_each(|(_, name)| name.clear());
    erased.events += events;
    erased.descriptions += descriptions;
    erased.references += references;
    seal(&body).map(Some)
}

fn stamp_of(header: &Header) -> Stamp {
    Stamp {
        node: header.node,
        epoch: header.epoch,
        seq: header.seq,
        boottime_ns: header.boottime_ns,
        realtime_ns: header.realtime_ns,
        is_final: header.is_final,
    }
}

/// A segment that is written record by record.
struct Out {
    file: BufWriter<File>,
    number: u64,
    offset: u64,
    index: IndexBuilder,
    record: Vec<u8>,
}

impl Out {
    fn new(path: &Path, number: u64) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        let header = segment_header(number);
        file.write_all(&header)?;
        let (index, record) = (IndexBuilder::default(), Vec::new());
        Ok(Self { file, number, offset: header.len() as u64, index, record })
    }

    fn record(&mut self, kind: SegmentRecordKind, content: &[u8]) -> io::Result<()> {
        self.record.clear();
        append_record(&mut self.record, self.number, self.offset, kind, content);
        self.file.write_all(&self.record)?;
        self.offset += self.record.len() as u64;
        Ok(())
    }

    fn frame(&mut self, bytes: &[u8], frame: &Frame) -> io::Result<()> {
        self.index.add(self.offset, bytes.len(), frame.header(), Some(&Summary::of(frame)));
        self.record(SegmentRecordKind::Frame, bytes)
    }

    fn finish(mut self) -> io::Result<()> {
        if !self.index.is_empty() {
            let index = std::mem::take(&mut self.index).finish(self.number, self.offset);
            self.record(SegmentRecordKind::Index, &index)?;
        }
        self.file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    }
}

/// Writes a segment without whom is erased to `to`, synced. `from` stays as it is.
///
/// # Errors
/// When a file cannot be read or written.
pub fn rewrite(from: &File, number: u64, erasure: &Erasure, to: &Path) -> io::Result<Erased> {
    let mut erased = Erased::default();
    let mut out = Out::new(to, number)?;
    let mut encoder = Encoder::default();
    let mut scanner = Scanner::new(from, number)?;
    let mut at = scanner.position();
    while let Some(item) = scanner.next_item()? {
        match item {
            Item::Frame { bytes, .. } => match Frame::decode(bytes) {
                Ok(frame) => match frame_without(&frame, erasure, &mut encoder, &mut erased)? {
                    Some(new) => {
                        let problem = |_| io::Error::new(io::ErrorKind::InvalidData, "a rewritten frame is not sound");
                        let frame = Frame::decode(&new).map_err(problem)?;
                        out.frame(&new, &frame)?;
                    }
                    None => out.frame(bytes, &frame)?,
                },
                Err(_) => erased.undecodable += 1,
            },
            // It is made again.
            Item::Note(Note::Index) => {}
            Item::Note(_) => {
                let content = content(from, at)?;
                out.record(SegmentRecordKind::Snapshot, &content)?;
            }
            Item::Damaged(range) => erased.damaged_bytes += range.end - range.start,
            Item::Tail { .. } => {}
        }
        at = scanner.position();
    }
    out.finish()?;
    Ok(erased)
}

/// The content of the record at an offset.
fn content(file: &File, at: u64) -> io::Result<Vec<u8>> {
    let mut header = [0; RECORD_HEADER_BYTES];
    file.read_exact_at(&mut header, at)?;
    let length = u32::from_le_bytes(std::array::from_fn(|i| header[24 + i]));
    let mut content = vec![0; length as usize];
    file.read_exact_at(&mut content, at + RECORD_HEADER_BYTES as u64)?;
    Ok(content)
}

/// Removes lines of JSON about whom is erased from a file: findings. Returns how many.
///
/// # Errors
/// When the file cannot be read or replaced.
pub fn rewrite_lines(path: &Path, erasure: &Erasure) -> io::Result<u64> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let owner = file.metadata()?;
    let new = path.with_extension("erasing");
    let mut out = BufWriter::new(File::create(&new)?);
    let mut removed = 0;
    for line in BufReader::new(file).split(b'\n') {
        let line = line?;
        // What is no JSON may be anything.
        let is_meant = serde_json::from_slice::<Value>(&line).map_or(!line.is_empty(), |value| {
            erasure.mentions(&value) && ended(&value).is_none_or(|ended| erasure.is_of_time(ended))
        });
        if is_meant {
            removed += 1;
        } else {
            out.write_all(&line)?;
            out.write_all(b"\n")?;
        }
    }
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    match removed {
        0 => fs::remove_file(&new)?,
        _ => {
            owned_like(&new, &owner)?;
            fs::rename(&new, path)?;
        }
    }
    Ok(removed)
}

/// Gives a new file the owner and the mode of the one whose place it takes: whoever erases may be another user than the server.
///
/// # Errors
/// When that is not allowed.
pub fn owned_like(new: &Path, old: &Metadata) -> io::Result<()> {
    std::os::unix::fs::chown(new, Some(old.uid()), Some(old.gid()))?;
    fs::set_permissions(new, old.permissions())
}

/// When the finding of a line ended.
fn ended(line: &Value) -> Option<u64> {
    let ended = line.get("published")?.get("ended_ns")?;
    ended.as_u64().or_else(|| ended.as_str()?.parse().ok())
}
