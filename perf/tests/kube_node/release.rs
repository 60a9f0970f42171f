//! A release whose pods crash, after one that runs.

use serde_json::{Value, json};

use super::{Namespace, await_that, container, deployment, setting};

/// A Deployment `front` of two pods.
pub struct Front(Value);

impl Front {
    /// Runs `script` in its pods. `surge` and `unavailable` are the bounds of a rolling update, and a new pod counts as
    /// ready after `min_ready_seconds`: one that crashes before has not made the release.
    pub fn running(script: &str, min_ready_seconds: u32, surge: u32, unavailable: u32) -> Self {
        let mut front = deployment("front", container("web", script));
        front["spec"]["replicas"] = json!(2);
        front["spec"]["minReadySeconds"] = json!(min_ready_seconds);
        front["spec"]["strategy"] = json!({"rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}});
        Self(front)
    }

    /// The object to apply.
    pub fn object(&self) -> Value {
        self.0.clone()
    }

    /// Waits until both pods are ready, then releases another image whose pods run `script`.
    pub fn replace(mut self, namespace: &Namespace, script: &str) {
        await_that("the first release", |seen| {
            seen.clone_from(&namespace.get("deployment/front", "{.status.readyReplicas}"));
            (seen == "2").then_some(())
        });
        let mut web = container("web", script);
        web["image"] = json!(setting("TAPIO_TEST_IMAGE_NEXT"));
        self.0["spec"]["template"]["spec"]["containers"] = json!([web]);
        namespace.apply(vec![self.0]);
    }
}
