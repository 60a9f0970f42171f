//! The ledger among the exported tables: it adds up to what the archive's books count, whatever was lost, moved or damaged.

use std::fs;
use std::time::Duration;

use parquet::record::Field;
use serde_json::{Value, json};
use tapio_server::archive::index::Index;
use tapio_server::archive::lock_books;
use tapio_server::findings::FindingStore;
use tapio_server::remote::{Names, RemoteMetrics, RemoteSection, TableWriter};
use tapio_wire::event::Source;
use tapio_wire::ledger::{Reason, Stage};
use tapio_wire::segment::SEGMENT_HEADER_BYTES;

use crate::archive_support::*;
use crate::parquet_support::*;
use crate::remote_support::{GRACE, folder, objects, small};
use crate::whole_server::sum;

const ADDED_UP: &str =
    "SELECT account, coalesce(reason, '') AS reason, sum(events) AS events FROM ledger GROUP BY 1, 2 ORDER BY 1, 2";

fn export(arguments: &[&str]) -> (i32, Value) {
    let all: Vec<&str> = ["archive", "export", "--json"].iter().chain(arguments).copied().collect();
    let (output, text) = server(&all);
    (output.status.code().expect("a code"), serde_json::from_str(&text).expect("JSON"))
}

/// Frames of two epochs with losses between them; the first epoch is killed while it holds 5 events.
fn two_epochs(archive: &tapio_server::archive::Archive, start: u64) -> [u64; 2] {
    let mut archived = [0; 2];
    for (epoch, archived) in archived.iter_mut().enumerate() {
        let mut node = Node::new("node-1", 100 + epoch as u64);
        for step in 0..40 {
            let at = start + (epoch as u64 * 40 + step) * MINUTE_NS / 2;
            let mut bodies = Bodies::described();
            bodies.waits(at, 1000);
            *archived += 1000;
            node.lose(Stage::Ring, Reason::Full, step % 3);
            node.lose(Stage::Filter, Reason::Sampled, 1);
            if epoch == 0 && step == 39 {
                node.ledger.account_mut(Source::Ebpf).emitted += 5;
            }
            node.send(archive, at + 1_000_000, &bodies.body);
        }
    }
    archived
}

#[test]
fn the_exported_ledger_adds_up_to_the_books() {
    let Some(python) = python() else { return };
    let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let archive = open(small(dir.path()));
    let start = now_ns() - 50 * MINUTE_NS;
    let archived: u64 = two_epochs(&archive, start).iter().sum();
    let losses = lock_books(archive.books()).losses();
    archive.shutdown();
    let place = to.path().to_str().expect("UTF-8");
    let (code, said) = export(&["--to", place, dir.path().to_str().expect("UTF-8")]);
    assert_eq!(code, 0);
    assert!(said["segments"].as_u64().expect("a number") >= 3, "several segments: {said}");
    let of = |reason: Reason| {
        let found = losses.iter().filter(|(_, _, of, _)| *of == reason);
        found.map(|(.., events)| events).sum::<u64>()
    };
    let (full, sampled, killed) = (of(Reason::Full), of(Reason::Sampled), of(Reason::Killed));
    assert_eq!((full, sampled, killed), (78, 80, 5));
    let wanted = [
        [json!("archived"), json!(""), json!(archived)],
        [json!("dropped"), json!("full"), json!(full)],
        [json!("dropped"), json!("killed"), json!(killed)],
        [json!("dropped"), json!("sampled"), json!(sampled)],
        [json!("emitted"), json!(""), json!(archived + full + sampled + killed)],
        [json!("shipped"), json!(""), json!(archived)],
    ];
    // A window has its own losses: 5 frames in 2.5 minutes, and what the minutes at its ends overlap.
    let window = format!(
        "SELECT sum(events) AS events FROM losses WHERE is_wanted AND \"time\" >= to_timestamp({}) AND \"until\" < to_timestamp({})",
        (start + 10 * MINUTE_NS) / 1_000_000_000,
        (start + 13 * MINUTE_NS) / 1_000_000_000
    );
    let answers = ask_both(&python, &[], place, &[ADDED_UP, "SELECT count(*) AS n FROM events", &window]);
    assert_eq!(answers[0].rows, wanted);
    assert_eq!(answers[1].rows, [[json!(archived)]]);
    let in_window = answers[2].rows[0][0].as_u64().expect("a number");
    assert!((2..=6).contains(&in_window), "{in_window} of about one each half minute");
}

