//! A second node where there is one kubelet: a Node that nobody runs, and its collector, which is a process of this machine.
//! So are the containers of its pods, in cgroups as kubelet and containerd would name them.

use std::path::PathBuf;
use std::process::{Child, Command};

use serde_json::{Value, json};
use tapio_perf::inject::cgroup::{Cgroup, Hierarchies};
use tapio_perf::kubelet::ContainerName;
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, http};

use crate::kube_node::installed::{NAMESPACE, Pod};
use crate::kube_node::{Namespace, await_that, container, kubectl, kubectl_reading, pod, setting};

pub const NODE: &str = "tapio-test-node2";
const POD: &str = "tapio-test-collector";

/// A Node with a pod of the collectors' account, for the pod's token. Both go when this is dropped.
pub struct Elsewhere {
    folder: tempfile::TempDir,
}

impl Elsewhere {
    pub fn make() -> Self {
        // Without the label of its operating system, so that no DaemonSet waits for it.
        let node =
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}, "spec": {"unschedulable": true}});
        let elsewhere = Self { folder: tempfile::tempdir().expect("a folder") };
        kubectl_reading(&["apply", "-f", "-"], &node.to_string()).expect("a node");
        let mut pod = pod(POD, "Never", container("app", "busybox sleep 600"));
        pod["spec"]["nodeName"] = json!(NODE);
        pod["spec"]["serviceAccountName"] = json!("tapio-collector");
        pod["spec"]["tolerations"] = json!([{"operator": "Exists"}]);
        kubectl_reading(&["-n", NAMESPACE, "apply", "-f", "-"], &pod.to_string()).expect("a pod");
        elsewhere
    }

    /// Starts its collector, which ships what the Kubernetes API says to `server`.
    pub fn collector(&self, server: &Pod) -> Collector {
        self.collector_of(server, Feed::Shm)
    }

    /// The same, with what goes through the network of this machine. Both nodes have one kernel, so no process dies here.
    pub fn network_collector(&self, server: &Pod) -> Collector {
        self.collector_of(server, Feed::Ebpf)
    }

    fn collector_of(&self, server: &Pod, feed: Feed) -> Collector {
        let options = CollectorOptions {
            node: NODE.into(),
            server: format!("{}:9090", server.address),
            feed,
            also: vec!["k8s".into()],
            extra_ebpf: ", enable_process: false, enable_memory: false".into(),
            extra_grpc: format!(", token_file: {}, token_without_tls: true", self.token().display()),
            ..CollectorOptions::default()
        };
        let mut collector = Collector::prepare(&options).unwrap_or_else(|error| panic!("{error}"));
        // Where the Lease is.
        collector.set_environment("POD_NAMESPACE", NAMESPACE.into());
        collector.spawn().unwrap_or_else(|error| panic!("{error}"));
        collector.wait_ready().unwrap_or_else(|error| panic!("{error}\n{}", collector.output()));
        collector
    }

    /// Runs a pod whose container repeats `commands`, in the node's network.
    pub fn run(&self, namespace: &Namespace, name: &str, commands: &str) -> Running {
        let mut object = pod(name, "Always", container("app", commands));
        object["spec"]["nodeName"] = json!(NODE);
        object["spec"]["hostNetwork"] = json!(true);
        object["spec"]["tolerations"] = json!([{"operator": "Exists"}]);
        namespace.apply(vec![object]);
        let text = kubectl(&["-n", &namespace.0, "get", "pod", name, "-o", "json"]).expect("the pod");
        let mut object: Value = serde_json::from_str(&text).expect("JSON");
        let pod_uid = object["metadata"]["uid"].as_str().expect("a uid").to_owned();
        let container_id = pod_uid.replace('-', "").repeat(2);

        let hierarchies = Hierarchies::find().unwrap_or_else(|error| panic!("{error}"));
        let path = ContainerName { pod_uid, container_id: container_id.clone() }.path();
        let cgroup = Cgroup::create(&hierarchies.v2, &path, false).unwrap_or_else(|error| panic!("{error}"));
        let file = self.folder.path().join(&container_id);
        std::fs::write(&file, "").expect("written");
        let script = format!("while [ -e {} ]; do {commands}; done", file.display());
        let enter = r#"echo 0 >"$0/cgroup.procs"; exec busybox sh -c "$1""#;
        let process = Command::new("sh").args(["-ec", enter]).arg(cgroup.path()).arg(script).spawn();
        let process = process.expect("it starts");
        let running = Running { namespace: namespace.0.clone(), name: name.to_owned(), file, process, _cgroup: cgroup };

        // What kubelet would say of it.
        let started = object["metadata"]["creationTimestamp"].clone();
        object["status"]["phase"] = json!("Running");
        object["status"]["containerStatuses"] = json!([{
            "name": "app", "image": setting("TAPIO_TEST_IMAGE"), "imageID": "", "ready": true, "started": true,
            "restartCount": 0, "containerID": format!("containerd://{container_id}"),
            "state": {"running": {"startedAt": started}},
        }]);
        let path = format!("/api/v1/namespaces/{}/pods/{name}/status", namespace.0);
        kubectl_reading(&["replace", "--raw", &path, "-f", "-"], &object.to_string()).expect("its status is written");
        running
    }

    /// A token as kubelet would give it to the pod.
    fn token(&self) -> PathBuf {
        let bound = ["--bound-object-kind=Pod", "--bound-object-name", POD];
        let options = ["--audience=tapio-server", "--duration=1h"];
        let command = [&["-n", NAMESPACE, "create", "token", "tapio-collector"][..], &options, &bound].concat();
        let token = kubectl(&command).unwrap_or_else(|error| panic!("{error}"));
        let path = self.folder.path().join("token");
        std::fs::write(&path, token).expect("written");
        path
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        // No kubelet confirms that the pod is gone.
        let pod = ["-n", NAMESPACE, "delete", "pod", POD, "--grace-period=0", "--force", "--ignore-not-found"];
        for command in [&pod[..], &["delete", "node", NODE, "--ignore-not-found"]] {
            if let Err(error) = kubectl(command) {
                eprintln!("{NODE} is left behind: {error}");
            }
        }
    }
}

/// A pod of the second node. It ends by itself, with code 0, when this is dropped.
pub struct Running {
    namespace: String,
    name: String,
    /// It goes on as long as this is there.
    file: PathBuf,
    process: Child,
    // Removed when its process has ended.
    _cgroup: Cgroup,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
        let _ = self.process.wait();
        // No kubelet confirms that it is gone.
        if let Err(error) =
            kubectl(&["-n", &self.namespace, "delete", "pod", &self.name, "--grace-period=0", "--force"])
        {
            eprintln!("{}/{} is left behind: {error}", self.namespace, self.name);
        }
    }
}

/// Waits until a collector watches the cluster.
pub fn await_leader(collector: &Collector) {
    await_that("the election", |seen| {
        let (_, text) = http::get(collector.port(), "/metrics").map_err(|error| *seen = error.to_string()).ok()?;
        text.contains("tapio_collector_kube_leader 1").then_some(())
    });
}
