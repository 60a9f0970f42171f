//! Which histories a clue belongs to: what hangs together in the cluster.
//!
//! What enters: clues, in the order of their arrival; the endpoints of Services are learned from them. What leaves: the keys of
//! the histories in which a clue is noted. What must hold: bounded tables. A pod that left a Service still counts as its backend,
//! since that is just when it matters. Addresses are never guessed at, only looked up.

use std::ops::Deref;
use std::sync::Arc;

use tapio_wire::event::{EntityId, EntityKind};

use super::matching::SKEW_NS;
use super::pattern::PatternSet;
use super::schema::Scope;
use super::step_mask::StepMask;
use super::text;
use super::unjoined::{Holder, Lack, Unjoined};
use crate::correlate::clue::{About, Address, Burst, Clue, ClueDetail, ClueKind, FactValue, ServiceEndpoints};
use crate::correlate::{EntityInfo, Generations, Topology};

/// Services remembered, and addresses and pods of them.
const SERVICES_MAX: usize = 16_384;
const BACKENDS_MAX: usize = 131_072;
/// Services that one pod may stand behind.
const SERVICES_OF_POD_MAX: usize = 4;
/// Histories of one scope in which one clue is noted.
const KEYS_MAX: usize = 8;
/// Services that answer DNS.
const DNS_SERVICES_MAX: usize = 4;
const DNS_PORT: u16 = 53;

/// Key of a history: the node (0 for what the whole cluster knows), the scope, the entity, pod, workload or Service.
pub type HistoryKey = (u64, Scope, u64);

/// The histories of one scope in which a clue is noted.
#[derive(Clone, Copy)]
pub struct Keys {
    len: usize,
    keys: [HistoryKey; KEYS_MAX],
}

impl FromIterator<HistoryKey> for Keys {
    /// The first [`KEYS_MAX`] of them.
    fn from_iter<I: IntoIterator<Item = HistoryKey>>(from: I) -> Self {
        let mut keys = Self { len: 0, keys: [(0, Scope::Entity, 0); KEYS_MAX] };
        for (place, key) in keys.keys.iter_mut().zip(from) {
            *place = key;
            keys.len += 1;
        }
        keys
    }
}

impl Deref for Keys {
    type Target = [HistoryKey];

    fn deref(&self) -> &[HistoryKey] {
        &self.keys[..self.len]
    }
}

const _: () = assert!(SERVICES_OF_POD_MAX <= KEYS_MAX && DNS_SERVICES_MAX <= KEYS_MAX);

/// What a Service was reported to be.
struct Service {
    name: Arc<str>,
    /// Ready backends, and all.
    backends: (u32, u32),
    /// Since when it has as many, nanoseconds since 1970.
    since_ns: u64,
}

/// Computes the histories in which a clue is noted.
pub struct Joins {
    topology: Arc<Topology>,
    services: Generations<u64, Service>,
    by_address: Generations<(Address, u16), u64>,
    by_cluster_address: Generations<Address, u64>,
    by_pod: Generations<EntityId, Vec<u64>>,
    dns: Vec<u64>,
    unjoined: Unjoined,
}

impl Joins {
    /// Knows no Service yet.
    pub fn new(topology: Arc<Topology>) -> Self {
        Self {
            topology,
            services: Generations::new(SERVICES_MAX),
            by_address: Generations::new(BACKENDS_MAX),
            by_cluster_address: Generations::new(SERVICES_MAX),
            by_pod: Generations::new(BACKENDS_MAX),
            dns: Vec::new(),
            unjoined: Unjoined::default(),
        }
    }

    /// Learns from a clue and completes it by what is known.
    pub fn take(&mut self, clue: &mut Clue) {
        match &mut clue.detail {
            ClueDetail::Fact(fact) => {
                if let Some(address) = fact.talker {
                    let address_text = text::address(address);
                    let talker = match self.topology.pod_at(&address).and_then(|pod| self.topology.get(0, pod)) {
                        Some(pod) => format!("pod {pod} ({address_text})"),
                        None => address_text.clone(),
                    };
                    for (name, text) in [("talker_address", address_text), ("talker", talker)] {
                        fact.fields.push((name.into(), FactValue::Text(text.into())));
                    }
                }
                if let Some(endpoints) = &fact.endpoints {
                    self.learn(endpoints, clue.realtime_ns);
                }
            }
            _ => self.complete(clue),
        }
    }

