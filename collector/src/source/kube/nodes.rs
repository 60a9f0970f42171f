//! Nodes and their conditions.
//!
//! What enters: the objects. What leaves: one event for each condition at the beginning, and when it changes. What must hold: what
//! patterns look for long after it began is reported again while it lasts: that a node is not ready for long, or cordoned.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tapio_wire::event::{Detail, NodeCondition};

use super::objects::{self, Condition, unix_ns};
use super::pods::AGAIN;
use super::report::{Subject, WatchReport};
use super::watch::{Follower, digest};
use crate::base::clock::realtime_ns;

/// How often a node that is cordoned is reported as that: a drain may begin hours after the cordon, and whoever explains it looks back
/// for half an hour.
const CORDONED_AGAIN: Duration = Duration::from_secs(600);

/// Follows them.
pub struct Nodes {
    /// How many there are, for the election; 0 before they were listed.
    count: Arc<AtomicU64>,
    seen: u64,
    is_listed: bool,
    stuck_after: Duration,
}

/// What was reported of a node.
pub struct SeenNode {
    name: String,
    /// Reported conditions: the number of the name, and what was reported.
    conditions: Vec<(u64, u64)>,
    /// Its condition Ready while that is not true, and when this was reported last.
    not_ready: Option<(Condition, Option<Instant>)>,
    /// When it was last reported to be cordoned, while it is.
    cordoned: Option<Instant>,
}

impl Nodes {
    /// None seen yet. One that is not ready for longer than `stuck_after` is reported as that.
    pub fn new(count: Arc<AtomicU64>, stuck_after: Duration) -> Self {
        Self { count, seen: 0, is_listed: false, stuck_after }
    }

    fn count(&self) {
        if self.is_listed {
            self.count.store(self.seen, Ordering::Relaxed);
        }
    }

    fn report(node: &str, condition: &Condition, reports: &mut Vec<WatchReport>) {
        let texts = [&condition.r#type, &condition.reason, &condition.message].map(Clone::clone);
        let since_ns = unix_ns(condition.last_transition_time.as_ref());
        let status = match &*condition.status {
            "True" => 1,
            "False" => 0,
            _ => 2,
        };
        reports.push(WatchReport::event(Subject::Node(node.into()), move |batch| {
            let [condition, reason, message] = texts.map(|text| batch.text(&text));
            Detail::NodeCondition(Box::new(NodeCondition { condition, reason, message, since_ns, status }))
        }));
    }
}

impl Follower for Nodes {
    type Object = objects::Node;
    type Kept = SeenNode;

    fn seen(
        &mut self,
        node: &objects::Node,
        state: Option<SeenNode>,
        _first: bool,
        reports: &mut Vec<WatchReport>,
    ) -> Option<SeenNode> {
        let name = &node.metadata.name;
        if state.is_none() {
            self.seen += 1;
            self.count();
        }
        let new = || SeenNode { name: name.clone(), conditions: Vec::new(), not_ready: None, cordoned: None };
        let mut seen = state.unwrap_or_else(new);
        let is_cordoned = node.spec.unschedulable;
        let schedulable = schedulable(!is_cordoned);
        seen.cordoned = seen.cordoned.or_else(|| Some(Instant::now())).filter(|_| is_cordoned);
        // Kubelet writes them every few minutes; only a change is news.
        for condition in node.status.conditions.iter().chain([&schedulable]) {
            let key = digest(&condition.r#type);
            let print = digest(&(&condition.status, &condition.reason));
            match seen.conditions.iter_mut().find(|(known, _)| *known == key) {
                Some((_, known)) if *known == print => continue,
                Some((_, known)) => *known = print,
                None => seen.conditions.push((key, print)),
            }
            Self::report(name, condition, reports);
        }
        let ready = node.status.conditions.iter().find(|condition| condition.r#type == "Ready");
        let reported = seen.not_ready.take().and_then(|(_, reported)| reported);
        match ready.filter(|ready| ready.status != "True") {
            Some(ready) => seen.not_ready = Some((ready.clone(), reported)),
            None if reported.is_some() => Self::report(name, &not_ready(&Condition::default(), "False"), reports),
            None => {}
        }
        self.look(Instant::now(), &mut seen, reports);
        Some(seen)
    }

    const LOOK: Option<Duration> = Some(Duration::from_secs(15));

    fn look(&mut self, now: Instant, seen: &mut SeenNode, reports: &mut Vec<WatchReport>) {
        if let Some(reported) = &mut seen.cordoned
            && now.saturating_duration_since(*reported) >= CORDONED_AGAIN
        {
            *reported = now;
            Self::report(&seen.name, &schedulable(false), reports);
        }
        let Some((ready, reported)) = &mut seen.not_ready else { return };
        let since_ns = unix_ns(ready.last_transition_time.as_ref());
        let has_lasted = realtime_ns().saturating_sub(since_ns) >= self.stuck_after.as_nanos() as u64;
        if since_ns > 0 && has_lasted && reported.is_none_or(|at| now.saturating_duration_since(at) >= AGAIN) {
            *reported = Some(now);
            Self::report(&seen.name, &not_ready(ready, "True"), reports);
        }
    }

    fn forget(&mut self, seen: &mut SeenNode) -> bool {
        seen.conditions.clear();
        if let Some((_, reported)) = &mut seen.not_ready {
            *reported = None;
        }
        true
    }

    fn listed(&mut self, _reports: &mut Vec<WatchReport>) {
        self.is_listed = true;
        self.count();
    }

    fn gone(&mut self, seen: SeenNode, reports: &mut Vec<WatchReport>) {
        self.seen -= 1;
        self.count();
        let gone = Condition {
            r#type: "Ready".into(),
            status: "Unknown".into(),
            reason: "NodeDeleted".into(),
            ..Condition::default()
        };
        Self::report(&seen.name, &gone, reports);
    }
}

/// A condition of Tapio's own: whether a node has not been ready for long, and for which reason. Unlike Ready it is reported again
/// while it holds.
fn not_ready(ready: &Condition, status: &str) -> Condition {
    Condition { r#type: "NotReady".into(), status: status.into(), ..ready.clone() }
}

/// A condition of Tapio's own: whether a node takes new pods.
fn schedulable(takes_pods: bool) -> Condition {
    let status = if takes_pods { "True" } else { "False" };
    Condition { r#type: "Schedulable".into(), status: status.into(), ..Condition::default() }
}
