//! The election among collectors, and what the elected one reports of the cluster.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::kube_api::server::{Answer, Api, Asked, LeaseStore, ago, change, list};
use crate::kube_api::{LIMIT, Rig, ended_pod, pod};
use axum::http::Method;
use serde_json::{Value, json};
use tapio_collector::source::kube::PERMISSIONS;
use tapio_collector::source::kube::client::Access;
use tapio_collector::source::kube::lease::{Election, Pace};
use tokio::sync::watch;

/// An API server with a Lease that is free, and the rest as the test wants.
pub fn elected(mut script: impl FnMut(&Asked) -> Answer + Send + 'static) -> Api {
    let store = LeaseStore::default();
    Api::start(move |asked| if asked.path.contains("/leases") { store.answer(asked) } else { script(asked) })
}

#[test]
fn one_leads_at_a_time_until_it_falls_silent() {
    let store = Arc::new(LeaseStore::default());
    let is_cut_off = Arc::new(AtomicBool::new(false));
    let (kept, cut_off) = (Arc::clone(&store), Arc::clone(&is_cut_off));
    let api = Api::start(move |asked| {
        let by_first = asked.body["spec"]["holderIdentity"] == "first";
        match by_first && cut_off.load(Ordering::Relaxed) {
            true => Answer::Refused(500, None),
            false => kept.answer(asked),
        }
    });
    let milliseconds = Duration::from_millis;
    let pace = Pace {
        duration: milliseconds(1000),
        renew: milliseconds(100),
        give_up: milliseconds(600),
        start: milliseconds(1),
    };
    let candidate = |name: &str| {
        let access = api.runtime().block_on(Access::open(&api.section())).expect("a kubeconfig");
        let (term, elected) = watch::channel(None);
        let election = Election::new(access, "tapio-system".into(), name.into(), pace, Arc::new(AtomicU64::new(2)));
        (api.runtime().spawn(election.run(term)), elected)
    };
    let wait = |elected: &mut watch::Receiver<Option<_>>, leads: bool| {
        let wanted =
            elected.wait_for(|term: &Option<tapio_collector::source::kube::lease::Term>| term.is_some() == leads);
        let waited = api
            .runtime()
            .block_on(async { tokio::time::timeout(LIMIT, wanted).await.map(|term| term.map(|term| *term)) });
        waited.expect("in time").expect("it runs")
    };
    let (_first, mut first_leads) = candidate("first");
    wait(&mut first_leads, true);
    let (_second, mut second_leads) = candidate("second");
    let began = Instant::now();
    while began.elapsed() < pace.duration * 2 {
        assert!(second_leads.borrow_and_update().is_none(), "the first renews");
        std::thread::sleep(milliseconds(10));
    }
    is_cut_off.store(true, Ordering::Relaxed);
    wait(&mut first_leads, false);
    assert!(second_leads.borrow_and_update().is_none(), "it gave up before its Lease ran out");
    let term = wait(&mut second_leads, true).expect("a term");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    assert!(now - term.since_ns < 30_000_000_000, "what was since the first was there is reported by the second");
    let lease = store.lease.lock().expect("no panic").clone().expect("a Lease");
    assert_eq!((&lease["spec"]["holderIdentity"], &lease["spec"]["leaseTransitions"]), (&json!("second"), &json!(1)));
}

/// How many collectors look at one Lease.
const COLLECTORS: u64 = 5000;