#[test]
fn frames_and_losses_of_two_servers_count_once() {
    let Some(python) = python() else { return };
    let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let place = to.path().to_str().expect("UTF-8");
    let dirs = ["a", "b"].map(|name| dir.path().join(name));
    let archives = dirs.each_ref().map(|dir| {
        fs::create_dir(dir).expect("made");
        open(plain(dir))
    });
    let start = now_ns() - 30 * MINUTE_NS;
    let mut node = Node::new("node-1", 100);
    for step in 0..20_u64 {
        let mut bodies = Bodies::described();
        bodies.waits(start + step * MINUTE_NS, 10);
        bodies.exit(start + step * MINUTE_NS, 100 + step as u32, 9, 1);
        node.lose(Stage::Ring, Reason::Full, 3);
        bodies.body.events.retain(|event| (step % 2 == 0) == (event.kind().lane() == tapio_wire::event::Lane::Bulk));
        let frame = node.frame(start + step * MINUTE_NS + 1_000_000, &bodies.body, false);
        // The first half to one, the second to the other, and three of them to both: their acknowledgement was lost.
        if step < 10 {
            node.append(&archives[0], &frame);
        }
        if step >= 7 {
            node.append(&archives[1], &frame);
        }
    }
    for archive in &archives {
        archive.shutdown();
    }
    for (dir, server) in dirs.iter().zip(["server-a", "server-b"]) {
        assert_eq!(export(&["--to", place, "--server", server, dir.to_str().expect("UTF-8")]).0, 0);
    }
    let queries = [
        "SELECT count(*) AS n, count(DISTINCT id) AS ids FROM events",
        "SELECT count(*) AS n FROM events_files",
        "SELECT count(*) AS n FROM deaths",
        "SELECT sum(events) AS n FROM ledger WHERE account = 'dropped'",
        "SELECT sum(events) AS n FROM ledger WHERE account = 'shipped'",
        "SELECT sum(events) AS n FROM ledger WHERE account = 'archived'",
    ];
    let answers = ask_both(&python, &[], place, &queries);
    let numbers: Vec<_> = answers.iter().map(|answer| answer.rows[0][0].clone()).collect();
    // Frames 8 to 10 are there twice: an end, ten waits, an end.
    assert_eq!(numbers, [json!(110), json!(122), json!(10), json!(60), json!(110), json!(110)]);
    assert_eq!(answers[0].rows[0][1], json!(110));
}

const SECONDS_10_NS: u64 = MINUTE_NS / 6;

