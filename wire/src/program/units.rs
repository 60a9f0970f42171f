//! Durations and sizes as text: read from configuration files and options (`100ms`, `5m`, `64MiB`), written so that they can be
//! read again, and written for people (`1.2 ms`, `64.0 MiB`).

use std::fmt;
use std::time::Duration;

use serde::Deserializer;
use serde::de::{Error, Unexpected, Visitor};

const SECOND_NS: u64 = 1_000_000_000;
/// Sizes above this are typing errors, and a number of 64 bits in floating point is not exact there.
const BYTES_MAX: u128 = 9_000_000_000_000_000;

/// Reads `250us`, `100ms`, `1.5s`, `5m`, `24h` or `7d`.
///
/// # Errors
/// A sentence that names the text and the accepted units.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, u64); 6] = [
        ("us", 1_000),
        ("ms", 1_000_000),
        ("s", SECOND_NS),
        ("m", 60 * SECOND_NS),
        ("h", 3_600 * SECOND_NS),
        ("d", 86_400 * SECOND_NS),
    ];
    let ns = scaled(text, &UNITS).ok_or_else(|| {
        format!("`{text}` is not a duration; write a number with us, ms, s, m, h or d, like 100ms or 5m")
    })?;
    u64::try_from(ns).map(Duration::from_nanos).map_err(|_| format!("the duration `{text}` is out of range"))
}

/// Reads `4096`, `64KiB`, `1.5GiB` or `100MB`.
///
/// # Errors
/// A sentence that names the text and the accepted units.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 9] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("B", 1),
        ("", 1),
    ];
    scaled(text, &UNITS)
        .filter(|bytes| *bytes < BYTES_MAX)
        .map(|bytes| bytes as u64)
        .ok_or_else(|| format!("`{text}` is not a size; write a number with B, KiB, MiB, GiB or TiB, like 64MiB"))
}

/// The number of a text times its unit. Whole numbers are exact.
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u128> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim());
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    match number.parse::<u64>() {
        Ok(whole) => Some(u128::from(whole) * u128::from(*factor)),
        Err(_) => Some((number.parse::<f64>().ok()? * *factor as f64).round() as u128),
    }
}

/// A duration as [`parse_duration`] reads it, in the largest unit that is exact: `1500ms`, `5m`.
pub fn exact_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    for (unit, length) in [("d", 86_400_000_000_000), ("h", 3_600_000_000_000), ("m", 60_000_000_000)] {
        if nanos >= 2 * length && nanos.is_multiple_of(length) {
            return format!("{}{unit}", nanos / length);
        }
    }
    for (unit, length) in [("s", 1_000_000_000), ("ms", 1_000_000)] {
        if nanos >= length && nanos.is_multiple_of(length) {
            return format!("{}{unit}", nanos / length);
        }
    }
    if nanos == 0 { "0s".into() } else { format!("{}us", nanos / 1000) }
}

/// A size as [`parse_bytes`] reads it, in the largest unit that is exact: `64MiB`.
pub fn exact_bytes(bytes: u64) -> String {
    for (unit, length) in [("TiB", 1_u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes >= length && bytes.is_multiple_of(length) {
            return format!("{}{unit}", bytes / length);
        }
    }
    bytes.to_string()
}

/// A duration for people: `850 ns`, `1.2 ms`, `3.0 s`, `2 min 5 s`, `3 d 4 h`.
pub fn human_duration(ns: u64) -> String {
    // What a unit would round to 1000.0 is 1.0 of the next.
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..999_950 => format!("{:.1} µs", ns as f64 / 1e3),
        999_950..999_950_000 => format!("{:.1} ms", ns as f64 / 1e6),
        999_950_000..120_000_000_000 => format!("{:.1} s", ns as f64 / 1e9),
        _ => {
            let seconds = ns / SECOND_NS;
            match seconds {
                0..7200 => format!("{} min {} s", seconds / 60, seconds % 60),
                7200..172_800 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
                _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
            }
        }
    }
}

/// A size for people: `512 B`, `64.0 MiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // What a unit would round to 1024.0 is 1.0 of the next.
    while value >= 1023.95 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Reads a text, or for sizes a number, within the deserializer: an error raised there carries the key and the line.
