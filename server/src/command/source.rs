//! Where a command reads from: an archive's directory, or a remote archive that is fetched first, as far as it is wanted.

use std::path::{Path, PathBuf};

use clap::Args;
use tapio_wire::complain;
use tapio_wire::program::units::{human_bytes, parse_bytes};

use super::{CommandError, progress};
use crate::archive::reader::Reader;
use crate::config::Config;
use crate::findings::text;
use crate::remote::{self, CACHE_BYTES_DEFAULT, Fetch, Label, RemoteSection, View};

/// What to read.
#[derive(Args)]
pub struct Source {
    /// Directory of the archive (archive.dir), or URL of a remote archive (archive.remote.url, or one below it)
    #[arg(value_name = "DIR|URL")]
    dir: PathBuf,
    /// With a remote archive: the server's configuration, whose archive.remote says how to reach it. Credentials may be in
    /// the environment instead
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// With a remote archive: the cache of fetched segments
    #[arg(long, value_name = "DIR", default_value = "/var/tmp/tapio-cache")]
    cache: PathBuf,
    /// With a remote archive: the maximum size of the cache
    #[arg(long, value_name = "BYTES", default_value_t = CACHE_BYTES_DEFAULT, value_parser = parse_bytes)]
    cache_bytes: u64,
}

/// One archive that is on this disk now.
pub(super) struct Folder {
    pub dir: PathBuf,
    /// Owner of a remote archive.
    pub label: Option<Label>,
    _view: Option<View>,
}

impl Source {
    /// The directory, where it is one.
    pub(super) fn directory(&self) -> Option<&Path> {
        (!self.is_remote()).then_some(self.dir.as_path())
    }

    fn is_remote(&self) -> bool {
        self.dir.to_str().is_some_and(remote::is_url)
    }

    /// What is there of a time; a directory whole.
    pub(super) fn folders(&self, since_ns: u64, until_ns: u64) -> Result<Vec<Folder>, CommandError> {
        if !self.is_remote() {
            return Ok(vec![Folder { dir: self.dir.clone(), label: None, _view: None }]);
        }
        let folder = |view: View| Folder { dir: view.dir.clone(), label: Some(view.label.clone()), _view: Some(view) };
        Ok(self.fetch(since_ns, until_ns, &self.cache, self.cache_bytes)?.into_iter().map(folder).collect())
    }

    /// Fetches into a directory of the caller's, whatever the size.
    pub(super) fn fetch_to(&self, dir: &Path) -> Result<Vec<View>, CommandError> {
        self.fetch(0, u64::MAX, dir, u64::MAX)
    }

    /// The configuration, where one is named.
    pub(super) fn config(&self) -> Result<Option<Config>, CommandError> {
        let load = |path| Config::load(Some(path)).map_err(|error| CommandError::Usage(error.to_string()));
        self.config.as_deref().map(load).transpose()
    }

    /// All that is there, as one archive.
    pub(super) fn reader(folders: &[Folder]) -> Reader {
        Reader::over(folders.iter().map(|folder| folder.dir.clone()))
    }

    fn fetch(&self, since_ns: u64, until_ns: u64, cache: &Path, cache_bytes: u64) -> Result<Vec<View>, CommandError> {
        let url = self.dir.to_string_lossy().into_owned();
        let section = self.config()?.and_then(|config| config.archive.remote).unwrap_or_default();
        let fetch = Fetch {
            section: RemoteSection { url, ..section },
            since_ns,
            until_ns,
            cache: cache.to_owned(),
            cache_bytes,
        };
        let bar = progress(0);
        let fetched = fetch.run(&mut |total| bar.set_length(total), &mut |bytes| bar.inc(bytes))?;
        bar.finish_and_clear();
        complain!(
            "{} of {}, {}: {} of it fetched now",
            text::count(fetched.segments, "segment"),
            text::count(fetched.views.len() as u64, "archive"),
            human_bytes(fetched.bytes),
            human_bytes(fetched.fetched_bytes)
        );
        Ok(fetched.views)
    }
}

impl Folder {
    /// Names the archive of what follows, where there are several.
    pub fn headline(&self, is_json: bool) -> String {
        match &self.label {
            Some(label) if !is_json => format!("archive {label}\n"),
            _ => String::new(),
        }
    }

    /// A JSON object as a line, with whose it is.
    pub fn json(&self, mut value: serde_json::Value) -> String {
        if let (Some(label), Some(object)) = (&self.label, value.as_object_mut()) {
            object.insert("archive".to_owned(), label.to_string().into());
        }
        format!("{value}\n")
    }
}
