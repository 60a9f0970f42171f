//! Deaths for the servers' finders: processes of many containers that end by signals, one after another.
//!
//! In: how many of the records are to make clues. Out: records of deaths, of which each makes a clue that patterns want. What must
//! hold: the share is met; each death is of a process of its own, also when the pool is played again.
//!
//! Of ten deaths:
//!
//! | deaths | clues of each | what happens |
//! |---|---|---|
//! | 3 | 2 | the container runtime sends SIGTERM, the process ends by it |
//! | 2 | 2 | a process outside sends SIGKILL |
//! | 2 | 2 | the kernel sends SIGSEGV, as for a fault |
//! | 3 | 3 | the container's memory limit: the kernel sends SIGKILL, and says whom it chose and why |

use tapio_probes::record::{Cgroup, Exit, Header, Oom, RecordKind, Signal, comm};
use zerocopy::IntoBytes;

use super::pool::{MORTALS_FIRST, Pool};
use super::profile::{Profile, RUNTIME_CGROUP, RUNTIME_PID, cgroup_at};

/// A person's session.
const OUTSIDE_CGROUP: u64 = 78;
const OUTSIDE_PID: u32 = 901;
const SIGKILL: u32 = 9;
const SIGSEGV: u32 = 11;
const SIGTERM: u32 = 15;
const SI_KERNEL: i32 = 0x80;
/// Bit of a wait status: a core was dumped.
const CORE: u32 = 0x80;
const LIMIT_BYTES: u64 = 256 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    Terminated,
    KilledFromOutside,
    Crashed,
    OutOfMemory,
}

const DEATHS: [(Death, u32); 4] =
    [(Death::Terminated, 3), (Death::KilledFromOutside, 2), (Death::Crashed, 2), (Death::OutOfMemory, 3)];

/// Who sent a signal.
struct Sender {
    pid: u32,
    cgroup_id: u64,
    comm: &'static str,
    from_kernel: bool,
}

impl Profile {
    /// The records that introduce those who send signals: their cgroups are made.
    pub(super) fn introduce_senders(pool: &mut Pool) {
        for (cgroup_id, path) in [
            (RUNTIME_CGROUP, "/system.slice/containerd.service"),
            (OUTSIDE_CGROUP, "/user.slice/user-0.slice/session-1.scope"),
        ] {
            let header = Header {
                kind: RecordKind::CgroupMkdir as u16,
                size: size_of::<Cgroup>() as u16,
                cpu: 0,
                time_ns: 0,
                cgroup_id,
                pid: 1,
                tid: 1,
            };
            let level = path.matches('/').count() as u32;
            pool.push(cgroup_at(header, path, level).as_bytes());
        }
    }

    /// A process dies: appends what comes before; its end is returned, and how many clues that makes.
    pub(super) fn death(&mut self, pool: &mut Pool) -> (Vec<u8>, usize) {
        // Of all alike: a popular one that died all the time would be a flood, which is measured by tapio-perf flood.
        let container = self.random.below(self.containers.len() as u64) as usize;
        let first_pid = self.containers[container].first_pid;
        let pid = MORTALS_FIRST + self.mortals;
        self.mortals += 1;
        let comm_text = self.containers[container].comm;
        // One in four leads its container.
        let ns_pid = if self.random.below(4) == 0 { 1 } else { 20 + self.random.below(30_000) as u32 };
        let header = Header { pid, tid: pid, ..self.header::<Signal>(RecordKind::Signal, container) };
        let death = self.random.weighted(&DEATHS);
        let (signal, sender, status) = match death {
            Death::Terminated => {
                let tid = RUNTIME_PID + self.random.below(8) as u32;
                (
                    SIGTERM,
                    Sender { pid: tid, cgroup_id: RUNTIME_CGROUP, comm: "containerd-shim", from_kernel: false },
                    0,
                )
            }
            Death::KilledFromOutside => {
                (SIGKILL, Sender { pid: OUTSIDE_PID, cgroup_id: OUTSIDE_CGROUP, comm: "bash", from_kernel: false }, 0)
            }
            Death::Crashed | Death::OutOfMemory => {
                let (signal, status) = if death == Death::Crashed { (SIGSEGV, CORE) } else { (SIGKILL, 0) };
                // The kernel sends it while a process of the container runs.
                let sender = Sender { pid: first_pid, cgroup_id: header.cgroup_id, comm: comm_text, from_kernel: true };
                (signal, sender, status)
            }
        };
        let sent = Signal {
            header,
            signal,
            code: if sender.from_kernel { SI_KERNEL } else { 0 },
            sender_pid: sender.pid,
            sender_tid: sender.pid,
            sender_cgroup_id: sender.cgroup_id,
            ns_pid,
            ns_level: 1,
            from_kernel: u8::from(sender.from_kernel),
            result: 0,
            over_cpu_limit: 0,
            pad: 0,
            repeats: 0,
            sender_start_time_ns: 0,
            sender_parent_pid: 1,
            pad2: 0,
            comm: comm(comm_text),
            sender_comm: comm(sender.comm),
            sender_parent_comm: comm("systemd"),
        };
        pool.push_mortal(sent.as_bytes());
        if death == Death::OutOfMemory {
            pool.push_mortal(self.out_of_memory(container, header, ns_pid).as_bytes());
        }
        let exit = Exit {
            header: Header { kind: RecordKind::Exit as u16, size: size_of::<Exit>() as u16, ..header },
            parent_pid: first_pid,
            ns_pid,
            ns_level: 1,
            status: signal | status,
            start_time_ns: self.random.log_uniform(1_000_000_000, 100_000_000_000),
            oom_score_adj: 985,
            pad: [0; 6],
            comm: comm(comm_text),
        };
        (exit.as_bytes().to_vec(), if death == Death::OutOfMemory { 3 } else { 2 })
    }

