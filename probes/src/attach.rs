//! Attaching one program, and the verdict on it.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use aya::programs::cgroup_skb::CgroupSkbLinkId;
use aya::programs::raw_trace_point::RawTracePointLinkId;
use aya::programs::tp_btf::BtfTracePointLinkId;
use aya::programs::{
    BtfTracePoint, CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, Program, ProgramError, RawTracePoint,
};
use aya::{Btf, BtfError, Ebpf};
use rustix::io::Errno;

use crate::mountinfo;
use crate::object::{Attachment, ProgramInfo};
use crate::record::RecordKind;

/// How a program fared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProgramState {
    /// The program runs.
    Attached,
    /// The kernel has no such tracepoint, or lacks what the program reads.
    NotOnThisKernel(String),
    /// The kernel has the tracepoint but refuses the program.
    Refused(String),
    /// The configuration leaves it out.
    Disabled,
}

/// How one program fared, and what is missing without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The program's name.
    pub program: &'static str,
    /// The raw tracepoint, or what else it belongs to.
    pub hook: &'static str,
    /// The lane of its records.
    pub lane: &'static str,
    /// The kinds of its records: missing unless it is attached.
    pub produces: &'static [RecordKind],
    /// How it fared.
    pub state: ProgramState,
}

impl Verdict {
    pub(crate) fn new(program: &ProgramInfo, state: ProgramState) -> Self {
        Self { program: program.name, hook: program.hook, lane: program.lane.name(), produces: program.produces, state }
    }
}

/// Why a program does not run.
pub(crate) enum Failure {
    /// The process may not; no other program will fare better.
    NotPermitted(io::Error),
    /// The program cannot run.
    Program(ProgramState),
}

/// What holds a program to its hook.
#[derive(Debug)]
pub(crate) enum Link {
    Tracepoint(RawTracePointLinkId),
    TypedTracepoint(BtfTracePointLinkId),
    Packets(CgroupSkbLinkId),
}

/// Loads a program into the kernel, unless it is there already, and attaches it to its hook. Without the kernel's type
/// information only what is loaded already has a typed tracepoint.
pub(crate) fn attach(object: &mut Ebpf, info: &ProgramInfo, btf: Option<&Btf>) -> Result<Link, Failure> {
    let Some(program) = object.program_mut(info.name) else {
        return Err(Failure::Program(ProgramState::Refused("the object has no such program".to_owned())));
    };
    match info.attachment {
        Attachment::RawTracepoint => attach_to_tracepoint(program, info),
        Attachment::TypedTracepoint => attach_to_typed_tracepoint(program, info, btf),
        Attachment::CgroupEgress => attach_to_packets(program, CgroupSkbAttachType::Egress),
        Attachment::CgroupIngress => attach_to_packets(program, CgroupSkbAttachType::Ingress),
    }
}

/// Takes a program from its hook; it stays loaded.
pub(crate) fn detach(object: &mut Ebpf, info: &ProgramInfo, link: Link) -> Result<(), ProgramError> {
    let Some(program) = object.program_mut(info.name) else {
        return Ok(());
    };
    match link {
        Link::Tracepoint(id) => <&mut RawTracePoint>::try_from(program)?.detach(id),
        Link::TypedTracepoint(id) => <&mut BtfTracePoint>::try_from(program)?.detach(id),
        Link::Packets(id) => <&mut CgroupSkb>::try_from(program)?.detach(id),
    }
}

/// How long a program is loaded again and again while signals interrupt it.
const LOAD_PATIENCE: Duration = Duration::from_secs(3);

/// Loads, and again when a signal came in the midst: the verifier then gives up with `EAGAIN`. The bound is a time, since on a busy
/// machine a signal can meet each of five tries. A program that is given up is missing until a restart.
fn load(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    let began = Instant::now();
    loop {
        match load() {
            Err(error) if was_interrupted(&error) && began.elapsed() < LOAD_PATIENCE => std::thread::yield_now(),
            result => return result,
        }
    }
}

fn was_interrupted(error: &ProgramError) -> bool {
    let errno = match error {
        ProgramError::LoadError { io_error, .. } | ProgramError::IOError(io_error) => Errno::from_io_error(io_error),
        _ => None,
    };
    errno == Some(Errno::AGAIN)
}

fn loaded(result: Result<(), ProgramError>) -> Result<(), Failure> {
    match result {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(failure(error)),
    }
}

fn attach_to_tracepoint(program: &mut Program, info: &ProgramInfo) -> Result<Link, Failure> {
    let program: &mut RawTracePoint = program.try_into().map_err(failure)?;
    loaded(load(|| program.load()))?;
    let link = program.attach(info.hook).map_err(|error| match errno(&error) {
        Some(Errno::NOENT) => no_tracepoint(info),
        // The kernel compares the arguments that the program reads with those that the tracepoint has.
        Some(Errno::INVAL) => too_few_arguments(info),
        _ => failure(error),
    })?;
    Ok(Link::Tracepoint(link))
}

