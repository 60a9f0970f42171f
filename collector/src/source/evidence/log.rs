//! The last lines that a dead container wrote, from the file that the runtime keeps of them.
//!
//! In: containers that ended. Out: the newest lines of each, the oldest of them first. What must hold: nothing is read unless it is
//! asked for; bounded in containers, bytes and lines; of the runtime's own marks nothing is left. The format is that of the CRI
//! (<https://github.com/kubernetes/design-proposals-archive/blob/main/node/kubelet-cri-logging.md>), or docker's JSON.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tapio_wire::event::{Entity, EntityId, EntityKind};

use crate::base::clock::realtime_ns;
use crate::intake::identity::directory::Directory;

/// How much of a file is looked at, from its end.
const BYTES_MAX: u64 = 16 << 10;
/// Bytes of a line in an event, at the most.
pub const LINE_BYTES_MAX: usize = 256;
/// The runtime stamps a line when it reads it, which may be after its writer's end.
const LATE_NS: u64 = 1_000_000_000;
/// Where docker keeps what kubelet's folder has links to.
const DOCKER_LOGS: &str = "/var/lib/docker/containers";

/// The last lines are in their file a moment after the death.
const DELAY: Duration = Duration::from_millis(500);
/// Time that a container may have no name yet, and the pause until the next lookup.
pub const NAMED_MAX: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_secs(1);
/// Containers whose log waits to be read.
const WAITING_MAX: usize = 64;

/// What a container wrote last.
pub struct Said {
    pub entity: EntityId,
    pub pid: u32,
    pub lines: Vec<String>,
}

/// A container whose log is to be read.
#[derive(Clone, Copy)]
struct Ended {
    due: Instant,
    /// Time at which the request is given up.
    until: Instant,
    /// Nanoseconds since 1970.
    ended_ns: u64,
    entity: EntityId,
    pid: u32,
}

/// Containers that ended a moment ago, and their logs.
pub struct Logs {
    /// Kubelet's folder of logs.
    folder: PathBuf,
    lines_max: usize,
    directory: Arc<Directory>,
    waiting: VecDeque<Ended>,
}

impl Logs {
    /// Reads `lines_max` lines of each container, below kubelet's folder of logs; `directory` has the containers' names.
    pub fn new(folder: PathBuf, lines_max: usize, directory: Arc<Directory>) -> Self {
        Self { folder, lines_max, directory, waiting: VecDeque::new() }
    }

    /// A container has ended just now. One that finds no place is left out.
    pub fn ended(&mut self, now: Instant, entity: EntityId, pid: u32) {
        if self.waiting.len() < WAITING_MAX {
            let (due, until) = (now + DELAY, now + NAMED_MAX);
            self.waiting.push_back(Ended { due, until, ended_ns: realtime_ns(), entity, pid });
        }
    }

    /// The time until the next log is to be read.
    pub fn pause(&self, now: Instant) -> Option<Duration> {
        self.waiting.front().map(|ended| ended.due.saturating_duration_since(now))
    }

    /// The lines of the next container whose log is due; [`None`] where none has any.
    pub fn next(&mut self, now: Instant) -> Option<Said> {
        while let Some(ended) = self.waiting.pop_front_if(|ended| ended.due <= now) {
            let mut named = Entity::named(EntityKind::Container, ended.entity, "");
            let is_known = self.directory.complete(&mut named, &mut Vec::new());
            if !is_known || named.container.is_empty() {
                // Kubernetes gives the name a moment after the start. A container that ends at once is looked up again.
                if now < ended.until {
                    self.waiting.push_back(Ended { due: now + AGAIN, ..ended });
                }
                continue;
            }
            let Entity { namespace, pod, pod_uid, container, .. } = named;
            let names = Names { namespace, pod, pod_uid, container };
            let lines = last_lines(&self.folder, &names, self.lines_max, ended.ended_ns);
            if !lines.is_empty() {
                return Some(Said { entity: ended.entity, pid: ended.pid, lines });
            }
        }
        None
    }
}