struct Unit<T> {
    expected: &'static str,
    parse: fn(&str) -> Result<T, String>,
    number: Option<fn(u64) -> Result<T, String>>,
}

impl<T> Visitor<'_> for Unit<T> {
    type Value = T;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.expected)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(E::custom)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        match u64::try_from(number) {
            Ok(number) => self.visit_u64(number),
            Err(_) => Err(E::invalid_value(Unexpected::Signed(number), &self)),
        }
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        match self.number {
            Some(from) => from(number).map_err(E::custom),
            None => Err(E::invalid_type(Unexpected::Unsigned(number), &self)),
        }
    }
}

/// Deserializes a [`Duration`], for `#[serde(deserialize_with)]`.
///
/// # Errors
/// As [`parse_duration`].
pub fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let expected = "a duration with its unit, like 100ms or 5m";
    deserializer.deserialize_any(Unit { expected, parse: parse_duration, number: None })
}

/// Deserializes bytes (a number, or text with a unit), for `#[serde(deserialize_with)]`.
///
/// # Errors
/// As [`parse_bytes`].
pub fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let expected = "a size, like 64MiB";
    deserializer.deserialize_any(Unit { expected, parse: parse_bytes, number: Some(bounded) })
}

fn bounded(bytes: u64) -> Result<u64, String> {
    match u128::from(bytes) < BYTES_MAX {
        true => Ok(bytes),
        false => Err(format!("{bytes} bytes are more than any machine has: at most {}", BYTES_MAX - 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_bytes_is_bounded_as_a_text_is() {
        assert!(bounded(u64::MAX).is_err() && bounded(BYTES_MAX as u64).is_err());
        assert_eq!(bounded(BYTES_MAX as u64 - 1), Ok(BYTES_MAX as u64 - 1));
    }

    #[test]
    fn durations_and_sizes_are_read_with_their_units() {
        for (text, duration) in [
            ("250us", Duration::from_micros(250)),
            ("100ms", Duration::from_millis(100)),
            ("1.5 s", Duration::from_millis(1500)),
            ("5m", Duration::from_secs(300)),
            ("36500d", Duration::from_secs(36_500 * 86_400)),
            ("9007199254740993us", Duration::from_micros(9_007_199_254_740_993)),
        ] {
            assert_eq!(parse_duration(text), Ok(duration));
        }
        for (text, bytes) in [("64MiB", 64 << 20), ("1.5GiB", 3 << 29), ("5MB", 5_000_000), ("4096", 4096)] {
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
    }

    #[test]
    fn a_missing_or_unknown_unit_is_explained() {
        assert!(parse_duration("100").unwrap_err().contains("100ms"));
        for wrong in ["", "5", "ms", "s", "5 weeks", "-1s", "1e99h", "1.2.3s", "99999999999999999999d"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
        assert!(parse_bytes("12 parsecs").unwrap_err().contains("12 parsecs"));
        for wrong in ["", "MiB", "-1", ".", "99999999999GiB"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn exact_text_is_read_back_as_it_was_written() {
        for text in ["0s", "250us", "6ms", "1500ms", "30s", "90s", "5m", "24h", "7d"] {
            assert_eq!(exact_duration(parse_duration(text).expect("a duration")), text);
        }
        for text in ["1000", "64KiB", "1536MiB", "1GiB"] {
            assert_eq!(exact_bytes(parse_bytes(text).expect("a size")), text);
        }
    }

    #[test]
    fn text_for_people_never_rounds_up_a_unit() {
        for (bytes, text) in [
            (12, "12 B"),
            (1023, "1023 B"),
            (3 << 19, "1.5 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            ((1 << 30) - 1, "1.0 GiB"),
            (5 << 40, "5.0 TiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(human_bytes(bytes), text);
        }
        for (ns, text) in [
            (999, "999 ns"),
            (1_500, "1.5 µs"),
            (999_960, "1.0 ms"),
            (999_999_999, "1.0 s"),
            (119_000_000_000, "119.0 s"),
            (125_000_000_000, "2 min 5 s"),
            (7_200_000_000_000, "2 h 0 min"),
            (180_000_000_000_000, "2 d 2 h"),
        ] {
            assert_eq!(human_duration(ns), text);
        }
    }
}
