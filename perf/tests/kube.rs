//! On a real Kubernetes node: real pods fail in the ways that pods fail, and each is told with its right names.
//!
//! Runs only by `make test-kube`, which starts a node where there is none (see `perf/lab/kube/`).

mod kube_archive;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use kube_archive::Archive;
use serde_json::{Value, json};
use tapio_perf::client::FindingWatch;
use tapio_perf::clock::wait_for;
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions, http};

const LIMIT: Duration = Duration::from_secs(120);

fn setting(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("set {name}; `make test-kube` does"))
}

fn kubectl(arguments: &[&str], input: Option<&Value>) -> Result<String, String> {
    let mut command = Command::new("kubectl");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("kubectl starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    if let Some(input) = input {
        use std::io::Write;
        stdin.write_all(input.to_string().as_bytes()).expect("written");
    }
    drop(stdin);
    let output = child.wait_with_output().expect("kubectl ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(text) } else { Err(error) }
}

/// A namespace that goes with everything in it.
struct Namespace(String);

impl Namespace {
    fn make() -> Self {
        let name = format!("tapio-test-{}", std::process::id());
        kubectl(&["create", "namespace", &name], None).expect("a namespace");
        wait_for("the service account", LIMIT, |seen| {
            let found = kubectl(&["-n", &name, "get", "serviceaccount", "default"], None);
            Ok(found.map_err(|error| *seen = error).ok())
        })
        .expect("a service account");
        Self(name)
    }

    fn apply(&self, objects: Vec<Value>) {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        kubectl(&["-n", &self.0, "apply", "-f", "-"], Some(&list)).expect("applied");
    }

    fn get(&self, what: &str, path: &str) -> String {
        let output = format!("jsonpath={path}");
        kubectl(&["-n", &self.0, "get", what, "-o", &output], None).unwrap_or_default()
    }

    fn wait_running(&self, pod: &str) {
        let path = "{.status.containerStatuses[0].state.running.startedAt}";
        wait_for("a running pod", LIMIT, |seen| {
            seen.clone_from(&self.get(pod, path));
            Ok((!seen.is_empty()).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{pod}: {error}"));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let deleted = kubectl(&["delete", "namespace", &self.0, "--timeout=90s"], None);
        if let Err(error) = deleted {
            eprintln!("{} is left behind: {error}", self.0);
        }
    }
}

fn container(name: &str, script: &str) -> Value {
    json!({"name": name, "image": setting("TAPIO_TEST_IMAGE"), "imagePullPolicy": "IfNotPresent", "command": ["/bin/sh", "-c", script]})
}

fn pod(name: &str, policy: &str, container: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"restartPolicy": policy, "terminationGracePeriodSeconds": 1, "containers": [container]},
    })
}

fn deployment(name: &str, container: Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "replicas": 1, "progressDeadlineSeconds": 30, "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": {"terminationGracePeriodSeconds": 1, "containers": [container]}},
        },
    })
}

/// A process of the container, found by the cgroup that is named after it.
fn process_of(container_id: &str) -> Option<u32> {
    for entry in std::fs::read_dir("/proc").expect("/proc is mounted").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let cgroups = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        if cgroups.contains(container_id) {
            return Some(pid);
        }
    }
    None
}

struct Lab {
    archive: std::path::PathBuf,
}

impl Lab {
    /// Waits until an event of an entity of this name was archived whose text has all `parts`.
    fn wait_archived(&self, name: impl Fn(&str) -> bool, parts: &[&str]) -> String {
        let found = wait_for(&format!("an archived event with {parts:?}"), LIMIT, |seen| {
            // Each look reads the whole archive.
            tapio_perf::clock::pause(Duration::from_millis(300))?;
            let archive = Archive::read(&self.archive);
            let found = archive.find(&name, parts);
            if found.is_none() {
                *seen = archive.texts(&name).join("\n");
            }
            Ok(found)
        });
        found.unwrap_or_else(|error| panic!("{error}"))
    }
}

