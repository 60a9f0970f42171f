//! From a configuration to attached programs.
//!
//! In: a [`LoadConfig`] and the kernel's type information. Out: [`Probes`] with a verdict on every program, or an [`Error`]
//! when none can work. The maps are made once and belong to [`Probes`]; the kernel detaches a program when its link's
//! descriptor is closed, so dropping [`Probes`] leaves nothing behind.

mod error;
mod machine;
mod rings;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Map, MapData, MapError};
use aya::programs::Program;
use aya::{Btf, Ebpf, EbpfLoader, VerifierLogLevel};

use crate::aggregate::Aggregates;
use crate::attach::{Failure, Link, ProgramState, Verdict, attach, detach};
use crate::controls::{Controls, Tuning};
use crate::cost::{self, RunTime};
use crate::drop_reasons;
use crate::object::{
    AUDITED, AUDITED_PATH_BYTES_MAX, AUDITED_PATHS_MAX, BULK, CONTROL, COUNTERS, COUNTERS_PER_CPU,
    DEFAULT_AUDITED_PATHS, DEFAULT_CGROUP_RECORDS_PER_SECOND, DEFAULT_ERRNOS, DEFAULT_ERRNOS_OF_FORK,
    DEFAULT_SIGNAL_MASK, DEFAULT_SIGNAL_MASK_UNHANDLED, EXCLUDED, LETHAL, MAPS_OF_ONE_PROGRAM, PROGRAMS, ProgramInfo,
    SHARE_BURST_NS, SHARES, TUNING, errno_words, histogram_map_entries, object, off_by_default,
};
use crate::run_time::RunTimes;

pub use self::error::Error;
use self::error::object_error;
pub use self::machine::possible_cpus;
use self::machine::{lift_memory_lock_limit, read_btf, recursion_misses};
use self::rings::{make_bulk_rings, ring_bytes};

/// Where a kernel with `CONFIG_DEBUG_INFO_BTF` shows its type information.
const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// What to load, and with which sizes.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// Size of the lethal lane's ring; rounded up to a power of two of pages.
    pub lethal_ring_bytes: u32,
    /// Size of each CPU's ring of the bulk lane; rounded up likewise.
    pub bulk_ring_bytes: u32,
    /// Thresholds and sampling to begin with, see [`Probes::controls`].
    pub tuning: Tuning,
    /// The process that reads the records: its own execs and connections, and signals sent to it, are not recorded.
    pub own_pid: Option<u32>,
    /// Which signals are recorded, see [`crate::signal_mask`].
    pub signal_mask: u64,
    /// Which signals are recorded where they are not handled, or come from another cgroup.
    pub signal_mask_unhandled: u64,
    /// When a DNS query counts as unanswered.
    pub dns_timeout: Duration,
    /// The kernel's type information, [`None`] for `/sys/kernel/btf/vmlinux`.
    pub btf: Option<PathBuf>,
    /// Names of programs to leave out, see [`crate::PROGRAMS`]; at first those that run only when they are asked for.
    pub disabled: Vec<String>,
    /// Kinds of the lethal lane that are not wanted, see [`crate::kinds`]: as if there were no program for them.
    pub lethal_kinds_off: u64,
    /// How many records of the lethal lane a cgroup may bring about a second, on average; a quarter of a second's at once. OOM kills
    /// are not bounded, and a quarter as much is taken on top of what matters most. 0 for no bound.
    pub cgroup_records_per_second: u32,
    /// Error numbers of system calls that are counted, and those that are counted only where a process should be made.
    pub errnos: Vec<u32>,
    pub errnos_of_fork: Vec<u32>,
    /// How the paths begin whose opening is audited, besides kubelet's secrets, config maps and projected volumes.
    pub audited_paths: Vec<String>,
}