#[test]
fn five_thousand_collectors_read_the_lease_rarely() {
    let store = Arc::new(LeaseStore::default());
    let kept = Arc::clone(&store);
    let api = Api::start(move |asked| kept.answer(asked));
    let seconds = Duration::from_secs;
    // A third of the real pace, so that a failover takes less of the test's time; the reads a second do not depend on it.
    let pace = Pace { duration: seconds(5), renew: seconds(2), give_up: seconds(3), start: seconds(1) };
    let open = || api.runtime().block_on(Access::open(&api.section())).expect("a kubeconfig");
    let (leads, leading) = watch::channel(None::<u64>);
    let leads = Arc::new(leads);
    let candidate = |number: u64, access: Arc<Access>, pace: Pace| {
        let (term, mut elected) = watch::channel(None);
        let count = Arc::new(AtomicU64::new(COLLECTORS));
        let election = Election::new(access, "tapio-system".into(), format!("collector-{number}"), pace, count);
        let leads = Arc::clone(&leads);
        api.runtime().spawn(async move {
            let report = async {
                while elected.wait_for(Option::is_some).await.is_ok() {
                    leads.send_replace(Some(number));
                    if elected.wait_for(Option::is_none).await.is_err() {
                        break;
                    }
                }
            };
            futures::join!(election.run(term), report);
        })
    };
    let wait = |next: &mut watch::Receiver<Option<u64>>, limit: Duration| {
        let waited = api.runtime().block_on(async { tokio::time::timeout(limit, next.changed()).await });
        waited.expect("one leads in time").expect("they run");
    };
    let mut next = leading.clone();
    let first = candidate(0, open(), pace);
    wait(&mut next, LIMIT);
    // The others roll out within ten seconds.
    let access = open();
    let rollout = Pace { start: seconds(10), ..pace };
    let _others: Vec<_> = (1..COLLECTORS).map(|number| candidate(number, Arc::clone(&access), rollout)).collect();
    let started = Instant::now();
    let asked = || api.asked("/leases/tapio-collector").len() as u64;
    while asked() < COLLECTORS || started.elapsed() < rollout.start + seconds(2) {
        assert!(started.elapsed() < LIMIT * 3, "not all have looked once: {}", asked());
        std::thread::sleep(Duration::from_millis(50));
    }
    let (from, before) = (Instant::now(), asked());
    while from.elapsed() < seconds(15) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let per_s = (asked() - before) as f64 / from.elapsed().as_secs_f64();
    println!("{per_s:.1} requests a second by {COLLECTORS} collectors");
    assert!(per_s > 2.0 && per_s < 20.0, "{per_s} requests a second");
    // The leader dies: it cannot give the lease back.
    let (silent, before) = (Instant::now(), asked());
    first.abort();
    let bound = pace.duration * 2 + seconds(5);
    wait(&mut next, bound);
    let per_s = (asked() - before) as f64 / silent.elapsed().as_secs_f64();
    println!("the next led after {:?} of at most {bound:?}, {per_s:.1} requests a second meanwhile", silent.elapsed());
    assert!(per_s < 20.0, "{per_s} requests a second");
}

fn deployment(version: u64, image: &str, ready: u32) -> Value {
    json!({
        "metadata": {"name": "cart", "namespace": "shop", "uid": "d1", "resourceVersion": version.to_string(), "generation": version},
        "spec": {"replicas": 2, "template": {"spec": {
            "containers": [{"name": "web", "image": image, "envFrom": [{"secretRef": {"name": "keys"}}]}],
            "volumes": [{"configMap": {"name": "settings"}}],
        }}},
        "status": {"observedGeneration": version, "readyReplicas": ready, "updatedReplicas": 2},
    })
}

fn metadata(name: &str, version: u64, created: &str) -> Value {
    json!({"metadata": {
        "name": name, "namespace": "shop", "uid": name, "resourceVersion": version.to_string(), "creationTimestamp": created,
    }})
}

fn kube_event(count: u32, last: &str, version: u64) -> Value {
    json!({
        "metadata": {"name": "e", "namespace": "shop", "uid": "e1", "resourceVersion": version.to_string()},
        "involvedObject": {"kind": "Pod", "namespace": "shop", "name": "cart-1", "uid": "p1"},
        "reason": "BackOff", "message": "m", "type": "Warning", "count": count, "lastTimestamp": last,
        "source": {"component": "kubelet"},
    })
}

