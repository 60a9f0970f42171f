use tapio_wire::service::EntityRef;

use super::*;

const HOUR_NS: u64 = 3600 * 1_000_000_000;

fn wanted(pattern: &str, namespace: &str, workload: &str) -> AddSilenceRequest {
    AddSilenceRequest {
        pattern: pattern.into(),
        namespace: namespace.into(),
        workload: workload.into(),
        until_ns: now_ns() + HOUR_NS,
        reason: "a rehearsal".into(),
    }
}

fn finding(id: &str, pattern: &str, namespace: &str, workload: &str) -> Finding {
    let entity =
        EntityRef { namespace: namespace.into(), workload: workload.into(), node: "n1".into(), ..EntityRef::default() };
    Finding {
        id: id.into(),
        pattern: pattern.into(),
        published_ns: now_ns(),
        entity: Some(entity),
        ..Finding::default()
    }
}

#[tokio::test]
async fn a_silence_holds_for_what_matches_all_of_it() {
    let silences = Arc::new(Silences::in_memory());
    let web = finding("1", "memory-limit-kill", "shop", "Deployment/web");
    assert!(silences.of(&web).is_none());
    let held = silences.add(wanted("*-kill", "shop", ""), "jane").await.expect("a good one");
    assert_eq!(silences.of(&web).expect("it matches").id, held.id);
    for other in [
        finding("2", "memory-limit-kill", "bank", "Deployment/web"),
        finding("3", "crashed", "shop", "Deployment/web"),
        Finding { entity: None, ..web.clone() },
        Finding { withdrawn: true, ..web.clone() },
    ] {
        assert!(silences.of(&other).is_none(), "{other:?}");
    }
    let web = Finding { published_ns: now_ns(), ..web };
    let before = silences.state();
    let ended = silences.end(&held.id[..6], "joe").await.expect("it is there");
    assert!(silences.of(&web).is_none() && ended.ended_by == "joe" && before != silences.state());
    assert!(silences.covered(&web), "it was found while it was silenced");
    assert!(!silences.covered(&Finding { published_ns: now_ns() + 1, ..web.clone() }));
    assert_eq!((silences.list(false).len(), silences.list(true).len()), (0, 1));
}

#[tokio::test]
async fn an_acknowledgement_marks_one_finding_and_silences_none() {
    let silences = Arc::new(Silences::in_memory());
    let request = AcknowledgeRequest { finding: "1".into(), ..AcknowledgeRequest::default() };
    silences.acknowledge(request, "jane").await.expect("a good one");
    let (mut one, mut two) = (finding("1", "crashed", "a", ""), finding("2", "crashed", "a", ""));
    silences.mark(&mut one);
    silences.mark(&mut two);
    assert_eq!(one.acknowledged.map(|by| by.by).as_deref(), Some("jane"));
    assert!(one.silence.is_none() && two.acknowledged.is_none());
}

#[tokio::test]
async fn an_impossible_silence_is_refused_with_what_is_possible() {
    let silences = Arc::new(Silences::in_memory());
    let good = wanted("crashed", "", "");
    for (request, said) in [
        (wanted("", "", ""), "name a pattern"),
        (AddSilenceRequest { until_ns: 5, ..good.clone() }, "passed already"),
        (AddSilenceRequest { until_ns: 0, ..good.clone() }, "until when"),
        (AddSilenceRequest { until_ns: now_ns() + 100 * 24 * HOUR_NS, ..good.clone() }, "90 days"),
        (AddSilenceRequest { reason: " ".into(), ..good.clone() }, "reason"),
        (AddSilenceRequest { reason: "x".repeat(501), ..good.clone() }, "500 characters"),
        (AddSilenceRequest { namespace: "a\nb".into(), ..good.clone() }, "control characters"),
        (AddSilenceRequest { workload: "w".repeat(254), ..good.clone() }, "253 characters"),
    ] {
        let refused = silences.add(request, "").await.expect_err(said).to_string();
        assert!(refused.contains(said), "{said}: {refused}");
    }
    for _ in 0..ACTIVE_MAX {
        silences.add(good.clone(), "").await.expect("there is room");
    }
    assert!(matches!(silences.add(good, "").await, Err(SilenceError::Full)));
}

#[tokio::test]
async fn silences_survive_a_restart_and_an_unreadable_file_is_saved() {
    let folder = tempfile::tempdir().expect("a folder");
    let silences = Arc::new(Silences::open(folder.path()));
    let one = silences.add(wanted("crashed", "", ""), "jane").await.expect("kept");
    let two = silences.add(wanted("stopped", "", ""), "jane").await.expect("kept");
    silences.end(&two.id, "joe").await.expect("it is there");
    let again = Silences::open(folder.path());
    assert_eq!(again.list(false), [one]);
    assert_eq!(again.list(true).len(), 2);
    let path = folder.path().join("silences.json");
    std::fs::write(&path, "{").expect("written");
    assert!(Silences::open(folder.path()).list(true).is_empty());
    assert!(folder.path().join("silences.json.unreadable").is_file() && !path.exists());
}

#[tokio::test]
async fn what_cannot_be_kept_does_not_hold() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    std::fs::write(&file, "").expect("written");
    let silences = Arc::new(Silences::open(&file));
    let refused = silences.add(wanted("crashed", "", ""), "").await.expect_err("it is no folder");
    assert!(matches!(refused, SilenceError::NotKept(_)), "{refused}");
    assert!(silences.list(true).is_empty());
}

#[test]
fn servers_that_know_different_things_agree_on_the_end() {
    let first = Silence { id: "a".into(), pattern: "x".into(), since_ns: 1, until_ns: 9, ..Silence::default() };
    let ended = |ended_ns: u64| Silence { ended_ns, ended_by: ended_ns.to_string(), ..first.clone() };
    let orders =
        [[ended(5), first.clone(), ended(4)], [ended(4), ended(5), first.clone()], [first.clone(), ended(5), ended(4)]];
    for order in orders {
        let mut known = Known::default();
        known.take_all(order);
        assert_eq!(known.by_id["a"], ended(4));
    }
    let mut known = Known::default();
    assert!(known.take(ended(4)) && !known.take(first.clone()) && !known.take(ended(4)));
    // A server that was away has it as active until 9, and would bring it back.
    assert!(!known.forget_old(9 + KEPT_NS) && known.forget_old(10 + KEPT_NS) && known.by_id.is_empty());
    for number in 0..KNOWN_MAX + 9 {
        known.take(Silence { id: number.to_string(), until_ns: number as u64, ..first.clone() });
    }
    assert_eq!(known.by_id.len(), KNOWN_MAX);
    assert!(!known.by_id.contains_key("0"), "the first that is over goes first");
}