    /// Completes a clue about an address by what is known of the Service there.
    pub fn complete(&self, clue: &mut Clue) {
        let at_ns = clue.realtime_ns;
        if let ClueDetail::Burst(Burst { about: About::Peer { address, port }, peer, peer_backends, .. }) =
            &mut clue.detail
        {
            *peer = self.peer(address, *port);
            // What was reported of it later need not have been so already, and what was so before need not be any more.
            if peer_backends.is_some() {
                return;
            }
            let service = self.service_at(address, *port).and_then(|service| self.services.get(&service));
            let service = service.filter(|service| service.since_ns <= at_ns.saturating_add(SKEW_NS));
            *peer_backends = service.map(|service| service.backends);
        }
    }

    fn learn(&mut self, endpoints: &ServiceEndpoints, at_ns: u64) {
        let id = endpoints.id();
        let ready = endpoints.backends.iter().filter(|backend| backend.3).count() as u32;
        let backends = (ready, endpoints.backends.len() as u32);
        let known = self.services.get(&id).filter(|known| known.backends == backends);
        let since_ns = known.map_or(at_ns, |known| known.since_ns.min(at_ns));
        self.services.insert(id, Service { name: Arc::clone(&endpoints.name), backends, since_ns });
        for address in &endpoints.cluster_addresses {
            self.by_cluster_address.insert(*address, id);
            self.unjoined.resolve(Lack::At(*address));
        }
        for &(address, port, pod, _) in &endpoints.backends {
            self.by_address.insert((address, port), id);
            self.unjoined.resolve(Lack::At(address));
            if pod != 0 {
                let services = self.by_pod.entry(pod, Vec::new);
                if !services.contains(&id) && services.len() < SERVICES_OF_POD_MAX {
                    services.push(id);
                    self.unjoined.resolve(Lack::OfPod(pod));
                }
            }
        }
        let is_dns = endpoints.ports.contains(&DNS_PORT);
        if is_dns && !self.dns.contains(&id) && self.dns.len() < DNS_SERVICES_MAX {
            self.dns.push(id);
            self.unjoined.resolve(Lack::Dns);
        }
    }

    /// An entity was described. Where it is a pod, its addresses may be known now.
    pub fn described(&mut self, node: u64, id: EntityId) {
        // Pods have the same history on every node.
        if node != 0 || self.unjoined.is_empty() {
            return;
        }
        for address in self.topology.get(node, id).iter().flat_map(|entity| &entity.addresses) {
            self.unjoined.resolve(Lack::At(*address));
        }
    }

    /// Remembers by what a clue may be joined to a Service that is not known yet.
    pub fn note_lacks(&mut self, patterns: &PatternSet, clue: &Clue, mask: &StepMask) {
        if !patterns.is_in(mask, Scope::Service) {
            return;
        }
        let (node, _, id) = Self::entity_key(&clue.entity);
        let lack = match &clue.detail {
            ClueDetail::Burst(burst) => match burst.about {
                About::Peer { address, port } if self.service_at(&address, port).is_none() => {
                    if let Some(pod) = self.topology.pod_at(&address) {
                        self.unjoined.note(Lack::OfPod(pod), (node, id));
                    }
                    Lack::At(address)
                }
                About::Dns { .. } if self.dns.len() < DNS_SERVICES_MAX => Lack::Dns,
                _ => return,
            },
            ClueDetail::Fact(fact) if fact.endpoints.is_some() => return,
            // A pod may come to stand behind one more.
            _ => match clue.entity.pod_id() {
                0 => return,
                pod => Lack::OfPod(pod),
            },
        };
        self.unjoined.note(lack, (node, id));
    }

    /// The entities, each with the node of its history, whose clues may be joined to more than before.
    pub fn take_ready(&mut self) -> Vec<Holder> {
        self.unjoined.take_ready()
    }

