//! On a real Kubernetes node: real pods fail in the ways that pods fail, and each is found under its right names.
//!
//! Runs only by `make test-kube`, which starts a node where there is none (see `perf/lab/kube/`).

use std::process::Command;

use crate::kube_archive::Archive;
use crate::kube_node::beside::Beside;
use crate::kube_node::findings::{findings, listed, named, print};
use crate::kube_node::{
    LIMIT, Namespace, await_that, container, deployment, eater, has_node, kubectl_reading, pod, setting,
};
use serde_json::json;
use tapio_perf::clock::wait_for;
use tapio_perf::processes::http;

struct Lab {
    archive: std::path::PathBuf,
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

#[test]
fn failures_of_real_pods_are_reported_with_their_names() {
    if !has_node("failures_of_real_pods_are_reported_with_their_names") {
        return;
    }
    let tapio = Beside::start();
    let address = tapio.server.address();
    let lab = Lab { archive: tapio.server.archive_dir().to_owned() };

    let namespace = Namespace::make("pods");
    let ns = &namespace.0;
    let mut probed = container("probed", "busybox sleep 600");
    probed["livenessProbe"] =
        json!({"exec": {"command": ["/bin/busybox", "false"]}, "periodSeconds": 1, "failureThreshold": 1});
    let sleeper = |name| container(name, "busybox sleep 600");
    // Kubelet itself evicts what writes more than it may.
    let mut hoarder = container("hoard", "busybox dd if=/dev/zero of=/hoard bs=1M count=20; busybox sleep 600");
    hoarder["resources"] = json!({"limits": {"ephemeral-storage": "5Mi"}});
    let mut front = deployment("front", sleeper("web"));
    front["spec"]["replicas"] = json!(2);
    // A pod that runs for a moment before it crashes has not made the release.
    front["spec"]["minReadySeconds"] = json!(5);
    front["spec"]["strategy"] = json!({"rollingUpdate": {"maxSurge": 2, "maxUnavailable": 1}});
    namespace.apply(vec![
        deployment("leak", eater("eater")),
        pod("looper", "Always", container("loop", "exit 3")),
        pod("stuck", "Always", probed),
        pod("evictee", "Never", sleeper("guest")),
        pod("target", "Never", sleeper("app")),
        pod("brief", "Never", container("blink", "busybox sleep 0.3; exit 7")),
        pod("hoarder", "Never", hoarder),
        front.clone(),
    ]);

    // Killed for its memory limit.
    let of_leak = |name: &str| name.starts_with(&format!("{ns}/leak-")) && name.ends_with("/eater");
    lab.wait_archived(of_leak, &["container_state", "reason=OOMKilled", "exit=137"]);
    let found = listed(&address, "memory-limit-kill", of_leak);
    assert!(found["title"].as_str().is_some_and(|title| title.contains("/eater")), "{found}");
    let (of_namespace, _, of_container, workload) = named(&found);
    assert_eq!((&*of_namespace, &*of_container, &*workload), (&**ns, "eater", "Deployment/leak"), "{found}");
    await_that("the label beside the death", |seen| {
        let found = listed(&address, "memory-limit-kill", of_leak);
        *seen = found["death"].to_string();
        let is_named = found["death"]["label"].as_str().is_some_and(|label| label.starts_with("OOMKilled"));
        (is_named && found["death"]["label_agrees"] == true).then_some(())
    });
    print(&address, &found);

    // Killed by somebody on the host.
    let (id, pid) = namespace.process_of("pod/target");
    let of_target = |name: &str| name == format!("{ns}/target/app");
    lab.wait_archived(of_target, &["container_state", "state=2"]);
    let killed = Command::new("sh").args(["-c", &format!("kill -9 {pid}")]).status().expect("sh starts");
    assert!(killed.success());
    let found = listed(&address, "killed-from-outside", of_target);
    assert_eq!(found["entity"]["container_id"], id, "{found}");
    assert_eq!(found["death"]["sender"]["comm"], "sh", "{found}");
    lab.wait_archived(of_target, &["container_state", "state=3", "exit=137"]);

    // Crashes again and again. A container that dies at once is found before Kubernetes named it: its finding is published again.
    let found = listed(&address, "crash-loop", |name| name == format!("{ns}/looper/loop"));
    assert_eq!(found["death"]["exit_code"], 3, "{found}");
    lab.wait_archived(|name| name == format!("{ns}/looper/loop"), &["container_state", "reason=CrashLoopBackOff"]);

    // Fails its liveness probe.
    lab.wait_archived(|name| name == format!("{ns}/stuck"), &["kube_event", "Unhealthy"]);
    lab.wait_archived(|name| name == format!("{ns}/stuck/probed"), &["container_state", "state=3", "exit=137"]);
    lab.wait_archived(|name| name == format!("{ns}/stuck/probed"), &["signal", "signal=9"]);
    let found = listed(&address, "liveness-probe-kill", |name| name == format!("{ns}/stuck/probed"));
    assert_eq!(found["death"]["signal_name"], "SIGKILL", "{found}");

    // Evicted by kubelet.
    let found = listed(&address, "evicted", |name| name.starts_with(&format!("{ns}/hoarder")));
    assert_eq!((named(&found).0, named(&found).1), (ns.clone(), "hoarder".to_owned()), "{found}");

    // At each start kubelet reports old kills again, as if the node had run out: nothing is concluded from that.
    let gone = format!("gone-{}", std::process::id());
    explain_a_system_oom(&gone);
    lab.wait_archived(|_| true, &["kube_event", "SystemOOM", &gone]);

    // Lived 300 ms: the kernel's events of it have its name, and so have kubelet's.
    let of_brief = |name: &str| name == format!("{ns}/brief/blink");
    lab.wait_archived(of_brief, &["container_state", "state=3", "exit=7"]);
    lab.wait_archived(of_brief, &["exit", "status=0", "comm=busybox"]);
    let found = listed(&address, "exited-with-error", of_brief);
    assert_eq!(named(&found).2, "blink", "{found}");

    // Evicted through the API.
    namespace.wait_running("pod/evictee");
    let path = format!("/api/v1/namespaces/{ns}/pods/evictee/eviction");
    let evict = |version: &str| {
        let eviction =
            json!({"apiVersion": version, "kind": "Eviction", "metadata": {"name": "evictee", "namespace": ns}});
        kubectl_reading(&["create", "--raw", &path, "-f", "-"], &eviction.to_string())
    };
    evict("policy/v1").or_else(|_| evict("policy/v1beta1")).expect("evicted");
    let of_evictee = |name: &str| name == format!("{ns}/evictee");
    lab.wait_archived(of_evictee, &["pod_state", "deleted=true"]);
    lab.wait_archived(of_evictee, &["pod_state", "gone=true"]);

    // A rollout of what crashes.
    let is_ready = |seen: &mut String| {
        seen.clone_from(&namespace.get("deployment/front", "{.status.readyReplicas}"));
        Ok((seen == "2").then_some(()))
    };
    wait_for("the first release", LIMIT, is_ready).unwrap_or_else(|error| panic!("{error}"));
    let mut bad = container("web", "exit 1");
    bad["image"] = json!(setting("TAPIO_TEST_IMAGE_NEXT"));
    front["spec"]["template"]["spec"]["containers"] = json!([bad]);
    namespace.apply(vec![front]);
    let of_front = |name: &str| name == format!("Deployment {ns}/front");
    let (before, after) = (setting("TAPIO_TEST_IMAGE"), setting("TAPIO_TEST_IMAGE_NEXT"));
    lab.wait_archived(of_front, &["rollout", "kind=Deployment", &format!("images={after} before={before}")]);
    let of_web = |name: &str| name.starts_with(&format!("{ns}/front-")) && name.ends_with("/web");
    lab.wait_archived(of_web, &["container_state", "exit=1", &format!("image={after}")]);
    let found = listed(&address, "bad-release", |name| name.contains(&format!("{ns}/front")));
    let (of_namespace, _, _, workload) = named(&found);
    assert_eq!((&*of_namespace, &*workload), (&**ns, "Deployment/front"), "{found}");
    assert!(found["title"].as_str().is_some_and(|title| title.contains(&after)), "{found}");
    lab.wait_archived(of_front, &["rollout", "kind=Deployment", "reason=ProgressDeadlineExceeded"]);

    for finding in findings(&address) {
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
