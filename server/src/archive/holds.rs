//! Legal holds: what somebody must keep, for a reason, until they say otherwise.
//!
//! What enters: markers, a JSON file each, in the folder `holds` of an archive or of a remote archive. What leaves: whether something
//! may be deleted. What must hold: a marker that cannot be read keeps everything.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::index::Index;
use super::segments::ClosedSegment;

/// The folder's name.
pub const FOLDER: &str = "holds";
const SUFFIX: &str = ".json";

/// One marker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// The name of its file.
    pub id: String,
    /// Nanoseconds since 1970, both included.
    pub since_ns: u64,
    pub until_ns: u64,
    /// All namespaces without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    pub reason: String,
    /// Who made it, and when.
    pub by: String,
    pub made_ns: u64,
}

impl Hold {
    /// A marker that keeps everything: what stands there cannot be read.
    fn unreadable(id: &str, problem: &str) -> Self {
        Self {
            id: id.to_owned(),
            since_ns: 0,
            until_ns: u64::MAX,
            namespace: None,
            reason: format!("this marker cannot be read, so it keeps everything: {problem}"),
            by: String::new(),
            made_ns: 0,
        }
    }

    /// Reads a marker's content. Its id is that of the file, also where somebody has copied one.
    pub fn parse(id: &str, content: &[u8]) -> Self {
        match serde_json::from_slice(content) {
            Ok(hold) if is_id(id) => Self { id: id.to_owned(), ..hold },
            Ok(_) => Self::unreadable(id, "its name is none of a hold"),
            Err(error) => Self::unreadable(id, &error.to_string()),
        }
    }

    /// Encodes the marker as a file's content.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// The id that a marker's name says; it may be none that this program gives.
    pub fn id_of(file: &str) -> Option<&str> {
        file.strip_suffix(SUFFIX)
    }

    /// The name of its file.
    pub fn file(id: &str) -> String {
        format!("{id}{SUFFIX}")
    }

    /// Whether it keeps something of this time and namespace; `None` for any namespace.
    pub fn keeps(&self, since_ns: u64, until_ns: u64, namespace: Option<&str>) -> bool {
        let is_same = match (&self.namespace, namespace) {
            (Some(kept), Some(wanted)) => kept == wanted,
            _ => true,
        };
        is_same && self.since_ns <= until_ns && self.until_ns >= since_ns
    }
}

/// Whether an id names a file, and nothing else.
pub fn is_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= 64 && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// The holds of an archive's directory, by id.
///
/// # Errors
/// When the folder is there and cannot be listed.
pub fn load(dir: &Path) -> io::Result<Vec<Hold>> {
    let entries = match fs::read_dir(dir.join(FOLDER)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut holds = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(id) = Hold::id_of(&name) else { continue };
        holds.push(match fs::read(entry.path()) {
            Ok(content) => Hold::parse(id, &content),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => Hold::unreadable(id, &error.to_string()),
        });
    }
    holds.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(holds)
}

/// Writes a marker; it is durable then.
///
/// # Errors
/// When it cannot be written, or one of its id is there.
pub fn add(dir: &Path, hold: &Hold) -> io::Result<()> {
    let folder = dir.join(FOLDER);
    fs::create_dir_all(&folder)?;
    let (new, path) = (folder.join(format!("{}.new", hold.id)), folder.join(Hold::file(&hold.id)));
    let mut file = File::create(&new)?;
    file.write_all(&hold.to_json())?;
    file.sync_all()?;
    fs::hard_link(&new, &path)?;
    fs::remove_file(&new)?;
    File::open(&folder)?.sync_all()?;
    File::open(dir)?.sync_all()
}

