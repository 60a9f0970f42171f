//! What simulated nodes report: the mixed profile, and deaths beside it where they are asked for.
//!
//! In: a seed and a number of containers. Out: the record that introduces each container, and a pool of prepared records
//! that the generator plays round and round, changing nothing but the time. What must hold: a pool is longer than a frame
//! and far longer than lz4's window, so that its repetition cannot be seen by compression.
//!
//! Per thousand events, as on a node that serves requests and is a little short of memory:
//!
//! | events | kind | values |
//! |---|---|---|
//! | 550 | tcp | 40 % established, 45 % closed, the rest retransmissions, refusals, resets and time-outs |
//! | 100 | dns | mostly slow answers, some NXDOMAIN, few without an answer |
//! | 80 | block_io | 64 µs to 2 s, one in 500 failed |
//! | 80 | reclaim | 10 µs to 200 ms, nine in ten by a memory cgroup's own limit |
//! | 80 | syscall_error | ENOENT, EAGAIN, ECONNRESET, … |
//! | 50 | run_queue | 1 ms to 500 ms |
//! | 30 | packet_drop | by socket filter, no socket, … |
//! | 30 | lethal | 12 processes that start and end (24), 2 that end by SIGTERM (4), 1 cgroup that comes and goes (2) |

use tapio_probes::record::{CGROUP_PATH_BYTES, Cgroup, Exec, Exit, Header, RecordKind, Signal, comm};
use zerocopy::IntoBytes;

use super::pool::Pool;
use crate::kubelet::{CONTAINER_LEVEL, ContainerName};
use crate::random::{Random, Zipf};

/// Records of a pool: four frames of the default size.
pub const POOL_RECORDS: usize = 16_384;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    One(RecordKind),
    /// A process starts, and ends soon.
    Process,
    /// A process gets SIGTERM, and ends.
    Termination,
    /// A container's cgroup comes, and goes soon.
    ShortContainer,
}

/// Weights of 10,000 events; those that produce two events stand for twice their weight. At 40,000 events a second on a
/// node this ends some 20 processes a second, as on a node in the middle of a rollout.
const MIXED: [(Choice, u32); 10] = [
    (Choice::One(RecordKind::Tcp), 5500),
    (Choice::One(RecordKind::Dns), 1000),
    (Choice::One(RecordKind::BlockIo), 800),
    (Choice::One(RecordKind::Reclaim), 800),
    (Choice::One(RecordKind::SyscallError), 800),
    (Choice::One(RecordKind::RunQueue), 500),
    (Choice::One(RecordKind::PacketDrop), 300),
    (Choice::Process, 140),
    (Choice::Termination, 5),
    (Choice::ShortContainer, 5),
];

/// A simulated container.
pub(crate) struct Container {
    cgroup_id: u64,
    pub(crate) name: ContainerName,
    pub(crate) first_pid: u32,
    pub(crate) address: [u8; 16],
    pub(crate) comm: &'static str,
}

const COMMS: [&str; 8] = ["nginx", "java", "python3", "node", "postgres", "envoy", "redis-server", "api"];
const PIDS_PER_CONTAINER: u32 = 16;
const CPUS: u64 = 16;
pub(super) const RUNTIME_PID: u32 = 900;
pub(super) const RUNTIME_CGROUP: u64 = 77;

/// A record that belongs behind another.
struct Later {
    /// The index from which on it is due.
    due: usize,
    record: Vec<u8>,
    is_mortal: bool,
}

impl Later {
    fn push_to(self, pool: &mut Pool) {
        if self.is_mortal {
            pool.push_mortal(&self.record);
        } else {
            pool.push(&self.record);
        }
    }
}

/// Makes the records of one simulated node.
pub struct Profile {
    pub(super) random: Random,
    pub(super) containers: Vec<Container>,
    popularity: Zipf,
    pub(super) services: Zipf,
    next_pid: u32,
    next_cgroup: u64,
    /// Processes whose deaths were made.
    pub(super) mortals: u32,
}