/// Names of a container's log, as kubelet names its folder.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Names {
    namespace: String,
    pod: String,
    pod_uid: String,
    container: String,
}

/// Reads at most `lines_max` lines of a container that ended at `ended_ns`, nanoseconds since 1970. They come from its
/// newest log file below kubelet's folder of logs; none where there is no such file. Later lines belong to the next
/// run.
fn last_lines(folder: &Path, names: &Names, lines_max: usize, ended_ns: u64) -> Vec<String> {
    for path in newest(folder, names) {
        let Some(bytes) = tail(folder, &path) else { continue };
        let lines = lines_of(&String::from_utf8_lossy(&bytes), ended_ns);
        if !lines.is_empty() {
            return lines[lines.len().saturating_sub(lines_max)..].to_vec();
        }
    }
    Vec::new()
}

fn lines_of(text: &str, ended_ns: u64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut is_partial = false;
    for said in text.lines().filter_map(said).filter(|said| said.time_ns <= ended_ns.saturating_add(LATE_NS)) {
        match lines.last_mut() {
            // The runtime breaks long lines.
            Some(last) if is_partial => last.push_str(&said.text),
            _ => lines.push(said.text.into_owned()),
        }
        is_partial = said.is_partial;
    }
    lines.retain(|line| !line.trim().is_empty());
    lines
}

/// The newest two of `<folder>/<namespace>_<pod>_<uid>/<container>/<restart>.log`, the newest first.
fn newest(folder: &Path, names: &Names) -> Vec<PathBuf> {
    let Names { namespace, pod, pod_uid, container } = names;
    // What Kubernetes names has no separator in it; what is not from there is not looked for.
    let is_plain = |part: &&String| !part.is_empty() && !part.contains('/') && *part != "..";
    if ![namespace, pod, pod_uid, container].iter().all(is_plain) {
        return Vec::new();
    }
    let folder = folder.join(format!("{namespace}_{pod}_{pod_uid}")).join(container);
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let number = |path: &PathBuf| path.file_name()?.to_str()?.strip_suffix(".log")?.parse::<u64>().ok();
    let files = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<(u64, PathBuf)> = files.filter_map(|path| Some((number(&path)?, path))).collect();
    files.sort_unstable_by(|a, b| b.cmp(a));
    files.into_iter().take(2).map(|(_, path)| path).collect()
}

/// The end of a file, from the first whole line on; [`None`] of what is no file of kubelet's or docker's.
fn tail(folder: &Path, path: &Path) -> Option<Vec<u8>> {
    // Docker's logs are links; a link to any other place is refused.
    let path = path.canonicalize().ok()?;
    let folder = folder.canonicalize().ok()?;
    if !path.starts_with(folder) && !path.starts_with(DOCKER_LOGS) {
        return None;
    }
    // What is no file must not keep this waiting.
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
    let length = file.metadata().ok().filter(std::fs::Metadata::is_file)?.len();
    let from = length.saturating_sub(BYTES_MAX);
    let mut bytes = vec![0; (length - from) as usize];
    file.read_exact_at(&mut bytes, from).ok()?;
    if from > 0 {
        let line = bytes.iter().position(|byte| *byte == b'\n')?;
        bytes.drain(..=line);
    }
    Some(bytes)
}

struct Line<'a> {
    /// Nanoseconds since 1970, 0 where it says none.
    time_ns: u64,
    text: std::borrow::Cow<'a, str>,
    is_partial: bool,
}

/// What the container said in a line of the file: after the time, the stream and a mark whether the line goes on.
fn said(line: &str) -> Option<Line<'_>> {
    if line.starts_with('{') {
        let value: serde_json::Value = serde_json::from_str(line).ok()?;
        let text = value.get("log")?.as_str()?.to_owned();
        let is_partial = !text.ends_with('\n');
        let time_ns = time_ns(value.get("time").and_then(serde_json::Value::as_str).unwrap_or_default());
        return Some(Line { time_ns, text: text.trim_end_matches('\n').to_owned().into(), is_partial });
    }
    let mut parts = line.splitn(4, ' ');
    let (time, stream, mark) = (parts.next()?, parts.next()?, parts.next()?);
    if !matches!(stream, "stdout" | "stderr") {
        return None;
    }
    let text = parts.next().unwrap_or_default().into();
    Some(Line { time_ns: time_ns(time), text, is_partial: mark.starts_with('P') })
}

