//! Causes that objects alone report: pods that do not start, do not get ready, keep their resources, or are taken away.

use serde_json::{Value, json};

use super::objects::{condition, event, kubelet_says, pod, run, running, set_condition, waiting};
use super::{Lab, Scenario};

pub const SCENARIOS: &[Scenario] = &[
    Scenario { says: &["runAsNonRoot"], ..Scenario::new("as-root", as_root, "user-refused") },
    Scenario {
        says: &["registry.example/model:7", "failed to resolve reference"],
        ..Scenario::new("no-model", missing_image_volume, "image-pull-failed")
    },
    Scenario { says: &["example.com/quota"], ..Scenario::new("gated", gated, "scheduling-gated") },
    Scenario { says: &["statuscode: 503"], ..Scenario::new("unready", unready, "never-ready") },
    Scenario { says: &["64000"], ..Scenario::new("too-big", infeasible, "resize-refused") },
    Scenario { says: &["used: 1450"], ..Scenario::new("deferred", deferred, "resize-refused") },
    Scenario { says: &["below current usage"], ..Scenario::new("in-use", undecreasable, "resize-refused") },
    Scenario { container: "", says: &["default/urgent"], ..Scenario::new("yielding", preempted, "preempted") },
    Scenario { container: "", ..Scenario::new("intolerant", tainted, "evicted-by-taint") },
    Scenario {
        container: "",
        says: &["garbage collector of pods"],
        ..Scenario::new("orphaned", orphaned, "node-gone")
    },
    Scenario { container: "", says: &["memory"], ..Scenario::new("hungry", evicted, "evicted") },
];

fn as_root(lab: &mut Lab) {
    let mut pod = pod("as-root", &lab.uid());
    pod["spec"]["securityContext"] = json!({"runAsNonRoot": true});
    let uid = pod["metadata"]["uid"].as_str().expect("a uid");
    let message =
        format!("container has runAsNonRoot and image will run as root (pod: \"as-root_shop({uid})\", container: web)");
    lab.says(&kubelet_says(&pod, "web", ["Warning", "Failed", &format!("Error: {message}")]));
    pod["status"]["containerStatuses"] = json!([waiting("web", "CreateContainerConfigError", &message)]);
    lab.put(&pod);
}

/// Kubelet pulls images of volumes before those of containers, and reports a failure for the container that mounts it.
fn missing_image_volume(lab: &mut Lab) {
    const REFERENCE: &str = "registry.example/model:7";
    let mut pod = pod("no-model", &lab.uid());
    pod["spec"]["volumes"] =
        json!([{"name": "model", "image": {"reference": REFERENCE, "pullPolicy": "IfNotPresent"}}]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "model", "mountPath": "/model", "readOnly": true}]);
    let failed = format!(
        "failed to pull and unpack image \"{REFERENCE}\": failed to resolve reference \"{REFERENCE}\": {REFERENCE}: not found"
    );
    let said = format!("Failed to pull image \"{REFERENCE}\": {failed}");
    lab.says(&kubelet_says(&pod, "", ["Warning", "Failed", &said]));
    pod["status"]["containerStatuses"] = json!([waiting("web", "ErrImagePull", &failed)]);
    lab.put(&pod);
    let backs_off = format!("Back-off pulling image \"{REFERENCE}\": ErrImagePull: {failed}");
    pod["status"]["containerStatuses"] = json!([waiting("web", "ImagePullBackOff", &backs_off)]);
    lab.put(&pod);
}

fn gated(lab: &mut Lab) {
    let mut pod = pod("gated", &lab.uid());
    pod["spec"].as_object_mut().expect("a spec").remove("nodeName");
    pod["spec"]["schedulingGates"] = json!([{"name": "example.com/quota"}]);
    let message = "Scheduling is blocked due to non-empty scheduling gates";
    let blocked = condition("PodScheduled", "False", "SchedulingGated", message);
    pod["status"] = json!({"phase": "Pending", "qosClass": "Burstable", "conditions": [blocked]});
    lab.put(&pod);
}

fn unready(lab: &mut Lab) {
    let mut pod = lab.running_pod("unready");
    pod["spec"]["containers"][0]["readinessProbe"] =
        json!({"httpGet": {"path": "/ready", "port": 8080}, "periodSeconds": 10});
    let status = &mut pod["status"]["containerStatuses"][0];
    status["ready"] = json!(false);
    status["state"]["running"]["startedAt"] = json!(super::objects::at(3600));
    for kind in ["ContainersReady", "Ready"] {
        let mut unready = condition(kind, "False", "ContainersNotReady", "containers with unready status: [web]");
        unready["lastTransitionTime"] = json!(super::objects::at(3600));
        set_condition(&mut pod, unready);
    }
    let said = "Readiness probe failed: HTTP probe failed with statuscode: 503";
    lab.says(&kubelet_says(&pod, "web", ["Warning", "Unhealthy", said]));
    lab.put(&pod);
}

