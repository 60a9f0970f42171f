//! What Kubernetes says today that the lab's node, which is older, cannot: objects of the newest API, checked against its types, from
//! an API server of the test's own.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Event, Pod};
use serde_json::{Value, json};

use crate::kube_api::server::{Answer, ago, change, checked, list};
use crate::kube_api::{Rig, container_id, only_pods, pod};
use tapio_collector::settings::config::K8sSection;

/// A pod as Kubernetes 1.36 and newer describe it. It has a sidecar, its own resources, a user namespace and an image
/// as a volume. It also has rules for restarts and resizes, a stop signal, and an ephemeral container.
fn modern(version: u64) -> Value {
    let mut pod = pod(1, version);
    let owner = &mut pod["metadata"]["ownerReferences"][0];
    (owner["apiVersion"], owner["uid"]) = (json!("apps/v1"), json!("r1"));
    let started = ago(30);
    pod["spec"] = json!({
        "nodeName": "node1",
        "hostUsers": false,
        "resources": {"limits": {"memory": "96Mi"}},
        "volumes": [{"name": "model", "image": {"reference": "registry.example/model:7", "pullPolicy": "IfNotPresent"}}],
        "initContainers": [{"name": "proxy", "image": "proxy:1", "restartPolicy": "Always"}],
        "containers": [{
            "name": "web", "image": "cart:1",
            "resources": {"limits": {"memory": "64Mi", "cpu": "500m"}},
            "resizePolicy": [{"resourceName": "memory", "restartPolicy": "RestartContainer"}],
            "restartPolicy": "Never",
            "restartPolicyRules": [
                {"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}},
            ],
            "lifecycle": {"stopSignal": "SIGUSR1"},
        }],
        "ephemeralContainers": [{"name": "debugger", "image": "busybox:1", "targetContainerName": "web"}],
    });
    let status = |name: &str, number: u64| {
        json!({
            "name": name, "image": format!("{name}:1"), "imageID": "sha256:1", "containerID": container_id(number),
            "ready": true, "restartCount": 0, "state": {"running": {"startedAt": started}},
        })
    };
    let mut web = status("web", 1);
    web["stopSignal"] = json!("SIGUSR1");
    web["resources"] = json!({"limits": {"memory": "64Mi"}});
    pod["status"] = json!({
        "phase": "Running", "qosClass": "Burstable", "podIPs": [{"ip": "10.0.0.7"}], "observedGeneration": 3,
        "conditions": [condition("Ready", "True", "", "")],
        "initContainerStatuses": [status("proxy", 2)],
        "containerStatuses": [web],
        "ephemeralContainerStatuses": [status("debugger", 3)],
    });
    pod
}

fn condition(name: &str, status: &str, reason: &str, message: &str) -> Value {
    let mut condition = json!({"type": name, "status": status, "lastTransitionTime": ago(20), "observedGeneration": 3});
    for (key, text) in [("reason", reason), ("message", message)] {
        if !text.is_empty() {
            condition[key] = json!(text);
        }
    }
    condition
}

/// The events when a pod changes step by step, all of them objects of the newest API.
fn events_of_steps(steps: Vec<Value>, stuck_after: Duration, until: &[&str]) -> Rig {
    let lines: Vec<Value> = steps.into_iter().map(|step| change("MODIFIED", checked::<Pod>(step))).collect();
    let first = checked::<Pod>(modern(5));
    let api = only_pods(move |asked| match (asked.is_watch(), asked.version()) {
        (false, _) => list(10, vec![first.clone()]),
        (true, "10") => Answer::Lines(lines.clone()),
        _ => Answer::Silent,
    });
    let mut rig = Rig::with(&api, "node1", &K8sSection { stuck_after, ..api.section() });
    rig.until_event(until);
    rig.finish();
    rig
}

const LONG: Duration = Duration::from_secs(3600);

#[test]
fn a_modern_pods_sidecar_and_debugger_are_named() {
    let rig = events_of_steps(Vec::new(), LONG, &["container shop/cart-1/debugger", "role=2"]);
    assert_eq!(rig.count(&["container shop/cart-1/proxy", "state=2", "role=1"]), 1, "{:#?}", rig.event_texts);
    assert_eq!(rig.count(&["container shop/cart-1/web", "state=2", "role=0"]), 1);
    assert_eq!(rig.count(&["trouble"]) + rig.count(&["object Pod"]), 0, "{:#?}", rig.event_texts);
}

#[test]
fn a_refused_resize_is_reported_until_taken_back() {
    let mut refused = modern(11);
    let message = "Node didn't have enough capacity: memory, requested: 4718592000, capacity: 4294967296";
    refused["status"]["conditions"] = json!([
        condition("Ready", "True", "", ""),
        condition("PodResizePending", "True", "Infeasible", message),
        condition("PodResizeInProgress", "True", "", ""),
    ]);
    let mut failed = modern(12);
    failed["status"]["conditions"] =
        json!([condition("PodResizeInProgress", "True", "Error", "cannot decrease memory limits")]);
    let rig =
        events_of_steps(vec![refused, failed, modern(13)], LONG, &["object Pod cart-1 PodResizeInProgress gone=true"]);
    let of = |state: &str| rig.event_texts.iter().filter(|event| event.contains(state)).cloned().collect::<Vec<_>>();
    let (pending, failing) = (of("PodResizePending"), of("PodResizeInProgress"));
    assert!(pending[0].contains("reason=Infeasible") && pending[0].contains("4718592000"), "{pending:#?}");
    assert!(pending[1].contains("gone=true") && pending.len() == 2, "{pending:#?}");
    assert!(
        failing[0].contains("reason=Error") && failing.len() == 2,
        "one that is on its way is no news: {failing:#?}"
    );
}

#[test]
fn a_restart_of_all_containers_is_reported() {
    let mut restarting = modern(11);
    restarting["status"]["conditions"] = json!([condition("AllContainersRestarting", "True", "", "")]);
    let rig =
        events_of_steps(vec![restarting, modern(12)], LONG, &["object Pod cart-1 AllContainersRestarting gone=true"]);
    assert_eq!(rig.count(&["AllContainersRestarting gone=false"]), 1, "{:#?}", rig.event_texts);
}

#[test]
fn a_volumes_missing_image_is_not_the_containers_image() {
    let mut waiting = modern(11);
    let status = &mut waiting["status"]["containerStatuses"][0];
    status["ready"] = json!(false);
    status["state"] = json!({"waiting": {
        "reason": "ImagePullBackOff",
        "message": "Back-off pulling image \"registry.example/model:7\": ErrImagePull: not found",
    }});
    let rig = events_of_steps(vec![waiting], LONG, &["reason=ImagePullBackOff"]);
    assert_eq!(rig.count(&["reason=ImagePullBackOff", "image=registry.example/model:7"]), 1, "{:#?}", rig.event_texts);
    assert_eq!(
        rig.count(&["state=2", "image=cart:1"]),
        1,
        "its own image is its own while it runs: {:#?}",
        rig.event_texts
    );
}

#[test]
fn an_eviction_through_the_api_is_reported_by_its_condition() {
    let mut evicted = modern(11);
    evicted["metadata"]["deletionTimestamp"] = json!(ago(0));
    evicted["metadata"]["deletionGracePeriodSeconds"] = json!(30);
    evicted["status"]["conditions"] =
        json!([condition("DisruptionTarget", "True", "EvictionByEvictionAPI", "Eviction API: evicting")]);
    let [first, evicted] = [modern(5), evicted].map(checked::<Pod>);
    let lines = vec![change("MODIFIED", evicted.clone()), change("DELETED", evicted)];
    let api = only_pods(move |asked| match (asked.is_watch(), asked.version()) {
        (false, _) => list(10, vec![first.clone()]),
        (true, "10") => Answer::Lines(lines.clone()),
        _ => Answer::Silent,
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["pod shop/cart-1", "gone=true"]);
    rig.finish();
    for gone in ["gone=false", "gone=true"] {
        let count = rig.count(&["pod shop/cart-1", "reason=EvictionByEvictionAPI", gone]);
        assert_eq!(count, 1, "{gone}: {:#?}", rig.event_texts);
    }
}

#[test]
fn kubelets_preemption_is_reported_by_the_pods_own_reason() {
    // The condition's reason is the same for evictions and node shutdowns.
    let by_kubelet = |reason: &str, message: &str| {
        let mut pod = modern(11);
        (pod["status"]["phase"], pod["status"]["reason"]) = (json!("Failed"), json!(reason));
        pod["status"]["message"] = json!(message);
        let said = "Pod was preempted by Kubelet to accommodate a critical pod.";
        pod["status"]["conditions"] = json!([condition("DisruptionTarget", "True", "TerminationByKubelet", said)]);
        pod
    };
    for (reason, message, told) in [
        ("Preempting", "Preempted in order to admit critical pod", "reason=Preempting"),
        ("", "", "reason=TerminationByKubelet"),
    ] {
        let rig = events_of_steps(vec![by_kubelet(reason, message)], LONG, &[told]);
        let message = if message.is_empty() { "preempted by Kubelet" } else { message };
        assert_eq!(rig.count(&["pod shop/cart-1", told, message]), 1, "{:#?}", rig.event_texts);
    }
}

#[test]
fn a_pod_waiting_for_its_readiness_gate_is_reported() {
    let mut unready = modern(11);
    let message = "corresponding condition of pod readiness gate \"example.com/lb\" does not exist";
    unready["status"]["conditions"] = json!([condition("Ready", "False", "ReadinessGatesNotReady", message)]);
    let rig = events_of_steps(vec![unready, modern(12)], Duration::ZERO, &["trouble not-ready", "over=true"]);
    assert_eq!(rig.count(&["trouble not-ready", "example.com/lb", "over=false"]), 1, "{:#?}", rig.event_texts);
    assert_eq!(rig.count(&["init-runs"]), 0, "{:#?}", rig.event_texts);
}

#[test]
fn a_job_ended_by_its_failure_policy_says_so() {
    let job = json!({
        "metadata": {"name": "import", "namespace": "shop", "uid": "j1", "resourceVersion": "5", "generation": 1},
        "spec": {
            "completions": 1, "backoffLimit": 6,
            "podFailurePolicy": {"rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": "work", "operator": "In", "values": [42]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]},
            "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "work", "image": "import:1"}]}},
        },
        "status": {
            "failed": 1,
            "conditions": [{
                "type": "Failed", "status": "True", "reason": "PodFailurePolicy", "lastTransitionTime": ago(1),
                "message": "Container work for pod shop/import-x failed with exit code 42 matching FailJob rule at index 0",
            }],
        },
    });
    let job = checked::<Job>(job);
    let api = crate::kube_elected::elected(move |asked| {
        let is_job = asked.path.ends_with("/jobs");
        match asked.is_watch() {
            false => list(10, if is_job { vec![job.clone()] } else { Vec::new() }),
            true => Answer::Silent,
        }
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["rollout Job shop/import", "reason=PodFailurePolicy"]);
    rig.finish();
}

/// A Deployment whose specification is of this generation, with who wrote what, oldest first: manager, subresource and seconds ago.
fn limited(generation: u64, limits: Value, wrote: &[(&str, &str, i64)]) -> Value {
    let fields: Vec<Value> = wrote
        .iter()
        .map(|(manager, subresource, seconds)| {
            let mut fields = json!({
                "manager": manager, "operation": "Update", "time": ago(*seconds), "apiVersion": "apps/v1",
                "fieldsType": "FieldsV1",
            });
            if !subresource.is_empty() {
                fields["subresource"] = json!(subresource);
            }
            fields
        })
        .collect();
    checked::<Deployment>(json!({
        "metadata": {
            "name": "cart", "namespace": "shop", "uid": "d1", "resourceVersion": generation.to_string(),
            "generation": generation, "managedFields": fields,
        },
        "spec": {
            "replicas": 2, "selector": {},
            "template": {"spec": {"containers": [
                {"name": "web", "image": "cart:1", "resources": {"limits": limits}},
                {"name": "proxy", "image": "proxy:1"},
            ]}},
        },
        "status": {"observedGeneration": generation, "readyReplicas": 2, "updatedReplicas": 2},
    }))
}

/// What is said of who changed it when it changes step by step.
fn changes_of(steps: Vec<Value>, until: &str) -> Vec<String> {
    let lines: Vec<Value> = steps.iter().skip(1).map(|step| change("MODIFIED", step.clone())).collect();
    let first = steps[0].clone();
    let api = crate::kube_elected::elected(move |asked| {
        let is_it = asked.path.ends_with("/deployments");
        match (asked.is_watch(), asked.version()) {
            (false, _) => list(10, if is_it { vec![first.clone()] } else { Vec::new() }),
            (true, "10") if is_it => Answer::Lines(lines.clone()),
            _ => Answer::Silent,
        }
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&[until]);
    rig.finish();
    rig.event_texts.iter().filter(|event| event.contains(" Changed ")).cloned().collect()
}

#[test]
fn a_changed_limit_names_the_old_one_and_its_author() {
    let controller = ("kube-controller-manager", "status", 0);
    let changes = changes_of(
        vec![
            limited(11, json!({"memory": "64Mi"}), &[("kubectl-create", "", 900)]),
            // The controller writes the status later than that: it changed no specification.
            limited(
                12,
                json!({"memory": "32Mi", "cpu": "500m"}),
                &[("kubectl-create", "", 900), ("kubectl-set", "", 60), controller],
            ),
            limited(
                13,
                json!({"memory": "32Mi"}),
                &[("kubectl-set", "", 60), ("kubectl-edit", "", 30), ("kube-controller-manager", "", 0), controller],
            ),
            limited(14, json!({"memory": "32Mi"}), &[("kubectl-set", "", 60), ("autoscaler", "scale", 5), controller]),
            limited(15, json!({"memory": "16Mi"}), &[]),
        ],
        "from 32Mi to 16Mi",
    );
    let said = |from: &str, how: &str| format!("object Deployment cart Changed gone=false reason={from} {how}");
    assert_eq!(
        changes,
        [
            said(
                "kubectl-set",
                "changed its specification (Update): memory limit of web from 64Mi to 32Mi, CPU limit of web from none to 500m"
            ),
            said("kubectl-edit", "changed its specification (Update): CPU limit of web from 500m to none"),
            said("autoscaler", "scaled it"),
            said("", "its specification was changed: memory limit of web from 32Mi to 16Mi"),
        ]
    );
}

#[test]
fn the_preempting_pod_is_named_in_each_wording() {
    let preempted = |number: u64, message: &str| {
        checked::<Event>(json!({
            "metadata": {"name": format!("e{number}"), "namespace": "shop", "uid": format!("e{number}"), "resourceVersion": "5"},
            "involvedObject": {"kind": "Pod", "namespace": "shop", "name": format!("cart-{number}"), "uid": format!("p{number}")},
            "related": {"kind": "Pod", "namespace": "pay", "name": "urgent", "uid": "4f0c-77"},
            "reason": "Preempted", "message": message, "type": "Normal", "action": "Preempting",
            "eventTime": ago(0), "reportingComponent": "default-scheduler", "reportingInstance": "default-scheduler-1",
        }))
    };
    // Kubernetes 1.29 and newer, 1.26 to 1.28, and before.
    let events = vec![
        preempted(1, "Preempted by pod 4f0c-77 on node node1"),
        preempted(2, "Preempted by a pod on node node1"),
        preempted(3, "Preempted by pay/urgent on node node1"),
    ];
    let api = crate::kube_elected::elected(move |asked| match asked.is_watch() {
        false => list(10, if asked.path.ends_with("/events") { events.clone() } else { Vec::new() }),
        true => Answer::Silent,
    });
    let mut rig = Rig::start(&api, "node1");
    rig.until_event(&["event shop/cart-1: Preempted x1 Preempted by pod pay/urgent on node node1"]);
    rig.until_event(&["event shop/cart-2: Preempted x1 Preempted by a pod on node node1 (pod pay/urgent)"]);
    rig.until_event(&["event shop/cart-3: Preempted x1 Preempted by pay/urgent on node node1"]);
    rig.finish();
}
