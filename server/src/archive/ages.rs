//! How old closed segments are, by a clock that nobody can step.
//!
//! What enters: `CLOCK_BOOTTIME`, and `ages.json` of the run before. What leaves: the archive's own time, in which segments are
//! closed and compared. What must hold: that time advances no faster than real time has been shown to pass, so a wrong
//! wall clock deletes nothing and keeps nothing longer. Therefore no time of a file, no frame's and no wall clock's is asked.
//!
//! ```text
//! {"boot": "…", "boottime_ms": 5000, "lived_ms": 9000, "closed_ms": {"1": 2000, "2": 8000}}
//! ```
//!
//! While a server runs, its time is what `CLOCK_BOOTTIME` says. Between two runs of one boot too, since the file has both clocks of
//! its last moment. A machine that was off shows nothing about how long: that time does not count. A segment that the file
//! does not name, as after a crash or in an archive without the file, counts as closed when the server starts.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::segments::ClosedSegment;

/// The file's name in the archive's directory.
pub const FILE: &str = "ages.json";
const NEW_FILE: &str = "ages.json.new";
/// How often it is written at the most, and at the least.
const SAVE_INTERVAL_MIN: Duration = Duration::from_secs(10);
const SAVE_INTERVAL_MAX: Duration = Duration::from_secs(600);

#[derive(Debug, Default, PartialEq, Deserialize, Serialize)]
struct Saved {
    /// Boot to which `boottime_ms` belongs.
    boot: String,
    boottime_ms: u64,
    /// The archive's time at that moment.
    lived_ms: u64,
    /// When each segment was closed, in the archive's time, by the segment's number.
    closed_ms: BTreeMap<u64, u64>,
}

/// Measures how old closed segments are by the monotonic clock.
pub struct Ages {
    dir: PathBuf,
    boot: String,
    /// The archive's time at `origin` of `CLOCK_BOOTTIME`.
    base: Duration,
    origin: Duration,
    save_interval: Duration,
    /// The archive's time when it was saved last, or tried to be.
    saved: Duration,
}

impl Ages {
    /// Goes on from what is in `dir`, sets when each of `segments` was closed, and saves that. After segments were removed by
    /// hand, a number may be used again; the new segment must not be taken for the old one.
    pub fn load(dir: &Path, max_age: Duration, segments: &mut VecDeque<ClosedSegment>) -> Self {
        let (boot, origin) = (boot(), boottime());
        let saved = match fs::read(dir.join(FILE)).map(|bytes| serde_json::from_slice::<Saved>(&bytes)) {
            Ok(Ok(saved)) => saved,
            Ok(Err(error)) => {
                warn!(%error, "{FILE} is unreadable: existing segments count as closed now");
                Saved::default()
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    warn!(%error, "{FILE} cannot be read: existing segments count as closed now");
                }
                Saved::default()
            }
        };
        let base = lived_at(&saved, &boot, origin);
        for segment in &mut *segments {
            let closed = saved.closed_ms.get(&segment.number).map(|&closed| Duration::from_millis(closed));
            segment.closed_at = closed.map_or(base, |closed| closed.min(base));
        }
        let save_interval = (max_age / 10).clamp(SAVE_INTERVAL_MIN, SAVE_INTERVAL_MAX);
        let mut ages = Self { dir: dir.to_owned(), boot, base, origin, save_interval, saved: base };
        if !ages.save(segments) && fs::remove_file(dir.join(FILE)).is_ok() {
            warn!("{FILE} was removed, since it could not be written");
        }
        ages
    }

    /// The archive's time now.
    pub fn now(&self) -> Duration {
        self.base + boottime().saturating_sub(self.origin)
    }

    /// Saves it when that was long ago.
    pub fn save_if_due(&mut self, segments: &VecDeque<ClosedSegment>) {
        if self.now().saturating_sub(self.saved) >= self.save_interval {
            self.save(segments);
        }
    }

    /// Saves it. When it cannot, segments are kept longer, and it is tried again later.
    pub fn save(&mut self, segments: &VecDeque<ClosedSegment>) -> bool {
        let at = boottime();
        let now = self.base + at.saturating_sub(self.origin);
        self.saved = now;
        let saved = Saved {
            boot: self.boot.clone(),
            boottime_ms: milliseconds(at),
            lived_ms: milliseconds(now),
            closed_ms: segments.iter().map(|segment| (segment.number, milliseconds(segment.closed_at))).collect(),
        };
        let write = || -> io::Result<()> {
            let new = self.dir.join(NEW_FILE);
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec(&saved)?)?;
            file.sync_data()?;
            fs::rename(&new, self.dir.join(FILE))
        };
        match write() {
            Ok(()) => true,
            Err(error) => {
                warn!(%error, "{FILE} cannot be written: after a restart segments may be kept longer");
                let _ = fs::remove_file(self.dir.join(NEW_FILE));
                false
            }
        }
    }
}