fn node(version: u64, ready: &str) -> Value {
    json!({
        "metadata": {"name": "node2", "uid": "n2", "resourceVersion": version.to_string()},
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    })
}

fn service() -> Value {
    json!({
        "metadata": {"name": "cart", "namespace": "shop", "uid": "s1", "resourceVersion": "5"},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80}]},
    })
}

fn endpoints(version: u64, subsets: Value) -> Value {
    json!({
        "metadata": {"name": "cart", "namespace": "shop", "uid": "s1", "resourceVersion": version.to_string()},
        "subsets": subsets,
    })
}

/// What the lists of the elected collector find.
fn cluster() -> HashMap<&'static str, Vec<Value>> {
    let backend = json!([{"addresses": [{"ip": "10.0.0.7", "targetRef": {"kind": "Pod", "uid": "p1"}}], "ports": [{"port": 8080}]}]);
    let claim = json!({
        "metadata": {"name": "data", "namespace": "shop", "uid": "c1", "resourceVersion": "5"}, "status": {"phase": "Pending"},
    });
    HashMap::from([
        ("pods", vec![]),
        ("deployments", vec![deployment(5, "cart:1", 2)]),
        ("configmaps", vec![metadata("settings", 5, &ago(3600))]),
        ("secrets", vec![metadata("keys", 5, &ago(3600))]),
        ("events", vec![kube_event(3, &ago(3000), 5)]),
        ("nodes", vec![node(5, "True")]),
        ("services", vec![service()]),
        ("endpoints", vec![endpoints(5, backend)]),
        ("persistentvolumeclaims", vec![claim]),
    ])
}

/// The object that its first watch sends as modified.
fn modified(resource: &str) -> Option<Value> {
    Some(match resource {
        "deployments" => deployment(11, "cart:2", 0),
        "configmaps" => metadata("settings", 12, &ago(3600)),
        "events" => kube_event(4, &ago(0), 13),
        "nodes" => node(14, "Unknown"),
        "endpoints" => endpoints(15, Value::Null),
        _ => return None,
    })
}

/// Nothing is asked for that the manifests need not grant.
fn assert_granted(api: &Api) {
    for asked in api.asked("") {
        let parts: Vec<&str> = asked.path.trim_matches('/').split('/').collect();
        let resource = parts.iter().find(|part| PERMISSIONS.iter().any(|(_, resource, _)| resource == *part));
        let verb = match (&asked.method, asked.is_watch()) {
            (&Method::POST, _) => "create",
            (&Method::PUT, _) => "update",
            (_, true) => "watch",
            (_, false) if asked.path.contains("/leases") => "get",
            _ => "list",
        };
        let granted = PERMISSIONS.iter().any(|(group, resource_name, verbs)| {
            resource.is_some_and(|resource| resource == resource_name)
                && verbs.contains(&verb)
                && (group.is_empty() == asked.path.starts_with("/api/"))
        });
        assert!(granted, "{verb} {}", asked.path);
    }
}

