//! Which finding makes room for a new one.
//!
//! What must hold: the node with the most findings loses its oldest one. Findings that are over go before ongoing ones. Both are
//! found without a scan.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use tapio_wire::service::Finding;

use super::Position;
use super::table::position;
use crate::findings::restored::node_of;

/// Findings by node, the oldest first.
#[derive(Default)]
pub(super) struct ByNode {
    nodes: HashMap<Arc<str>, OfNode>,
    /// Each node with how many it has.
    most: BTreeSet<(usize, Arc<str>)>,
}

#[derive(Default)]
struct OfNode {
    over: BTreeSet<Position>,
    ongoing: BTreeSet<Position>,
}

impl OfNode {
    fn len(&self) -> usize {
        self.over.len() + self.ongoing.len()
    }
}

impl ByNode {
    pub fn insert(&mut self, finding: &Finding) {
        self.change(finding, BTreeSet::insert);
    }

    pub fn remove(&mut self, finding: &Finding) {
        self.change(finding, |positions, position| positions.remove(&position));
    }

    fn change(&mut self, finding: &Finding, change: impl FnOnce(&mut BTreeSet<Position>, Position) -> bool) {
        let node = node_of(finding);
        let name = self.nodes.get_key_value(node).map_or_else(|| Arc::from(node), |(name, _)| Arc::clone(name));
        let of_node = self.nodes.entry(Arc::clone(&name)).or_default();
        let before = of_node.len();
        let positions = if finding.ongoing { &mut of_node.ongoing } else { &mut of_node.over };
        change(positions, position(finding));
        let now = of_node.len();
        if now == before {
            return;
        }
        self.most.remove(&(before, Arc::clone(&name)));
        if now == 0 {
            self.nodes.remove(&name);
        } else {
            self.most.insert((now, name));
        }
    }

    pub fn oldest_of_the_most(&self) -> Option<&Position> {
        let (_, node) = self.most.last()?;
        let of_node = self.nodes.get(node)?;
        // An ongoing finding is still true.
        of_node.over.first().or_else(|| of_node.ongoing.first())
    }

    /// How many findings a node has.
    #[cfg(test)]
    pub fn count(&self, node: &str) -> usize {
        self.nodes.get(node).map_or(0, OfNode::len)
    }
}
