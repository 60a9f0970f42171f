//! Objects as an API server of Kubernetes 1.36 and newer sends them.

use serde_json::{Value, json};

use super::server::ago;

pub const NODE: &str = "node1";
pub const NAMESPACE: &str = "shop";
pub const IMAGE: &str = "registry.example/web:7";

/// The moment this many seconds ago, in seconds as objects have it.
pub fn at(seconds: i64) -> String {
    format!("{}Z", &ago(seconds)[..19])
}

/// A pod with one container `web`, of which no status is known yet.
pub fn pod(name: &str, uid: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": NAMESPACE, "uid": uid, "generation": 1, "creationTimestamp": at(60),
        },
        "spec": {
            "nodeName": NODE, "restartPolicy": "Always", "schedulerName": "default-scheduler",
            "terminationGracePeriodSeconds": 30, "dnsPolicy": "ClusterFirst", "enableServiceLinks": true,
            "serviceAccountName": "default", "preemptionPolicy": "PreemptLowerPriority", "priority": 0,
            "containers": [container("web")],
        },
        "status": {
            "phase": "Pending", "qosClass": "Burstable", "observedGeneration": 1, "startTime": at(59),
            "hostIP": "10.9.0.1", "hostIPs": [{"ip": "10.9.0.1"}],
            "conditions": [
                condition("PodReadyToStartContainers", "True", "", ""), condition("PodScheduled", "True", "", ""),
            ],
        },
    })
}

pub fn container(name: &str) -> Value {
    json!({
        "name": name, "image": IMAGE, "imagePullPolicy": "IfNotPresent", "resources": {},
        "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
    })
}

pub fn condition(kind: &str, status: &str, reason: &str, message: &str) -> Value {
    let mut condition = json!({
        "type": kind, "status": status, "lastTransitionTime": at(5), "observedGeneration": 1,
    });
    for (key, text) in [("reason", reason), ("message", message)] {
        if !text.is_empty() {
            condition[key] = json!(text);
        }
    }
    condition
}

/// Sets a condition of a pod or job, or changes it.
pub fn set_condition(object: &mut Value, condition: Value) {
    let conditions = object["status"]["conditions"].as_array_mut().expect("conditions");
    conditions.retain(|one| one["type"] != condition["type"]);
    conditions.push(condition);
}

/// A container whose image is there and which runs since a minute.
pub fn running(name: &str, id: &str) -> Value {
    json!({
        "name": name, "image": IMAGE, "imageID": "registry.example/web@sha256:ab", "containerID": format!("containerd://{id}"),
        "ready": true, "started": true, "restartCount": 0, "state": {"running": {"startedAt": at(50)}}, "lastState": {},
    })
}

pub fn waiting(name: &str, reason: &str, message: &str) -> Value {
    json!({
        "name": name, "image": IMAGE, "imageID": "", "ready": false, "started": false, "restartCount": 0,
        "state": {"waiting": {"reason": reason, "message": message}}, "lastState": {},
    })
}

/// The pod runs, and so do these containers.
pub fn run(pod: &mut Value, statuses: Vec<Value>) {
    pod["status"]["phase"] = json!("Running");
    pod["status"]["podIP"] = json!("10.0.0.7");
    pod["status"]["podIPs"] = json!([{"ip": "10.0.0.7"}]);
    pod["status"]["containerStatuses"] = json!(statuses);
    for kind in ["Initialized", "ContainersReady", "Ready"] {
        set_condition(pod, condition(kind, "True", "", ""));
    }
}

/// A container has ended.
pub fn end(status: &mut Value, exit_code: i32, reason: &str) {
    (status["ready"], status["started"]) = (json!(false), json!(false));
    status["state"] = json!({"terminated": {
        "exitCode": exit_code, "reason": reason, "startedAt": at(50), "finishedAt": at(0), "containerID": status["containerID"],
    }});
}

/// A container that has ended was started again, as another one.
pub fn start_again(status: &mut Value, id: &str) {
    let ended = status["state"].take();
    let count = status["restartCount"].as_u64().unwrap_or(0) + 1;
    *status = running(status["name"].as_str().expect("a name"), id);
    (status["lastState"], status["restartCount"]) = (ended, json!(count));
    status["state"] = json!({"running": {"startedAt": at(0)}});
}

/// What kubelet says of a container of a pod, or of the pod where there is no container.
pub fn kubelet_says(pod: &Value, container: &str, [kind, reason, message]: [&str; 3]) -> Value {
    let mut event = event(pod, [kind, reason, message], "kubelet");
    event["source"]["host"] = json!(NODE);
    event["reportingInstance"] = json!(NODE);
    if !container.is_empty() {
        event["involvedObject"]["fieldPath"] = json!(format!("spec.containers{{{container}}}"));
    }
    event
}

/// What a component says of an object now.
pub fn event(of: &Value, [kind, reason, message]: [&str; 3], component: &str) -> Value {
    let meta = &of["metadata"];
    let name = format!("{}.{}", meta["name"].as_str().expect("a name"), reason.to_lowercase());
    json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"name": name, "namespace": NAMESPACE, "uid": name, "creationTimestamp": at(0)},
        "involvedObject": {
            "apiVersion": of["apiVersion"], "kind": of["kind"], "namespace": NAMESPACE, "name": meta["name"], "uid": meta["uid"],
        },
        "reason": reason, "message": message, "type": kind, "count": 1, "firstTimestamp": at(0), "lastTimestamp": at(0),
        "source": {"component": component}, "reportingComponent": component, "reportingInstance": "",
    })
}