    fn service_at(&self, address: &Address, port: u16) -> Option<u64> {
        self.by_cluster_address.get(address).or_else(|| self.by_address.get(&(*address, port))).copied()
    }

    fn peer(&self, address: &Address, port: u16) -> Option<Arc<str>> {
        if let Some(service) = self.service_at(address, port).and_then(|service| self.services.get(&service)) {
            return Some(format!("service {}", service.name).into());
        }
        let pod = self.topology.get(0, self.topology.pod_at(address)?)?;
        Some(format!("pod {pod}").into())
    }

    fn pod(&self, entity: &EntityInfo) -> Option<Arc<EntityInfo>> {
        self.topology.get(0, entity.pod_id()).filter(|_| entity.pod_id() != 0)
    }

    /// The workload of an entity, 0 while none was reported.
    pub fn workload(&self, entity: &EntityInfo) -> EntityId {
        match entity.kind {
            Some(EntityKind::Workload) => entity.id,
            _ if entity.workload_id != 0 => entity.workload_id,
            _ => self.pod(entity).map_or(0, |pod| pod.workload_id),
        }
    }

    /// The histories of a scope in which a clue is noted.
    pub fn keys(&self, clue: &Clue, scope: Scope) -> Keys {
        let entity = &*clue.entity;
        let node = entity.node.id;
        match scope {
            Scope::Entity => [Self::entity_key(entity)].into_iter().collect(),
            Scope::Pod => match entity.pod_id() {
                0 => [(node, scope, entity.id)].into_iter().collect(),
                pod => [(0, scope, pod)].into_iter().collect(),
            },
            Scope::Workload => {
                let related: &[u64] = match &clue.detail {
                    ClueDetail::Fact(fact) if fact.kind == ClueKind::ConfigChange => &fact.related,
                    _ => &[],
                };
                let own = self.workload(entity);
                let workloads = related.iter().copied().chain([own]).filter(|&workload| workload != 0);
                let keys: Keys = workloads.map(|workload| (0, scope, workload)).collect();
                // A pod by itself is its own workload.
                match (keys.is_empty(), entity.pod_id()) {
                    (true, pod) if pod != 0 => [(0, scope, pod)].into_iter().collect(),
                    _ => keys,
                }
            }
            Scope::Service => {
                self.services(clue, |services| services.iter().map(|&service| (0, scope, service)).collect())
            }
            Scope::Node => [(self.node(clue), scope, 0)].into_iter().collect(),
        }
    }

    /// The history of an entity's own clues.
    pub fn entity_key(entity: &EntityInfo) -> HistoryKey {
        let is_global = matches!(entity.kind, Some(EntityKind::Pod | EntityKind::Workload));
        (if is_global { 0 } else { entity.node.id }, Scope::Entity, entity.id)
    }

    fn services(&self, clue: &Clue, keys: impl Fn(&[u64]) -> Keys) -> Keys {
        match &clue.detail {
            ClueDetail::Burst(burst) => match burst.about {
                About::Peer { address, port } => {
                    let by_pod = || {
                        let pod = self.topology.pod_at(&address)?;
                        self.by_pod.get(&pod)?.first().copied()
                    };
                    keys(self.service_at(&address, port).or_else(by_pod).as_slice())
                }
                About::Dns { .. } => keys(&self.dns),
                _ => keys(&[]),
            },
            ClueDetail::Fact(fact) if fact.endpoints.is_some() => {
                keys(fact.endpoints.as_ref().map(|endpoints| endpoints.id()).as_slice())
            }
            _ => keys(self.by_pod.get(&clue.entity.pod_id()).map_or(&[], Vec::as_slice)),
        }
    }

    /// The node that a clue is about: a node that is spoken of, a pod's node, or where it was seen.
    fn node(&self, clue: &Clue) -> u64 {
        if let ClueDetail::Fact(fact) = &clue.detail
            && (fact.kind == ClueKind::NodeCondition || fact.text("object_kind") == "Node")
        {
            return clue.entity.id;
        }
        clue.entity.node.id
    }
}
