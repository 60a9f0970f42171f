//! What simulated nodes send: bodies of frames, with the bulk events of the mixed profile.
//!
//! In: a seed, a number of containers. Out: bodies, as a collector would make them of its rings, and the deaths beside them. What must
//! hold: all nodes share the ids of their containers, so one packed frame serves for all; names differ from node to node.

use tapio_probes::record::{self, Header, RecordKind, text};
use tapio_wire::entity_id;
use tapio_wire::event::{
    Body, Detail, Entity, EntityId, EntityKind, Event, Exit, NO_NAME, Name, Role, Signal, Source, Tcp,
};
use zerocopy::FromBytes;

use crate::kubelet::ContainerName;
use crate::load::pool::Pool;
use crate::load::profile::Profile;
use crate::random::Random;

/// The source that the events are counted under: that of the load's rings.
pub(super) const SOURCE: Source = Source::Shm;
/// How far apart the events of one frame are all together: a collector's batch.
const SPAN_NS: u64 = 200_000_000;
/// Containers of a pod, pods of a workload.
const POD_CONTAINERS: usize = 2;
const WORKLOAD_PODS: usize = 5;
/// One in so many records of the profile is of no bulk kind.
const LETHAL_SHARE: usize = 20;

/// Makes bodies of one simulated cluster.
pub(super) struct Bodies {
    profile: Profile,
    ids: Vec<EntityId>,
    seed: u64,
}

impl Bodies {
    pub(super) fn new(seed: u64, entities: usize) -> Self {
        let profile = Profile::new(seed, entities);
        let ids = profile.containers().iter();
        let ids = ids.map(|container| entity_id(EntityKind::Container, &container.name.container_id)).collect();
        Self { profile, ids, seed }
    }

    /// Bodies of `events` events each, without descriptions.
    pub(super) fn bulk(&mut self, bodies: usize, events: usize) -> Vec<Body> {
        let wanted = bodies * events;
        let mut made = Vec::with_capacity(wanted);
        while made.len() < wanted {
            let missing = wanted - made.len();
            let pool = self.profile.pool(missing + missing / LETHAL_SHARE + 1, 0.0);
            made.extend((0..pool.len()).filter_map(|index| self.event(&pool, index)).take(missing));
        }
        let mut made = made.into_iter();
        let body = |_| {
            let mut body = Body::default();
            for (number, (event, name)) in made.by_ref().take(events).enumerate() {
                let named = name.map_or(NO_NAME, |name| intern(&mut body.names, name));
                let time_ns = number as u64 * (SPAN_NS / events as u64);
                body.events.push(Event { time_ns, ..with_name(event, named) });
            }
            body
        };
        (0..bodies).map(body).collect()
    }

    /// Lets each event of a body be about another container, and describes these as those of node `node`.
    pub(super) fn describe(&self, body: &mut Body, node: usize, first: usize) {
        for (number, event) in body.events.iter_mut().enumerate() {
            event.entity = self.ids[(first + number) % self.ids.len()];
        }
        let described = body.events.len().min(self.ids.len());
        body.entities = (0..described).map(|number| self.entity(node, (first + number) % self.ids.len())).collect();
    }

    /// Describes all containers of a node.
    pub(super) fn entities(&self, node: usize) -> Vec<Entity> {
        (0..self.ids.len()).map(|container| self.entity(node, container)).collect()
    }

    /// How many containers a node has.
    pub(super) fn containers(&self) -> usize {
        self.ids.len()
    }

