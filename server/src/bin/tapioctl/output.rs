//! Formats that kubectl's users expect.

use std::io::{self, Write};

use clap::ValueEnum;
use serde_json::Value;

use super::server::Failure;

/// See `--output`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Wide,
    Json,
    Yaml,
}

impl Format {
    /// Whether it is for people.
    pub fn is_table(self) -> bool {
        matches!(self, Self::Table | Self::Wide)
    }

    /// An object for programs; `None` where people want a table.
    pub fn one(self, value: &Value) -> Option<String> {
        match self {
            Self::Table | Self::Wide => None,
            Self::Json => Some(format!("{value}\n")),
            // What is JSON is YAML; an error here would be one of memory.
            Self::Yaml => Some(format!("---\n{}", serde_yaml_ng::to_string(value).unwrap_or_default())),
        }
    }
}

/// Writes to standard output, at once.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