/// The archive's time at `boottime` of `boot`: what the file says, and what has passed since in the same boot.
fn lived_at(saved: &Saved, boot: &str, boottime: Duration) -> Duration {
    let lived = Duration::from_millis(saved.lived_ms);
    if boot.is_empty() || saved.boot != boot {
        return lived;
    }
    lived.saturating_add(boottime.saturating_sub(Duration::from_millis(saved.boottime_ms)))
}

fn boottime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// What is the same only for moments of `CLOCK_BOOTTIME` that can be compared: the boot, and the time namespace, which may have
/// an offset of its own (time_namespaces(7)). Empty when it is not known.
fn boot() -> String {
    let Ok(id) = fs::read_to_string("/proc/sys/kernel/random/boot_id") else { return String::new() };
    let namespace = fs::read_link("/proc/self/ns/time").unwrap_or_default();
    format!("{} {}", id.trim(), namespace.display())
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::segments;
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn directory(numbers: &[u64]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for &number in numbers {
            fs::write(segments::segment_path(dir.path(), number), "").expect("written");
        }
        dir
    }

    /// The ages, in whole hours, that a start finds.
    fn hours(dir: &Path) -> Vec<(u64, u64)> {
        let mut segments = segments::list(dir).expect("a directory");
        let ages = Ages::load(dir, HOUR, &mut segments);
        let age = |segment: &ClosedSegment| ages.now().saturating_sub(segment.closed_at).as_secs() / 3600;
        segments.iter().map(|segment| (segment.number, age(segment))).collect()
    }

    fn put(dir: &Path, boot: &str, boottime: Duration, lived_hours: u64, closed_hours: &[(u64, u64)]) {
        let saved = Saved {
            boot: boot.into(),
            boottime_ms: milliseconds(boottime),
            lived_ms: lived_hours * 3_600_000,
            closed_ms: closed_hours.iter().map(|&(number, hours)| (number, hours * 3_600_000)).collect(),
        };
        fs::write(dir.join(FILE), serde_json::to_vec(&saved).expect("JSON")).expect("written");
    }

    #[test]
    fn a_boot_later_what_was_lived_counts_and_nothing_else() {
        let dir = directory(&[1, 2, 3]);
        put(dir.path(), "another boot", Duration::ZERO, 10, &[(1, 3), (2, 9)]);
        assert_eq!(hours(dir.path()), [(1, 7), (2, 1), (3, 0)], "the third was being written");
        assert_eq!(hours(dir.path()), [(1, 7), (2, 1), (3, 0)], "and of the start before");
    }

    #[test]
    fn within_a_boot_the_time_without_a_server_counts() {
        let now = HOUR * 50;
        let saved = |boot: &str| Saved {
            boot: boot.into(),
            boottime_ms: milliseconds(HOUR * 20),
            lived_ms: milliseconds(HOUR * 10),
            ..Saved::default()
        };
        assert_eq!(lived_at(&saved("this"), "this", now), HOUR * 40);
        assert_eq!(lived_at(&saved("that"), "this", now), HOUR * 10);
        assert_eq!(lived_at(&saved(""), "", now), HOUR * 10, "not known");
        assert_eq!(lived_at(&saved("this"), "this", HOUR), HOUR * 10, "a clock that went back");
    }

    #[test]
    fn without_a_sound_file_everything_was_closed_now() {
        for content in [None, Some("{\"boot\": 7"), Some("")] {
            let dir = directory(&[4, 5]);
            if let Some(content) = content {
                fs::write(dir.path().join(FILE), content).expect("written");
            }
            assert_eq!(hours(dir.path()), [(4, 0), (5, 0)]);
        }
    }

    #[test]
    fn a_number_that_is_used_again_has_no_age() {
        let dir = directory(&[]);
        put(dir.path(), "another boot", Duration::ZERO, 10, &[(1, 0), (2, 20)]);
        assert_eq!(hours(dir.path()), []);
        fs::write(segments::segment_path(dir.path(), 1), "").expect("written");
        assert_eq!(hours(dir.path()), [(1, 0)]);
    }

    #[test]
    fn no_segment_was_closed_in_the_future() {
        let dir = directory(&[1]);
        put(dir.path(), "another boot", Duration::ZERO, 10, &[(1, 5000)]);
        assert_eq!(hours(dir.path()), [(1, 0)]);
        let written = fs::read(dir.path().join(FILE)).expect("it was saved");
        let written: Saved = serde_json::from_slice(&written).expect("JSON");
        assert_eq!(written.closed_ms[&1], written.lived_ms);
    }
}
