//! The mounts that a process sees, from its `mountinfo` (proc_pid_mountinfo(5)).
//!
//! What must hold: a line that is not understood is left out and hides no other; mount points are as `open` takes them, without
//! the kernel's escapes.

use std::borrow::Cow;
use std::io;
use std::path::Path;

/// The mounts of the calling process's namespace.
pub const OF_THIS_PROCESS: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    /// The part of the file system that is mounted: `/` for all of it.
    pub root: &'a str,
    /// Where the process sees it.
    pub point: Cow<'a, str>,
    /// Options of the mount, like `rw,nosuid`.
    pub options: &'a str,
    /// The file system's type.
    pub kind: &'a str,
    /// Options of the file system: for cgroup version 1 its controllers.
    pub super_options: &'a str,
}

impl Mount<'_> {
    /// Whether it is a version 1 hierarchy that has this controller.
    pub fn has_controller(&self, name: &str) -> bool {
        self.kind == "cgroup" && self.super_options.split(',').any(|option| option == name)
    }

    /// Whether nothing can be written through it.
    pub fn is_read_only(&self) -> bool {
        self.options.split(',').any(|option| option == "ro")
    }
}

/// The text of a `mountinfo`, for [`parse`].
///
/// # Errors
/// That of reading the file.
pub fn read(path: impl AsRef<Path>) -> io::Result<String> {
    // A mount point is any bytes: one that is not UTF-8 must not hide the others.
    Ok(String::from_utf8_lossy(&std::fs::read(path)?).into_owned())
}

/// The mounts of a text, in its order: a later one may hide an earlier one.
pub fn parse(text: &str) -> impl Iterator<Item = Mount<'_>> {
    text.lines().filter_map(|line| {
        // id, parent, device, root, point, options and tags before the dash; type, source and options after it.
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (root, point, options) = (before.next()?, before.next()?, before.next()?);
        let mut after = after.split(' ');
        let kind = after.next()?;
        Some(Mount { root, point: unescaped(point), options, kind, super_options: after.nth(1).unwrap_or_default() })
    })
}

/// The kernel writes space, tab, line feed, `#` and backslash as three octal digits.
fn unescaped(text: &str) -> Cow<'_, str> {
    if !text.contains('\\') {
        return text.into();
    }
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let octal = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) if byte.is_ascii() => {
                plain.push(byte as char);
                plain.push_str(&part[3..]);
            }
            _ => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_with_or_without_tags() {
        let text = "\
30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
not a mount
cgroup2 - 
 - cgroup2 x
31 30 0:27 / /sys/fs/cgroup/unified ro,nosuid shared:9 master:1 - cgroup2 cgroup2 rw
32 30 0:28 /a /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory";
        let mounts: Vec<Mount<'_>> = parse(text).collect();
        let points: Vec<(&str, &str)> = mounts.iter().map(|mount| (mount.kind, &*mount.point)).collect();
        assert_eq!(
            points,
            [("tmpfs", "/sys/fs/cgroup"), ("cgroup2", "/sys/fs/cgroup/unified"), ("cgroup", "/sys/fs/cgroup/memory")]
        );
        assert_eq!(mounts.iter().map(Mount::is_read_only).collect::<Vec<_>>(), [false, true, false]);
        assert!(mounts[2].has_controller("memory") && !mounts[2].has_controller("cpu") && mounts[2].root == "/a");
    }

    #[test]
    fn a_mount_point_is_without_the_kernels_escapes() {
        for (written, point) in [
            ("/mnt/a\\040b", "/mnt/a b"),
            ("/a\\011\\012\\134\\043", "/a\t\n\\#"),
            ("/a\\", "/a\\"),
            ("/a\\09", "/a\\09"),
            ("/ü\\040ü", "/ü ü"),
        ] {
            let line = format!("33 30 0:27 / {written} rw - ext4 none rw");
            assert_eq!(parse(&line).next().expect("a mount").point, point);
        }
    }

    #[test]
    fn this_machine_has_a_root() {
        let text = read(OF_THIS_PROCESS).expect("procfs");
        assert!(parse(&text).any(|mount| mount.point == "/"));
    }
}
