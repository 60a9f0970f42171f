//! What glibc's heap is told by the environment, which it reads when a process starts.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Starts this program anew in this process with `settings`, names and values, in its environment. Returns where one of them is
/// set already, or where that cannot be done: then the program runs as it is, and takes more memory. To be called first of all.
pub fn start_with(settings: &[(&str, &str)]) {
    if settings.iter().any(|(name, _)| env::var_os(name).is_some()) {
        return;
    }
    if let Ok(program) = env::current_exe() {
        let mut command = Command::new(program);
        command.args(env::args_os().skip(1)).envs(settings.iter().copied());
        if let Some(name) = env::args_os().next() {
            command.arg0(name);
        }
        let _ = command.exec();
    }
}
