//! The journal through restarts, torn lines and a disk that fails.

use prometheus::Registry;
use tapio_wire::service::{Death, EntityRef, Evidence};

use super::*;

fn finding(id: &str, ended_ns: u64, steps: usize) -> Finding {
    Finding {
        id: id.into(),
        pattern: "p".into(),
        severity: "high".into(),
        ended_ns,
        entity: Some(EntityRef { id: u64::MAX, node: "n".into(), ..EntityRef::default() }),
        death: Some(Death { pid: 7, signal: Some(9), ..Death::default() }),
        evidence: vec![Evidence::default(); steps],
        confidence: 0.1,
        count: 1,
        ..Finding::default()
    }
}

fn journal(dir: &Path, store: &Arc<FindingStore>) -> Journal {
    let metrics = JournalMetrics::register(&Registry::new()).expect("fresh names");
    Journal::start(dir, store, metrics).expect("it starts")
}

fn restarted(dir: &Path) -> Arc<FindingStore> {
    let store = Arc::new(FindingStore::new(100));
    read(dir).expect("readable").restore(&store);
    store
}

#[test]
fn findings_and_their_successors_survive_restarts_and_torn_lines() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Arc::new(FindingStore::new(100));
    let running = journal(dir.path(), &store);
    for id in ["a1", "b1", "c1"] {
        store.publish(finding(id, 5, 2));
    }
    store.publish(finding("a1", 6, 3));
    store.withdraw("b1", Some("c1"));
    drop(running);
    let path = &paths(dir.path())[0];
    let torn = fs::read(path).expect("the journal");
    File::options().append(true).open(path).expect("it opens").write_all(&torn[..20]).expect("written");
    let again = restarted(dir.path());
    assert_eq!(again.len(), 2);
    assert_eq!(*again.get("a1").expect("kept"), *store.get("a1").expect("kept"));
    assert_eq!(again.get("b1").expect("leads on").id, "c1");
    let running = journal(dir.path(), &again);
    again.publish(finding("d1", 9, 1));
    drop(running);
    let recorded = read(dir.path()).expect("readable");
    assert_eq!((recorded.findings.len(), recorded.unreadable), (3, 1));
}

#[test]
fn what_is_appended_is_not_lost_to_a_torn_line() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(&paths(dir.path())[0], "{\"published\":{\"id\":\"torn").expect("written");
    for id in ["a1", "b1"] {
        append(dir.path(), &[Arc::new(finding(id, 5, 1))]).expect("appended");
    }
    let recorded = read(dir.path()).expect("readable");
    assert_eq!((recorded.findings.len(), recorded.unreadable), (2, 1));
    let text = fs::read_to_string(&paths(dir.path())[0]).expect("readable");
    assert!(!text.contains("\n\n"), "{text}");
}

#[test]
fn a_named_pipe_is_no_journal() {
    let dir = tempfile::tempdir().expect("a directory");
    let [path, _] = paths(dir.path());
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).expect("a pipe");
    let error = read(dir.path()).expect_err("it is no file");
    assert!(error.to_string().contains("is no regular file"), "{error}");
    open(&path).expect_err("nothing is written to it");
}

#[test]
fn a_bad_older_file_does_not_hide_the_newer_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Arc::new(FindingStore::new(100));
    let running = journal(dir.path(), &store);
    store.publish(finding("a1", 6, 3));
    drop(running);
    let [newer, older] = paths(dir.path());
    std::os::unix::fs::symlink(&older, &older).expect("a circle in its place");
    let recorded = read_what_can_be(dir.path());
    assert_eq!((recorded.findings.len(), &recorded.failed[0].0), (1, &older));
    assert!(read(dir.path()).is_err(), "a replay compares with all or nothing");
    // What is written next takes the place of nothing that cannot be read.
    let again = Arc::new(FindingStore::new(100));
    recorded.restore(&again);
    let running = journal(dir.path(), &again);
    again.publish(finding("b1", 7, 1));
    drop(running);
    assert!(dir.path().join("findings.jsonl.1.unreadable").is_symlink() && !older.is_symlink());
    assert_eq!(read(dir.path()).expect("readable").findings.len(), 2);
    // Somebody has edited it.
    for edited in ["\"confidence\":1e308", "\"confidence\":-5.0"] {
        let text = fs::read_to_string(&newer).expect("it is there");
        let start = text.find("\"confidence\":").expect("it has one");
        let end = start + text[start..].find(',').expect("more follows");
        fs::write(&newer, format!("{}{edited}{}", &text[..start], &text[end..])).expect("written");
        let recorded = read_what_can_be(dir.path());
        assert_eq!((recorded.findings.len(), recorded.unreadable), (1, 1), "the other one stays");
    }
}

#[test]
fn a_replay_of_half_the_story_changes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Arc::new(FindingStore::new(100));
    let running = journal(dir.path(), &store);
    store.publish(finding("a1", 6, 3));
    drop(running);
    let again = restarted(dir.path());
    again.set_replaying(true);
    assert!(again.publish(finding("a1", 6, 2)).is_none(), "it says less");
    assert!(again.publish(finding("weaker", 6, 1)).is_none(), "the same death under another id");
    assert!(again.publish(finding("other", 8, 1)).is_some(), "another death");
    again.set_replaying(false);
    assert_eq!(again.publish(finding("a1", 7, 3)).expect("it says more").revision, 2);
    assert!(again.publish(finding("better", 6, 1)).is_some(), "live, a better explanation may come");
}

