//! What the tests of the Kubernetes source share: an API server of the test's own that answers as the test wants, and the real
//! source that talks to it.

#![allow(dead_code, reason = "every test program uses its part of this module")]

pub mod server;

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tapio_collector::intake::Intake;
use tapio_collector::intake::identity::Identity;
use tapio_collector::intake::identity::directory::Directory;
use tapio_collector::intake::source_context::SourceContext;
use tapio_collector::outbox::queue::{OpenLanes, Queues};
use tapio_collector::settings::config::{Config, K8sSection};
use tapio_collector::source::kube::{KubeSource, KubeState};
use tapio_wire::event::{Body as Frame, Detail, Event, Name, Source};
use tokio::sync::watch;

use self::server::{Answer, Api, Asked, ago, change};

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(20);

impl Api {
    pub fn section(&self) -> K8sSection {
        K8sSection { in_cluster: false, kubeconfig: Some(self.kubeconfig()), ..K8sSection::default() }
    }
}

/// The real source, with queues that the test empties.
pub struct Rig {
    context: SourceContext,
    _parker: crossbeam::sync::Parker,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    pub directory: Arc<Directory>,
    pub state: Arc<KubeState>,
    /// The events, as text.
    pub event_texts: Vec<String>,
    /// Names by entity, as described last.
    pub names: HashMap<u64, String>,
    pub events: u64,
    keeps_text: bool,
}

impl Rig {
    /// Starts the source for `node`.
    pub fn start(api: &Api, node: &str) -> Self {
        Self::with(api, node, &api.section())
    }

    pub fn with(api: &Api, node: &str, section: &K8sSection) -> Self {
        let mut config = Config::default();
        config.grpc.max_batch_size = 256;
        let (queues, parker) = Queues::new(8);
        let context = SourceContext::for_config(&config, queues);
        let directory = Arc::clone(&context.directory);
        let state = Arc::new(KubeState::default());
        let opened = KubeSource::open(section, node, Arc::clone(&directory), Arc::clone(&state));
        let source = api.runtime().block_on(opened).expect("a kubeconfig");
        let intake = Intake::new(context.clone(), Source::Kube, Identity::new(Vec::new()));
        let (stop, stopped) = watch::channel(false);
        let runtime = api.runtime().handle().clone();
        let thread = std::thread::spawn(move || runtime.block_on(source.run(intake, stopped)));
        Self {
            context,
            _parker: parker,
            stop,
            thread: Some(thread),
            directory,
            state,
            event_texts: Vec::new(),
            names: HashMap::new(),
            events: 0,
            keeps_text: true,
        }
    }