#[test]
fn a_node_that_changes_servers_leaves_nothing_unexplained() {
    let dir = tempfile::tempdir().unwrap();
    let dirs = ["a", "b", "to"].map(|name| dir.path().join(name));
    dirs.iter().for_each(|dir| fs::create_dir(dir).expect("made"));
    let archives = [&dirs[0], &dirs[1]].map(|dir| open(plain(dir)));
    let start = now_ns() - 30 * MINUTE_NS;
    let mut node = Node::new("node-1", 100);
    for seq in 1..=14_u64 {
        let mut bodies = Bodies::described();
        bodies.waits(start + seq * SECONDS_10_NS, 10);
        node.lose(Stage::Ring, Reason::Full, 1);
        let frame = node.frame(start + seq * SECONDS_10_NS + 1_000_000, &bodies.body, false);
        // 1 to 4 and 8 to 14 to the first, 3 to 9 to the second: at both moves the acknowledgement of two frames was lost.
        match seq {
            8 => node.append_resumed(&archives[0], &frame, 7, 70),
            1..=4 | 9.. => node.append(&archives[0], &frame),
            _ => {}
        }
        match seq {
            3 => node.append_resumed(&archives[1], &frame, 2, 20),
            4..=9 => node.append(&archives[1], &frame),
            _ => {}
        }
    }
    for archive in &archives {
        archive.shutdown();
    }
    let place = dirs[2].to_str().expect("UTF-8");
    for (dir, server) in dirs.iter().zip(["server-a", "server-b"]) {
        assert_eq!(export(&["--to", place, "--server", server, dir.to_str().expect("UTF-8")]).0, 0);
    }
    let rows = rows_of(&dirs[2], "ledger");
    let text = |text: &str| Field::Str(text.to_owned());
    assert_eq!(rows.iter().filter(|row| row["account"] == text("unexplained")).count(), 0, "{rows:?}");
    let (ours, theirs): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| row["server"] == text("server-a"));
    let sums = |rows: &[_]| ["emitted", "shipped", "archived", "dropped"].map(|name| account(rows, None, name));
    assert_eq!((sums(&ours), sums(&theirs)), ([154, 140, 110, 14], [99, 90, 70, 9]));
    let has_hole = |row: &std::collections::HashMap<String, Field>| matches!((&row["first_seq"], &row["seq"]), (Field::Long(first), Field::Long(last)) if *first < 8 && *last > 4);
    assert!(!ours.iter().any(has_hole), "{ours:?}");
    let Some(python) = python() else { return };
    let answers = ask_both(&python, &[], place, &[ADDED_UP]);
    let wanted = [
        [json!("archived"), json!(""), json!(140)],
        [json!("dropped"), json!("full"), json!(14)],
        [json!("emitted"), json!(""), json!(154)],
        [json!("shipped"), json!(""), json!(140)],
    ];
    assert_eq!(answers[0].rows, wanted, "each frame once");
}

#[test]
fn a_damaged_segment_does_not_hold_up_the_others() {
    let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let archive = open(small(dir.path()));
    let archived: u64 = two_epochs(&archive, now_ns() - 50 * MINUTE_NS).iter().sum();
    archive.shutdown();
    let paths = segments(dir.path());
    assert!(paths.len() >= 3, "several segments: {paths:?}");
    let mut bytes = fs::read(&paths[0]).expect("readable");
    bytes[0] ^= 1;
    fs::write(&paths[0], bytes).expect("written");
    let number = paths[1].file_stem().and_then(|stem| stem.to_str()?.parse().ok()).expect("a number");
    let index = Index::read(&fs::File::open(&paths[1]).expect("a file"), number).expect("readable").expect("an index");
    let mut bytes = fs::read(&paths[1]).expect("readable");
    bytes[SEGMENT_HEADER_BYTES..index.offset as usize].fill(0xff);
    fs::write(&paths[1], bytes).expect("written");
    let place = to.path().to_str().expect("UTF-8");
    let (code, said) = export(&["--to", place, dir.path().to_str().expect("UTF-8")]);
    assert_eq!((code, &said["damaged_events"]), (3, &json!(index.events)));
    assert_eq!(said["events"], json!(archived - index.events));
    let rows = rows_of(to.path(), "ledger");
    assert_eq!(account(&rows, None, "damaged"), index.events as i64);
    let damaged = rows.iter().find(|row| row["account"] == Field::Str("damaged".into())).expect("a row");
    assert_eq!(damaged["until"], Field::Long(index.last_ns as i64), "when it happened");

    // A server does the same, and writes its findings.
    let remote = tempfile::tempdir().unwrap();
    let tables = Tables::start(dir.path(), remote.path());
    tables.store.publish(finding()).expect("published");
    wait_until("all are written", || Some(tables.metric("segments_total")) == said["segments"].as_f64());
    assert_eq!((tables.metric("failures_total"), tables.metric("missed_segments_total")), (0.0, 0.0));
    tables.writer.stop(GRACE);
    assert!(objects(remote.path()).iter().any(|path| path.contains("/findings-server-0-")));
}

