//! Tapio beside a real node: its server and its elected collector as processes of this machine.

use tapio_perf::clock::wait_for;
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions, http};

use super::{LIMIT, setting};

/// A server and a collector of the node under test.
pub struct Beside {
    pub server: Server,
    pub collector: Collector,
}

impl Beside {
    /// Starts both, and waits until the collector watches the cluster.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// Starts with more in the collector's `collectors.k8s`, with a comma before.
    pub fn start_with(extra_k8s: &str) -> Self {
        let node = setting("TAPIO_TEST_NODE");
        // What it finds, `kubectl describe pod` shows.
        let kubeconfig = setting("KUBECONFIG");
        let extra_config = format!("deliver: {{kubernetes_events: {{kubeconfig: \"{kubeconfig}\"}}}}\n");
        let options = ServerOptions { extra_config, ..ServerOptions::default() };
        let server = Server::start(&options).unwrap_or_else(|error| panic!("{error}"));
        let (address, feed) = (server.address(), Feed::Kube);
        let extra_k8s = extra_k8s.to_owned();
        let options = CollectorOptions { node, server: address, feed, extra_k8s, ..CollectorOptions::default() };
        let collector = Collector::start(&options).unwrap_or_else(|error| panic!("{error}"));
        let is_leader = || {
            let (_, text) = http::get(collector.port(), "/metrics")?;
            Ok(text.contains("tapio_collector_kube_leader 1").then_some(()))
        };
        wait_for("the election", LIMIT, |_| is_leader()).unwrap_or_else(|error| panic!("{error}"));
        Self { server, collector }
    }

    /// Ends both, which must have nothing to complain of.
    pub fn stop(mut self) {
        let status = self.collector.stop().unwrap_or_else(|error| panic!("{error}"));
        assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", self.collector.output());
        self.server.stop().unwrap_or_else(|error| panic!("{error}"));
    }
}
