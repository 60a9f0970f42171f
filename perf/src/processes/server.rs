//! A real `tapio-server` with a configuration, ports and an archive of its own.

use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::{Program, bin_dir, binary, free_port};
use crate::client::Client;
use crate::error::{Context, Error};

/// What a server is started with.
#[derive(Clone, Debug, Default)]
pub struct ServerOptions {
    /// Where the programs are; beside this executable when not given.
    pub bin_dir: Option<PathBuf>,
    /// Where the archive goes; a temporary folder when not given.
    pub archive_dir: Option<PathBuf>,
    /// Further keys of `server:`, each after a comma.
    pub extra_server: String,
    /// Further keys of `archive:`, each after a comma.
    pub extra_archive: String,
    /// Further lines of `server.yaml`.
    pub extra_config: String,
}

/// A server that ends when this is dropped. Ports and archive outlive a restart.
pub struct Server {
    // Before the folder: the process ends before its files go.
    program: Program,
    archive_dir: PathBuf,
    port: u16,
    http_port: u16,
    _folder: TempDir,
}

impl Deref for Server {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.program
    }
}

impl DerefMut for Server {
    fn deref_mut(&mut self) -> &mut Program {
        &mut self.program
    }
}

impl Server {
    /// Starts a server and waits until it is ready.
    pub fn start(options: &ServerOptions) -> Result<Self, Error> {
        let mut server = Self::prepare(options)?;
        server.spawn()?;
        server.wait_ready()?;
        Ok(server)
    }

    /// Writes the configuration and starts nothing yet.
    pub fn prepare(options: &ServerOptions) -> Result<Self, Error> {
        let binary = binary("tapio-server", &bin_dir(options.bin_dir.as_deref())?)?;
        let folder = tempfile::Builder::new()
            .prefix("tapio-perf-server-")
            .tempdir()
            .context(|| "make a temporary folder".into())?;
        let archive_dir = options.archive_dir.clone().unwrap_or_else(|| folder.path().join("archive"));
        fs::create_dir_all(&archive_dir).context(|| format!("make the folder {}", archive_dir.display()))?;
        let (port, http_port) = (free_port()?, free_port()?);
        let config = folder.path().join("server.yaml");
        let text = config_text(&archive_dir, port, http_port, &options.extra_config);
        let text = text.replacen("max_events_per_sec: 0", &format!("max_events_per_sec: 0{}", options.extra_server), 1);
        let text = text.replacen("max_bytes: 4GiB", &format!("max_bytes: 4GiB{}", options.extra_archive), 1);
        fs::write(&config, text).context(|| format!("write {}", config.display()))?;
        let log = folder.path().join("server.log");
        let program = Program::new("tapio-server".into(), binary, config, log, http_port);
        Ok(Self { program, archive_dir, port, http_port, _folder: folder })
    }

    /// Where collectors and tools connect.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The port of `/readyz` and `/metrics`.
    pub fn http_port(&self) -> u16 {
        self.http_port
    }

    /// Where the segments are.
    pub fn archive_dir(&self) -> &Path {
        &self.archive_dir
    }

    /// A client of its query service.
    pub fn client(&self) -> Result<Client, Error> {
        Client::connect(&self.address())
    }
}

/// A `server.yaml` for 127.0.0.1.
pub fn config_text(archive_dir: &Path, port: u16, http_port: u16, extra: &str) -> String {
    format!(
        "server: {{address: 127.0.0.1, port: {port}, max_events_per_sec: 0}}\n\
         metrics: {{prometheus_port: {http_port}}}\n\
         archive: {{dir: \"{}\", max_bytes: 4GiB}}\n\
         logging: {{level: warn}}\n\
         {extra}",
        archive_dir.display()
    )
}
