//! What is read out of an archive: by index, by scan, by names; and what people see of it.

use std::fs;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::archive_support::*;
use serde_json::Value;
use tapio_server::archive::ArchiveConfig;
use tapio_server::archive::index::Index;
use tapio_server::archive::reader::{Reader, Selection};
use tapio_server::archive::verify::{IndexState, verify_segment};
use tapio_server::events::{self, Choice};
use tapio_wire::event::Kind;

/// Entity 7 has every event of `Frames`; here every frame gets an entity of its own.
fn many_entities(dir: &std::path::Path, frames: u64) -> u64 {
    let archive = open(ArchiveConfig { segment_bytes: 4 << 20, ..plain(dir) });
    let mut source = Frames::new("node-1", 1);
    let receiver = Arc::new(Receiver::default());
    for seq in 1..=frames {
        source.entity = seq;
        // Big enough that a block of the index holds only some.
        source.events = 4000;
        append(&archive, source.append(&receiver));
        receiver.wait_for(seq);
    }
    archive.shutdown();
    source.realtime_ns
}

fn only(entity: u64) -> Selection {
    let entities = [(tapio_wire::node_id("node-1"), entity)].into_iter().collect();
    Selection { entities: Some(entities), ..Selection::default() }
}

#[test]
fn the_index_reads_one_entity_without_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    many_entities(dir.path(), 100);
    let reader = Reader::new(dir.path());
    let mut all = 0;
    let effort = reader.frames(&Selection::default(), &mut |_| {
        all += 1;
        ControlFlow::Continue(())
    });
    let whole = effort.unwrap();
    assert_eq!(all, 100);
    assert_eq!(whole.scanned, 0, "every segment is indexed after a shutdown");
    let mut found = 0;
    let effort = reader.frames(&only(50), &mut |frame| {
        found += u64::from(frame.body().events[0].entity.to_native() == 50);
        ControlFlow::Continue(())
    });
    let effort = effort.unwrap();
    assert_eq!(found, 1);
    assert!(effort.blocks_skipped > 0 && effort.bytes * 4 < whole.bytes, "{effort:?} of {whole:?}");
    let oom = Selection { kinds: 1 << Kind::Oom as u32, ..Selection::default() };
    let effort = reader.frames(&oom, &mut |_| panic!("there is none")).unwrap();
    assert_eq!(effort.bytes, 0);
}

#[test]
fn a_segment_without_index_is_scanned_with_equal_result() {
    let dir = tempfile::tempdir().unwrap();
    many_entities(dir.path(), 20);
    let read = |wanted: &Selection| {
        let mut ids = Vec::new();
        let effort = Reader::new(dir.path()).frames(wanted, &mut |frame| {
            ids.push(frame.header().seq);
            ControlFlow::Continue(())
        });
        (ids, effort.unwrap())
    };
    let (with_index, _) = read(&Selection::default());
    for path in segments(dir.path()) {
        let file = fs::File::options().read(true).write(true).open(&path).unwrap();
        let number = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        let index = Index::read(&file, number).unwrap().expect("an index");
        file.set_len(index.offset).unwrap();
    }
    let (scanned, effort) = read(&Selection::default());
    assert_eq!(scanned, with_index);
    assert!(effort.scanned > 0);
    assert!(read(&only(7)).0.contains(&7));
}

