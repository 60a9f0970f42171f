//! What the probes cost inside the kernel.
//!
//! The kernel measures a program's run time only on request, since measuring costs two readings of the clock a run,
//! about as much as a small program. So a caller requests it for moments only: see [`RunTimes::measure`].

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::cost;

/// Holds the programs, whose times the kernel keeps.
#[derive(Debug)]
pub struct RunTimes {
    programs: Vec<(&'static str, OwnedFd)>,
}

/// While this lives the kernel measures.
#[derive(Debug)]
pub struct Measuring(#[allow(dead_code, reason = "held, not read")] OwnedFd);

impl RunTimes {
    pub(crate) fn new(programs: Vec<(&'static str, OwnedFd)>) -> Self {
        Self { programs }
    }

    /// Lets the kernel measure until the result is dropped.
    ///
    /// # Errors
    /// Before Linux 5.8, and without CAP_SYS_ADMIN on kernels that ask for it.
    pub fn measure(&self) -> io::Result<Measuring> {
        cost::count_run_time().map(Measuring)
    }

    /// Nanoseconds that each program has run while they were measured.
    pub fn get(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.programs.iter().map(|(program, fd)| (*program, cost::run_time_of(fd.as_fd()).unwrap_or_default().ns))
    }
}

#[cfg(test)]
mod tests {
    use crate::{LoadConfig, Probes};

    #[test]
    fn run_time_is_counted_while_it_is_measured() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP run_time_is_counted_while_it_is_measured: needs root and BPF");
            assert!(!std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all"), "TAPIO_REQUIRE=all");
            return;
        }
        let probes = Probes::load(&LoadConfig::default()).unwrap();
        let times = probes.run_times();
        let sum = || times.get().map(|(_, ns)| ns).sum::<u64>();
        let before = sum();
        let measuring = times.measure().unwrap();
        for _ in 0..20 {
            assert!(std::process::Command::new("true").status().unwrap().success());
        }
        drop(measuring);
        assert!(sum() > before);
    }
}