impl Profile {
    /// A node with `entities` containers.
    pub fn new(seed: u64, entities: usize) -> Self {
        let mut random = Random::new(seed);
        let first_cgroup = 10_000 + random.below(1 << 20);
        let containers: Vec<Container> = (0..entities.max(1))
            .map(|index| Container {
                cgroup_id: first_cgroup + 3 * index as u64,
                name: ContainerName::random(&mut random),
                first_pid: 2_000 + index as u32 * PIDS_PER_CONTAINER,
                address: ipv4([10, 244, random.below(250) as u8, random.below(250) as u8]),
                comm: COMMS[random.below(COMMS.len() as u64) as usize],
            })
            .collect();
        Self {
            next_pid: 2_000 + containers.len() as u32 * PIDS_PER_CONTAINER,
            next_cgroup: first_cgroup + 3 * containers.len() as u64,
            mortals: 0,
            popularity: Zipf::new(containers.len()),
            services: Zipf::new(64),
            random,
            containers,
        }
    }

    /// The node's containers.
    pub(crate) fn containers(&self) -> &[Container] {
        &self.containers
    }

    /// The place among the containers of the one that a record is about.
    pub(crate) fn container_of(&self, cgroup_id: u64) -> Option<usize> {
        self.containers.binary_search_by_key(&cgroup_id, |container| container.cgroup_id).ok()
    }

    /// The records that introduce the containers: their cgroups are made.
    pub fn introductions(&self) -> Pool {
        let mut pool = Pool::default();
        for container in &self.containers {
            let header = Header {
                kind: RecordKind::CgroupMkdir as u16,
                size: size_of::<Cgroup>() as u16,
                cpu: 0,
                time_ns: 0,
                cgroup_id: container.cgroup_id,
                pid: RUNTIME_PID,
                tid: RUNTIME_PID,
            };
            pool.push(cgroup(header, &container.name).as_bytes());
        }
        pool
    }

    /// Makes at least `records` records: the share `clues`, from 0 up to 1, are deaths, the others are in the
    /// proportions of the profile.
    pub fn pool(&mut self, records: usize, clues: f64) -> Pool {
        let mut pool = Pool::default();
        let mut later: Vec<Later> = Vec::new();
        let mut made = 0;
        while pool.len() + later.len() < records {
            if let Some(due) = later.iter().position(|one| one.due <= pool.len()) {
                later.swap_remove(due).push_to(&mut pool);
                continue;
            }
            let due = pool.len() + 1 + self.random.below(400) as usize;
            if (made as f64) < clues * (pool.len() + later.len()) as f64 {
                let (record, count) = self.death(&mut pool);
                made += count;
                later.push(Later { due, record, is_mortal: true });
                continue;
            }
            let record = match self.random.weighted(&MIXED) {
                Choice::One(kind) => {
                    self.one(kind, &mut pool);
                    continue;
                }
                Choice::Process => self.process(&mut pool),
                Choice::Termination => self.termination(&mut pool),
                Choice::ShortContainer => self.short_container(&mut pool),
            };
            later.push(Later { due, record, is_mortal: false });
        }
        later.sort_by_key(|one| one.due);
        for one in later {
            one.push_to(&mut pool);
        }
        pool
    }

    /// A container, the popular ones more often.
    pub(super) fn draw(&mut self) -> usize {
        self.popularity.draw(&mut self.random)
    }

    pub(super) fn header<R>(&mut self, kind: RecordKind, container: usize) -> Header {
        let random = self.random.next_u64();
        let pid = self.containers[container].first_pid + (random & 3) as u32;
        Header {
            kind: kind as u16,
            size: size_of::<R>() as u16,
            cpu: ((random >> 8) % CPUS) as u32,
            time_ns: 0,
            cgroup_id: self.containers[container].cgroup_id,
            pid,
            tid: pid + ((random >> 32) & 3) as u32,
        }
    }

    /// A process of a container starts; its end is returned.
    fn process(&mut self, pool: &mut Pool) -> Vec<u8> {
        let container = self.draw();
        let (pid, parent_pid) = (self.new_pid(), self.containers[container].first_pid);
        let mut header = self.header::<Exec>(RecordKind::Exec, container);
        (header.pid, header.tid) = (pid, pid);
        let comm = comm(self.random.weighted(&[("sh", 4), ("curl", 3), ("pg_isready", 2), ("cat", 1)]));
        let ns_pid = 20 + self.random.below(30_000) as u32;
        // Its parent is the container's own first process: it is one of many, with which nothing lives or dies.
        let (start_time_ns, parent_cgroup_id) = (0, header.cgroup_id);
        let exec = Exec { header, parent_pid, ns_pid, ns_level: 1, pad: 0, start_time_ns, parent_cgroup_id, comm };
        pool.push(exec.as_bytes());
        let code = self.random.weighted(&[(0, 97), (1, 3)]);
        self.exit(header, parent_pid, ns_pid, code << 8, comm)
    }