#[test]
fn the_elected_collector_reports_what_concerns_the_cluster() {
    let api = elected(|asked| {
        let resource = asked.path.rsplit('/').next().unwrap_or_default();
        match (asked.is_watch(), asked.version(), resource) {
            (false, _, "endpointslices" | "horizontalpodautoscalers") => Answer::Refused(404, None),
            (false, ..) => list(10, cluster().remove(resource).unwrap_or_default()),
            (true, "10", _) => match modified(resource) {
                Some(object) => Answer::Lines(vec![change("MODIFIED", object)]),
                None => Answer::Silent,
            },
            _ => Answer::Silent,
        }
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["rollout Deployment shop/cart", "images=cart:2 before=cart:1", "ready=0/2"]);
    rig.until_event(&["config ConfigMap settings change=2"]);
    rig.until_event(&["event shop/cart-1: BackOff x4"]);
    rig.until_event(&["condition Ready 2"]);
    rig.until_event(&["endpoints cart backends=0"]);
    rig.until_event(&["object PersistentVolumeClaim data Pending"]);
    assert!(rig.state.is_leader.load(Ordering::Relaxed));
    rig.finish();
    assert_eq!(rig.count(&["endpoints cart backends=1 ready=1 addresses=1"]), 1, "{:#?}", rig.event_texts);
    assert_eq!(rig.count(&["event", "x3"]), 0, "what was said before was reported by the leader before");
    assert_eq!(rig.count(&["config Secret"]), 0);
    assert!(rig.count(&["config ConfigMap settings change=2 users=1"]) == 1, "{:#?}", rig.event_texts);
    for asked in [api.asked("/secrets"), api.asked("/configmaps")].concat() {
        assert!(asked.accept.contains("as=PartialObjectMetadata"), "contents were asked for: {asked:?}");
    }
    let lease =
        api.asked("/leases/tapio-collector").into_iter().rfind(|asked| asked.method == Method::PUT).expect("a write");
    assert!(lease.body["spec"].get("holderIdentity").is_none_or(Value::is_null), "the Lease is given back: {lease:?}");
    assert_granted(&api);
}

#[test]
fn a_new_stream_gets_the_present_states_again() {
    let ended = ago(1);
    // What a server of Tapio said of the pod.
    let mut own = kube_event(7, &ago(0), 6);
    own["metadata"]["uid"] = "e2".into();
    own["source"]["component"] = "tapio".into();
    // Made once: a run that began at another time is another run.
    let lists: HashMap<&str, Vec<Value>> = HashMap::from([
        ("pods", vec![ended_pod(1, 5, "OOMKilled", 137, &ended), pod(2, 5)]),
        ("deployments", vec![deployment(5, "cart:1", 2)]),
        ("events", vec![own, kube_event(3, &ago(0), 5)]),
        ("nodes", vec![node(5, "True")]),
        ("services", vec![service()]),
        (
            "endpointslices",
            vec![json!({
                "metadata": {
                    "name": "cart-x", "namespace": "shop", "uid": "e1", "resourceVersion": "5",
                    "labels": {"kubernetes.io/service-name": "cart"},
                },
                "ports": [{"port": 8080}],
                "endpoints": [{"addresses": ["10.0.0.7"], "targetRef": {"kind": "Pod", "uid": "p1"}}],
            })],
        ),
    ]);
    let api = elected(move |asked| {
        let resource = asked.path.rsplit('/').next().unwrap_or_default();
        match asked.is_watch() {
            true => Answer::Silent,
            false => list(10, lists.get(resource).cloned().unwrap_or_default()),
        }
    });
    let mut rig = Rig::start(&api, "node1");
    let states = [
        &["endpoints cart backends=1 ready=1 addresses=1"][..],
        &["rollout Deployment shop/cart", "images=cart:1 before= "],
        &["condition Ready 1"],
        &["pod shop/cart-2: Running"],
        &["state=2"],
    ];
    let moments = [&["reason=OOMKilled", "exit=137"][..], &["event shop/cart-1: BackOff x3"]];
    rig.stream();
    for parts in states.iter().chain(&moments) {
        rig.until_event(parts);
    }
    assert!(states.iter().all(|parts| rig.count(parts) == 1), "{:#?}", rig.event_texts);
    assert_eq!(rig.count(&["BackOff x7"]), 0, "{:#?}", rig.event_texts);
    rig.stream();
    for parts in states {
        rig.until(&format!("{parts:?} again"), |rig| rig.count(parts) == 2);
    }
    rig.finish();
    for parts in states.iter() {
        assert_eq!(rig.count(parts), 2, "{parts:?}: {:#?}", rig.event_texts);
    }
    for parts in moments {
        assert_eq!(rig.count(parts), 1, "what is a moment is reported once: {parts:?}: {:#?}", rig.event_texts);
    }
    assert_eq!(rig.count(&["gap"]), 0, "nothing was missed");
}