/// A directory in which the journal cannot be opened until it is removed.
fn broken(dir: &Path) -> PathBuf {
    let obstacle = paths(dir)[0].clone();
    fs::create_dir(&obstacle).expect("made");
    obstacle
}

fn until(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "it stays as it is");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_withdrawal_during_failed_or_missed_writes_is_final() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Arc::new(FindingStore::new(10_000));
    let running = journal(dir.path(), &store);
    for id in ["a1", "b1", "c1"] {
        store.publish(finding(id, 5, 2));
    }
    drop(running);
    assert_eq!(restarted(dir.path()).len(), 3);
    // A new run whose writes fail at first.
    let store = restarted(dir.path());
    let whole = fs::read(&paths(dir.path())[0]).expect("readable");
    fs::remove_file(&paths(dir.path())[0]).expect("removed");
    fs::write(&paths(dir.path())[1], whole).expect("written");
    let obstacle = broken(dir.path());
    let metrics = JournalMetrics::register(&Registry::new()).expect("fresh names");
    let running = Journal::start(dir.path(), &store, metrics.clone()).expect("it starts");
    store.withdraw("a1", Some("c1"));
    store.withdraw("b1", None);
    until(|| metrics.failures.get() > 0);
    fs::remove_dir(obstacle).expect("removed");
    store.publish(finding("d1", 9, 1));
    until(|| paths(dir.path())[0].is_file());
    drop(running);
    let again = restarted(dir.path());
    assert!(again.get("b1").is_err(), "it was withdrawn");
    let is_withdrawn = again.changed_after(0).iter().any(|finding| finding.id == "b1" && finding.withdrawn);
    assert!(is_withdrawn, "a watcher that got it gets its withdrawal");
    assert_eq!(again.get("a1").expect("leads on").id, "c1");
    assert_eq!(again.len(), 2);
}

#[test]
fn a_rewritten_journal_counts_alone_in_any_file_order() {
    let dir = tempfile::tempdir().expect("a directory");
    let [new, old] = paths(dir.path());
    let published = |id: &str| encode(&Line::Published(Box::new(finding(id, 1, 1))));
    let anew = |part| encode(&Line::Anew { snapshot: 7, part });
    fs::write(&old, published("stale")).expect("written");
    fs::write(&new, [anew(2), published("newer")].concat()).expect("written");
    let ids = || read(dir.path()).expect("readable").findings.into_keys().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(ids(), ["newer".to_owned()].into());
    fs::write(&old, [anew(1), published("older")].concat()).expect("written");
    assert_eq!(ids(), ["newer".to_owned(), "older".to_owned()].into());
}

#[test]
fn a_rewrite_keeps_both_files_bounded_and_the_newest_findings() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Arc::new(FindingStore::new(10_000));
    let large = |number: u64| Finding { title: "x".repeat(1 << 20), ..finding(&format!("f{number}"), number, 1) };
    let mut writer = Writer {
        paths: paths(dir.path()),
        file: None,
        has_saved: false,
        metrics: JournalMetrics::register(&Registry::new()).expect("fresh names"),
        pause_until: Instant::now(),
        is_behind: false,
        is_failing: false,
    };
    for number in 1..=40 {
        store.publish(large(number));
    }
    let is_bounded = || paths(dir.path()).iter().all(|path| fs::metadata(path).expect("there").len() <= FILE_BYTES_MAX);
    writer.write_anew(&store).expect("written");
    assert!(is_bounded());
    let recorded = read(dir.path()).expect("readable");
    assert!((28..=32).contains(&recorded.findings.len()), "{}", recorded.findings.len());
    assert!(recorded.findings.contains_key("f40") && !recorded.findings.contains_key("f1"));
    // One batch that is longer than a file.
    let lines: Vec<_> = (41..=60).map(|number| encode(&Line::Published(Box::new(large(number))))).collect();
    writer.append(&lines).expect("written");
    assert!(is_bounded());
    assert!(read(dir.path()).expect("readable").findings.contains_key("f60"));
}

#[test]
fn the_journal_is_bounded_and_missed_changes_are_rewritten() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(&paths(dir.path())[0], vec![b'\n'; FILE_BYTES_MAX as usize - 10]).expect("written");
    let store = Arc::new(FindingStore::new(10_000));
    let running = journal(dir.path(), &store);
    for number in 0..5000 {
        store.publish(finding(&format!("f{number}"), number + 1, 1));
    }
    drop(running);
    // The last changes may have been missed when the thread ended: the next start publishes them again.
    let running = journal(dir.path(), &store);
    drop(running);
    assert!(fs::metadata(&paths(dir.path())[1]).expect("rotated").len() <= FILE_BYTES_MAX);
    assert!(fs::metadata(&paths(dir.path())[0]).expect("the new one").len() <= FILE_BYTES_MAX);
}
