use tapio_wire::service::{Death, EntityRef, Evidence};

use super::*;

fn finding(id: &str, node: &str, ended_ns: u64, ongoing: bool) -> Finding {
    let entity = Some(EntityRef { node: node.into(), ..EntityRef::default() });
    Finding { id: id.into(), entity, ended_ns, ongoing, ..Finding::default() }
}

#[test]
fn a_node_evicts_its_own_findings_ongoing_ones_last() {
    let store = FindingStore::new(20);
    for number in 0..5 {
        store.publish(finding(&format!("calm{number}"), "calm", number, false));
    }
    store.publish(finding("state", "loud", 1, true));
    for number in 0..100 {
        store.publish(finding(&format!("loud{number}"), "loud", 100 + number, false));
    }
    // One that is published again counts once.
    store.publish(finding("calm0", "calm", 7, false));
    let inner = store.read();
    assert_eq!((inner.findings.len(), inner.order.len()), (20, 20));
    let count = |start: &str| inner.findings.keys().filter(|id| id.starts_with(start)).count();
    assert_eq!((count("calm"), count("state"), count("loud")), (5, 1, 14));
    assert_eq!((inner.by_node.count("calm"), inner.by_node.count("loud")), (5, 15));
    assert!(inner.findings.contains_key("loud99"));
}

#[test]
fn others_last_word_replaces_an_earlier_runs_findings() {
    let store = FindingStore::new(20);
    let said = |id: &str, published_ns: u64, withdrawn: bool| Finding {
        published_ns,
        withdrawn,
        title: format!("said at {published_ns}"),
        ..finding(id, "n", 1, false)
    };
    for id in ["older", "newer", "gone"] {
        store.restore(said(id, 50, false));
    }
    store.publish(finding("own", "n", 2, false));
    for (id, published_ns) in [("older", 40), ("newer", 60), ("own", u64::MAX), ("unknown", 1)] {
        store.take_in(said(id, published_ns, false));
    }
    for id in ["gone", "never-known"] {
        store.take_in(said(id, 60, true));
    }
    // What was withdrawn here does not come back.
    store.take_in(said("gone", 70, false));
    let title = |id: &str| store.get(id).map(|found| found.title.clone()).unwrap_or_default();
    let titles = ["older", "newer", "own", "unknown"].map(title);
    assert_eq!(titles, ["said at 50", "said at 60", "", "said at 1"]);
    assert_eq!(store.len(), 4);
}

#[test]
fn what_the_log_knew_stays_when_found_again_alone() {
    let store = FindingStore::new(20);
    store.publish(finding("known", "n", 1, false));
    store.set_alone(true);
    store.withdraw("known", None);
    store.publish(finding("known", "n", 2, false));
    store.publish(finding("new", "n", 3, false));
    // The log is read again, and has nothing of either any more.
    store.set_alone(false);
    store.restart(u64::MAX, 0, true);
    store.withdraw_unconfirmed();
    let inner = store.read();
    assert!(inner.findings.contains_key("known") && !inner.findings.contains_key("new"));
    assert!(inner.restored.contains("known"), "what says less does not replace it");
}

/// What an earlier run made of a log that this one reads again, from a second after 1970 on.
#[test]
fn what_a_whole_replay_does_not_find_again_is_withdrawn() {
    const SECOND: u64 = 1_000_000_000;
    let death_of = |id: &str, pid: u32, started_ns: u64, count: u32| {
        let death = Death { pid, ..Death::default() };
        Finding { started_ns, count, death: Some(death), ..finding(id, "n", started_ns, false) }
    };
    let store = FindingStore::new(20);
    // A group of two that was none, and a death whose story began before the log.
    store.restore(death_of("group", 2, 3 * SECOND, 2));
    store.restore(death_of("old", 9, SECOND / 2, 1));
    store.restore(death_of("unread", 8, SECOND, 1));
    store.restart(SECOND / 4, 0, true);
    // Up to there the log has messages that nobody can read.
    store.replayed_only_from(SECOND + 1);
    store.set_replaying(true);
    for found in [death_of("first", 1, 2 * SECOND, 1), death_of("second", 2, 3 * SECOND, 1)] {
        assert!(store.publish(found).is_some(), "the log has all of it");
    }
    assert!(store.publish(death_of("old-otherwise", 9, SECOND / 2, 1)).is_none(), "its beginning is not in the log");
    store.set_replaying(false);
    store.withdraw_unconfirmed();
    let mut left: Vec<String> = store.everything().0.iter().map(|finding| finding.id.clone()).collect();
    left.sort();
    assert_eq!(left, ["first", "old", "second", "unread"]);
    for id in ["group", "gro"] {
        assert_eq!(store.get(id).map(|found| found.id.clone()).ok().as_deref(), Some("second"), "{id}");
    }
}

fn of_death(id: &str, pid: u32, count: u32) -> Finding {
    let death = Some(Death { pid, ..Death::default() });
    let pattern = format!("of {pid}");
    Finding { death, count, pattern, title: format!("{id} {count}"), ..finding(id, "n", 7, false) }
}

