//! On a real Kubernetes node: why pods do not start, as findings that close by themselves when they do; and why they are gone.
//!
//! Runs only by `make test-kube`, which starts a node where there is none (see `perf/lab/kube/`).

use std::process::Command;

use serde_json::{Value, json};
use tapio_perf::processes::bin_dir;

use crate::kube_node::beside::Beside;
use crate::kube_node::findings::{findings, listed, print};
use crate::kube_node::{
    Namespace, await_that, container, deployment, has_node, kubectl, kubectl_reading, pod, setting,
};

const CALM: &str = "trap 'exit 0' TERM; while :; do busybox sleep 0.2; done";
/// A pod or workload, and the pattern that says why it does not start, or not stay.
const EXPECTED: &[(&str, &str)] = &[
    ("no-image", "image-pull-failed"),
    ("no-config", "configuration-missing"),
    ("no-volume", "volume-not-mounted"),
    ("no-node", "unschedulable"),
    ("as-root", "user-refused"),
    ("hooked", "post-start-failed"),
    ("late", "startup-probe-kill"),
    ("ends-well", "ends-and-restarts"),
];

fn objects() -> Vec<Value> {
    let mut no_image = container("web", CALM);
    no_image["image"] = json!("registry.invalid/shop/web:3");
    let mut no_image = deployment("no-image", no_image);
    no_image["spec"]["replicas"] = json!(2);
    let mut no_config = container("web", CALM);
    no_config["envFrom"] = json!([{"configMapRef": {"name": "settings"}}]);
    let mut no_volume = pod("no-volume", "Always", container("web", CALM));
    no_volume["spec"]["volumes"] = json!([{"name": "key", "secret": {"secretName": "key"}}]);
    no_volume["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "key", "mountPath": "/key"}]);
    let mut no_node = container("web", CALM);
    no_node["resources"] = json!({"requests": {"cpu": "1000"}});
    let mut as_root = pod("as-root", "Always", container("web", CALM));
    as_root["spec"]["securityContext"] = json!({"runAsNonRoot": true});
    let mut hooked = container("web", CALM);
    hooked["lifecycle"] = json!({"postStart": {"exec": {"command": ["/bin/busybox", "false"]}}});
    let mut late = container("web", CALM);
    late["startupProbe"] =
        json!({"exec": {"command": ["/bin/busybox", "false"]}, "periodSeconds": 1, "failureThreshold": 3});
    vec![
        no_image,
        deployment("no-config", no_config),
        no_volume,
        deployment("no-node", no_node),
        as_root,
        pod("hooked", "Always", hooked),
        pod("late", "Always", late),
        deployment("ends-well", container("work", "busybox true")),
    ]
}

fn is_of(finding: &Value, namespace: &str, owner: &str) -> bool {
    let text = |key: &str| finding["entity"][key].as_str().unwrap_or_default();
    let of = text("workload").rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or(text("pod"));
    text("namespace") == namespace && of == owner
}

/// Waits for a finding of a pattern about a pod or workload, and shows it.
fn await_one(server: &str, namespace: &str, owner: &str, pattern: &str) {
    let found = await_that(&format!("{pattern} of {owner}"), |seen| {
        let all = findings(server);
        *seen = all.iter().map(|one| format!("\n{} {}", one["pattern"], one["title"])).collect();
        all.into_iter().find(|one| one["pattern"] == pattern && is_of(one, namespace, owner))
    });
    print(server, &found);
}

/// Waits until no finding of a workload is about a state that goes on, and one is about a state that is over.
fn await_the_end(server: &str, namespace: &str, owner: &str, pattern: &str) {
    await_that(&format!("the end of {pattern} of {owner}"), |seen| {
        let all = findings(server);
        let of_it: Vec<_> =
            all.iter().filter(|one| one["pattern"] == pattern && is_of(one, namespace, owner)).collect();
        *seen =
            of_it.iter().map(|one| format!("\n{} {} {}", one["ongoing"], one["resolved_at"], one["title"])).collect();
        let is_over = !of_it.is_empty() && of_it.iter().all(|one| one["ongoing"] == false);
        (is_over && of_it.iter().all(|one| one["resolved_at"].is_string())).then_some(())
    });
}

#[test]
fn pods_that_do_not_start_are_explained_until_they_do() {
    if !has_node("pods_that_do_not_start_are_explained_until_they_do") {
        return;
    }
    let tapio = Beside::start();
    let address = tapio.server.address();
    let namespace = Namespace::make("states");
    let refused = Namespace::make("refused");
    let ns = &namespace.0;
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}},
    });
    refused.apply(vec![quota]);
    await_that("that the quota holds", |seen| {
        seen.clone_from(&refused.get("resourcequota/none", "{.status.hard.pods}"));
        (seen == "0").then_some(())
    });
    refused.apply(vec![deployment("refused", container("web", CALM))]);
    namespace.apply(objects());

    for (owner, pattern) in EXPECTED {
        await_one(&address, ns, owner, pattern);
    }
    // One finding of the workload, and both of its pods.
    await_that("one finding of two pods", |seen| {
        let all = findings(&address);
        let of_it: Vec<_> =
            all.iter().filter(|one| one["pattern"] == "image-pull-failed" && is_of(one, ns, "no-image")).collect();
        *seen = of_it.iter().map(|one| format!("\n{} {}", one["count"], one["title"])).collect();
        assert!(of_it.len() <= 1, "{seen}");
        of_it.first().filter(|one| one["count"] == 2 && one["ongoing"] == true).map(|_| ())
    });
    let found = listed(&address, "pods-refused", |name| name.ends_with(&format!("{}/refused", refused.0)));
    assert!(found["summary"].as_str().is_some_and(|text| text.contains("exceeded quota")), "{found}");
    assert_eq!(found["ongoing"], true, "{found}");

    // Of a workload as a whole, and of one of which there is nothing to complain.
    for (subject, expected) in [
        (format!("deploy/{ns}/no-image"), "cannot be had"),
        (format!("ns/{ns}"), "Other findings"),
        ("node/".to_owned() + &setting("TAPIO_TEST_NODE"), "condition=Ready"),
    ] {
        let tapioctl = bin_dir(None).expect("the programs' folder").join("tapioctl");
        let why = Command::new(tapioctl).args(["--server", &address, "why", &subject]).output().expect("it starts");
        let answer = String::from_utf8_lossy(&why.stdout);
        println!("{answer}");
        assert!(why.status.success() && answer.contains(expected), "{subject}: {answer}");
        assert!(answer.contains("State now"), "{subject}: {answer}");
    }

    // What was missing is created; what cannot be fixed is deleted.
    namespace.apply(vec![
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a": "b"}}),
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"a": "b"}}),
    ]);
    kubectl(&["-n", &refused.0, "delete", "resourcequota", "none"]).expect("deleted");
    for name in ["no-image", "no-node", "ends-well"] {
        kubectl(&["-n", ns, "delete", "deployment", name, "--wait=false"]).expect("deleted");
    }
    kubectl(&["-n", ns, "delete", "pod", "as-root", "--wait=false"]).expect("deleted");
    for (owner, pattern) in EXPECTED.iter().filter(|(owner, _)| !["hooked", "late"].contains(owner)) {
        await_the_end(&address, ns, owner, pattern);
    }
    await_the_end(&address, &refused.0, "refused", "pods-refused");

    drop((namespace, refused));
    tapio.stop();
}