/// Removes a marker. False where none has the id.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(dir: &Path, id: &str) -> io::Result<bool> {
    match fs::remove_file(dir.join(FOLDER).join(Hold::file(id))) {
        Ok(()) => File::open(dir.join(FOLDER))?.sync_all().map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The holds as retention sees them. A segment is looked into once for each change of them.
#[derive(Debug, Default)]
pub(super) struct Held {
    holds: Vec<Hold>,
    known: HashMap<u64, bool>,
    is_unreadable: bool,
}

impl Held {
    /// Reads the markers.
    pub fn refresh(&mut self, dir: &Path) {
        match load(dir) {
            Ok(holds) => {
                if holds != self.holds {
                    self.known.clear();
                    self.holds = holds;
                }
                self.is_unreadable = false;
            }
            Err(error) => {
                warn!(%error, "cannot read legal holds: no segment is deleted");
                self.is_unreadable = true;
            }
        }
    }

    /// Whether a closed segment must stay.
    pub fn keeps(&mut self, segment: &ClosedSegment) -> bool {
        if self.is_unreadable {
            return true;
        }
        if self.holds.is_empty() {
            return false;
        }
        let holds = &self.holds;
        *self.known.entry(segment.number).or_insert_with(|| keeps(holds, segment))
    }
}

fn keeps(holds: &[Hold], segment: &ClosedSegment) -> bool {
    let index = File::open(&segment.path).and_then(|file| Index::read(&file, segment.number));
    // Of a segment without an index nobody knows what is in it.
    let Ok(Some(index)) = index else { return true };
    let is_of = |namespace: &str| {
        let of_name = |name: &str| name.split_once('/').is_some_and(|(first, _)| first == namespace);
        !index.directory_whole
            || index.directory.iter().any(|known| known.namespace == namespace || of_name(&known.name))
    };
    let keeps =
        |hold: &Hold| hold.keeps(index.first_ns, index.last_ns, None) && hold.namespace.as_deref().is_none_or(is_of);
    let is_kept = holds.iter().any(keeps);
    if is_kept {
        warn!(segment = segment.number, "a legal hold keeps this segment");
    }
    is_kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold(id: &str, namespace: Option<&str>) -> Hold {
        Hold {
            id: id.to_owned(),
            since_ns: 10,
            until_ns: 20,
            namespace: namespace.map(str::to_owned),
            reason: "case 7".into(),
            by: "somebody".into(),
            made_ns: 5,
        }
    }

    #[test]
    fn a_marker_is_kept_listed_and_removed() {
        let dir = tempfile::tempdir().expect("a folder");
        assert_eq!(load(dir.path()).expect("none"), []);
        let (one, two) = (hold("one", None), hold("two", Some("shop")));
        add(dir.path(), &one).expect("added");
        add(dir.path(), &two).expect("added");
        assert!(add(dir.path(), &two).is_err(), "an id is taken once");
        assert_eq!(load(dir.path()).expect("two"), [one, two]);
        assert!(remove(dir.path(), "one").expect("removed") && !remove(dir.path(), "one").expect("gone"));
        // A copy is a hold of its own. Of another name it keeps everything: nobody could end it by that.
        let path = |file: &str| dir.path().join(FOLDER).join(file);
        fs::copy(path("two.json"), path("three.json")).expect("copied");
        fs::copy(path("two.json"), path("case_7.json")).expect("copied");
        let found = load(dir.path()).expect("three");
        assert_eq!(found.iter().map(|hold| &*hold.id).collect::<Vec<_>>(), ["case_7", "three", "two"]);
        assert!(found[0].keeps(0, 1, Some("other")) && !found[1].keeps(0, 1, Some("shop")), "{found:?}");
        assert!(remove(dir.path(), "three").expect("removed"));
        fs::remove_file(path("case_7.json")).expect("removed");
        fs::write(path("two.json"), "{").expect("written");
        let damaged = &load(dir.path()).expect("one")[0];
        assert!(damaged.keeps(0, 1, Some("other")) && damaged.reason.contains("cannot be read"), "{damaged:?}");
    }

    #[test]
    fn a_hold_keeps_its_time_and_namespace() {
        assert!(hold("a", None).keeps(20, 30, Some("shop")) && !hold("a", None).keeps(21, 30, None));
        assert!(hold("a", Some("shop")).keeps(0, 10, Some("shop")) && hold("a", Some("shop")).keeps(0, 10, None));
        assert!(!hold("a", Some("shop")).keeps(0, 10, Some("other")));
        assert!(is_id("20260102T030405Z-ab") && !is_id("../x") && !is_id(""));
    }
}