/// The group that a death belongs to gets another id in a replay than it had.
#[test]
fn a_replay_that_groups_otherwise_loses_no_finding() {
    let store = FindingStore::new(20);
    for (id, pid) in [("was", 1), ("other", 2)] {
        store.restore(of_death(id, pid, 2));
    }
    store.set_replaying(true);
    assert!(store.publish(of_death("is", 1, 1)).is_none(), "an earlier run has explained it");
    assert_eq!(store.len(), 2);
    assert!(store.withdraw("was", Some("is")).is_some());
    assert_eq!(store.get("was").map(|found| found.title.clone()).as_deref(), Ok("is 1"));
    // And back.
    assert!(store.publish(of_death("was", 1, 2)).is_some());
    store.withdraw("is", Some("was"));
    assert_eq!(store.get("is").map(|found| found.title.clone()).as_deref(), Ok("was 2"));
    // Nobody takes over.
    assert!(store.withdraw("other", Some("never-published")).is_none());
    assert_eq!((store.len(), store.get("other").map(|found| found.id.clone()).as_deref()), (2, Ok("other")));
    store.set_replaying(false);
    store.withdraw("other", Some("never-published"));
    assert!(store.get("other").is_err());
}

#[test]
fn a_replay_may_find_one_again_before_another_takes_over() {
    for is_found_again in [true, false] {
        let store = FindingStore::new(20);
        store.restore(of_death("was", 1, 1));
        store.set_replaying(true);
        if is_found_again {
            store.publish(of_death("was", 1, 1));
        }
        // Two, one after the other.
        for (id, before) in [("between", None), ("is", Some("between"))] {
            store.publish(of_death(id, 1, 2));
            before.map(|before| store.withdraw(before, Some(id)));
        }
        assert!(store.withdraw("was", Some("is")).is_some());
        store.set_replaying(false);
        assert_eq!(
            store.list(0, None, 9).0.iter().map(|found| &*found.id).collect::<Vec<_>>(),
            ["is"],
            "{is_found_again}"
        );
        assert_eq!(store.get("was").map(|found| found.id.clone()).as_deref(), Ok("is"));
    }
}

/// Evidence that the log has again, and that leads to other findings there.
#[test]
fn an_earlier_finding_by_evidence_that_says_otherwise_is_withdrawn() {
    let by = |id: &str, pid: u32, count: u32, seq: u64| {
        let piece = |seq| Evidence { id: format!("1:7:{seq}:0"), ..Evidence::default() };
        let evidence = vec![piece(seq), piece(seq + 1)];
        Finding { evidence, started_ns: 9, possible: id != "certain", ..of_death(id, pid, count) }
    };
    let store = FindingStore::new(20);
    let earlier = [
        ("wrong", 1, 1, 1),
        ("otherwise", 2, 1, 3),
        ("unread", 3, 1, 8),
        ("group", 4, 5, 1),
        ("less", 5, 2, 1),
        ("certain", 6, 1, 1),
    ];
    for (id, pid, count, seq) in earlier {
        store.restore(by(id, pid, count, seq));
    }
    store.restart(u64::MAX, 0, false);
    store.set_replaying(true);
    store.publish(by("is", 2, 1, 3));
    store.publish(by("part", 4, 2, 1));
    store.publish(by("less", 5, 1, 1));
    let left = || {
        let mut left: Vec<String> = store.everything().0.iter().map(|finding| finding.id.clone()).collect();
        left.sort();
        left
    };
    store.withdraw_disproved(&|evidence| (evidence.node, evidence.epoch) == (1, 7) && evidence.seq <= 8);
    assert_eq!(left(), ["certain", "group", "is", "less", "unread"]);
    assert_eq!(store.get("otherwise").map(|found| found.id.clone()).as_deref(), Ok("is"));
    // Another server sends the rest.
    store.withdraw_disproved(&|_| true);
    assert_eq!(left(), ["certain", "group", "is", "less"]);
}

#[test]
fn what_a_part_took_over_is_found_by_its_whole() {
    let store = FindingStore::new(20);
    let crashes = |id: &str, started_ns: u64, ended_ns: u64| Finding {
        pattern: "crash-loop".into(),
        count: 5,
        started_ns,
        ..finding(id, "n", ended_ns, false)
    };
    store.restore(crashes("whole", 1, 100));
    store.set_replaying(true);
    assert!(store.publish(finding("consequence", "n", 40, false)).is_some());
    assert!(store.publish(crashes("part", 10, 50)).is_none(), "the replay comes to the last of them");
    store.withdraw("consequence", Some("part"));
    store.withdraw("part", Some("whole"));
    assert_eq!(store.get("consequence").map(|found| found.id.clone()).as_deref(), Ok("whole"));
    store.set_replaying(false);
    store.publish_parts();
    assert_eq!(store.len(), 1);
}
