//! Durations and sizes as configuration files write them: `100ms`, `5m`, `64MiB`.

use std::fmt;
use std::time::Duration;

use serde::Deserializer;
use serde::de::{Error, Unexpected, Visitor};

/// Reads `250us`, `100ms`, `1.5s`, `5m`, `24h` or `7d`.
///
/// # Errors
/// A sentence that names the text and the accepted units.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let seconds = scaled(text, &[("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86_400.0)])
        .ok_or_else(|| {
            format!("`{text}` is not a duration; write a number with us, ms, s, m, h or d, like 100ms or 5m")
        })?;
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("the duration `{text}` is out of range"))
}

/// Reads `4096`, `64KiB`, `1.5GiB` or `100MB`.
///
/// # Errors
/// A sentence that names the text and the accepted units.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let units = [
        ("KiB", 1024.0),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
        ("TiB", 1_099_511_627_776.0),
        ("kB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("B", 1.0),
        ("", 1.0),
    ];
    scaled(text, &units)
        .filter(|bytes| *bytes < 9e15)
        .map(|bytes| bytes as u64)
        .ok_or_else(|| format!("`{text}` is not a size; write a number with B, KiB, MiB, GiB or TiB, like 64MiB"))
}

fn scaled(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().ok()?;
    let unit = text[digits..].trim();
    units.iter().find(|(name, _)| *name == unit).map(|(_, factor)| number * factor)
}

/// Reads a text, or for sizes a number, within the deserializer: an error raised there carries the key and the line.
struct Unit<T> {
    expected: &'static str,
    parse: fn(&str) -> Result<T, String>,
    number: Option<fn(u64) -> T>,
}

impl<T> Visitor<'_> for Unit<T> {
    type Value = T;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.expected)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(E::custom)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        match self.number {
            Some(from) => Ok(from(number)),
            None => Err(E::invalid_type(Unexpected::Unsigned(number), &self)),
        }
    }
}

/// For `#[serde(deserialize_with)]` on a [`Duration`].
///
/// # Errors
/// As [`parse_duration`].
pub fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let expected = "a duration with its unit, like 100ms or 5m";
    deserializer.deserialize_any(Unit { expected, parse: parse_duration, number: None })
}

/// For `#[serde(deserialize_with)]` on bytes: a number, or text with a unit.
///
/// # Errors
/// As [`parse_bytes`].
pub fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let expected = "a size, like 64MiB";
    deserializer.deserialize_any(Unit { expected, parse: parse_bytes, number: Some(|bytes| bytes) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_are_read_with_their_units() {
        assert_eq!(parse_duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(parse_duration("1.5 s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_bytes("64MiB"), Ok(64 << 20));
        assert_eq!(parse_bytes("4096"), Ok(4096));
    }

    #[test]
    fn a_missing_or_unknown_unit_is_explained() {
        assert!(parse_duration("100").unwrap_err().contains("100ms"));
        assert!(parse_duration("ms").is_err());
        assert!(parse_bytes("12 parsecs").unwrap_err().contains("12 parsecs"));
    }
}