impl Default for LoadConfig {
    fn default() -> Self {
        Self {
            lethal_ring_bytes: 1 << 20,
            bulk_ring_bytes: 256 << 10,
            tuning: Tuning::default(),
            own_pid: Some(std::process::id()),
            signal_mask: DEFAULT_SIGNAL_MASK,
            signal_mask_unhandled: DEFAULT_SIGNAL_MASK_UNHANDLED,
            dns_timeout: Duration::from_secs(5),
            btf: None,
            disabled: off_by_default(),
            lethal_kinds_off: 0,
            cgroup_records_per_second: DEFAULT_CGROUP_RECORDS_PER_SECOND,
            errnos: DEFAULT_ERRNOS.to_vec(),
            errnos_of_fork: DEFAULT_ERRNOS_OF_FORK.to_vec(),
            audited_paths: DEFAULT_AUDITED_PATHS.iter().map(|&path| path.to_owned()).collect(),
        }
    }
}

/// Whether the memory controller belongs to a version 1 hierarchy: cgroups(7), `/proc/cgroups` has the hierarchy's number, 0 for
/// version 2.
fn memory_is_version_1() -> bool {
    let text = std::fs::read_to_string("/proc/cgroups").unwrap_or_default();
    let hierarchy = text.lines().find_map(|line| line.strip_prefix("memory")?.split_whitespace().next()?.parse().ok());
    hierarchy.is_some_and(|number: u32| number != 0)
}

/// The attached programs and their maps.
#[derive(Debug)]
pub struct Probes {
    object: Ebpf,
    bulk: Vec<MapData>,
    bulk_ring_bytes: usize,
    controls: Arc<Controls>,
    aggregates: Aggregates,
    verdicts: Vec<Verdict>,
    /// Links that hold each program to its hook, in the order of the verdicts.
    links: Vec<Option<Link>>,
    lethal_ring_bytes: usize,
    cgroup_records_per_second: u32,
    possible_cpus: usize,
}

impl Probes {
    /// Loads the object and attaches every program that this kernel takes.
    pub fn load(config: &LoadConfig) -> Result<Self, Error> {
        for name in &config.disabled {
            if !PROGRAMS.iter().any(|program| program.name == name) {
                return Err(Error::UnknownProgram { name: name.clone() });
            }
        }
        let audited = audited_keys(&config.audited_paths)?;
        let lethal_ring_bytes = ring_bytes(config.lethal_ring_bytes)?;
        let bulk_ring_bytes = ring_bytes(config.bulk_ring_bytes)?;
        let possible_cpus = possible_cpus()?;
        // A new loader reads the kernel's types for itself. They take 14 MiB: they go before the same come again, to be shared.
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        let kernel_btf = read_btf(config.btf.as_deref().unwrap_or(Path::new(KERNEL_BTF)))?;
        let btf = kernel_btf.parse()?;
        let harmless_drops = drop_reasons::learn(kernel_btf.bytes());
        drop(kernel_btf);
        lift_memory_lock_limit();

        let counters = u32::try_from(possible_cpus * COUNTERS_PER_CPU)
            .map_err(|_| Error::Object(format!("it has {possible_cpus} CPUs")))?;
        let own_tgid = config.own_pid.unwrap_or(0);
        let share_interval_ns = 1_000_000_000_u64.checked_div(u64::from(config.cgroup_records_per_second)).unwrap_or(0);
        let page_bytes = rustix::param::page_size() as u64;
        for (map, entries) in histogram_map_entries(possible_cpus) {
            loader.map_max_entries(map, entries);
        }
        for (map, program) in MAPS_OF_ONE_PROGRAM {
            if config.disabled.iter().any(|name| name == program) {
                loader.map_max_entries(map, 1);
            }
        }
        let mut object = loader
            .btf(Some(&btf))
            .verifier_log_level(VerifierLogLevel::DEBUG)
            .map_max_entries(LETHAL, lethal_ring_bytes)
            .map_max_entries(COUNTERS, counters)
            .map_max_entries(BULK, possible_cpus as u32)
            .override_global("own_tgid", &own_tgid, true)
            .override_global("signal_mask", &config.signal_mask, true)
            .override_global("signal_mask_unhandled", &config.signal_mask_unhandled, true)
            .override_global("memory_is_version_1", &u32::from(memory_is_version_1()), true)
            .override_global("share_interval_ns", &share_interval_ns, true)
            .override_global("share_burst_ns", &SHARE_BURST_NS, true)
            .override_global("lethal_kinds_off", &config.lethal_kinds_off, true)
            .override_global("errnos", &errno_words(&config.errnos), true)
            .override_global("errnos_of_fork", &errno_words(&config.errnos_of_fork), true)
            .override_global("page_bytes", &page_bytes, true)
            .override_global("lethal_quarter", &(lethal_ring_bytes / 4), true)
            // A kernel that takes no ring of another size than the template's is given a smaller one, and never gets that far.
            .override_global("bulk_quarter", &(bulk_ring_bytes / 4), true)
            .override_global("harmless_drops", &harmless_drops, true)
            .load(object())
            .map_err(object_error)?;

        let (bulk, bulk_ring_bytes) = make_bulk_rings(&mut object, bulk_ring_bytes)?;
        fill_audited(&mut object, &audited).map_err(|error| object_error(error.into()))?;
        let (tuning, excluded) = (take(&mut object, TUNING), take(&mut object, EXCLUDED));
        let controls = Controls::new(tuning, excluded, config.tuning).map_err(|error| object_error(error.into()))?;
        let controls = Arc::new(controls);
        let aggregates =
            Aggregates::open(&mut object, config.dns_timeout).map_err(|error| object_error(error.into()))?;
        let (verdicts, links) = attach_all(&mut object, &btf, PROGRAMS, &config.disabled)?;
        Ok(Self {
            object,
            bulk,
            bulk_ring_bytes: bulk_ring_bytes as usize,
            controls,
            aggregates,
            verdicts,
            links,
            lethal_ring_bytes: lethal_ring_bytes as usize,
            cgroup_records_per_second: config.cgroup_records_per_second,
            possible_cpus,
        })
    }

