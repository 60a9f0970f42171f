//! The errors of system calls that can be counted.

use rustix::io::Errno;

/// Errors of system calls that can be counted.
const ERRNOS: [(&str, Errno); 16] = [
    ("EIO", Errno::IO),
    ("EAGAIN", Errno::AGAIN),
    ("ENOMEM", Errno::NOMEM),
    ("EACCES", Errno::ACCESS),
    ("EBUSY", Errno::BUSY),
    ("ENFILE", Errno::NFILE),
    ("EMFILE", Errno::MFILE),
    ("EFBIG", Errno::FBIG),
    ("ENOSPC", Errno::NOSPC),
    ("EROFS", Errno::ROFS),
    ("EDQUOT", Errno::DQUOT),
    ("ESTALE", Errno::STALE),
    ("ENOBUFS", Errno::NOBUFS),
    ("ETIMEDOUT", Errno::TIMEDOUT),
    ("ECONNREFUSED", Errno::CONNREFUSED),
    ("EHOSTUNREACH", Errno::HOSTUNREACH),
];

/// The names of the errors that can be counted.
pub fn errno_names() -> impl Iterator<Item = &'static str> {
    ERRNOS.into_iter().map(|(name, _)| name)
}

/// The numbers of these errors: those that are counted, and those that are counted only where a process should be made.
pub fn errnos(names: &[String]) -> (Vec<u32>, Vec<u32>) {
    let named = names.iter().filter_map(|name| ERRNOS.iter().find(|(known, _)| known == name));
    // A read that would block fails with it all the time, and nothing is wrong.
    let (of_fork, anywhere): (Vec<_>, Vec<_>) = named.partition(|(_, errno)| *errno == Errno::AGAIN);
    let numbers =
        |errnos: Vec<&(&str, Errno)>| errnos.iter().map(|(_, errno)| errno.raw_os_error() as u32).collect::<Vec<_>>();
    (numbers(anywhere), numbers(of_fork))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::config::Config;

    #[test]
    fn the_default_errors_are_the_probes_default_errors() {
        let (mut anywhere, of_fork) = errnos(&Config::default().collectors.ebpf.syscall_errors);
        anywhere.sort_unstable();
        assert_eq!((&*anywhere, &*of_fork), (tapio_probes::DEFAULT_ERRNOS, tapio_probes::DEFAULT_ERRNOS_OF_FORK));
    }
}
