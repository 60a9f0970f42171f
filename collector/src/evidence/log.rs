//! The last lines that a dead container wrote, from the file that the runtime keeps of them.
//!
//! In: the container's names. Out: the newest lines, the oldest of them first. What must hold: nothing is read unless it is asked for;
//! bounded in bytes and lines; of the runtime's own marks nothing is left. The format is that of the CRI
//! (<https://github.com/kubernetes/design-proposals-archive/blob/main/node/kubelet-cri-logging.md>), or docker's JSON.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// How much of a file is looked at, from its end.
const BYTES_MAX: u64 = 16 << 10;
/// How much of a line is told.
const LINE_BYTES_MAX: usize = 256;

/// Whose log it is, as kubelet names its folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    pub namespace: String,
    pub pod: String,
    pub pod_uid: String,
    pub container: String,
}

/// At most `lines_max` lines of a container's newest log file, below kubelet's folder of logs; none where there is no such file.
pub fn last_lines(folder: &Path, names: &Names, lines_max: usize) -> Vec<String> {
    let Some(path) = newest(folder, names) else { return Vec::new() };
    let Some(bytes) = tail(&path) else { return Vec::new() };
    let text = String::from_utf8_lossy(&bytes);
    let mut lines: Vec<String> = Vec::new();
    let mut is_partial = false;
    for line in text.lines() {
        let Some(said) = said(line) else { continue };
        match lines.last_mut() {
            // The runtime breaks long lines.
            Some(last) if is_partial => last.push_str(&said.text),
            _ => lines.push(said.text.into_owned()),
        }
        is_partial = said.is_partial;
    }
    lines.retain(|line| !line.trim().is_empty());
    lines.drain(..lines.len().saturating_sub(lines_max));
    for line in &mut lines {
        line.truncate(line.floor_char_boundary(LINE_BYTES_MAX));
    }
    lines
}

/// `<folder>/<namespace>_<pod>_<uid>/<container>/<restart>.log`, that of the last start.
fn newest(folder: &Path, names: &Names) -> Option<PathBuf> {
    let Names { namespace, pod, pod_uid, container } = names;
    // What Kubernetes names has no separator in it; what is not from there is not looked for.
    let is_plain = |part: &&String| !part.is_empty() && !part.contains('/') && *part != "..";
    if ![namespace, pod, pod_uid, container].iter().all(is_plain) {
        return None;
    }
    let folder = folder.join(format!("{namespace}_{pod}_{pod_uid}")).join(container);
    let number = |path: &PathBuf| path.file_name()?.to_str()?.strip_suffix(".log")?.parse::<u64>().ok();
    let files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    files.filter_map(|path| Some((number(&path)?, path))).max_by_key(|(number, _)| *number).map(|(_, path)| path)
}

/// The end of a file, from the first whole line on.
fn tail(path: &Path) -> Option<Vec<u8>> {
    let file = File::open(path).ok()?;
    let length = file.metadata().ok().filter(|metadata| metadata.is_file())?.len();
    let from = length.saturating_sub(BYTES_MAX);
    let mut bytes = vec![0; (length - from) as usize];
    file.read_exact_at(&mut bytes, from).ok()?;
    if from > 0 {
        let line = bytes.iter().position(|byte| *byte == b'\n')?;
        bytes.drain(..=line);
    }
    Some(bytes)
}

struct Said<'a> {
    text: std::borrow::Cow<'a, str>,
    is_partial: bool,
}

/// What the container said in a line of the file: after the time, the stream and a mark whether the line goes on.
fn said(line: &str) -> Option<Said<'_>> {
    if line.starts_with('{') {
        let value: serde_json::Value = serde_json::from_str(line).ok()?;
        let text = value.get("log")?.as_str()?.to_owned();
        let is_partial = !text.ends_with('\n');
        return Some(Said { text: text.trim_end_matches('\n').to_owned().into(), is_partial });
    }
    let mut parts = line.splitn(4, ' ').skip(1);
    let (stream, mark) = (parts.next()?, parts.next()?);
    if !matches!(stream, "stdout" | "stderr") {
        return None;
    }
    Some(Said { text: parts.next().unwrap_or_default().into(), is_partial: mark.starts_with('P') })
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn the_newest_file_is_read_in_either_format_and_what_the_runtime_broke_is_joined() {
        let cri = "2026-01-02T03:04:05.6Z stdout F starting\n2026-01-02T03:04:05.7Z stderr P panic: \n\
                   2026-01-02T03:04:05.7Z stderr F out of memory\n2026-01-02T03:04:05.8Z stderr F \n";
        let root = written(&[("2.log", "2026-01-02T03:04:05Z stdout F old\n"), ("10.log", cri), ("x.log", "no")]);
        assert_eq!(last_lines(root.path(), &names(), 9), ["starting", "panic: out of memory"]);
        assert_eq!(last_lines(root.path(), &names(), 1), ["panic: out of memory"]);
        let docker = "{\"log\":\"a\\n\",\"stream\":\"stdout\"}\n{\"log\":\"b\",\"stream\":\"stdout\"}\nnonsense\n";
        assert_eq!(last_lines(written(&[("0.log", docker)]).path(), &names(), 9), ["a", "b"]);
    }

    #[test]
    fn it_is_bounded_and_never_looks_elsewhere() {
        let long = format!("2026-01-02T03:04:05Z stdout F {}\n", "é".repeat(1_000)).repeat(50);
        let lines = last_lines(written(&[("0.log", &long)]).path(), &names(), 20);
        assert!(lines.len() < 20 && lines.iter().all(|line| line.len() <= LINE_BYTES_MAX), "{lines:?}");
        let root = written(&[]);
        assert!(last_lines(root.path(), &names(), 9).is_empty());
        let elsewhere = Names { container: "../../etc".into(), ..names() };
        assert!(last_lines(root.path(), &elsewhere, 9).is_empty());
    }
}
