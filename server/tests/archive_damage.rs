//! Archives that lack what was acknowledged: every reader gives the rest and says what is missing, and a start counts it as lost.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::archive_support::*;
use serde_json::Value;
use tapio_server::archive::index::Index;
use tapio_server::archive::reader::{Reader, Selection};
use tapio_server::archive::{ArchiveConfig, lock_books};
use tapio_server::events::Choice;
use tapio_server::query::EventSource;

const FRAMES: u64 = 100;
const EVENTS: usize = 2000;

fn config(dir: &Path) -> ArchiveConfig {
    ArchiveConfig { segment_bytes: 64 << 10, ..plain(dir) }
}

/// An archive of several closed segments.
fn several() -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let archive = open(config(dir.path()));
    let mut frames = Frames::new("node-1", 1);
    frames.events = EVENTS;
    append_each(&archive, &mut frames, FRAMES);
    archive.shutdown();
    let segments = segments(dir.path());
    assert!(segments.len() >= 4, "{segments:?}");
    (dir, segments)
}

/// Events that can still be read.
fn readable(dir: &Path) -> u64 {
    let mut events = 0;
    let count = Reader::new(dir).whole_frames(&Selection::default(), &mut |header, _| {
        events += u64::from(header.events());
        ControlFlow::Continue(())
    });
    count.unwrap();
    events
}

fn missing(dir: &Path) -> u64 {
    FRAMES * EVENTS as u64 - readable(dir)
}

/// Each of the commands that read ends with 3 and says this on standard error. Returns what `cat` printed.
fn everybody_says(dir: &Path, said: &str) -> String {
    let path = dir.to_str().unwrap();
    let copies = tempfile::tempdir().unwrap();
    let copy = copies.path().join("copy");
    let commands: [&[&str]; 4] = [
        &["archive", "cat", path, "--json"],
        &["archive", "stat", path],
        &["archive", "copy", path, copy.to_str().unwrap()],
        &["replay", path],
    ];
    let mut printed = Vec::new();
    for command in commands {
        let (output, text) = server(command);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        println!("{command:?}: {:?}\n{errors}", output.status.code());
        assert_eq!(output.status.code(), Some(3), "{command:?}: {errors}");
        assert!(errors.contains(said) && errors.contains("DAMAGED"), "{command:?}: {errors}");
        printed.push(text);
    }
    // A copy of what is damaged is damaged as much.
    assert_eq!(missing(&copy), missing(dir));
    assert_eq!(server(&["archive", "verify", copy.to_str().unwrap()]).0.status.code(), Some(3));
    printed.remove(0)
}

