//! How a program reads its configuration: a YAML file, or the defaults.
//!
//! What must hold: what was read is checked before anybody sees it, and a refusal names the file and the key.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::yaml::{self, YamlError};

/// Why a configuration was refused. The text names the file and the key, and line and column where there are some.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {path}: {error}; name an existing file with --config")]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{path}: {error}")]
    Parse { path: PathBuf, error: YamlError },
    #[error("{path}: {key}: {problem}")]
    Invalid { path: String, key: &'static str, problem: String },
}

/// Reads a file and has `validate` check, with the file's name for its errors, what the types cannot. The defaults without a
/// file, and of an empty one.
///
/// # Errors
/// See [`ConfigError`].
pub fn load<C: DeserializeOwned + Default>(
    path: Option<&Path>,
    validate: impl FnOnce(&C, &str) -> Result<(), ConfigError>,
) -> Result<C, ConfigError> {
    let Some(path) = path else {
        return Ok(C::default());
    };
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.into(), error })?;
    let config = if text.trim().is_empty() {
        C::default()
    } else {
        yaml::from_str(&text).map_err(|error| ConfigError::Parse { path: path.into(), error })?
    };
    validate(&config, &path.display().to_string())?;
    Ok(config)
}
