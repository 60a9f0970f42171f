//! An archive that an operator changes: a directory whose server is stopped, or a remote archive; and who does it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use super::CommandError;
use crate::config::Config;
use crate::remote::{self, Keeping, RemoteSection};

/// File of an archive's directory with a line of JSON for each change that an operator made.
pub(super) const AUDIT: &str = "audit.jsonl";

/// What to change.
#[derive(Args)]
pub struct Place {
    /// Directory of the archive (archive.dir), or URL of a remote archive (archive.remote.url itself)
    #[arg(value_name = "DIR|URL")]
    dir: PathBuf,
    /// With a remote archive: the server's configuration, whose archive.remote says how to reach it. Credentials may be in
    /// the environment instead
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Who does this, for the audit; default: SUDO_USER or USER
    #[arg(long, value_name = "NAME")]
    by: Option<String>,
}

impl Place {
    /// The directory, where it is one.
    pub(super) fn directory(&self) -> Option<&Path> {
        (!self.dir.to_str().is_some_and(remote::is_url)).then_some(self.dir.as_path())
    }

    /// How to reach a remote archive, or where tables are.
    pub(super) fn section(&self, url: Option<&str>) -> Result<RemoteSection, CommandError> {
        let load = |path| Config::load(Some(path)).map_err(|error| CommandError::Usage(error.to_string()));
        let config = self.config.as_deref().map(load).transpose()?;
        let section = config.and_then(|config| config.archive.remote).unwrap_or_default();
        let own = || self.dir.to_string_lossy().into_owned();
        Ok(RemoteSection { url: url.map_or_else(own, str::to_owned), ..section })
    }

    /// The remote archive.
    pub(super) fn keeping(&self) -> Result<Keeping, CommandError> {
        Ok(Keeping::open(&self.section(None)?)?)
    }

    /// Who does it.
    pub(super) fn by(&self) -> Result<String, CommandError> {
        let of = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let by = self.by.clone().or_else(|| of("SUDO_USER")).or_else(|| of("USER"));
        by.ok_or_else(|| CommandError::Usage("--by NAME says who does this: neither SUDO_USER nor USER is set".into()))
    }

    /// Writes what was done, durably.
    pub(super) fn audit(&self, record: &Value) -> Result<(), CommandError> {
        let Some(dir) = self.directory() else { return Ok(self.keeping()?.audit(record)?) };
        let mut file = OpenOptions::new().create(true).append(true).open(dir.join(AUDIT))?;
        file.write_all(format!("{record}\n").as_bytes())?;
        file.sync_all()?;
        Ok(File::open(dir)?.sync_all()?)
    }
}
