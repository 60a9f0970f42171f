//! What the tests with a real kernel share: probes with a reader, a process that dies on demand, throw-away cgroups.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tapio_probes::record::{CGROUP_V1_MEMORY, Header, RECORD_BYTES_MAX, RecordKind};
use tapio_probes::{Counter, LoadConfig, PROGRAMS, Probes, ProgramState, counter_index};
use tapio_ringbuf::{CounterArray, Reader};
use zerocopy::FromBytes;

/// How long a record may take to arrive: a machine under load, or an emulated one, is slow.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether a test can run here; says so when not. With `TAPIO_REQUIRE=all` what is missing fails the test.
pub fn can_run(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    let possible = root && Path::new("/sys/kernel/btf/vmlinux").exists();
    if !possible {
        println!("SKIP {test}: needs root and BPF");
        let required = std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all");
        assert!(!required, "{test} needs root and BPF, and TAPIO_REQUIRE=all forbids to skip it");
    }
    possible
}

/// A record's bytes, aligned, so that they can be looked at as what they are.
#[derive(Clone)]
pub struct Record {
    pub kind: RecordKind,
    bytes: Vec<u8>,
}

impl Record {
    pub fn get<T: FromBytes>(&self) -> T {
        T::read_from_bytes(&self.bytes).expect("a record has the size of its kind")
    }
}

fn record(bytes: &[u8]) -> Record {
    let (header, _) = Header::read_from_prefix(bytes).expect("a record has a header");
    assert_eq!(header.size as usize, bytes.len());
    let kind = RecordKind::from_u16(header.kind).expect("a record has a known kind");
    Record { kind, bytes: bytes.to_vec() }
}

/// Loaded probes and everything read from them so far.
pub struct Session {
    probes: Option<Probes>,
    reader: Reader,
    bulk: Vec<Reader>,
    counters: CounterArray,
    possible_cpus: usize,
    pub seen: Vec<Record>,
    /// Fetched from the sums in the kernel; no counter has them.
    pub sums: Vec<Record>,
}

impl Session {
    /// All programs must attach.
    pub fn start() -> Self {
        let session = Self::start_with(&LoadConfig::default());
        for (verdict, program) in session.probes().verdicts().iter().zip(PROGRAMS) {
            let wanted = if program.by_default { ProgramState::Attached } else { ProgramState::Disabled };
            assert_eq!(verdict.state, wanted, "{verdict:?}");
        }
        session
    }

    pub fn start_with(config: &LoadConfig) -> Self {
        let probes = Probes::load(config).expect("the probes load");
        for (verdict, program) in probes.verdicts().iter().zip(PROGRAMS) {
            assert!(!matches!(verdict.state, ProgramState::Refused(_)), "{}: {verdict:?}", program.name);
        }
        let reader = Reader::from_bpf_map(probes.lethal_ring(), probes.lethal_ring_bytes(), RECORD_BYTES_MAX)
            .expect("the ring maps");
        let bulk =
            |ring| Reader::from_bpf_map(ring, probes.bulk_ring_bytes(), RECORD_BYTES_MAX).expect("the ring maps");
        let bulk: Vec<_> = probes.bulk_rings().map(bulk).collect();
        let counters = CounterArray::map(probes.counters_map(), probes.counters_len()).expect("the counters map");
        let possible_cpus = probes.possible_cpus();
        Self { probes: Some(probes), reader, bulk, counters, possible_cpus, seen: Vec::new(), sums: Vec::new() }
    }

    pub fn probes(&self) -> &Probes {
        self.probes.as_ref().expect("the probes are attached")
    }

    /// Reads what is there.
    pub fn drain(&mut self) {
        let seen = &mut self.seen;
        let mut each = |bytes: &[u8]| seen.push(record(bytes));
        for reader in std::iter::once(&mut self.reader).chain(&mut self.bulk) {
            reader.drain(usize::MAX, &mut each).expect("the ring is sound");
        }
    }

