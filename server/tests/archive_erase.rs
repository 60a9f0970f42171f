//! Erasure: what belongs to a namespace goes, the rest and the ledger stay, and a legal hold keeps it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use serde_json::{Value, json};
use tapio_server::archive::reader::{Reader, Selection};
use tapio_server::archive::{ArchiveConfig, lock_books};
use tapio_server::remote::RemoteSection;
use tapio_wire::event::{Detail, Entity, EntityKind, Exit, Signal};

use crate::archive_support::*;
use crate::parquet_support::*;
use crate::remote_support::*;

const SHOP: u64 = 11;
const API: u64 = 21;

/// An hour of the namespace shop, and of `other`, whose container was sent a signal by a process of shop's.
fn two_namespaces(archive: &tapio_server::archive::Archive) {
    a_bad_hour(archive);
    let mut node = Node::new("node-2", 200);
    let at = now_ns() - 20 * MINUTE_NS;
    let mut bodies = Bodies::described();
    bodies.body.entities.push(Entity {
        namespace: "other".into(),
        pod: "api-1".into(),
        ..Entity::named(EntityKind::Container, API, "other/api-1/api")
    });
    let (comm, sender_comm) = (bodies.name("postgres"), bodies.name("nginx-reloader"));
    let signal = Signal {
        signal: 15,
        code: 0,
        ns_pid: 1,
        ns_level: 1,
        comm,
        sender_pid: 77,
        sender_comm,
        sender_parent: sender_comm + 1,
        sender_entity: SHOP,
        from_kernel: false,
        result: 0,
        role: 1,
        over_cpu_limit: 0,
        repeats: 0,
    };
    bodies.event(at, API, 500, Detail::Signal(Box::new(signal)));
    let exit = Exit {
        start_time_ns: at - 1,
        parent_pid: 1,
        ns_pid: 1,
        ns_level: 1,
        status: 15,
        comm,
        oom_score_adj: 0,
        role: 1,
    };
    bodies.event(at + 1, API, 500, Detail::Exit(exit));
    bodies.exit(at + 2, 501, 9, 1);
    node.send(archive, at + 10, &bodies.body);
}

/// Whether a text is about the namespace.
fn is_of_shop(text: &str) -> bool {
    ["shop", "nginx", "web", "/kubepods/pod1"].iter().any(|part| text.contains(part))
}

#[derive(Debug, Default, PartialEq)]
struct Content {
    /// Events by node, epoch and sequence.
    frames: BTreeMap<(u64, u64, u64), u32>,
    erased: u64,
    of_shop: Vec<String>,
}

fn content(dirs: impl IntoIterator<Item = std::path::PathBuf>) -> Content {
    let mut content = Content::default();
    let each = &mut |frame: &tapio_wire::frame::Frame| {
        let (header, body) = (frame.header(), frame.body());
        content.frames.insert((header.node, header.epoch, header.seq), header.events());
        for event in body.events.iter() {
            event.each_field(&mut |field, value| {
                if field == "reason"
                    && let tapio_wire::event::FieldValue::Name(name) = value
                {
                    content.erased += u64::from(body.name(name) == Some(tapio_wire::event::ERASED));
                }
            });
        }
        let names = body.names.iter().map(|name| name.to_string());
        let described = body.entities.iter().map(|entity| format!("{} {}", entity.name, entity.namespace));
        content.of_shop.extend(names.chain(described).filter(|text| is_of_shop(text)));
        ControlFlow::Continue(())
    };
    Reader::over(dirs).frames(&Selection::default(), each).expect("readable");
    content
}

