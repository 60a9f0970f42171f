//! Findings as Events of Kubernetes, against an API server of the test that keeps what it is sent.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path as InPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::patch;
use prometheus::Registry;
use serde_json::{Value, json};
use tapio_server::cluster::Leadership;
use tapio_server::deliver::{DeliverMetrics, Deliverer, KubernetesEvents, KubernetesEventsSection, MarksAt, Source};
use tapio_server::findings::FindingStore;
use tapio_server::silences::Silences;
use tapio_wire::service::{Death, EntityRef, Finding};

use crate::cluster_support::until;
use crate::whole_server::write_kubeconfig;

/// What was applied, by namespace and name; and what it answers instead.
#[derive(Default)]
struct Api {
    events: Mutex<BTreeMap<(String, String), Value>>,
    failure: Mutex<Option<(StatusCode, &'static str)>>,
}

async fn applied(
    State(api): State<Arc<Api>>,
    InPath(place): InPath<(String, String)>,
    Query(how): Query<BTreeMap<String, String>>,
    body: String,
) -> Response {
    if let Some((code, message)) = *api.failure.lock().expect("no panic") {
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message,
                            "reason": "", "code": code.as_u16()});
        return (code, Json(status)).into_response();
    }
    assert_eq!(how["fieldManager"], "tapio");
    let event: Value = serde_json::from_str(&body).expect("JSON");
    api.events.lock().expect("no panic").insert(place, event.clone());
    Json(event).into_response()
}

impl Api {
    async fn start(dir: &Path) -> Arc<Self> {
        let api = Arc::new(Self::default());
        let router = Router::new()
            .route("/api/v1/namespaces/{namespace}/events/{name}", patch(applied))
            .with_state(Arc::clone(&api));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move { axum::serve(listener, router).await });
        write_kubeconfig(dir, address);
        api
    }

    fn fail(&self, with: Option<(StatusCode, &'static str)>) {
        *self.failure.lock().expect("no panic") = with;
    }

    fn event(&self, namespace: &str, name: &str) -> Option<Value> {
        self.events.lock().expect("no panic").get(&(namespace.to_owned(), name.to_owned())).cloned()
    }
}

fn finding(id: &str, severity: &str) -> Finding {
    let entity = EntityRef {
        namespace: "shop".into(),
        pod: "web-0".into(),
        pod_uid: "6f1c".into(),
        container: "web".into(),
        workload: "Deployment/web".into(),
        ..EntityRef::default()
    };
    Finding {
        id: id.into(),
        pattern: "memory-limit-kill".into(),
        severity: severity.into(),
        title: "shop/web-0/web exceeded its memory limit".into(),
        death: Some(Death {
            verdict: "Killed by the kernel: its own limit of 64 MiB was full.".into(),
            ..Death::default()
        }),
        entity: Some(entity),
        confidence: 0.95,
        count: 1,
        started_ns: 1_700_000_000_500_000_000,
        ended_ns: 1_700_000_001_500_000_000,
        ..Finding::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn findings_are_events_on_pod_and_workload_that_change() {
    let kube = tempfile::tempdir().expect("a folder");
    let api = Api::start(kube.path()).await;
    let store = Arc::new(FindingStore::new(50));
    let (leadership, silences) = (Arc::new(Leadership::sole("a")), Arc::new(Silences::in_memory()));
    let source = Source { store: Arc::clone(&store), leadership, link: None, silences };
    let section = KubernetesEventsSection {
        kubeconfig: Some(kube.path().join("kubeconfig")),
        ..KubernetesEventsSection::default()
    };
    let metrics = DeliverMetrics::register(&Registry::new()).expect("fresh names");
    let at = MarksAt::Folder(kube.path().to_owned());
    let sink = KubernetesEvents::new(&section, "server-0");
    // It may not write, at first: the finding waits, and the status says what is missing.
    api.fail(Some((StatusCode::FORBIDDEN, "events is forbidden: no verb patch")));
    let deliverer = Deliverer::start(&source, vec![Box::new(sink)], &at, &metrics).expect("it starts");
    store.publish(finding("aa01", "high")).expect("it is new");
    store.publish(finding("aa02", "info")).expect("it is new");
    tokio::task::block_in_place(|| {
        until("its trouble", || {
            let status = deliverer.status().remove(0);
            status.trouble.contains("deploy/components/kubernetes-events").then_some(())
        });
        api.fail(None);
        let pod = until("an event", || api.event("shop", "tapio-aa01-pod"));
        let object = json!({"apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "web-0", "uid": "6f1c",
                            "fieldPath": "spec.containers{web}"});
        assert_eq!((&pod["involvedObject"], &pod["type"]), (&object, &json!("Warning")));
        assert_eq!((&pod["reason"], &pod["source"]["component"]), (&json!("TapioMemoryLimitKill"), &json!("tapio")));
        assert_eq!(
            pod["message"],
            "shop/web-0/web exceeded its memory limit. Killed by the kernel: its own limit of 64 MiB was full (95 %). \
             tapioctl finding aa01"
        );
        assert_eq!((&pod["firstTimestamp"], &pod["count"]), (&json!("2023-11-14T22:13:20Z"), &json!(1)));
        let workload = until("the workload's", || api.event("shop", "tapio-aa01-workload"));
        assert_eq!(workload["involvedObject"]["kind"], "Deployment");

        store.publish(Finding { count: 3, ..finding("aa01", "high") }).expect("it has grown");
        until("it has grown", || api.event("shop", "tapio-aa01-pod").filter(|event| event["count"] == 3));
        store.withdraw("aa01", None).expect("it was there");
        let withdrawn = |event: &Value| event["type"] == "Normal";
        until("it is withdrawn", || api.event("shop", "tapio-aa01-pod").filter(withdrawn));
        // A namespace that is being deleted holds nobody up.
        api.fail(Some((
            StatusCode::FORBIDDEN,
            "unable to create new content in namespace shop because it is being terminated",
        )));
        store.publish(finding("aa03", "high")).expect("it is new");
        until("all are settled", || {
            let status = deliverer.status().remove(0);
            (status.waiting == 0 && status.trouble.is_empty()).then_some(())
        });
    });
    assert!(api.event("shop", "tapio-aa02-pod").is_none(), "it is below the severity");
}
