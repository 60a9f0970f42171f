//! `silences.json`: the silences of one server, and what one of several knew last.
//!
//! What must hold: the file is whole or not there. It is replaced as a whole, and synced before a silence counts.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use tapio_wire::service::Silence;

use crate::archive::copy::SILENCES_FILE;

/// Bytes of the file at the most: as many as there may be, and their texts.
const BYTES_MAX: u64 = 16 << 20;

pub(super) struct File(PathBuf);

impl File {
    pub fn of(dir: &Path) -> Self {
        Self(dir.join(SILENCES_FILE))
    }

    /// What it says; nothing where it is not there. What cannot be read is moved aside.
    pub fn read(&self) -> Vec<Silence> {
        let text = fs::File::open(&self.0).and_then(|file| {
            let mut text = Vec::new();
            file.take(BYTES_MAX).read_to_end(&mut text)?;
            Ok(text)
        });
        let parsed = match text {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| error.to_string()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => Err(error.to_string()),
        };
        parsed.unwrap_or_else(|error| {
            let moved = fs::rename(&self.0, self.beside("unreadable"));
            tracing::error!(path = %self.0.display(), error, ?moved, "cannot read the silences of earlier runs");
            Vec::new()
        })
    }

    pub fn write<'a>(&self, silences: impl Iterator<Item = &'a Silence>) -> io::Result<()> {
        let bytes = serde_json::to_vec(&silences.collect::<Vec<_>>())?;
        let dir = self.0.parent().unwrap_or(Path::new("."));
        // On the first start the archive has not made it yet.
        fs::create_dir_all(dir)?;
        let beside = self.beside("new");
        let mut file = fs::File::create(&beside)?;
        file.write_all(&bytes)?;
        file.sync_data()?;
        fs::rename(&beside, &self.0)?;
        fs::File::open(dir)?.sync_all()
    }

    fn beside(&self, end: &str) -> PathBuf {
        let mut name = self.0.clone().into_os_string();
        name.push(format!(".{end}"));
        name.into()
    }
}
