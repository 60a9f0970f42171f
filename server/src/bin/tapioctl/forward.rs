//! `kubectl tapio`: a connection to the server's Service through the API server, by `kubectl port-forward`.
//!
//! kubectl runs a program called `kubectl-tapio` as its own command `tapio`: `tapioctl` does under that name what it always does, and
//! reaches the server by itself. In: kubectl's own choice of a cluster. Out: an address on loopback, as long as the value lives.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use tapio_server::render;
use tapio_wire::complain;

use super::server::Failure;

/// How long kubectl may take to reach the cluster.
const START_LIMIT: Duration = Duration::from_secs(20);
const LAST_WORDS: Duration = Duration::from_secs(1);
const SERVICE: &str = "service/tapio-server";
const PORT: u16 = 9090;

/// How to reach a server in a cluster
#[derive(Default, clap::Args)]
pub struct ForwardArguments {
    /// Reach the server by kubectl port-forward; `kubectl tapio` does so unless --server is given
    #[arg(long, global = true)]
    port_forward: bool,
    /// With --port-forward: the context in the kubeconfig
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
    /// With --port-forward: the kubeconfig; default: as kubectl finds it
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Option<String>,
    /// With --port-forward: the namespace of Tapio itself
    #[arg(long, global = true, value_name = "NAME", env = "TAPIO_NAMESPACE", default_value = "tapio-system")]
    tapio_namespace: String,
}

impl ForwardArguments {
    /// Whether a connection is wanted; `program` is the name that this program was started by.
    pub fn is_wanted(&self, program: &str, names_server: bool) -> bool {
        self.port_forward || is_plugin(program) && !names_server
    }
}

/// Whether kubectl runs this program as a command of its own.
fn is_plugin(program: &str) -> bool {
    let name = Path::new(program).file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    matches!(name, "kubectl-tapio" | "kubectl_tapio")
}

/// A running `kubectl port-forward`; it ends with this value.
pub struct Forward {
    child: Child,
    /// HOST:PORT on this machine.
    pub address: String,
}

impl Drop for Forward {
    fn drop(&mut self) {
        // It has nothing to tidy up, and may have ended with the terminal's interrupt.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Forward {
    /// Starts kubectl and waits until it listens.
    ///
    /// # Errors
    /// [`Failure::Unreachable`] with what kubectl says.
    pub fn start(arguments: &ForwardArguments) -> Result<Self, Failure> {
        let mut command = Command::new("kubectl");
        for (option, value) in [("--context", &arguments.context), ("--kubeconfig", &arguments.kubeconfig)] {
            if let Some(value) = value {
                command.args([option, value]);
            }
        }
        command.args(["--namespace", &arguments.tapio_namespace, "port-forward", "--address", "127.0.0.1", SERVICE]);
        command.arg(format!(":{PORT}")).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let missing = |error| Failure::Unreachable(format!("the cluster: cannot run kubectl: {error}"));
        let mut forward = Self { child: command.spawn().map_err(missing)?, address: String::new() };
        // Both are read on: kubectl writes a line for each connection, and may ask a person to log in.
        let (last_words, end) = channel::<()>();
        on_lines(forward.child.stderr.take(), move |line| {
            let _ends_with_the_stream = &last_words;
            complain!("kubectl: {}", render::clean(&line));
        });
        let (first, heard) = channel();
        // Only the first line is waited for.
        on_lines(forward.child.stdout.take(), move |line| drop(first.send(line)));
        let why = match heard.recv_timeout(START_LIMIT) {
            Ok(line) => match address(&line) {
                Some(address) => {
                    forward.address = address;
                    return Ok(forward);
                }
                None => line,
            },
            Err(RecvTimeoutError::Timeout) => format!("kubectl did not connect within {} s", START_LIMIT.as_secs()),
            Err(RecvTimeoutError::Disconnected) => {
                // It says why before this does.
                let _ = end.recv_timeout(LAST_WORDS);
                "kubectl port-forward has ended".into()
            }
        };
        Err(Failure::Unreachable(format!("{SERVICE} in namespace {}: {why}", arguments.tapio_namespace)))
    }

    /// Whether kubectl still listens.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

/// Calls `take` with each line until the stream ends, on a thread of its own.
fn on_lines(stream: Option<impl Read + Send + 'static>, mut take: impl FnMut(String) + Send + 'static) {
    let Some(stream) = stream else { return };
    std::thread::spawn(move || BufReader::new(stream).lines().map_while(Result::ok).for_each(&mut take));
}

/// The address in `Forwarding from 127.0.0.1:40771 -> 9090`.
fn address(line: &str) -> Option<String> {
    let address = line.strip_prefix("Forwarding from ")?.split(" -> ").next()?;
    address.parse::<std::net::SocketAddr>().ok().map(|address| address.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectls_first_line_names_the_address() {
        assert_eq!(address("Forwarding from 127.0.0.1:40771 -> 9090").as_deref(), Some("127.0.0.1:40771"));
        for line in ["", "error: x", "Forwarding from nowhere -> 9090"] {
            assert_eq!(address(line), None, "{line}");
        }
    }

    #[test]
    fn only_kubectls_command_forwards_by_itself() {
        let arguments = ForwardArguments::default();
        assert!(arguments.is_wanted("/usr/local/bin/kubectl-tapio", false));
        assert!(!arguments.is_wanted("kubectl-tapio", true), "a server is named");
        assert!(!arguments.is_wanted("/usr/bin/tapioctl", false));
        assert!(ForwardArguments { port_forward: true, ..ForwardArguments::default() }.is_wanted("tapioctl", false));
    }
}
