//! A copy of an archive that a server may be writing.
//!
//! What enters: an archive's directory. What leaves: another one, which a server starts from. What must hold:
//!
//! - Everything that was acknowledged before the copy began is in it, but for what retention deleted by then.
//! - Closed segments are copied as they are. Of the open one the part that is whole from its beginning on is copied. A copy by
//!   blocks may miss a block that is written at that moment and have later ones; nobody could distinguish that from damage.
//! - The journal of findings is copied first: what its findings rest on is in the segments that are copied after it.
//! - The copy appears under its name when it is whole and synced, or not at all. Nothing is locked, and nothing of the
//!   archive is changed. Memory does not grow with it.

use std::fs::{self, File, FileTimes};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use tapio_wire::segment::{Found, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, SegmentRecordKind, find_record};

use super::ages;
use super::damage::{self, Damage};
use super::reader::{ReadError, Reader, SegmentFile, is_segment};
use super::scan::is_sound;
use super::segments::segment_path;
use crate::findings::journal;

/// What is silenced, beside the segments.
pub const SILENCES_FILE: &str = "silences.json";
/// Segments that are opened before the first is copied, the oldest ones: retention may delete them meanwhile.
const OPEN_MAX: usize = 256;
/// Bytes of the open segment that are read at once, unless a record is longer.
const WINDOW_BYTES: usize = 1 << 20;
/// How often the journal's files are opened until they belong together.
const JOURNAL_LOOKS_MAX: u32 = 5;
/// A record that is longer was not written by a server.
const RECORD_BYTES_MAX: usize = 256 << 20;

/// What was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    pub segments: u64,
    pub bytes: u64,
    /// Frames of the newest segment, record by record.
    pub newest_frames: u64,
    /// Segments that retention deleted before they could be opened.
    pub deleted: u64,
    /// Lines of the journal of findings.
    pub journal_lines: u64,
    /// Where acknowledged events are missing. What is damaged was copied as it is.
    pub damages: Vec<Damage>,
}

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("{} is not empty: give a directory that is new or empty", to.display())]
    NotEmpty { to: PathBuf },
    #[error("{} lies in the archive itself: give a directory outside of it", to.display())]
    Inside { to: PathBuf },
    #[error(
        "{} is there: another copy is under way, or one was interrupted. When none runs, remove it and try again",
        partial.display()
    )]
    UnderWay { partial: PathBuf },
    #[error("{} cannot be written: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "the copy cannot be put in its place {}: {source}. A directory that is a mount point cannot be replaced: name one in it",
        to.display()
    )]
    Place { to: PathBuf, source: io::Error },
}

/// Copies the archive in `from` to `to`; `read` is called with how many bytes were copied since its last call.
///
/// # Errors
/// [`CopyError`]; nothing of the copy is left then.
pub fn copy(from: &Path, to: &Path, read: &mut dyn FnMut(u64)) -> Result<Copied, CopyError> {
    let failed = |source| CopyError::Write { path: to.to_owned(), source };
    match fs::read_dir(to) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                return Err(CopyError::NotEmpty { to: to.to_owned() });
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let name = to.file_name().ok_or_else(|| failed(io::Error::other("it has no name of its own")))?;
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let unreadable = |source| ReadError::Directory { dir: from.to_owned(), source };
    let archive = fs::canonicalize(from).map_err(unreadable)?;
    if fs::canonicalize(parent).map_err(failed)?.starts_with(&archive) {
        return Err(CopyError::Inside { to: to.to_owned() });
    }
    // Before anything is made: a directory without segments is a mistake.
    Reader::new(from).segments()?;
    let mut partial = name.to_owned();
    partial.push(".partial");
    let partial = parent.join(partial);
    match fs::create_dir(&partial) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(CopyError::UnderWay { partial }),
        Err(source) => return Err(CopyError::Write { path: partial, source }),
    }
    let outcome = fill(from, &partial, read).and_then(|copied| {
        let placed = || -> io::Result<()> {
            // Atomic, and only where `to` is absent or empty still.
            fs::rename(&partial, to)?;
            File::open(parent)?.sync_all()
        };
        placed().map_err(|source| CopyError::Place { to: to.to_owned(), source })?;
        Ok(copied)
    });
    if outcome.is_err() {
        // Best effort: the next copy reports what is left.
        let _ = fs::remove_dir_all(&partial);
    }
    outcome
}

