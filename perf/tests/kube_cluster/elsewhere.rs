//! A second node where there is one kubelet: a Node that nobody runs, and its collector, which is a process of this machine.

use std::path::PathBuf;

use serde_json::json;
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, http};

use crate::kube_node::installed::{NAMESPACE, Pod};
use crate::kube_node::{await_that, container, kubectl, kubectl_reading, pod};

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
        let options = CollectorOptions {
            node: NODE.into(),
            server: format!("{}:9090", server.address),
            feed: Feed::Shm,
            also: vec!["k8s".into()],
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

/// Waits until a collector watches the cluster.
pub fn await_leader(collector: &Collector) {
    await_that("the election", |seen| {
        let (_, text) = http::get(collector.port(), "/metrics").map_err(|error| *seen = error.to_string()).ok()?;
        text.contains("tapio_collector_kube_leader 1").then_some(())
    });
}