fn finding(watch: &mut FindingWatch, pattern: &str, name: impl Fn(&str) -> bool) -> tapio_wire::service::Finding {
    let wanted = |finding: &tapio_wire::service::Finding| {
        finding.pattern == pattern && finding.entity.as_ref().is_some_and(|entity| name(&entity.name))
    };
    match watch.wait(LIMIT, wanted).expect("the server runs") {
        Some(arrival) => arrival.finding,
        None => {
            let seen: Vec<&str> = watch.seen().iter().map(|arrival| &*arrival.finding.title).collect();
            panic!("no {pattern}; there are {seen:#?}")
        }
    }
}

#[test]
fn what_befalls_real_pods_is_told_with_their_names() {
    if std::env::var("TAPIO_KUBE_TEST").as_deref() != Ok("1") {
        eprintln!(
            "SKIP what_befalls_real_pods_is_told_with_their_names: needs a Kubernetes node; run `make test-kube`"
        );
        return;
    }
    let node = setting("TAPIO_TEST_NODE");
    let mut server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let options = CollectorOptions { node, server: server.address(), feed: Feed::Kube, ..CollectorOptions::default() };
    let mut collector = Collector::start(&options).unwrap_or_else(|error| panic!("{error}"));
    let mut findings = FindingWatch::start(&server.address()).unwrap_or_else(|error| panic!("{error}"));
    let lab = Lab { archive: server.archive_dir().to_owned() };
    let is_leader = || {
        let (_, text) = http::get(collector.port(), "/metrics")?;
        Ok(text.contains("tapio_collector_kube_leader 1").then_some(()))
    };
    wait_for("the election", LIMIT, |_| is_leader()).unwrap_or_else(|error| panic!("{error}"));

    let namespace = Namespace::make();
    let ns = &namespace.0;
    let mut eater = container("eater", "busybox sleep 8; busybox tail /dev/zero");
    eater["resources"] = json!({"limits": {"memory": "24Mi"}});
    let mut probed = container("probed", "busybox sleep 600");
    probed["livenessProbe"] =
        json!({"exec": {"command": ["/bin/busybox", "false"]}, "periodSeconds": 1, "failureThreshold": 1});
    let sleeper = |name| container(name, "busybox sleep 600");
    namespace.apply(vec![
        deployment("leak", eater),
        pod("looper", "Always", container("loop", "exit 3")),
        pod("stuck", "Always", probed),
        pod("evictee", "Never", sleeper("guest")),
        pod("target", "Never", sleeper("app")),
        pod("brief", "Never", container("blink", "busybox sleep 0.3")),
        deployment("front", sleeper("web")),
    ]);

    // Killed for its memory limit.
    let of_leak = |name: &str| name.starts_with(&format!("{ns}/leak-")) && name.ends_with("/eater");
    let found = finding(&mut findings, "memory-limit-kill", of_leak);
    assert!(found.title.contains("/eater"), "{}", found.title);
    lab.wait_archived(of_leak, &["container_state", "reason=OOMKilled", "exit=137"]);

    // Killed by somebody on the host.
    namespace.wait_running("pod/target");
    let id = namespace.get("pod/target", "{.status.containerStatuses[0].containerID}");
    let id = id.rsplit('/').next().expect("an id").to_owned();
    let of_target = |name: &str| name == format!("{ns}/target/app");
    lab.wait_archived(of_target, &["container_state", "state=2"]);
    let pid = process_of(&id).expect("its process runs here");
    let killed = Command::new("sh").args(["-c", &format!("kill -9 {pid}")]).status().expect("sh starts");
    assert!(killed.success());
    let found = finding(&mut findings, "killed-from-outside", of_target);
    assert_eq!(found.entity.expect("an entity").container_id, id);
    lab.wait_archived(of_target, &["container_state", "state=3", "exit=137"]);

    // Crashes again and again. A container that dies at once may be found before Kubernetes named it: its pod is known.
    let found = finding(&mut findings, "crash-loop", |name| name.starts_with(&format!("{ns}/looper/")));
    let crashed = found.entity.expect("an entity").id;
    let wanted = format!("{ns}/looper/loop");
    wait_for("the crashed container's name", LIMIT, |seen| {
        tapio_perf::clock::pause(Duration::from_millis(300))?;
        *seen = Archive::read(&lab.archive).name(crashed).unwrap_or_default();
        Ok((*seen == wanted).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}"));
    lab.wait_archived(|name| name == format!("{ns}/looper/loop"), &["container_state", "reason=CrashLoopBackOff"]);

    // Fails its liveness probe.
    lab.wait_archived(|name| name == format!("{ns}/stuck"), &["kube_event", "Unhealthy"]);
    lab.wait_archived(|name| name == format!("{ns}/stuck/probed"), &["container_state", "state=3", "exit=137"]);
    lab.wait_archived(|name| name == format!("{ns}/stuck/probed"), &["signal", "signal=9"]);

    // Lived 300 ms: what the kernel told of it has its name, and so has what kubelet told.
    let of_brief = |name: &str| name == format!("{ns}/brief/blink");
    lab.wait_archived(of_brief, &["container_state", "state=3", "exit=0"]);
    lab.wait_archived(of_brief, &["exit", "status=0", "comm=busybox"]);

    // Evicted through the API.
    namespace.wait_running("pod/evictee");
    let path = format!("/api/v1/namespaces/{ns}/pods/evictee/eviction");
    let evict = |version: &str| {
        let eviction =
            json!({"apiVersion": version, "kind": "Eviction", "metadata": {"name": "evictee", "namespace": ns}});
        kubectl(&["create", "--raw", &path, "-f", "-"], Some(&eviction))
    };
    evict("policy/v1").or_else(|_| evict("policy/v1beta1")).expect("evicted");
    let of_evictee = |name: &str| name == format!("{ns}/evictee");
    lab.wait_archived(of_evictee, &["pod_state", "deleted=true"]);
    lab.wait_archived(of_evictee, &["pod_state", "gone=true"]);

    // A rollout of what crashes.
    let is_ready = |seen: &mut String| {
        seen.clone_from(&namespace.get("deployment/front", "{.status.readyReplicas}"));
        Ok((seen == "1").then_some(()))
    };
    wait_for("the first release", LIMIT, is_ready).unwrap_or_else(|error| panic!("{error}"));
    let mut bad = container("web", "exit 1");
    bad["image"] = json!(setting("TAPIO_TEST_IMAGE_NEXT"));
    namespace.apply(vec![deployment("front", bad)]);
    let of_front = |name: &str| name == format!("Deployment {ns}/front");
    let (before, after) = (setting("TAPIO_TEST_IMAGE"), setting("TAPIO_TEST_IMAGE_NEXT"));
    lab.wait_archived(of_front, &["rollout", "kind=Deployment", &format!("images={after} before={before}")]);
    let of_web = |name: &str| name.starts_with(&format!("{ns}/front-")) && name.ends_with("/web");
    lab.wait_archived(of_web, &["container_state", "exit=1", &format!("image={after}")]);
    lab.wait_archived(of_front, &["rollout", "kind=Deployment", "reason=ProgressDeadlineExceeded"]);

    let (_, metrics) = http::get(collector.port(), "/metrics").unwrap_or_else(|error| panic!("{error}"));
    for line in metrics.lines().filter(|line| line.starts_with("tapio_collector_events_identity_total")) {
        println!("{line}");
    }
    drop(namespace);
    let status = collector.stop().unwrap_or_else(|error| panic!("{error}"));
    assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", collector.output());
    server.stop().unwrap_or_else(|error| panic!("{error}"));
    assert!(Path::new(&lab.archive).exists());
}
