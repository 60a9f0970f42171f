//! The names of objects, and what they say.

use jiff::Timestamp;
use object_store::path::Path;

const MOMENT: &str = "%Y%m%dT%H%M%SZ";
const DIGITS: usize = 20;
/// Hexadecimal digits of the checksum in a segment's name.
const SUM_DIGITS: usize = 16;

/// Nanoseconds since 1970, to the second, so that names sort by time.
pub fn moment(ns: u64) -> String {
    let at = Timestamp::from_nanosecond(i128::from(ns)).unwrap_or(Timestamp::UNIX_EPOCH);
    at.strftime(MOMENT).to_string()
}

fn moment_ns(text: &str) -> Option<u64> {
    let at = jiff::civil::DateTime::strptime(MOMENT, text).ok()?;
    let at = at.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
    u64::try_from(at.as_nanosecond()).ok()
}

/// What a segment's name says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentName {
    pub number: u64,
    /// Seconds, in nanoseconds since 1970: the first and last events lie in these seconds.
    pub first_ns: u64,
    pub last_ns: u64,
    /// The beginning of its SHA-256.
    pub sum: String,
}

impl SegmentName {
    /// Names a segment with these events.
    pub fn new(number: u64, first_ns: u64, last_ns: u64, sha256: &str) -> Self {
        let sum = sha256.get(..SUM_DIGITS).unwrap_or(sha256).to_owned();
        Self { number, first_ns, last_ns, sum }
    }

    /// Formats the name as the last part of a path.
    pub fn file(&self) -> String {
        let (first, last) = (moment(self.first_ns), moment(self.last_ns));
        format!("{:0DIGITS$}-{first}-{last}-{}.segment", self.number, self.sum)
    }

    /// Parses a path's last part.
    pub fn parse(file: &str) -> Option<Self> {
        let mut parts = file.strip_suffix(".segment")?.split('-');
        let (number, first, last) = (number(parts.next()?)?, moment_ns(parts.next()?)?, moment_ns(parts.next()?)?);
        let sum = parts.next().filter(|sum| sum.len() == SUM_DIGITS)?.to_owned();
        parts.next().is_none().then_some(Self { number, first_ns: first, last_ns: last, sum })
    }
}

fn number(digits: &str) -> Option<u64> {
    (digits.len() == DIGITS).then(|| digits.parse().ok()).flatten()
}

/// The last part of a manifest's path.
pub fn manifest_file(number: u64) -> String {
    format!("{number:0DIGITS$}.json")
}

/// The number of the segment that a manifest of this name is for.
pub fn manifest_number(file: &str) -> Option<u64> {
    number(file.strip_suffix(".json")?)
}

/// A life's name: the moment when it was first uploaded, and a random part.
pub fn life(now_ns: u64, random: u32) -> String {
    format!("{}-{random:08x}", moment(now_ns))
}

/// Whether a part of a path is a life's name.
pub fn is_life(part: &str) -> bool {
    let Some((moment, random)) = part.split_once('-') else { return false };
    moment_ns(moment).is_some() && random.len() == 8 && random.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Where a life's objects lie.
pub fn folder(root: &Path, cluster: &str, server: &str, life: &str) -> Path {
    root.clone().join(cluster).join(server).join(life)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_their_parts_and_sort_by_number() {
        let name = SegmentName::new(7, 1_764_413_167_000_000_000, 1_764_413_467_000_000_000, &"ab".repeat(32));
        let file = name.file();
        assert_eq!(file, "00000000000000000007-20251129T104607Z-20251129T105107Z-abababababababab.segment");
        assert_eq!(SegmentName::parse(&file), Some(name));
        assert!(file < SegmentName::new(8, 0, 0, &"00".repeat(32)).file());
        assert_eq!(manifest_number(&manifest_file(7)), Some(7));
        for wrong in ["7-a.segment", "00000000000000000007.segment", &file[1..], &format!("{file}.part")] {
            assert_eq!(SegmentName::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn lives_are_distinguished_from_other_folders() {
        let life = life(1_764_413_167_000_000_000, 0xabc);
        assert_eq!(life, "20251129T104607Z-00000abc");
        assert!(is_life(&life) && !is_life("server-0") && !is_life("20251129T104607Z-xyz"));
    }
}