fn erase(environment: &[(&str, String)], arguments: &[&str]) -> (Output, String) {
    let output = crate::programs::server(&["archive"])
        .args(arguments)
        .env("USER", "somebody")
        .env_remove("SUDO_USER")
        .envs(environment.iter().map(|(name, value)| (*name, value.as_str())))
        .output()
        .expect("it runs");
    let text = String::from_utf8(output.stdout.clone()).expect("UTF-8");
    (output, text)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn is_sound(dir: &Path) {
    let (output, text) = server(&["archive", "verify", dir.to_str().expect("UTF-8")]);
    assert!(output.status.success(), "{text}");
}

#[test]
fn an_erased_namespace_leaves_a_ledger_that_closes() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().expect("UTF-8");
    let archive = open(small(dir.path()));
    two_namespaces(&archive);
    let arguments = ["erase", place, "--namespace", "shop", "--reason", "request 7", "--json"];
    let (output, _) = erase(&[], &arguments);
    let refusal = said(&output);
    assert!(output.status.code() == Some(1) && refusal.contains(&std::process::id().to_string()), "{refusal}");
    let losses = lock_books(archive.books()).losses();
    archive.shutdown();
    let before = content([dir.path().to_owned()]);
    assert!(!before.of_shop.is_empty() && before.erased == 0);
    let cat = |namespace: &str| server(&["archive", "cat", "--json", "--namespace", namespace, place]);
    let (_, kept) = cat("other");
    let (_, all) = cat("shop");
    let of_shop = all.lines().count() as u64;
    let published =
        |id: &str, namespace: &str| json!({ "published": { "id": id, "entity": { "namespace": namespace } } });
    let lines = format!("{}\n{}\n", published("a", "shop"), published("b", "other"));
    std::fs::write(dir.path().join("findings.jsonl"), lines).expect("written");
    // What an interrupted run left.
    std::fs::write(segments(dir.path())[0].with_extension("segment.new"), "half").expect("written");

    let (output, text) = erase(&[], &[&arguments[..], &["--dry-run"]].concat());
    assert!(output.status.success(), "{}", said(&output));
    let would: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((content([dir.path().to_owned()]), dir.path().join("audit.jsonl").exists()), (before, false));
    let before = content([dir.path().to_owned()]);
    let (output, text) = erase(&[], &arguments);
    assert!(output.status.success(), "{}", said(&output));
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value["events"], would["events"]);
    let erased = value["events"].as_u64().expect("a number");
    // The rollout is about no pod, and names the namespace.
    assert!(erased > of_shop, "{erased} of {of_shop}");
    assert_eq!(
        (&value["by"], &value["reason"], &value["findings"]),
        (&"somebody".into(), &"request 7".into(), &1.into())
    );
    let audit = std::fs::read_to_string(dir.path().join("audit.jsonl")).expect("readable");
    let audit: Vec<Value> = audit.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((audit.len(), &audit[1]), (2, &value));
    assert_eq!((&audit[0]["what"], &audit[0]["reason"]), (&"erase begins".into(), &"request 7".into()));

    is_sound(dir.path());
    let after = content([dir.path().to_owned()]);
    assert_eq!((&after.frames, after.erased, after.of_shop), (&before.frames, erased, Vec::new()));
    // The others have their ids still, and what they say, but for who sent the signal.
    let (_, text) = cat("other");
    let without_sender = |text: &str| {
        let of_line = |line: &str| {
            let mut event: Value = serde_json::from_str(line).expect("JSON");
            let is_signal = event["kind"] == "signal";
            assert!(!is_signal || event["id"].is_string());
            if is_signal {
                event["detail"] = Value::Null;
                event["text"] = Value::Null;
            }
            event
        };
        text.lines().map(of_line).collect::<Vec<_>>()
    };
    assert_eq!(without_sender(&text), without_sender(&kept));
    assert!(!text.contains("nginx"), "{text}");
    assert!(!cat("shop").0.status.success());
    assert_eq!(std::fs::read_to_string(dir.path().join("findings.jsonl")).expect("readable").lines().count(), 1);
    // A repeated run finds nothing more, and a server starts from it with the same ledger.
    let (_, text) = erase(&[], &arguments);
    let again: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((&again["events"], &again["events_erased_before"]), (&0.into(), &erased.into()));
    let (archive, replayed) = open_and_replay(small(dir.path()), ALL);
    assert_eq!(replayed.len(), before.frames.len());
    assert_eq!(lock_books(archive.books()).losses(), losses);
    archive.shutdown();
}

