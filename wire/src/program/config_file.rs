//! How a program reads its configuration: a YAML file, or the defaults.
//!
//! What must hold: what was read is checked before anybody sees it, and a refusal names the file and the key.

use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::units::exact_duration;
use super::yaml::{self, Places, TextPosition, YamlError};

/// Bytes of a file at the most: one with every key and what it means has some ten thousand.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why a configuration was refused. The text names the file and the key, and line and column where there are some.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {path}: {error}; name an existing file with --config")]
    Read { path: PathBuf, error: io::Error },
    #[error("{path}: {error}")]
    Parse { path: PathBuf, error: YamlError },
    #[error("{path}: {key}: {problem}")]
    Invalid { path: String, key: &'static str, problem: String },
}

/// The first of these numbers that is out of its bounds.
///
/// # Errors
/// Its key, and what it may be.
pub fn numbers_within(numbers: &[(&'static str, u64, RangeInclusive<u64>)]) -> Result<(), (&'static str, String)> {
    match numbers.iter().find(|(_, number, bounds)| !bounds.contains(number)) {
        Some((key, number, bounds)) => {
            Err((*key, format!("{number} is not from {} to {}", bounds.start(), bounds.end())))
        }
        None => Ok(()),
    }
}

/// The levels of a log, the quietest last.
pub const LOG_LEVELS: [&str; 6] = ["trace", "debug", "info", "warn", "error", "off"];

/// Whether `logging.level` is one.
///
/// # Errors
/// Its key, and what it may be.
pub fn known_log_level(level: &str) -> Result<(), (&'static str, String)> {
    match LOG_LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
        true => Ok(()),
        false => Err(("logging.level", format!("`{level}` is none of {}", LOG_LEVELS.join(", ")))),
    }
}

/// Bounds of a time: `0s` turns off what it paces, where it may.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub least: Duration,
    pub most: Duration,
    pub may_be_off: bool,
}

/// The first of these times that is out of its bounds.
///
/// # Errors
/// Its key, and what it may be.
pub fn times_within(times: &[(&'static str, Duration, Times)]) -> Result<(), (&'static str, String)> {
    let is_within = |time: &Duration, bounds: &Times| {
        (bounds.least..=bounds.most).contains(time) || (bounds.may_be_off && time.is_zero())
    };
    match times.iter().find(|(_, time, bounds)| !is_within(time, bounds)) {
        Some((key, time, bounds)) => {
            let off = if bounds.may_be_off { ", or 0s for none" } else { "" };
            let [time, least, most] = [*time, bounds.least, bounds.most].map(exact_duration);
            Err((*key, format!("{time} is not from {least} to {most}{off}")))
        }
        None => Ok(()),
    }
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
    let text = read(path).map_err(|error| ConfigError::Read { path: path.into(), error })?;
    let config = if text.trim().is_empty() {
        C::default()
    } else {
        yaml::from_str(&text).map_err(|error| ConfigError::Parse { path: path.into(), error })?
    };
    match validate(&config, &path.display().to_string()) {
        Ok(()) => Ok(config),
        Err(error) => Err(placed(error, &text)),
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    // One byte more distinguishes a file that is too long from one that just fits.
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    match text.len() as u64 > FILE_BYTES_MAX {
        true => Err(io::Error::other(format!("it has more than {FILE_BYTES_MAX} bytes"))),
        false => Ok(text),
    }
}

/// A refused value with its line, where it or its section is written.
fn placed(error: ConfigError, text: &str) -> ConfigError {
    let ConfigError::Invalid { path, key, problem } = error else { return error };
    let place = yaml::from_str::<Places>(text).map_or(TextPosition::default(), |places| places.of(key));
    let problem = match place {
        TextPosition { line: 0, .. } => problem,
        TextPosition { line, column } => format!("{problem} at line {line} column {column}"),
    };
    ConfigError::Invalid { path, key, problem }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Config {
        queue: Queue,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Queue {
        size: u64,
        pause_s: u64,
    }

    fn said(text: &str) -> String {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), text).expect("written");
        let validate = |config: &Config, path: &str| {
            let times = Times { least: Duration::from_secs(1), most: Duration::from_secs(60), may_be_off: true };
            numbers_within(&[("queue.size", config.queue.size, 1..=9)])
                .and_then(|()| times_within(&[("queue.pause_s", Duration::from_secs(config.queue.pause_s), times)]))
                .map_err(|(key, problem)| ConfigError::Invalid { path: path.into(), key, problem })
        };
        match load(Some(file.path()), validate) {
            Ok(config) => format!("accepted {} {}", config.queue.size, config.queue.pause_s),
            Err(error) => error.to_string().replace(&file.path().display().to_string(), "FILE"),
        }
    }

    #[test]
    fn a_value_out_of_bounds_is_refused_with_a_line() {
        for (text, says) in [
            ("# a queue\nqueue:\n  size: 10\n", "FILE: queue.size: 10 is not from 1 to 9 at line 3 column 9"),
            ("queue: {pause_s: 1}\n", "FILE: queue.size: 0 is not from 1 to 9 at line 1 column 8"),
            (
                "queue: {size: 1, pause_s: 61}",
                "FILE: queue.pause_s: 61s is not from 1s to 60s, or 0s for none at line 1 column 27",
            ),
            ("queue: {size: 1, pause_s: 0}", "accepted 1 0"),
            ("queue: {size: 9, pause_s: 60}", "accepted 9 60"),
        ] {
            assert_eq!(said(text), says, "{text}");
        }
    }

    #[test]
    fn a_too_long_file_is_not_read_to_its_end() {
        let said = said(&format!("queue: {{size: 1}}\n#{}", "x".repeat(FILE_BYTES_MAX as usize)));
        assert!(said.contains("more than 1048576 bytes"), "{said}");
    }
}
