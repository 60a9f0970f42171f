//! What is remembered of deliveries.
//!
//! What must hold: a mark is replaced only where the one that was read last is still there (compare-and-set). So of two servers that
//! both think that they lead, one learns that it does not.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use tapio_wire::service::Finding;

use crate::cluster::LogError;

/// Size of one mark's notes: a mark has a bound.
const NOTES_BYTES_MAX: usize = 2048;

/// How far a delivery came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MarkState {
    /// The delivery is being made, or may have been made.
    Intent,
    /// The receiver has it.
    Confirmed,
    /// The receiver refused it for good, or several times.
    Refused,
}

/// What was last sent of one finding to one sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Rises with each version that is sent.
    pub revision: u32,
    /// Digest of what was sent: see [`content`].
    pub content: String,
    /// The leader's that wrote this.
    pub term: u64,
    pub state: MarkState,
    /// True if the withdrawal of the finding was sent.
    pub withdrawn: bool,
    /// When it was written, seconds since 1970.
    pub at: u64,
    /// The notes ([`super::Sink::note`]) that the receiver may have, the latest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Why the receiver refused it; empty also in marks of versions that kept no reason.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

impl Mark {
    /// Stands for one that nobody can read.
    pub fn unreadable() -> Self {
        Self {
            revision: 0,
            content: String::new(),
            term: 0,
            state: MarkState::Intent,
            withdrawn: false,
            at: 0,
            notes: Vec::new(),
            reason: String::new(),
        }
    }

    /// Whether nothing is left to do for a version with this content.
    pub fn settles(&self, content: &str, withdrawn: bool) -> bool {
        self.state != MarkState::Intent && (self.content == content || (self.withdrawn && withdrawn))
    }
}

/// The notes that a receiver may have once it was sent this one too: the latest ones, of [`NOTES_BYTES_MAX`] together.
pub fn noted(before: &[String], note: Option<&String>) -> Vec<String> {
    let mut notes: Vec<String> = before.iter().filter(|known| Some(*known) != note).chain(note).cloned().collect();
    while notes.iter().map(String::len).sum::<usize>() > NOTES_BYTES_MAX {
        notes.remove(0);
    }
    notes
}

/// A mark, and its place: what a compare-and-set compares.
#[derive(Clone, Debug)]
pub struct Known {
    pub mark: Mark,
    pub place: u64,
}

/// Why marks cannot be read or written: then nothing is delivered.
#[derive(Debug, thiserror::Error)]
pub enum MarksError {
    #[error("the marks of what was delivered: {0}")]
    Log(#[from] LogError),
    #[error("{path}: {error}; nothing is delivered while it cannot be written", path = path.display())]
    File { path: PathBuf, error: std::io::Error },
}

/// Where the marks of one sink are kept, by finding.
pub trait Marks {
    /// All of them.
    async fn load(&mut self) -> Result<HashMap<String, Known>, MarksError>;

    /// When the place of the marks was made, nanoseconds since 1970: where it was another before, those of then are lost.
    async fn began_ns(&mut self) -> Result<u64, MarksError>;

    /// The mark of one finding.
    async fn read(&mut self, id: &str) -> Result<Option<Known>, MarksError>;

    /// Writes a mark where the one at `place` is still there (0: where there is none). Returns its place; [`None`] where another one
    /// is there.
    async fn write(&mut self, id: &str, mark: &Mark, place: u64) -> Result<Option<u64>, MarksError>;

    /// Forgets marks.
    async fn purge(&mut self, ids: &[String]) -> Result<(), MarksError>;
}

/// Digest of a version of a finding, the same on every server: revision and time of publication are each server's own.
pub fn content(finding: &Finding) -> String {
    let plain = Finding { revision: 0, published_ns: 0, ..finding.clone() };
    // Strings, numbers and lists: nothing that JSON cannot hold.
    let bytes = serde_json::to_vec(&plain).unwrap_or_default();
    digest(&SHA256, &bytes).as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Seconds since 1970.
pub fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_kept_once_and_within_a_bound() {
        let of = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(noted(&of(&["a", "b"]), Some(&"a".to_owned())), of(&["b", "a"]), "the latest last");
        assert_eq!(noted(&of(&["a"]), None), of(&["a"]));
        let long = |letter: &str| letter.repeat(900);
        assert_eq!(noted(&[long("a"), long("b")], Some(&long("c"))), [long("b"), long("c")]);
        assert!(noted(&[], Some(&"x".repeat(NOTES_BYTES_MAX + 1))).is_empty());
    }

    #[test]
    fn marks_of_versions_that_kept_no_reason_are_read() {
        let old = r#"{"revision":3,"content":"c","term":2,"state":"refused","withdrawn":false,"at":5}"#;
        let mark: Mark = serde_json::from_str(old).expect("an old mark");
        assert_eq!((mark.revision, mark.state, mark.reason.as_str()), (3, MarkState::Refused, ""));
        assert_eq!(serde_json::to_string(&mark).expect("written"), old, "no key without need");
        let refused = Mark { reason: "HTTP 400".into(), ..mark };
        let text = serde_json::to_string(&refused).expect("written");
        assert_eq!(serde_json::from_str::<Mark>(&text).expect("read"), refused);
    }

    #[test]
    fn a_findings_content_depends_neither_on_time_nor_on_repetition() {
        let finding = Finding { id: "a".into(), count: 1, ..Finding::default() };
        let again = Finding { revision: 7, published_ns: 9, ..finding.clone() };
        assert_eq!(content(&finding), content(&again));
        assert_ne!(content(&finding), content(&Finding { count: 2, ..finding.clone() }));
        assert_ne!(content(&finding), content(&Finding { withdrawn: true, ..finding.clone() }));
    }
}
