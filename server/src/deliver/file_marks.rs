//! Marks of a server that is the only one: a file beside the archive, whose lock keeps others away.
//!
//! What must hold: a mark is on the disk before it counts. A torn line costs itself. The file is rewritten when it has grown to
//! twice its marks and [`SLACK_BYTES`].

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::marks::{Known, Mark, Marks, MarksError};

/// What the file may hold that counts no more.
const SLACK_BYTES: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Line {
    finding: String,
    mark: Mark,
}

pub(super) struct FileMarks {
    path: PathBuf,
    file: Option<File>,
    marks: HashMap<String, Known>,
    /// The last place that was given.
    place: u64,
    /// The file's length, and when it was rewritten last.
    bytes: u64,
    bytes_anew: u64,
}

impl FileMarks {
    pub(super) fn new(folder: &Path, sink: &str) -> Self {
        let path = folder.join(format!("delivered-{sink}.jsonl"));
        Self { path, file: None, marks: HashMap::new(), place: 0, bytes: 0, bytes_anew: 0 }
    }

    fn failed(&self) -> impl Fn(io::Error) -> MarksError + use<> {
        let path = self.path.clone();
        move |error| MarksError::File { path: path.clone(), error }
    }

    /// Puts the marks in the file's place, and opens it.
    fn write_anew(&mut self) -> io::Result<()> {
        self.file = None;
        let mut beside = self.path.clone().into_os_string();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        let mut file = io::BufWriter::new(File::create(&beside)?);
        for (finding, known) in &self.marks {
            file.write_all(&line(finding, &known.mark)?)?;
        }
        let mut file = file.into_inner()?;
        file.sync_data()?;
        fs::rename(&beside, &self.path)?;
        File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
        self.bytes = file.seek(SeekFrom::End(0))?;
        self.bytes_anew = self.bytes;
        self.file = Some(file);
        Ok(())
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.file.is_none() || self.bytes > 2 * self.bytes_anew + SLACK_BYTES {
            self.write_anew()?;
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let written = file.write_all(line).and_then(|()| file.sync_data());
        if written.is_err() {
            // The next attempt rewrites the file.
            self.file = None;
        }
        self.bytes += line.len() as u64;
        written
    }
}

fn line(finding: &str, mark: &Mark) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(&Line { finding: finding.to_owned(), mark: mark.clone() })?;
    bytes.push(b'\n');
    Ok(bytes)
}

impl Marks for FileMarks {
    /// They are beside the archive, and lost with it.
    async fn began_ns(&mut self) -> Result<u64, MarksError> {
        Ok(0)
    }

    async fn load(&mut self) -> Result<HashMap<String, Known>, MarksError> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(self.failed()(error)),
        };
        self.marks.clear();
        for line in text.split(|byte| *byte == b'\n') {
            if let Ok(Line { finding, mark }) = serde_json::from_slice(line) {
                self.place += 1;
                self.marks.insert(finding, Known { mark, place: self.place });
            }
        }
        self.write_anew().map_err(self.failed())?;
        Ok(self.marks.clone())
    }

    async fn read(&mut self, id: &str) -> Result<Option<Known>, MarksError> {
        Ok(self.marks.get(id).cloned())
    }

    async fn write(&mut self, id: &str, mark: &Mark, place: u64) -> Result<Option<u64>, MarksError> {
        if self.marks.get(id).map_or(0, |known| known.place) != place {
            return Ok(None);
        }
        let failed = self.failed();
        let line = line(id, mark).map_err(&failed)?;
        self.append(&line).map_err(failed)?;
        self.place += 1;
        self.marks.insert(id.to_owned(), Known { mark: mark.clone(), place: self.place });
        Ok(Some(self.place))
    }

    async fn purge(&mut self, ids: &[String]) -> Result<(), MarksError> {
        ids.iter().for_each(|id| drop(self.marks.remove(id)));
        self.write_anew().map_err(self.failed())
    }
}

#[cfg(test)]
mod tests {
    use super::super::marks::MarkState;
    use super::*;

    fn mark(revision: u32, state: MarkState) -> Mark {
        let (content, notes, reason) = ("c".into(), vec!["n".into()], String::new());
        Mark { revision, content, term: 1, state, withdrawn: false, at: 5, notes, reason }
    }

    #[tokio::test]
    async fn marks_survive_restarts_and_torn_lines_and_are_compared_first() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut marks = FileMarks::new(folder.path(), "webhook");
        assert!(marks.load().await.expect("there is none").is_empty());
        let first = marks.write("a", &mark(1, MarkState::Intent), 0).await.expect("written").expect("there was none");
        assert_eq!(marks.write("a", &mark(9, MarkState::Intent), 0).await.expect("read"), None);
        let second =
            marks.write("a", &mark(1, MarkState::Confirmed), first).await.expect("written").expect("its place");
        assert_eq!(marks.write("a", &mark(9, MarkState::Intent), first).await.expect("read"), None);
        assert!(second > first);
        marks.write("b", &mark(2, MarkState::Intent), 0).await.expect("written").expect("there was none");
        drop(marks);
        let path = folder.path().join("delivered-webhook.jsonl");
        let torn = fs::read(&path).expect("the file");
        File::options().append(true).open(&path).expect("it opens").write_all(&torn[..20]).expect("written");
        let mut again = FileMarks::new(folder.path(), "webhook");
        let loaded = again.load().await.expect("readable");
        assert_eq!((loaded.len(), &loaded["a"].mark), (2, &mark(1, MarkState::Confirmed)));
        assert_eq!(loaded["b"].mark, mark(2, MarkState::Intent));
        again.purge(&["a".into()]).await.expect("written");
        assert_eq!(FileMarks::new(folder.path(), "webhook").load().await.expect("readable").len(), 1);
    }

    #[tokio::test]
    async fn the_file_of_marks_does_not_grow_with_every_delivery() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut marks = FileMarks::new(folder.path(), "webhook");
        marks.load().await.expect("there is none");
        // As if so many marks had been written already.
        let mut place = 0;
        marks.bytes = SLACK_BYTES;
        for revision in 1..20 {
            let written = marks.write("a", &mark(revision, MarkState::Confirmed), place).await.expect("written");
            place = written.expect("its place");
        }
        let bytes = fs::metadata(folder.path().join("delivered-webhook.jsonl")).expect("the file").len();
        assert!(marks.bytes < SLACK_BYTES && bytes == marks.bytes, "{bytes} of {}", marks.bytes);
    }
}