    /// How every program of [`crate::PROGRAMS`] fared, in that order.
    pub fn verdicts(&self) -> &[Verdict] {
        &self.verdicts
    }

    /// The ring of the lethal lane.
    pub fn lethal_ring(&self) -> BorrowedFd<'_> {
        self.map(LETHAL)
    }

    /// Size of the lethal ring's data: a power of two, at least a page.
    pub fn lethal_ring_bytes(&self) -> usize {
        self.lethal_ring_bytes
    }

    /// The rings of the bulk lane, by CPU number; one for each of [`Self::possible_cpus`].
    pub fn bulk_rings(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.bulk.iter().map(|ring| ring.fd().as_fd())
    }

    /// Size of each bulk ring's data: a power of two, at least a page. Before Linux 5.10 it is 64 KiB whatever was asked for.
    pub fn bulk_ring_bytes(&self) -> usize {
        self.bulk_ring_bytes
    }

    /// What may be changed while the programs run.
    pub fn controls(&self) -> Arc<Controls> {
        Arc::clone(&self.controls)
    }

    /// One page that can be mapped; at its start the `u32` that the reader sets to 1 before it sleeps.
    pub fn control_map(&self) -> BorrowedFd<'_> {
        self.map(CONTROL)
    }

    /// The counters, an array that can be mapped, see [`crate::counter_index`].
    pub fn counters_map(&self) -> BorrowedFd<'_> {
        self.map(COUNTERS)
    }

    /// What each cgroup has had of the lethal lane, an array that can be mapped, see [`crate::Shares`].
    pub(crate) fn shares_map(&self) -> BorrowedFd<'_> {
        self.map(SHARES)
    }

    /// See [`LoadConfig::cgroup_records_per_second`].
    pub(crate) fn cgroup_records_per_second(&self) -> u32 {
        self.cgroup_records_per_second
    }

    /// How many `u64` the counters are.
    pub fn counters_len(&self) -> usize {
        self.possible_cpus * COUNTERS_PER_CPU
    }

    /// One more than the highest CPU number that this machine can have.
    pub fn possible_cpus(&self) -> usize {
        self.possible_cpus
    }

    /// How often the kernel skipped a program because it was running on that CPU already: an interrupt in the midst of it,
    /// with the same tracepoint. Such events are in no counter. [`None`] for a program that is not loaded; always 0 before
    /// Linux 6.1, which skips none.
    pub fn missed_runs(&self, program: &str) -> Option<u64> {
        let fd = tracepoint_fd(self.object.program(program)?)?.as_raw_fd();
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
        Some(recursion_misses(&text))
    }

    /// What the kernel measured of a program while [`crate::count_run_time`] was on. [`None`] for one that is not loaded.
    pub fn run_time(&self, program: &str) -> Option<RunTime> {
        cost::run_time(self.object.program(program)?)
    }

    /// What the loaded programs cost; holds them, not their attachment.
    pub fn run_times(&self) -> RunTimes {
        let mut programs = Vec::new();
        for info in PROGRAMS {
            if let Some(fd) = self.object.program(info.name).and_then(tracepoint_fd)
                && let Ok(fd) = fd.try_clone_to_owned()
            {
                programs.push((info.name, fd));
            }
        }
        RunTimes::new(programs)
    }

    /// The sums that the programs keep in the kernel, to be flushed now and then.
    pub fn aggregates(&mut self) -> &mut Aggregates {
        &mut self.aggregates
    }

    /// Takes every program from its hook and leaves it loaded, with its maps: nothing is recorded until [`Self::resume`].
    ///
    /// # Errors
    /// When the kernel refuses what it has no reason to refuse.
    pub fn suspend(&mut self) -> Result<(), Error> {
        for (link, program) in self.links.iter_mut().zip(PROGRAMS) {
            if let Some(link) = link.take() {
                detach(&mut self.object, program, link).map_err(|error| Error::Object(error.to_string()))?;
            }
        }
        Ok(())
    }

    /// Attaches again every program that was attached when this was made.
    ///
    /// # Errors
    /// When the kernel does not take again what it took once.
    pub fn resume(&mut self) -> Result<(), Error> {
        for ((link, program), verdict) in self.links.iter_mut().zip(PROGRAMS).zip(&self.verdicts) {
            if link.is_none() && verdict.state == ProgramState::Attached {
                *link =
                    Some(attach(&mut self.object, program, None).map_err(|_| {
                        Error::Object(format!("the kernel does not take {} a second time", program.name))
                    })?);
            }
        }
        Ok(())
    }

    /// Detaches every program, as dropping does, and returns the sums that nobody has fetched.
    pub fn detach(self) -> Aggregates {
        self.aggregates
    }

    fn map(&self, name: &str) -> BorrowedFd<'_> {
        // The object defines them, so loading it would have failed without.
        match self.object.map(name).and_then(map_data) {
            Some(data) => data.fd().as_fd(),
            None => unreachable!("the object has no map {name}"),
        }
    }
}

