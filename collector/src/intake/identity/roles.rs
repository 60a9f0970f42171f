//! Which process of a container is its first one: what the runtime started, with which the container lives and dies.
//!
//! What enters: cgroups that appear and go, execs and exits, in the order in which they happened, and a scan of what
//! ran before. What leaves: the [`Role`] of a process in its container. What must hold: the first process is the one
//! that the runtime started: the first to come from outside of the container's cgroup. Its process id in any namespace
//! does not matter. The table is bounded. A container whose start was not seen has no first process here, and its
//! processes have the role `Unknown`.

use std::collections::HashMap;

use foldhash::fast::RandomState;
use tapio_wire::event::{EntityId, Role};

use super::scan::is_same_start;

/// Containers remembered.
const CONTAINERS_MAX: usize = 65_536;
/// Processes of one container that are known to have entered it later, and those that have a runtime's name.
const SESSIONS_MAX: usize = 64;
/// A runtime's stage becomes the program before that. What has its name for longer is the program.
const STAGE_MAX_NS: u64 = 60_000_000_000;

/// A program that replaced a process's image.
#[derive(Clone, Copy, Debug)]
pub struct Started<'a> {
    pub pid: u32,
    pub start_time_ns: u64,
    pub parent_pid: u32,
    /// True if its parent belongs to the same container.
    pub parent_inside: bool,
    pub comm: &'a str,
    pub ns_pid: u32,
    pub ns_level: u32,
    /// True if the container belongs to a pod.
    pub in_pod: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct First {
    pid: u32,
    start_time_ns: u64,
    ns_level: u32,
    role: Role,
    /// True if it only sets up namespaces, starts one process in them and waits for it: unshare(1).
    is_launcher: bool,
    /// It was found by the name of a runtime's stage, and has not become the program yet.
    is_stage: bool,
    /// It was started by that name in the container, or has had it for long: a stage only gives itself a name.
    is_program: bool,
    has_ended: bool,
}

#[derive(Debug, Default)]
struct Container {
    first: Option<First>,
    sessions: Vec<u32>,
    /// Programs that were started in it and are called as a runtime.
    namesakes: Vec<u32>,
    /// True if its beginning was seen: the first process that comes is its first.
    is_new: bool,
}

/// The first process and the sessions of each container, which give the [`Role`] of any of its processes.
#[derive(Debug, Default)]
pub struct Roles {
    containers: HashMap<EntityId, Container, RandomState>,
}

/// Programs of pods' sandboxes: Kubernetes' pause, and CRI-O's, which calls it pod.
fn is_sandbox(comm: &str) -> bool {
    matches!(comm, "pause" | "pod")
}

/// Names that stages of a runtime give themselves: runc's second one is called `runc:[2:INIT]`.
fn is_stages_own_name(comm: &str) -> bool {
    comm.starts_with("runc:[")
}

/// Names of programs of runtimes that prepare a container from inside. crun's stage is a copy that crun forks from itself, and is started
/// in no container; a program of a container may have that name all the same.
fn is_runtime_stage(comm: &str) -> bool {
    is_stages_own_name(comm) || matches!(comm, "runc" | "crun" | "youki")
}

/// Adds one of at most [`SESSIONS_MAX`], for which the oldest makes room.
fn note(known: &mut Vec<u32>, pid: u32) {
    if !known.contains(&pid) {
        if known.len() == SESSIONS_MAX {
            known.remove(0);
        }
        known.push(pid);
    }
}

impl Roles {
    /// A container's cgroup was made. One of the same name that has ended starts again.
    pub fn made(&mut self, container: EntityId) {
        if self.containers.len() >= CONTAINERS_MAX {
            self.containers.retain(|_, known| known.first.is_none_or(|first| !first.has_ended));
        }
        if self.containers.len() >= CONTAINERS_MAX {
            return;
        }
        let known = self.containers.entry(container).or_default();
        if known.first.is_none_or(|first| first.has_ended) {
            *known = Container { is_new: true, ..Container::default() };
        }
    }

    /// A container's cgroup is gone. Its last events may still be on their way: what is known of it stays until there is no room.
    pub fn removed(&mut self, container: EntityId) {
        if let Some(first) = self.containers.get_mut(&container).and_then(|known| known.first.as_mut()) {
            first.has_ended = true;
        }
    }

