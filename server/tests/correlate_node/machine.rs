//! The machine from correlator to store, through which a node's frames are driven.

use std::sync::Arc;

use tapio_server::correlate::{CorrelateConfig, Correlator, LossBook, LossView, NodeRef, Topology};
use tapio_server::findings::{Finder, FinderConfig, FindingStore, PatternSet};
use tapio_wire::frame::Frame;
use tapio_wire::service::Finding;

use super::Node;

pub struct Machine {
    pub correlator: Correlator,
    pub finder: Finder,
    pub store: Arc<FindingStore>,
    pub losses: Arc<LossBook>,
}

impl Machine {
    pub fn start(shards: usize) -> Self {
        let patterns = PatternSet::embedded().expect("embedded patterns are valid");
        Self::with(shards, patterns)
    }

    pub fn with(shards: usize, patterns: PatternSet) -> Self {
        let config = CorrelateConfig { shards: Some(shards), wanted: patterns.kinds(), ..CorrelateConfig::default() };
        Self::sized(&config, patterns)
    }

    pub fn sized(config: &CorrelateConfig, patterns: PatternSet) -> Self {
        Self::chained(config, patterns, FinderConfig::default())
    }

    pub fn chained(config: &CorrelateConfig, patterns: PatternSet, finder: FinderConfig) -> Self {
        let topology = Arc::new(Topology::new(config.entities_max));
        let store = Arc::new(FindingStore::new(1000));
        let losses = Arc::new(LossBook::default());
        let view: Arc<dyn LossView> = Arc::<LossBook>::clone(&losses);
        let finder = Finder::start(&finder, Arc::new(patterns), Arc::clone(&topology), view, Arc::clone(&store))
            .expect("the finder starts");
        let correlator = Correlator::start(config, topology, Arc::clone(&losses), Arc::new(finder.bus()))
            .expect("the correlator starts");
        Self { correlator, finder, store, losses }
    }

    pub fn deliver(&self, node: &NodeRef, frames: &[Arc<Frame>]) {
        for frame in frames {
            self.correlator.deliver_blocking(node.clone(), Arc::clone(frame)).expect("the correlator runs");
        }
    }

    /// Waits until everything delivered has led to what it leads to.
    pub fn settle(&self) {
        self.correlator.drained_blocking().expect("the correlator runs");
        self.finder.bus().barrier().expect("the finder runs");
    }

    /// What frames lead to, the oldest finding first.
    pub fn findings(&self) -> Vec<Finding> {
        self.settle();
        let (mut found, _) = self.store.list(0, None, 1000);
        found.reverse();
        found.iter().map(|finding| (**finding).clone()).collect()
    }
}

/// What a node's frames lead to.
pub fn findings_of(node: &Node) -> Vec<Finding> {
    let machine = Machine::start(1);
    machine.deliver(&node.node, &node.frames);
    machine.findings()
}

/// The only finding of a node's frames, which must be of this pattern.
pub fn only_state(node: &Node, pattern: &str) -> Finding {
    let mut found = findings_of(node);
    // A pod whose object goes was deleted, whatever was wrong with it.
    found.retain(|finding| finding.pattern != "pod-deleted");
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, pattern, "{found:#?}");
    found.remove(0)
}

/// The patterns that a node's frames lead to, the oldest first.
pub fn patterns_of(node: &Node) -> Vec<String> {
    findings_of(node).into_iter().map(|finding| finding.pattern).collect()
}
