//! Why pods are gone, and how Jobs end.

use serde_json::{Value, json};

use super::{CALM, await_one};
use crate::kube_node::beside::Beside;
use crate::kube_node::{
    Namespace, await_that, container, deployment, has_node, kubectl, kubectl_reading, pod, setting,
};

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

/// A Job whose pods run a script, with more in its specification.
fn job(name: &str, script: &str, mut spec: Value) -> Value {
    spec["template"] = json!({"spec": pod("x", "Never", container("work", script))["spec"]});
    json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec})
}

/// A pod that writes more into a volume than the volume may have.
fn overfull() -> Value {
    let mut writer = container("writer", "busybox dd if=/dev/zero of=/scratch/a bs=1M count=20; busybox sleep 600");
    writer["volumeMounts"] = json!([{"name": "scratch", "mountPath": "/scratch"}]);
    let mut overfull = pod("overfull", "Never", writer);
    overfull["spec"]["volumes"] = json!([{"name": "scratch", "emptyDir": {"sizeLimit": "5Mi"}}]);
    overfull
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
    let mut unhooked = container("web", CALM);
    unhooked["lifecycle"] = json!({"preStop": {"exec": {"command": ["/bin/busybox", "false"]}}});
    let mut shrinking = deployment("shrinking", container("web", CALM));
    shrinking["spec"]["replicas"] = json!(3);
    let deleted = pod("deleted", "Always", container("web", CALM));
    let export = job("export", "true", json!({}));
    let import = job("import", "exit 1", json!({"backoffLimit": 0}));
    let report = job("report", CALM, json!({"activeDeadlineSeconds": 3}));
    let moved = pod("moved", "Always", container("web", CALM));
    let mut unhooked = pod("unhooked", "Always", unhooked);
    // Kubelet stops the container without waiting for a hook that takes longer.
    unhooked["spec"]["terminationGracePeriodSeconds"] = json!(30);
    namespace.apply(vec![hurried, export, import, report, shrinking, deleted, moved, unhooked, overfull()]);
    namespace.apply(vec![greedy("modest", cpus * 1000)]);

    for (owner, pattern, text) in [
        ("hurried", "deadline-exceeded", ""),
        ("import", "job-failed", "BackoffLimitExceeded"),
        ("report", "job-failed", "DeadlineExceeded"),
        ("export", "job-finished", "Job completed"),
    ] {
        await_one(&address, ns, owner, pattern, text);
    }
    for pod in ["moved", "unhooked"] {
        namespace.wait_running(&format!("pod/{pod}"));
    }
    namespace.evict_with_condition("moved");
    kubectl(&["-n", ns, "delete", "pod", "unhooked", "--wait=false"]).expect("deleted");
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
    for (owner, pattern, text) in [
        ("shrinking", "ended-by-controller", "Deleted pod"),
        ("deleted", "pod-deleted", ""),
        ("moved", "evicted-by-api", ""),
        ("unhooked", "pre-stop-failed", "preStop"),
        ("modest", "preempted", "pressing"),
        // Kubelet measures volumes once a minute.
        ("overfull", "storage-limit-eviction", "EmptyDir volume \"scratch\""),
    ] {
        await_one(&address, ns, owner, pattern, text);
    }

    drop((namespace, urgent));
    tapio.stop();
}
