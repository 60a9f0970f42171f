//! The machine that a run measures, as its report names it.

use std::fs;

use serde::Serialize;

/// The machine a figure was measured on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Host {
    pub cores: usize,
    pub kernel: String,
    pub cpu_model: String,
    pub memory_bytes: u64,
}

impl Host {
    /// Reads the properties of this machine.
    pub fn read() -> Self {
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&text("/proc/meminfo"), "MemTotal").unwrap_or_default();
        let kib: u64 = memory.strip_suffix(" kB").and_then(|kib| kib.trim().parse().ok()).unwrap_or(0);
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu_model: field(&text("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            memory_bytes: kib * 1024,
        }
    }
}
