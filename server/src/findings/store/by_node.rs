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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tapio_wire::service::EntityRef;

    use super::*;

    /// The first of them to go, by looking at all.
    fn by_scan(findings: &BTreeMap<String, Finding>) -> Option<Position> {
        let mut of_node: BTreeMap<&str, Vec<&Finding>> = BTreeMap::new();
        for finding in findings.values() {
            of_node.entry(node_of(finding)).or_default().push(finding);
        }
        let most = of_node.into_iter().max_by_key(|(node, findings)| (findings.len(), *node))?.1;
        most.into_iter().min_by_key(|finding| (finding.ongoing, position(finding))).map(position)
    }

    #[test]
    fn it_names_what_a_scan_would_find() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut by_node, mut findings) = (ByNode::default(), BTreeMap::new());
            for _ in 0..200 {
                let id = random.u32(0..40).to_string();
                if let Some(old) = findings.remove(&id) {
                    by_node.remove(&old);
                }
                if random.u32(0..4) > 0 {
                    let node = ["", "a", "b", "c"][random.usize(0..4)].to_owned();
                    let entity = random.u32(0..8).gt(&0).then(|| EntityRef { node, ..EntityRef::default() });
                    let (ended_ns, ongoing) = (random.u64(0..10), random.bool());
                    let finding = Finding { id: id.clone(), entity, ended_ns, ongoing, ..Finding::default() };
                    by_node.insert(&finding);
                    findings.insert(id, finding);
                }
                assert_eq!(by_node.oldest_of_the_most(), by_scan(&findings).as_ref(), "seed {seed}");
            }
            let all: Vec<Finding> = findings.into_values().collect();
            all.iter().for_each(|finding| by_node.remove(finding));
            assert!(by_node.oldest_of_the_most().is_none() && by_node.nodes.is_empty() && by_node.most.is_empty());
        }
    }
}
