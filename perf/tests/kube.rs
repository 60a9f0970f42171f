//! On a real Kubernetes node: real pods fail in the ways that pods fail, and each is found under its right names.
//!
//! Runs only by `make test-kube`, which starts a node where there is none (see `perf/lab/kube/`).

use std::process::Command;

use crate::kube_archive::Archive;
use crate::kube_node::beside::Beside;
use crate::kube_node::findings::{findings, listed, named, print};
use crate::kube_node::release::Front;
use crate::kube_node::{
    Namespace, await_that, container, deployment, eater, has_node, kubectl, kubectl_reading, pod, setting,
};
use serde_json::{Value, json};
use tapio_perf::processes::http;

struct Lab {
    archive: std::path::PathBuf,
    address: String,
    /// The pods' namespace.
    ns: String,
}

impl Lab {
    /// Waits until an event of an entity of this name was archived whose text has all `parts`.
    fn wait_archived(&self, name: impl Fn(&str) -> bool, parts: &[&str]) -> String {
        await_that(&format!("an archived event with {parts:?}"), |seen| {
            let archive = Archive::read(&self.archive);
            let found = archive.find(&name, parts);
            if found.is_none() {
                *seen = archive.texts(&name).join("\n");
            }
            found
        })
    }

    fn a_memory_limit_kill_is_found(&self) {
        let of_leak = |name: &str| name.starts_with(&format!("{}/leak-", self.ns)) && name.ends_with("/eater");
        self.wait_archived(of_leak, &["container_state", "reason=OOMKilled", "exit=137"]);
        let found = listed(&self.address, "memory-limit-kill", of_leak);
        assert!(found["title"].as_str().is_some_and(|title| title.contains("/eater")), "{found}");
        let (of_namespace, _, of_container, workload) = named(&found);
        assert_eq!((&*of_namespace, &*of_container, &*workload), (&*self.ns, "eater", "Deployment/leak"), "{found}");
        await_that("the label beside the death", |seen| {
            let found = listed(&self.address, "memory-limit-kill", of_leak);
            *seen = found["death"].to_string();
            let is_named = found["death"]["label"].as_str().is_some_and(|label| label.starts_with("OOMKilled"));
            (is_named && found["death"]["label_agrees"] == true).then_some(())
        });
        print(&self.address, &found);
        self.kubectl_shows_it(&found);
    }

    /// Looks at the pod and its workload; collectors do not report Tapio's own Events.
    fn kubectl_shows_it(&self, found: &Value) {
        let (pod, id) = (found["entity"]["pod"].as_str().expect("a pod"), found["id"].as_str().expect("an id"));
        let described = await_that("the Event that kubectl describe shows", |seen| {
            *seen = kubectl(&["-n", &self.ns, "describe", "pod", pod]).ok()?;
            let line = seen.lines().find(|line| line.contains("TapioMemoryLimitKill") && line.contains(id));
            line.map(str::to_owned)
        });
        println!("{described}");
        assert!(described.trim_start().starts_with("Warning"), "{described}");
        let of_workload = "involvedObject.kind=Deployment,involvedObject.name=leak";
        await_that("the workload's Event", |seen| {
            *seen = kubectl(&["-n", &self.ns, "get", "events", "--field-selector", of_workload]).ok()?;
            seen.contains("TapioMemoryLimitKill").then_some(())
        });
        let archive = Archive::read(&self.archive);
        assert!(archive.find(|_| true, &["kube_event", "TapioMemoryLimitKill"]).is_none());
    }

    fn a_kill_from_the_host_is_found(&self, namespace: &Namespace) {
        let (id, pid) = namespace.process_of("pod/target");
        let of_target = |name: &str| name == format!("{}/target/app", self.ns);
        self.wait_archived(of_target, &["container_state", "state=2"]);
        let killed = Command::new("sh").args(["-c", &format!("kill -9 {pid}")]).status().expect("sh starts");
        assert!(killed.success());
        let found = listed(&self.address, "killed-from-outside", of_target);
        assert_eq!(found["entity"]["container_id"], id, "{found}");
        assert_eq!(found["death"]["sender"]["comm"], "sh", "{found}");
        self.wait_archived(of_target, &["container_state", "state=3", "exit=137"]);
    }

    /// A crash loop, a failed liveness probe, and an eviction by kubelet.
    fn failures_that_kubelet_sees_are_found(&self) {
        // A container that dies at once is found before Kubernetes named it: its finding is published again.
        let of_loop = |name: &str| name == format!("{}/looper/loop", self.ns);
        let found = listed(&self.address, "crash-loop", of_loop);
        assert_eq!(found["death"]["exit_code"], 3, "{found}");
        self.wait_archived(of_loop, &["container_state", "reason=CrashLoopBackOff"]);

        let of_probed = |name: &str| name == format!("{}/stuck/probed", self.ns);
        self.wait_archived(|name| name == format!("{}/stuck", self.ns), &["kube_event", "Unhealthy"]);
        self.wait_archived(of_probed, &["container_state", "state=3", "exit=137"]);
        self.wait_archived(of_probed, &["signal", "signal=9"]);
        let found = listed(&self.address, "liveness-probe-kill", of_probed);
        assert_eq!(found["death"]["signal_name"], "SIGKILL", "{found}");

        let found =
            listed(&self.address, "storage-limit-eviction", |name| name.starts_with(&format!("{}/hoarder", self.ns)));
        let (of_namespace, of_pod, ..) = named(&found);
        assert_eq!((&*of_namespace, &*of_pod), (&*self.ns, "hoarder"), "{found}");
    }