fn fill(from: &Path, partial: &Path, read: &mut dyn FnMut(u64)) -> Result<Copied, CopyError> {
    let mut copied = Copied::default();
    copy_journal(from, partial, &mut copied, read)?;
    for name in [ages::FILE, SILENCES_FILE] {
        copy_whole(name, (from, partial), &mut copied, read)?;
    }
    let segments = Reader::new(from).segments()?;
    let mut opened = Vec::new();
    let gaps = damage::gaps(&segments).map_err(|source| ReadError::Directory { dir: from.to_owned(), source })?;
    for segment in segments.iter().take(OPEN_MAX) {
        opened.push(open(segment)?);
    }
    let mut opened = opened.into_iter();
    for (index, segment) in segments.iter().enumerate() {
        let file = match opened.next() {
            Some(file) => file,
            None => open(segment)?,
        };
        let Some(file) = file else {
            copied.deleted += 1;
            continue;
        };
        copied.segments += 1;
        // A segment is opened when the one before it is closed, and nothing is appended to a closed one.
        let is_newest = index + 1 == segments.len();
        copy_segment(segment, &file, is_newest, partial, &mut copied, read)?;
    }
    copied.damages = damage::joined(gaps, std::mem::take(&mut copied.damages));
    let synced = File::open(partial).and_then(|dir| dir.sync_all());
    synced.map_err(|source| CopyError::Write { path: partial.to_owned(), source })?;
    Ok(copied)
}

/// Opens a segment; `None` when retention was faster.
fn open(segment: &SegmentFile) -> Result<Option<File>, ReadError> {
    match File::open(&segment.path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ReadError::Segment { path: segment.path.clone(), source }),
    }
}

fn copy_segment(
    segment: &SegmentFile,
    file: &File,
    is_newest: bool,
    partial: &Path,
    copied: &mut Copied,
    read: &mut dyn FnMut(u64),
) -> Result<(), CopyError> {
    let unreadable = |source| ReadError::Segment { path: segment.path.clone(), source };
    let path = segment_path(partial, segment.number);
    let failed = |source| CopyError::Write { path: path.clone(), source };
    let metadata = file.metadata().map_err(unreadable)?;
    if !is_newest {
        copied.damages.extend(damage::of_closed(file, segment.number, &mut |_| {}).map_err(unreadable)?);
    }
    let prefix = match is_newest && is_segment(file, segment.number).map_err(unreadable)? {
        true => whole(file, segment.number).map_err(unreadable)?,
        false => Prefix { end: metadata.len(), frames: 0, is_damaged: false },
    };
    copied.newest_frames += prefix.frames;
    if prefix.is_damaged {
        copied.damages.push(Damage::of_bytes(segment.number, Vec::new(), None));
    }
    let mut out = File::create_new(&path).map_err(failed)?;
    let source = file;
    let mut left = prefix.end;
    while left > 0 {
        // In parts, so that progress shows. The kernel copies.
        let part = io::copy(&mut source.take(left.min(16 << 20)), &mut out).map_err(failed)?;
        if part == 0 {
            // The preallocated rest of a closed segment was truncated meanwhile.
            break;
        }
        left -= part;
        copied.bytes += part;
        read(part);
    }
    // For people: retention goes by `ages.json`.
    let times = FileTimes::new().set_modified(metadata.modified().map_err(unreadable)?);
    out.set_permissions(metadata.permissions()).and_then(|()| out.set_times(times)).map_err(failed)?;
    out.sync_all().map_err(failed)
}

/// How much of a segment is whole.
#[derive(Debug, PartialEq, Eq)]
struct Prefix {
    end: u64,
    frames: u64,
    is_damaged: bool,
}

/// Goes through a segment that may be written at this moment, up to the first record that is not whole.
///
/// Every read begins after the copy did, so it sees what was acknowledged before; what is not whole was not. Unless a commit
/// follows it: then it was written by the time it is read once more, or it is damage.
fn whole(file: &File, number: u64) -> io::Result<Prefix> {
    let mut window = Window::default();
    let mut prefix = Prefix { end: SEGMENT_HEADER_BYTES as u64, frames: 0, is_damaged: false };
    loop {
        if let Some((kind, size)) = window.record(file, number, prefix.end)? {
            prefix.frames += u64::from(kind == SegmentRecordKind::Frame);
            prefix.end += size as u64;
            continue;
        }
        if !has_commit_after(file, number, prefix.end)? {
            return Ok(prefix);
        }
        window = Window::default();
        if window.record(file, number, prefix.end)?.is_none() {
            return Ok(Prefix { end: file.metadata()?.len(), is_damaged: true, ..prefix });
        }
    }
}

