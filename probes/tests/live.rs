//! The probes in a real kernel: each test causes the real thing and reads its record.
//!
//! As root: `TAPIO_REQUIRE=all cargo test -p tapio-probes`. Other processes' records are everywhere in between; each test
//! looks for those of the processes and cgroups that it made.

use std::collections::HashSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use crate::lab::{Container, Hierarchies, Killed, Session, can_run, inode, namespace_pids, victim};
use tapio_probes::clock::boottime_ns;
use tapio_probes::record::{CGROUP_V1_MEMORY, Cgroup, Exec, Exit, Oom, RecordKind, Signal, text};
use tapio_probes::{LoadConfig, ProgramState, off_by_default};
use tapio_ringbuf::{Poller, WakeupFlag};

const SIGKILL: u32 = 9;
const SIGSEGV: u32 = 11;
const SIGTERM: u32 = 15;
const SI_USER: i32 = 0;
const SEGV_MAPERR: i32 = 1;
const MIB: u64 = 1 << 20;
/// The limit is a million. Linux 5.10 to 6.1 merge fewer states: a program of 87,000 on 6.18 was refused there.
const VERIFIED_MAX: u32 = 64_000;
const VERIFIED_BY_OLD_KERNELS_MAX: u32 = 200_000;

fn resident_bytes(pid: u32) -> u64 {
    let pages = fs::read_to_string(format!("/proc/{pid}/statm")).expect("it lives");
    let resident: u64 = pages.split(' ').nth(1).expect("a second field").parse().expect("a number");
    resident * rustix::param::page_size() as u64
}

fn sleeps(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives").contains(") S ")
}

/// A child with nothing to say.
fn run(command: &mut Command) -> u32 {
    let mut child = command.spawn().expect("it starts");
    let pid = child.id();
    child.wait().expect("it ends");
    pid
}

#[test]
fn the_verifier_is_far_from_its_limit_with_each_program() {
    if !can_run("the_verifier_is_far_from_its_limit_with_each_program") {
        return;
    }
    // Other collectors may run here.
    let others: HashSet<u32> =
        aya::programs::loaded_programs().filter_map(|program| Some(program.ok()?.id())).collect();
    let session = Session::start();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's version");
    let is_old = release.starts_with("5.") || release.starts_with("6.1.");
    let max = if is_old { VERIFIED_BY_OLD_KERNELS_MAX } else { VERIFIED_MAX };
    let mut counted = 0;
    for program in aya::programs::loaded_programs().filter_map(Result::ok) {
        if others.contains(&program.id()) {
            continue;
        }
        let name = program.name_as_str().unwrap_or_default();
        // Kernels before 5.16 do not count.
        let Some(instructions) = program.verified_instruction_count().filter(|_| is_ours(name)) else { continue };
        counted += 1;
        assert!(instructions < max, "the verifier of this kernel went through {instructions} instructions of {name}");
    }
    assert!(counted > 10 || release.starts_with("5.10."), "{counted} programs were counted on Linux {release}");
    drop(session);
}

fn is_ours(name: &str) -> bool {
    // The kernel keeps 15 bytes of a name.
    tapio_probes::PROGRAMS
        .iter()
        .any(|program| program.name.starts_with(name) && name.len() >= program.name.len().min(15))
}

#[test]
fn a_child_has_one_exec_and_exit_with_its_code() {
    if !can_run("a_child_has_one_exec_and_exit_with_its_code") {
        return;
    }
    let mut session = Session::start();
    let before = boottime_ns();
    let pid = run(Command::new("sh").args(["-c", "exit 3"]));
    let after = boottime_ns();
    let depth = namespace_pids(std::process::id()).len() as u32 - 1;

    let exec: Exec = session.wait_for(RecordKind::Exec, |exec: &Exec| exec.header.pid == pid);
    assert_eq!(exec.header.tid, pid);
    assert_eq!(exec.parent_pid, std::process::id());
    assert_eq!((exec.ns_pid, exec.ns_level), (pid, depth));
    assert_eq!(exec.header.cgroup_id, Hierarchies::find().own_id());
    assert_eq!(text(&exec.comm), "sh");
    assert_eq!(exec.pad, 0);

    let exit: Exit = session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
    assert_eq!(exit.status, 3 << 8);
    assert_eq!(exit.parent_pid, std::process::id());
    assert_eq!((exit.ns_pid, exit.ns_level), (pid, depth));
    assert_eq!(exit.header.cgroup_id, exec.header.cgroup_id);
    assert_eq!(text(&exit.comm), "sh");
    let own_adjustment = fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    assert_eq!(exit.oom_score_adj.to_string(), own_adjustment.trim());
    assert_eq!(exit.pad, [0; 6]);
    assert!(before <= exit.start_time_ns && exit.start_time_ns <= exec.header.time_ns);
    assert!(exec.header.time_ns <= exit.header.time_ns && exit.header.time_ns <= after);

    assert_eq!(session.all_of(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid).len(), 1);
}