fn time_ns(text: &str) -> u64 {
    let time: Option<k8s_openapi::jiff::Timestamp> = text.parse().ok();
    time.and_then(|time| u64::try_from(time.as_nanosecond()).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Later than every line here.
    const NOW: u64 = u64::MAX / 2;

    fn names() -> Names {
        let [namespace, pod, pod_uid, container] = ["shop", "web-1", "u1", "web"].map(str::to_owned);
        Names { namespace, pod, pod_uid, container }
    }

    fn written(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        let folder = root.path().join("shop_web-1_u1/web");
        std::fs::create_dir_all(&folder).expect("made");
        for (name, text) in files {
            std::fs::write(folder.join(name), text).expect("written");
        }
        root
    }

    #[test]
    fn the_newest_file_is_read_and_broken_lines_are_joined() {
        let cri = "2026-01-02T03:04:05.6Z stdout F starting\n2026-01-02T03:04:05.7Z stderr P panic: \n\
                   2026-01-02T03:04:05.7Z stderr F out of memory\n2026-01-02T03:04:05.8Z stderr F \n";
        let root = written(&[("2.log", "2026-01-02T03:04:05Z stdout F old\n"), ("10.log", cri), ("x.log", "no")]);
        assert_eq!(last_lines(root.path(), &names(), 9, NOW), ["starting", "panic: out of memory"]);
        assert_eq!(last_lines(root.path(), &names(), 1, NOW), ["panic: out of memory"]);
        let before = time_ns("2026-01-02T03:04:05Z") - 2 * LATE_NS;
        assert!(last_lines(root.path(), &names(), 9, before).is_empty(), "all of it came later");
        assert_eq!(
            last_lines(root.path(), &names(), 9, before + LATE_NS),
            ["old"],
            "the newest file is the next run's"
        );
        let docker = "{\"log\":\"a\\n\",\"stream\":\"stdout\"}\n{\"log\":\"b\",\"stream\":\"stdout\"}\nnonsense\n";
        assert_eq!(last_lines(written(&[("0.log", docker)]).path(), &names(), 9, NOW), ["a", "b"]);
    }

    #[test]
    fn it_is_bounded_and_never_looks_elsewhere() {
        let long = format!("2026-01-02T03:04:05Z stdout F {}\n", "é".repeat(1_000)).repeat(50);
        let lines = last_lines(written(&[("0.log", &long)]).path(), &names(), 20, NOW);
        assert!((1..20).contains(&lines.len()), "{}", lines.len());
        let line = "2026-01-02T03:04:05Z stdout F secret\n";
        let root = written(&[]);
        assert!(last_lines(root.path(), &names(), 9, NOW).is_empty());
        let other = root.path().join("other_pod_u2/web");
        std::fs::create_dir_all(&other).expect("made");
        std::fs::write(other.join("0.log"), line).expect("written");
        let elsewhere = Names { container: "../../other_pod_u2/web".into(), ..names() };
        assert!(last_lines(root.path(), &elsewhere, 9, NOW).is_empty());
        // A link out of the folder, and a pipe that nobody writes to.
        let outside = tempfile::tempdir().expect("a folder");
        std::fs::write(outside.path().join("x"), line).expect("written");
        let own = root.path().join("shop_web-1_u1/web");
        std::os::unix::fs::symlink(outside.path().join("x"), own.join("1.log")).expect("linked");
        rustix::fs::mknodat(rustix::fs::CWD, own.join("2.log"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .expect("made");
        assert!(last_lines(root.path(), &names(), 9, NOW).is_empty());
    }
}