    /// Waits for the first record of a kind that `matches`.
    pub fn wait_for<T: FromBytes>(&mut self, kind: RecordKind, matches: impl Fn(&T) -> bool) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut looked = 0;
        loop {
            self.drain();
            for record in &self.seen[looked..] {
                if record.kind == kind {
                    let record = record.get::<T>();
                    if matches(&record) {
                        return record;
                    }
                }
            }
            looked = self.seen.len();
            assert!(
                Instant::now() < deadline,
                "no such {} among {looked} records; {} were dropped; {} runs were skipped; {:?}",
                kind.name(),
                self.counted(kind, Counter::Dropped),
                PROGRAMS.iter().filter_map(|program| self.probes().missed_runs(program.name)).sum::<u64>(),
                self.probes().verdicts(),
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Fetches the sums that are ready.
    pub fn fetch_sums(&mut self) {
        let (probes, sums) = (self.probes.as_mut().expect("the probes are attached"), &mut self.sums);
        let mut each = |bytes: &[u8]| sums.push(record(bytes));
        probes.aggregates().flush(Duration::ZERO, usize::MAX, &mut each).expect("the kernel hands them out");
    }

    /// Fetches sums until one of a kind `matches`.
    pub fn wait_for_sum<T: FromBytes>(&mut self, kind: RecordKind, matches: impl Fn(&T) -> bool) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut looked = 0;
        loop {
            self.fetch_sums();
            for record in &self.sums[looked..] {
                if record.kind == kind {
                    let record = record.get::<T>();
                    if matches(&record) {
                        return record;
                    }
                }
            }
            looked = self.sums.len();
            assert!(Instant::now() < deadline, "no such {} among {looked} sums", kind.name());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// All records of a kind that `matches`, a while after the last was to be expected.
    pub fn all_of<T: FromBytes>(&mut self, kind: RecordKind, matches: impl Fn(&T) -> bool) -> Vec<T> {
        std::thread::sleep(Duration::from_millis(100));
        self.drain();
        self.seen.iter().filter(|record| record.kind == kind).map(Record::get).filter(matches).collect()
    }

    /// Runs that the kernel skipped, since the program ran on the CPU already: one that can be preempted in a program does.
    pub fn missed_runs(&self, program: &str) -> usize {
        let missed = self.probes.as_ref().expect("the probes are attached").missed_runs(program);
        usize::try_from(missed.expect("a program of this name")).expect("a count")
    }

    /// One of a kind's counters, of all CPUs.
    pub fn counted(&self, kind: RecordKind, counter: Counter) -> u64 {
        (0..self.possible_cpus).map(|cpu| self.counters.get(counter_index(cpu, kind, counter))).sum()
    }

    /// Detaches the programs and compares, kind by kind, what they counted with what was read. Returns what they dropped.
    pub fn close_ledger(mut self) -> HashMap<RecordKind, u64> {
        self.probes.take().expect("the probes are attached").detach();
        // A program that began before it was detached may still run.
        std::thread::sleep(Duration::from_millis(200));
        self.drain();
        let mut drops = HashMap::new();
        for kind in RecordKind::ALL {
            let [emitted, dropped, sampled, excluded, limited] =
                [Counter::Emitted, Counter::Dropped, Counter::Sampled, Counter::Excluded, Counter::Limited]
                    .map(|counter| self.counted(kind, counter));
            let read = self.seen.iter().filter(|record| record.kind == kind).count() as u64;
            let said = format!(
                "{}: {emitted} emitted, {dropped} dropped, {sampled} sampled, {excluded} excluded, {limited} limited",
                kind.name()
            );
            assert_eq!(emitted - dropped - sampled - excluded - limited, read, "{said}");
            assert!(sampled + excluded == 0 || !kind.is_lethal(), "{said}");
            drops.insert(kind, dropped);
        }
        drops
    }
}

/// The command that runs `victim.c` with `how`.
pub fn victim(how: &str) -> Command {
    let mut command = Command::new(victim_path());
    command.arg(how);
    command
}

/// The victim in a network of its own, 192.0.2.0/24, where nobody answers; it asks for a connection only twice. Ends with
/// status 77 where there is no such network.
pub fn victim_without_neighbours(how: &str) -> Command {
    let script = format!(
        "{{ ip link add near type veth peer name far && ip addr add 192.0.2.1/24 dev near && ip link set near up && \
         ip link set far up && ip neigh add 192.0.2.7 lladdr 02:00:00:00:00:07 dev near && \
         echo 1 > /proc/sys/net/ipv4/tcp_syn_retries; }} || exit 77; exec {} {how}",
        victim_path().display()
    );
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", &script]);
    command
}

/// The compiled `victim.c`: the one beside this executable on a machine without a compiler, otherwise a fresh one.
fn victim_path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let own = std::env::current_exe().expect("/proc is mounted");
        let beside = own.with_file_name("victim");
        if beside.exists() {
            return beside;
        }
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("victim");
        let fresh = path.with_extension(std::process::id().to_string());
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/victim.c");
        let compiler = std::env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
        let status =
            Command::new(compiler).args(["-O1", "-Wall", "-Werror", "-pthread", "-o"]).arg(&fresh).arg(source).status();
        assert!(status.expect("clang runs").success(), "clang compiles victim.c");
        // In one step: another test run may be using it.
        fs::rename(&fresh, &path).expect("the victim can be renamed");
        path
    })
}