    /// What a scan at `now_ns` found: `first` came from outside and is the oldest that did, `sessions` came later.
    pub fn scanned(
        &mut self,
        container: EntityId,
        first: Started<'_>,
        sessions: impl Iterator<Item = u32>,
        now_ns: u64,
    ) {
        if self.containers.len() >= CONTAINERS_MAX {
            return;
        }
        let known = self.containers.entry(container).or_default();
        if known.first.is_none() {
            let is_program = now_ns.saturating_sub(first.start_time_ns) > STAGE_MAX_NS;
            known.first = Some(First { is_program, ..first_of(&first) });
            known.sessions.extend(sessions.take(SESSIONS_MAX));
        }
    }

    /// Whether nothing is known of a container yet.
    pub fn is_unknown(&self, container: EntityId) -> bool {
        self.containers.get(&container).is_none_or(|known| known.first.is_none() && !known.is_new)
    }

    /// A process of a container replaced its image. Returns its role.
    pub fn exec(&mut self, container: EntityId, started: Started<'_>) -> Role {
        let Some(known) = self.containers.get_mut(&container) else {
            return Role::Unknown;
        };
        match &mut known.first {
            None if !known.is_new => Role::Unknown,
            None if is_stages_own_name(started.comm) => Role::Runtime,
            None if started.parent_inside => Role::Unknown,
            None => {
                let first = first_of(&started);
                known.first = Some(first);
                first.role
            }
            Some(first) if first.pid == started.pid => {
                first.is_launcher = is_launcher(&started);
                first.is_stage &= is_runtime_stage(started.comm);
                first.role
            }
            Some(first) if first.is_launcher && started.parent_pid == first.pid && started.ns_pid == 1 => {
                *first = First { is_launcher: false, ..first_of(&started) };
                first.role
            }
            // What was taken for the program was a stage of the runtime after all: this one is the init of the pid namespace.
            Some(first) if first.is_stage && !started.parent_inside && started.ns_pid == 1 => {
                *first = first_of(&started);
                first.role
            }
            // A container does not outlive its first process: what ended was a stage of the runtime under another name. runc
            // may be in the cgroup already when it replaces its own image by a copy of itself.
            Some(first) if first.has_ended && !started.parent_inside && !is_runtime_stage(started.comm) => {
                let first = first_of(&started);
                *known = Container { first: Some(first), ..Container::default() };
                first.role
            }
            Some(_) if !started.parent_inside || known.sessions.contains(&started.parent_pid) => {
                if is_stages_own_name(started.comm) {
                    return Role::Runtime;
                }
                note(&mut known.sessions, started.pid);
                Role::Session
            }
            Some(_) => {
                if is_runtime_stage(started.comm) {
                    note(&mut known.namesakes, started.pid);
                }
                Role::Member
            }
        }
    }

    /// The role of a process of a container. `parent_pid` is 0 where it is not known.
    pub fn of(&self, container: EntityId, pid: u32, parent_pid: u32, comm: &str) -> Role {
        let Some(known) = self.containers.get(&container) else {
            return Role::Unknown;
        };
        match known.first {
            // What it calls itself later is a name that anybody can take.
            Some(first) if first.pid == pid && !first.is_stage => first.role,
            _ if is_stages_own_name(comm) => Role::Runtime,
            Some(first) if first.pid == pid && first.is_program => first.role,
            _ if known.namesakes.contains(&pid) => Role::Member,
            Some(first) if is_runtime_stage(comm) && (first.pid == pid || first.pid != parent_pid) => {
                match known.sessions.contains(&pid) {
                    true => Role::Session,
                    false => Role::Runtime,
                }
            }
            None if is_runtime_stage(comm) => Role::Runtime,
            Some(first) if first.pid == pid => first.role,
            _ if known.sessions.contains(&pid) || parent_pid != 0 && known.sessions.contains(&parent_pid) => {
                Role::Session
            }
            Some(_) => Role::Member,
            None => Role::Unknown,
        }
    }