#[test]
fn segments_deleted_before_their_export_are_counted_and_cleaned_up() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let archive = open(small(dir.path()));
    let start = now_ns() - 50 * MINUTE_NS;
    two_epochs(&archive, start);
    archive.shutdown();
    let paths = segments(dir.path());
    let other = tempfile::tempdir().unwrap();
    let (_, said) = export(&["--to", other.path().to_str().expect("UTF-8"), dir.path().to_str().expect("UTF-8")]);
    let written = said["segments"].as_f64().expect("a number");
    // Files stand where the tables' folders would be.
    let days = [start, now_ns()].map(|ns| {
        let day = jiff::Timestamp::from_nanosecond(i128::from(ns)).expect("a moment").strftime("date=%Y-%m-%d");
        remote.path().join(format!("events/cluster=test/{day}"))
    });
    fs::create_dir_all(remote.path().join("events/cluster=test")).expect("made");
    days.iter().for_each(|day| fs::write(day, "").expect("written"));
    let tables = Tables::start(dir.path(), remote.path());
    wait_until("a pass failed", || tables.metric("failures_total") >= 1.0);
    paths[..2].iter().for_each(|path| fs::remove_file(path).expect("removed"));
    for day in &days {
        // Both may be of the same day.
        let _ = fs::remove_file(day);
    }
    wait_until("the rest is written", || tables.metric("segments_total") == written - 2.0);
    assert_eq!(tables.metric("missed_segments_total"), 2.0);
    tables.writer.stop(GRACE);
    let work = dir.path().join("parquet-work");
    assert!(!work.is_dir() || objects(&work).is_empty(), "{:?}", objects(&work));
}

#[test]
fn a_later_export_of_an_open_segment_replaces_its_rows() {
    let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let archive = open(plain(dir.path()));
    let hour = 60 * MINUTE_NS;
    let boundary = now_ns() / hour * hour;
    let mut node = Node::new("node-1", 100);
    for at in [boundary - SECONDS_10_NS, boundary + SECONDS_10_NS] {
        let mut bodies = Bodies::described();
        bodies.waits(at, 10);
        node.send(&archive, at, &bodies.body);
        assert_eq!(export(&["--to", to.path().to_str().expect("UTF-8"), dir.path().to_str().expect("UTF-8")]).0, 0);
    }
    archive.shutdown();
    let rows = rows_of(to.path(), "ledger");
    assert_eq!((account(&rows, None, "archived"), rows_of(to.path(), "events").len()), (20, 20));
}

#[test]
fn an_exported_directory_has_the_remote_archives_names() {
    let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let archive = open(plain(dir.path()));
    let mut bodies = Bodies::described();
    bodies.waits(now_ns() - MINUTE_NS, 10);
    Node::new("node-1", 100).send(&archive, now_ns(), &bodies.body);
    archive.shutdown();
    let config = to.path().join("server.yaml");
    let text = "cluster: {name: plain}\narchive:\n  remote: {url: file:///tables, cluster: remote, server: server-7}\n";
    fs::write(&config, text).expect("written");
    let tables = to.path().join("tables");
    let [config, place] = [&config, &tables].map(|path| path.to_str().expect("UTF-8"));
    assert_eq!(export(&["--to", place, "--config", config, dir.path().to_str().expect("UTF-8")]).0, 0);
    assert!(objects(&tables).iter().all(|path| path.contains("/cluster=remote/")), "{:?}", objects(&tables));
    let rows = rows_of(&tables, "ledger");
    assert!(!rows.is_empty() && rows.iter().all(|row| row["server"] == Field::Str("server-7".into())), "{rows:?}");
}

/// A writer of tables whose metrics can be read.
struct Tables {
    writer: TableWriter,
    store: std::sync::Arc<FindingStore>,
    registry: prometheus::Registry,
}

impl Tables {
    fn start(dir: &std::path::Path, remote: &std::path::Path) -> Self {
        let section = RemoteSection { parquet: true, every: Duration::from_secs(3600), ..folder(remote) };
        let registry = prometheus::Registry::new();
        let metrics = RemoteMetrics::register(&registry).expect("registered");
        let store = std::sync::Arc::new(FindingStore::new(100));
        let names = Names { cluster: "test".into(), server: "server-0".into() };
        let writer = TableWriter::start(&section, &names, dir, store.clone(), metrics).expect("started");
        Self { writer, store, registry }
    }

