//! Who sent a signal, read from procfs.
//!
//! In: a process id and its start. Out: its program and its user. What must hold: another process of the same id is not taken for it;
//! arguments, which may be secrets, are left out unless they are asked for, and cut.

use std::fs::File;
use std::io::Read;

use super::read::text;

/// Bytes of a command line in an event, at the most.
const COMMAND_BYTES_MAX: usize = 256;
/// How much of a command line is looked at.
const COMMAND_READ_MAX: u64 = 4096;

/// Who sent a signal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sender {
    pub pid: u32,
    pub comm: String,
    /// Program, and the number of its arguments.
    pub command: String,
    /// The command line as the process has it, secrets included; empty unless it was asked for.
    pub command_line: Vec<u8>,
    pub uid: u32,
}

impl Sender {
    /// The command line as the event has it. Arguments are in it only where the configuration asks for them, and `redact` has gone over
    /// them.
    pub fn shown_command(&self, redact: impl FnOnce(&[u8]) -> String) -> String {
        if self.command_line.is_empty() {
            return self.command.clone();
        }
        let mut line = redact(&self.command_line);
        cut(&mut line, COMMAND_BYTES_MAX);
        line
    }
}

/// Reads a process; [`None`] when it is gone, or its id is another process's by now.
pub fn process(pid: u32, start_time_ns: u64, with_arguments: bool) -> Option<Sender> {
    let folder = crate::base::host::process(pid)?;
    if !crate::intake::identity::scan::is_same_start(
        start_time_ns,
        crate::intake::identity::scan::Stat::of(&folder)?.start_time_ns,
    ) {
        return None;
    }
    let status = text(&folder.join("status"))?;
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let uid = value("Uid:").and_then(|ids| ids.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    let comm = value("Name:").unwrap_or_default().to_owned();
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(folder.join("cmdline")) {
        // What was read before an error is used.
        let _ = file.take(COMMAND_READ_MAX).read_to_end(&mut bytes);
    }
    let command = command(&bytes);
    let command_line = if with_arguments { bytes } else { Vec::new() };
    Some(Sender { pid, comm, command, command_line, uid })
}

/// A command line, NUL terminated parts, for people, without its arguments.
fn command(bytes: &[u8]) -> String {
    let is_cut = bytes.len() as u64 >= COMMAND_READ_MAX;
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    let mut parts = bytes.split(|byte| *byte == 0);
    let mut command = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let arguments = parts.count();
    // Some programs write everything into the first part; a secret may follow the first blank.
    if let Some(blank) = command.find(' ') {
        command.truncate(blank);
    }
    cut(&mut command, COMMAND_BYTES_MAX - 32);
    if arguments > 0 {
        let more = if is_cut { " or more" } else { "" };
        let noun = if arguments == 1 && !is_cut { "argument" } else { "arguments" };
        command.push_str(&format!(" ({arguments}{more} {noun})"));
    }
    command
}

fn cut(text: &mut String, bytes: usize) {
    if text.len() > bytes {
        text.truncate(text.floor_char_boundary(bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_redacted_and_only_there_when_asked_for() {
        let line = b"/usr/bin/mysql\0--password=secret\0-h\0db\0";
        assert_eq!(command(line), "/usr/bin/mysql (3 arguments)");
        assert_eq!(command(b"sleep\0" as &[u8]), "sleep");
        assert_eq!(command(b"sleep\x005\0"), "sleep (1 argument)");
        assert_eq!(command(b"nginx: worker secret\0"), "nginx:");
        assert_eq!(command(b""), "");
        assert!(command(&[b"a\0".repeat(2000), vec![b'b'; 200]].concat()).contains("or more"));
        let redactor = crate::intake::redact::Redactor::default();
        let shown = |command_line: &[u8]| {
            let (comm, command) = (String::new(), command(command_line));
            let sender = Sender { pid: 1, comm, command, command_line: command_line.into(), uid: 0 };
            sender.shown_command(|arguments| redactor.line(arguments))
        };
        assert_eq!(shown(line), "/usr/bin/mysql --password=[redacted] -h db");
        assert!(shown(&[b'a'; 5000]).len() <= COMMAND_BYTES_MAX);
    }
}
