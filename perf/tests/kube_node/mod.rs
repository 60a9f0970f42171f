//! What the tests on a real Kubernetes node share: kubectl, a namespace that goes with everything in it, pods to put there,
//! and Tapio itself as its manifests install it.

#![allow(dead_code, reason = "every test program uses its part of this module")]

pub mod beside;
pub mod findings;
pub mod frames;
pub mod installed;
pub mod release;

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tapio_perf::clock::{pause, wait_for};

/// How long anything may take on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(120);
/// Between two questions that cost something to ask.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);

/// Whether there is a node; a test that is skipped says so.
pub fn has_node(test: &str) -> bool {
    let is_on = std::env::var("TAPIO_KUBE_TEST").as_deref() == Ok("1");
    if !is_on {
        eprintln!("SKIP {test}: needs a Kubernetes node; run `make test-kube`");
    }
    is_on
}

/// What `test.sh` sets.
pub fn setting(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("set {name}; `make test-kube` does"))
}

/// What kubectl says, or its error.
pub fn kubectl(arguments: &[&str]) -> Result<String, String> {
    kubectl_reading(arguments, "")
}

/// Runs kubectl with something to read.
pub fn kubectl_reading(arguments: &[&str], input: &str) -> Result<String, String> {
    let mut command = Command::new("kubectl");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("kubectl starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let written = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().expect("kubectl ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.success() && written.is_ok() {
        true => Ok(text),
        false => Err(format!("kubectl {}: {error}", arguments.join(" "))),
    }
}

/// Asks until there is an answer; the error has what was seen last.
pub fn await_that<T>(what: &str, condition: impl FnMut(&mut String) -> Option<T>) -> T {
    await_within(LIMIT, what, condition)
}

/// The same, for as long as `limit`.
pub fn await_within<T>(limit: Duration, what: &str, mut condition: impl FnMut(&mut String) -> Option<T>) -> T {
    let found = wait_for(what, limit, |seen| {
        let answer = condition(seen);
        if answer.is_none() {
            pause(LOOK_INTERVAL)?;
        }
        Ok(answer)
    });
    found.unwrap_or_else(|error| panic!("{error}"))
}

/// A namespace that goes with everything in it.
pub struct Namespace(pub String);

impl Namespace {
    /// One of this process, and what it is for.
    pub fn make(purpose: &str) -> Self {
        let namespace = Self(format!("tapio-test-{purpose}-{}", std::process::id()));
        kubectl(&["create", "namespace", &namespace.0]).expect("a namespace");
        await_that("the service account", |seen| {
            let found = kubectl(&["-n", &namespace.0, "get", "serviceaccount", "default"]);
            found.map_err(|error| *seen = error).ok()
        });
        namespace
    }

    pub fn apply(&self, objects: Vec<Value>) {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string();
        kubectl_reading(&["-n", &self.0, "apply", "-f", "-"], &list).expect("applied");
    }

    /// Deletes an object, and waits until it is gone.
    pub fn delete(&self, kind: &str, name: &str) {
        kubectl(&["-n", &self.0, "delete", kind, name, "--wait=true"]).expect("deleted");
    }

    /// A field by its JSON path; empty when there is none.
    pub fn get(&self, what: &str, path: &str) -> String {
        kubectl(&["-n", &self.0, "get", what, "-o", &format!("jsonpath={path}")]).unwrap_or_default()
    }

    pub fn wait_running(&self, pod: &str) {
        await_that(&format!("that {pod} runs"), |seen| {
            seen.clone_from(&self.get(pod, "{.status.containerStatuses[0].state.running.startedAt}"));
            (!seen.is_empty()).then_some(())
        });
    }

    /// Asks for the eviction of a pod, as `kubectl drain` does.
    pub fn evict(&self, pod: &str) {
        let path = format!("/api/v1/namespaces/{}/pods/{pod}/eviction", self.0);
        let evict = |version: &str| {
            let eviction =
                json!({"apiVersion": version, "kind": "Eviction", "metadata": {"name": pod, "namespace": self.0}});
            kubectl_reading(&["create", "--raw", &path, "-f", "-"], &eviction.to_string())
        };
        evict("policy/v1").or_else(|_| evict("policy/v1beta1")).expect("evicted");
    }

    /// The same, with the condition that the API server itself writes since Kubernetes 1.26.
    pub fn evict_with_condition(&self, pod: &str) {
        let condition = json!({
            "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting",
        });
        let patch = json!({"status": {"conditions": [condition]}}).to_string();
        kubectl(&["-n", &self.0, "patch", "pod", pod, "--subresource=status", "-p", &patch]).expect("patched");
        self.evict(pod);
    }

    /// A process of a pod's first container, on this machine.
    pub fn process_of(&self, pod: &str) -> (String, u32) {
        self.wait_running(pod);
        let id = self.get(pod, "{.status.containerStatuses[0].containerID}");
        let id = id.rsplit('/').next().expect("an id").to_owned();
        let pid = process_of(&id).expect("its process runs here");
        (id, pid)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = kubectl(&["delete", "namespace", &self.0, "--timeout=90s"]) {
            eprintln!("{} is left behind: {error}", self.0);
        }
    }
}

/// A busybox that runs a script.
pub fn container(name: &str, script: &str) -> Value {
    json!({"name": name, "image": setting("TAPIO_TEST_IMAGE"), "imagePullPolicy": "IfNotPresent", "command": ["/bin/sh", "-c", script]})
}

/// A container that runs into a memory limit of 24 MiB after a while.
pub fn eater(name: &str) -> Value {
    let mut eater = container(name, "busybox sleep 8; busybox tail /dev/zero");
    eater["resources"] = json!({"limits": {"memory": "24Mi"}});
    eater
}

pub fn pod(name: &str, policy: &str, container: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"restartPolicy": policy, "terminationGracePeriodSeconds": 1, "containers": [container]},
    })
}

pub fn deployment(name: &str, container: Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "replicas": 1, "progressDeadlineSeconds": 30, "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": {"terminationGracePeriodSeconds": 1, "containers": [container]}},
        },
    })
}

/// A process of a container, found by the cgroup that is named after it.
pub fn process_of(container_id: &str) -> Option<u32> {
    for entry in std::fs::read_dir("/proc").expect("/proc is mounted").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let cgroups = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        if cgroups.contains(container_id) {
            return Some(pid);
        }
    }
    None
}