    fn out_of_memory(&mut self, container: usize, of: Header, ns_pid: u32) -> Oom {
        let (allocator, cgroup_id) = (self.containers[container].first_pid, of.cgroup_id);
        let comm = comm(self.containers[container].comm);
        let rss = LIMIT_BYTES / 2 + self.random.below(LIMIT_BYTES / 2);
        let scope = self.containers[container].name.scope();
        let mut limit_name = [0; 128];
        limit_name[..scope.len()].copy_from_slice(scope.as_bytes());
        Oom {
            header: Header { kind: RecordKind::Oom as u16, size: size_of::<Oom>() as u16, ..of },
            ns_pid,
            ns_level: 1,
            allocator_pid: allocator,
            allocator_tid: allocator,
            allocator_cgroup_id: cgroup_id,
            anon_rss_bytes: rss,
            file_rss_bytes: 1 << 20,
            shmem_rss_bytes: 0,
            total_vm_bytes: 4 * LIMIT_BYTES,
            limit_cgroup_id: cgroup_id,
            limit_bytes: LIMIT_BYTES,
            usage_bytes: LIMIT_BYTES,
            limit_height: 0,
            oom_score_adj: 985,
            allocator_inside: 1,
            pad: 0,
            start_time_ns: 0,
            parent_pid: allocator,
            pad2: 0,
            comm,
            allocator_comm: comm,
            limit_name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::profile::POOL_RECORDS;
    use std::collections::HashMap;
    use zerocopy::FromBytes;

    fn header(record: &[u8]) -> Header {
        Header::read_from_prefix(record).expect("a header").0
    }

    fn is_mortal(record: &[u8]) -> bool {
        header(record).pid >= MORTALS_FIRST
    }

    #[test]
    fn clues_take_their_share_of_the_mixed_profile() {
        for share in [0.02, 0.5, 0.9] {
            let pool = Profile::new(1, 100).pool(POOL_RECORDS, share);
            let clues = (0..POOL_RECORDS).filter(|&index| is_mortal(pool.record(index))).count();
            let found = clues as f64 / POOL_RECORDS as f64;
            assert!((found - share).abs() < 0.005, "{share}: {found}");
        }
        let plain = Profile::new(1, 100).pool(POOL_RECORDS, 0.0);
        assert!((0..plain.len()).all(|index| !is_mortal(plain.record(index))));
    }

    #[test]
    fn each_death_has_records_from_cause_to_end() {
        let pool = Profile::new(7, 50).pool(POOL_RECORDS, 0.5);
        let mut kinds_by_pid: HashMap<u32, Vec<RecordKind>> = HashMap::new();
        for index in (0..pool.len()).filter(|&index| is_mortal(pool.record(index))) {
            let header = header(pool.record(index));
            kinds_by_pid.entry(header.pid).or_default().push(RecordKind::from_u16(header.kind).expect("a known kind"));
        }
        let ooms = kinds_by_pid
            .values()
            .filter(|kinds| **kinds == [RecordKind::Signal, RecordKind::Oom, RecordKind::Exit])
            .count();
        let others = kinds_by_pid.values().filter(|kinds| **kinds == [RecordKind::Signal, RecordKind::Exit]).count();
        assert_eq!(ooms + others, kinds_by_pid.len());
        assert!(
            ooms * 10 > kinds_by_pid.len() * 2 && ooms * 10 < kinds_by_pid.len() * 4,
            "{ooms} of {}",
            kinds_by_pid.len()
        );
    }

    #[test]
    fn played_again_it_is_other_processes_that_die() {
        let mut pool = Profile::new(7, 50).pool(2000, 0.5);
        let pids = |pool: &Pool| -> Vec<u32> { (0..pool.len()).map(|index| header(pool.record(index)).pid).collect() };
        let before = pids(&pool);
        pool.renew();
        let after = pids(&pool);
        let last = before.iter().copied().max().expect("some");
        for (before, after) in before.iter().zip(&after) {
            if *before < MORTALS_FIRST {
                assert_eq!(before, after);
            } else {
                assert!(*after > last, "{after}");
            }
        }
        // It goes round at the end of what pids may be.
        for _ in 0..20_000 {
            pool.renew();
        }
        assert!(pids(&pool).iter().all(|&pid| pid < 1 << 22));
    }
}
