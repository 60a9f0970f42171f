//! What is asked of this machine and its kernel beside loading: its CPUs, its types, its limit of locked memory, what it says of
//! a program.

use std::io;
use std::path::Path;

use aya::{Btf, Endianness};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::Error;

/// One more than the highest CPU number that this machine can have; the numbers below it may have holes.
///
/// # Errors
/// When `/sys` does not say.
pub fn possible_cpus() -> Result<usize, Error> {
    const PATH: &str = "/sys/devices/system/cpu/possible";
    let text = std::fs::read_to_string(PATH).map_err(|error| Error::Object(format!("cannot read {PATH}: {error}")))?;
    last_cpu(&text).map(|cpu| cpu + 1).ok_or_else(|| Error::Object(format!("{PATH} says {:?}", text.trim())))
}

/// The number in a BPF program's `/proc/PID/fdinfo`, 0 where the kernel does not say.
pub(super) fn recursion_misses(fdinfo: &str) -> u64 {
    let value = fdinfo.lines().find_map(|line| line.strip_prefix("recursion_misses:"));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// The highest number in a list of ranges such as `0-3,8-11`.
fn last_cpu(ranges: &str) -> Option<usize> {
    ranges.trim().split([',', '-']).map(|number| number.parse().ok()).collect::<Option<Vec<usize>>>()?.into_iter().max()
}

/// The kernel's type information as its file has it.
pub(super) struct KernelBtf<'a> {
    path: &'a Path,
    bytes: Vec<u8>,
}

pub(super) fn read_btf(path: &Path) -> Result<KernelBtf<'_>, Error> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(KernelBtf { path, bytes }),
        Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
            Err(Error::NotPermitted { action: "read the kernel's type information", source })
        }
        Err(error) => Err(Error::NoBtf { path: path.to_owned(), reason: error.to_string() }),
    }
}

impl KernelBtf<'_> {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn parse(&self) -> Result<Btf, Error> {
        Btf::parse(&self.bytes, Endianness::default())
            .map_err(|error| Error::NoBtf { path: self.path.to_owned(), reason: error.to_string() })
    }
}

/// Before 5.11 maps count against the limit of locked memory. Where that cannot be lifted, making the first map says so.
pub(super) fn lift_memory_lock_limit() {
    let limit = getrlimit(Resource::Memlock);
    if limit.current.is_some() {
        let unlimited = Rlimit { current: None, maximum: None };
        let highest = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if setrlimit(Resource::Memlock, unlimited).is_err() && setrlimit(Resource::Memlock, highest).is_err() {
            tracing::debug!("cannot raise the limit of locked memory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_numbers_may_have_holes() {
        assert_eq!(last_cpu("0\n"), Some(0));
        assert_eq!(last_cpu("0-3,8-11\n"), Some(11));
        assert_eq!(last_cpu(""), None);
        assert_eq!(last_cpu("0-x"), None);
    }

    #[test]
    fn missed_runs_are_read_from_a_programs_fdinfo() {
        let text = "pos:\t0\nprog_type:\t17\nrun_cnt:\t0\nrecursion_misses:\t12\nverified_insns:\t9\n";
        assert_eq!(recursion_misses(text), 12);
        assert_eq!(recursion_misses("prog_type:\t17\n"), 0);
    }
}
