//! Settings of glibc's heap in the environment, which it reads when a process starts.
//!
//! What must hold: a program restarts itself once at the most, whatever becomes of the settings on the way, and before it has
//! any thread.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Set by the first start for the second. glibc takes its own variables away from a program that has more rights than who
/// started it, this one it does not know.
const STARTED_ANEW: &str = "TAPIO_HEAP_SET";

/// Restarts this program in this process with `settings`, names and values, in its environment. Returns in the program so
/// started, where one of them was set before, or where that cannot be done: then the program takes more memory, and says so. To be
/// called first of all.
pub fn start_with(settings: &[(&str, &str)]) {
    if env::var_os(STARTED_ANEW).is_some() || settings.iter().any(|(name, _)| env::var_os(name).is_some()) {
        return;
    }
    let error = match env::current_exe() {
        Ok(program) => {
            let mut command = Command::new(program);
            command.args(env::args_os().skip(1)).envs(settings.iter().copied()).env(STARTED_ANEW, "1");
            if let Some(name) = env::args_os().next() {
                command.arg0(name);
            }
            let error = command.exec();
            ignore_broken_pipes();
            error
        }
        Err(error) => error,
    };
    crate::complain!("the heap's settings are not made, which costs memory and nothing else: {error}");
}

/// Ignores SIGPIPE as the runtime does. An exec that fails leaves the signal at what a new program would start with,
/// and then a peer that goes away ends this one.
fn ignore_broken_pipes() {
    // A runtime's handler replaces the default for good; the receiver may go.
    if let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() {
        let _inside = runtime.enter();
        let _ = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::pipe());
    }
}