    /// What a container of a node is called.
    fn entity(&self, node: usize, container: usize) -> Entity {
        let pod = container / POD_CONTAINERS;
        let mut random = Random::new(self.seed ^ tapio_wire::mix((node as u64) << 32 | pod as u64));
        let first = ContainerName::random(&mut random);
        let name = (0..container % POD_CONTAINERS).fold(first, |name, _| name.sibling(&mut random));
        let workload = format!("service-{}", pod / WORKLOAD_PODS);
        let pod_name = pod_name(node, pod);
        let own = &self.profile.containers()[container];
        let namespace = format!("team-{}", pod % 7);
        Entity {
            parent: entity_id(EntityKind::Pod, &name.pod_uid),
            cgroup: format!("/{}", name.path()),
            pod: pod_name.clone(),
            container: own.comm.to_owned(),
            image: format!("registry.example/{namespace}/{}:1.{}", own.comm, pod % 10),
            workload: format!("Deployment/{workload}"),
            addresses: vec![own.address],
            namespace: namespace.clone(),
            container_id: name.container_id,
            pod_uid: name.pod_uid,
            ..Entity::named(EntityKind::Container, self.ids[container], format!("{namespace}/{pod_name}/{}", own.comm))
        }
    }

    /// The death of process `number` of a node: a SIGKILL by the container's runtime, and the end.
    pub(super) fn death(&self, number: u64) -> Body {
        let container = (number as usize).wrapping_mul(7) % self.ids.len();
        let own = &self.profile.containers()[container];
        let pid = 100_000 + (number % 4_000_000) as u32;
        let mut names = Vec::new();
        let comm = intern(&mut names, own.comm.to_owned());
        let signal = Signal {
            signal: 9,
            code: 0,
            ns_pid: 7,
            ns_level: 1,
            comm,
            sender_pid: 900,
            sender_comm: intern(&mut names, "containerd-shim".to_owned()),
            sender_parent: intern(&mut names, "systemd".to_owned()) + 1,
            sender_entity: 0,
            from_kernel: false,
            result: 0,
            role: Role::First as u8,
            over_cpu_limit: 0,
            repeats: 0,
        };
        let exit = Exit {
            start_time_ns: 1_000_000_000,
            parent_pid: 900,
            ns_pid: 7,
            ns_level: 1,
            status: 9,
            comm,
            oom_score_adj: 985,
            role: Role::First as u8,
        };
        let event = |time_ns, body| Event { time_ns, entity: self.ids[container], pid, source: SOURCE, body };
        let events = vec![event(0, Detail::Signal(Box::new(signal))), event(50_000, Detail::Exit(exit))];
        Body { names, entities: Vec::new(), events }
    }

    /// The event of a record, and the name that it is to get; `None` for those of the lethal lane.
    fn event(&self, pool: &Pool, index: usize) -> Option<(Event, Option<String>)> {
        let bytes = pool.record(index);
        let header = Header::read_from_prefix(bytes).ok()?.0;
        let (body, name) = detail(RecordKind::from_u16(header.kind)?, bytes)?;
        let entity = self.ids[self.profile.container_of(header.cgroup_id)?];
        Some((Event { time_ns: 0, entity, pid: header.pid, source: SOURCE, body }, name))
    }
}

/// What a pod is called.
pub(crate) fn pod_name(node: usize, pod: usize) -> String {
    format!("service-{}-{:05x}", pod / WORKLOAD_PODS, tapio_wire::mix((node as u64) << 32 | pod as u64) & 0xf_ffff)
}

fn intern(names: &mut Vec<String>, name: String) -> Name {
    let known = names.iter().position(|known| *known == name);
    known.unwrap_or_else(|| {
        names.push(name);
        names.len() - 1
    }) as Name
}

/// The same event with its name's place in the table.
fn with_name(mut event: Event, place: Name) -> Event {
    match &mut event.body {
        Detail::Dns { name, .. } => *name = place,
        Detail::PacketDrop { reason, .. } => *reason = place,
        _ => {}
    }
    event
}

fn read<R: FromBytes>(bytes: &[u8]) -> Option<R> {
    R::read_from_bytes(bytes).ok()
}

