//! What the archive deletes, and what it never does: by size, by age, on disks that fail and by clocks that jump.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::archive_support::*;
use tapio_server::archive::{Archive, ArchiveConfig};

const YEAR_S: i64 = 365 * 86_400;
const SEGMENT_BYTES: u64 = 64 << 10;

fn small(dir: &Path, max_bytes: u64) -> ArchiveConfig {
    ArchiveConfig { max_bytes, segment_bytes: SEGMENT_BYTES, ..plain(dir) }
}

/// Frames of which a few fill a segment.
fn large_frames() -> Frames {
    let mut frames = Frames::new("node-1", 1);
    frames.events = 4000;
    frames
}

/// Appends until the archive has had so many segments more. Returns those that are there then.
fn fill(archive: &Archive, dir: &Path, frames: &mut Frames, segments_more: u64) -> Vec<PathBuf> {
    let number = || segments(dir).pop().and_then(|newest| newest.file_stem()?.to_str()?.parse::<u64>().ok());
    let first = number().expect("the archive has a segment");
    while number().expect("the archive has a segment") < first + segments_more {
        append_each(archive, frames, 1);
    }
    segments(dir)
}

fn all_exist(paths: &[PathBuf]) -> bool {
    paths.iter().all(|path| path.exists())
}

#[test]
fn a_forward_step_of_the_wall_clock_deletes_nothing() {
    let test = "a_forward_step_of_the_wall_clock_deletes_nothing";
    let Some(clock) = SteppedClock::in_own_process(module_path!(), test) else { return };
    let dir = tempfile::tempdir().unwrap();
    let config = ArchiveConfig { max_age: Duration::from_secs(3600), ..small(dir.path(), 1 << 30) };
    let archive = open(config.clone());
    let mut frames = large_frames();
    fill(&archive, dir.path(), &mut frames, 4);
    clock.step(YEAR_S);
    let there = fill(&archive, dir.path(), &mut frames, 4);
    assert_eq!(there.len(), 9, "{there:?}");
    archive.shutdown();
    // Some were closed before the step and some after it.
    let archive = open(config.clone());
    let there = fill(&archive, dir.path(), &mut frames, 2);
    assert_eq!(there.len(), 12, "{there:?}");
    archive.shutdown();
    clock.step(YEAR_S);
    let archive = open(config);
    let there = fill(&archive, dir.path(), &mut frames, 2);
    assert_eq!(there.len(), 15, "{there:?}");
}

#[test]
fn a_backward_step_of_the_wall_clock_keeps_nothing_longer() {
    let test = "a_backward_step_of_the_wall_clock_keeps_nothing_longer";
    let Some(clock) = SteppedClock::in_own_process(module_path!(), test) else { return };
    let dir = tempfile::tempdir().unwrap();
    let archive = open(ArchiveConfig { max_age: Duration::from_secs(5), ..small(dir.path(), 1 << 30) });
    let first = segments(dir.path()).pop().unwrap();
    fill(&archive, dir.path(), &mut large_frames(), 1);
    clock.step(-YEAR_S);
    wait_until("the closed segment is deleted", || !first.exists());
}

#[test]
fn times_of_files_are_no_ages() {
    let dir = tempfile::tempdir().unwrap();
    let config = small(dir.path(), 1 << 30);
    let archive = open(config.clone());
    let mut frames = large_frames();
    let history = fill(&archive, dir.path(), &mut frames, 3);
    archive.shutdown();
    for path in &history {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(YEAR_S as u64)).unwrap();
    }
    let archive = open(config);
    fill(&archive, dir.path(), &mut frames, 2);
    assert!(all_exist(&history), "{:?} of {history:?}", segments(dir.path()));
}

#[test]
fn what_is_too_old_goes_across_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let config = ArchiveConfig { max_age: Duration::from_secs(1), ..small(dir.path(), 1 << 30) };
    let mut frames = Frames::new("node-1", 1);
    let archive = open(config.clone());
    append_each(&archive, &mut frames, 3);
    archive.shutdown();
    let first = segments(dir.path()).pop().unwrap();
    // Runs that are each too short for it.
    wait_until("it is deleted", || {
        let archive = open(config.clone());
        append_each(&archive, &mut frames, 1);
        archive.shutdown();
        !first.exists()
    });
}

#[test]
fn what_is_too_old_goes_while_frames_trickle_in() {
    let dir = tempfile::tempdir().unwrap();
    let config = ArchiveConfig { max_age: Duration::from_secs(1), segment_bytes: 64 << 20, ..plain(dir.path()) };
    let mut frames = Frames::new("node-1", 1);
    // The archive is never idle, and its segment does not fill up.
    let archive = open(config);
    append_each(&archive, &mut frames, 1);
    let active = segments(dir.path()).pop().unwrap();
    wait_until("the segment is closed and deleted", || {
        append_each(&archive, &mut frames, 1);
        !active.exists()
    });
}
