//! Completion of arguments in a shell, with the names that the server knows.
//!
//! What enters: the command line so far, by way of the shell's function. What leaves: ids of findings, and what `why` may be asked
//! about: pods, workloads and nodes of findings. What must hold: whoever types waits no longer than [`PATIENCE`]. A server that
//! does not answer leads to no completion and to no error. Workloads choose names, so one with a character that a shell could act on is
//! left out.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches};
use clap_complete::Shell;
use clap_complete::engine::CompletionCandidate;
use clap_complete::env::{CompleteEnv, Shells};
use tapio_server::render;
use tapio_wire::service::{Finding, ListFindingsRequest};

use super::Arguments;
use super::server::{ServerAt, connect};

/// How long a completion may take.
const PATIENCE: Duration = Duration::from_secs(1);
/// Findings whose names are offered, the newest.
const FINDINGS_MAX: u32 = 500;
/// The variable by which a shell's function asks for completions.
const ASKED_BY: &str = "TAPIOCTL_COMPLETE";
const NAME: &str = "tapioctl";

/// Answers a shell's function, and ends then. Returns where this is a command.
pub fn answer() {
    CompleteEnv::with_factory(Arguments::command).var(ASKED_BY).complete();
}

/// The script that makes a shell ask this program.
///
/// # Errors
/// Where the shell has no such script.
pub fn script(shell: Shell) -> io::Result<String> {
    let shell = shell.to_string();
    let shells = Shells::builtins();
    let unknown = || io::Error::new(io::ErrorKind::Unsupported, format!("{shell} cannot complete"));
    let known = shells.completer(&shell).ok_or_else(unknown)?;
    let mut script = Vec::new();
    known.write_registration(ASKED_BY, NAME, NAME, NAME, &mut script)?;
    String::from_utf8(script).map_err(io::Error::other)
}

/// The ids of findings that begin with `current`.
pub fn ids(current: &OsStr) -> Vec<CompletionCandidate> {
    let named = findings().into_iter().map(|finding| (finding.id, finding.title)).collect();
    offered(current, named)
}

/// What `why` may be asked about and begins with `current`.
pub fn subjects(current: &OsStr) -> Vec<CompletionCandidate> {
    let mut named = BTreeMap::new();
    // The oldest first, so that the newest finding of a name explains it.
    for finding in findings().into_iter().rev() {
        let of_evidence = finding.evidence.iter().filter_map(|piece| piece.entity.as_ref());
        for entity in of_evidence.chain(&finding.entity) {
            let namespace = &entity.namespace;
            if !entity.pod.is_empty() {
                named.insert(format!("pod/{namespace}/{}", entity.pod), finding.title.clone());
            }
            if let Some((kind, name)) = entity.workload.split_once('/') {
                named.insert(format!("{}/{namespace}/{name}", kind.to_lowercase()), finding.title.clone());
            }
            if !entity.node.is_empty() {
                named.insert(format!("node/{}", entity.node), finding.title.clone());
            }
        }
    }
    offered(current, named)
}

fn offered(current: &OsStr, named: BTreeMap<String, String>) -> Vec<CompletionCandidate> {
    let is_plain = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "/.-_".contains(c));
    let begun = current.to_string_lossy();
    let wanted = named.into_iter().filter(|(name, _)| name.starts_with(&*begun) && is_plain(name));
    wanted.map(|(name, title)| CompletionCandidate::new(name).help(Some(render::clean(&title).into()))).collect()
}

/// The server's newest findings; none where it does not answer.
fn findings() -> Vec<Finding> {
    // A line that is being typed is rarely whole.
    let matches = Arguments::command().ignore_errors(true).try_get_matches_from(words());
    let server = matches.and_then(|matches| ServerAt::from_arg_matches(&matches));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let (Ok(server), Ok(runtime)) = (server, runtime) else { return Vec::new() };
    let asked = async {
        let request = ListFindingsRequest { limit: FINDINGS_MAX, ..ListFindingsRequest::default() };
        connect(&server, true).await.ok()?.list_findings(request).await.ok()
    };
    let answered = runtime.block_on(async { tokio::time::timeout(PATIENCE, asked).await });
    runtime.shutdown_background();
    answered.ok().flatten().map(|listed| listed.into_inner().findings).unwrap_or_default()
}

/// The words of the command line that is typed: a shell's function puts them behind `--`.
fn words() -> impl Iterator<Item = OsString> {
    std::env::args_os().skip_while(|word| word != "--").skip(1)
}
