//! Attaching one program, and the verdict on it.

use std::io;

use aya::Ebpf;
use aya::programs::{ProgramError, RawTracePoint};
use rustix::io::Errno;

use crate::object::ProgramInfo;
use crate::record::Kind;

/// How a program fared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Attached,
    /// The kernel has no such tracepoint, or lacks what the program reads.
    NotOnThisKernel(String),
    /// The kernel has the tracepoint but refuses the program.
    Refused(String),
    /// The configuration asked for it to be left out.
    Disabled,
}

/// How one program fared, and what is missing without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The program's name.
    pub program: &'static str,
    /// The raw tracepoint it belongs to.
    pub hook: &'static str,
    /// The lane of its records.
    pub lane: &'static str,
    /// The kinds of its records: missing unless it is attached.
    pub produces: &'static [Kind],
    /// How it fared.
    pub state: State,
}

impl Verdict {
    pub(crate) fn new(program: &ProgramInfo, state: State) -> Self {
        Self { program: program.name, hook: program.hook, lane: program.lane.name(), produces: program.produces, state }
    }
}

/// Why a program does not run.
pub(crate) enum Failure {
    /// The process may not; no other program will fare better.
    NotPermitted(io::Error),
    /// This program cannot run.
    Program(State),
}

/// Loads a program into the kernel and attaches it to its raw tracepoint.
pub(crate) fn attach(object: &mut Ebpf, info: &ProgramInfo) -> Result<(), Failure> {
    let Some(program) = object.program_mut(info.name) else {
        return Err(Failure::Program(State::Refused("the object has no such program".to_owned())));
    };
    let program: &mut RawTracePoint = program.try_into().map_err(failure)?;
    program.load().map_err(failure)?;
    program.attach(info.hook).map_err(|error| match errno(&error) {
        Some(Errno::NOENT) => Failure::Program(State::NotOnThisKernel(format!("it has no tracepoint {}", info.hook))),
        // The kernel compares the arguments that the program reads with those that the tracepoint has.
        Some(Errno::INVAL) => Failure::Program(State::NotOnThisKernel(format!(
            "its tracepoint {} has fewer arguments than the program reads",
            info.hook
        ))),
        _ => failure(error),
    })?;
    Ok(())
}

fn failure(error: ProgramError) -> Failure {
    let state = match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            // What the loader puts where a field, or a type, is missing in this kernel's type information.
            if log.contains("unknown func#195896080") || log.contains("invalid func unknown#195896080") {
                State::NotOnThisKernel("a field that the program reads does not exist".to_owned())
            } else if is_not_permitted(&io_error) && log.trim().is_empty() {
                return Failure::NotPermitted(io_error);
            } else {
                State::Refused(format!("{io_error}: {}", last_words(&log)))
            }
        }
        ProgramError::SyscallError(error) if is_not_permitted(&error.io_error) => {
            return Failure::NotPermitted(error.io_error);
        }
        ProgramError::SyscallError(error) => State::Refused(format!("{}: {}", error.call, error.io_error)),
        other => State::Refused(other.to_string()),
    };
    Failure::Program(state)
}

fn errno(error: &ProgramError) -> Option<Errno> {
    match error {
        ProgramError::SyscallError(error) => Errno::from_io_error(&error.io_error),
        _ => None,
    }
}

/// Whether a system call was refused for want of a capability.
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
    fn the_last_words_of_a_verifier_log_are_its_complaint() {
        let log =
            "0: (b7) r0 = 0\n1: (85) call unknown#7\ninvalid func unknown#7\nprocessed 2 insns (limit 1000000)\n\n";
        assert_eq!(last_words(log), "1: (85) call unknown#7; invalid func unknown#7");
        assert_eq!(last_words(""), "");
    }
}
