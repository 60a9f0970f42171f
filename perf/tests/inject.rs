//! Faults are real, are explained truthfully, and leave nothing behind.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::lab;
use crate::lab::Need::{Cgroups, Root};
use crate::lab::{PERF, can_run, inject};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tapio_perf::clock::wait_for;
use tapio_perf::inject::cgroup::Hierarchies;

/// The cgroup folders of an injection's pod, in every hierarchy.
fn pod_folders(cgroup: &str) -> Vec<PathBuf> {
    let hierarchies = Hierarchies::find().expect("cgroups");
    let pod = Path::new(cgroup.trim_start_matches('/')).parent().expect("a container has a pod");
    let roots = [Some(hierarchies.v2), hierarchies.v1_memory];
    roots.into_iter().flatten().map(|root| root.join(pod)).collect()
}

fn assert_nothing_left(injection: &Value) {
    let cgroup = injection["cgroup"].as_str().expect("a cgroup");
    for folder in pod_folders(cgroup) {
        assert!(!folder.exists(), "{}", folder.display());
    }
    for key in ["pid", "init_pid", "sender_pid"] {
        if let Some(pid) = injection[key].as_u64() {
            assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{key} {pid}");
        }
    }
}

#[test]
fn an_oom_kill_is_by_the_limit() {
    let _turn = lab::beside();
    if !can_run("an_oom_kill_is_by_the_limit", &[Root, Cgroups]) {
        return;
    }
    let injection = inject(&["oom", "--memory", "32MiB"]);
    assert_eq!(injection["signal"], 9);
    assert_eq!(injection["limit_bytes"], 32 << 20);
    assert_eq!(injection["sender_pid"], Value::Null);
    let id = injection["container_id"].as_str().expect("an id");
    let folder = injection["limit_cgroup"].as_str().expect("a folder");
    assert!(folder.ends_with(&format!("cri-containerd-{id}.scope")));
    assert_nothing_left(&injection);
}

#[test]
fn a_silent_child_dies_while_its_init_lives_on() {
    let _turn = lab::beside();
    if !can_run("a_silent_child_dies_while_its_init_lives_on", &[Root, Cgroups]) {
        return;
    }
    let injection = inject(&["silent-child-oom", "--memory", "32MiB"]);
    assert_eq!(injection["signal"], 9);
    assert_ne!(injection["pid"], injection["init_pid"]);
    assert_nothing_left(&injection);
}

#[test]
fn a_kill_names_its_sender() {
    let _turn = lab::beside();
    if !can_run("a_kill_names_its_sender", &[Root, Cgroups]) {
        return;
    }
    let injection = inject(&["kill"]);
    assert_eq!(injection["signal"], 9);
    assert!(injection["sender_pid"].as_u64().is_some_and(|pid| pid > 1));
    assert_nothing_left(&injection);
}

#[test]
fn segv_and_exit_are_what_they_say() {
    let _turn = lab::beside();
    if !can_run("segv_and_exit_are_what_they_say", &[Root, Cgroups]) {
        return;
    }
    let segv = inject(&["segv"]);
    assert_eq!((&segv["signal"], &segv["exit_code"]), (&11.into(), &Value::Null));
    assert_nothing_left(&segv);
    let exit = inject(&["exit", "--keep-time", "10ms"]);
    assert_eq!((&exit["signal"], &exit["exit_code"]), (&Value::Null, &3.into()));
    let earlier = exit["earlier"].as_array().expect("earlier containers");
    assert_eq!(earlier.len(), 3);
    for container in earlier {
        assert_eq!(container["pod_uid"], exit["pod_uid"]);
        assert_ne!(container["container_id"], exit["container_id"]);
        assert_nothing_left(container);
    }
}

#[test]
fn sigterm_is_ignored_for_the_grace_period() {
    let _turn = lab::beside();
    if !can_run("sigterm_is_ignored_for_the_grace_period", &[Root, Cgroups]) {
        return;
    }
    let injection = inject(&["ignored-sigterm"]);
    assert_eq!(injection["signal"], 9);
    let time = |key: &str| injection[key].as_u64().expect("a time");
    assert!(time("died_ns") - time("sigterm_ns") >= 2_000_000_000);
    assert_nothing_left(&injection);
}

#[test]
fn an_interrupt_cleans_up() {
    let _turn = lab::beside();
    if !can_run("an_interrupt_cleans_up", &[Root, Cgroups]) {
        return;
    }
    for signal in [Signal::INT, Signal::TERM] {
        let mut child = Command::new(PERF)
            .args(["inject", "ignored-sigterm"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("tapio-perf starts");
        // Its container is the only process that acts and descends from it.
        let (victim, cgroup) = wait_for("the container", Duration::from_secs(130), |_| Ok(container_below(child.id())))
            .expect("a container");
        let pid = Pid::from_raw(child.id() as i32).expect("a process id");
        kill_process(pid, signal).expect("a signal is sent");
        let status = child.wait().expect("it ends");
        let mut text = String::new();
        let mut stderr = child.stderr.take().expect("stderr");
        stderr.read_to_string(&mut text).expect("text");
        assert_eq!(status.code(), Some(2), "{text}");
        assert!(text.contains("interrupted"), "{text}");
        assert!(!Path::new(&format!("/proc/{victim}")).exists());
        for folder in pod_folders(&cgroup) {
            assert!(!folder.exists(), "{}", folder.display());
        }
    }
}

/// A process two generations below `ancestor` that plays its role, and its cgroup.
fn container_below(ancestor: u32) -> Option<(u32, String)> {
    let parent = |pid: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        if parent(parent(pid)?)? != ancestor {
            return None;
        }
        let command = fs::read_to_string(entry.path().join("cmdline")).ok()?;
        command.split('\0').find(|&word| word == "act")?;
        let cgroups = fs::read_to_string(entry.path().join("cgroup")).ok()?;
        let own = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
        Some((pid, own.to_owned()))
    })
}

#[test]
fn without_root_it_says_what_it_needs() {
    let _turn = lab::beside();
    // A copy that everybody can reach: the checkout may lie where nobody else may look.
    let folder = tempfile::tempdir().expect("a folder");
    let copy = folder.path().join("tapio-perf");
    fs::copy(PERF, &copy).expect("a copy");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("readable by everybody");
    let mut command = Command::new(&copy);
    if rustix::process::geteuid().is_root() {
        // Not by the command's own uid: it is started through another program, which would not take that over.
        command = Command::new("/usr/bin/setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]).arg(&copy);
    }
    command.args(["inject", "kill"]);
    lab::assert_says(&lab::refusal(command, "inject without root"), &["root"]);
}