    /// The runtime stops a process of a container; returns its end.
    fn termination(&mut self, pool: &mut Pool) -> Vec<u8> {
        let container = self.draw();
        let mut header = self.header::<Signal>(RecordKind::Signal, container);
        (header.pid, header.tid) = {
            let pid = self.new_pid();
            (pid, pid)
        };
        let (ns_pid, comm_text) = (20 + self.random.below(30_000) as u32, self.containers[container].comm);
        let signal = Signal {
            header,
            signal: 15,
            code: 0,
            sender_pid: RUNTIME_PID,
            sender_tid: RUNTIME_PID + self.random.below(8) as u32,
            sender_cgroup_id: RUNTIME_CGROUP,
            ns_pid,
            ns_level: 1,
            from_kernel: 0,
            result: 0,
            over_cpu_limit: 0,
            repeats: 0,
            pad: 0,
            sender_start_time_ns: 0,
            comm: comm(comm_text),
            sender_comm: comm("containerd-shim"),
            sender_parent_pid: 1,
            pad2: 0,
            sender_parent_comm: comm("systemd"),
        };
        pool.push(signal.as_bytes());
        let parent_pid = self.containers[container].first_pid;
        self.exit(header, parent_pid, ns_pid, 15, comm(comm_text))
    }

    fn exit(&mut self, like: Header, parent_pid: u32, ns_pid: u32, status: u32, comm: [u8; 16]) -> Vec<u8> {
        let exit = Exit {
            header: Header { kind: RecordKind::Exit as u16, size: size_of::<Exit>() as u16, ..like },
            parent_pid,
            ns_pid,
            ns_level: 1,
            status,
            start_time_ns: self.random.log_uniform(1_000_000_000, 100_000_000_000),
            oom_score_adj: self.random.weighted(&[(985, 3), (-997, 1)]),
            pad: [0; 6],
            comm,
        };
        exit.as_bytes().to_vec()
    }

    /// A container that does not live long appears; its removal is returned.
    fn short_container(&mut self, pool: &mut Pool) -> Vec<u8> {
        let name = ContainerName::random(&mut self.random);
        let mut header = self.header::<Cgroup>(RecordKind::CgroupMkdir, 0);
        (header.pid, header.tid) = (RUNTIME_PID, RUNTIME_PID);
        self.next_cgroup += 3;
        header.cgroup_id = self.next_cgroup;
        pool.push(cgroup(header, &name).as_bytes());
        header.kind = RecordKind::CgroupRmdir as u16;
        cgroup(header, &name).as_bytes().to_vec()
    }

    fn new_pid(&mut self) -> u32 {
        self.next_pid += 1;
        self.next_pid
    }
}

pub(super) fn ipv4(address: [u8; 4]) -> [u8; 16] {
    std::net::Ipv4Addr::from(address).to_ipv6_mapped().octets()
}

fn cgroup(header: Header, name: &ContainerName) -> Cgroup {
    cgroup_at(header, &format!("/{}", name.path()), CONTAINER_LEVEL)
}

pub(super) fn cgroup_at(header: Header, text: &str, level: u32) -> Cgroup {
    let mut path = [0; CGROUP_PATH_BYTES];
    path[..text.len()].copy_from_slice(text.as_bytes());
    Cgroup { header, hierarchy: 0, level, path_bytes: text.len() as u32, pad: 0, creator_cgroup_id: 0, path }
}

#[cfg(test)]
mod tests {
    use super::{POOL_RECORDS, Profile};
    use crate::load::pool::Pool;
    use std::collections::{HashMap, HashSet};
    use tapio_probes::record::{Exec, Exit, Header, RecordKind};
    use zerocopy::FromBytes;

    fn header(record: &[u8]) -> Header {
        Header::read_from_prefix(record).expect("a header").0
    }