#[test]
fn one_pod_until_a_moment_is_erased_alone() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().expect("UTF-8");
    let archive = open(small(dir.path()));
    two_namespaces(&archive);
    archive.shutdown();
    // Before the first death of the bad hour.
    let until = tapio_server::render::rfc3339(now_ns() - 36 * MINUTE_NS - MINUTE_NS / 2);
    let erased = |arguments: &[&str]| {
        let (output, text) = erase(&[], &[&["erase", place, "--json", "--namespace"], arguments].concat());
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_str::<Value>(&text).expect("JSON")["events"].as_u64().expect("a number")
    };
    assert_eq!(erased(&["shop", "--pod", "web-2"]), 0);
    assert_eq!(erased(&["elsewhere"]), 0);
    let early = erased(&["shop", "--pod", "web-1", "--until", &until]);
    assert!((1000..1010).contains(&early), "{early}");
    let (_, text) = server(&["archive", "cat", "--json", "--entity", "000000000000000b", "--kind", "exit", place]);
    assert_eq!(text.lines().count(), 5, "the deaths are later: {text}");
    assert!(erased(&["shop", "--pod", "web-1"]) > 5);
    is_sound(dir.path());
}

/// A remote archive with tables, from which a namespace is erased.
fn erased_remotely(section: &RemoteSection, environment: &[(&str, String)], stored: Option<&Path>) {
    let (dir, work, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (url, work) = (section.url.as_str(), work.path().join("work"));
    let uploaded = Uploaded::open(small(dir.path()), section);
    two_namespaces(&uploaded.archive);
    uploaded.end(GRACE);
    let (output, _) = command(cache.path(), environment, &["archive", "export", "--to", url, url]);
    assert!(output.status.success(), "{}", said(&output));
    let rows = |stored: &Path| (rows_of(stored, "events").len(), account(&rows_of(stored, "ledger"), None, "archived"));
    let before = stored.map(rows);
    let arguments = ["erase", url, "--namespace", "shop", "--json", "--work", work.to_str().expect("UTF-8")];
    let (output, text) = erase(environment, &["hold", "add", url, "--namespace", "shop", "--reason", "case 7"]);
    assert!(output.status.success(), "{}", said(&output));
    let id = text.trim();
    let (output, _) = erase(environment, &arguments);
    let refusal = said(&output);
    assert!(output.status.code() == Some(1) && refusal.contains(id) && refusal.contains("case 7"), "{refusal}");
    let (_, text) = erase(environment, &["hold", "list", url]);
    assert!(text.contains(id) && text.contains("somebody: case 7"), "{text}");
    let (output, _) = erase(environment, &["hold", "remove", url, id]);
    assert!(output.status.success(), "{}", said(&output));

    let (output, text) = erase(environment, &arguments);
    assert!(output.status.success(), "{}", said(&output));
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert!(value["events"].as_u64() > Some(1000) && value["segments_with_tables"].as_u64() >= Some(1), "{text}");
    let fresh = tempfile::tempdir().unwrap();
    let (output, text) = command(fresh.path(), environment, &["archive", "verify", url]);
    assert!(output.status.success(), "{text}{}", said(&output));
    let to = fresh.path().join("copy");
    let (output, _) = command(fresh.path(), environment, &["archive", "copy", url, to.to_str().expect("UTF-8")]);
    assert!(output.status.success(), "{}", said(&output));
    let after = content([to]);
    assert_eq!((after.frames, after.of_shop), (content([dir.path().to_owned()]).frames, Vec::new()));
    assert_eq!(value["events"], after.erased);
    if let Some(stored) = stored {
        assert_eq!(Some(rows(stored)), before, "every event is a row still, and the ledger closes");
        let named = rows_of(stored, "events").iter().filter(|row| is_of_shop(&format!("{row:?}"))).count();
        assert_eq!((named, rows_of(stored, "findings").len()), (0, 0));
        let names = objects(stored);
        let ending = |end: &str| names.iter().filter(|name| name.starts_with("test/") && name.ends_with(end)).count();
        assert_eq!(ending(".segment"), ending(".json"), "the old ones are gone: {names:?}");
        assert_eq!(names.iter().filter(|name| name.starts_with("audit/")).count(), 4, "{names:?}");
    }
    // A server that has it on its disk still uploads it no more.
    let uploaded = Uploaded::open(small(dir.path()), section);
    uploaded.wait_uploaded();
    assert_eq!(uploaded.metric("remote_collisions_total"), 0.0);
    uploaded.end(GRACE);
    let (_, text) = erase(environment, &arguments);
    let again: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(again["events"], 0, "{text}");
}

#[test]
fn a_remote_folder_loses_a_namespace_and_its_rows() {
    let remote = tempfile::tempdir().unwrap();
    erased_remotely(&folder(remote.path()), &[], Some(remote.path()));
}

#[test]
fn a_bucket_loses_a_namespace_and_its_rows() {
    let Some(server) = S3::start() else { return };
    let keys = tempfile::tempdir().unwrap();
    erased_remotely(&s3(server.port(), keys.path()), &s3_environment(server.port()), None);
}

#[test]
fn an_interrupted_remote_erasure_is_finished_by_the_next() {
    let (dir, remote, cache) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = folder(remote.path());
    let uploaded = Uploaded::open(small(dir.path()), &section);
    two_namespaces(&uploaded.archive);
    uploaded.end(GRACE);
    let old = objects(remote.path()).into_iter().find(|name| name.ends_with(".segment")).expect("one");
    let bytes = std::fs::read(remote.path().join(&old)).expect("readable");
    let work = cache.path().join("work");
    let arguments = ["erase", &section.url, "--namespace", "shop", "--work", work.to_str().expect("UTF-8")];
    // Somebody else works on it.
    let lock = remote.path().join("locks/maintenance/00000000000000000007.json");
    std::fs::create_dir_all(lock.parent().expect("a folder")).expect("made");
    let term = json!({ "holder": "another", "what": "merge", "until_ns": now_ns() + 60_000_000_000_u64 });
    std::fs::write(&lock, term.to_string()).expect("written");
    let (output, _) = erase(&[], &arguments);
    let refusal = said(&output);
    assert!(output.status.code() == Some(1) && refusal.contains("another holds it for merge"), "{refusal}");
    // It died; and a run was interrupted after the new manifest and before the old object went.
    std::fs::write(&lock, json!({ "holder": "another", "what": "merge", "until_ns": 1 }).to_string()).expect("written");
    let (output, _) = erase(&[], &arguments);
    assert!(output.status.success(), "{}", said(&output));
    assert!(!remote.path().join(&old).exists());
    std::fs::write(remote.path().join(&old), bytes).expect("written");
    let (output, _) = erase(&[], &arguments);
    assert!(output.status.success(), "{}", said(&output));
    assert!(!remote.path().join(&old).exists());
    let (output, text) = command(cache.path(), &[], &["archive", "verify", &section.url]);
    assert!(output.status.success(), "{text}");
}

#[test]
fn rows_are_erased_by_the_run_after_a_failed_one() {
    let (dir, remote, cache) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = folder(remote.path());
    let uploaded = Uploaded::open(small(dir.path()), &section);
    two_namespaces(&uploaded.archive);
    uploaded.end(GRACE);
    let url = section.url.as_str();
    let (output, _) = command(cache.path(), &[], &["archive", "export", "--to", url, url]);
    assert!(output.status.success(), "{}", said(&output));
    // Nothing can be written where a table is.
    let (tables, away) = (remote.path().join("events/cluster=test"), remote.path().join("away"));
    std::fs::rename(&tables, &away).expect("moved");
    std::fs::write(&tables, "").expect("written");
    let work = cache.path().join("work");
    let arguments = ["erase", url, "--namespace", "shop", "--work", work.to_str().expect("UTF-8")];
    let (output, _) = erase(&[], &arguments);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    std::fs::remove_file(&tables).expect("removed");
    std::fs::rename(&away, &tables).expect("moved");
    let (output, _) = erase(&[], &arguments);
    assert!(output.status.success(), "{}", said(&output));
    let rows = rows_of(remote.path(), "events");
    let named = rows.iter().filter(|row| is_of_shop(&format!("{row:?}"))).count();
    assert_eq!((rows.is_empty(), named), (false, 0));
}

#[test]
fn a_hold_keeps_what_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().expect("UTF-8");
    let archive = open(small(dir.path()));
    two_namespaces(&archive);
    archive.shutdown();
    let quarantine = dir.path().join("quarantine/place");
    std::fs::create_dir_all(quarantine.parent().expect("a folder")).expect("made");
    std::fs::write(&quarantine, "who knows").expect("written");
    let (output, id) = erase(&[], &["hold", "add", place, "--namespace", "elsewhere", "--reason", "case 8"]);
    assert!(output.status.success(), "{}", said(&output));
    let arguments = ["erase", place, "--namespace", "shop", "--json"];
    let mut bytes = std::fs::read(&segments(dir.path())[0]).expect("readable");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&segments(dir.path())[0], &bytes).expect("written");
    let (output, _) = erase(&[], &arguments);
    let refusal = said(&output);
    assert!(output.status.code() == Some(1) && refusal.contains(id.trim()), "{refusal}");
    assert!(refusal.contains("cannot be read"), "{refusal}");
    assert_eq!(std::fs::read(&segments(dir.path())[0]).expect("readable"), bytes);
    // With nothing to erase in it, it is left as it is.
    let (output, _) = erase(&[], &["erase", place, "--namespace", "nobody"]);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(std::fs::read(&segments(dir.path())[0]).expect("readable"), bytes);
    assert!(quarantine.exists());
    let (output, _) = erase(&[], &["hold", "remove", place, id.trim()]);
    assert!(output.status.success(), "{}", said(&output));
    let (output, text) = erase(&[], &arguments);
    assert!(output.status.success(), "{}", said(&output));
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert!(value["damaged_bytes"].as_u64() > Some(0) && !quarantine.exists(), "{text}");
}