/// Whether a commit mark or an index lies behind `at`: everything before it was written.
fn has_commit_after(file: &File, number: u64, at: u64) -> io::Result<bool> {
    let mut window = Window::default();
    let end = file.metadata()?.len();
    let mut here = at + 8;
    while here < end {
        let rest = window.at(file, here, RECORD_HEADER_BYTES)?;
        if rest.is_empty() {
            return Ok(false);
        }
        // Zeros are passed by quickly.
        let zeros = rest.iter().position(|&byte| byte != 0).unwrap_or(rest.len()) as u64 & !7;
        if zeros > 0 {
            here += zeros;
            continue;
        }
        match window.record(file, number, here)? {
            Some((SegmentRecordKind::Index, _)) => return Ok(true),
            Some((SegmentRecordKind::Snapshot, RECORD_HEADER_BYTES)) => return Ok(true),
            Some((_, size)) => here += size as u64,
            None => here += 8,
        }
    }
    Ok(false)
}

/// A part of a file that may grow or shrink meanwhile.
#[derive(Default)]
struct Window {
    bytes: Vec<u8>,
    start: u64,
}

impl Window {
    /// The record at an offset, and its bytes with header and padding; `None` when it is not whole.
    fn record(&mut self, file: &File, number: u64, at: u64) -> io::Result<Option<(SegmentRecordKind, usize)>> {
        let mut rest = self.at(file, at, RECORD_HEADER_BYTES)?;
        if find_record(rest, number, at) == Found::Torn {
            let length =
                rest.get(24..28).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes) as usize;
            if length > RECORD_BYTES_MAX {
                return Ok(None);
            }
            rest = self.at(file, at, RECORD_HEADER_BYTES + length)?;
        }
        Ok(match find_record(rest, number, at) {
            Found::Record { kind, bytes, size } if is_sound(kind, bytes) => Some((kind, size)),
            _ => None,
        })
    }

    /// What is known from an offset on; at least `bytes` where the file has them.
    fn at(&mut self, file: &File, at: u64, bytes: usize) -> io::Result<&[u8]> {
        let known = self.start + self.bytes.len() as u64;
        if at < self.start || at + bytes as u64 > known {
            self.start = at;
            self.bytes.resize(bytes.max(WINDOW_BYTES), 0);
            let mut filled = 0;
            while filled < self.bytes.len() {
                match file.read_at(&mut self.bytes[filled..], at + filled as u64) {
                    Ok(0) => break,
                    Ok(read) => filled += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            self.bytes.truncate(filled);
        }
        Ok(self.bytes.get((at - self.start) as usize..).unwrap_or_default())
    }
}

/// Copies how old the segments are, or what is silenced: files that are replaced as a whole. A segment that is closed later counts
/// as closed when a server starts from the copy.
fn copy_whole(
    name: &str,
    (from, partial): (&Path, &Path),
    copied: &mut Copied,
    read: &mut dyn FnMut(u64),
) -> Result<(), CopyError> {
    let (source, to) = (from.join(name), partial.join(name));
    let bytes = match fs::read(&source) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ReadError::Segment { path: source, source: error }.into()),
    };
    let written = File::create_new(&to).and_then(|mut out| out.write_all(&bytes).and_then(|()| out.sync_all()));
    written.map_err(|source| CopyError::Write { path: to, source })?;
    copied.bytes += bytes.len() as u64;
    read(bytes.len() as u64);
    Ok(())
}

/// A journal's file, where it lies, and where its copy goes.
type JournalFile = (File, PathBuf, PathBuf);