/// The descriptor of a program that is loaded and belongs to a tracepoint.
fn tracepoint_fd(program: &Program) -> Option<BorrowedFd<'_>> {
    let fd = match program {
        Program::RawTracePoint(program) => program.fd(),
        Program::BtfTracePoint(program) => program.fd(),
        _ => return None,
    };
    fd.ok().map(AsFd::as_fd)
}

fn map_data(map: &Map) -> Option<&MapData> {
    match map {
        Map::RingBuf(data) | Map::Array(data) => Some(data),
        _ => None,
    }
}

fn take(object: &mut Ebpf, name: &str) -> Map {
    // As in [`Probes::map`].
    object.take_map(name).unwrap_or_else(|| unreachable!("the object has no map {name}"))
}

type PathKey = Key<[u8; AUDITED_PATH_BYTES_MAX + 1]>;

fn audited_keys(paths: &[String]) -> Result<Vec<PathKey>, Error> {
    let mut keys = Vec::new();
    for path in paths {
        let mut text = [0; AUDITED_PATH_BYTES_MAX + 1];
        // One byte more: a path that is read to be compared ends with a NUL.
        if path.is_empty() || path.len() > AUDITED_PATH_BYTES_MAX || keys.len() == AUDITED_PATHS_MAX {
            return Err(Error::AuditedPath { path: path.clone() });
        }
        text[..path.len()].copy_from_slice(path.as_bytes());
        keys.push(Key::new(path.len() as u32 * 8, text));
    }
    Ok(keys)
}

/// The map stays in the object: its descriptor is in programs that are not loaded yet.
fn fill_audited(object: &mut Ebpf, keys: &[PathKey]) -> Result<(), MapError> {
    let map = object.map_mut(AUDITED).unwrap_or_else(|| unreachable!("the object has no map {AUDITED}"));
    let mut paths = LpmTrie::try_from(map)?;
    keys.iter().try_for_each(|key| paths.insert(key, 1u8, 0))
}

