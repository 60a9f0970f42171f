//! Names: of units, of their objects on the bus, of their cgroups; and which of them the configuration leaves out.

use std::path::PathBuf;

use tapio_wire::program::glob;

use crate::settings::config::SystemdSection;

/// The parent of every unit's object.
pub const UNITS_PATH: &str = "/org/freedesktop/systemd1/unit";

/// Units of systemd itself and of every system: what `exclude_system` leaves out. Pods' scopes are none of these.
const SYSTEM_UNITS: [&str; 13] = [
    "systemd-*",
    "dbus.service",
    "dbus.socket",
    "dbus-broker.service",
    "init.scope",
    "session-*.scope",
    "user@*.service",
    "user-runtime-dir@*.service",
    "getty@*.service",
    "serial-getty@*.service",
    "console-getty.service",
    "polkit.service",
    "*.device",
];

/// The unit that an object stands for: the last part of its path, in which `_xx` is the byte with that number.
pub fn unit_of_path(path: &str) -> Option<String> {
    let label = path.strip_prefix(UNITS_PATH)?.strip_prefix('/')?;
    let mut bytes = label.bytes();
    let mut name = Vec::with_capacity(label.len());
    while let Some(byte) = bytes.next() {
        if byte == b'_' {
            let digits = [bytes.next()?, bytes.next()?];
            name.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            name.push(byte);
        }
    }
    String::from_utf8(name).ok().filter(|name| !name.is_empty())
}

/// The path of a unit's object. systemd escapes a digit at the start too.
pub fn path_of_unit(name: &str) -> String {
    let mut path = format!("{UNITS_PATH}/");
    for (index, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (byte.is_ascii_digit() && index > 0) {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("_{byte:02x}"));
        }
    }
    path
}

/// The interface with a unit's own properties: `org.freedesktop.systemd1.Service` for a service.
pub fn interface_of_unit(name: &str) -> Option<&'static str> {
    let (_, kind) = name.rsplit_once('.')?;
    Some(match kind {
        "service" => "org.freedesktop.systemd1.Service",
        "scope" => "org.freedesktop.systemd1.Scope",
        "socket" => "org.freedesktop.systemd1.Socket",
        "mount" => "org.freedesktop.systemd1.Mount",
        "swap" => "org.freedesktop.systemd1.Swap",
        "timer" => "org.freedesktop.systemd1.Timer",
        "path" => "org.freedesktop.systemd1.Path",
        "automount" => "org.freedesktop.systemd1.Automount",
        _ => return None,
    })
}

/// Where a slice is: `a-b.slice` in `/a.slice/a-b.slice`; the root slice is the root.
fn slice_path(slice: &str) -> String {
    let Some(name) = slice.strip_suffix(".slice").filter(|name| *name != "-" && !name.is_empty()) else {
        return String::new();
    };
    let ends = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    ends.map(|end| format!("/{}.slice", &name[..end])).collect()
}

/// The cgroup that a unit has when it runs, below systemd's own. It follows from its slice, or from the default slice
/// for units with such a name.
pub fn derived_cgroup(name: &str, slice: &str) -> String {
    if !slice.is_empty() {
        return format!("{}/{name}", slice_path(slice));
    }
    if name == "init.scope" {
        return format!("/{name}");
    }
    // Instances of a template share a slice; in its name a dash of the template's is escaped, since dashes nest slices.
    match name.split_once('@').filter(|(_, rest)| rest.ends_with(".service")) {
        Some((template, _)) => {
            let template = template.replace('-', "\\x2d");
            format!("{}/{name}", slice_path(&format!("system-{template}.slice")))
        }
        None => format!("/system.slice/{name}"),
    }
}

/// What stands before systemd's cgroup paths in those of this machine: empty where systemd is the machine's, and the container's
/// cgroup where it runs in one. `pid` is the process that listens on the bus's socket: systemd, which hands the socket on, or
/// the bus itself.
pub fn cgroup_prefix(pid: Option<u32>) -> String {
    let Some(pid) = pid.filter(|pid| *pid > 1) else { return String::new() };
    let text = crate::base::host::process(pid)
        .and_then(|folder| std::fs::read_to_string(folder.join("cgroup")).ok())
        .unwrap_or_default();
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    let below = ["/init.scope", "/system.slice/dbus.service", "/system.slice/dbus-broker.service"];
    below.iter().find_map(|below| path.strip_suffix(below)).unwrap_or_default().to_owned()
}