#[test]
fn stuck_pods_are_reported_until_it_is_over() {
    if !has_node("stuck_pods_are_reported_until_it_is_over") {
        return;
    }
    let tapio = Beside::start_with(", stuck_after: 5s");
    let address = tapio.server.address();
    let namespace = Namespace::make("stuck");
    let ns = &namespace.0;
    let mut unready = container("web", CALM);
    unready["readinessProbe"] =
        json!({"exec": {"command": ["/bin/busybox", "test", "-e", "/ready"]}, "periodSeconds": 1});
    let mut waits = pod("waits", "Always", container("web", CALM));
    waits["spec"]["initContainers"] = json!([container("wait", "while ! [ -e /go ]; do busybox sleep 0.2; done")]);
    let mut held = pod("held", "Always", container("web", CALM));
    held["metadata"]["finalizers"] = json!(["tapio.test/hold"]);
    namespace.apply(vec![deployment("unready", unready), waits, held]);
    await_that("the pod that is held", |seen| {
        seen.clone_from(&namespace.get("pod/held", "{.status.phase}"));
        (seen == "Running").then_some(())
    });
    kubectl(&["-n", ns, "delete", "pod", "held", "--wait=false"]).expect("asked to go");
    let expected = [("unready", "never-ready"), ("waits", "init-container-runs"), ("held", "never-goes")];
    for (owner, pattern) in expected {
        await_one(&address, ns, owner, pattern);
    }

    // What was waited for comes.
    kubectl(&["-n", ns, "exec", "deploy/unready", "--", "/bin/busybox", "touch", "/ready"]).expect("made");
    kubectl(&["-n", ns, "exec", "waits", "-c", "wait", "--", "/bin/busybox", "touch", "/go"]).expect("made");
    let free = r#"{"metadata": {"finalizers": null}}"#;
    kubectl(&["-n", ns, "patch", "pod", "held", "--type=merge", "-p", free]).expect("let go");
    for (owner, pattern) in expected {
        await_the_end(&address, ns, owner, pattern);
    }
    drop(namespace);
    tapio.stop();
}

