//! A wall clock that a test can step, in a process of its own: libc's `clock_gettime`, with a number of seconds added.

use std::ffi::CStr;
use std::process::Command;
use std::sync::atomic::{AtomicI64, Ordering};

const CHILD: &str = "TAPIO_TEST_STEPPED_CLOCK";
const VARIABLE: &CStr = c"tapio_step_seconds";
const LIBRARY: &str = "
    #define _GNU_SOURCE
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>
    long long tapio_step_seconds;
    int clock_gettime(clockid_t clock, struct timespec *now) {
        int result = syscall(SYS_clock_gettime, clock, now);
        if (result == 0 && clock == CLOCK_REALTIME)
            now->tv_sec += __atomic_load_n(&tapio_step_seconds, __ATOMIC_RELAXED);
        return result;
    }
";

/// The clock of this process.
pub struct SteppedClock {
    seconds: &'static AtomicI64,
}

impl SteppedClock {
    /// Runs the test of this name again, alone and with a clock that can be stepped. There it is given the clock; the caller
    /// gets `None` once that run has passed.
    pub fn in_own_process(module: &str, test: &str) -> Option<Self> {
        if std::env::var_os(CHILD).is_some() {
            // SAFETY: the name ends with a zero; RTLD_DEFAULT searches what is loaded.
            let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, VARIABLE.as_ptr()) };
            // SAFETY: the library's variable is 8 aligned bytes that live as long as the process; it reads them atomically.
            let seconds = unsafe { found.cast::<AtomicI64>().as_ref() }.expect("the library is loaded");
            return Some(Self { seconds });
        }
        let dir = tempfile::tempdir().expect("a directory");
        let (source, library) = (dir.path().join("clock.c"), dir.path().join("clock.so"));
        std::fs::write(&source, LIBRARY).expect("written");
        let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output();
        let built = built.expect("a C compiler: the build needs one too");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let (_, module) = module.split_once("::").expect("a module of the executable");
        let run = Command::new(std::env::current_exe().expect("this executable"))
            .args(["--exact", &format!("{module}::{test}"), "--test-threads", "1"])
            .env(CHILD, "1")
            .env("LD_PRELOAD", &library)
            .output()
            .expect("it runs again");
        let said = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success() && said.contains("1 passed"), "{said}");
        None
    }

    /// Steps the wall clock by this many seconds, forwards or back.
    pub fn step(&self, seconds: i64) {
        let before = std::time::SystemTime::now();
        self.seconds.fetch_add(seconds, Ordering::Relaxed);
        let now = std::time::SystemTime::now();
        let is_stepped = if seconds > 0 { now > before } else { now < before };
        assert!(is_stepped, "the library is not in use");
    }
}