fn infeasible(lab: &mut Lab) {
    let message = "Node didn't have enough capacity: cpu, requested: 64000, capacity: 2000";
    pending_resize(lab, "too-big", "64", ["Infeasible", message]);
}

fn deferred(lab: &mut Lab) {
    let message = "Node didn't have enough resource: cpu, requested: 1500, used: 1450, capacity: 2000";
    pending_resize(lab, "deferred", "1500m", ["Deferred", message]);
}

fn pending_resize(lab: &mut Lab, name: &str, cpu: &str, [reason, message]: [&str; 2]) {
    let mut pod = lab.running_pod(name);
    pod["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": cpu}});
    set_condition(&mut pod, condition("PodResizePending", "True", reason, message));
    lab.put(&pod);
}

fn undecreasable(lab: &mut Lab) {
    let mut pod = lab.running_pod("in-use");
    pod["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": "128Mi"}, "requests": {"memory": "128Mi"}});
    let message = "cannot decrease memory limits: [attempting to set pod memory limit (134217728) below current usage \
                   (319180800), attempting to set container \"web\" memory limit (134217728) below current usage (319180800)]";
    set_condition(&mut pod, condition("PodResizeInProgress", "True", "Error", message));
    lab.says(&kubelet_says(&pod, "", ["Warning", "ResizeError", &format!("Pod resize error: {message}")]));
    lab.put(&pod);
}

/// A pod is deleted because of a disruption, which its condition names.
fn disrupted(lab: &mut Lab, name: &str, reason: &str, message: &str) -> Value {
    let mut pod = lab.running_pod(name);
    lab.put(&pod);
    super::deaths::disrupt(&mut pod, reason, message);
    pod
}

fn preempted(lab: &mut Lab) {
    let message = "default-scheduler: preempting to accommodate a higher priority pod";
    let pod = disrupted(lab, "yielding", "PreemptionByScheduler", message);
    let by = lab.uid();
    let said = format!("Preempted by pod {by} on node node1");
    let mut preempted = event(&pod, ["Normal", "Preempted", &said], "default-scheduler");
    preempted["related"] =
        json!({"kind": "Pod", "namespace": "default", "name": "urgent", "uid": by, "apiVersion": "v1"});
    lab.says(&preempted);
    lab.put(&pod);
    lab.cluster.delete(&pod);
}

fn tainted(lab: &mut Lab) {
    let message = "Taint manager: deleting due to NoExecute taint";
    let pod = disrupted(lab, "intolerant", "DeletionByTaintManager", message);
    let said = "Marking for deletion Pod shop/intolerant";
    lab.says(&event(&pod, ["Normal", "TaintManagerEviction", said], "taint-eviction-controller"));
    lab.put(&pod);
    lab.cluster.delete(&pod);
}

/// The garbage collector of pods says that it failed, and deletes it then without a grace period.
fn orphaned(lab: &mut Lab) {
    let mut pod = lab.running_pod("orphaned");
    lab.put(&pod);
    let message = "PodGC: node no longer exists";
    set_condition(&mut pod, condition("DisruptionTarget", "True", "DeletionByPodGC", message));
    pod["status"]["phase"] = json!("Failed");
    lab.put(&pod);
    pod["metadata"]["deletionTimestamp"] = json!(super::objects::at(0));
    pod["metadata"]["deletionGracePeriodSeconds"] = json!(0);
    lab.put(&pod);
    lab.cluster.delete(&pod);
}

fn evicted(lab: &mut Lab) {
    let mut pod = lab.running_pod("hungry");
    lab.put(&pod);
    let message = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. \
                   Container web was using 200Mi, request is 0, has larger consumption of memory. ";
    lab.says(&kubelet_says(&pod, "", ["Warning", "Evicted", message]));
    set_condition(&mut pod, condition("DisruptionTarget", "True", "TerminationByKubelet", message));
    pod["status"]["phase"] = json!("Failed");
    (pod["status"]["reason"], pod["status"]["message"]) = (json!("Evicted"), json!(message));
    super::objects::end(&mut pod["status"]["containerStatuses"][0], 137, "Error");
    lab.put(&pod);
}

impl Lab {
    /// A pod that runs, with no process here.
    fn running_pod(&mut self, name: &str) -> Value {
        let container = self.stage.name();
        let mut pod = pod(name, &container.pod_uid);
        run(&mut pod, vec![running("web", &container.container_id)]);
        pod
    }
}
