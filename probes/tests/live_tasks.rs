//! What processes and their tasks do, in a real kernel: each test causes the real thing and reads its record. The programs
//! that run only when they are asked for run here too.
//!
//! As root: `TAPIO_REQUIRE=all cargo test -p tapio-probes`. Other processes' records are everywhere in between; each test
//! looks for those of the processes and cgroups that it made.

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::lab;
use crate::lab::{Container, Hierarchies, Session, can_run, inode, victim};
use tapio_probes::record::{
    self, Exec, ExecCommand as ExecRecord, Exit, FileOpen, Fork, Histogram, RecordKind, RunQueue, Signal,
    SignalDelivered, SyscallError, text,
};
use tapio_probes::{Counter, ExecCommand, LoadConfig, ProgramState, Tuning, kinds};

const EAGAIN: u32 = 11;
const EMFILE: u32 = 24;
const SIGKILL: u32 = 9;
const SIGUSR1: u32 = 10;
const SIGSEGV: u32 = 11;
const SIGTERM: u32 = 15;

/// Programs that are off unless asked for run too.
fn everything(tuning: Tuning) -> LoadConfig {
    LoadConfig { tuning, disabled: Vec::new(), ..LoadConfig::default() }
}

fn start_everything(config: LoadConfig) -> Session {
    let session = Session::start_with(&config);
    for verdict in session.probes().verdicts() {
        assert_eq!(verdict.state, ProgramState::Attached, "{verdict:?}");
    }
    session
}

/// A directory of the test's own; dropping it removes it.
struct Directory(PathBuf);