    /// It lived 300 ms: the kernel's events of it have its name, and so have kubelet's.
    fn a_brief_pod_is_found(&self) {
        let of_brief = |name: &str| name == format!("{}/brief/blink", self.ns);
        self.wait_archived(of_brief, &["container_state", "state=3", "exit=7"]);
        self.wait_archived(of_brief, &["exit", "status=0", "comm=busybox"]);
        let found = listed(&self.address, "exited-with-error", of_brief);
        assert_eq!(named(&found).2, "blink", "{found}");
    }

    fn an_eviction_through_the_api_is_archived(&self, namespace: &Namespace) {
        namespace.wait_running("pod/evictee");
        namespace.evict("evictee");
        let of_evictee = |name: &str| name == format!("{}/evictee", self.ns);
        self.wait_archived(of_evictee, &["pod_state", "deleted=true"]);
        self.wait_archived(of_evictee, &["pod_state", "gone=true"]);
    }

    fn a_bad_release_is_found(&self) {
        let ns = &self.ns;
        let of_front = |name: &str| name == format!("Deployment {ns}/front");
        let (before, after) = (setting("TAPIO_TEST_IMAGE"), setting("TAPIO_TEST_IMAGE_NEXT"));
        self.wait_archived(of_front, &["rollout", "kind=Deployment", &format!("images={after} before={before}")]);
        let of_web = |name: &str| name.starts_with(&format!("{ns}/front-")) && name.ends_with("/web");
        self.wait_archived(of_web, &["container_state", "exit=1", &format!("image={after}")]);
        let found = listed(&self.address, "bad-release", |name| name.contains(&format!("{ns}/front")));
        let (of_namespace, _, _, workload) = named(&found);
        assert_eq!((&*of_namespace, &*workload), (&**ns, "Deployment/front"), "{found}");
        assert!(found["title"].as_str().is_some_and(|title| title.contains(&after)), "{found}");
        self.wait_archived(of_front, &["rollout", "kind=Deployment", "reason=ProgressDeadlineExceeded"]);
    }
}

/// Writes the Event that kubelet writes of every OOM kill that it finds in the kernel's log.
fn explain_a_system_oom(victim: &str) {
    let node = setting("TAPIO_TEST_NODE");
    let now = Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]).output().expect("date starts").stdout;
    let now = String::from_utf8_lossy(&now).trim().to_owned();
    let event = json!({
        "apiVersion": "v1", "kind": "Event", "metadata": {"name": format!("{node}.{victim}"), "namespace": "default"},
        "involvedObject": {"kind": "Node", "name": node, "uid": node}, "source": {"component": "kubelet", "host": node},
        "type": "Warning", "reason": "SystemOOM", "count": 1, "firstTimestamp": now, "lastTimestamp": now,
        "message": format!("System OOM encountered, victim process: {victim}, pid: 1"),
    });
    kubectl_reading(&["create", "-f", "-"], &event.to_string()).expect("created");
}

/// The pods that fail, and those that are made to.
fn failing(front: &Front) -> Vec<Value> {
    let mut probed = container("probed", "busybox sleep 600");
    probed["livenessProbe"] =
        json!({"exec": {"command": ["/bin/busybox", "false"]}, "periodSeconds": 1, "failureThreshold": 1});
    let sleeper = |name| container(name, "busybox sleep 600");
    // Kubelet itself evicts what writes more than it may.
    let mut hoarder = container("hoard", "busybox dd if=/dev/zero of=/hoard bs=1M count=20; busybox sleep 600");
    hoarder["resources"] = json!({"limits": {"ephemeral-storage": "5Mi"}});
    vec![
        deployment("leak", eater("eater")),
        pod("looper", "Always", container("loop", "exit 3")),
        pod("stuck", "Always", probed),
        pod("evictee", "Never", sleeper("guest")),
        pod("target", "Never", sleeper("app")),
        pod("brief", "Never", container("blink", "busybox sleep 0.3; exit 7")),
        pod("hoarder", "Never", hoarder),
        front.object(),
    ]
}

#[test]
fn failures_of_real_pods_are_reported_with_their_names() {
    if !has_node("failures_of_real_pods_are_reported_with_their_names") {
        return;
    }
    let tapio = Beside::start();
    let namespace = Namespace::make("pods");
    let lab = Lab {
        archive: tapio.server.archive_dir().to_owned(),
        address: tapio.server.address(),
        ns: namespace.0.clone(),
    };
    // A pod that runs for a moment before it crashes has not made the release.
    let front = Front::running("busybox sleep 600", 5, 2, 1);
    namespace.apply(failing(&front));

    lab.a_memory_limit_kill_is_found();
    lab.a_kill_from_the_host_is_found(&namespace);
    lab.failures_that_kubelet_sees_are_found();
    // At each start kubelet reports old kills again, as if the node had run out: nothing is concluded from that.
    let gone = format!("gone-{}", std::process::id());
    explain_a_system_oom(&gone);
    lab.wait_archived(|_| true, &["kube_event", "SystemOOM", &gone]);
    lab.a_brief_pod_is_found();
    lab.an_eviction_through_the_api_is_archived(&namespace);
    front.replace(&namespace, "exit 1");
    lab.a_bad_release_is_found();

    for finding in findings(&lab.address) {
        let text = finding.to_string();
        assert!(!text.contains(&gone) && !text.contains("SystemOOM"), "{text}");
    }

    let (_, metrics) = http::get(tapio.collector.port(), "/metrics").unwrap_or_else(|error| panic!("{error}"));
    for line in metrics.lines().filter(|line| line.starts_with("tapio_collector_events_identity_total")) {
        println!("{line}");
    }
    drop(namespace);
    tapio.stop();
}
