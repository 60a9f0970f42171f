//! Copies of an archive that is written at that moment: each is whole, and lacks nothing that was acknowledged.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::archive_support::*;
use tapio_server::archive::ArchiveConfig;
use tapio_server::archive::copy::{Copied, copy};
use tapio_server::archive::reader::Reader;
use tapio_server::archive::verify::verify_segment;

const COPIES: usize = 100;
/// Frames that may be on their way to the disk.
const IN_FLIGHT: u64 = 64;

/// Appends as fast as the disk takes it while `work` runs, which is given what is acknowledged.
fn under_load(config: ArchiveConfig, work: impl FnOnce(&dyn Fn() -> u64)) {
    let archive = open(config);
    let (receiver, stop, appended) = (Arc::new(Receiver::default()), AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let feeder = scope.spawn(|| {
            let mut frames = Frames::new("node-1", 1);
            // Large enough that a frame spans several pages.
            frames.events = 2000;
            while !stop.load(Ordering::Relaxed) {
                append(&archive, frames.append(&receiver));
                let count = appended.fetch_add(1, Ordering::Relaxed) + 1;
                receiver.wait_for(count.saturating_sub(IN_FLIGHT));
            }
        });
        receiver.wait_for(20);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&|| receiver.seq())));
        stop.store(true, Ordering::Relaxed);
        feeder.join().expect("the feeder ends");
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    archive.shutdown();
}

/// The last sequence in a copy, and how many of its segments are damaged.
fn verified(dir: &Path) -> (u64, usize, BTreeSet<u64>) {
    let reader = Reader::new(dir);
    let segments = reader.segments().expect("segments");
    let damaged = |segment: &&_| !verify_segment(segment, &mut |_| {}).expect("readable").is_sound();
    let damaged = segments.iter().filter(damaged).count() + gaps(dir).len();
    let books = reader.books().expect("books");
    (
        books.durable_seq(tapio_wire::node_id("node-1"), 1),
        damaged,
        segments.iter().map(|segment| segment.number).collect(),
    )
}

fn copied(from: &Path, to: &Path) -> Copied {
    copy(from, to, &mut |_| {}).unwrap_or_else(|error| panic!("{error}"))
}

/// What the test compares with: `TAPIO_TEST_PLAIN_CP=1` shows how often a plain copy is damaged.
fn plain_cp(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("made");
    // Retention may delete a segment meanwhile, which cp says and goes on: what counts is what is wrong with the copy.
    let script = "cp --sparse=always --preserve=timestamps \"$0\"/*.segment \"$1\" 2> /dev/null; true";
    let status = Command::new("/bin/sh").args(["-c", script]).args([from, to]).status().expect("sh starts");
    assert!(status.success());
}

#[test]
fn a_hundred_copies_under_load_have_everything_acknowledged() {
    let (dir, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let is_plain = std::env::var_os("TAPIO_TEST_PLAIN_CP").is_some();
    let mut wrong = Vec::new();
    under_load(ArchiveConfig { segment_bytes: 4 << 20, max_bytes: 16 << 20, ..plain(dir.path()) }, |acknowledged| {
        for turn in 0..COPIES {
            let to = folder.path().join("copy");
            let before = acknowledged();
            if is_plain {
                plain_cp(dir.path(), &to)
            } else {
                assert_eq!(copied(dir.path(), &to).damages, [])
            }
            let (last, damaged, _) = verified(&to);
            if damaged > 0 || last < before {
                wrong.push(format!("copy {turn}: {damaged} segments damaged, up to {last} of {before} acknowledged"));
            }
            std::fs::remove_dir_all(&to).expect("removed");
        }
    });
    assert!(wrong.is_empty(), "{} of {COPIES}:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_copy_while_retention_deletes_has_no_hole() {
    let (dir, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    under_load(ArchiveConfig { segment_bytes: 256 << 10, max_bytes: 2 << 20, ..plain(dir.path()) }, |acknowledged| {
        let first = |dir: &Path| Reader::new(dir).segments().expect("segments").first().map(|segment| segment.number);
        let oldest = first(dir.path());
        wait_until("a deleted segment", || first(dir.path()) > oldest);
        for turn in 0..COPIES {
            let to = folder.path().join("copy");
            let before = acknowledged();
            assert_eq!(copied(dir.path(), &to).damages, []);
            let (last, damaged, numbers) = verified(&to);
            assert!(damaged == 0 && last >= before, "copy {turn}: {damaged} damaged, {last} of {before}");
            let (first, newest) = (numbers.first().expect("one"), numbers.last().expect("one"));
            assert_eq!(newest - first + 1, numbers.len() as u64, "a segment is missing between others: {numbers:?}");
            std::fs::remove_dir_all(&to).expect("removed");
        }
    });
}

#[test]
fn a_live_archive_is_verified_without_damage() {
    let dir = tempfile::tempdir().unwrap();
    under_load(ArchiveConfig { segment_bytes: 8 << 20, max_bytes: 64 << 20, ..plain(dir.path()) }, |_| {
        for turn in 0..COPIES {
            assert_eq!(gaps(dir.path()), [], "look {turn}");
            for segment in Reader::new(dir.path()).segments().expect("segments") {
                match verify_segment(&segment, &mut |_| {}) {
                    Ok(report) => assert!(report.is_sound(), "look {turn}: {report:?}"),
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "look {turn}: {error}"),
                }
            }
        }
    });
}

#[test]
fn a_copy_needs_an_empty_folder_and_reports_its_content() {
    let (dir, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let archive = open(plain(dir.path()));
    append_each(&archive, &mut Frames::new("node-1", 1), 3);
    let run =
        |to: &Path| crate::programs::server(&["archive", "copy"]).args([dir.path(), to]).output().expect("it starts");
    let to = folder.path().join("copy");
    let output = run(&to);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("1 segment, 3 frames of them in the newest") && said.contains("copied to"), "{said}");
    let again = run(&to);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("is not empty: give a directory that is new or empty"));
    archive.shutdown();
    // A server starts from it, with all of it in the books.
    let restored = open(plain(&to));
    assert_eq!(restored.stats().totals.frames, 3);
    restored.shutdown();
}