/// A child that is killed and reaped when the test ends early.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Fails when it is dead already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The fields of `/proc/PID/status` that begin with `name`.
fn status_field(pid: &str, name: &str) -> Vec<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("/proc is mounted");
    let line = status.lines().find(|line| line.starts_with(name)).expect("the field exists");
    line.split_whitespace().skip(1).map(|number| number.parse().expect("a number")).collect()
}

/// A process's ids, from the namespace of `/proc` inwards.
pub fn namespace_pids(pid: u32) -> Vec<u32> {
    status_field(&pid.to_string(), "NSpid:")
}

pub fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).ino()
}

/// Where this machine has its cgroups.
pub struct Hierarchies {
    /// Version 2.
    pub unified: PathBuf,
    /// Version 1 with the memory controller; [`None`] where version 2 has it.
    pub memory: Option<PathBuf>,
}

impl Hierarchies {
    pub fn find() -> Self {
        let root = Path::new("/sys/fs/cgroup");
        if root.join("cgroup.controllers").exists() {
            return Self { unified: root.to_owned(), memory: None };
        }
        let memory = root.join("memory");
        Self { unified: root.join("unified"), memory: memory.join("cgroup.procs").exists().then_some(memory) }
    }

    /// The id that a record of a process in this test's own cgroup has.
    pub fn own_id(&self) -> u64 {
        let text = fs::read_to_string("/proc/self/cgroup").expect("/proc is mounted");
        let path_in = |controller: &str| {
            text.lines().find_map(|line| {
                let (_, rest) = line.split_once(':')?;
                let (controllers, path) = rest.split_once(':')?;
                (controllers == controller).then(|| path.trim_start_matches('/').to_owned())
            })
        };
        let unified = path_in("").expect("version 2 is mounted");
        if let (true, Some(memory), Some(path)) = (unified.is_empty(), &self.memory, path_in("memory"))
            && !path.is_empty()
        {
            return inode(&memory.join(path)) | CGROUP_V1_MEMORY;
        }
        inode(&self.unified.join(unified))
    }
}

/// Parents that the containers of concurrent tests share: who uses them last removes those that were made here.
struct SharedParents {
    users: usize,
    made: Vec<PathBuf>,
}

static SHARED_PARENTS: Mutex<SharedParents> = Mutex::new(SharedParents { users: 0, made: Vec::new() });

fn shared_parents() -> MutexGuard<'static, SharedParents> {
    // A test that failed while it held the lock left at worst a directory behind.
    SHARED_PARENTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pod's cgroup and a container's inside, named as kubelet names them, in every hierarchy that counts. Dropping removes them.
pub struct Container {
    hierarchies: Hierarchies,
    pod: PathBuf,
    container: PathBuf,
    made: Vec<PathBuf>,
}

impl Container {
    pub fn make(number: u32) -> Self {
        let uid = format!("{:08x}_0000_4000_8000_{:012x}", std::process::id(), number);
        let pod =
            Path::new("kubepods.slice/kubepods-burstable.slice").join(format!("kubepods-burstable-pod{uid}.slice"));
        let container =
            pod.join(format!("cri-containerd-{:064x}.scope", u64::from(std::process::id()) << 32 | u64::from(number)));
        let hierarchies = Hierarchies::find();
        shared_parents().users += 1;
        let mut lab = Self { hierarchies, pod, container, made: Vec::new() };
        // After `lab`, so that it is unlocked before a panic drops `lab`, which locks it again.
        let mut shared = shared_parents();
        for root in [Some(lab.hierarchies.unified.clone()), lab.hierarchies.memory.clone()].into_iter().flatten() {
            lab.make_in(&root, &mut shared);
        }
        lab
    }

