//! Which histories a clue belongs to: what hangs together in the cluster.
//!
//! What enters: clues, in the order of their arrival; the endpoints of Services are learned from them. What leaves: the keys of
//! the histories in which a clue is noted. What must hold: bounded tables. A pod that left a Service still counts as its backend,
//! since that is just when it matters. Addresses are never guessed at, only looked up.

use std::ops::Deref;
use std::sync::Arc;

use tapio_wire::event::{EntityId, EntityKind};

use super::schema::Scope;
use super::text;
use crate::correlate::clue::{About, Address, Burst, Clue, ClueDetail, ClueKind, FactValue};
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

/// Whose history: the node (0 for what is known to the whole cluster), the scope, the entity, pod, workload or Service.
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

/// Computes the histories in which a clue is noted.
pub struct Joins {
    topology: Arc<Topology>,
    /// A Service's name, its ready backends, and all.
    services: Generations<u64, (Arc<str>, u32, u32)>,
    by_address: Generations<(Address, u16), u64>,
    by_cluster_address: Generations<Address, u64>,
    by_pod: Generations<EntityId, Vec<u64>>,
    dns: Vec<u64>,
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
                let Some(endpoints) = fact.endpoints.as_deref() else { return };
                let service = endpoints.id();
                let ready = endpoints.backends.iter().filter(|backend| backend.3).count() as u32;
                self.services.insert(service, (Arc::clone(&endpoints.name), ready, endpoints.backends.len() as u32));
                for address in &endpoints.cluster_addresses {
                    self.by_cluster_address.insert(*address, service);
                }
                for &(address, port, pod, _) in &endpoints.backends {
                    self.by_address.insert((address, port), service);
                    if pod != 0 {
                        let services = self.by_pod.entry(pod, Vec::new);
                        if !services.contains(&service) && services.len() < SERVICES_OF_POD_MAX {
                            services.push(service);
                        }
                    }
                }
                let is_dns = endpoints.ports.contains(&DNS_PORT);
                if is_dns && !self.dns.contains(&service) && self.dns.len() < DNS_SERVICES_MAX {
                    self.dns.push(service);
                }
            }
            ClueDetail::Burst(Burst { about: About::Peer { address, port }, peer, peer_backends, .. }) => {
                *peer = self.peer(address, *port);
                let service = self.service_at(address, *port).and_then(|service| self.services.get(&service));
                *peer_backends = service.map(|&(_, ready, all)| (ready, all));
            }
            _ => {}
        }
    }

    fn service_at(&self, address: &Address, port: u16) -> Option<u64> {
        self.by_cluster_address.get(address).or_else(|| self.by_address.get(&(*address, port))).copied()
    }

    fn peer(&self, address: &Address, port: u16) -> Option<Arc<str>> {
        if let Some((name, _, _)) = self.service_at(address, port).and_then(|service| self.services.get(&service)) {
            return Some(format!("service {name}").into());
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