#[test]
fn a_running_archive_is_read_while_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let archive = open(plain(dir.path()));
    let mut frames = Frames::new("node-1", 1);
    append_each(&archive, &mut frames, 5);
    let choice = Choice { node: "node-1".into(), ..Choice::default() };
    let mut found = Vec::new();
    let outcome = events::select(dir.path(), &choice, &mut |event| {
        found.push(event);
        ControlFlow::Continue(())
    });
    assert_eq!(outcome.unwrap().events, 5);
    assert_eq!(found[0].kind, "run_queue");
    assert_eq!(found[0].entity.as_ref().unwrap().node, "node-1");
    let newest = Choice { limit: 2, newest: true, ..choice.clone() };
    let mut ids = Vec::new();
    events::select(dir.path(), &newest, &mut |event| {
        ids.push(event.id);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(ids, [found[3].id.clone(), found[4].id.clone()]);
    archive.shutdown();
    let archive = open(plain(dir.path()));
    append_each(&archive, &mut frames, 1);
    let mut ids = Vec::new();
    let bounded = Choice { read_bytes_max: 1, ..newest };
    let outcome = events::select(dir.path(), &bounded, &mut |event| {
        ids.push(event.id);
        ControlFlow::Continue(())
    });
    assert!(outcome.unwrap().is_cut, "the bound leaves the oldest out, and says so");
    assert!(ids.len() == 1 && ids[0].contains(":6:"), "{ids:?}");
    let nobody = Choice { node: "node-2".into(), ..Choice::default() };
    let error = events::select(dir.path(), &nobody, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(error.contains("node-2") && error.contains("node-1"), "{error}");
    drop(archive);
}

#[test]
fn the_time_range_is_kept_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let archive = open(plain(dir.path()));
    let mut frames = Frames::new("node-1", 1);
    append_each(&archive, &mut frames, 50);
    archive.shutdown();
    let mut times = Vec::new();
    let all = Choice::default();
    events::select(dir.path(), &all, &mut |event| {
        times.push(event.time_ns);
        ControlFlow::Continue(())
    })
    .unwrap();
    times.sort();
    let (since, until) = (times[10], times[20]);
    let some = Choice { since_ns: since, until_ns: Some(until), ..Choice::default() };
    let outcome = events::select(dir.path(), &some, &mut |event| {
        assert!((since..=until).contains(&event.time_ns));
        ControlFlow::Continue(())
    });
    assert_eq!(outcome.unwrap().events, 11);
}

#[test]
fn verify_distinguishes_a_sound_archive_from_a_damaged_one() {
    let dir = tempfile::tempdir().unwrap();
    many_entities(dir.path(), 10);
    let path = dir.path().to_str().unwrap();
    let (output, text) = server(&["archive", "verify", path]);
    println!("{text}");
    assert_eq!(output.status.code(), Some(0));
    assert!(text.contains("10 frames") && text.contains("40000 events: sound"), "{text}");
    for segment in Reader::new(dir.path()).segments().unwrap() {
        assert_eq!(verify_segment(&segment, &mut |_| {}).unwrap().index, IndexState::Sound);
    }
    let first = &segments(dir.path())[0];
    let mut bytes = fs::read(first).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle] ^= 1;
    fs::write(first, bytes).unwrap();
    let (output, text) = server(&["archive", "verify", "--json", path]);
    assert_eq!(output.status.code(), Some(3));
    let line: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!((&line["sound"], line["damages"].as_array().unwrap().len()), (&Value::Bool(false), 1));
    assert_eq!(server(&["archive", "verify", "/nonexistent"]).0.status.code(), Some(1));
    assert_eq!(server(&["archive", "cat", path, "--kind", "nonsense"]).0.status.code(), Some(2));
}

#[test]
fn stat_and_cat_print_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    many_entities(dir.path(), 3);
    let path = dir.path().to_str().unwrap();
    let (_, text) = server(&["archive", "stat", path, "--json"]);
    let stat: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(stat["events"], 12_000);
    assert_eq!(stat["events_by_kind"]["run_queue"], 12_000);
    assert_eq!(stat["nodes"][0]["node"], "node-1");
    assert_eq!(stat["nodes"][0]["archived_events"], 12_000);
    let (_, people) = server(&["archive", "stat", path]);
    assert!(people.contains("3 frames, 12000 events") && people.contains("run_queue"), "{people}");
    let (output, text) = server(&["archive", "cat", path, "--json", "--limit", "2", "--entity", "0000000000000002"]);
    assert_eq!((output.status.code(), text.lines().count()), (Some(0), 2), "{text}");
    let (output, _) = server(&["archive", "cat", path, "--pod", "shop/web"]);
    assert_eq!(output.status.code(), Some(1), "nothing is called so");
    let (_, text) = server(&["archive", "cat", path, "--json", "--limit", "2", "--kind", "run_queue"]);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[1]["detail"]["wait_ns"], 1);
}

#[test]
fn replay_and_diff_agree_with_an_archive_without_findings() {
    let dir = tempfile::tempdir().unwrap();
    many_entities(dir.path(), 3);
    let path = dir.path().to_str().unwrap();
    let (output, text) = server(&["replay", path, "--diff"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text, "0 as stored, 0 changed, 0 new, 0 gone\n");
    assert!(String::from_utf8_lossy(&output.stderr).contains("3 frames, 12000 events"));
}