    fn make_in(&mut self, root: &Path, shared: &mut SharedParents) {
        let mut path = root.to_owned();
        for name in &self.container.clone() {
            if self.hierarchies.memory.is_none() {
                // Already on in most places, and refused where a parent has processes of its own: then setting the limit fails.
                let _ = fs::write(path.join("cgroup.subtree_control"), "+memory");
            } else {
                // Only needed, and only there, before 5.11.
                let _ = fs::write(path.join("memory.use_hierarchy"), "1");
            }
            path.push(name);
            match fs::create_dir(&path) {
                Ok(()) if path.starts_with(root.join(&self.pod)) => self.made.push(path.clone()),
                Ok(()) => shared.made.push(path.clone()),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => panic!("{}: {error}", path.display()),
            }
        }
    }

    /// The version 2 cgroup, by which the container is known.
    pub fn unified(&self) -> PathBuf {
        self.hierarchies.unified.join(&self.container)
    }

    /// The container's path from the root of its hierarchy.
    pub fn path(&self) -> String {
        format!("/{}", self.container.display())
    }

    /// Where the limits of the container, or of its pod, are set.
    fn memory(&self, of_pod: bool) -> PathBuf {
        let root = self.hierarchies.memory.as_ref().unwrap_or(&self.hierarchies.unified);
        root.join(if of_pod { &self.pod } else { &self.container })
    }

    pub fn memory_v1(&self) -> Option<PathBuf> {
        Some(self.hierarchies.memory.as_ref()?.join(&self.container))
    }

    /// Sets the memory limit; returns the id and the name of the cgroup that has it.
    pub fn limit(&self, of_pod: bool, bytes: u64) -> (u64, String) {
        let directory = self.memory(of_pod);
        let version_1 = self.hierarchies.memory.is_some();
        let file = directory.join(if version_1 { "memory.limit_in_bytes" } else { "memory.max" });
        fs::write(&file, bytes.to_string()).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let mark = if version_1 { CGROUP_V1_MEMORY } else { 0 };
        let name = directory.file_name().expect("it has a name").to_string_lossy().into_owned();
        (inode(&directory) | mark, name)
    }

    /// Starts the victim inside.
    pub fn spawn(&self, how: &str) -> Killed {
        let mut script = format!("echo $$ > {}/cgroup.procs; ", self.unified().display());
        if let Some(memory) = self.memory_v1() {
            script += &format!("echo $$ > {}/cgroup.procs; ", memory.display());
        }
        script += &format!("exec {} {how}", victim_path().display());
        Killed(Command::new("sh").args(["-c", &script]).spawn().expect("sh runs"))
    }

    /// Removes what was made, innermost first.
    pub fn remove(&mut self) {
        for path in self.made.drain(..).rev() {
            // A cgroup is busy until its last process is reaped.
            for _ in 0..100 {
                match fs::remove_dir(&path) {
                    Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    _ => break,
                }
            }
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.remove();
        let mut shared = shared_parents();
        shared.users -= 1;
        if shared.users == 0 {
            for path in shared.made.drain(..).rev() {
                // Refused while another run of the tests uses it.
                let _ = fs::remove_dir(path);
            }
        }
    }
}

/// A block device in a file that is in a file system of `bytes`, and claims four times as much. Dropping removes all.
pub struct Disk {
    directory: PathBuf,
    pub device: PathBuf,
}

impl Disk {
    /// [`None`], after saying so, where there is no losetup; with `TAPIO_REQUIRE=all` that fails the test.
    pub fn make(bytes: u64) -> Option<Self> {
        let directory = std::env::temp_dir().join(format!("tapio-disk-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory");
        let mut disk = Self { directory, device: PathBuf::new() };
        let size = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(&disk.directory).status();
        let file = disk.directory.join("disk");
        let made = mounted.is_ok_and(|status| status.success())
            && fs::File::create(&file).and_then(|file| file.set_len(bytes * 4)).is_ok();
        let found = made.then(|| Command::new("losetup").args(["--find", "--show"]).arg(&file).output());
        match found {
            Some(Ok(output)) if output.status.success() => {
                disk.device = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
                Some(disk)
            }
            other => {
                println!("SKIP: needs mount, losetup and a free loop device: {other:?}");
                assert!(!std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all"), "TAPIO_REQUIRE=all");
                None
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What was not made cannot be undone.
        if !self.device.as_os_str().is_empty() {
            let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
        }
        let _ = Command::new("umount").arg(&self.directory).status();
        let _ = fs::remove_dir(&self.directory);
    }
}
