//! One of the real programs: where it is, what it is started with, and the process while it runs.
//!
//! In: a configuration file that is written already. Out: a process that can be started, ended and started again on the same
//! ports. What must hold: the process ends before the files that it was given go, so whoever owns them drops this first.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use super::usage::{self, Usage};
use super::{END_LIMIT, Process};
use crate::error::Error;

/// Starts one real program and ends it when dropped.
pub struct Program {
    name: String,
    binary: PathBuf,
    config: PathBuf,
    log: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
    /// A program and its arguments that starts it.
    launcher: Vec<String>,
    health_port: u16,
    process: Option<Process>,
}

impl Program {
    /// Starts nothing yet. `name` is for messages; at `health_port` it has `/readyz`.
    pub fn new(name: String, binary: PathBuf, config: PathBuf, log: PathBuf, health_port: u16) -> Self {
        Self { name, binary, config, log, environment: Vec::new(), launcher: Vec::new(), health_port, process: None }
    }

    /// Gives it an environment variable.
    pub fn set_environment(&mut self, name: &'static str, value: PathBuf) {
        self.environment.push((name, value));
    }

    /// Starts it by another program, which gets it and its arguments.
    pub fn set_launcher(&mut self, launcher: &[&str]) {
        self.launcher = launcher.iter().map(|part| (*part).to_owned()).collect();
    }

    /// Starts the process; it need not be ready when this returns.
    pub fn spawn(&mut self) -> Result<(), Error> {
        let mut command = match self.launcher.split_first() {
            Some((launcher, arguments)) => {
                let mut command = Command::new(launcher);
                command.args(arguments).arg(&self.binary);
                command
            }
            None => Command::new(&self.binary),
        };
        command.arg("--config").arg(&self.config).envs(self.environment.iter().map(|(name, value)| (name, value)));
        self.process = Some(Process::spawn(&self.name, command, self.log.clone())?);
        Ok(())
    }

    /// Waits until the process that was started is ready.
    pub fn wait_ready(&mut self) -> Result<(), Error> {
        match &mut self.process {
            Some(process) => process.wait_ready(self.health_port),
            None => Err(Error::Invalid(format!("{} was not started", self.name))),
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// SIGTERM; how it ended.
    pub fn stop(&mut self) -> Result<Option<ExitStatus>, Error> {
        match self.process.take() {
            Some(mut process) => process.terminate(END_LIMIT).map(Some),
            None => Ok(None),
        }
    }

    /// Starts again, on the same ports and files, and waits until it is ready.
    pub fn restart(&mut self) -> Result<(), Error> {
        self.spawn()?;
        self.wait_ready()
    }

    /// An error when it does not run any more.
    pub fn check_running(&mut self) -> Result<(), Error> {
        match &mut self.process {
            Some(process) => process.check_running(),
            None => Ok(()),
        }
    }

    /// The configuration it is started with.
    pub fn config_path(&self) -> &Path {
        &self.config
    }

    /// The process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// The process, while it runs.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// What it has used so far.
    pub fn usage(&self) -> Option<Usage> {
        usage::read(self.pid()?)
    }

    /// What it said, in all its runs.
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}
