//! A cluster's API server: it keeps recorded objects, and sends every change to those who watch.
//!
//! In: objects of the newest API, checked against its types. Out: lists and watches, by path and by the node of a pod. What must hold:
//! a watch that begins after a list misses no change in between.

use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Event, Node, Pod};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::server::{Answer, Api, Asked, LeaseStore, change, checked, list};

/// One change of an object.
struct Change {
    path: &'static str,
    version: u64,
    object: Value,
    is_gone: bool,
}

impl Change {
    fn is_for(&self, path: &str, node: Option<&str>) -> bool {
        let of = self.object["spec"]["nodeName"].as_str().unwrap_or_default();
        self.path == path && node.is_none_or(|node| node == of)
    }

    fn line(&self) -> Bytes {
        let kind = if self.is_gone { "DELETED" } else { "MODIFIED" };
        Bytes::from(format!("{}\n", change(kind, self.object.clone())))
    }
}

/// Who watches which path, and the pods of which node.
struct Watch {
    path: String,
    node: Option<String>,
    lines: UnboundedSender<Bytes>,
}

#[derive(Default)]
struct Kept {
    changes: Vec<Change>,
    watches: Vec<Watch>,
}

impl Kept {
    /// The version of the newest change; a list has one before there is any.
    fn version(&self) -> u64 {
        self.changes.last().map_or(1, |last| last.version)
    }

    fn answer(&mut self, asked: &Asked) -> Answer {
        let node = asked.query.get("fieldSelector").and_then(|only| only.strip_prefix("spec.nodeName="));
        let of_it = || self.changes.iter().filter(|change| change.is_for(&asked.path, node));
        if !asked.is_watch() {
            let uid = |change: &Change| change.object["metadata"]["uid"].clone();
            let is_newest = |one: &&Change| !of_it().any(|other| other.version > one.version && uid(other) == uid(one));
            let present = of_it().filter(is_newest).filter(|change| !change.is_gone);
            return list(self.version(), present.map(|change| change.object.clone()).collect());
        }
        let (lines, answer) = unbounded_channel();
        let from: u64 = asked.version().parse().unwrap_or(0);
        for missed in of_it().filter(|change| change.version > from) {
            // The other end is held here.
            let _ = lines.send(missed.line());
        }
        self.watches.push(Watch { path: asked.path.clone(), node: node.map(str::to_owned), lines });
        Answer::Live(answer)
    }

    fn change(&mut self, path: &'static str, mut object: Value, is_gone: bool) {
        let version = self.version() + 1;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let change = Change { path, version, object, is_gone };
        let is_for = |watch: &Watch| change.is_for(&watch.path, watch.node.as_deref());
        // A watch whose client has left is forgotten.
        self.watches.retain(|watch| !is_for(watch) || watch.lines.send(change.line()).is_ok());
        self.changes.push(change);
    }
}

/// The API server and what it knows.
pub struct Cluster {
    pub api: Api,
    kept: Arc<Mutex<Kept>>,
}

impl Cluster {
    /// Starts with nothing but a Lease that is free.
    pub fn start() -> Self {
        let kept = Arc::<Mutex<Kept>>::default();
        let (known, leases) = (Arc::clone(&kept), LeaseStore::default());
        let api = Api::start(move |asked| match asked.path.contains("/leases") {
            true => leases.answer(asked),
            false => known.lock().expect("no panic").answer(asked),
        });
        Self { api, kept }
    }

    /// An object is as it is here from now on.
    pub fn put(&self, object: &Value) {
        self.change(object, false);
    }

    /// An object is deleted, as it was last.
    pub fn delete(&self, object: &Value) {
        self.change(object, true);
    }

    fn change(&self, object: &Value, is_gone: bool) {
        let object = object.clone();
        let (path, object) = match object["kind"].as_str() {
            Some("Pod") => ("/api/v1/pods", checked::<Pod>(object)),
            Some("Event") => ("/api/v1/events", checked::<Event>(object)),
            Some("Node") => ("/api/v1/nodes", checked::<Node>(object)),
            Some("Job") => ("/apis/batch/v1/jobs", checked::<Job>(object)),
            kind => panic!("no path for {kind:?}"),
        };
        self.kept.lock().expect("no panic").change(path, object, is_gone);
    }
}