impl Directory {
    fn make(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tapio-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Left behind at worst.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_fork_names_child_and_parent_and_threads_are_none() {
    if !can_run("a_fork_names_child_and_parent_and_threads_are_none") {
        return;
    }
    let mut session = Session::start();
    let container = Container::make(21);
    // The second command makes the shell fork.
    let mut shell = container.spawn("threads-race & wait");
    let parent = shell.0.id();
    shell.0.wait().unwrap();
    let fork: Fork = session.wait_for(RecordKind::Fork, |fork: &Fork| fork.parent_pid == parent);
    let child = fork.header.pid;
    assert_eq!(fork.header.tid, child);
    assert_eq!((fork.ns_pid, fork.pad), (child, 0));
    assert_eq!(fork.header.cgroup_id, inode(&container.unified()));
    assert_eq!(text(&fork.comm), "sh");
    let exec: Exec = session.wait_for(RecordKind::Exec, |exec: &Exec| exec.header.pid == child);
    assert_eq!((exec.parent_pid, exec.header.cgroup_id), (parent, fork.header.cgroup_id));
    assert!(fork.header.time_ns < exec.header.time_ns);
    session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == child);
    let of_threads = session.all_of(RecordKind::Fork, |fork: &Fork| fork.parent_pid == child);
    assert!(of_threads.is_empty(), "{of_threads:?}");
}

#[test]
fn an_exec_has_its_arguments_only_when_asked_for() {
    if !can_run("an_exec_has_its_arguments_only_when_asked_for") {
        return;
    }
    let mut session = Session::start();
    let controls = session.probes().controls();
    let run = |exec_command| {
        controls.set(Tuning { exec_command, ..controls.get() }).unwrap();
        let mut child = victim("no-such-way").args(["--password=hunter2", ""]).arg("x".repeat(300)).spawn().unwrap();
        child.wait().unwrap();
        child.id()
    };
    let plain = run(ExecCommand::Off);
    let with_path = run(ExecCommand::Path);
    let full = run(ExecCommand::Full);

    let exec: Exec = session.wait_for(RecordKind::Exec, |exec: &Exec| exec.header.pid == plain);
    assert_eq!(text(&exec.comm), "victim");
    let command: ExecRecord =
        session.wait_for(RecordKind::ExecCommand, |command: &ExecRecord| command.header.pid == with_path);
    let path = victim("").get_program().to_string_lossy().into_owned();
    assert!(path.len() >= 128 || text(&command.path) == path, "{command:?}");
    assert_eq!((command.argument_bytes, command.arguments), (0, [0; 256]));
    let command: ExecRecord =
        session.wait_for(RecordKind::ExecCommand, |command: &ExecRecord| command.header.pid == full);
    assert_eq!(command.parent_pid, std::process::id());
    assert_eq!((command.ns_pid, command.header.tid), (full, full));
    assert_eq!(command.header.cgroup_id, Hierarchies::find().own_id());
    assert_eq!(command.argument_bytes, 256, "it was cut");
    let arguments = format!("{path}\0no-such-way\0--password=hunter2\0\0{}", "x".repeat(300));
    assert_eq!(command.arguments[..], arguments.as_bytes()[..256]);
    let both = session.all_of(RecordKind::Exec, |exec: &Exec| [with_path, full].contains(&exec.header.pid));
    assert!(both.is_empty(), "one record an exec: {both:?}");
}

#[test]
fn a_fatal_signal_is_reported_once_for_all_threads() {
    if !can_run("a_fatal_signal_is_reported_once_for_all_threads") {
        return;
    }
    let mut session = Session::start();
    let container = Container::make(22);
    for signal in [SIGKILL, SIGTERM] {
        let mut child = container.spawn("threads-sleep");
        let pid = child.0.id();
        session.wait_for(RecordKind::Exec, |exec: &Exec| exec.header.pid == pid && text(&exec.comm) == "victim");
        let mut killer = Command::new("sh").args(["-c", &format!("kill -{signal} {pid}")]).spawn().unwrap();
        killer.wait().unwrap();
        child.0.wait().unwrap();
        let delivered: SignalDelivered =
            session.wait_for(RecordKind::SignalDelivered, |delivered: &SignalDelivered| delivered.header.pid == pid);
        assert_eq!((delivered.signal, delivered.code), (signal, 0));
        assert_eq!(delivered.ns_pid, pid);
        assert_eq!(delivered.header.cgroup_id, inode(&container.unified()));
        assert_eq!(text(&delivered.comm), "victim");
        let exit: Exit = session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
        assert_eq!(exit.status, signal);
        assert!(delivered.header.time_ns < exit.header.time_ns);
        let of_pid = |delivered: &SignalDelivered| delivered.header.pid == pid;
        assert_eq!(session.all_of(RecordKind::SignalDelivered, of_pid).len(), 1);
    }

    let mut child = victim("segv").spawn().unwrap();
    child.wait().unwrap();
    let of_child = |delivered: &SignalDelivered| delivered.header.pid == child.id();
    let delivered: SignalDelivered = session.wait_for(RecordKind::SignalDelivered, of_child);
    assert_eq!((delivered.signal, delivered.code), (SIGSEGV, 1), "SEGV_MAPERR");
}

#[test]
fn a_handled_signal_is_not_reported_as_an_end() {
    if !can_run("a_handled_signal_is_not_reported_as_an_end") {
        return;
    }
    let mut session = Session::start();
    let mut child = Command::new("sh").args(["-c", "trap 'exit 4' TERM; kill -15 $$; exit 5"]).spawn().unwrap();
    let pid = child.id();
    assert_eq!(child.wait().unwrap().code(), Some(4));
    session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
    let reported =
        session.all_of(RecordKind::SignalDelivered, |delivered: &SignalDelivered| delivered.header.pid == pid);
    assert!(reported.is_empty(), "{reported:?}");
}

#[test]
fn a_flood_of_handled_signals_is_reported_once_a_second() {
    if !can_run("a_flood_of_handled_signals_is_reported_once_a_second") {
        return;
    }
    let mut session = Session::start();
    let container = Container::make(25);
    let script = format!(
        "echo $$ >{}/cgroup.procs; trap : USR1; echo ready; while :; do read line || exit 0; done",
        container.unified().display()
    );
    let mut child =
        Command::new("sh").args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    let mut ready = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    let began = Instant::now();
    let flood = format!("i=0; while [ $i -lt 2000 ]; do kill -USR1 {pid}; i=$((i+1)); done");
    assert!(Command::new("sh").args(["-c", &flood]).status().unwrap().success());
    let seconds = began.elapsed().as_secs() as usize;
    drop(child.stdin.take());
    child.kill().unwrap();
    child.wait().unwrap();
    session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
    let reported =
        session.all_of(RecordKind::Signal, |signal: &Signal| signal.header.pid == pid && signal.signal == SIGUSR1);
    assert!((1..=seconds + 2).contains(&reported.len()), "{} in {seconds} s", reported.len());
}

#[test]
fn long_waits_for_a_cpu_are_reported_and_summed() {
    const RUN_QUEUE: u8 = 2;
    if !can_run("long_waits_for_a_cpu_are_reported_and_summed") {
        return;
    }
    let slow_ns = 500_000;
    let mut session = start_everything(everything(Tuning { run_queue_slow_ns: slow_ns, ..Tuning::default() }));
    let container = Container::make(20);
    let spinning = [container.spawn("spin"), container.spawn("spin")];
    let id = inode(&container.unified());
    for child in &spinning {
        let pid = child.0.id();
        let wait: RunQueue = session.wait_for(RecordKind::RunQueue, |wait: &RunQueue| {
            wait.header.pid == pid && wait.header.cgroup_id == id && wait.wait_ns > 1_000_000
        });
        assert!(wait.wait_ns < 20_000_000_000, "{wait:?}");
    }
    let waits: Histogram = session.wait_for_sum(RecordKind::Histogram, |waits: &Histogram| {
        waits.header.cgroup_id == id && waits.measure == RUN_QUEUE && waits.max_ns > 1_000_000
    });
    let count: u32 = waits.counts.iter().sum();
    assert!(count > 0 && waits.total_ns >= waits.max_ns, "{waits:?}");
    assert!(waits.counts[9..].iter().sum::<u32>() > 0, "the slots from 512 us on: {waits:?}");
    assert_eq!((waits.header.pid, waits.operation, waits.device, waits.pad), (0, 0, 0, [0; 2]));
    // Every wait in the slots is at least as long as its slot begins, so the total bounds them from above.
    let least: u64 = (1..32).map(|slot| u64::from(waits.counts[slot]) * (1000 << slot)).sum();
    assert!(least <= waits.total_ns, "{waits:?}");
}

/// Lets a container's calls fail, and returns how many failures were recorded.
fn failures(session: &mut Session, container: &Container, how: &str, errno: u32) -> (Vec<SyscallError>, u64) {
    let id = inode(&container.unified());
    let of_container = |error: &SyscallError| error.header.cgroup_id == id && error.errno == errno;
    let mut child = container.spawn(how);
    assert!(child.0.wait().unwrap().success());
    let first: SyscallError = session.wait_for(RecordKind::SyscallError, of_container);
    assert_eq!((first.header.pid, first.count), (child.0.id(), 1));
    session.wait_for_sum(RecordKind::SyscallError, of_container);
    let reported = session.all_of(RecordKind::SyscallError, of_container);
    let summed = session.sums.iter().filter(|record| record.kind == RecordKind::SyscallError);
    let summed: Vec<SyscallError> = summed.map(lab::Record::get).filter(of_container).collect();
    let count = reported.iter().chain(&summed).map(|error| error.count).sum();
    (reported, count)
}

#[test]
fn running_out_of_descriptors_is_reported_once_then_counted() {
    if !can_run("running_out_of_descriptors_is_reported_once_then_counted") {
        return;
    }
    let mut session = start_everything(everything(Tuning::default()));
    let container = Container::make(23);
    let (reported, count) = failures(&mut session, &container, "exhaust", EMFILE);
    assert_eq!(count, 16, "{reported:?}");
    assert!(reported.iter().all(|error| error.syscall == reported[0].syscall), "{reported:?}");
}

#[test]
fn eagain_counts_only_where_a_fork_failed() {
    if !can_run("eagain_counts_only_where_a_fork_failed") {
        return;
    }
    let mut session = start_everything(everything(Tuning::default()));
    let container = Container::make(24);
    let (reported, count) = failures(&mut session, &container, "crowd", EAGAIN);
    assert_eq!(count, 8, "the read that found nothing is no failure: {reported:?}");
}

#[test]
fn only_opens_of_audited_paths_are_reported() {
    if !can_run("only_opens_of_audited_paths_are_reported") {
        return;
    }
    let directory = Directory::make("audit");
    let base = directory.0.display().to_string();
    for name in ["audited", "other", "volume", "volume/..2026_01_02_03_04_05.1234567"] {
        fs::create_dir(directory.0.join(name)).unwrap();
    }
    std::os::unix::fs::symlink("..2026_01_02_03_04_05.1234567", directory.0.join("volume/..data")).unwrap();
    for name in ["audited/token", "other/token", "volume/..data/token"] {
        fs::write(directory.0.join(name), "x").unwrap();
    }
    std::os::unix::fs::symlink("..data/token", directory.0.join("volume/token")).unwrap();

    let audited_paths = vec![format!("{base}/audited/")];
    let mut session = start_everything(LoadConfig { audited_paths, ..everything(Tuning::default()) });
    let container = Container::make(25);
    let mut open = |how: String| {
        let mut child = container.spawn(&how);
        assert!(child.0.wait().unwrap().success(), "{how}");
        let pid = child.0.id();
        session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
        session.all_of(RecordKind::FileOpen, |open: &FileOpen| open.header.pid == pid)
    };
    let by_prefix = open(format!("open {base}/audited/token"));
    assert_eq!(by_prefix.len(), 1);
    assert_eq!(text(&by_prefix[0].path), format!("{base}/audited/token"));
    assert_eq!(text(&by_prefix[0].comm), "victim");
    assert_eq!(by_prefix[0].flags & 0x80003, 0x80000, "O_RDONLY and O_CLOEXEC");
    assert_eq!(by_prefix[0].header.cgroup_id, inode(&container.unified()));
    let of_volume = open(format!("open token {base}/volume"));
    assert_eq!(of_volume.len(), 1, "a volume of kubelet's is known wherever it is");
    assert_eq!(text(&of_volume[0].path), "token");
    assert!(open(format!("open {base}/other/token")).is_empty());
}

#[test]
fn kinds_and_cgroups_are_switched_at_run_time() {
    if !can_run("kinds_and_cgroups_are_switched_at_run_time") {
        return;
    }
    let mut session = Session::start();
    let controls = session.probes().controls();
    let container = Container::make(26);
    let id = inode(&container.unified());
    let mut forks = || {
        let mut shell = container.spawn("threads-race & wait");
        let parent = shell.0.id();
        shell.0.wait().unwrap();
        session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == parent);
        let reported = session.all_of(RecordKind::Fork, |fork: &Fork| fork.parent_pid == parent).len();
        (reported, session.counted(RecordKind::Fork, Counter::Excluded))
    };
    assert_eq!(forks(), (1, 0));
    controls.set(Tuning { bulk_kinds_off: kinds([RecordKind::Fork]), ..controls.get() }).unwrap();
    let (reported, excluded) = forks();
    assert!(reported == 0 && excluded > 0);
    controls.set(Tuning { bulk_kinds_off: 0, ..controls.get() }).unwrap();
    controls.exclude_cgroup(id).unwrap();
    controls.exclude_cgroup(id).unwrap();
    let (reported, excluded_more) = forks();
    assert!(reported == 0 && excluded_more > excluded);
    controls.include_cgroup(id).unwrap();
    assert_eq!(forks(), (1, excluded_more));
    session.close_ledger();
}