/// Whether systemd counts processes otherwise than this one: it runs in another pid namespace, which this one can see into.
pub fn counts_pids_apart(pid: Option<u32>) -> bool {
    let namespace = |of: PathBuf| std::fs::read_link(of).ok();
    let theirs = pid.and_then(|pid| namespace(crate::base::host::process(pid)?.join("ns/pid")));
    theirs.is_some_and(|theirs| Some(theirs) != namespace("/proc/self/ns/pid".into()))
}

/// Why a unit's changes are not reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// `exclude_system`.
    System,
    /// `exclude_units`.
    Excluded,
    /// The unit is not in `units`.
    NotSelected,
}

/// Which units are watched.
#[derive(Clone, Debug)]
pub struct Selection {
    exclude_system: bool,
    units: Vec<String>,
    exclude_units: Vec<String>,
}

impl Selection {
    /// Makes the filter from the configuration.
    pub fn of(section: &SystemdSection) -> Self {
        Self {
            exclude_system: section.exclude_system,
            units: section.units.clone(),
            exclude_units: section.exclude_units.clone(),
        }
    }

    /// Why a unit is left out; [`None`] when it is watched.
    pub fn skips(&self, unit: &str) -> Option<Skip> {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| glob::matches(pattern, unit));
        if any(&self.exclude_units) {
            Some(Skip::Excluded)
        } else if !self.units.is_empty() && !any(&self.units) {
            Some(Skip::NotSelected)
        } else if self.exclude_system && SYSTEM_UNITS.iter().any(|pattern| glob::matches(pattern, unit)) {
            Some(Skip::System)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_units_name_survives_escaping() {
        for name in ["sshd.service", "0day.service", "dev-disk-by\\x2duuid-1.swap", "getty@tty1.service", "a_b:c.mount"]
        {
            let path = path_of_unit(name);
            assert!(path[1..].bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_/".contains(&byte)), "{path}");
            assert_eq!(unit_of_path(&path).as_deref(), Some(name));
        }
        assert_eq!(path_of_unit("sshd.service"), format!("{UNITS_PATH}/sshd_2eservice"));
        for path in ["", "/org/freedesktop/systemd1/job/5", "/org/freedesktop/systemd1/unit/a_2", UNITS_PATH] {
            assert_eq!(unit_of_path(path), None, "{path}");
        }
    }

    #[test]
    fn a_cgroup_is_derived_from_slice_and_name() {
        for (name, slice, path) in [
            ("web.service", "system.slice", "/system.slice/web.service"),
            ("web.service", "", "/system.slice/web.service"),
            ("web.service", "a-b-c.slice", "/a.slice/a-b.slice/a-b-c.slice/web.service"),
            ("init.scope", "-.slice", "/init.scope"),
            ("getty@tty1.service", "", "/system.slice/system-getty.slice/getty@tty1.service"),
            (
                "serial-getty@ttyS0.service",
                "",
                "/system.slice/system-serial\\x2dgetty.slice/serial-getty@ttyS0.service",
            ),
        ] {
            assert_eq!(derived_cgroup(name, slice), path);
        }
    }

    #[test]
    fn what_is_left_out_is_left_out_for_one_reason() {
        let section = SystemdSection {
            exclude_system: true,
            units: vec!["*.service".into()],
            exclude_units: vec!["noisy*".into()],
            ..SystemdSection::default()
        };
        let selection = Selection::of(&section);
        assert_eq!(selection.skips("noisy.service"), Some(Skip::Excluded));
        assert_eq!(selection.skips("data.mount"), Some(Skip::NotSelected));
        assert_eq!(selection.skips("systemd-udevd.service"), Some(Skip::System));
        assert_eq!(selection.skips("web.service"), None);
        assert_eq!(Selection::of(&SystemdSection::default()).skips("systemd-udevd.service"), None);
    }
}