fn attach_to_typed_tracepoint(program: &mut Program, info: &ProgramInfo, btf: Option<&Btf>) -> Result<Link, Failure> {
    let program: &mut BtfTracePoint = program.try_into().map_err(failure)?;
    if let Some(btf) = btf {
        match load(|| program.load(info.hook, btf)) {
            Err(ProgramError::Btf(BtfError::UnknownBtfTypeName { .. })) => return Err(no_tracepoint(info)),
            // What the verifier says of an argument that the tracepoint does not have.
            Err(ProgramError::LoadError { verifier_log, .. }) if verifier_log.to_string().contains("-th argument") => {
                return Err(too_few_arguments(info));
            }
            result => loaded(result)?,
        }
    }
    let link = program.attach().map_err(|error| match errno(&error) {
        Some(Errno::NOENT) => no_tracepoint(info),
        _ => failure(error),
    })?;
    Ok(Link::TypedTracepoint(link))
}

fn no_tracepoint(info: &ProgramInfo) -> Failure {
    Failure::Program(ProgramState::NotOnThisKernel(format!("it has no tracepoint {}", info.hook)))
}

fn too_few_arguments(info: &ProgramInfo) -> Failure {
    let why = format!("its tracepoint {} has fewer arguments than the program reads", info.hook);
    Failure::Program(ProgramState::NotOnThisKernel(why))
}

/// Attaches to the root of the version 2 hierarchy, so that no cgroup is left out.
fn attach_to_packets(program: &mut Program, direction: CgroupSkbAttachType) -> Result<Link, Failure> {
    let root = cgroup_root().map_err(|reason| Failure::Program(ProgramState::Refused(reason)))?;
    let program: &mut CgroupSkb = program.try_into().map_err(failure)?;
    loaded(load(|| program.load()))?;
    // By a link, as since 5.7, it shares the place with others' programs whatever the mode, and takes no mode.
    let link = program.attach(root, direction, CgroupAttachMode::Single).map_err(|error| match errno(&error) {
        Some(Errno::PERM) => Failure::Program(ProgramState::Refused(
            "it needs CAP_NET_ADMIN, and a root cgroup where no program that suffers no other is attached".to_owned(),
        )),
        _ => failure(error),
    })?;
    Ok(Link::Packets(link))
}

/// The root of the version 2 hierarchy itself: a container may see a part of it mounted, or the root below another place.
fn cgroup_root() -> Result<File, String> {
    /// Inode of a hierarchy's root.
    const ROOT_INODE: u64 = 1;
    let path = mountinfo::OF_THIS_PROCESS;
    let mounts = mountinfo::read(path).map_err(|error| format!("cannot read {path}: {error}"))?;
    let found = mountinfo::parse(&mounts).filter(|mount| mount.kind == "cgroup2").find_map(|mount| {
        let directory = File::open(&*mount.point).ok()?;
        (directory.metadata().ok()?.ino() == ROOT_INODE).then_some(directory)
    });
    found.ok_or_else(|| "the root of the cgroup version 2 hierarchy is not mounted".to_owned())
}

fn failure(error: ProgramError) -> Failure {
    let state = match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            // What the loader puts where a field, or a type, is missing in this kernel's type information.
            if log.contains("unknown func#195896080") || log.contains("invalid func unknown#195896080") {
                ProgramState::NotOnThisKernel("a field that the program reads does not exist".to_owned())
            } else if is_not_permitted(&io_error) && log.trim().is_empty() {
                return Failure::NotPermitted(io_error);
            } else {
                ProgramState::Refused(format!("{io_error}: {}", last_words(&log)))
            }
        }
        ProgramError::SyscallError(error) if is_not_permitted(&error.io_error) => {
            return Failure::NotPermitted(error.io_error);
        }
        ProgramError::SyscallError(error) => ProgramState::Refused(format!("{}: {}", error.call, error.io_error)),
        other => ProgramState::Refused(other.to_string()),
    };
    Failure::Program(state)
}

fn errno(error: &ProgramError) -> Option<Errno> {
    match error {
        ProgramError::SyscallError(error) => Errno::from_io_error(&error.io_error),
        _ => None,
    }
}

/// Whether a system call was refused because a capability is missing.
pub(crate) fn is_not_permitted(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::PERM.raw_os_error())
}

/// The verifier says what it holds against a program just before its closing statistics.
fn last_words(log: &str) -> String {
    let said: Vec<&str> = log
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("processed ") && !line.starts_with("verification time"))
        .collect();
    said[said.len().saturating_sub(2)..].join("; ").chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_interrupted_load_is_tried_again() {
        let failed = |errno: Errno| ProgramError::IOError(errno.into());
        let mut tries = 0;
        let mut interrupted_often = || {
            tries += 1;
            if tries < 30 { Err(failed(Errno::AGAIN)) } else { Ok(()) }
        };
        assert!(load(&mut interrupted_often).is_ok());
        assert_eq!(tries, 30);
        let mut tries = 0;
        let refused = load(|| {
            tries += 1;
            Err(failed(Errno::INVAL))
        });
        assert!(refused.is_err());
        assert_eq!(tries, 1);
    }

    #[test]
    fn the_last_words_of_a_verifier_log_are_its_complaint() {
        let log =
            "0: (b7) r0 = 0\n1: (85) call unknown#7\ninvalid func unknown#7\nprocessed 2 insns (limit 1000000)\n\n";
        assert_eq!(last_words(log), "1: (85) call unknown#7; invalid func unknown#7");
        assert_eq!(last_words(""), "");
    }
}
