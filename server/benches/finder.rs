//! What the finder costs a clue: processes of many containers die, each by two or three clues, as `tapio-perf load --clues`
//! offers them.

use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tapio_server::cluster::ClusterLosses;
use tapio_server::correlate::batch::{Batch, Entry};
use tapio_server::correlate::clue::{Clue, ClueDetail, EvidenceId, Exit, Kill, LimitLevel, NsPid, Oom, SenderClass};
use tapio_server::correlate::{EntityInfo, NodeRef};
use tapio_server::findings::{Finder, FinderConfig, FindingStore, PatternSet};
use tapio_wire::event::{EntityKind, Role};

const CLUES: usize = 4096;
const NODES: u64 = 12;
const SIGKILL: u32 = 9;
const SIGSEGV: u32 = 11;
const SIGTERM: u32 = 15;

/// Deaths of containers, one after another.
struct Deaths {
    entities: Vec<Arc<EntityInfo>>,
    runtime: Arc<EntityInfo>,
    random: u64,
    pid: u32,
    /// Between two deaths of all nodes together.
    pace_ns: u64,
    at_ns: u64,
}

impl Deaths {
    fn new(entities: u64, pace_ns: u64) -> Self {
        let entity = |number: u64| {
            let node = NodeRef::named(&format!("node-{}", number % NODES));
            Arc::new(EntityInfo {
                kind: Some(EntityKind::Container),
                parent: 1_000_000 + number,
                name: "app".into(),
                container_id: format!("{number:064x}"),
                cgroup: format!("/kubepods/burstable/pod{number:032x}/{number:064x}"),
                ..EntityInfo::unknown(&node, 1 + number)
            })
        };
        let runtime = EntityInfo {
            kind: Some(EntityKind::Unit),
            name: "containerd.service".into(),
            ..EntityInfo::unknown(&NodeRef::named("node-0"), u64::MAX)
        };
        let entities = (0..entities).map(entity).collect();
        Self { entities, runtime: Arc::new(runtime), random: 1, pid: 1000, pace_ns, at_ns: 1_800_000_000_000_000_000 }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % bound
    }

    fn death(&mut self, out: &mut Vec<Clue>) {
        let place = self.below(self.entities.len() as u64) as usize;
        let entity = Arc::clone(&self.entities[place]);
        self.pid += 1;
        self.at_ns += self.pace_ns;
        let (pid, at_ns) = (self.pid, self.at_ns);
        let role = if self.below(4) == 0 { Role::First } else { Role::Member };
        let ns = NsPid { pid: if role == Role::First { 1 } else { pid }, level: 1 };
        let boottime_ns = at_ns - 1_799_000_000_000_000_000;
        let clue = |index: u32, detail: ClueDetail| Clue {
            entity: Arc::clone(&entity),
            pid,
            boottime_ns: boottime_ns + u64::from(index) * 1_000,
            realtime_ns: at_ns + u64::from(index) * 1_000,
            evidence: EvidenceId { node: entity.node.id, epoch: 1, seq: u64::from(pid), index },
            detail,
        };
        let (sent, sender_class, sender) = match self.below(10) {
            0..3 => (SIGTERM, SenderClass::Runtime, &self.runtime),
            3..5 => (SIGKILL, SenderClass::Outside, &self.runtime),
            5..7 => (SIGSEGV, SenderClass::Kernel, &entity),
            _ => (SIGKILL, SenderClass::Kernel, &entity),
        };
        out.push(clue(
            0,
            ClueDetail::Kill(Kill {
                signal: sent,
                code: 0,
                comm: "app".into(),
                ns,
                sender_pid: 1,
                sender_comm: "sender".into(),
                sender: Arc::clone(sender),
                sender_class,
                ignored: false,
                role,
                over_cpu_limit: false,
                repeats: 0,
            }),
        ));
        if (sent, sender_class) == (SIGKILL, SenderClass::Kernel) {
            out.push(clue(
                1,
                ClueDetail::Oom(Oom {
                    comm: "app".into(),
                    ns,
                    allocator_pid: pid,
                    allocator_comm: "app".into(),
                    rss_bytes: 200 << 20,
                    limit_cgroup: entity.cgroup.as_str().into(),
                    limit_bytes: 256 << 20,
                    usage_bytes: 256 << 20,
                    oom_score_adj: 985,
                    role,
                    limit_height: 0,
                    limit_level: LimitLevel::Own,
                    allocator_inside: Some(true),
                    kills_for_limit: true,
                    anon_pages: 0,
                    shmem_pages: 0,
                }),
            ));
        }
        out.push(clue(
            2,
            ClueDetail::Exit(Exit {
                comm: "app".into(),
                parent_pid: 1,
                ns,
                status: sent,
                start_time_ns: boottime_ns.saturating_sub(5_000_000_000),
                oom_score_adj: 985,
                role,
            }),
        ));
    }

    fn batch(&mut self) -> (Batch, u64) {
        let mut clues = Vec::with_capacity(CLUES + 2);
        while clues.len() < CLUES {
            self.death(&mut clues);
        }
        clues.truncate(CLUES);
        let entries = clues.into_iter().map(|clue| Entry::Clue(Box::new(clue))).collect();
        (Batch { server: "a".into(), address: String::new(), entries }, self.at_ns)
    }
}

fn finder(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("finder");
    group.throughput(Throughput::Elements(CLUES as u64));
    group.measurement_time(Duration::from_secs(5)).sample_size(20);
    // Deaths spread over 6,000 containers, 5,000 clues a second; a storm of 50,000; and a few containers that die all the time.
    for (name, entities, clues_per_second) in
        [("6000 containers", 6_000, 5_000), ("storm", 6_000, 50_000), ("10 containers", 10, 5_000)]
    {
        let patterns = Arc::new(PatternSet::embedded().expect("embedded patterns are valid"));
        let (store, losses) = (Arc::new(FindingStore::new(10_000)), Arc::new(ClusterLosses::default()));
        let finder = Finder::start_from_log(&FinderConfig::default(), patterns, 100_000, losses, Arc::clone(&store))
            .expect("the finder starts");
        let mut deaths = Deaths::new(entities, 2_300_000_000 / clues_per_second);
        group.bench_function(name, |bencher| {
            bencher.iter_batched(
                || deaths.batch(),
                |(batch, at_ns)| {
                    finder.send(batch, at_ns).expect("the finder runs");
                    finder.bus().barrier().expect("the finder runs");
                },
                BatchSize::PerIteration,
            );
        });
        println!("{} findings", store.len());
    }
    group.finish();
}

criterion_group!(benches, finder);
criterion_main!(benches);