    /// A process of a container died. Returns its role.
    pub fn exit(&mut self, container: EntityId, pid: u32, start_time_ns: u64, parent_pid: u32, comm: &str) -> Role {
        let role = self.of(container, pid, parent_pid, comm);
        let Some(known) = self.containers.get_mut(&container) else {
            return role;
        };
        known.sessions.retain(|&session| session != pid);
        known.namesakes.retain(|&namesake| namesake != pid);
        match &mut known.first {
            // Times differ where the process id was taken again by another process since.
            Some(first) if first.pid == pid && is_same_start(first.start_time_ns, start_time_ns) => {
                first.has_ended = true;
                role
            }
            Some(first) if first.pid == pid => Role::Member,
            _ => role,
        }
    }
}

fn is_launcher(started: &Started<'_>) -> bool {
    started.ns_level == 0 && started.comm == "unshare"
}

fn first_of(started: &Started<'_>) -> First {
    let role = if started.in_pod && is_sandbox(started.comm) { Role::Sandbox } else { Role::First };
    First {
        pid: started.pid,
        start_time_ns: started.start_time_ns,
        ns_level: started.ns_level,
        role,
        is_launcher: is_launcher(started),
        is_stage: is_runtime_stage(started.comm),
        is_program: !is_stages_own_name(started.comm),
        has_ended: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOX: EntityId = 7;

    fn started(pid: u32, parent_pid: u32, parent_inside: bool, comm: &str) -> Started<'_> {
        let start_time_ns = u64::from(pid) * 1000;
        Started { pid, start_time_ns, parent_pid, parent_inside, comm, ns_pid: 9, ns_level: 1, in_pod: true }
    }

    fn running() -> Roles {
        let mut roles = Roles::default();
        roles.made(BOX);
        assert_eq!(roles.exec(BOX, started(9, 1, false, "runc:[2:INIT]")), Role::Runtime);
        assert_eq!(roles.exec(BOX, started(10, 1, false, "sh")), Role::First);
        roles
    }

    #[test]
    fn the_first_process_is_what_the_runtime_started() {
        let mut roles = running();
        assert_eq!(roles.exec(BOX, started(11, 10, true, "app")), Role::Member);
        let inner = Started { ns_pid: 1, ns_level: 2, ..started(12, 11, true, "bwrap") };
        assert_eq!(roles.exec(BOX, inner), Role::Member, "the init of an inner namespace");
        assert_eq!(roles.exec(BOX, started(10, 1, false, "server")), Role::First, "it replaced its image");
        assert_eq!(roles.of(BOX, 99, 10, "worker"), Role::Member, "forked and never replaced");
        assert_eq!(roles.exit(BOX, 10, 10_000, 1, "server"), Role::First);
    }

    #[test]
    fn a_first_process_called_runc_is_still_the_first() {
        for name in ["runc", "crun", "runc:[2:INIT]"] {
            let mut roles = running();
            assert_eq!(roles.of(BOX, 10, 1, name), Role::First, "it renamed itself {name}");
            assert_eq!(roles.exec(BOX, started(10, 1, false, name)), Role::First, "it became {name}");
            assert_eq!(roles.exit(BOX, 10, 10_000, 1, name), Role::First);
        }
        // The collector started while the runtime prepared the container.
        let mut roles = Roles::default();
        roles.scanned(BOX, started(10, 1, false, "runc:[2:INIT]"), [].into_iter(), 20_000);
        assert_eq!(roles.of(BOX, 10, 1, "runc:[2:INIT]"), Role::Runtime);
        assert_eq!(roles.exec(BOX, started(10, 1, false, "app")), Role::First);
        assert_eq!(roles.exit(BOX, 10, 10_000, 1, "runc"), Role::First);
    }

    #[test]
    fn a_program_started_as_runc_is_the_containers_own() {
        for name in ["runc", "crun", "youki"] {
            let mut roles = Roles::default();
            roles.made(BOX);
            assert_eq!(roles.exec(BOX, started(10, 1, false, name)), Role::First, "its image has such an entry point");
            assert_eq!(roles.of(BOX, 10, 1, name), Role::First);
            assert_eq!(roles.exec(BOX, started(11, 10, true, name)), Role::Member, "its child");
            assert_eq!((roles.of(BOX, 11, 0, name), roles.of(BOX, 12, 10, name)), (Role::Member, Role::Member));
            assert_eq!(roles.exec(BOX, started(20, 3, false, name)), Role::Session, "kubectl exec");
            assert_eq!(roles.of(BOX, 20, 3, name), Role::Session);
            assert_eq!(roles.of(BOX, 30, 3, name), Role::Runtime, "a stage that somebody outside has forked");
            assert_eq!(roles.of(BOX, 10, 1, "runc:[2:INIT]"), Role::Runtime, "it was a stage, and says so");
            assert_eq!(roles.exit(BOX, 10, 10_000, 1, name), Role::First);
        }
        // A stage of that name gives way to the init of the container's pid namespace.
        let mut roles = Roles::default();
        roles.made(BOX);
        roles.exec(BOX, started(9, 1, false, "runc"));
        assert_eq!(roles.exec(BOX, Started { ns_pid: 1, ..started(10, 1, false, "app") }), Role::First);
        assert_eq!(roles.of(BOX, 9, 1, "runc"), Role::Runtime);
    }

    #[test]
    fn a_scan_knows_a_program_called_runc_by_its_age() {
        for (now_ns, expected) in [(1_000_000_000, Role::Runtime), (100_000_000_000, Role::First)] {
            let mut roles = Roles::default();
            roles.scanned(BOX, started(10, 1, false, "runc"), [].into_iter(), now_ns);
            assert_eq!(roles.exit(BOX, 10, 10_000, 1, "runc"), expected);
        }
    }

    #[test]
    fn a_renamed_runtime_stage_gives_way_to_the_program() {
        let mut roles = Roles::default();
        roles.made(BOX);
        assert_eq!(roles.exec(BOX, started(8, 1, false, "6")), Role::First, "runc's copy of itself");
        assert_eq!(roles.exit(BOX, 8, 8000, 1, "6"), Role::First);
        assert_eq!(roles.exec(BOX, started(10, 1, false, "app")), Role::First);
        assert_eq!(roles.exec(BOX, started(20, 3, false, "bash")), Role::Session);
        assert_eq!(roles.exit(BOX, 10, 10_000, 1, "app"), Role::First);
    }

    #[test]
    fn late_entrants_and_their_children_are_sessions() {
        let mut roles = running();
        assert_eq!(roles.exec(BOX, started(20, 3, false, "runc:[2:INIT]")), Role::Runtime);
        assert_eq!(roles.exec(BOX, started(20, 3, false, "bash")), Role::Session);
        assert_eq!(roles.exec(BOX, started(21, 20, true, "stress")), Role::Session);
        assert_eq!(roles.of(BOX, 22, 21, "stress"), Role::Session);
        assert_eq!(roles.exit(BOX, 20, 20_000, 3, "bash"), Role::Session);
        assert_eq!(roles.of(BOX, 10, 1, "sh"), Role::First, "it did not take the first one's place");
    }

    #[test]
    fn a_launcher_hands_over_to_the_init_that_it_starts() {
        let mut roles = Roles::default();
        roles.made(BOX);
        assert_eq!(roles.exec(BOX, Started { ns_level: 0, ..started(10, 1, false, "unshare") }), Role::First);
        let init = Started { ns_pid: 1, ..started(11, 10, true, "eater") };
        assert_eq!(roles.exec(BOX, init), Role::First);
        assert_eq!(roles.of(BOX, 10, 1, "unshare"), Role::Member);
    }

    #[test]
    fn a_sandbox_is_no_container_and_ended_ones_restart() {
        let mut roles = Roles::default();
        roles.made(BOX);
        assert_eq!(roles.exec(BOX, started(10, 1, false, "pause")), Role::Sandbox);
        assert_eq!(roles.exit(BOX, 10, 10_000, 1, "pause"), Role::Sandbox);
        roles.made(BOX);
        assert_eq!(roles.exec(BOX, started(31, 1, false, "app")), Role::First);
    }

    #[test]
    fn nothing_is_said_of_a_container_whose_beginning_nobody_saw() {
        let mut roles = Roles::default();
        assert_eq!(roles.exec(BOX, started(10, 1, false, "app")), Role::Unknown);
        roles.scanned(BOX, started(10, 1, false, "app"), [12].into_iter(), 20_000);
        assert_eq!((roles.of(BOX, 10, 1, "app"), roles.of(BOX, 12, 1, "sh")), (Role::First, Role::Session));
        assert_eq!(roles.exit(BOX, 10, 1_000_000_000, 1, "other"), Role::Member, "the id was taken again");
    }
}
