//! A real `nats-server` with JetStream on 127.0.0.1, for servers that share a log.
//!
//! In: nothing but the program itself. Out: its address, and what went through it. What must hold: its streams are in a temporary
//! folder, so nothing of a run is left, and no other NATS of this machine is touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use super::usage::{self, Usage};
use super::{END_LIMIT, Process, READY_LIMIT, free_port, http};
use crate::clock::wait_for;
use crate::error::{Context, Error};

const PROGRAM: &str = "nats-server";
/// Where packages put it, though not every PATH leads there.
const FOLDERS: [&str; 2] = ["/usr/sbin", "/usr/local/bin"];

/// A NATS that ends when this is dropped.
pub struct Nats {
    // Before the folder: the process ends before its files go.
    process: Process,
    port: u16,
    http_port: u16,
    _folder: TempDir,
}

/// What went through NATS since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// The number of the last message in the servers' log; 0 while there is no log.
    pub last_seq: u64,
    /// Bytes of messages from all servers, and to them.
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl Nats {
    /// The program.
    ///
    /// # Errors
    /// [`Error::NatsMissing`] where it is not installed.
    pub fn program() -> Result<PathBuf, Error> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::env::split_paths(&path).chain(FOLDERS.map(PathBuf::from));
        find(folders).ok_or(Error::NatsMissing)
    }

    /// Starts one and waits until it is ready.
    pub fn start() -> Result<Self, Error> {
        let program = Self::program()?;
        let folder = tempfile::Builder::new()
            .prefix("tapio-perf-nats-")
            .tempdir()
            .context(|| "make a temporary folder".into())?;
        let (port, http_port) = (free_port()?, free_port()?);
        let config = folder.path().join("nats.conf");
        fs::write(&config, config_text(folder.path(), port, http_port))
            .context(|| format!("write {}", config.display()))?;
        let mut command = Command::new(program);
        command.arg("-c").arg(&config);
        let mut process = Process::spawn(PROGRAM, command, folder.path().join("nats.log"))?;
        wait_for("readiness of nats-server", READY_LIMIT, |seen| {
            process.check_running()?;
            match http::get(http_port, "/healthz") {
                Ok((200, _)) => return Ok(Some(())),
                Ok((status, body)) => *seen = format!("{status} {}", body.trim()),
                Err(error) => *seen = error.to_string(),
            }
            Ok(None)
        })?;
        Ok(Self { process, port, http_port, _folder: folder })
    }

    /// URL for `cluster.url`.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// What it has used so far.
    pub fn usage(&self) -> Option<Usage> {
        usage::read(self.process.pid())
    }

    /// An error when it does not run any more.
    pub fn check_running(&mut self) -> Result<(), Error> {
        self.process.check_running()
    }

    /// SIGTERM; waits for the end.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.process.terminate(END_LIMIT).map(drop)
    }

    /// What went through it; the log is that of the cluster `cluster`.
    pub fn traffic(&self, cluster: &str) -> Result<Traffic, Error> {
        let last_seq = last_seq(&self.ask("/jsz?streams=true")?, &format!("TAPIO_{cluster}_LOG"));
        let all = self.ask("/varz")?;
        let number = |key: &str| all[key].as_u64().unwrap_or(0);
        Ok(Traffic { last_seq, bytes_in: number("in_bytes"), bytes_out: number("out_bytes") })
    }

    /// The number of the last message in the log.
    pub fn last_seq(&self, cluster: &str) -> Result<u64, Error> {
        Ok(last_seq(&self.ask("/jsz?streams=true")?, &format!("TAPIO_{cluster}_LOG")))
    }

    fn ask(&self, path: &str) -> Result<Value, Error> {
        let wrong = |message: String| Error::Http { port: self.http_port, path: path.into(), message };
        let (status, body) = http::get(self.http_port, path)?;
        if status != 200 {
            return Err(wrong(format!("status {status}: {}", body.trim())));
        }
        serde_json::from_str(&body).map_err(|error| wrong(error.to_string()))
    }
}

fn find(mut folders: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    folders.find_map(|folder| Some(folder.join(PROGRAM)).filter(|program| program.is_file()))
}

fn config_text(folder: &Path, port: u16, http_port: u16) -> String {
    format!(
        "listen: 127.0.0.1:{port}\nhttp: 127.0.0.1:{http_port}\njetstream {{ store_dir: \"{}\" }}\n",
        folder.join("store").display()
    )
}

/// The number of a stream's last message, out of the answer of `/jsz`.
fn last_seq(answer: &Value, stream: &str) -> u64 {
    let list = |value: &Value, key: &str| value[key].as_array().cloned().unwrap_or_default();
    let accounts = list(answer, "account_details");
    let streams = accounts.iter().flat_map(|account| list(account, "stream_detail"));
    let found = streams.into_iter().find(|detail| detail["name"] == stream);
    found.and_then(|detail| detail["state"]["last_seq"].as_u64()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{find, last_seq};
    use crate::error::Error;

    #[test]
    fn a_missing_nats_server_says_how_to_get_it() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(find([folder.path().to_owned()].into_iter()), None);
        let text = Error::NatsMissing.to_string();
        for word in ["nats-server", "deploy/local/install.sh nats", "--without-log"] {
            assert!(text.contains(word), "{word}: {text}");
        }
        std::fs::write(folder.path().join("nats-server"), "").expect("written");
        assert_eq!(find([folder.path().to_owned()].into_iter()), Some(folder.path().join("nats-server")));
    }

    #[test]
    fn the_logs_end_is_read_from_its_own_stream() {
        let answer = serde_json::json!({"account_details": [{"stream_detail": [
            {"name": "TAPIO_a_FACTS", "state": {"last_seq": 3}},
            {"name": "TAPIO_a_LOG", "state": {"last_seq": 41, "messages": 7}}
        ]}]});
        assert_eq!(last_seq(&answer, "TAPIO_a_LOG"), 41);
        assert_eq!(last_seq(&answer, "TAPIO_b_LOG"), 0);
        assert_eq!(last_seq(&serde_json::json!({}), "TAPIO_a_LOG"), 0);
    }
}