    /// A stream to a server is opened, as the shipper announces it.
    pub fn stream(&self) {
        self.context.generation.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    /// Switches to counting only.
    pub fn count_only(&mut self) {
        self.keeps_text = false;
    }

    /// Takes what there is.
    pub fn take(&mut self) -> usize {
        let mut taken = 0;
        while let Some((_, body)) = self.context.queues.pop(OpenLanes::Both) {
            taken += body.events.len();
            self.events += body.events.len() as u64;
            if self.keeps_text {
                for entity in &body.entities {
                    self.names.insert(entity.id, entity.name.clone());
                }
                for event in &body.events {
                    self.event_texts.push(text(&body, event, &self.names));
                }
            }
            self.context.queues.recycle(body);
        }
        taken
    }

    /// Takes until `wanted` holds.
    pub fn until(&mut self, what: &str, mut wanted: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.take();
            if wanted(self) {
                return;
            }
            assert!(Instant::now() < deadline, "no {what} within {LIMIT:?}; events: {:#?}", self.event_texts);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Takes events until one contains all of `parts`.
    pub fn until_event(&mut self, parts: &[&str]) {
        self.until(&format!("{parts:?}"), |rig| rig.count(parts) > 0);
    }

    /// How many events contain all of `parts`.
    pub fn count(&self, parts: &[&str]) -> usize {
        self.event_texts.iter().filter(|event| parts.iter().all(|part| event.contains(part))).count()
    }

    /// Ends the source and takes the rest.
    pub fn finish(&mut self) {
        self.stop.send_replace(true);
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + LIMIT;
        while !thread.is_finished() {
            self.take();
            assert!(Instant::now() < deadline, "the source does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
        thread.join().expect("no panic");
        self.take();
    }
}

fn text(body: &Frame, event: &Event, names: &HashMap<u64, String>) -> String {
    let name = |name: Name| body.names.get(name as usize).map_or("", String::as_str);
    let of = names.get(&event.entity).map_or("?", String::as_str);
    match &event.body {
        Detail::PodState(pod) => format!(
            "pod {of}: {} reason={} ready={} deletion={} gone={} message={}",
            name(pod.phase),
            name(pod.reason),
            pod.is_ready,
            pod.deletion_ns,
            pod.is_gone,
            name(pod.message)
        ),
        Detail::ContainerState(state) => format!(
            "container {of}: {} state={} reason={} exit={} last={} restarts={} memory={} image={} role={}",
            name(state.container),
            state.state,
            name(state.reason),
            state.exit_code,
            state.is_last,
            state.restart_count,
            state.memory_limit_bytes,
            name(state.image),
            state.role
        ),
        Detail::Gap(gap) => format!(
            "gap {} {} gone={} sound={}",
            name(gap.what),
            name(gap.reason),
            gap.found_gone,
            gap.from_ns <= gap.until_ns
        ),
        Detail::KubeEvent(event) => {
            format!("event {of}: {} x{} {}", name(event.reason), event.count, name(event.message))
        }
        Detail::NodeCondition(condition) => format!("condition {} {}", name(condition.condition), condition.status),
        Detail::Rollout(rollout) => format!(
            "rollout {of}: {} {} images={} before={} reason={} ready={}/{} gone={}",
            name(rollout.kind),
            name(rollout.name),
            name(rollout.images),
            name(rollout.images_before),
            name(rollout.reason),
            rollout.ready,
            rollout.desired,
            rollout.is_gone
        ),
        Detail::ConfigChange(change) => format!(
            "config {} {} change={} users={}",
            name(change.kind),
            name(change.name),
            change.change,
            change.used_by.len()
        ),
        Detail::Endpoints(endpoints) => format!(
            "endpoints {} backends={} ready={} addresses={}",
            name(endpoints.service),
            endpoints.backends.len(),
            endpoints.backends.iter().filter(|backend| backend.is_ready).count(),
            endpoints.cluster_addresses.len()
        ),
        Detail::ObjectState(object) => {
            let [kind, named, state] = [object.kind, object.name, object.state].map(name);
            let [reason, message] = [object.reason, object.message].map(name);
            format!("object {kind} {named} {state} gone={} reason={reason} {message}", object.is_gone)
        }
        Detail::Trouble(trouble) => {
            let [what, place] = [trouble.what, trouble.place].map(name);
            format!("trouble {what} {of} over={} {place}", trouble.is_over)
        }
        other => format!("{other:?}"),
    }
}

/// When every pod of these tests started.
static STARTED: LazyLock<String> = LazyLock::new(|| ago(30));

/// The id of a container, by a number.
pub fn container_id(number: u64) -> String {
    format!("containerd://{number:064x}")
}

/// A running pod with one container `web`.
pub fn pod(number: u64, version: u64) -> Value {
    json!({
        "metadata": {
            "name": format!("cart-{number}"), "namespace": "shop", "uid": format!("00000000-0000-4000-8000-{number:012}"),
            "resourceVersion": version.to_string(),
            "labels": {"pod-template-hash": "5d9c"},
            "ownerReferences": [{"kind": "ReplicaSet", "name": "cart-5d9c", "controller": true}],
        },
        "spec": {"nodeName": "node1", "containers": [
            {"name": "web", "image": "cart:1", "resources": {"limits": {"memory": "64Mi", "cpu": "500m"}}}]},
        "status": {
            "phase": "Running", "qosClass": "Burstable", "podIPs": [{"ip": "10.0.0.7"}],
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{
                "name": "web", "image": "cart:1", "containerID": container_id(number), "ready": true, "restartCount": 0,
                "state": {"running": {"startedAt": *STARTED}},
            }],
        },
    })
}

/// Builds the pod after its container ended.
pub fn ended_pod(number: u64, version: u64, reason: &str, exit_code: i32, finished: &str) -> Value {
    let mut pod = pod(number, version);
    let status = &mut pod["status"]["containerStatuses"][0];
    status["ready"] = json!(false);
    status["state"] = json!({"terminated": {
        "exitCode": exit_code, "reason": reason, "startedAt": ago(3600), "finishedAt": finished,
        "containerID": container_id(number),
    }});
    pod
}

pub fn bookmark(version: u64) -> Value {
    change("BOOKMARK", json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"resourceVersion": version.to_string()}}))
}

pub fn error(code: u16, reason: &str) -> Value {
    change("ERROR", json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason}))
}

/// Answers for pods by `script`, and says of everything else that there is no such thing.
pub fn only_pods(mut script: impl FnMut(&Asked) -> Answer + Send + 'static) -> Api {
    Api::start(move |asked| match asked.path.ends_with("/pods") {
        true => script(asked),
        false => Answer::Refused(404, None),
    })
}