#[test]
fn a_process_whose_leader_dies_first_ends_once() {
    if !can_run("a_process_whose_leader_dies_first_ends_once") {
        return;
    }
    let mut session = Session::start();
    let pid = run(&mut victim("leader-dies-first"));
    let exits = session.all_of(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
    assert_eq!(exits.len(), 1);
    assert_eq!(exits[0].status, 7 << 8);
    assert_ne!(exits[0].header.tid, pid, "another thread was the last");
    assert_eq!(exits[0].ns_pid, pid);
}

#[test]
fn a_process_whose_threads_all_end_at_once_ends_once() {
    if !can_run("a_process_whose_threads_all_end_at_once_ends_once") {
        return;
    }
    let mut session = Session::start();
    let pids: HashSet<u32> = (0..100).map(|_| run(&mut victim("threads-race"))).collect();
    let exits = session.all_of(RecordKind::Exit, |exit: &Exit| pids.contains(&exit.header.pid));
    let reported: HashSet<u32> = exits.iter().map(|exit| exit.header.pid).collect();
    assert_eq!(reported.len(), exits.len(), "a process ended twice");
    // Of threads that end at once one may preempt the other in the midst of the program: that run is skipped, and counted.
    let missed = session.missed_runs("process_exit");
    assert!(
        reported.len() + missed >= pids.len(),
        "{} of {} reported, {missed} runs skipped",
        reported.len(),
        pids.len()
    );
}

#[test]
fn a_kill_from_outside_names_its_sender() {
    if !can_run("a_kill_from_outside_names_its_sender") {
        return;
    }
    let mut session = Session::start();
    let mut target = Killed(victim("sleep").spawn().unwrap());
    let pid = target.0.id();
    session.wait_for(RecordKind::Exec, |exec: &Exec| exec.header.pid == pid);
    let killer = run(Command::new("sh").args(["-c", &format!("kill -9 {pid}")]));
    assert_eq!(target.0.wait().unwrap().signal(), Some(9));

    let signal: Signal = session.wait_for(RecordKind::Signal, |signal: &Signal| signal.header.pid == pid);
    assert_eq!(signal.signal, SIGKILL);
    assert_eq!(signal.code, SI_USER);
    assert_eq!((signal.sender_pid, signal.sender_tid), (killer, killer));
    assert_eq!(signal.sender_cgroup_id, Hierarchies::find().own_id());
    assert_eq!((signal.from_kernel, signal.result), (0, 0));
    assert_eq!(signal.ns_pid, pid);
    assert_eq!(text(&signal.comm), "victim");
    assert_eq!(text(&signal.sender_comm), "sh");
    assert_eq!(signal.sender_parent_pid, std::process::id());
    let own = fs::read_to_string("/proc/self/comm").unwrap();
    assert_eq!(text(&signal.sender_parent_comm), own.trim_end());
    assert_eq!((signal.pad, signal.repeats), (0, 0));

    let exit: Exit = session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
    assert_eq!(exit.status, SIGKILL);
}

#[test]
fn a_segmentation_fault_comes_from_the_kernel() {
    if !can_run("a_segmentation_fault_comes_from_the_kernel") {
        return;
    }
    let mut session = Session::start();
    let pid = run(&mut victim("segv"));
    let signal: Signal = session.wait_for(RecordKind::Signal, |signal: &Signal| signal.header.pid == pid);
    assert_eq!((signal.signal, signal.code), (SIGSEGV, SEGV_MAPERR));
    assert_eq!(signal.from_kernel, 1);
    assert_eq!(signal.sender_pid, pid);
    let exit: Exit = session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
    assert_eq!(exit.status & 0x7f, SIGSEGV);
}

#[test]
fn signals_outside_the_mask_are_not_recorded() {
    if !can_run("signals_outside_the_mask_are_not_recorded") {
        return;
    }
    let mask = tapio_probes::signal_mask(&[SIGKILL]);
    let mut session = Session::start_with(&LoadConfig { signal_mask: mask, ..LoadConfig::default() });
    let target = Killed(victim("sleep").spawn().unwrap());
    let pid = target.0.id();
    run(Command::new("sh").args(["-c", &format!("kill -15 {pid}")]));
    let exit: Exit = session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
    assert_eq!(exit.status, SIGTERM);
    assert!(session.all_of(RecordKind::Signal, |signal: &Signal| signal.header.pid == pid).is_empty());
}

#[test]
fn of_the_reader_only_its_end_is_recorded() {
    if !can_run("of_the_reader_only_its_end_is_recorded") {
        return;
    }
    let mut own = Killed(victim("sleep").spawn().unwrap());
    let pid = own.0.id();
    let mut session = Session::start_with(&LoadConfig { own_pid: Some(pid), ..LoadConfig::default() });
    own.0.kill().unwrap();
    let exit: Exit = session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
    assert_eq!(exit.status, SIGKILL);
    assert!(session.all_of(RecordKind::Signal, |signal: &Signal| signal.header.pid == pid).is_empty());
}

/// Lets a container run into a limit of 32 MiB, its own or its pod's.
fn run_out_of_memory(number: u32, of_pod: bool) {
    let mut session = Session::start();
    let container = Container::make(number);
    let limit_bytes = 32 * MIB;
    let (limit_id, limit_name) = container.limit(of_pod, limit_bytes);
    let mut child = container.spawn("eat");
    let pid = child.0.id();
    assert_eq!(child.0.wait().unwrap().signal(), Some(9), "the OOM killer came");

    let oom: Oom = session.wait_for(RecordKind::Oom, |oom: &Oom| oom.header.pid == pid);
    assert_eq!(oom.header.tid, pid);
    assert_eq!(oom.header.cgroup_id, inode(&container.unified()));
    assert_eq!(oom.ns_pid, pid);
    assert_eq!(text(&oom.comm), "victim");
    assert_eq!((oom.allocator_pid, oom.allocator_tid), (pid, pid));
    assert_eq!(oom.allocator_cgroup_id, oom.header.cgroup_id);
    assert_eq!(text(&oom.allocator_comm), "victim");
    assert_eq!(oom.limit_bytes, limit_bytes);
    assert!(oom.usage_bytes <= limit_bytes && oom.usage_bytes > limit_bytes - MIB, "{oom:?}");
    assert_eq!(text(&oom.limit_name), limit_name);
    assert_eq!(oom.limit_cgroup_id, limit_id);
    assert_eq!(oom.limit_height, u32::from(of_pod));
    assert!(oom.anon_rss_bytes > 24 * MIB && oom.anon_rss_bytes <= limit_bytes, "{oom:?}");
    assert!(oom.total_vm_bytes > oom.anon_rss_bytes && oom.total_vm_bytes < 512 * MIB, "{oom:?}");
    assert!(oom.total_vm_bytes.is_multiple_of(4096));
    assert!(oom.file_rss_bytes < 8 * MIB && oom.shmem_rss_bytes < MIB, "{oom:?}");
    assert_eq!((oom.pad, oom.pad2), (0, 0));

    let signal: Signal = session.wait_for(RecordKind::Signal, |signal: &Signal| signal.header.pid == pid);
    assert_eq!((signal.signal, signal.from_kernel), (SIGKILL, 1));
    let exit: Exit = session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
    assert_eq!(exit.status, SIGKILL);
    assert_eq!(exit.header.cgroup_id, oom.header.cgroup_id);
    assert_eq!(session.all_of(RecordKind::Oom, |oom: &Oom| oom.header.pid == pid).len(), 1);
}

#[test]
fn an_oom_kill_names_the_victim_and_the_containers_limit() {
    if can_run("an_oom_kill_names_the_victim_and_the_containers_limit") {
        run_out_of_memory(1, false);
    }
}

#[test]
fn an_oom_kill_by_the_pods_limit_names_the_pod() {
    if can_run("an_oom_kill_by_the_pods_limit_names_the_pod") {
        run_out_of_memory(2, true);
    }
}

#[test]
fn an_oom_kill_distinguishes_victim_and_allocating_task() {
    if !can_run("an_oom_kill_distinguishes_victim_and_allocating_task") {
        return;
    }
    let mut session = Session::start();
    let container = Container::make(5);
    let (limit_id, _) = container.limit(false, 32 * MIB);
    let victim = hold(&container);
    let pid = victim.0.id();
    let eater = container.spawn("eat");

    let oom: Oom = session.wait_for(RecordKind::Oom, |oom: &Oom| oom.header.pid == pid);
    assert_eq!(oom.allocator_pid, eater.0.id());
    assert_eq!(oom.oom_score_adj, 1000);
    assert_eq!(oom.limit_cgroup_id, limit_id);
    assert_eq!(oom.header.cgroup_id, inode(&container.unified()));
    assert!(oom.anon_rss_bytes > 16 * MIB && oom.anon_rss_bytes < 24 * MIB, "{oom:?}");
    assert_eq!(text(&oom.comm), "victim");
}

/// Somebody who holds 20 MiB, sleeps, and is chosen first.
fn hold(container: &Container) -> Killed {
    let victim = container.spawn("hold");
    let pid = victim.0.id();
    fs::write(format!("/proc/{pid}/oom_score_adj"), "1000").unwrap();
    // It has all it wants when it sleeps; until then it could be the one that runs into the limit.
    while resident_bytes(pid) < 18 * MIB || !sleeps(pid) {
        std::thread::sleep(Duration::from_millis(5));
    }
    victim
}

/// The kernel looks whether the limit is full, prints what it knows, which takes long on a slow console, and then chooses.
#[test]
fn the_full_limit_is_named_though_it_has_room_again() {
    if !can_run("the_full_limit_is_named_though_it_has_room_again") {
        return;
    }
    let mut session = Session::start();
    let container = Container::make(17);
    let (limit_id, _) = container.limit(false, 32 * MIB);
    let _others: [Killed; 8] = std::array::from_fn(|_| container.spawn("come-and-go"));
    // Since 6.11 only where the kernel knows memory cgroups of version 1.
    let types = fs::read("/sys/kernel/btf/vmlinux").expect("the probes need it");
    let says_whose = types.windows(10).any(|name| name == b"\0oom_lock\0");
    let mut had_room = 0;
    for _ in 0..20 {
        let mut eater = container.spawn("eat");
        let pid = eater.0.id();
        assert_eq!(eater.0.wait().unwrap().signal(), Some(9), "the OOM killer came");
        let oom: Oom = session.wait_for(RecordKind::Oom, |oom: &Oom| oom.header.pid == pid);
        assert_eq!(oom.limit_cgroup_id, limit_id);
        let is_full = oom.usage_bytes + MIB >= oom.limit_bytes;
        assert_eq!(oom.allocator_inside, if is_full || !says_whose { 1 } else { 3 }, "{oom:?}");
        had_room += u32::from(!is_full);
    }
    // On a fast console that is rare.
    println!("the limit had room again in {had_room} of 20");
}

#[test]
fn made_and_removed_cgroups_are_reported_with_their_path() {
    if !can_run("made_and_removed_cgroups_are_reported_with_their_path") {
        return;
    }
    let mut session = Session::start();
    let mut container = Container::make(3);
    let mut ids = vec![inode(&container.unified())];
    ids.extend(container.memory_v1().map(|path| inode(&path) | CGROUP_V1_MEMORY));
    let path = container.path();
    container.remove();
    for id in ids {
        for kind in [RecordKind::CgroupMkdir, RecordKind::CgroupRmdir] {
            let change: Cgroup = session.wait_for(kind, |change: &Cgroup| change.header.cgroup_id == id);
            assert_eq!(text(&change.path), path);
            assert_eq!(change.path_bytes as usize, path.len());
            assert_eq!(change.level, 4);
            assert_eq!(change.hierarchy != 0, id & CGROUP_V1_MEMORY != 0);
            assert_eq!(change.header.pid, std::process::id());
        }
    }
}

#[test]
fn a_version_2_root_task_has_its_version_1_cgroup() {
    if !can_run("a_version_2_root_task_has_its_version_1_cgroup") {
        return;
    }
    let container = Container::make(4);
    let Some(memory) = container.memory_v1() else {
        println!("SKIP: needs cgroup version 1 memory, and this machine has version 2 only");
        return;
    };
    let mut session = Session::start();
    let unified = Hierarchies::find().unified;
    let script =
        format!("echo $$ > {}/cgroup.procs; echo $$ > {}/cgroup.procs; exit 5", unified.display(), memory.display());
    let pid = run(Command::new("sh").args(["-c", &script]));
    let exit: Exit = session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
    assert_eq!(exit.status, 5 << 8);
    assert_eq!(exit.header.cgroup_id, inode(&memory) | CGROUP_V1_MEMORY);
}

#[test]
fn what_is_counted_is_what_is_read() {
    if !can_run("what_is_counted_is_what_is_read") {
        return;
    }
    let mut session = Session::start();
    let pids: HashSet<u32> = (0..50)
        .map(|_| {
            session.drain();
            run(Command::new("sh").args(["-c", "exit 0"]))
        })
        .collect();
    session.drain();
    assert_eq!(session.all_of(RecordKind::Exec, |exec: &Exec| pids.contains(&exec.header.pid)).len(), pids.len());
    let drops = session.close_ledger();
    assert!(drops.values().all(|&dropped| dropped == 0), "{drops:?}");
}

#[test]
fn the_ledger_closes_exactly_when_a_tiny_ring_overflows() {
    if !can_run("the_ledger_closes_exactly_when_a_tiny_ring_overflows") {
        return;
    }
    let mut session = Session::start_with(&LoadConfig { lethal_ring_bytes: 4096, ..LoadConfig::default() });
    let capacity = session.probes().lethal_ring_bytes();
    for round in 0..4 {
        for _ in 0..capacity / 64 {
            run(Command::new("sh").args(["-c", "exit 0"]));
        }
        // The last round's overflow stays for the ledger to account for.
        if round < 3 {
            session.drain();
        }
    }
    let drops = session.close_ledger();
    assert!(drops[&RecordKind::Exec] > 0 && drops[&RecordKind::Exit] > 0, "{drops:?}");
}

#[test]
fn a_harmless_record_wakes_the_reader_only_when_it_sleeps() {
    if !can_run("a_harmless_record_wakes_the_reader_only_when_it_sleeps") {
        return;
    }
    // Others' fatal signals and failures would wake this reader too.
    let disabled =
        [off_by_default(), ["signal_sent", "process_exit", "oom_victim"].map(str::to_owned).to_vec()].concat();
    let mut session = Session::start_with(&LoadConfig { disabled, ..LoadConfig::default() });
    let states: Vec<_> = session.probes().verdicts().iter().map(|verdict| &verdict.state).collect();
    assert_eq!(states.iter().filter(|state| ***state == ProgramState::Disabled).count(), 3 + off_by_default().len());

    let flag = WakeupFlag::map(session.probes().control_map()).unwrap();
    let mut poller = Poller::new().unwrap();
    poller.add_edge(session.probes().lethal_ring(), 1).unwrap();
    session.drain();
    let _ = poller.wait(Some(Duration::ZERO)).unwrap();

    run(Command::new("sh").args(["-c", "exit 0"]));
    assert!(poller.wait(Some(Duration::from_millis(200))).unwrap().is_empty(), "nobody sleeps");

    flag.set(true);
    session.drain();
    let mut child = Command::new("sh").args(["-c", "exit 0"]).spawn().unwrap();
    assert_eq!(poller.wait(Some(Duration::from_secs(20))).unwrap(), [1]);
    child.wait().unwrap();
}

#[test]
fn a_lethal_record_wakes_a_reader_that_did_not_ask() {
    if !can_run("a_lethal_record_wakes_a_reader_that_did_not_ask") {
        return;
    }
    let mut session = Session::start();
    let mut poller = Poller::new().unwrap();
    poller.add_edge(session.probes().lethal_ring(), 1).unwrap();
    session.drain();
    let pid = run(Command::new("sh").args(["-c", "exit 9"]));
    assert_eq!(poller.wait(Some(Duration::from_secs(20))).unwrap(), [1]);
    session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == pid);
}