#[test]
fn a_lethal_kind_disabled_at_the_start_is_not_reported() {
    if !can_run("a_lethal_kind_disabled_at_the_start_is_not_reported") {
        return;
    }
    let config = LoadConfig { lethal_kinds_off: kinds([RecordKind::Exec]), ..LoadConfig::default() };
    let mut session = Session::start_with(&config);
    let mut child = victim("no-such-way").spawn().unwrap();
    child.wait().unwrap();
    session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == child.id());
    assert!(session.all_of(RecordKind::Exec, |_: &Exec| true).is_empty());
    assert_eq!(session.counted(RecordKind::Exec, Counter::Emitted), 0);
}

/// The bytes of a record that mean nothing: its padding, and what is behind the NUL of a text.
macro_rules! meaningless {
    ($record:expr, $type:ty, pads [$($pad:ident)*], texts [$($text:ident)*]) => {{
        let record: $type = $record.get();
        let mut bytes: Vec<u8> = Vec::new();
        $(bytes.extend_from_slice(zerocopy::IntoBytes::as_bytes(&record.$pad));)*
        $(bytes.extend(record.$text.iter().skip_while(|&&byte| byte != 0));)*
        bytes
    }};
}

fn meaningless(record: &lab::Record) -> Vec<u8> {
    match record.kind {
        RecordKind::Exec => meaningless!(record, Exec, pads[pad], texts[comm]),
        RecordKind::Exit => meaningless!(record, Exit, pads[pad], texts[comm]),
        RecordKind::Oom => meaningless!(record, record::Oom, pads [pad], texts [comm allocator_comm limit_name]),
        RecordKind::Signal => meaningless!(record, Signal, pads [pad], texts [comm sender_comm]),
        RecordKind::CgroupMkdir | RecordKind::CgroupRmdir => {
            meaningless!(record, record::Cgroup, pads[pad], texts[path])
        }
        RecordKind::SignalDelivered => meaningless!(record, SignalDelivered, pads [], texts [comm]),
        RecordKind::ExecCommand => {
            let command: ExecRecord = record.get();
            let mut bytes = meaningless!(record, ExecRecord, pads [], texts [comm path]);
            bytes.extend_from_slice(&command.arguments[command.argument_bytes as usize..]);
            bytes
        }
        RecordKind::Tcp => meaningless!(record, record::Tcp, pads [pad], texts []),
        RecordKind::Reclaim => meaningless!(record, record::Reclaim, pads [pad], texts []),
        RecordKind::BlockIo => meaningless!(record, record::BlockIo, pads [pad], texts []),
        RecordKind::Dns => meaningless!(record, record::Dns, pads [pad pad2], texts [name]),
        RecordKind::Fork => meaningless!(record, Fork, pads[pad], texts[comm]),
        RecordKind::FileOpen => meaningless!(record, FileOpen, pads [pad], texts [comm path]),
        RecordKind::Histogram => meaningless!(record, Histogram, pads [pad], texts []),
        RecordKind::SyscallError | RecordKind::RunQueue | RecordKind::PacketDrop | RecordKind::LeftOut => Vec::new(),
    }
}

