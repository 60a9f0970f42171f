//! The limit of open files: each connection is one, and the soft limit of 1,024 is there for programs that cannot count beyond.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The soft limit before and after, where it could be raised; `None` for no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raised {
    pub before: Option<u64>,
    pub now: Option<u64>,
}

/// Raises the soft limit of open files to the hard one.
///
/// # Errors
/// When the kernel refuses; the limit stays as it is.
pub fn raise_limit() -> Result<Raised, Errno> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(Raised { before: limit.current, now: getrlimit(Resource::Nofile).current })
}

/// Calls [`raise_limit`], and logs the outcome.
pub fn raise_limit_and_log() {
    match raise_limit() {
        Ok(Raised { before, now }) => tracing::info!(before, now, "the limit of open files"),
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open files"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let hard = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: Some(200), maximum: hard }).expect("lowered");
        assert_eq!(raise_limit(), Ok(Raised { before: Some(200), now: hard }));
    }
}