fn verified(dir: &Path) -> (Option<i32>, Vec<Value>) {
    let (output, text) = server(&["archive", "verify", "--json", dir.to_str().unwrap()]);
    (output.status.code(), text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

/// Starts twice on the archive: what is missing is counted once, as damage and in the ledger.
fn a_start_counts(dir: &Path, lost: u64) {
    for start in 1..=2 {
        let archive = open(config(dir));
        let books = lock_books(archive.books()).clone();
        assert_eq!((books.totals().quarantined, books.unexplained_total()), (1, lost as i64), "start {start}");
        let status = &books.status(|_| false)[0].epochs[0].sources[0];
        assert_eq!(status.archived + lost, status.emitted, "start {start}");
        archive.shutdown();
    }
}

#[test]
fn a_cut_closed_segment_is_damaged_and_all_count_it() {
    let (dir, segments) = several();
    let length = fs::metadata(&segments[0]).unwrap().len();
    fs::File::options().write(true).open(&segments[0]).unwrap().set_len(length / 3 + 5).unwrap();
    let lost = missing(dir.path());
    assert!(lost > 0);
    let (code, lines) = verified(dir.path());
    assert_eq!(code, Some(3));
    let gap = &lines[0]["gap"];
    assert_eq!((&lines[0]["sound"], &gap["missing_events"]), (&Value::Bool(false), &lost.into()), "{gap}");
    let frames = lost / EVENTS as u64;
    let first = gap["missing"][0]["first_seq"].as_u64().unwrap();
    assert_eq!((&gap["missing"][0]["node"], &gap["missing"][0]["frames"]), (&"node-1".into(), &frames.into()));
    assert_eq!(gap["missing"][0]["last_seq"], first + frames - 1);
    assert_eq!(lines[1]["sound"], true);
    let (_, people) = server(&["archive", "verify", dir.path().to_str().unwrap()]);
    println!("{people}");
    assert!(!people.contains("never acknowledged") && people.contains("by the snapshot of segment 2"), "{people}");
    let printed = everybody_says(dir.path(), &format!("{lost} events in {frames} frames are missing"));
    assert_eq!(printed.lines().count() as u64, readable(dir.path()));
    a_start_counts(dir.path(), lost);
}

#[test]
fn flipped_bytes_in_a_closed_segment_show_in_every_command() {
    let (dir, segments) = several();
    let mut bytes = fs::read(&segments[0]).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle..middle + 3].iter_mut().for_each(|byte| *byte ^= 0x55);
    fs::write(&segments[0], bytes).unwrap();
    assert_eq!(missing(dir.path()), EVENTS as u64);
    let printed = everybody_says(dir.path(), &format!("{EVENTS} events in 1 frames are missing"));
    assert_eq!(printed.lines().count() as u64, readable(dir.path()));
    let (_, stat) = server(&["archive", "stat", dir.path().to_str().unwrap(), "--json"]);
    let stat: Value = serde_json::from_str(&stat).unwrap();
    assert_eq!(stat["events"], readable(dir.path()));
}

#[test]
fn a_segment_that_is_absent_between_others_is_missed() {
    let (dir, segments) = several();
    fs::remove_file(&segments[1]).unwrap();
    let lost = missing(dir.path());
    let (code, lines) = verified(dir.path());
    assert_eq!(code, Some(3));
    assert_eq!(lines[1]["absent_segments"], serde_json::json!([2, 2]), "{lines:?}");
    assert_eq!(lines[1]["missing_events"], lost);
    everybody_says(dir.path(), &format!("segment 2 is absent: {lost} events"));
    a_start_counts(dir.path(), lost);
}

#[test]
fn an_emptied_newest_segment_is_damaged_and_kept() {
    let (dir, segments) = several();
    let newest = segments.last().unwrap();
    fs::write(newest, b"").unwrap();
    assert_eq!(verified(dir.path()).0, Some(3));
    everybody_says(dir.path(), "how many events are missing is not known");
    for start in 1..=2 {
        let archive = open(config(dir.path()));
        assert_eq!(archive.stats().totals.quarantined, 1, "start {start}");
        archive.shutdown();
        assert!(newest.exists());
    }
    everybody_says(dir.path(), "how many events are missing is not known");
}

#[test]
fn what_a_killed_server_and_retention_leave_is_sound() {
    let (dir, segments) = several();
    for (index, path) in segments.iter().enumerate().take(2) {
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        let offset = Index::read(&file, index as u64 + 1).unwrap().expect("an index").offset;
        // With a batch behind the last commit that was never acknowledged.
        file.set_len(offset).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xa5; 800], offset).unwrap();
    }
    assert_eq!(verified(dir.path()).0, Some(0));
    fs::remove_file(&segments[0]).unwrap();
    assert_eq!(verified(dir.path()).0, Some(0));
    let (output, _) = server(&["archive", "cat", dir.path().to_str().unwrap(), "--limit", "1"]);
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
    // An idle start uses up a number.
    open(config(dir.path())).shutdown();
    open(config(dir.path())).shutdown();
    assert_eq!(gaps(dir.path()), []);
}

#[test]
fn a_server_states_damage_only_where_it_may_matter() {
    let (dir, segments) = several();
    let length = fs::metadata(&segments[2]).unwrap().len();
    fs::File::options().write(true).open(&segments[2]).unwrap().set_len(length / 3).unwrap();
    let source = EventSource::new(dir.path());
    let last = |choice: Choice| {
        block_on(async {
            let (mut receiver, ended) = source.stream(choice).unwrap();
            let mut last = None;
            while let Some(event) = receiver.recv().await {
                last = Some(event.unwrap());
            }
            drop(ended);
            last.expect("an event")
        })
    };
    let all = last(Choice::default());
    assert_eq!((all.id.as_str(), all.incomplete.len()), ("", 1));
    assert!(all.incomplete[0].reason.contains("segment 3 is cut off"), "{:?}", all.incomplete);
    let later = Choice { since_ns: 1_700_000_000_000_000_000 + 1_000_000_000_000, ..Choice::default() };
    let outcome = tapio_server::events::select(dir.path(), &later, &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(outcome.incomplete().is_none(), "what is missing is older: {outcome:?}");
    let first = last(Choice { limit: 1, ..Choice::default() });
    assert!(first.incomplete.is_empty(), "it lies behind what was asked for");
    // What was described only in what is lost has a name that nobody knows any more.
    let unknown = Choice { pod: "gone".into(), ..Choice::default() };
    assert_eq!(last(unknown.clone()).incomplete.len(), 1);
    let later = Choice { since_ns: later.since_ns, ..unknown };
    let outcome = tapio_server::events::select(dir.path(), &later, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(outcome, Err(tapio_server::events::EventsError::Nothing { .. })), "{outcome:?}");
}