#[test]
fn no_byte_of_the_kernels_memory_leaves_it_by_accident() {
    if !can_run("no_byte_of_the_kernels_memory_leaves_it_by_accident") {
        return;
    }
    let tuning = Tuning { run_queue_slow_ns: 0, block_io_slow_ns: 0, reclaim_burst_ns: 0, ..Tuning::default() };
    let directory = Directory::make("bytes");
    let audited_paths = vec![format!("{}/", directory.0.display())];
    let file = directory.0.join("file");
    fs::write(&file, "x").unwrap();
    let mut session = start_everything(LoadConfig { audited_paths, own_pid: None, ..everything(tuning) });
    let controls = session.probes().controls();
    let mut container = Container::make(27);
    container.limit(false, 32 << 20);
    for how in ["threads-race", "segv", "eat", "exhaust", "connect 9", &format!("open {}", file.display())] {
        container.spawn(how).0.wait().unwrap();
        session.drain();
    }
    controls.set(Tuning { exec_command: ExecCommand::Full, ..controls.get() }).unwrap();
    container.spawn("exhaust").0.wait().unwrap();
    container.remove();
    session.wait_for(RecordKind::CgroupRmdir, |_: &record::Cgroup| true);
    session.wait_for_sum(RecordKind::Histogram, |_: &Histogram| true);

    let mut seen = HashSet::new();
    for record in session.seen.iter().chain(&session.sums) {
        let bytes = meaningless(record);
        assert!(bytes.iter().all(|&byte| byte == 0), "{}: {bytes:?}", record.kind.name());
        seen.insert(record.kind);
    }
    // Block I/O and DNS are looked at where they are caused, in live_disk.rs and live_network.rs; packet drops are written by
    // user space.
    for kind in [
        RecordKind::Exec,
        RecordKind::ExecCommand,
        RecordKind::Exit,
        RecordKind::Oom,
        RecordKind::Signal,
        RecordKind::SignalDelivered,
        RecordKind::CgroupMkdir,
        RecordKind::CgroupRmdir,
        RecordKind::Tcp,
        RecordKind::Reclaim,
        RecordKind::SyscallError,
        RecordKind::RunQueue,
        RecordKind::Fork,
        RecordKind::FileOpen,
        RecordKind::Histogram,
    ] {
        assert!(seen.contains(&kind), "no {} was caused", kind.name());
    }
}
