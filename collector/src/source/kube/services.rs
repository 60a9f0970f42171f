//! Services and what is behind them.
//!
//! What enters: Services, and EndpointSlices or the older Endpoints. What leaves: one event for each change of a Service's
//! addresses, ports or backends, always with all of them. What must hold: nothing is reported before both were listed, since half
//! of the picture would look like an outage.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use tapio_wire::event::{Backend, Detail, Endpoints};

use super::objects::{CoreEndpoints, EndpointSlice, Service};
use super::pods::{is_system, pod_entity};
use super::report::{Subject, WatchReport};
use super::watch::{Follower, digest};
use crate::intake::identity::directory::address_bytes;

/// Backends reported of one Service: frames are bounded.
const BACKENDS_MAX: usize = 1000;

/// Namespace and name.
type Key = (Box<str>, Box<str>);

#[derive(Default)]
struct Known {
    addresses: Vec<[u8; 16]>,
    ports: Vec<u16>,
    /// Backends by slice.
    backends: HashMap<u64, Vec<Backend>>,
    has_service: bool,
    reported: u64,
}

/// Every Service with its backends.
#[derive(Default)]
pub struct ServiceTable {
    services: HashMap<Key, Known, foldhash::fast::RandomState>,
    /// What changed before both were listed.
    pending: HashSet<Key, foldhash::fast::RandomState>,
    are_services_listed: bool,
    are_backends_listed: bool,
}

impl ServiceTable {
    fn change(&mut self, key: Key, node: &str, change: impl FnOnce(&mut Known), reports: &mut Vec<WatchReport>) {
        change(self.services.entry(key.clone()).or_default());
        if self.are_services_listed && self.are_backends_listed {
            self.report(&key, node, reports);
        } else {
            self.pending.insert(key);
        }
    }

    fn report(&mut self, key: &Key, node: &str, reports: &mut Vec<WatchReport>) {
        let Some(known) = self.services.get_mut(key) else { return };
        let mut backends: Vec<Backend> = known.backends.values().flatten().copied().collect();
        // Their order in the map and in the API is of no account.
        backends.sort_unstable_by_key(|backend| (backend.address, backend.port, backend.pod));
        backends.dedup();
        backends.truncate(BACKENDS_MAX);
        let parts: Vec<_> =
            backends.iter().map(|backend| (backend.address, backend.port, backend.pod, backend.is_ready)).collect();
        let print = digest(&(&known.addresses, &known.ports, &parts));
        let is_over = !known.has_service && backends.is_empty();
        if known.reported != print && !(is_over && known.reported == 0) {
            known.reported = print;
            let (addresses, ports) = (known.addresses.clone(), known.ports.clone());
            let texts = [&*key.0, &*key.1].map(str::to_owned);
            reports.push(WatchReport::event(Subject::Node(node.into()), move |batch| {
                let [namespace, service] = texts.map(|text| batch.text(&text));
                Detail::Endpoints(Box::new(Endpoints {
                    namespace,
                    service,
                    cluster_addresses: addresses,
                    ports,
                    backends,
                }))
            }));
        }
        if is_over {
            self.services.remove(key);
        }
    }

    fn report_pending(&mut self, node: &str, reports: &mut Vec<WatchReport>) {
        if self.are_services_listed && self.are_backends_listed {
            for key in std::mem::take(&mut self.pending) {
                self.report(&key, node, reports);
            }
        }
    }
}

/// What the three followers share.
struct SharedTable {
    node: Arc<str>,
    table: Arc<Mutex<ServiceTable>>,
    excludes_system: bool,
}

impl SharedTable {
    fn key(&self, namespace: &str, name: &str) -> Option<Key> {
        let is_left_out = name.is_empty() || self.excludes_system && is_system(namespace);
        (!is_left_out).then(|| (namespace.into(), name.into()))
    }

    fn change(&self, key: &Key, change: impl FnOnce(&mut Known), reports: &mut Vec<WatchReport>) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.change(key.clone(), &self.node, change, reports);
    }

    fn listed(&self, mark: impl FnOnce(&mut ServiceTable), reports: &mut Vec<WatchReport>) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        mark(&mut table);
        table.report_pending(&self.node, reports);
    }

    fn set_backends(
        &self,
        state: Option<(Key, u64)>,
        key: Key,
        of: u64,
        backends: Vec<Backend>,
        reports: &mut Vec<WatchReport>,
    ) -> Option<(Key, u64)> {
        if let Some((before, of)) = state
            && before != key
        {
            self.change(&before, |known| _ = known.backends.remove(&of), reports);
        }
        self.change(&key, |known| _ = known.backends.insert(of, backends), reports);
        Some((key, of))
    }
}

macro_rules! followers {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        pub struct $name(SharedTable);

        impl $name {
            /// Makes a follower of slices, with the table that all of them share.
            pub fn new(node: Arc<str>, table: Arc<Mutex<ServiceTable>>, excludes_system: bool) -> Self {
                Self(SharedTable { node, table, excludes_system })
            }
        }
    )*};
}