/// Attaches what is not disabled. Only when nothing is attached and nothing was permitted, that is an error.
fn attach_all(
    object: &mut Ebpf,
    btf: &Btf,
    programs: &[ProgramInfo],
    disabled: &[String],
) -> Result<(Vec<Verdict>, Vec<Option<Link>>), Error> {
    let mut verdicts = Vec::with_capacity(programs.len());
    let mut links = Vec::with_capacity(programs.len());
    let mut not_permitted = None;
    for program in programs {
        let mut held = None;
        let state = if disabled.iter().any(|name| name == program.name) {
            ProgramState::Disabled
        } else {
            match attach(object, program, Some(btf)) {
                Ok(link) => {
                    held = Some(link);
                    ProgramState::Attached
                }
                Err(Failure::Program(state)) => state,
                Err(Failure::NotPermitted(error)) => {
                    let state = ProgramState::Refused(error.to_string());
                    not_permitted = Some(error);
                    state
                }
            }
        };
        tracing::debug!(program = program.name, hook = program.hook, ?state, "probe");
        verdicts.push(Verdict::new(program, state));
        links.push(held);
    }
    let attached = verdicts.iter().any(|verdict| verdict.state == ProgramState::Attached);
    match not_permitted {
        Some(source) if !attached => Err(Error::NotPermitted { action: "load BPF programs", source }),
        _ => Ok((verdicts, links)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_type_information_is_named() {
        let config = LoadConfig { btf: Some(PathBuf::from("/nonexistent/vmlinux")), ..LoadConfig::default() };
        let error = Probes::load(&config).unwrap_err();
        assert!(matches!(error, Error::NoBtf { .. }), "{error:?}");
        assert!(error.to_string().contains("CONFIG_DEBUG_INFO_BTF"), "{error}");
    }

    #[test]
    fn a_missing_tracepoint_is_reported_and_stops_no_other_program() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP a_missing_tracepoint_is_reported_and_stops_no_other_program: needs root and BPF");
            assert!(!std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all"), "TAPIO_REQUIRE=all");
            return;
        }
        let probes = Probes::load(&LoadConfig::default()).unwrap();
        assert_eq!(probes.missed_runs("process_exec"), Some(0));
        assert_eq!(probes.missed_runs("no_such_program"), None);
        drop(probes);

        let btf = read_btf(Path::new(KERNEL_BTF)).unwrap().parse().unwrap();
        let mut object = EbpfLoader::new().map_max_entries(LETHAL, 1 << 16).load(object()).unwrap();
        let program = |name: &str| *PROGRAMS.iter().find(|program| program.name == name).unwrap();
        let absent = |name| ProgramInfo { hook: "no_such_tracepoint", ..program(name) };
        // It has one argument; the programs read the third, and the second.
        let shorter = |name| ProgramInfo { hook: "sched_process_wait", ..program(name) };
        let programs = [
            absent("process_exec"),
            absent("cgroup_mkdir"),
            shorter("process_exec"),
            shorter("process_fork"),
            program("process_exit"),
        ];
        let (verdicts, _links) = attach_all(&mut object, &btf, &programs, &[]).unwrap();
        let missing = ProgramState::NotOnThisKernel("it has no tracepoint no_such_tracepoint".to_owned());
        assert_eq!([&verdicts[0].state, &verdicts[1].state], [&missing; 2]);
        for verdict in &verdicts[2..4] {
            let ProgramState::NotOnThisKernel(why) = &verdict.state else { panic!("{verdict:?}") };
            assert!(why.contains("sched_process_wait has fewer arguments"), "{why}");
        }
        assert_eq!(verdicts[4].state, ProgramState::Attached);
    }

    #[test]
    fn a_misspelt_program_is_not_ignored() {
        let config = LoadConfig { disabled: vec!["oom".to_owned()], ..LoadConfig::default() };
        let error = Probes::load(&config).unwrap_err();
        assert!(error.to_string().contains("oom_victim"), "{error}");
    }
}