/// What a collector makes of a record of a bulk kind. The name, if it has one, is still to be put in a table.
fn detail(kind: RecordKind, bytes: &[u8]) -> Option<(Detail, Option<String>)> {
    let kib = |bytes: u64| u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
    let unnamed = match kind {
        RecordKind::Tcp => {
            let tcp: record::Tcp = read(bytes)?;
            Detail::Tcp(Tcp {
                source: tcp.source,
                destination: tcp.destination,
                duration_us: u32::try_from(tcp.duration_ns / 1000).unwrap_or(u32::MAX),
                kib_sent: kib(tcp.bytes_sent),
                kib_received: kib(tcp.bytes_received),
                source_port: tcp.source_port,
                destination_port: tcp.destination_port,
                change: tcp.change,
                active: tcp.active != 0,
            })
        }
        RecordKind::Reclaim => {
            let reclaim: record::Reclaim = read(bytes)?;
            Detail::Reclaim { stall_ns: reclaim.stall_ns, pages: reclaim.pages_reclaimed, memcg: reclaim.memcg != 0 }
        }
        RecordKind::BlockIo => {
            let record::BlockIo { latency_ns, bytes, device, error, operation, .. } = read(bytes)?;
            Detail::BlockIo { latency_ns, bytes, device, error, operation }
        }
        RecordKind::SyscallError => {
            let record::SyscallError { count, syscall, errno, .. } = read(bytes)?;
            Detail::SyscallError { count, syscall, errno }
        }
        RecordKind::RunQueue => Detail::RunQueue { wait_ns: read::<record::RunQueue>(bytes)?.wait_ns },
        RecordKind::Dns => {
            let dns: record::Dns = read(bytes)?;
            let (latency_ns, query_type, rcode) = (dns.latency_ns, dns.query_type, dns.rcode);
            let name = text(&dns.name).into_owned();
            return Some((Detail::Dns { latency_ns, name: NO_NAME, query_type, rcode }, Some(name)));
        }
        RecordKind::PacketDrop => {
            let drop: record::PacketDrop = read(bytes)?;
            let detail = Detail::PacketDrop { count: drop.count, reason: NO_NAME, interface: drop.interface };
            return Some((detail, Some(format!("reason {:#x}", drop.reason))));
        }
        _ => return None,
    };
    Some((unnamed, None))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn bodies_have_as_many_bulk_events_as_asked_for() {
        let mut bodies = Bodies::new(1, 100);
        let made = bodies.bulk(20, 40);
        assert_eq!(made.iter().map(|body| body.events.len()).collect::<Vec<_>>(), [40; 20]);
        let events = || made.iter().flat_map(|body| &body.events);
        assert!(events().all(|event| event.kind().lane() == tapio_wire::event::Lane::Bulk));
        let tcp = events().filter(|event| matches!(event.body, Detail::Tcp(_))).count();
        assert!((360..=540).contains(&tcp), "{tcp} of 800 are of connections, 55 in 97 are meant to be");
        for body in &made {
            assert!(body.names.len() < body.events.len() && body.events.is_sorted_by_key(|event| event.time_ns));
        }
    }

    #[test]
    fn nodes_share_ids_and_differ_in_names() {
        let mut bodies = Bodies::new(1, 30);
        let mut body = bodies.bulk(1, 40).remove(0);
        bodies.describe(&mut body, 1, 7);
        assert_eq!(body.entities.len(), 30);
        let described: HashSet<u64> = body.entities.iter().map(|entity| entity.id).collect();
        assert!(body.events.iter().all(|event| described.contains(&event.entity)));
        let (one, other) = (bodies.entities(1), bodies.entities(2));
        for (one, other) in one.iter().zip(&other) {
            assert_eq!(one.id, other.id);
            assert!(one.container_id != other.container_id && one.pod_uid != other.pod_uid && one.pod != other.pod);
        }
        assert_eq!((&one[0].pod_uid, one[0].parent), (&one[1].pod_uid, one[1].parent));
        assert!(one[0].container_id != one[1].container_id && one[0].pod_uid != one[2].pod_uid);
    }
}