    fn metric(&self, name: &str) -> f64 {
        let text = prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).expect("text");
        sum(&text, &format!("tapio_server_remote_parquet_{name}"), &[])
    }
}

fn finding() -> tapio_wire::service::Finding {
    tapio_wire::service::Finding {
        id: "0123456789abcdef".into(),
        pattern: "memory-limit-kill".into(),
        ended_ns: now_ns(),
        ..Default::default()
    }
}

#[test]
fn what_cannot_be_read_any_more_is_counted_as_damaged() {
    let Some(python) = python() else { return };
    let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let archive = open(plain(dir.path()));
    let mut node = Node::new("node-1", 100);
    let mut frames = Vec::new();
    for step in 0..3 {
        let mut bodies = Bodies::described();
        bodies.waits(now_ns() - MINUTE_NS, 100 + step);
        frames.push(node.send(&archive, now_ns(), &bodies.body));
    }
    archive.shutdown();
    let segment = segments(dir.path()).remove(0);
    let mut bytes = fs::read(&segment).expect("readable");
    let at = find(&bytes, &frames[1]) + frames[1].len() / 2;
    bytes[at] ^= 1;
    fs::write(&segment, bytes).expect("written");
    let place = to.path().to_str().expect("UTF-8");
    let (code, said) = export(&["--to", place, dir.path().to_str().expect("UTF-8")]);
    assert_eq!((code, &said["damaged_events"]), (3, &json!(101)));
    let query = "SELECT account, sum(events) AS events FROM losses GROUP BY 1";
    let answers = ask_both(&python, &[], place, &[query, "SELECT count(*) AS n FROM events"]);
    assert_eq!(answers[0].rows, [[json!("damaged"), json!(101)]], "and they are no riddle besides");
    assert_eq!(answers[1].rows, [[json!(202)]]);
}

#[test]
fn tables_are_written_in_the_background_and_at_the_end() {
    let Some(python) = python() else { return };
    let (dir, remote) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = RemoteSection { parquet: true, every: Duration::from_secs(3600), ..folder(remote.path()) };
    let archive = open(small(dir.path()));
    let registry = prometheus::Registry::new();
    let metrics = RemoteMetrics::register(&registry).expect("registered");
    let metric = |name: &str| {
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).expect("text");
        sum(&text, &format!("tapio_server_remote_parquet_{name}"), &[])
    };
    let store = std::sync::Arc::new(FindingStore::new(100));
    let names = Names { cluster: "test".into(), server: "server-0".into() };
    let start = || TableWriter::start(&section, &names, dir.path(), store.clone(), metrics.clone()).expect("started");
    let writer = start();
    let archived: u64 = two_epochs(&archive, now_ns() - 50 * MINUTE_NS).iter().sum();
    wait_until("what is closed is written", || metric("segments_total") >= 2.0);
    store.publish(finding()).expect("published");
    archive.shutdown();
    writer.stop(GRACE);
    assert_eq!((metric("events_total"), metric("missed_segments_total")), (archived as f64, 0.0));
    assert!(metric("bytes_total") > 0.0 && metric("seconds_total") > 0.0);
    assert!(
        !dir.path().join("parquet-work").join("events").is_dir()
            || objects(&dir.path().join("parquet-work")).is_empty()
    );
    let place = remote.path().to_str().expect("UTF-8");
    let queries =
        ["SELECT count(*) AS n FROM events", "SELECT id, pattern FROM findings", "SELECT DISTINCT cluster FROM events"];
    let answers = ask_both(&python, &[], place, &queries);
    assert_eq!(answers[0].rows, [[json!(archived)]]);
    assert_eq!(answers[1].rows, [[json!("0123456789abcdef"), json!("memory-limit-kill")]]);
    assert_eq!(answers[2].rows, [[json!("test")]]);
    // The next start does nothing again.
    let written = metric("segments_total");
    let files = objects(remote.path()).len();
    start().stop(GRACE);
    assert_eq!(metric("segments_total"), written);
    assert!(objects(remote.path()).len() <= files + 1, "its findings alone");
}