fn open_journal(from: &Path, partial: &Path) -> Result<Vec<JournalFile>, CopyError> {
    let mut opened = Vec::new();
    for (source, to) in journal::paths(from).into_iter().zip(journal::paths(partial)) {
        match File::open(&source) {
            Ok(file) => opened.push((file, source, to)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(ReadError::Segment { path: source, source: error }.into()),
        }
    }
    Ok(opened)
}

/// Copies the journal's whole lines.
fn copy_journal(from: &Path, partial: &Path, copied: &mut Copied, read: &mut dyn FnMut(u64)) -> Result<(), CopyError> {
    // The newer one is opened first: when it takes the older one's name meanwhile, it is there twice, and not missing. When it
    // was replaced by then, the two do not belong together.
    let mut opened = open_journal(from, partial)?;
    for _ in 1..JOURNAL_LOOKS_MAX {
        let is_same = opened.first().is_none_or(|(file, path, _)| match (file.metadata(), fs::metadata(path)) {
            (Ok(opened), Ok(there)) => opened.ino() == there.ino(),
            _ => false,
        });
        if is_same {
            break;
        }
        opened = open_journal(from, partial)?;
    }
    for (file, source, to) in opened {
        let unreadable = |error| ReadError::Segment { path: source.clone(), source: error };
        let failed = |error| CopyError::Write { path: to.clone(), source: error };
        let metadata = file.metadata().map_err(unreadable)?;
        let mut bytes = Vec::new();
        (&file).take(metadata.len().min(2 * journal::FILE_BYTES_MAX)).read_to_end(&mut bytes).map_err(unreadable)?;
        // A line that is being written is not there yet.
        bytes.truncate(bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1));
        copied.journal_lines += bytes.iter().filter(|&&byte| byte == b'\n').count() as u64;
        copied.bytes += bytes.len() as u64;
        let mut out = File::create_new(&to).map_err(failed)?;
        out.write_all(&bytes).and_then(|()| out.set_permissions(metadata.permissions())).map_err(failed)?;
        out.sync_all().map_err(failed)?;
        read(bytes.len() as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tapio_wire::segment::{append_record, segment_header};

    use super::*;

    /// A segment of marks, with its records' offsets.
    fn segment(marks: usize) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = segment_header(7).to_vec();
        let mut offsets = Vec::new();
        for _ in 0..marks {
            offsets.push(bytes.len());
            let at = bytes.len() as u64;
            append_record(&mut bytes, 7, at, SegmentRecordKind::Snapshot, &[]);
        }
        bytes.resize(bytes.len() + 100_000, 0);
        (bytes, offsets)
    }

    fn whole_of(bytes: &[u8]) -> Prefix {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(bytes).expect("written");
        whole(&file, 7).expect("readable")
    }

    #[test]
    fn an_open_segment_is_copied_whole_and_damage_is_reported() {
        let (sound, offsets) = segment(5);
        let end = offsets[4] + RECORD_HEADER_BYTES;
        assert_eq!(whole_of(&sound), Prefix { end: end as u64, frames: 0, is_damaged: false });
        let mut torn = sound.clone();
        torn[offsets[4] + 20] ^= 1;
        assert_eq!(whole_of(&torn), Prefix { end: offsets[4] as u64, frames: 0, is_damaged: false });
        let mut damaged = sound.clone();
        damaged[offsets[2]..offsets[3]].fill(0);
        assert_eq!(whole_of(&damaged), Prefix { end: sound.len() as u64, frames: 0, is_damaged: true });
    }

    #[test]
    fn a_copy_goes_to_an_empty_directory_outside_or_nowhere() {
        let folder = tempfile::tempdir().expect("a folder");
        let (from, to) = (folder.path().join("archive"), folder.path().join("copy"));
        fs::create_dir(&from).expect("made");
        assert!(matches!(copy(&from, &to, &mut |_| {}), Err(CopyError::Read(_))), "an empty archive");
        let (bytes, offsets) = segment(3);
        fs::write(segment_path(&from, 7), &bytes).expect("written");
        fs::write(from.join("findings.jsonl"), "{}\n{}\n{\"to").expect("written");
        fs::write(from.join("ages.json"), "{}").expect("written");
        fs::write(from.join("silences.json"), "[]").expect("written");
        fs::create_dir(&to).expect("made");
        fs::write(to.join("x"), "").expect("written");
        assert!(matches!(copy(&from, &to, &mut |_| {}), Err(CopyError::NotEmpty { .. })));
        assert!(matches!(copy(&from, &from.join("copy"), &mut |_| {}), Err(CopyError::Inside { .. })));
        fs::remove_file(to.join("x")).expect("removed");
        fs::create_dir(folder.path().join("copy.partial")).expect("made");
        assert!(matches!(copy(&from, &to, &mut |_| {}), Err(CopyError::UnderWay { .. })));
        fs::remove_dir(folder.path().join("copy.partial")).expect("removed");
        let copied = copy(&from, &to, &mut |_| {}).expect("copied");
        assert_eq!((copied.segments, copied.deleted, copied.journal_lines), (1, 0, 2));
        let end = offsets[2] + RECORD_HEADER_BYTES;
        assert_eq!(fs::read(segment_path(&to, 7)).expect("readable"), bytes[..end]);
        assert_eq!(fs::read_to_string(to.join("findings.jsonl")).expect("readable"), "{}\n{}\n");
        assert_eq!(fs::read_to_string(to.join("ages.json")).expect("readable"), "{}");
        assert_eq!(fs::read_to_string(to.join("silences.json")).expect("readable"), "[]");
        let modified = |path: PathBuf| fs::metadata(path).and_then(|metadata| metadata.modified()).expect("a time");
        assert_eq!(modified(segment_path(&to, 7)), modified(segment_path(&from, 7)));
        assert!(!folder.path().join("copy.partial").exists());
    }
}
