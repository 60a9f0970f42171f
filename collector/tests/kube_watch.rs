//! The Kubernetes source against an API server that fails in every way that real ones do.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::kube_api::server::{Answer, ago, change, list};
use crate::kube_api::{LIMIT, Rig, bookmark, container_id, ended_pod, error, only_pods, pod};
use serde_json::json;
use tapio_collector::settings::config::K8sSection;

#[test]
fn a_watch_that_ends_is_resumed_from_the_last_bookmark() {
    let api = only_pods(|asked| match (asked.is_watch(), asked.version()) {
        (false, _) => list(10, vec![pod(1, 5)]),
        (true, "10") => Answer::Lines(vec![change("ADDED", pod(2, 11)), bookmark(50)]),
        (true, "50") => Answer::Lines(vec![change("DELETED", pod(1, 51))]),
        _ => Answer::Silent,
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["pod shop/cart-1", "gone=true"]);
    assert_eq!(rig.count(&["pod shop/cart-2: Running", "gone=false"]), 1);
    assert_eq!(rig.count(&["container shop/cart-1/web: web state=2", "memory=67108864"]), 1);
    rig.until("a watch from there", |_| {
        api.asked("/pods").iter().any(|asked| asked.is_watch() && asked.version() == "51")
    });
    rig.finish();
    let asked = api.asked("/pods");
    assert_eq!(asked.iter().filter(|asked| !asked.is_watch()).count(), 1, "one list");
    assert!(
        asked
            .iter()
            .all(|asked| asked.query.get("fieldSelector").is_some_and(|fields| fields == "spec.nodeName=node1"))
    );
    assert_eq!(rig.count(&["gap"]), 0);
}

/// After 410, in whichever form, the list is read again: what is missing in it is gone, and nothing is reported twice.
fn expires(expired: impl Fn() -> Answer + Send + 'static) {
    let lists = AtomicUsize::new(0);
    let api = only_pods(move |asked| match (asked.is_watch(), asked.version()) {
        (false, _) if lists.fetch_add(1, Ordering::Relaxed) == 0 => list(10, vec![pod(1, 5), pod(2, 6)]),
        (false, _) => list(90, vec![pod(1, 5), pod(3, 80)]),
        (true, "10") => expired(),
        _ => Answer::Silent,
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["gap pods expired"]);
    rig.finish();
    assert_eq!(rig.count(&["gap pods expired gone=1 sound=true"]), 1);
    assert_eq!(rig.count(&["pod shop/cart-2", "gone=true"]), 1);
    assert_eq!(rig.count(&["pod shop/cart-3", "gone=false"]), 1);
    assert_eq!(rig.count(&["pod shop/cart-1"]), 1, "{:#?}", rig.event_texts);
    assert_eq!(rig.count(&["container shop/cart-1"]), 1, "{:#?}", rig.event_texts);
    let relist = api.asked("/pods").into_iter().filter(|asked| !asked.is_watch()).nth(1).expect("a second list");
    assert_eq!(relist.version(), "", "what is listed after a 410 must not come out of a cache");
}

#[test]
fn a_410_within_a_watch_brings_relist_and_gap() {
    expires(|| Answer::Lines(vec![error(410, "Expired")]));
}

#[test]
fn a_410_as_status_brings_a_relist_and_a_gap() {
    expires(|| Answer::Refused(410, None));
}

#[test]
fn a_429_is_waited_for_as_long_as_it_says() {
    let refused = AtomicBool::new(false);
    let api = only_pods(move |asked| match asked.is_watch() {
        false if !refused.swap(true, Ordering::Relaxed) => Answer::Refused(429, Some(2)),
        false => list(10, vec![pod(1, 5)]),
        true => Answer::Silent,
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["pod shop/cart-1"]);
    rig.finish();
    let asked = api.asked("/pods");
    assert!(asked[1].at.duration_since(asked[0].at) >= Duration::from_secs(2));
}

#[test]
fn server_errors_are_retried_ever_less_often() {
    let began = Instant::now();
    let api = only_pods(move |asked| match asked.is_watch() {
        false if began.elapsed() < Duration::from_secs(3) => Answer::Refused(500, None),
        false => list(10, vec![pod(1, 5)]),
        true => Answer::Silent,
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["pod shop/cart-1"]);
    rig.finish();
    let lists = api.asked("/pods").into_iter().filter(|asked| !asked.is_watch()).count();
    assert!((3..=12).contains(&lists), "{lists} lists");
}

#[test]
fn a_watch_that_ends_at_once_is_no_busy_loop() {
    let api = only_pods(|asked| match asked.is_watch() {
        false => list(10, vec![pod(1, 5)]),
        true => Answer::Lines(Vec::new()),
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["pod shop/cart-1"]);
    let began = Instant::now();
    rig.until("three seconds", |_| began.elapsed() >= Duration::from_secs(3));
    rig.finish();
    let asked = api.asked("/pods");
    let watches = asked.iter().filter(|asked| asked.is_watch()).count();
    assert!((2..=12).contains(&watches), "{watches} watches in 3 s");
    assert_eq!(asked.len() - watches, 1, "and the list is not read again for it");
}

#[test]
fn a_rotated_token_is_read_at_once_after_a_401() {
    let api = only_pods(|asked| match (asked.is_watch(), &*asked.authorization) {
        (_, "Bearer first") if asked.version() == "10" => Answer::Refused(401, None),
        (false, _) => list(10, vec![pod(1, 5)]),
        (true, "Bearer second") if asked.version() == "10" => Answer::Lines(vec![change("ADDED", pod(2, 11))]),
        _ => Answer::Silent,
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["pod shop/cart-1"]);
    rig.until("a 401", |_| api.asked("/pods").iter().any(|asked| asked.is_watch()));
    let began = Instant::now();
    api.rotate_token("second");
    rig.until_event(&["pod shop/cart-2"]);
    // By itself the client would read the file only after 50 seconds.
    assert!(began.elapsed() < LIMIT);
    rig.finish();
    assert_eq!(rig.count(&["pod shop/cart-1"]), 1, "nothing is reported twice for it");
}

#[test]
fn a_long_list_is_read_page_by_page() {
    let api = only_pods(|asked| match (asked.is_watch(), asked.query.get("continue")) {
        (true, _) if asked.version() == "10" => Answer::Lines(vec![error(410, "Expired")]),
        (true, _) => Answer::Silent,
        (false, None) if asked.query.contains_key("limit") => Answer::Json(json!({
            "metadata": {"resourceVersion": "20", "continue": "more"}, "items": [pod(1, 5)],
        })),
        (false, None) => list(10, Vec::new()),
        (false, Some(_)) => list(20, vec![pod(2, 6)]),
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["gap"]);
    rig.finish();
    assert_eq!((rig.count(&["pod shop/cart-1"]), rig.count(&["pod shop/cart-2"])), (1, 1));
    let limits: Vec<_> = api.asked("/pods").iter().filter_map(|asked| asked.query.get("limit").cloned()).collect();
    assert_eq!(limits, ["500", "500"]);
}

#[test]
fn after_a_restart_old_deaths_are_not_reported_again() {
    let api = only_pods(|asked| match asked.is_watch() {
        false => list(10, vec![ended_pod(1, 5, "OOMKilled", 137, &ago(3600)), ended_pod(2, 6, "Error", 1, &ago(5))]),
        true => Answer::Silent,
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["container shop/cart-2/web", "state=3", "reason=Error", "exit=1"]);
    rig.finish();
    assert_eq!(rig.count(&["container shop/cart-1"]), 0, "{:#?}", rig.event_texts);
    assert_eq!(rig.count(&["pod shop/cart-1"]), 1, "its present state is reported");
}

#[test]
fn a_death_is_reported_once_as_present_or_last_state() {
    let finished = ago(1);
    let dead = ended_pod(1, 11, "OOMKilled", 137, &finished);
    let mut waiting = dead.clone();
    waiting["metadata"]["resourceVersion"] = json!("12");
    let status = &mut waiting["status"]["containerStatuses"][0];
    status["lastState"] = status["state"].clone();
    status["state"] = json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}});
    status["restartCount"] = json!(1);
    let mut again = waiting.clone();
    again["status"]["containerStatuses"][0]["state"]["waiting"]["message"] = json!("back-off 20s");
    let lines = vec![
        change("MODIFIED", dead),
        change("MODIFIED", waiting),
        change("MODIFIED", again),
        change("ADDED", pod(2, 14)),
    ];
    let api = only_pods(move |asked| match (asked.is_watch(), asked.version()) {
        (false, _) => list(10, vec![pod(1, 5)]),
        (true, "10") => Answer::Lines(lines.clone()),
        _ => Answer::Silent,
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["pod shop/cart-2"]);
    rig.finish();
    assert_eq!(rig.count(&["container shop/cart-1/web", "reason=OOMKilled", "exit=137"]), 1, "{:#?}", rig.event_texts);
    assert_eq!(rig.count(&["container shop/cart-1/web", "reason=CrashLoopBackOff"]), 1);
}

#[test]
fn deletion_and_eviction_are_reported_and_names_outlive_the_pod() {
    let mut evicted = pod(1, 11);
    evicted["status"]["phase"] = json!("Failed");
    evicted["status"]["reason"] = json!("Evicted");
    let mut deleted = evicted.clone();
    deleted["metadata"]["deletionTimestamp"] = json!(ago(0));
    deleted["metadata"]["deletionGracePeriodSeconds"] = json!(30);
    let lines = vec![change("MODIFIED", evicted), change("MODIFIED", deleted.clone()), change("DELETED", deleted)];
    let api = only_pods(move |asked| match (asked.is_watch(), asked.version()) {
        (false, _) => list(10, vec![pod(1, 5)]),
        (true, "10") => Answer::Lines(lines.clone()),
        _ => Answer::Silent,
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["pod shop/cart-1", "gone=true"]);
    rig.finish();
    assert_eq!(rig.count(&["Failed reason=Evicted", "deletion=0"]), 1);
    assert_eq!(rig.count(&["Failed reason=Evicted", "gone=false"]), 2, "the deletion is news");
    assert!(!rig.directory.is_empty(), "late events of its containers can still be named");
    assert!(rig.names.values().any(|name| name == "Deployment shop/cart"));
}

#[test]
fn excluded_namespaces_are_named_but_not_reported() {
    let api = only_pods(|asked| match asked.is_watch() {
        false => {
            let mut of_system = pod(1, 5);
            of_system["metadata"]["namespace"] = json!("kube-system");
            list(10, vec![of_system, pod(2, 6)])
        }
        true => Answer::Silent,
    });
    let section = K8sSection { exclude_system_namespaces: true, ..api.section() };
    let mut rig = Rig::with(&api, "node1", &section);
    rig.until_event(&["pod shop/cart-2"]);
    rig.finish();
    assert_eq!(rig.count(&["cart-1"]), 0);
    assert_eq!(rig.directory.len(), (2, 2));
    let id = container_id(1);
    let bare = id.trim_start_matches("containerd://");
    let entity = tapio_wire::entity_id(tapio_wire::event::EntityKind::Container, bare);
    assert_eq!(rig.names.get(&entity).map(String::as_str), Some("kube-system/cart-1/web"));
}
