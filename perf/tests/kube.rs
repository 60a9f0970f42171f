//! On a real Kubernetes node: real pods fail in the ways that pods fail, and each is told with its right names.
//!
//! Runs only by `make test-kube`, which starts a node where there is none (see `perf/lab/kube/`).

mod kube_archive;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use kube_archive::Archive;
use serde_json::{Value, json};
use tapio_perf::clock::wait_for;
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions, bin_dir, binary, http};

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

/// Waits until `tapioctl findings` lists one of a pattern about a container, pod or workload of this name: names that came late
/// included. Gives its JSON.
fn listed(server: &str, pattern: &str, name: impl Fn(&str) -> bool) -> Value {
    let folder = bin_dir(None).expect("the programs' folder");
    let tapioctl = binary("tapioctl", &folder).unwrap_or_else(|error| panic!("{error}"));
    let found = wait_for(&format!("a finding of {pattern}"), LIMIT, |seen| {
        tapio_perf::clock::pause(Duration::from_millis(300))?;
        let arguments = ["--server", server, "findings", "-o", "json", "--limit", "500"];
        let output = Command::new(&tapioctl).args(arguments).output().expect("tapioctl starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let all: Vec<Value> = String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(|line| serde_json::from_str(line).expect("an object a line"))
            .collect();
        *seen =
            all.iter().map(|one| format!("\n{} {} {}", one["pattern"], one["entity"]["name"], one["title"])).collect();
        Ok(all.into_iter().find(|one| one["pattern"] == pattern && one["entity"]["name"].as_str().is_some_and(&name)))
    });
    found.unwrap_or_else(|error| panic!("{error}"))
}

/// Shows a finding as an operator sees it.
fn print(server: &str, finding: &Value) {
    let tapioctl = bin_dir(None).expect("the programs' folder").join("tapioctl");
    let id = finding["id"].as_str().expect("an id");
    let output = Command::new(tapioctl).args(["--server", server, "finding", id]).output().expect("tapioctl starts");
    println!("{}", String::from_utf8_lossy(&output.stdout));
}

/// What the entity of a finding is called, part by part.
fn named(finding: &Value) -> (String, String, String, String) {
    let part = |key: &str| finding["entity"][key].as_str().unwrap_or_default().to_owned();
    (part("namespace"), part("pod"), part("container"), part("workload"))
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
    let address = server.address();
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
    // Kubelet itself evicts what writes more than it may.
    let mut hoarder = container("hoard", "busybox dd if=/dev/zero of=/hoard bs=1M count=20; busybox sleep 600");
    hoarder["resources"] = json!({"limits": {"ephemeral-storage": "5Mi"}});
    let mut front = deployment("front", sleeper("web"));
    front["spec"]["replicas"] = json!(2);
    front["spec"]["strategy"] = json!({"rollingUpdate": {"maxSurge": 2, "maxUnavailable": 1}});
    namespace.apply(vec![
        deployment("leak", eater),
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
    wait_for("the label beside the death", LIMIT, |seen| {
        tapio_perf::clock::pause(Duration::from_millis(300))?;
        let found = listed(&address, "memory-limit-kill", of_leak);
        *seen = found["death"].to_string();
        Ok((found["death"]["label"] == "OOMKilled" && found["death"]["label_agrees"] == true).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}"));
    print(&address, &found);

    // Killed by somebody on the host.
    namespace.wait_running("pod/target");
    let id = namespace.get("pod/target", "{.status.containerStatuses[0].containerID}");
    let id = id.rsplit('/').next().expect("an id").to_owned();
    let of_target = |name: &str| name == format!("{ns}/target/app");
    lab.wait_archived(of_target, &["container_state", "state=2"]);
    let pid = process_of(&id).expect("its process runs here");
    let killed = Command::new("sh").args(["-c", &format!("kill -9 {pid}")]).status().expect("sh starts");
    assert!(killed.success());
    let found = listed(&address, "killed-from-outside", of_target);
    assert_eq!(found["entity"]["container_id"], id, "{found}");
    assert_eq!(found["death"]["sender"]["comm"], "sh", "{found}");
    lab.wait_archived(of_target, &["container_state", "state=3", "exit=137"]);

    // Crashes again and again. A container that dies at once is found before Kubernetes named it: its finding is told again.
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

    // Lived 300 ms: what the kernel told of it has its name, and so has what kubelet told.
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
        kubectl(&["create", "--raw", &path, "-f", "-"], Some(&eviction))
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