    fn all(pool: &Pool) -> Vec<&[u8]> {
        (0..pool.len()).map(|index| pool.record(index)).collect()
    }

    fn counts(pool: &Pool) -> HashMap<RecordKind, usize> {
        let mut counts = HashMap::new();
        for index in 0..pool.len() {
            let header = header(pool.record(index));
            assert_eq!(usize::from(header.size), pool.record(index).len());
            let kind = RecordKind::from_u16(header.kind).expect("a known kind");
            *counts.entry(kind).or_default() += 1;
        }
        counts
    }

    #[test]
    fn the_mix_is_the_documented_one() {
        let pool = Profile::new(1, 100).pool(200_000, 0.0);
        let counts = counts(&pool);
        let per_mille = |kind| counts[&kind] as f64 * 1000.0 / pool.len() as f64;
        for (kind, expected) in [
            (RecordKind::Tcp, 550.0),
            (RecordKind::Dns, 100.0),
            (RecordKind::BlockIo, 80.0),
            (RecordKind::Reclaim, 80.0),
            (RecordKind::SyscallError, 80.0),
            (RecordKind::RunQueue, 50.0),
            (RecordKind::PacketDrop, 30.0),
            (RecordKind::Exec, 14.0),
            (RecordKind::Exit, 14.5),
            (RecordKind::Signal, 0.5),
            (RecordKind::CgroupMkdir, 0.5),
            (RecordKind::CgroupRmdir, 0.5),
        ] {
            let share = per_mille(kind);
            assert!((share - expected).abs() < expected * 0.1 + 0.3, "{kind:?}: {share}");
        }
        assert!(!counts.contains_key(&RecordKind::Oom));
    }

    #[test]
    fn every_container_is_introduced_before_it_is_spoken_of() {
        let mut profile = Profile::new(5, 50);
        let introductions = profile.introductions();
        let mut known: HashSet<u64> =
            (0..introductions.len()).map(|index| header(introductions.record(index)).cgroup_id).collect();
        assert_eq!(known.len(), 50);
        let pool = profile.pool(POOL_RECORDS, 0.0);
        for index in 0..pool.len() {
            let header = header(pool.record(index));
            if header.kind == RecordKind::CgroupMkdir as u16 {
                known.insert(header.cgroup_id);
            }
            assert!(known.contains(&header.cgroup_id), "{header:?}");
        }
    }

    #[test]
    fn processes_end_after_they_started_and_mostly_well() {
        let pool = Profile::new(9, 50).pool(100_000, 0.0);
        let (mut started, mut ended, mut well) = (HashSet::new(), 0, 0);
        for index in 0..pool.len() {
            let record = pool.record(index);
            match RecordKind::from_u16(header(record).kind) {
                Some(RecordKind::Exec) => {
                    started.insert(Exec::read_from_bytes(record).expect("an exec").header.pid);
                }
                Some(RecordKind::Exit) => {
                    let exit = Exit::read_from_bytes(record).expect("an exit");
                    if exit.status != 15 {
                        assert!(started.remove(&exit.header.pid));
                        ended += 1;
                        well += u32::from(exit.status == 0);
                    }
                }
                _ => {}
            }
        }
        assert!(started.is_empty());
        assert!(well * 10 > ended * 9 && well < ended);
    }

    #[test]
    fn a_seed_makes_the_same_pool_except_times() {
        let (mut first, second) = (Profile::new(3, 9).pool(1000, 0.0), Profile::new(3, 9).pool(1000, 0.0));
        assert_eq!(all(&first), all(&second));
        assert_ne!(all(&first), all(&Profile::new(4, 9).pool(1000, 0.0)));
        first.stamp(7, 123_456_789);
        assert_eq!(header(first.record(7)).time_ns, 123_456_789);
        first.stamp(7, 0);
        assert_eq!(all(&first), all(&second));
    }

    #[test]
    fn records_differ_from_one_another() {
        let pool = Profile::new(2, 1000).pool(POOL_RECORDS, 0.0);
        let distinct: HashSet<&[u8]> = (0..pool.len()).map(|index| pool.record(index)).collect();
        assert!(distinct.len() * 100 > pool.len() * 99, "{}", distinct.len());
    }
}