#[test]
fn retention_leaves_what_a_legal_hold_keeps() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().expect("UTF-8");
    let archive = open(small(dir.path()));
    let mut frames = Frames::new("node-1", 1);
    frames.events = EVENTS;
    while archive.stats().segments < 3 {
        append_each(&archive, &mut frames, 1);
    }
    archive.shutdown();
    let paths = segments(dir.path());
    let until = tapio_server::render::rfc3339(1_700_000_002_000_000_000);
    let (output, id) = erase(&[], &["hold", "add", place, "--until", &until, "--reason", "case 7"]);
    assert!(output.status.success(), "{}", said(&output));
    // All of them are old, and the first one is kept.
    let config = ArchiveConfig { max_age: Duration::from_secs(1), ..small(dir.path()) };
    let archive = open(config.clone());
    wait_until("the others are deleted", || {
        append_each(&archive, &mut frames, 1);
        !paths[1].exists()
    });
    assert!(paths[0].exists());
    let (output, _) = erase(&[], &["hold", "remove", place, id.trim()]);
    assert!(output.status.success(), "{}", said(&output));
    wait_until("it is deleted", || {
        append_each(&archive, &mut frames, 1);
        !paths[0].exists()
    });
    archive.shutdown();
    let audit = std::fs::read_to_string(dir.path().join("audit.jsonl")).expect("readable");
    assert!(audit.contains("hold add") && audit.contains("hold remove") && audit.contains("somebody"), "{audit}");
}
