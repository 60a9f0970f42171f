//! The programs of this crate, to be run by tests.

#![allow(dead_code, reason = "every test program uses its part of this module")]

use std::process::{Command, Output};

/// Path of the server's program.
pub const SERVER: &str = env!("CARGO_BIN_EXE_tapio-server");

/// Path of `tapioctl`.
pub const TAPIOCTL: &str = env!("CARGO_BIN_EXE_tapioctl");

/// The server's program with these arguments.
pub fn server(arguments: &[&str]) -> Command {
    let mut command = Command::new(SERVER);
    command.args(arguments);
    command
}

/// `tapioctl` that asks the server at an address.
pub fn tapioctl(address: impl ToString, arguments: &[&str]) -> Command {
    let mut command = Command::new(TAPIOCTL);
    command.args(["--server", &address.to_string()]).args(arguments).env_remove("NO_COLOR");
    command
}

/// Runs a program to its end, while this thread's other tasks go on.
pub async fn output(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output()).await.expect("it runs").expect("it starts")
}

/// What a program that ended well printed.
pub fn printed(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}