followers! {
    /// Services.
    Services
    /// EndpointSlices.
    Slices
    /// Endpoints, where there are no EndpointSlices.
    CoreEndpointsOf
}

impl Follower for Services {
    type Object = Service;
    type Kept = Key;

    fn seen(
        &mut self,
        service: &Service,
        _state: Option<Key>,
        _first: bool,
        reports: &mut Vec<WatchReport>,
    ) -> Option<Key> {
        let key = self.0.key(&service.metadata.namespace, &service.metadata.name)?;
        let spec = &service.spec;
        let of_version_one = std::slice::from_ref(&spec.cluster_ip);
        let addresses = if spec.cluster_ips.is_empty() { of_version_one } else { &spec.cluster_ips };
        // A headless Service has `None`, which is no address.
        let addresses: Vec<_> = addresses.iter().filter_map(|address| address_bytes(address)).collect();
        let ports: Vec<u16> = spec.ports.iter().map(|port| port.port).collect();
        let set = |known: &mut Known| (known.addresses, known.ports, known.has_service) = (addresses, ports, true);
        self.0.change(&key, set, reports);
        Some(key)
    }

    fn forget(&mut self, key: &mut Key) -> bool {
        let mut table = self.0.table.lock().unwrap_or_else(PoisonError::into_inner);
        // With its backends: the followers of those need not forget anything.
        if let Some(known) = table.services.get_mut(&*key) {
            known.reported = 0;
        }
        true
    }

    fn gone(&mut self, key: Key, reports: &mut Vec<WatchReport>) {
        let clear = |known: &mut Known| (known.addresses, known.ports, known.has_service) = (vec![], vec![], false);
        self.0.change(&key, clear, reports);
    }

    fn listed(&mut self, reports: &mut Vec<WatchReport>) {
        self.0.listed(|table| table.are_services_listed = true, reports);
    }
}

impl Follower for Slices {
    type Object = EndpointSlice;
    type Kept = (Key, u64);

    fn seen(
        &mut self,
        slice: &EndpointSlice,
        state: Option<(Key, u64)>,
        _first: bool,
        reports: &mut Vec<WatchReport>,
    ) -> Option<(Key, u64)> {
        let meta = &slice.metadata;
        let key = self.0.key(&meta.namespace, &meta.labels.service_name)?;
        let of = digest(&(&meta.namespace, &meta.name));
        let ports: Vec<u16> =
            if slice.ports.is_empty() { vec![0] } else { slice.ports.iter().map(|port| port.port).collect() };
        let mut backends = Vec::new();
        for endpoint in &slice.endpoints {
            let pod = if endpoint.target_ref.kind == "Pod" { pod_entity(&endpoint.target_ref.uid) } else { 0 };
            // Unknown counts as ready, says the API.
            let is_ready = endpoint.conditions.ready.unwrap_or(true);
            for address in endpoint.addresses.iter().filter_map(|address| address_bytes(address)) {
                backends.extend(ports.iter().map(|port| Backend { address, pod, port: *port, is_ready }));
            }
        }
        self.0.set_backends(state, key, of, backends, reports)
    }

    fn gone(&mut self, (key, of): (Key, u64), reports: &mut Vec<WatchReport>) {
        self.0.change(&key, |known| _ = known.backends.remove(&of), reports);
    }

    fn listed(&mut self, reports: &mut Vec<WatchReport>) {
        self.0.listed(|table| table.are_backends_listed = true, reports);
    }
}

impl Follower for CoreEndpointsOf {
    type Object = CoreEndpoints;
    type Kept = (Key, u64);

    fn seen(
        &mut self,
        endpoints: &CoreEndpoints,
        state: Option<(Key, u64)>,
        _first: bool,
        reports: &mut Vec<WatchReport>,
    ) -> Option<(Key, u64)> {
        let meta = &endpoints.metadata;
        // Elections were held on Endpoints once.
        if !meta.annotations.leader.is_empty() {
            return None;
        }
        let key = self.0.key(&meta.namespace, &meta.name)?;
        let mut backends = Vec::new();
        for subset in &endpoints.subsets {
            let ports: Vec<u16> =
                if subset.ports.is_empty() { vec![0] } else { subset.ports.iter().map(|port| port.port).collect() };
            for (addresses, is_ready) in [(&subset.addresses, true), (&subset.not_ready_addresses, false)] {
                for target in addresses {
                    let Some(address) = address_bytes(&target.ip) else { continue };
                    let pod = if target.target_ref.kind == "Pod" { pod_entity(&target.target_ref.uid) } else { 0 };
                    backends.extend(ports.iter().map(|port| Backend { address, pod, port: *port, is_ready }));
                }
            }
        }
        self.0.set_backends(state, key, 0, backends, reports)
    }

    fn gone(&mut self, (key, of): (Key, u64), reports: &mut Vec<WatchReport>) {
        self.0.change(&key, |known| _ = known.backends.remove(&of), reports);
    }

    fn listed(&mut self, reports: &mut Vec<WatchReport>) {
        self.0.listed(|table| table.are_backends_listed = true, reports);
    }
}