/// A priority class, which belongs to no namespace; dropping takes it away.
struct Priority(String);

impl Priority {
    fn make(namespace: &Namespace) -> Self {
        let name = format!("{}-urgent", namespace.0);
        let class = json!({
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": 1_000_000,
        });
        kubectl_reading(&["apply", "-f", "-"], &class.to_string()).expect("applied");
        Self(name)
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        // Best effort: the namespace with all that used it goes as well.
        let _ = kubectl(&["delete", "priorityclass", &self.0, "--wait=false"]);
    }
}

/// A pod that asks for more than half of the node's CPUs.
fn greedy(name: &str, node_milli: u64) -> Value {
    let mut one = container("web", CALM);
    one["resources"] = json!({"requests": {"cpu": format!("{}m", node_milli * 6 / 10)}});
    pod(name, "Always", one)
}

#[test]
fn findings_name_who_deleted_a_pod() {
    if !has_node("findings_name_who_deleted_a_pod") {
        return;
    }
    let tapio = Beside::start();
    let address = tapio.server.address();
    let namespace = Namespace::make("gone");
    let ns = &namespace.0;
    let urgent = Priority::make(&namespace);
    let cpus = kubectl(&["get", "node", &setting("TAPIO_TEST_NODE"), "-o", "jsonpath={.status.allocatable.cpu}"]);
    let cpus: u64 = cpus.expect("the node").trim().parse().expect("whole CPUs");
    let mut hurried = pod("hurried", "Never", container("work", CALM));
    hurried["spec"]["activeDeadlineSeconds"] = json!(5);
    let import = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "import"},
        "spec": {"backoffLimit": 0, "template": {"spec": pod("x", "Never", container("work", "exit 1"))["spec"]}},
    });
    let mut shrinking = deployment("shrinking", container("web", CALM));
    shrinking["spec"]["replicas"] = json!(3);
    let deleted = pod("deleted", "Always", container("web", CALM));
    namespace.apply(vec![hurried, import, shrinking, deleted, greedy("modest", cpus * 1000)]);

    for (owner, pattern) in [("hurried", "deadline-exceeded"), ("import", "job-failed")] {
        await_one(&address, ns, owner, pattern);
    }
    await_that("three replicas", |seen| {
        seen.clone_from(&namespace.get("deployment/shrinking", "{.status.readyReplicas}"));
        (seen == "3").then_some(())
    });
    kubectl(&["-n", ns, "scale", "deployment", "shrinking", "--replicas=1"]).expect("scaled");
    namespace.wait_running("pod/deleted");
    kubectl(&["-n", ns, "delete", "pod", "deleted", "--wait=false"]).expect("deleted");
    namespace.wait_running("pod/modest");
    let mut pressing = greedy("pressing", cpus * 1000);
    pressing["spec"]["priorityClassName"] = json!(urgent.0);
    namespace.apply(vec![pressing]);
    for (owner, pattern) in [("shrinking", "ended-by-controller"), ("deleted", "pod-deleted"), ("modest", "preempted")]
    {
        await_one(&address, ns, owner, pattern);
    }

    drop((namespace, urgent));
    tapio.stop();
}
